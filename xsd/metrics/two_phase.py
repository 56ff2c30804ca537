"""Two-phase evaluation offline: one adapter hidden behind the prefill, another for the rounds (docs/metrics.md, section 4).

Phase 1 drafts n_first tokens once, at the start of the answer; phase 2 drafts gamma tokens a round from there on. Matches should come from
a self-rollout where a head feeds on its own states; one-step matches give an upper bound (docs/teacher_forcing.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xsd.core import MetricError
from xsd.metrics import checks
from xsd.metrics.acceptance import Rounds, rounds_from_matches
from xsd.metrics.statistics import bootstrap_ratio
from xsd.metrics.tables import row


def two_phase_rounds(first: Tensor, second: Tensor, mask: Tensor, *, n_first: int, gamma: int) -> Rounds:
    """Round 1 of every answer accepts the run of ``first``'s matches within n_first tokens; the rounds after its bonus replay ``second``.

    Args: first, second, mask: bool [B, S]. Raises: MetricError for other shapes, empty rows, n_first or gamma below 1.
    """
    checks.same_shape(first, second, "the phase-1 matches", "the phase-2 matches")
    checks.same_shape(first, mask, "the phase-1 matches", "mask")
    if n_first < 1:
        raise MetricError(f"phase 1 must draft at least 1 token but n_first is {n_first}")
    lengths = checks.mask_lengths(mask).cpu().numpy()
    n = len(lengths)
    run = (first & mask)[:, :n_first].long().cumprod(dim=1).sum(dim=1).cpu().numpy()
    bonus = (run < lengths).astype(np.int64)
    opening = np.stack([run, np.minimum(n_first, lengths), bonus, np.arange(n)])
    start = run + bonus
    left = np.flatnonzero(start < lengths)
    pieces = [opening]
    if left.size:
        tails = [second[i, start[i] : lengths[i]].bool().cpu() for i in left]
        padded = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True)
        real = torch.arange(padded.shape[1]) < torch.tensor([len(tail) for tail in tails])[:, None]
        rest = rounds_from_matches(padded, real, gamma)
        pieces.append(np.stack([rest.accepted, rest.drafted, rest.bonus, left[rest.request]]))
    accepted, drafted, bonus, request = np.concatenate(pieces, axis=1)
    order = np.argsort(request, kind="stable")
    return Rounds(accepted[order], drafted[order], bonus[order], request[order], n, max(gamma, n_first))


def every_pair(
    phase1: Mapping[str, Tensor],
    phase2: Mapping[str, Tensor],
    mask: Tensor,
    clusters: Sequence[str],
    *,
    n_first: int,
    gamma: int,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every phase-1 × phase-2 combination: rows phase1, phase2, metric, value, low, high, n, n_clusters.

    Metrics: ``tokens_per_verification`` (with bonus, over all verifier passes, phase 1's included) and ``first_accepted`` (mean of phase
    1's run). Matches and mask: bool [B, S]. Raises: MetricError when a phase has no adapter, and as two_phase_rounds.
    """
    if not phase1 or not phase2:
        raise MetricError("a two-phase evaluation needs at least one adapter for each phase")
    out = []
    options = {"n_resamples": n_resamples, "seed": seed}
    for one, first in phase1.items():
        opening = (first & mask)[:, :n_first].long().cumprod(dim=1).sum(dim=1).cpu().numpy()
        for two, second in phase2.items():
            each = two_phase_rounds(first, second, mask, n_first=n_first, gamma=gamma).per_request()
            tokens = bootstrap_ratio(each["accepted"] + each["bonus"], each["rounds"], clusters, **options)
            begin = bootstrap_ratio(opening, np.ones(len(opening)), clusters, **options)
            out += [
                {"phase1": one, "phase2": two, **row("tokens_per_verification", tokens)},
                {"phase1": one, "phase2": two, **row("first_accepted", begin)},
            ]
    return out
