"""What one batch is asked for: the parts of its loss, each against the verifier's states some
positions on: 0 for L1–L5, also 1 for L5 with a prediction weight; 1 for B1 and L5F, with rollout
steps 1, 2, … K from own predictions (EAGLE-3's training-time test), or the K drafts of a block.
Every part is a mean over its positions. A step may be spread over several batches (accumulation)
and processes: :func:`norms` says how much of the mean each holds."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.adapters.heads import Head
from xsd.core import Batch
from xsd.train import objectives
from xsd.train.recipes import FitConfig


def plan(adapter: Adapter, config: FitConfig) -> list[tuple[int, float]]:
    """(offset of the target, factor) of each part."""
    if adapter.shift:
        steps = getattr(adapter, "block", config.rollout_steps)
        return [(k, config.rollout_decay**(k - 1)) for k in range(1, steps + 1)]
    weight = getattr(adapter, "prediction_weight", 0.0)
    return [(0, 1.0), (1, weight)] if weight else [(0, 1.0)]


def weights_of(mask: Tensor, offset: int, config: FitConfig) -> Tensor | None:
    """``position_decay`` to the power of each place, float [B, S - offset]; None: all 1."""
    if config.position_decay == 1:
        return None
    places = torch.arange(mask.shape[1], device=mask.device)[offset:]
    return (config.position_decay**places).expand(mask.shape[0], -1)


def draw_starts(adapter: Adapter, mask: Tensor, config: FitConfig) -> Tensor | None:
    """From which positions a block is drafted in this step, bool [B, S]: ``anchors`` of each
    answer's that have a token behind them, drawn by torch's global generator; None: all."""
    if config.anchors is None or not hasattr(adapter, "block"):
        return None
    there = F.pad(mask[:, 1:], (0, 1))
    order = torch.rand(mask.shape, device=mask.device).masked_fill(~there, 2.0).argsort(dim=1)
    chosen = torch.zeros_like(mask).scatter(1, order[:, :config.anchors], True)
    return chosen & there


def real_of(mask: Tensor, offset: int, starts: Tensor | None) -> Tensor:
    """The positions of a part, bool [B, S - offset]: real ones, ``offset`` behind a start."""
    real = mask[:, offset:]
    return real if starts is None else real & starts[:, :starts.shape[1] - offset]


def norms(adapter: Adapter, mask: Tensor, config: FitConfig,
          starts: Tensor | None = None) -> Tensor:
    """Sum of the weights of each part's positions, float64 [parts]. mask, starts: bool [B, S]."""
    found = []
    for offset, _ in plan(adapter, config):
        real, weights = real_of(mask, offset, starts), weights_of(mask, offset, config)
        found.append(real.sum() if weights is None else (weights * real).sum())
    return torch.stack(found).double()


def losses(adapter: Adapter, batch: Batch, objective: objectives.Objective, head: Head | None,
           config: FitConfig, share: Sequence[float], own: Sequence[float],
           starts: Tensor | None = None) -> dict[str, Tensor]:
    """The terms of the first part (means over this batch), and ``total``: this batch's share of the
    whole step's loss; its gradients, added up over the batches of a step, are the step's. share:
    this batch's part of each part's norm over the step, own / norm of the step (1 where it is the
    whole step); own: this batch's norms."""
    noisy = _with_noise(batch, config.noise) if config.noise else batch
    pieces = plan(adapter, config)
    cast = torch.autocast(batch.mask.device.type, dtype=torch.bfloat16,
                          enabled=config.dtype == "bfloat16")
    if adapter.pointwise and not adapter.shift:
        # positions do not meet, so padding need not be computed at all
        real, weights = batch.mask, weights_of(batch.mask, 0, config)
        with cast:
            aligned = adapter(noisy.drafter[real])
        found = objective.flat(aligned.float(), batch.verifier[real], batch.ids_by_verifier[real],
                               head, None if weights is None else weights[real])
        return {**found, "total": found["total"] * share[0]}
    with cast:
        states = _predictions(adapter, noisy, len(pieces), starts)
    total, first = None, {}
    for number, (state, (offset, factor)) in enumerate(zip(states, pieces, strict=False)):
        if own[number] == 0:
            continue
        # Targets are the clean states: noise is on what is read.
        found = objective(state.float(), batch.verifier[:, offset:],
                          batch.ids_by_verifier[:, offset:],
                          real_of(batch.mask, offset, starts), head,
                          weights_of(batch.mask, offset, config))
        piece = found["total"] * (factor * share[number])
        total = piece if total is None else total + piece
        first = first or found
    return {**first, "total": total}


def _predictions(adapter: Adapter, batch: Batch, n_parts: int,
                 starts: Tensor | None) -> list[Tensor]:
    """What each part compares with its target, [B, S - offset, D_v]; rollout steps that no answer
    is long enough for are left out."""
    if n_parts == 1 or not adapter.shift:
        aligned = adapter.align(batch).aligned
        return [aligned, aligned[:, :-1]][:n_parts]
    drawn = {} if starts is None else {"starts": starts}
    rolled = adapter.rolled(batch, min(n_parts, batch.mask.shape[1] - 1), **drawn)
    return [result[:, :result.shape[1] - k] for k, result in enumerate(rolled, start=1)]


def factor_sum(pieces: Sequence[tuple[int, float]], whole: Tensor, adapter: Adapter) -> float:
    """What a step's loss is divided by: rollout steps are averaged, where any answer is long
    enough."""
    if len(pieces) == 1 or not adapter.shift:
        return 1.0
    return sum(factor for (_, factor), norm in zip(pieces, whole.tolist(), strict=True) if norm > 0)


def _with_noise(batch: Batch, share: float) -> Batch:
    """The states that are read moved by uniform noise of ± share × their standard deviation."""
    def moved(states: Tensor) -> Tensor:
        return states + (2 * torch.rand_like(states) - 1) * share * states[batch.mask].std()

    return dataclasses.replace(batch, drafter=moved(batch.drafter), verifier=moved(batch.verifier))
