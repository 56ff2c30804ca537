"""Reduced draft vocabulary: draft among the k most frequent tokens only, through those rows of the
verifier's head (EAGLE-3, FR-Spec).

The head is most of a draft step's cost where the vocabulary is large; answers use a small part of
it. The verifier still says any token: one outside is never drafted, so it ends a round, which
:func:`xsd.train.rollout.vocabulary_cost` prices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd.core import ParameterError


@dataclass(frozen=True)
class DraftHead:
    """Some rows of a head. weight: [k, D]. ids: int64 [k], each row's full id. rows: int64 [V], the
    row of each full id, -1 outside."""

    weight: Tensor
    ids: Tensor
    rows: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] → [..., k] logits, in the order of ``ids``."""
        return F.linear(hidden, self.weight.to(hidden.dtype))

    def to(self, device: torch.device | str) -> DraftHead:
        """The same on another device."""
        return DraftHead(self.weight.to(device), self.ids.to(device), self.rows.to(device))


def draft_head(weight: Tensor, ids: Tensor) -> DraftHead:
    """The rows ``ids`` int64 [k] of a head [V, D]. Raises: ParameterError when an id is not in the
    head or stands twice."""
    if len(ids) == 0 or len(ids.unique()) != len(ids) or int(ids.min()) < 0 or int(
            ids.max()) >= len(weight):
        raise ParameterError(
            f"a draft vocabulary is distinct ids below {len(weight)}, at least one; take "
            "vocabulary.most_frequent()"
        )
    rows = torch.full((len(weight),), -1, dtype=torch.long, device=weight.device)
    rows[ids] = torch.arange(len(ids), device=weight.device)
    return DraftHead(weight[ids], ids, rows)


def most_frequent(answers: Iterable[Sequence[int] | Tensor], k: int, *,
                  always: Sequence[int] = ()) -> Tensor:
    """The k most frequent ids of some answers, ascending, int64 [≤ k]; of two equally frequent ones
    the smaller id.

    always: ids that are among them whatever their count (end of sequence). Raises: ParameterError
    for k < 1 or no token at all.
    """
    parts = [torch.as_tensor(answer, dtype=torch.long).flatten() for answer in answers]
    counts = torch.bincount(torch.cat(parts)) if parts else torch.zeros(0, dtype=torch.long)
    if k < 1 or not counts.any():
        raise ParameterError(
            f"a draft vocabulary needs at least one id and answers to count, not k = {k} of "
            f"{int(counts.sum())} tokens"
        )
    if always:
        counts = F.pad(counts, (0, max(0, max(always) + 1 - len(counts))))
        counts[list(always)] = int(counts.max()) + 1
    order = counts.argsort(descending=True, stable=True)[:k]
    return order[counts[order] > 0].sort().values


def head_of(adapter: object, head: Tensor | DraftHead | object) -> Tensor | DraftHead | object:
    """The head an adapter drafts through: the rows of its own draft vocabulary where it has one,
    else ``head`` as it is."""
    ids = getattr(adapter, "draft_ids", None)
    return draft_head(head, ids.to(
        head.device)) if ids is not None and isinstance(head, Tensor) else head
