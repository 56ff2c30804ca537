"""Arms side by side on the same samples: an adapter against its floors, what the drafter saw, and
where acceptance is lost (docs/metrics.md, section 7; docs/teacher_forcing.md). ``options`` of every
function: n_resamples, level, seed, as statistics.bootstrap takes them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import rounds, table
from xsd.evaluate.speedup import Timing
from xsd.evaluate.statistics import (
    Interval,
    bootstrap,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    minimum_detectable_effect,
)
from xsd.evaluate.tables import row

Counts = tuple[Any, Any]
"""(numerator [n], denominator [n]) of every sample: (matched, positions) for token acceptance,
(accepted, rounds) for accepted drafts per round."""
UNITS = {"token_acceptance": ("matched", "positions"), "accepted_per_round": ("accepted", "rounds")}
"""Unit → what is above and below the line, in columns of table.counts."""
VERIFIER, SELF, FORCED, ROLLOUT, FREE = CHAIN = (
    "verifier", "verifier-self", "teacher-forced drafter", "self-rollout", "free-running")
"""The arms of the gap; all but the last lead one to the next, the last branches off the third."""
_LOSSES = {SELF: "capacity and objective", FORCED: "modality", ROLLOUT: "rollout", FREE: "drift"}


@dataclass(frozen=True)
class FloorComparison:
    """above_best: arm − best floor. detectable: the smallest true distance that these sequences
    would have shown (None where there is but one)."""

    arm: Interval
    floors: Mapping[str, Interval]
    best: str
    above_best: Interval
    detectable: float | None


def compare_with_floors(arm: Counts, floors: Mapping[str, Counts], clusters: Sequence[str],
                        **options: Any) -> FloorComparison:
    """arm and floors: counts of the same samples in the same order. The best floor is picked anew
    in every resample, so that no floor's luck on this data counts for it. Raises: MetricError
    without floors, for other lengths, or a zero denominator."""
    if not floors:
        raise MetricError("an acceptance figure without floors means nothing; pass at least the "
                          "position mode and the n-gram table")

    def each_and_above(sums: np.ndarray) -> np.ndarray:
        ratios = sums[:, 0::2] / sums[:, 1::2]
        return np.column_stack([ratios, ratios[:, 0] - ratios[:, 1:].max(axis=1)])

    columns = _stacked({"adapter": arm, **floors})
    counted = columns[:, 1::2].sum(axis=0)
    own, *each, above = bootstrap(each_and_above, columns, clusters, [*counted, counted[0]],
                                  **options)
    found = dict(zip(floors, each, strict=True))
    best = max(found, key=lambda name: found[name].value)
    return FloorComparison(own, found, best, above, _detectable(arm, floors[best], clusters))


def above_floors(counted: pd.DataFrame, below: Mapping[str, str],
                 **options: Any) -> dict[str, dict[str, FloorComparison]]:
    """Unit → level → its comparison, of all levels of table.counts. below: the floors, name →
    level. Raises: as compare_with_floors."""
    parts = dict(iter(counted.astype({"level": str}).groupby("level", sort=False)))
    clusters = next(iter(parts.values()))["sequence"].tolist()
    out = {}
    for unit, columns in UNITS.items():
        each = {level: part[list(columns)].to_numpy().T for level, part in parts.items()}
        floors = {name: each[level] for name, level in below.items()}
        out[unit] = {level: compare_with_floors(counts, floors, clusters, **options)
                     for level, counts in each.items()}
    return out


def compare_arms(arms: Mapping[str, Counts], reference: str, clusters: Sequence[str],
                 **options: Any) -> list[dict[str, Any]]:
    """Arms (real, blank and other-scene events, text only, verifier-self …) against one of them:
    for each a row with its value, its paired difference and what difference this set could have
    detected (None for the reference itself). Raises: MetricError when the reference is not among
    the arms or the arms cover other samples."""
    if reference not in arms:
        raise MetricError(
            f"the reference arm {reference!r} was not measured; choose among {', '.join(arms)}")
    _stacked(arms)
    out = []
    for name, counts in arms.items():
        out.append(row("acceptance", bootstrap_ratio(*counts, clusters, **options), arm=name))
        out[-1] |= dict.fromkeys(
            ("difference", "difference_low", "difference_high", "differs", "detectable"))
        if name != reference:
            apart = bootstrap_ratio_difference(counts, arms[reference], clusters, **options)
            out[-1] |= {
                "difference": apart.value, "difference_low": apart.low,
                "difference_high": apart.high,
                "differs": apart.excludes(0.0) if apart.n_clusters > 1 else None,
                "detectable": _detectable(counts, arms[reference], clusters),
            }
    return out


def rates(counts: Counts) -> np.ndarray:
    """The rate of every sample; one without a denominator counts as zero."""
    above, below = (np.asarray(values, dtype=np.float64) for values in counts)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _detectable(one: Counts, other: Counts, clusters: Sequence[str]) -> float | None:
    if len(set(clusters)) < 2:
        return None
    return minimum_detectable_effect(rates(one) - rates(other), clusters)


def _stacked(arms: Mapping[str, Counts]) -> np.ndarray:
    """[n, 2·arms], numerator and denominator of each arm side by side."""
    columns = [np.asarray(values, dtype=np.float64) for pair in arms.values() for values in pair]
    for name, pair in arms.items():
        if {len(values) for values in pair} != {len(columns[0])}:
            raise MetricError(f"arm {name!r} covers {len(pair[0])} samples but the comparison is "
                              f"over {len(columns[0])}; evaluate every arm on the same samples")
        if np.sum(pair[1]) <= 0:
            raise MetricError(
                f"arm {name!r} has nothing below the line; evaluate it on samples that have tokens")
    return np.stack(columns, axis=1)


# --- the gap


def losses_between(arms: Iterable[str]) -> list[tuple[str, str, str]]:
    """(loss, arm before, arm after), of the arms that were measured. Raises: MetricError for an arm
    that the picture does not have.

    >>> losses_between(["verifier", "teacher-forced drafter"])
    [('capacity and modality', 'verifier', 'teacher-forced drafter')]
    """
    arms = list(arms)
    unknown = [name for name in arms if name not in CHAIN]
    if unknown:
        raise MetricError(f"the gap has no arm {unknown[0]!r}; its arms are {', '.join(CHAIN)}")
    steps = [*pairwise(name for name in CHAIN[:-1] if name in arms)]
    steps += [(FORCED, FREE)] if FREE in arms else []
    whole = {(VERIFIER, FORCED): "capacity and modality"}
    return [(whole.get(step, _LOSSES[step[1]]), *step) for step in steps]


def gap(arms: Mapping[str, Counts], clusters: Sequence[str],
        **options: Any) -> list[dict[str, Any]]:
    """The bars of the waterfall, in order: metric ("level": an arm's height, or "loss": the fall
    from the arm before to the arm after, usually ≥ 0), name, value, low, high, n, n_clusters, start
    and end. The branch begins again at the level it leaves.

    arms: of CHAIN, name → (matched, length) or (accepted, rounds) of every sample, in the same
    order for every arm. Raises: MetricError as losses_between and the bootstrap do."""
    heights = {name: bootstrap_ratio(*counts, clusters, **options) for name, counts in arms.items()}
    levels = {name: row("level", height, name=name) | {"start": 0.0, "end": height.value}
              for name, height in heights.items()}
    rows = [levels[VERIFIER]]
    for loss, before, after in losses_between(arms):
        if rows[-1] is not levels[before]:
            rows.append(levels[before])
        fall = bootstrap_ratio_difference(arms[before], arms[after], clusters, **options)
        ends = {"start": heights[before].value, "end": heights[after].value}
        rows += [row("loss", fall, name=loss) | ends, levels[after]]
    return rows


def counts_by_group(matches: Any, groups: Sequence[str],
                    clusters: Sequence[str]) -> dict[str, Counts]:
    """Matches, group names (kinds of words) and cluster names of tokens, [N] each → per group
    (matched, tokens) of every cluster in sorted order, 0 where a cluster has none. Raises:
    MetricError for other lengths."""
    if not len(matches) == len(groups) == len(clusters):
        raise MetricError(f"{len(matches)} matches but {len(groups)} group and {len(clusters)} "
                          "cluster names; name the kind and the cluster of every token")
    tokens = pd.DataFrame({"match": matches, "group": groups, "cluster": clusters})
    sums = tokens.groupby(["cluster", "group"])["match"].agg(["sum", "size"]).unstack(fill_value=0)
    return {name: (sums["sum", name].to_numpy(), sums["size", name].to_numpy())
            for name in sums["size"]}


def loss_by_group(arms: Mapping[str, Any], losses: Iterable[tuple[str, str, str]],
                  groups: Sequence[str], clusters: Sequence[str],
                  **options: Any) -> list[dict[str, Any]]:
    """Each loss within each group of tokens, paired: rows ``token_loss`` with ``loss`` and
    ``group``. arms: name → matches, bool [N]. losses: (loss, arm before, arm after)."""
    names = sorted(set(clusters))
    counts = {arm: counts_by_group(matches, groups, clusters) for arm, matches in arms.items()}
    return [row("token_loss", bootstrap_ratio_difference(counts[before][group], found, names,
                                                         **options), loss=loss, group=group)
            for loss, before, after in losses for group, found in counts[after].items()]


# --- two phases: one adapter, hidden behind the prefill, drafts n_first tokens once from the start
# of the answer; another gamma tokens a round from there on (docs/metrics.md, section 4). What a
# round accepts depends on where it starts, so phase 2 is given as runs, one for each start.


def phases(tokens: pd.DataFrame,
           n_first: int) -> tuple[dict[str, Any], dict[str, Any], np.ndarray, list[str]]:
    """What each level of a token table gives in either phase: name → first int [N], for levels that
    predict the answer's first token (the others need verifier states that are not there yet);
    name → runs int [N, S] from every position of the answer; lengths int [N]; clusters.

    Answers of a single token are left out: nothing is drafted there."""
    drafted = table.drafted(tokens)["sample"].unique()
    tokens = tokens[tokens["sample"].isin(drafted)]
    opening = set(tokens.loc[tokens["position"] < 0, "level"])
    first, second = {}, {}
    for level, about, (match, runs), inside in table.by_level(tokens, "match", "accepted"):
        clusters = about["sequence"].tolist()
        if level in opening:
            first[level] = rounds.runs_of(match, n_first)[:, 0]
            lengths = inside.sum(axis=1)
        else:
            runs, lengths = np.pad(runs, ((0, 0), (1, 0))), inside.sum(axis=1) + 1
        second[level] = runs
    return first, second, lengths, clusters


def every_pair(phase1: Mapping[str, Any], phase2: Mapping[str, Any], lengths: Any,
               clusters: Sequence[str], *, n_first: int, gamma: int,
               timings: Mapping[str, Timing] | None = None, n_resamples: int = 2000,
               seed: int = 0) -> pd.DataFrame:
    """Every phase-1 × phase-2 combination: phase1, phase2, metric, value, low, high, n, n_clusters.

    The four arguments are as :func:`phases` returns them. Metrics: ``tokens_per_verification``
    (with bonus, over all verifier passes, phase 1's included), ``first_accepted`` (mean of phase
    1's run) and, where phase 2's level has a timing, ``speedup``, predicted: the time of plain
    decoding over that of these rounds, phase 1's drafts being free. Raises: MetricError when a
    phase has no adapter, and as rounds.walk."""
    if not phase1 or not phase2:
        raise MetricError("a two-phase evaluation needs at least one adapter for each phase")
    rows, draws = [], {"n_resamples": n_resamples, "seed": seed}
    for one, first in phase1.items():
        begin = bootstrap_ratio(first, np.ones(len(first)), clusters, **draws)
        for two, runs in phase2.items():
            each = rounds.walk(runs, lengths, gamma, first=first, n_first=n_first).per_request()
            tokens = bootstrap_ratio(each["accepted"] + each["bonus"], each["rounds"], clusters,
                                     **draws)
            found = {"tokens_per_verification": tokens, "first_accepted": begin}
            if two in (timings or {}):
                plain, drafting = _times(timings[two], each)
                found["speedup"] = bootstrap_ratio(plain, drafting, clusters, **draws)
            rows += [row(name, value, phase1=one, phase2=two) for name, value in found.items()]
    return pd.DataFrame(rows)


def _times(timing: Timing, each: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """ms of every answer, by plain decoding and by these rounds, the first of them phase 1's."""
    tokens, drew = each["accepted"] + each["bonus"], each["rounds"] > 0
    a_round = timing.token_ms * (1 + timing.overhead)
    rounds_ms = drew * timing.verify_ms + np.maximum(each["rounds"] - 1, 0) * a_round
    return (timing.prefill_verifier_ms + tokens * timing.token_ms,
            timing.prefill_verifier_ms + rounds_ms)
