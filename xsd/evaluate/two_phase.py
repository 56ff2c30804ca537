"""Two-phase evaluation offline: one adapter hidden behind the prefill, another for the rounds
(docs/metrics.md, section 4).

Phase 1 drafts n_first tokens once, from the start of the answer; phase 2 drafts gamma tokens a
round from there on. What a round accepts depends on where it starts, so phase 2 is given as *runs*,
one for each start. A head that feeds on its own states gets them from a
self-rollout (train.rollout); for a drafter of tokens, :func:`runs_of` its one-step matches is exact
(docs/teacher_forcing.md)::

    answer     a b c d e f g h      phase 1: first = 3 of n_first = 5, bonus d
    position   0 1 2 3 4 5 6 7      phase 2: second[4] = 2 accepts e f, bonus g; second[7] = 0, bonus h
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from xsd.core import MetricError
from xsd.evaluate import checks
from xsd.evaluate.acceptance import Rounds
from xsd.evaluate.statistics import bootstrap_ratio
from xsd.evaluate.tables import row


def runs_of(match: Tensor, mask: Tensor, gamma: int) -> np.ndarray:
    """Matches in a row from every position on, at most gamma: bool [B, S] × 2 → int64 [B, S].

    >>> import torch
    >>> runs_of(torch.tensor([[True, True, False, True]]), torch.ones(1, 4, dtype=torch.bool),
    5).tolist() [[2, 1, 0, 1]]
    """
    checks.same_shape(match, mask, "match", "mask")
    hit = (match.bool() & mask).cpu().numpy()
    run = np.zeros((len(hit), hit.shape[1] + 1), dtype=np.int64)
    for t in range(hit.shape[1] - 1, -1, -1):
        run[:, t] = np.where(hit[:, t], np.minimum(run[:, t + 1] + 1, gamma), 0)
    return run[:, :-1]


def rounds_from_runs(first: Any, second: Any, lengths: Any, *, n_first: int, gamma: int) -> Rounds:
    """One opening round of every answer that accepts ``first`` tokens, then rounds of phase 2 from
    the token after its bonus.

    Args: first: int [B], accepted of phase 1 (at most n_first). second: int [B, S], accepted by a
    round of phase 2 whose first draft is
    position s. lengths: int [B], tokens of the answers. Raises: MetricError for other shapes, an
    answer without a token, runs longer than the draft or the answer, n_first or gamma below 1.
    """
    first, second, lengths = (np.asarray(values, dtype=np.int64)
                              for values in (first, second, lengths))
    if n_first < 1 or gamma < 1:
        raise MetricError(
            f"phase 1 must draft at least 1 token and gamma be at least 1, but they are {n_first} "
            f"and {gamma}"
        )
    if first.shape != lengths.shape or second.ndim != 2 or len(second) != len(lengths) or (
            lengths < 1).any():
        raise MetricError(
            f"runs of shapes {list(first.shape)} and {list(second.shape)} do not fit "
            f"{list(lengths.shape)} answers of at least one token; "
            "give one opening run and one row of runs an answer")
    if second.shape[1] < lengths.max() or (first > np.minimum(
            n_first, lengths)).any() or second.max(initial=0) > gamma:
        raise MetricError(
            "a run is longer than its draft, or its answer; phase 1 drafts n_first tokens once, "
            "phase 2 gamma a round"
        )
    at = np.zeros_like(lengths)
    accepted, drafted = first, np.minimum(n_first, lengths)
    alive, pieces = np.arange(len(lengths)), []
    while alive.size:
        bonus = (at + accepted < lengths[alive]).astype(np.int64)
        pieces.append(np.stack([accepted, drafted, bonus, alive]))
        at = at + accepted + bonus
        alive, at = alive[at < lengths[alive]], at[at < lengths[alive]]
        room = lengths[alive] - at
        accepted, drafted = np.minimum(second[alive, at], room), np.minimum(gamma, room)
    accepted, drafted, bonus, request = np.concatenate(pieces, axis=1)
    order = np.argsort(request, kind="stable")
    return Rounds(accepted[order], drafted[order], bonus[order], request[order], len(lengths),
                  max(gamma, n_first))


def two_phase_rounds(first: Tensor, second: Tensor, mask: Tensor, *, n_first: int,
                     gamma: int) -> Rounds:
    """The rounds of two drafters of tokens, from their one-step matches.

    Args: first, second, mask: bool [B, S]. Raises: MetricError for other shapes, empty rows,
    n_first or gamma below 1.
    """
    checks.same_shape(first, second, "the phase-1 matches", "the phase-2 matches")
    checks.same_shape(first, mask, "the phase-1 matches", "mask")
    lengths = checks.mask_lengths(mask).cpu().numpy()
    opening = runs_of(first, mask, n_first)[:, 0]
    return rounds_from_runs(opening, runs_of(second, mask, gamma), lengths, n_first=n_first,
                            gamma=gamma)


def every_pair(phase1: Mapping[str, Any], phase2: Mapping[str, Any], lengths: Any,
               clusters: Sequence[str], *, n_first: int, gamma: int, n_resamples: int = 2000,
               seed: int = 0,
               ) -> list[dict[str, Any]]:
    """Every phase-1 × phase-2 combination: rows phase1, phase2, metric, value, low, high, n,
    n_clusters.

    phase1: name → first [B]; phase2: name → second [B, S] (see :func:`rounds_from_runs`). Metrics:
    ``tokens_per_verification`` (with bonus, over all verifier passes, phase 1's included) and
    ``first_accepted`` (mean of phase 1's run). Raises: MetricError when a phase has no adapter, and
    as rounds_from_runs.
    """
    if not phase1 or not phase2:
        raise MetricError("a two-phase evaluation needs at least one adapter for each phase")
    out = []
    options = {"n_resamples": n_resamples, "seed": seed}
    for one, first in phase1.items():
        begin = bootstrap_ratio(first, np.ones(len(first)), clusters, **options)
        for two, second in phase2.items():
            each = rounds_from_runs(first, second, lengths, n_first=n_first,
                                    gamma=gamma).per_request()
            tokens = bootstrap_ratio(each["accepted"] + each["bonus"], each["rounds"], clusters,
                                     **options)
            out += [{"phase1": one, "phase2": two, **row("tokens_per_verification", tokens)},
                    {"phase1": one, "phase2": two, **row("first_accepted", begin)},]
    return out
