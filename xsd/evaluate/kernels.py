"""What is computed from states themselves: cosines, and what the LM head says of a state, without a
second copy of the states or a matrix [N, V] of logits.

Letters in shapes: B batch, S positions of the answer, D hidden width, V vocabulary, N positions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xsd.core import MetricError

_ROWS_PER_STEP = 64
"""Rows converted to float32 at a time: two buffers of 64 × 4096 stay in a core's cache (measured
fastest of 4 … 128)."""


def cosines(aligned: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Cosine of each position's two states, accumulated in float32: [B, S, D] × 2 → float32 [B, S]
    on the states' device, NaN where masked. Padding may hold anything.

    One pass: rows are converted a few at a time, so bf16 states never exist twice. Each row is
    reduced by itself: how a set is cut into batches does not change a bit.

    Raises: MetricError for other shapes, a mask that is not right-padded or leaves a row empty, a
    NaN or infinite state, a zero vector (its cosine has no meaning, and it usually means padding
    under a True)."""
    if aligned.dim() != 3:
        raise MetricError(f"aligned states must be [B, S, D] but are {list(aligned.shape)}; add "
                          "the batch dimension")
    if aligned.shape != target.shape:
        raise MetricError(
            f"the aligned states has shape {list(aligned.shape)} but the target states has "
            f"{list(target.shape)}; both must cover the same samples and positions (align them "
            "with Adapter.align, or cut both to the shorter answer)")
    check_mask(mask, aligned.shape[:2])
    width, device = aligned.shape[-1], aligned.device
    x, y = aligned.detach().reshape(-1, width), target.detach().reshape(-1, width)
    real = mask.reshape(-1).to(device).nonzero().flatten()
    dense = len(real) == len(x)
    step = _ROWS_PER_STEP if device.type == "cpu" else max(_ROWS_PER_STEP, 2**26 // width)
    left, right = torch.empty(2, min(len(real), step), width, device=device)
    dots, squares, squares_of_target = torch.empty(3, len(real), device=device)
    for start in range(0, len(real), step):
        at = slice(start, min(start + step, len(real)))
        rows = at if dense else real[at]
        a, b = left[:at.stop - start], right[:at.stop - start]
        a.copy_(x[rows])
        b.copy_(y[rows])
        for one, other, out in ((a, b, dots), (a, a, squares), (b, b, squares_of_target)):
            if device.type == "cpu":  # numpy hands each row to BLAS without a temporary
                np.vecdot(one.numpy(), other.numpy(), out=out[at].numpy())
            else:
                torch.linalg.vecdot(one, other, out=out[at])
    norms = squares.sqrt_().mul_(squares_of_target.sqrt_())
    bad = ~(torch.isfinite(dots) & torch.isfinite(norms) & (norms > 0))
    if bool(bad.any()):
        flat = int(real[int(bad.nonzero()[0])])
        _refuse(flat, mask.shape[1], {"aligned": x[flat], "target": y[flat]})
    out = torch.full((mask.numel(),), math.nan, device=device)
    out[real] = (dots / norms).clamp(-1.0, 1.0)
    return out.reshape(mask.shape)


def check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Raises: MetricError unless the mask is bool of this shape [B, S], right-padded, with a real
    position in every row."""
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise MetricError(f"mask must be bool [B, S] but is {str(mask.dtype)[len('torch.'):]} "
                          f"{list(mask.shape)}; pass Batch.mask")
    if mask.shape != shape:
        raise MetricError(f"the mask has shape {list(mask.shape)} but the states need "
                          f"{list(shape)} (samples × positions)")
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise MetricError(f"mask rows {empty[:5]} have no real position, so nothing can be "
                          "measured there; drop those samples first")
    gap = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1).nonzero().flatten().tolist()
    if gap:
        raise MetricError(f"mask rows {gap[:5]} have padding before a real position; answers must "
                          "start at position 0 and be padded on the right")


def _refuse(flat: int, n_positions: int, states: dict[str, Tensor]) -> None:
    """Say what is wrong with the two states [D] at a place of the batch."""
    place = f"sample {flat // n_positions}, position {flat % n_positions} of the batch"
    for name, values in states.items():
        if not bool(torch.isfinite(values).all()):
            raise MetricError(f"the {name} state at {place} is NaN or infinite; the adapter or "
                              "the extraction produced it, so mend that first")
        if not bool(values.any()):
            raise MetricError(f"the {name} state at {place} is a zero vector, whose cosine has no "
                              "meaning; it looks like padding under a True of the mask")
    raise MetricError(f"the states at {place} are too large or too small for a float32 cosine; "
                      "scale them or store them in float32")


@dataclass(frozen=True)
class HeadTokens:
    """top_ids int64 [N, k] and top_logits float32 [N, k], best first (the lower id on a tie between
    pieces); logsumexp float32 [N]; target_logit and cross_entropy float32 [N], in nats, when
    targets were given."""

    top_ids: Tensor
    top_logits: Tensor
    logsumexp: Tensor
    target_logit: Tensor | None = None
    cross_entropy: Tensor | None = None


@torch.no_grad()
def head_tokens(hidden: Tensor, weight: Tensor, *, top_k: int = 1, targets: Tensor | None = None,
                chunk: int = 4096, rows: int = 2048, vocabulary: int | None = None) -> HeadTokens:
    """Apply an LM head without ever holding [N, V]: at most ``rows × chunk`` logits exist at a
    time, in float32.

    Args: hidden: [N, D] states after the final norm. weight: [V, D]. targets: int64 [N], for the
        cross-entropy. vocabulary: ids at or above it are left out (tokens that are never drafted).
    Raises: MetricError when widths differ, top_k exceeds the vocabulary, a target lies outside, or
        a state is not finite.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise MetricError(f"the LM head is {list(weight.shape)} ([V, D]) but the states are "
                          f"{list(hidden.shape)} ([N, D]); the widths must agree, so load the head "
                          "of the model whose space the states are in")
    size = min(vocabulary or len(weight), len(weight))
    if not 1 <= top_k <= size:
        raise MetricError(f"top_k must be between 1 and the vocabulary's {size} but is {top_k}")
    if not bool(torch.isfinite(hidden).all()):
        raise MetricError("a state given to the LM head is NaN or infinite; the adapter or the "
                          "extraction produced it, so mend that first")
    if targets is not None:
        if targets.shape != hidden.shape[:1]:
            raise MetricError(f"{len(hidden)} states but targets of shape {list(targets.shape)}; "
                              "give one token id for each state")
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < size:
            raise MetricError(f"a target id lies outside the head's {size} tokens; the ids and "
                              "the head must be the same model's")
    parts = [
        _head_rows(hidden[at:at + rows], weight[:size], top_k,
                   None if targets is None else targets[at:at + rows], chunk)
        for at in range(0, max(len(hidden), 1), rows)
    ]
    ids, logits, total, right = (None if first is None else torch.cat([part[i] for part in parts])
                                 for i, first in enumerate(parts[0]))
    return HeadTokens(ids, logits, total, right, None if right is None else total - right)


def _head_rows(hidden: Tensor, weight: Tensor, top_k: int, targets: Tensor | None,
               chunk: int) -> tuple[Tensor | None, ...]:
    """Running top-k ids and logits, log-sum-exp and target logit over pieces of the vocabulary."""
    hidden, n = hidden.float(), len(hidden)
    top_logits = hidden.new_full((n, 0), -torch.inf)
    top_ids = torch.empty((n, 0), dtype=torch.int64, device=hidden.device)
    total = hidden.new_full((n,), -torch.inf)
    right = None if targets is None else hidden.new_zeros(n)
    for start in range(0, len(weight), chunk):
        piece = weight[start:start + chunk]
        logits = hidden @ piece.float().T
        if right is not None:
            inside = ((targets >= start) & (targets < start + len(piece))).nonzero().flatten()
            right[inside] = logits[inside, targets[inside] - start]
        if top_k == 1:
            best, at = logits.max(dim=1, keepdim=True)
        else:
            best, at = logits.topk(min(top_k, len(piece)), dim=1)
        peak = best[:, :1]
        top_logits, order = torch.cat([top_logits, best], dim=1).sort(dim=1, descending=True,
                                                                      stable=True)
        top_ids = torch.cat([top_ids, at + start], dim=1).gather(1, order)[:, :top_k]
        top_logits = top_logits[:, :top_k]
        total = torch.logaddexp(total, peak[:, 0] + logits.sub_(peak).exp_().sum(dim=1).log())
    return top_ids, top_logits, total, right
