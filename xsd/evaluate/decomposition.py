"""Where acceptance is lost: capacity, modality, rollout, drift (docs/metrics.md, section 7;
docs/teacher_forcing.md).

On the same held-out samples, each loss is one paired difference between two arms::

    verifier                    1
       │ capacity and objective        what an adapter loses although it reads the verifier's states
    verifier-self               B1, one step
       │ modality                      what the other sensor costs
    teacher-forced drafter      one step ──drift──▶ free-running
       │ rollout                       what feeding on one's own predictions costs
    self-rollout

drift: what reading two different texts position by position costs, an artefact of the pairing and
not of drafting. Arms that were not measured are left out; without verifier-self, capacity and
modality are one loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from xsd.core import MetricError
from xsd.evaluate.counterfactual import Counts
from xsd.evaluate.statistics import (
    N_RESAMPLES,
    bootstrap_ratio,
    bootstrap_ratio_difference,
)
from xsd.evaluate.tables import row

VERIFIER, SELF, FORCED, ROLLOUT, FREE = CHAIN = (
    "verifier", "verifier-self", "teacher-forced drafter", "self-rollout", "free-running")
"""The arms; all but the last lead one to the next, and the last branches off the third."""
_LOSSES = {
    SELF: "capacity and objective", FORCED: "modality", ROLLOUT: "rollout", FREE: "drift"
}  # fmt: skip


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
    chain = [(before, after) for before, after in pairwise(
        [name for name in CHAIN[:-1] if name in arms])]
    branch = [(FORCED, FREE)] if FREE in arms else []
    whole = "capacity and modality"
    return [(whole if (before, after) == (VERIFIER, FORCED) else _LOSSES[after], before, after)
            for before, after in chain + branch]  # fmt: skip


def gap(arms: Mapping[str, Counts], clusters: Sequence[str], *, n_resamples: int = N_RESAMPLES,
        seed: int = 0) -> list[dict[str, Any]]:
    """The bars of the waterfall, in order: metric ("level": an arm's height, or "loss": the fall
    from the arm before to the arm after, usually ≥ 0), name, value, low, high, n, n_clusters, start
    and end. The branch begins again at the level it leaves.

    arms: name → (matched, length) or (accepted, rounds) of every sample, in the same order for
    every arm, from the verifier's own down. Raises: MetricError as losses_between and the
    bootstrap do.
    """
    options = {"n_resamples": n_resamples, "seed": seed}
    heights = {name: bootstrap_ratio(*counts, clusters, **options)
               for name, counts in arms.items()}  # fmt: skip
    levels = {name: row("level", height, name=name) | {"start": 0.0, "end": height.value}
              for name, height in heights.items()}  # fmt: skip
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
    (matched, tokens) of every cluster in sorted order, 0 where a cluster has none.

    Raises: MetricError for other lengths.
    """
    if not len(matches) == len(groups) == len(clusters):
        raise MetricError(
            f"{len(matches)} matches but {len(groups)} group and {len(clusters)} cluster names; "
            "name the kind and the cluster of every token")
    tokens = pd.DataFrame({"match": matches, "group": groups, "cluster": clusters})
    sums = tokens.groupby(["cluster", "group"])["match"].agg(["sum", "size"])
    hits, sizes = (sums[name].unstack(fill_value=0) for name in ("sum", "size"))
    return {name: (hits[name].to_numpy(), sizes[name].to_numpy()) for name in sizes}


def loss_by_group(arms: Mapping[str, Any], losses: Iterable[tuple[str, str, str]],
                  groups: Sequence[str], clusters: Sequence[str], *, n_resamples: int = 2000,
                  seed: int = 0) -> list[dict[str, Any]]:
    """Each loss within each group of tokens, paired: rows ``token_loss`` with ``loss`` and
    ``group``.

    arms: name → matches, bool [N] over tokens. losses: (loss, arm before, arm after).
    """
    names, options = sorted(set(clusters)), {"n_resamples": n_resamples, "seed": seed}
    counts = {arm: counts_by_group(matches, groups, clusters) for arm, matches in arms.items()}
    return [row("token_loss", bootstrap_ratio_difference(counts[before][group], after_counts,
                                                         names, **options),
                loss=loss, group=group)
            for loss, before, after in losses
            for group, after_counts in counts[after].items()]  # fmt: skip
