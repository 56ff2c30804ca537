"""Step 06: runs side by side, each difference paired sample by sample (one run alone: its levels,
each against the drafter's own tokens)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from xsd.core import MetricError, ParameterError
from xsd.evaluate import comparison, statistics, table
from xsd.files import provenance
from xsd.runs import folder, listing
from xsd.steps import data as datasets
from xsd.steps import training
from xsd.views import figures

METRICS = {
    "accepted_per_round": "accepted drafts per round",
    "token_acceptance": "share of draft tokens that are the verifier's",
    "cosine": "cosine of aligned and verifier states",
    "speedup": "times as fast as the best baseline",
}
SAME = {"speedup": ("gamma", "gamma_prefill", "max_new_tokens", "threads")}
"""Parameters that runs must share for a paired difference of a metric; others: gamma and mode."""
KINDS = {table.DRAFTER: "drafter", "B1": "ceiling"}
"""What levels are that are no adapter; a ceiling reads the verifier's own states alone."""


def per_sample(run: str, metric: str) -> pd.DataFrame:
    """Numerator and denominator of a metric per data set, level (or live arm: its ratio to the best
    baseline) and sample: data, level, sample, cluster, above, below. Raises: ParameterError for
    what the run lacks."""
    if metric == "speedup":
        from xsd.bench import speedups

        pieces = []
        for name, part in _live(run).items():
            with folder.as_written(folder.resolve(run) / "records.jsonl"):
                times, baseline, clusters = speedups.seconds(part)
            own = times.rdiv(times[baseline], axis=0).melt(
                var_name="level", value_name="above", ignore_index=False).reset_index()
            pieces.append(own.assign(data=name, below=1.0, cluster=own["sample"].map(clusters)))
        return pd.concat(pieces, ignore_index=True)
    with folder.as_written(folder.resolve(run) / "tokens.parquet"):
        tokens, keys = folder.load_tokens(run), ["data", "level", "sample", "sequence"]
        if metric == "cosine":
            known = tokens[tokens["cosine"].notna()].groupby(keys, sort=False, observed=True)
            rows = known["cosine"].agg(above="sum", below="count").reset_index()
        else:
            gamma = folder.load_results(run).get("tokens", {}).get("gamma", 5)
            above, below = comparison.UNITS[metric]
            rows = table.counts(tokens, gamma).rename(columns={above: "above", below: "below"})
        rows = rows.rename(columns={"sequence": "cluster"}).astype(
            {"level": str, "data": str, "above": float, "below": float})
        return rows.sort_values(keys[:3], kind="stable", ignore_index=True)


def _live(run: str) -> dict[str, list[dict[str, Any]]]:
    """data set → the live records of a run, ``sequence`` being what intervals draw."""
    path = folder.resolve(run) / "records.jsonl"
    if not path.is_file():
        raise ParameterError(f"the run {run} has no live records; run notebook 05 with "
                             f"run_dir={run} first, or choose another metric")
    # brings the models' libraries, seconds that most comparisons need not wait
    from xsd.bench import records

    with folder.as_written(path):
        found = pd.DataFrame(records.read_records(path)).astype({"sample": str, "sequence": str})
    origin = folder.load_tokens(run).drop_duplicates("sample").set_index("sample")
    origin = origin[["data", "sequence"]].astype(str)
    found["data"] = found["sample"].map(origin["data"]).fillna(datasets.SIMULATED)
    found["sequence"] = found["sample"].map(origin["sequence"]).fillna(found["sequence"])
    return {name: part.to_dict("records") for name, part in found.groupby("data", sort=False)}


def _speedup_rows(run: str, **options: Any) -> list[dict[str, Any]]:
    """Rows of :func:`values` for the live arms, with baseline, spread and busy."""
    from xsd.bench import arms, speedups

    live = _live(run)
    with folder.as_written(folder.resolve(run) / "records.jsonl"):
        return [{"data": name, "level": arm, "kind": "measured", **row,
                 "baseline": arms.label_of(row["baseline"])}
                for name, part in live.items() for arm, row in speedups.of(part, **options).items()]


def values(runs: Sequence[str], metric: str, *, resamples: int, seed: int) -> pd.DataFrame:
    """A metric of every run, data set and level: run, data, level, value, low, high, n, n_clusters,
    kind, best (floors and ceilings apart; a busy machine has no best); of speed-ups also total,
    baseline, spread, busy."""
    rows, options = [], {"n_resamples": resamples, "seed": seed}
    for name, run in zip(listing.names(runs), runs, strict=True):
        if metric == "speedup":
            rows += [{"run": name, **row} for row in _speedup_rows(run, **options)]
            continue
        for (which, level), part in per_sample(run, metric).groupby(["data", "level"], sort=False):
            sides = part["above"], part["below"], part["cluster"]
            rows.append({"run": name, "data": which, "level": level,
                         "kind": KINDS.get(level, "adapter"),
                         **vars(statistics.bootstrap_ratio(*sides, **options))})
        # floors hold no row per sample, so they are shown and not paired
        results = folder.load_results(run)
        with folder.as_written(folder.resolve(run) / "results" / "tokens.json"):
            rows += [{"run": name, "data": which, "level": row["label"], "kind": "floor",
                      **row[metric]}
                     for which, tokens in results.get("tokens", {}).get("test", {}).items()
                     for row in tokens["rows"].values() if row["kind"] == "floor" and metric in row]
    found = pd.DataFrame(rows)
    starred = ~found["kind"].isin(["ceiling", "floor"]) & ~found.get("busy", False)
    highest = found[starred].groupby("data")["value"].max()
    return found.assign(best=starred & (found["value"] == found["data"].map(highest)))


def differences(runs: Sequence[str], metric: str, *, baseline: str = "", resamples: int,
                seed: int) -> pd.DataFrame:
    """Paired differences with intervals, on the samples that both sides hold.

    Several runs: each level minus the same level of the baseline run, or minus its only one where
    both hold one, if they may be compared (:func:`apart`). One run: each level minus the drafter's
    own tokens (live: minus our greedy loop), else minus the first level. Returns: run, data, level,
    against, value, low, high, n_samples, clear (the interval excludes 0). Raises: ParameterError
    for a baseline that is not among the runs."""
    called = dict(zip(listing.names(runs), runs, strict=True))
    base = _baseline(called, baseline)
    refused = set(apart(runs, metric, baseline=baseline)[["run", "data"]].itertuples(index=False))
    sides = {(name, which, level): part.set_index("sample").sort_index()
             for name, run in called.items()
             for (which, level), part in per_sample(run, metric).groupby(["data", "level"])}
    rows = []
    for (name, which, level), own in sides.items():
        mine, theirs = ([one for *place, one in sides if place == [run, which]]
                        for run in (name, base))
        if (name, which) in refused or not theirs:
            continue
        partner = _partner(level, mine, theirs, alone=len(called) == 1)
        other = (base, which, partner)
        if other in sides and other != (name, which, level):
            against = partner if len(called) == 1 else f"{base} {partner}"
            pair = own.join(sides[other][["above", "below"]].add_suffix("_other"), how="inner")
            about = {"run": name, "data": which, "level": level, "against": against}
            found = _difference(pair, metric == "speedup", n_resamples=resamples, seed=seed)
            rows.append(about | {"n_samples": len(pair)} | found)
    return pd.DataFrame(rows, columns=["run", "data", "level", "against", "value", "low", "high",
                                       "n_samples", "clear"])


def _partner(level: str, own: Sequence[str], theirs: Sequence[str], *, alone: bool) -> str:
    """The level of the baseline run that a level is compared with."""
    if alone:
        return next((one for one in (table.DRAFTER, "ar") if one in theirs), theirs[0])
    trained = [[one for one in levels if one != table.DRAFTER] for levels in (own, theirs)]
    # points of a sweep over levels hold one each
    return trained[1][0] if [level] == trained[0] and len(trained[1]) == 1 else level


def _baseline(called: Mapping[str, str], baseline: str) -> str:
    """The name of the run that differences are taken against."""
    by_place = {folder.resolve(run): name for name, run in called.items()}
    base = baseline if baseline in called else by_place.get(
        folder.resolve(baseline or next(iter(called.values()))))
    if base is None:
        raise ParameterError(f"the baseline {baseline!r} is not among the runs {', '.join(called)}")
    return base


def apart(runs: Sequence[str], metric: str, *, baseline: str = "") -> pd.DataFrame:
    """Runs that are not subtracted from the baseline run, by held-out set, and why: run, data, why.

    A paired difference needs the same held-out data, pair of models and parameters (``SAME``) on
    both sides. Raises: ParameterError for a baseline that is not among the runs."""
    called = dict(zip(listing.names(runs), runs, strict=True))
    made = {name: _made_with(run, metric) for name, run in called.items()}
    base = _baseline(called, baseline)
    rows = []
    for name, data, mine in ((name, *one) for name, sets in made.items() for one in sets.items()):
        theirs = made[base].get(data, {})
        why = [f"its {what} is {mine[what]}, that of {base} {theirs[what]}" for what in mine
               if what in theirs and mine[what] != theirs[what]]
        rows += [(name, data, one) for one in (
            why if theirs else [f"{base} was not evaluated on it"])]
    return pd.DataFrame(rows, columns=["run", "data", "why"])


def _made_with(run: str, metric: str) -> dict[str, dict[str, str]]:
    """Held-out set → what must be equal in runs that are subtracted, as far as it is known."""
    live = metric == "speedup"
    with folder.as_written(folder.resolve(run) / "results"):
        results = folder.load_results(run)
        extract, found = (results.get(name, {}) for name in (
            "extract", "live" if live else "tokens"))
        origin = found.get("provenance", {})
        given = origin.get("parameters", {})
        known = {name: given.get(name) for name in SAME.get(metric, ("gamma", "mode"))}
        known |= {f"{role}'s weights": one[:12] for role, one in extract.get("weights", {}).items()}
        asked = extract.get("provenance", {}).get("parameters", {})
        known["longest answer"] = asked.get("max_new_tokens")
        hashes = {name.removeprefix("test_"): value
                  for name, value in extract.get("data_hashes", {}).items()}
        if live:
            known |= {"baseline": found.get("baseline"), "machine": origin.get("machine")}
        elif given.get("test_data"):
            sets = map(datasets.name_of, given["test_data"])
            hashes |= dict(zip(sets, str(origin.get("data_hash")).split("+"), strict=False))
        return {data: {name: str(value) for name, value in {
            **known, "held-out data": hashes.get(data, "")[:16]}.items() if value not in (None, "")}
            for data in found.get("test", {})}


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
    except MetricError:  # no sample in common, or nothing drafted on one side
        found = statistics.Interval(math.nan, math.nan, math.nan, 0, 0)
    return {"value": found.value, "low": found.low, "high": found.high,
            "clear": found.excludes(0.0)}


def picture(found: pd.DataFrame, which: str, metric: str) -> go.Figure:
    """One data set of :func:`values`, the best starred."""
    part = found[found["data"] == which]
    run = " · " + part["run"] if part["run"].nunique() > 1 else ""
    stars = part["best"].map({True: "★ ", False: ""})
    frame = part.assign(name=stars + part["level"].str.replace("_", " ") + run).astype(
        {"low": float, "high": float})
    title = f"{METRICS[metric].capitalize()} · {which}"
    return figures.speedup_bars(frame, title=title) if metric == "speedup" else (
        figures.accepted_per_round_dots(frame, title=title, x=METRICS[metric]))


def curves(runs: Sequence[str]) -> pd.DataFrame:
    """Training histories of all runs, for ``views.figures.training_curves``."""
    pieces = [pd.DataFrame(columns=["level", "epoch", "split", "loss"])]
    for name, run in zip(listing.names(runs), runs, strict=True):
        if levels := training.trained(run):
            own = training.history(run, levels)
            pieces.append(own.assign(level=own["level"] + f" · {name}") if len(runs) > 1 else own)
    return pd.concat(pieces[1:] or pieces, ignore_index=True)


def save(run_dir: str, metric: str, runs: Sequence[str], found: pd.DataFrame,
         differing: pd.DataFrame, refused: pd.DataFrame, **made_with: Any) -> dict[str, Any]:
    """Write ``results/compare.json`` and return it. made_with: seed, parameters."""
    hashes = "+".join(filter(None, map(folder.data_hash, runs))) or None
    results = {"metric": metric, "runs": listing.names(runs), "values": found.to_dict("records"),
               "differences": differing.to_dict("records"), "apart": refused.to_dict("records"),
               "provenance": provenance(data_hash=hashes, **made_with)}
    folder.save_results(run_dir, "compare", results)
    return results
