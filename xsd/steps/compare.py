"""Steps 06 and 07: runs side by side, and what the explorer shows of them.

Every figure has its interval, every difference is paired sample by sample where both runs hold the
sample. One run alone compares its levels, each against the drafter's own tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
    "speedup": "times as fast as the fastest baseline",
}
_COUNTS = {"token_acceptance": ("matched", "positions"),
           "accepted_per_round": ("accepted", "rounds")}


def names(runs: Sequence[str]) -> list[str]:
    """A short name for each run folder: its last part, or more of the path where two would be
    called the same. Raises: ParameterError when one folder is given twice."""
    places = [folder.resolve(run) for run in runs]
    if len(set(places)) < len(places):
        raise ParameterError(f"a run is given twice among {', '.join(runs)}; give each folder once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def overview(runs: Sequence[str]) -> pd.DataFrame:
    """One row per run: pair, revision, seed, training pairs, recipe, levels, best adapter and
    floor, and what the live run said. Raises: ParameterError when a folder holds no results."""
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
    """Numerator and denominator of a metric, one row per data set, level (or live arm) and sample:
    data, level, sample, cluster, above, below.

    Raises: ParameterError when the run lacks what the metric needs.
    """
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


def _speedups(run: str) -> pd.DataFrame:
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
    found["cluster"] = found["sample"].map(origin["sequence"]).fillna(found["sequence"])
    pieces = []
    for name, part in found.groupby("data", sort=False):
        seconds = part.groupby(["arm", "sample"], sort=False)["total_s"].median().unstack("arm")
        baselines = part.loc[part["baseline"], "arm"].unique()
        if not len(baselines):
            raise ParameterError(f"the live records of {run} hold no baseline; run notebook 05 "
                                 "with ar among its arms")
        fastest = seconds[seconds[baselines].sum().idxmin()]
        own = seconds.melt(var_name="level", value_name="below", ignore_index=False)
        own = own.reset_index()
        clusters = part.drop_duplicates("sample").set_index("sample")["cluster"]
        own = own.assign(data=name, cluster=own["sample"].map(clusters))
        pieces.append(own.assign(above=own["sample"].map(fastest)))
    return pd.concat(pieces, ignore_index=True).dropna(subset=["below"])


def values(runs: Sequence[str], metric: str, *, resamples: int, seed: int) -> pd.DataFrame:
    """A metric of every run, data set and level: run, data, level, value, low, high, n, n_clusters,
    kind, best (floors and ceilings apart)."""
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        for (which, level), part in per_sample(run, metric).groupby(["data", "level"], sort=False):
            found = statistics.bootstrap_ratio(part["above"], part["below"], part["cluster"],
                                               n_resamples=resamples, seed=seed)
            kind = "measured" if metric == "speedup" else kind_of(level)
            about = {"run": name, "data": which, "level": level, "kind": kind}
            rows.append(about | dataclasses.asdict(found))
        # floors hold no row per sample, so they are shown and not paired
        for which, tokens in folder.load_results(run).get("tokens", {}).get("test", {}).items():
            rows += [{"run": name, "data": which, "level": row["label"], "kind": "floor",
                      **row[metric]} for row in tokens["rows"].values()
                     if row["kind"] == "floor" and metric in row]
    found = pd.DataFrame(rows)
    starred = ~found["kind"].isin(["ceiling", "floor"])
    highest = found[starred].groupby("data")["value"].max()
    return found.assign(best=starred & (found["value"] == found["data"].map(highest)))


def kind_of(level: str) -> str:
    """ceiling (reads the verifier's own states alone), drafter or adapter."""
    return {table.DRAFTER: "drafter", "B1": "ceiling"}.get(level, "adapter")


def differences(runs: Sequence[str], metric: str, *, baseline: str = "", resamples: int,
                seed: int) -> pd.DataFrame:
    """Paired differences with intervals, on the samples that both sides hold.

    Several runs: each level of a run minus the same level of the baseline run. One run: each level
    minus the drafter's own tokens (live: minus our greedy loop), or minus the first level where
    there are none. Returns: run, data, level, against, value, low, high, n_samples, clear (the
    interval excludes 0). Raises: ParameterError for a baseline that is not among the runs.
    """
    called = dict(zip(names(runs), runs, strict=True))
    by_place = {folder.resolve(run): name for name, run in called.items()}
    base = baseline if baseline in called else by_place.get(folder.resolve(baseline or runs[0]))
    if base is None:
        raise ParameterError(f"the baseline {baseline!r} is not among the runs {', '.join(called)}")
    keys = ["data", "level", "sample"]
    sides = {name: per_sample(run, metric).set_index(keys).sort_index()
             for name, run in called.items()}
    rows = []
    for name, own in sides.items():
        for which, level in own.index.droplevel("sample").unique():
            if len(called) > 1:
                against, other = f"{base} {level}", (base, which, level)
            else:
                levels = own.loc[which].index.unique("level")
                against = next((one for one in (table.DRAFTER, "ar") if one in levels), levels[0])
                other = (name, which, against)
            theirs = sides[other[0]]
            if other == (name, which, level) or other[1:] not in theirs.index.droplevel("sample"):
                continue
            theirs = theirs.loc[other[1:], ["above", "below"]].add_suffix("_other")
            pair = own.loc[(which, level)].join(theirs, how="inner")
            about = {"run": name, "data": which, "level": level, "against": against}
            rows.append(about | {"n_samples": len(pair)} | _difference(pair, resamples, seed))
    columns = ["run", "data", "level", "against", "value", "low", "high", "n_samples", "clear"]
    return pd.DataFrame(rows, columns=columns)


def _difference(pair: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    try:
        found = statistics.bootstrap_ratio_difference(
            (pair["above"], pair["below"]), (pair["above_other"], pair["below_other"]),
            pair["cluster"], n_resamples=resamples, seed=seed)
    # no sample in common, or nothing drafted on one side: there is no difference to state
    except MetricError:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "clear": False}
    clear = not math.isnan(found.low) and found.excludes(0.0)
    return {"value": found.value, "low": found.low, "high": found.high, "clear": clear}


def picture(found: pd.DataFrame, which: str, metric: str) -> go.Figure:
    """One data set of :func:`values`, the best starred: dots with intervals, for the speed-up bars
    around 1."""
    part = found[found["data"] == which]
    run = " · " + part["run"] if part["run"].nunique() > 1 else ""
    stars = part["best"].map({True: "★ ", False: ""})
    frame = part.assign(name=stars + part["level"].str.replace("_", " ") + run)
    frame = frame.astype({"low": float, "high": float})
    title = f"{METRICS[metric][0].upper()}{METRICS[metric][1:]} · {which}"
    if metric == "speedup":
        return figures.speedup_bars(frame, title=title)
    return figures.accepted_per_round_dots(frame, title=title,
                                           x=f"{METRICS[metric]}, with 95 % interval")


def curves(runs: Sequence[str]) -> pd.DataFrame:
    """Training histories of all runs for ``views.figures.training_curves``; levels carry the run's
    name where there are several runs."""
    pieces = [pd.DataFrame(columns=["level", "epoch", "split", "loss"])]
    for name, run in zip(names(runs), runs, strict=True):
        if levels := training.trained(run):
            own = training.history(run, levels)
            pieces.append(own.assign(level=own["level"] + f" · {name}") if len(runs) > 1 else own)
    return pd.concat(pieces[1:] or pieces, ignore_index=True)


def save(run_dir: str, metric: str, runs: Sequence[str], found: pd.DataFrame,
         differing: pd.DataFrame, **made_with: Any) -> dict[str, Any]:
    """Write ``results/compare.json`` and return it. made_with: seed and parameters, for the
    provenance."""
    hashes = [folder.data_hash(run) for run in runs]
    plain = [one.astype(object).where(one.notna(), None).to_dict("records")
             for one in (found, differing)]
    results = {
        "metric": metric, "runs": names(runs), "values": plain[0], "differences": plain[1],
        "provenance": provenance(data_hash="+".join(filter(None, hashes)) or None, **made_with),
    }
    folder.save_results(run_dir, "compare", results)
    return results


# --- the explorer


class Pictures:
    """Sample key → Sample of any of the runs, read from its data set when asked for and remembered;
    None for an unknown key."""

    def __init__(self, runs: Sequence[str]) -> None:
        self._runs = runs
        self._places: dict[str, tuple[HeldOut, int]] | None = None
        self._read: dict[str, Sample] = {}

    def __call__(self, key: str) -> Sample | None:
        if self._places is None:
            # as notebook 01 was given them: a dataset folder is found again by its path
            sets = [evaluation.held_out(run, data) for run in self._runs
                    for data in extraction.pair_file(run)["test_data"]]
            self._places = {name: (one, i) for one in sets for i, name in enumerate(one.keys)}
        if key in self._places and key not in self._read:
            pairs, index = self._places[key]
            self._read[key] = pairs.load(index)
        return self._read.get(key)


def explorer(runs: Sequence[str], *, levels: Sequence[str],
             threshold: float) -> explorers.AcceptanceExplorer:
    """The explorer over all runs, opened on ``levels`` as far as the first run holds them. In it,
    a run is a run folder and one of its held-out sets."""
    pieces = []
    for name, run in zip(names(runs), runs, strict=True):
        tokens = folder.load_tokens(run)
        pieces.append(tokens.assign(run=name + " · " + tokens["data"].astype(str)))
    found = explorers.ExplorerData(pd.concat(pieces, ignore_index=True), Pictures(runs))
    held = found.levels(found.runs[0])
    chosen = [level for level in levels if level in held] or held[:2]
    return explorers.AcceptanceExplorer(found, levels=chosen, tau=threshold)
