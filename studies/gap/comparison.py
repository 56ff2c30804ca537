"""Arms side by side on the same samples: what the drafter saw, where acceptance is lost, and two
phases (docs/metrics.md, section 7; docs/teacher_forcing.md). ``options`` of every function:
n_resamples, level, seed, as statistics.bootstrap takes them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import rounds, table
from xsd.evaluate.comparison import Counts, detectable, stacked
from xsd.evaluate.speedup import Timing
from xsd.evaluate.statistics import bootstrap_ratio, bootstrap_ratio_difference
from xsd.evaluate.tables import row

VERIFIER, SELF, FORCED, ROLLOUT, FREE = CHAIN = (
    "verifier", "verifier-self", "teacher-forced drafter", "self-rollout", "free-running")
"""The arms of the gap; all but the last lead one to the next, the last branches off the third."""
_LOSSES = {SELF: "capacity and objective", FORCED: "modality", ROLLOUT: "rollout", FREE: "drift"}


def compare_arms(arms: Mapping[str, Counts], reference: str, clusters: Sequence[str],
                 **options: Any) -> list[dict[str, Any]]:
    """Arms (real, blank and other-scene events, text only, verifier-self …) against one of them:
    for each a row with its value, its paired difference and what difference this set could have
    detected (None for the reference itself). Raises: MetricError when the reference is not among
    the arms or the arms cover other samples."""
    if reference not in arms:
        raise MetricError(
            f"the reference arm {reference!r} was not measured; choose among {', '.join(arms)}")
    stacked(arms)
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
                "detectable": detectable(counts, arms[reference], clusters),
            }
    return out


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
