"""Notebook 13: where acceptance is lost, what the events are worth, and what a reader may believe
of it (docs/metrics.md, sections 6 to 8).

Every arm is asked about the same tokens, positions 1 … n-1 of each held-out answer::

    adapters × what the drafter is shown ─▶ token_tables   one token table for every arm
                       ─▶ matches     one row per level and drafted token, one column per arm
                       ─▶ counts      one row per level, arm and answer
                       ─▶ gap, kinds, arms, headline …     what is shown, with intervals
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from studies.gap import comparison
from studies.gap.counterfactual import AGAIN, REAL
from studies.parameters import TruthParameters
from xsd.adapters.base import Adapter
from xsd.core import ParameterError
from xsd.evaluate import floors, reliability, statistics, table, tables
from xsd.evaluate.comparison import UNITS, Counts, rates
from xsd.evaluate.held_out import HeldOut
from xsd.evaluate.speedup import Timing
from xsd.steps import evaluation, judge

B1, ONE_STEP, LOOP = "B1", comparison.FORCED, comparison.ROLLOUT
SHOWN = (comparison.FREE, ONE_STEP, LOOP, "drift", "rollout")
"""What docs/teacher_forcing.md sets side by side."""
KEYS = ["level", "sample", "sequence", "position", "kind"]
"""What says which token a row of the matches is; every other column is an arm."""


def token_tables(adapters: Mapping[str, Adapter], shown: Mapping[str, HeldOut],
                 free: HeldOut | None = None, *, gamma: int, top_k: int = 5,
                 batch_size: int = 64) -> dict[str, pd.DataFrame]:
    """Arm → token table; each adapter runs once over each set that it can tell apart: levels that
    read the verifier alone over the real events only, and only those that read the drafter alone
    over the free-running pairs.

    shown: counterfactual.arms; free: the free-running pairs of the same samples."""
    options, out = {"gamma": gamma, "batch_size": batch_size}, {}
    readers = {name: one for name, one in adapters.items() if one.reads == "drafter"}
    of_events = {name: one for name, one in adapters.items() if one.reads != "verifier"}
    for arm, pairs in shown.items():
        real = arm == REAL
        out[arm] = table.measure(adapters if real else of_events, pairs, top_k=top_k if real else 1,
                                 kinds=evaluation.token_kinds if real else None, **options)
    if free is not None and readers:
        out[comparison.FREE] = table.measure(readers, free, top_k=1, drafter=False, **options)
    return out


def matches(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per level and drafted token (KEYS), and of every arm a column: is the draft the
    verifier's token? NA where an arm was not measured. The arms are those of the gap
    (comparison.CHAIN) and what the drafter was shown."""
    real = table.drafted(found[REAL]).reset_index(drop=True)
    out = real[KEYS].astype({"level": str})
    ceiling = out["level"].map(_is_ceiling).astype(bool)
    one_step = real["one_step_match"].astype("boolean")
    out[comparison.VERIFIER] = pd.array([True] * len(out), dtype="boolean")
    if ceiling.any():
        out[comparison.SELF] = _beside(out, real[ceiling], "one_step_match", "sample", "position")
    out[ONE_STEP] = one_step.mask(ceiling)
    out[LOOP] = real["match"].astype("boolean")
    for arm, other in found.items():
        if arm == comparison.FREE:
            # Position t of the drafter's own text stands beside position t of the verifier's;
            # beyond its end nothing is drafted: no match.
            free = _beside(out, other, "one_step_match").fillna(False)
            out[arm] = free.where(out["level"].isin(other["level"].unique()))
        elif arm != REAL:
            out[arm] = _beside(out, other, "match")
    return out


def _is_ceiling(level: str) -> bool:
    """B1, or one by path ("B1 of a run")."""
    return level.split(" of ")[0] == B1


def _beside(rows: pd.DataFrame, other: pd.DataFrame, column: str, *on: str) -> pd.Series:
    """A column of another table for the same tokens, NA where it has none."""
    keys = list(on) or ["level", "sample", "position"]
    texts = {key: str for key in keys if key != "position"}
    there = other[[*keys, column]].astype(texts)
    return rows[keys].astype(texts).merge(there, how="left", on=keys)[column].astype("boolean")


def counts(drafted: pd.DataFrame, floor_rows: pd.DataFrame, gamma: int) -> pd.DataFrame:
    """One row per level, arm and answer: matched of positions, accepted in rounds. The floors
    (evaluation.floor_rows) are levels with the one arm LOOP."""
    parts = [table.counts(floor_rows, gamma).assign(arm=LOOP)]
    for arm in drafted.columns.drop(KEYS):
        own = drafted[drafted[arm].notna()]
        each = table.counts(own.assign(match=own[arm].astype(bool)), gamma)
        parts.append(each.assign(arm=arm))
    return pd.concat(parts, ignore_index=True).astype({"level": str, "sequence": str})


Arms = dict[str, Counts]


def _each(counted: pd.DataFrame,
          without: Sequence[str]) -> Iterator[tuple[str, str, Arms, list[str]]]:
    """Of every unit and level but some: unit, level, the counts of its arms, and the clusters of
    the answers, the same for all of them."""
    loop = counted[counted["arm"] == LOOP]
    clusters = loop[loop["level"] == loop["level"].iloc[0]]["sequence"]
    for unit, columns in UNITS.items():
        found: dict[str, Arms] = {}
        for (level, arm), part in counted.groupby(["level", "arm"], sort=False):
            found.setdefault(level, {})[arm] = tuple(part[list(columns)].to_numpy().T)
        yield from ((unit, level, own, clusters.tolist()) for level, own in found.items()
                    if level not in without)


def gap(counted: pd.DataFrame, **draws: int) -> pd.DataFrame:
    """The waterfall of every level in every unit: level, unit, and the rows of comparison.gap.
    draws: n_resamples, seed."""
    return pd.DataFrame([
        {"level": level, "unit": unit, **row}
        for unit, level, own, clusters in _each(counted, judge.FLOORS.values())
        for row in comparison.gap({arm: own[arm] for arm in comparison.CHAIN if arm in own},
                                  clusters, **draws)
    ])


def side_by_side(gaps: pd.DataFrame, unit: str, names: Sequence[str] = SHOWN) -> pd.DataFrame:
    """Levels and losses of the gap table in columns, for reading: level, and of each name its
    value, low and high (NaN: not measured)."""
    rows = []
    for level, own in gaps[gaps["unit"] == unit].groupby("level", sort=False):
        found = own.drop_duplicates("name").set_index("name")
        if _is_ceiling(level):  # its own one step has another name
            found = found.rename(index={comparison.SELF: ONE_STEP})
        line: dict[str, Any] = {"level": level}
        for name, one in found.reindex(names).iterrows():
            line |= tables.sides(str(name), one)
        rows.append(line)
    return pd.DataFrame(rows)


def acceptances(gaps: pd.DataFrame) -> pd.DataFrame:
    """Free-running, teacher-forced and self-rollout acceptance side by side, as text."""
    return pd.concat([
        tables.with_intervals(side_by_side(gaps, unit), percent).assign(unit=unit)
        for unit, percent in zip(UNITS, (SHOWN, ()), strict=True)
    ])


def kinds(drafted: pd.DataFrame, level: str, **draws: int) -> pd.DataFrame:
    """What a level loses within each kind of word: loss, group, value, low, high, n; beside the
    losses of the gap those of the loop when the drafter is shown something else."""
    own = drafted[drafted["level"] == level]
    arms = {arm: own[arm].astype(bool) for arm in own.columns.drop(KEYS)
            if arm != AGAIN and own[arm].notna().all()}
    losses = comparison.losses_between([arm for arm in arms if arm in comparison.CHAIN])
    losses += [(arm, LOOP, arm) for arm in arms if arm not in comparison.CHAIN]
    rows = comparison.loss_by_group(arms, losses, own["kind"].astype(str),
                                    own["sequence"].astype(str), **draws)
    return pd.DataFrame(rows).sort_values("n", ascending=False, kind="stable")


def arms(counted: pd.DataFrame, **draws: int) -> pd.DataFrame:
    """What the drafter saw: level, unit, arm, value, low, high, n, and for all but the real events
    the paired difference and what was detectable. The floors see nothing."""
    rows = []
    for unit, level, own, clusters in _each(counted, evaluation.FLOORS.values()):
        seen = {REAL: own[LOOP]} | {arm: each for arm, each in own.items()
                                    if arm not in comparison.CHAIN}
        compared = comparison.compare_arms(seen, REAL, clusters, **draws)
        rows += [{"level": level, "unit": unit, **row} for row in compared]
    return pd.DataFrame(rows).drop(columns="metric")


def phases(real: pd.DataFrame, floor_table: pd.DataFrame, *, gamma: int, gamma_prefill: int,
           timed: Mapping[str, Timing] | None = None, **draws: int) -> pd.DataFrame:
    """Tokens per verification and, of the levels that are timed, the predicted speed-up, for each
    phase 1 (behind the prefill, from the answer's first token) and phase 2, in self-rollout; of the
    floors those that follow the text."""
    following = floor_table[floor_table["level"] != "position mode"]
    levels = pd.concat([real, following], ignore_index=True).astype({"level": str})
    first, second, lengths, clusters = comparison.phases(
        levels.replace({"level": {table.DRAFTER: "drafter tokens"}}), gamma_prefill)
    return comparison.every_pair(first, second, lengths, clusters, n_first=gamma_prefill,
                                 gamma=gamma, timings=timed, **draws)


def misstatement(tokens: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Accept@τ beside the truth, one row per level and threshold of reliability.figures: level,
    threshold, accept, token acceptance, overstates (with its interval), match above τ, match below
    τ, n."""
    rows = []
    overall = found[found["position"].isna() & found["threshold"].notna()]
    for level, own in reliability.levels(tokens):
        for tau, part in overall[overall["level"] == level].groupby("threshold"):
            at = part.set_index("metric")
            rows.append({
                "level": level, "threshold": tau,
                "accept": (own["cosine"] > np.float32(tau)).mean(),
                "token acceptance": own["match"].mean(),
                **tables.sides("overstates", at.loc["overstatement"]),
                "match above τ": at["value"].get("match_above"),
                "match below τ": at["value"].get("match_below"), "n": len(own),
            })
    return pd.DataFrame(rows)


def needed(tokens: pd.DataFrame, shares: Sequence[float] = (0.8, 0.9, 0.95, 0.99)) -> pd.DataFrame:
    """The lowest τ such that, among tokens with cosine > τ, at least a wanted share match: level,
    match wanted, threshold (None: no τ does), tokens above (the share of tokens that it leaves),
    n."""
    rows = []
    for level, part in reliability.levels(tokens):
        part = part.sort_values("cosine", ascending=False, kind="stable")
        values = part["cosine"].to_numpy()
        rates = part["match"].cumsum().to_numpy() / np.arange(1, len(part) + 1)
        together = np.append(values[1:] != values[:-1], True)  # equal cosines are accepted at once
        for share in shares:
            good = np.flatnonzero((rates >= share) & together)
            kept = int(good[-1]) + 1 if good.size else 0
            below = float(values[kept]) if kept < len(values) else -1.0
            rows.append({
                "level": level, "match wanted": share, "threshold": below if kept else None,
                "tokens above": kept / len(values), "n": len(values)
            })
    return pd.DataFrame(rows)


def checks(counted: pd.DataFrame, level: str, pairs: HeldOut, training: Sequence[Sequence[int]],
           sequences: Mapping[str, int], **draws: int) -> pd.DataFrame:
    """What guards the figures: check, value, low, high, passed, n. sequences: as
    evaluation.check_leakage counted them; level: whose loop is measured twice."""
    rate = floors.duplicate_rate(pairs.answers, training)
    compared = all(sequences.values())  # check_leakage has refused what both sides hold
    rows: list[dict[str, Any]] = [
        {"check": "held-out sequences that were trained on", "value": 0 if compared else None,
         "passed": compared or None, "n": sequences["held_out"]},
        {"check": "answers that equal another held-out answer", "value": rate.shared, "n": rate.n},
        {"check": "answers that stand in the training set", "value": rate.in_training, "n": rate.n},
    ]
    _, _, own, clusters = next(one for one in _each(counted, []) if one[1] == level)
    if AGAIN in own:
        twice = (rates(own[arm]) for arm in (LOOP, AGAIN))
        found = statistics.bootstrap_difference(*twice, clusters, **draws)
        rows.append({
            "check": f"A/A: {level} on stored states minus on states made anew",
            "value": found.value, "low": found.low, "high": found.high,
            "passed": not found.excludes(0.0) if found.n_clusters > 1 else None,
            "n": len(clusters),
        })
    return pd.DataFrame(rows, columns=["check", "value", "low", "high", "passed", "n"])


def free_running(run_dir: str | Path, data: str, pairs: HeldOut) -> HeldOut | None:
    """The free-running pairs of the same samples; None where the run has none. Raises:
    ParameterError when they are pairs of other samples."""
    try:
        free = evaluation.held_out(run_dir, data, "free_running")
    except ParameterError:
        return None
    free = dataclasses.replace(free, head=pairs.head)
    if free.dataset.mode != "free_running":
        return None
    if set(free.keys) != set(pairs.keys):
        raise ParameterError(f"the free-running pairs of {pairs.name} are of other samples than "
                             "the teacher-forced; extract both")
    return free


def save(P: TruthParameters, sets: Mapping[str, HeldOut], sequences: Mapping[str, int],
         found: Mapping[str, Mapping[str, pd.DataFrame]]) -> dict[str, Any]:
    """Write ``results/truth.json``: gamma, waterfall, sequences, provenance and of each held-out
    set its tables as rows, the best floor and every level's distance above it."""
    results: dict[str, Any] = {
        "gamma": P.gamma, "waterfall": P.waterfall, "sequences": dict(sequences), "test": {}
    }
    for name, each in found.items():
        heads = each["headline"].query("unit == 'token_acceptance'").rename(columns={
            "above floor": "value", "above floor low": "low", "above floor high": "high",
            "clusters": "n_clusters"
        }).set_index("level")
        above = heads[["value", "low", "high", "n", "n_clusters"]].to_dict("index")
        results["test"][name] = {
            **{key: frame.to_dict("records") for key, frame in each.items()},
            "best_floor": heads["best floor"].iloc[0], "above_floor": above
        }
    return evaluation.save(P.run_dir, "truth", results, sets, P.model_dump())
