"""Where acceptance is lost: capacity, modality, rollout, drift (docs/metrics.md, section 7;
docs/teacher_forcing.md).

On the same held-out samples, each step is one paired difference between two arms::

    1.0 ──capacity and objective──▶ verifier-self (B1) ──modality──▶ teacher-forced drafter
    ──rollout──▶ self-rollout
                                                                                     └──────drift──────▶ free-running

capacity and objective: what an adapter loses although it is fed the verifier's own states.
modality: what the other sensor costs. rollout:
what feeding on one's own predictions costs. drift: what reading two different texts position by
position costs: an artefact of the pairing, not of drafting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xsd.core import MetricError
from xsd.evaluate.counterfactual import Counts
from xsd.evaluate.statistics import (
    N_RESAMPLES,
    Interval,
    bootstrap_ratio,
    bootstrap_ratio_difference,
)
from xsd.evaluate.tables import row


@dataclass(frozen=True)
class GapStep:
    """One bar of the waterfall. kind "level": the height of an arm; kind "loss": the fall from the
    arm before to the arm after (≥ 0 usually)."""

    name: str
    kind: str
    interval: Interval
    start: float
    end: float


def waterfall(arms: Sequence[tuple[str, Counts]], losses: Sequence[str], clusters: Sequence[str], *,
              n_resamples: int = N_RESAMPLES, seed: int = 0,
              ) -> list[GapStep]:
    """Levels of the arms with the named losses between neighbours: n arms, n − 1 losses → 2n − 1
    steps.

    Raises: MetricError when the names do not fit, or as the bootstrap does.
    """
    if not arms or len(losses) != len(arms) - 1:
        raise MetricError(
            f"a waterfall of {len(arms)} arms needs {max(len(arms) - 1, 0)} names of losses but "
            f"got {len(losses)}"
        )
    options = {"n_resamples": n_resamples, "seed": seed}
    levels = [bootstrap_ratio(*counts, clusters, **options) for _, counts in arms]
    steps = [GapStep(arms[0][0], "level", levels[0], 0.0, levels[0].value)]
    for i, loss in enumerate(losses):
        difference = bootstrap_ratio_difference(arms[i][1], arms[i + 1][1], clusters, **options)
        steps.append(GapStep(loss, "loss", difference, levels[i].value, levels[i + 1].value))
        steps.append(GapStep(arms[i + 1][0], "level", levels[i + 1], 0.0, levels[i + 1].value))
    return steps


def gap_decomposition(clusters: Sequence[str], *, teacher_forced: Counts,
                      verifier_self: Counts | None = None, self_rollout: Counts | None = None,
                      free_running: Counts | None = None, ceiling: Counts | None = None,
                      n_resamples: int = N_RESAMPLES, seed: int = 0,
                      ) -> list[GapStep]:
    """The steps of the module's picture, from (matched, length) a sample in the same order for
    every arm; arms not measured are left out.

    Without verifier_self, capacity and modality are one step. The drift branch comes last: level,
    loss, level. ceiling: the verifier's own counts; by default every token matches (for accepted a
    round: the counts of an all-true replay).
    """
    total = np.asarray(teacher_forced[1], dtype=np.float64)
    arms: list[tuple[str, Counts]] = [("verifier", ceiling or (total, total))]
    losses = []
    if verifier_self is not None:
        arms.append(("verifier-self", verifier_self))
        losses.append("capacity and objective")
    arms.append(("teacher-forced drafter", teacher_forced))
    losses.append("modality" if verifier_self is not None else "capacity and modality")
    if self_rollout is not None:
        arms.append(("self-rollout", self_rollout))
        losses.append("rollout")
    steps = waterfall(arms, losses, clusters, n_resamples=n_resamples, seed=seed)
    if free_running is not None:
        branch = [("teacher-forced drafter", teacher_forced), ("free-running", free_running)]
        steps += waterfall(branch, ["drift"], clusters, n_resamples=n_resamples, seed=seed)
    return steps


def counts_by_group(matches: Sequence[Any], groups: Sequence[Sequence[str]]) -> dict[str, Counts]:
    """Per-token matches (bool [n] a sample) and group names (n a sample: word kinds) → per group
    (matched, length) a sample, 0 where absent.

    Raises: MetricError when a sample has another number of tokens than of group names.
    """
    names = sorted({name for line in groups for name in line})
    out = {name: (np.zeros(len(matches)), np.zeros(len(matches))) for name in names}
    if len(matches) != len(groups):
        raise MetricError(
            f"{len(matches)} samples of matches but {len(groups)} of groups; both must cover the "
            "same samples"
        )
    for i, (hits, line) in enumerate(zip(matches, groups, strict=True)):
        if len(hits) != len(line):
            raise MetricError(
                f"sample {i} has {len(hits)} tokens but {len(line)} group names; name the kind of "
                "every token"
            )
        for hit, name in zip(hits, line, strict=True):
            out[name][0][i] += bool(hit)
            out[name][1][i] += 1
    return out


def gap_by_group(arms: Mapping[str, Sequence[Any]], groups: Sequence[Sequence[str]],
                 clusters: Sequence[str], *, n_resamples: int = 2000,
                 seed: int = 0) -> list[dict[str, Any]]:
    """Acceptance of each arm within each group of tokens (colour, motion, time of day, function
    words …): what can an event camera not know?

    arms: name → matches (bool [n] a sample). Returns rows with ``arm`` and ``group``.
    """
    out = []
    for arm, matches in arms.items():
        for group, counts in counts_by_group(matches, groups).items():
            value = bootstrap_ratio(*counts, clusters, n_resamples=n_resamples, seed=seed)
            out.append({**row("token_acceptance", value), "arm": arm, "group": group})
    return out


def loss_by_group(losses: Mapping[str, tuple[Sequence[Any] | None,
                                             Sequence[Any]]], groups: Sequence[Sequence[str]],
                  clusters: Sequence[str], *, n_resamples: int = 2000, seed: int = 0,
                  ) -> list[dict[str, Any]]:
    """Each loss within each group of tokens, paired: rows ``token_loss`` with ``loss`` and
    ``group``.

    losses: name → (matches of the arm before, of the arm after), bool [n] a sample; None before:
    all tokens accepted.
    """
    out = []
    for loss, (before, after) in losses.items():
        below = counts_by_group(after, groups)
        above = {name: (length, length) for name, (_, length) in below.items()
                 } if before is None else counts_by_group(before, groups)
        for group, counts in below.items():
            difference = bootstrap_ratio_difference(above[group], counts, clusters,
                                                    n_resamples=n_resamples, seed=seed)
            out.append({**row("token_loss", difference), "loss": loss, "group": group})
    return out


def rows(steps: Sequence[GapStep]) -> list[dict[str, Any]]:
    """Steps as rows: metric ("level" | "loss"), name, value, low, high, n, n_clusters, start,
    end."""
    return [
        {**row(step.kind, step.interval), "name": step.name, "start": step.start, "end": step.end}
        for step in steps
    ]
