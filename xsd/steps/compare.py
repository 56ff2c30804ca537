"""Steps 06 and 07: runs side by side, each difference paired sample by sample (one run alone: its
levels, each against the drafter's own tokens), and what the explorer shows of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from xsd.core import MetricError, ParameterError, Sample
from xsd.evaluate import statistics, table
from xsd.evaluate.held_out import HeldOut
from xsd.files import provenance
from xsd.runs import folder
from xsd.steps import data as datasets
from xsd.steps import evaluation, extraction, training
from xsd.views import explorers, figures

METRICS = {
    "accepted_per_round": "accepted drafts per round",
    "token_acceptance": "share of draft tokens that are the verifier's",
    "cosine": "cosine of aligned and verifier states",
    "speedup": "times as fast as the best baseline",
}
_COUNTS = {"token_acceptance": ("matched", "positions"),
           "accepted_per_round": ("accepted", "rounds")}
KINDS = {table.DRAFTER: "drafter", "B1": "ceiling"}
"""What levels are that are no adapter; a ceiling reads the verifier's own states alone."""


def names(runs: Sequence[str]) -> list[str]:
    """A name for each run folder: as many last parts of its path as tell the runs apart. Raises:
    ParameterError when one folder is given twice."""
    places = [folder.resolve(run) for run in runs]
    if len(set(places)) < len(places):
        raise ParameterError(f"a run is given twice among {', '.join(runs)}; give each folder once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def overview(runs: Sequence[str]) -> pd.DataFrame:
    """One row per run: what it was made with and its headlines. Raises: ParameterError."""
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        found = folder.load_results(run)
        extracted, trained, tokens, live = (found.get(step, {})
                                            for step in ("extract", "train", "tokens", "live"))
        origin = next((one["provenance"] for one in (tokens, extracted) if "provenance" in one), {})
        first = next(iter(tokens.get("test", {}).values()), {})
        best = live.get("arms", {}).get(live.get("best_arm"), {})
        rows.append({
            "run": name,
            "pair": extracted.get("pair"),
            "revision": str(origin.get("git_revision", ""))[:10],
            "seed": origin.get("seed"),
            "training pairs": extracted.get("train", {}).get("pairs"),
            "recipe": trained.get("profile"),
            "levels": ", ".join(trained.get("levels", {})),
            "best adapter": first.get("best_adapter"),
            "best floor": first.get("best_floor"),
            "fastest drafting arm": best.get("label"),
            "speed-up": best.get("speedup", {}).get("value"),
        })
    return pd.DataFrame(rows)


def per_sample(run: str, metric: str) -> pd.DataFrame:
    """Numerator and denominator of a metric per data set, level (or live arm) and sample: data,
    level, sample, cluster, above, below. Raises: ParameterError for what the run lacks."""
    if metric == "speedup":
        return _speedups(run)
    tokens = folder.load_tokens(run)
    if metric == "cosine":
        keys = ["data", "level", "sample", "sequence"]
        known = tokens[tokens["cosine"].notna()].groupby(keys, sort=False, observed=True)["cosine"]
        rows = known.agg(above="sum", below="count").reset_index()
    else:
        gamma = folder.load_results(run).get("tokens", {}).get("gamma", 5)
        above, below = _COUNTS[metric]
        rows = table.counts(tokens, gamma).rename(columns={above: "above", below: "below"})
    rows = rows.rename(columns={"sequence": "cluster"}).astype({"level": str, "data": str})
    return rows.sort_values(["data", "level", "sample"], kind="stable", ignore_index=True)


def _live(run: str) -> dict[str, list[dict[str, Any]]]:
    """data set → the live records of a run, ``sequence`` being what intervals draw."""
    path = folder.resolve(run) / "records.jsonl"
    if not path.is_file():
        raise ParameterError(f"the run {run} has no live records; run notebook 05 with "
                             f"run_dir={run} first, or choose another metric")
    # brings the models' libraries, seconds that most comparisons need not wait
    from xsd.bench import records

    found = pd.DataFrame(records.read_records(path))
    origin = folder.load_tokens(run).drop_duplicates("sample").set_index("sample")
    origin = origin[["data", "sequence"]].astype(str)
    found["data"] = found["sample"].map(origin["data"]).fillna(datasets.SIMULATED)
    found["sequence"] = found["sample"].map(origin["sequence"]).fillna(found["sequence"])
    return {name: part.to_dict("records") for name, part in found.groupby("data", sort=False)}


def _speedups(run: str) -> pd.DataFrame:
    """Each live arm's ratio to the best baseline, by sample."""
    from xsd.bench import speedups

    pieces = []
    for name, part in _live(run).items():
        times, baseline, clusters = speedups.seconds(part)
        ratios = times.rdiv(times[baseline], axis=0)
        own = ratios.melt(var_name="level", value_name="above", ignore_index=False).reset_index()
        pieces.append(own.assign(data=name, below=1.0, cluster=own["sample"].map(clusters)))
    return pd.concat(pieces, ignore_index=True)


def _speedup_rows(run: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of :func:`values` for the live arms, with baseline, spread and busy."""
    from xsd.bench import arms, speedups

    return [{"data": name, "level": arm, "kind": "measured", **row,
             "baseline": arms.label_of(row["baseline"])}
            for name, part in _live(run).items()
            for arm, row in speedups.of(part, **options).items()]


def values(runs: Sequence[str], metric: str, *, resamples: int, seed: int) -> pd.DataFrame:
    """A metric of every run, data set and level: run, data, level, value, low, high, n, n_clusters,
    kind, best (floors and ceilings apart; a busy machine has no best); of speed-ups also total,
    baseline, spread, busy."""
    rows: list[dict[str, Any]] = []
    options = {"n_resamples": resamples, "seed": seed}
    for name, run in zip(names(runs), runs, strict=True):
        if metric == "speedup":
            rows += [{"run": name, **row} for row in _speedup_rows(run, **options)]
            continue
        for (which, level), part in per_sample(run, metric).groupby(["data", "level"], sort=False):
            found = statistics.bootstrap_ratio(part["above"], part["below"], part["cluster"],
                                               **options)
            kind = KINDS.get(level, "adapter")
            about = {"run": name, "data": which, "level": level, "kind": kind}
            rows.append(about | dataclasses.asdict(found))
        # floors hold no row per sample, so they are shown and not paired
        for which, tokens in folder.load_results(run).get("tokens", {}).get("test", {}).items():
            rows += [{"run": name, "data": which, "level": row["label"], "kind": "floor",
                      **row[metric]} for row in tokens["rows"].values()
                     if row["kind"] == "floor" and metric in row]
    found = pd.DataFrame(rows)
    starred = ~found["kind"].isin(["ceiling", "floor"]) & ~found.get("busy", False)
    highest = found[starred].groupby("data")["value"].max()
    return found.assign(best=starred & (found["value"] == found["data"].map(highest)))


def differences(runs: Sequence[str], metric: str, *, baseline: str = "", resamples: int,
                seed: int) -> pd.DataFrame:
    """Paired differences with intervals, on the samples that both sides hold.

    Several runs: each level minus the same level of the baseline run. One run: each level minus the
    drafter's own tokens (live: minus our greedy loop), else minus the first level. Returns: run,
    data, level, against, value, low, high, n_samples, clear (the interval excludes 0).
    Raises: ParameterError for a baseline that is not among the runs.
    """
    called = dict(zip(names(runs), runs, strict=True))
    by_place = {folder.resolve(run): name for name, run in called.items()}
    base = baseline if baseline in called else by_place.get(folder.resolve(baseline or runs[0]))
    if base is None:
        raise ParameterError(f"the baseline {baseline!r} is not among the runs {', '.join(called)}")
    sides = {(name, which, level): part.set_index("sample").sort_index()
             for name, run in called.items()
             for (which, level), part in per_sample(run, metric).groupby(["data", "level"])}
    rows = []
    for (name, which, level), own in sides.items():
        against, other = f"{base} {level}", (base, which, level)
        if len(called) == 1:
            levels = [one for _, data, one in sides if data == which]
            against = next((one for one in (table.DRAFTER, "ar") if one in levels), levels[0])
            other = (name, which, against)
        if other in sides and other != (name, which, level):
            pair = own.join(sides[other][["above", "below"]].add_suffix("_other"), how="inner")
            about = {"run": name, "data": which, "level": level, "against": against}
            found = _difference(pair, metric == "speedup", n_resamples=resamples, seed=seed)
            rows.append(about | {"n_samples": len(pair)} | found)
    columns = ["run", "data", "level", "against", "value", "low", "high", "n_samples", "clear"]
    return pd.DataFrame(rows, columns=columns)


def _difference(pair: pd.DataFrame, of_medians: bool, **options: int) -> dict[str, Any]:
    try:
        if of_medians:
            from xsd.bench import speedups

            found = speedups.median(pair["above"], pair["cluster"], minus=pair["above_other"],
                                    **options)
        else:
            found = statistics.bootstrap_ratio_difference(
                (pair["above"], pair["below"]), (pair["above_other"], pair["below_other"]),
                pair["cluster"], **options)
    # no sample in common, or nothing drafted on one side: there is no difference to state
    except MetricError:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "clear": False}
    return {"value": found.value, "low": found.low, "high": found.high,
            "clear": found.excludes(0.0)}


def picture(found: pd.DataFrame, which: str, metric: str) -> go.Figure:
    """One data set of :func:`values`, the best starred."""
    part = found[found["data"] == which]
    run = " · " + part["run"] if part["run"].nunique() > 1 else ""
    stars = part["best"].map({True: "★ ", False: ""})
    frame = part.assign(name=stars + part["level"].str.replace("_", " ") + run)
    frame = frame.astype({"low": float, "high": float})
    title = f"{METRICS[metric].capitalize()} · {which}"
    if metric == "speedup":
        return figures.speedup_bars(frame, title=title)
    return figures.accepted_per_round_dots(frame, title=title,
                                           x=f"{METRICS[metric]}, with 95 % interval")


def curves(runs: Sequence[str]) -> pd.DataFrame:
    """Training histories of all runs, for ``views.figures.training_curves``."""
    pieces = [pd.DataFrame(columns=["level", "epoch", "split", "loss"])]
    for name, run in zip(names(runs), runs, strict=True):
        if levels := training.trained(run):
            own = training.history(run, levels)
            pieces.append(own.assign(level=own["level"] + f" · {name}") if len(runs) > 1 else own)
    return pd.concat(pieces[1:] or pieces, ignore_index=True)


def save(run_dir: str, metric: str, runs: Sequence[str], found: pd.DataFrame,
         differing: pd.DataFrame, **made_with: Any) -> dict[str, Any]:
    """Write ``results/compare.json`` and return it. made_with: seed, parameters."""
    hashes = "+".join(filter(None, map(folder.data_hash, runs))) or None
    results = {"metric": metric, "runs": names(runs), "values": found.to_dict("records"),
               "differences": differing.to_dict("records"),
               "provenance": provenance(data_hash=hashes, **made_with)}
    folder.save_results(run_dir, "compare", results)
    return results


# --- the explorer


def pictures(runs: Sequence[str]) -> Callable[[str], Sample | None]:
    """Sample key → Sample of any of the runs, read when asked for; None for an unknown key."""

    @cache
    def places() -> dict[str, tuple[HeldOut, int]]:
        sets = [evaluation.held_out(run, data) for run in runs
                for data in extraction.held_out_names(run)]
        return {name: (one, i) for one in sets for i, name in enumerate(one.keys)}

    @cache
    def read(key: str) -> Sample | None:
        pairs, index = places().get(key, (None, 0))
        with contextlib.suppress(ParameterError):  # of imported chunks nobody knows the clips
            return pairs and pairs.load(index)
        return None

    return read


def explorer(runs: Sequence[str], *, levels: Sequence[str],
             threshold: float) -> explorers.AcceptanceExplorer:
    """The explorer, opened on ``levels`` as far as the first run holds them. In it, a run is a run
    folder and one of its held-out sets."""
    tables = [folder.load_tokens(run).assign(run=name)
              for name, run in zip(names(runs), runs, strict=True)]
    tokens = pd.concat(tables, ignore_index=True)
    tokens = tokens.assign(run=tokens["run"] + " · " + tokens["data"].astype(str))
    found = explorers.ExplorerData(tokens, pictures(runs))
    held = found.levels(found.runs[0])
    chosen = [level for level in levels if level in held] or held[:2]
    return explorers.AcceptanceExplorer(found, levels=chosen, tau=threshold)
