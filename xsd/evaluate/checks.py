"""What may enter a metric: every refusal is a MetricError of one sentence, never a silent zero
(docs/metrics.md, section 1).

Letters in shapes: B batch, S positions of the answer, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xsd.core import MetricError


def mask_lengths(mask: Tensor, what: str = "mask") -> Tensor:
    """Real positions of each row of a right-padded mask bool [B, S] → int64 [B].

    Raises: MetricError when the mask is not bool [B, S], a row has no real position, or a row has a
    gap.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise MetricError(
            f"{what} must be bool [B, S] but is {str(mask.dtype).removeprefix('torch.')} "
            f"{list(mask.shape)}; pass Batch.mask"
        )
    lengths = mask.sum(dim=1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise MetricError(
            f"{what} rows {empty[:5]} have no real position, so nothing can be measured there; "
            "drop those samples before the update"
        )
    gap = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1).nonzero().flatten().tolist()
    if gap:
        raise MetricError(
            f"{what} rows {gap[:5]} have padding before a real position; answers must start at "
            "position 0 and be padded on the right"
        )
    return lengths


def same_shape(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    """Raises: MetricError when the shapes differ."""
    if first.shape != second.shape:
        raise MetricError(
            f"{first_name} has shape {list(first.shape)} but {second_name} has "
            f"{list(second.shape)}; both must cover the same samples and "
            "positions (align them with Adapter.align, or cut both to the shorter answer)")


def cluster_names(clusters: Sequence[str], n: int) -> list[str]:
    """The B sequence names as a list. Raises: MetricError when there are not exactly n."""
    if isinstance(clusters, str) or len(clusters) != n:
        given = 1 if isinstance(clusters, str) else len(clusters)
        raise MetricError(
            f"clusters must name the sequence of each of the {n} samples but has {given} entries")
    return [str(name) for name in clusters]


def token_ids(ids: Tensor, mask: Tensor, what: str) -> None:
    """Raises: MetricError when ids are not integers [B, S] like the mask, or negative on a real
    position."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise MetricError(
            f"{what} must be integer token ids [B, S] but is "
            f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        )
    same_shape(ids, mask, what, "mask")
    if bool(((ids < 0) & mask).any()):
        raise MetricError(
            f"{what} holds a negative token id on a real position; padding belongs where the mask "
            "is False"
        )
