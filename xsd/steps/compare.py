"""Step 06: runs side by side. Every figure with its interval, every difference paired sample by
sample where both runs hold the sample.

One run alone compares its levels, each against the drafter's own tokens on the same samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from xsd.core import MetricError, ParameterError
from xsd.evaluate import statistics
from xsd.evaluate.acceptance import rounds_from_lists
from xsd.files import provenance
from xsd.runs import folder, parameters
from xsd.steps import acceptance, data, extraction, training
from xsd.views import figures

METRICS = {
    "accepted_per_round": "accepted draft tokens a round",
    "token_acceptance": "share of draft tokens that are the verifier's",
    "cosine": "cosine of aligned and verifier states",
    "speedup": "times as fast as the fastest baseline",
}


def ensure(given: parameters.CompareParameters | parameters.ExploreParameters) -> None:
    """Make this notebook's own run with the smoke parameters when it is among the runs and holds no
    token table."""
    own = folder.resolve(given.run_dir)
    if own in map(folder.resolve, given.runs) and not (own / "tokens.parquet").is_file():
        about = extraction.pair_file(own) if (own / extraction.PAIR_FILE).is_file() else {}
        known = {name: about[name] for name in ("data", "test_data") if name in about}
        acceptance.tokens(
            parameters.TokenParameters.checked(
                {"run_dir": given.run_dir, "seed": given.seed, **known}))


def names(runs: Sequence[str]) -> list[str]:
    """A short name for each run folder: its last part, or more of the path where two would be
    called the same.

    Raises: ParameterError when one folder is given twice.
    """
    places = [folder.resolve(run) for run in runs]
    if len(set(places)) < len(places):
        raise ParameterError(f"a run is given twice among {', '.join(runs)}; give each folder once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def overview(runs: Sequence[str]) -> pd.DataFrame:
    """The runs in one table: pair, revision, seed, training pairs, recipe, levels, best adapter and
    floor, and what the live run said.

    Raises: ParameterError when a folder holds no results.
    """
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        found = folder.load_results(run)
        extracted, trained, tokens, live = (found.get(step, {})
                                            for step in ("extract", "train", "tokens", "live"))
        origin = next((one["provenance"] for one in (tokens, extracted) if "provenance" in one), {})
        first = next(iter(tokens.get("test", {}).values()), {})
        rows.append({
            "run": name, "pair": extracted.get("pair"),
            "revision": str(origin.get("git_revision", ""))[:10], "seed": origin.get("seed"),
            "training pairs": extracted.get("train", {}).get("pairs"),
            "recipe": trained.get("profile"), "levels": ", ".join(trained.get("levels", {})),
            "best adapter": first.get("best_adapter"), "best floor": first.get("best_floor"),
            "fastest drafting arm": live.get("arms", {}).get(live.get("best_arm"), {}).get("label"),
            "speed-up": live.get("arms", {}).get(live.get("best_arm"), {}).get("speedup",
                                                                               {}).get("value"),
        })
    return pd.DataFrame(rows)


def per_sample(run: str, metric: str) -> pd.DataFrame:
    """Numerator and denominator of a metric, a row a data set, level (or live arm) and sample:
    data, level, sample, cluster, above, below.

    Raises: ParameterError when the run lacks what the metric needs.
    """
    if metric == "speedup":
        return _speedups(run)
    tokens = folder.load_tokens(run)
    keys = ["data", "level", "sample", "sequence"]
    ordered = tokens.sort_values([*keys, "position"], kind="stable")
    if metric == "cosine":
        known = ordered[ordered["cosine"].notna()]
        rows = known.groupby(keys, sort=False)["cosine"].agg(above="sum",
                                                             below="count").reset_index()
    elif metric == "token_acceptance":
        rows = ordered.groupby(keys, sort=False)["match"].agg(above="sum",
                                                              below="count").reset_index()
    else:
        gamma = folder.load_results(run).get("tokens", {}).get("gamma", 5)
        groups = ordered.groupby(keys, sort=False)["match"].agg(list)
        counted = rounds_from_lists([list(map(bool, hits)) for hits in groups], gamma).per_request()
        rows = groups.index.to_frame(index=False).assign(above=counted["accepted"],
                                                         below=counted["rounds"])
    return rows.rename(columns={"sequence": "cluster"})


def _speedups(run: str) -> pd.DataFrame:
    path = folder.resolve(run) / "records.jsonl"
    if not path.is_file():
        raise ParameterError(
            f"the run {run} has no live records; run notebook 05 with run_dir={run} first, or "
            "choose another metric"
        )
    from xsd.bench import (
        run as bench,  # brings the models' libraries, seconds that most comparisons need not wait
    )

    found = pd.DataFrame(bench.read_records(path))
    origin = folder.load_tokens(run).drop_duplicates("sample").set_index("sample")
    found["data"] = found["sample"].map(origin["data"]).fillna(data.SIMULATED)
    found["cluster"] = found["sample"].map(origin["sequence"]).fillna(found["sequence"])
    rows = []
    for name, part in found.groupby("data", sort=False):
        seconds = part.groupby(["arm", "sample"], sort=False)["total_s"].median()
        clusters = part.drop_duplicates("sample").set_index("sample")["cluster"]
        baselines = part.loc[part["baseline"], "arm"].unique()
        if not len(baselines):
            raise ParameterError(
                f"the live records of {run} hold no baseline; run notebook 05 with ar among its "
                "arms"
            )
        fastest = min(baselines, key=lambda arm: seconds[arm].sum())
        for (arm, sample), own in seconds.items():
            row = {
                "data": name, "level": arm, "sample": sample, "cluster": clusters[sample],
                "above": seconds[fastest, sample], "below": own,
            }
            rows.append(row)
    return pd.DataFrame(rows)


def values(runs: Sequence[str], metric: str, *, resamples: int, seed: int) -> pd.DataFrame:
    """A metric of every run, data set and level: run, data, level, value, low, high, n, n_clusters,
    kind, best (floors and ceilings apart)."""
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        for (which, level), part in per_sample(run, metric).groupby(["data", "level"], sort=False):
            found = statistics.bootstrap_ratio(part["above"], part["below"],
                                               part["cluster"].tolist(), n_resamples=resamples,
                                               seed=seed)
            rows.append({"run": name, "data": which, "level": level, **dataclasses.asdict(found)})
            rows[-1]["kind"] = "measured" if metric == "speedup" else kind_of(level)
        rows += [{"run": name, **row} for row in _floors(run, metric)]
    table = pd.DataFrame(rows)
    starred = ~table["kind"].isin(["ceiling", "floor"])
    table["best"] = starred & (table["value"] == table["data"].map(
        table[starred].groupby("data")["value"].max()))
    return table


def _floors(run: str, metric: str) -> list[dict[str, Any]]:
    """The floors of a run's token results; they hold no row a sample, so they are shown and not
    paired."""
    rows = []
    for which, found in folder.load_results(run).get("tokens", {}).get("test", {}).items():
        for row in found["rows"].values():
            if row["kind"] == "floor" and metric in row:
                rows.append({"data": which, "level": row["label"], "kind": "floor", **row[metric]})
    return rows


def kind_of(level: str) -> str:
    """ceiling (reads the verifier's own states alone), drafter or adapter."""
    if level == acceptance.DRAFTER:
        return "drafter"
    return "ceiling" if level == "B1" else "adapter"


def differences(runs: Sequence[str], metric: str, *, baseline: str = "", resamples: int,
                seed: int) -> pd.DataFrame:
    """Paired differences with intervals, on the samples that both sides hold.

    Several runs: each level of a run minus the same level of the baseline run. One run: each level
    minus the drafter's own tokens (live:
    minus the own loop), or minus the first level where there are none.
    Returns: run, data, level, against, value, low, high, n_samples, clear (the interval excludes
    0). Raises: ParameterError for a baseline
    that is not among the runs.
    """
    called = dict(zip(names(runs), runs, strict=True))
    by_place = {folder.resolve(run): name for name, run in called.items()}
    base = next(iter(called)) if not baseline else baseline if baseline in called else by_place.get(
        folder.resolve(baseline), "")
    if not base:
        raise ParameterError(f"the baseline {baseline!r} is not among the runs {', '.join(called)}")
    tables = {
        name: per_sample(run, metric).set_index(["data", "level", "sample"]).sort_index()
        for name, run in called.items()
    }
    rows = []
    for name, own in tables.items():
        for which, level in own.index.droplevel("sample").unique():
            if len(called) > 1:
                against, other = f"{base} {level}", (base, which, level)
            else:
                levels = own.loc[which].index.unique("level")
                reference = next((one for one in (acceptance.DRAFTER, "ar") if one in levels),
                                 levels[0])
                against, other = reference, (name, which, reference)
            same_thing = other == (name, which, level)
            if same_thing or other[1:] not in tables[other[0]].index.droplevel("sample"):
                continue
            theirs = tables[other[0]].loc[other[1:], ["above", "below"]].add_suffix("_other")
            pair = own.loc[(which, level)].join(theirs, how="inner")
            line = {
                "run": name, "data": which, "level": level, "against": against,
                "n_samples": len(pair)
            }
            rows.append(line | _difference(pair, resamples, seed))
    return pd.DataFrame(
        rows,
        columns=["run", "data", "level", "against", "value", "low", "high", "n_samples", "clear"])


def _difference(pair: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    try:
        found = statistics.bootstrap_ratio_difference(
            (pair["above"], pair["below"]), (pair["above_other"], pair["below_other"]),
            pair["cluster"].tolist(), n_resamples=resamples, seed=seed,
        )
    # no sample in common, or nothing drafted on one side: there is no difference to state
    except MetricError:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "clear": False}
    clear = not math.isnan(found.low) and found.excludes(0.0)
    return {"value": found.value, "low": found.low, "high": found.high, "clear": clear}


def picture(table: pd.DataFrame, which: str, metric: str) -> go.Figure:
    """One data set of :func:`values`, the best starred: dots with intervals, for the speed-up bars
    around 1."""
    part = table[table["data"] == which]
    several = part["run"].nunique() > 1
    star = {True: "★ ", False: ""}
    labels = [
        star[bool(row["best"])] + row["level"].replace("_", " ") +
        (f" · {row['run']}" if several else "") for row in part.to_dict("records")
    ]
    frame = part.assign(name=labels).astype({"low": float, "high": float})
    title = f"{METRICS[metric][0].upper()}{METRICS[metric][1:]} · {which}"
    if metric == "speedup":
        return figures.speedup_bars(frame, title=title)
    figure = figures.accepted_per_round_dots(frame, title=title)
    figure.update_xaxes(title_text=f"{METRICS[metric]}, with 95 % interval")
    return figure


def curves(runs: Sequence[str]) -> pd.DataFrame:
    """Training histories of all runs for ``views.figures.training_curves``; levels carry the run's
    name where there are several runs."""
    pieces = []
    for name, run in zip(names(runs), runs, strict=True):
        levels = training.trained(run)
        if levels:
            own = training.history(run, levels)
            pieces.append(own.assign(level=own["level"] + f" · {name}") if len(runs) > 1 else own)
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(
        columns=["level", "epoch", "split", "loss"])


def save(given: parameters.CompareParameters, table: pd.DataFrame,
         differing: pd.DataFrame) -> dict[str, Any]:
    """Write ``results/compare.json`` and return it."""
    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in row.items()
        }

    hashes = [folder.data_hash(run) for run in given.runs]
    results = {
        "metric": given.metric, "runs": names(given.runs),
        "values": [plain(row) for row in table.to_dict("records")],
        "differences": [plain(row) for row in differing.to_dict("records")],
        "provenance": provenance(seed=given.seed, data_hash="+".join(filter(None, hashes)) or None,
                                 parameters=given.model_dump()),
    }
    folder.save_results(given.run_dir, "compare", results)
    return results
