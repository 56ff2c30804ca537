"""Self-rollout: how many draft tokens a verification would accept when the adapter feeds on its own
predictions (docs/adapters.md, section 6).

Offline, over teacher-forced pairs, and still exact for greedy decoding: a draft counts only while
every draft before it was right, and as long as they are right, the drafter's next state after the
drafts *is* its stored state after the verifier's tokens. With position s the
last one verified (its state and its token are known)::

    position       0 … s        s+1        s+2        s+3
    known          verified     draft 1    draft 2    draft 3     gamma = 3
    drafter reads  drafter[s+1] gives 1, drafter[s+2] gives 2 …                       shift 0: L1–L5, one step each
    verifier, both verified[0…s] gives p₁, then p₁ stands for verified[s+1] …         shift 1: B1, L5F, on own predictions

``accepted[s]`` is the number of drafts before the first wrong one. On free-running pairs the
drafter's states follow its own text, so the figures of L1–L5 there describe one draft beside a
free-running drafter, not a decode loop; ``mode`` travels with the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd.adapters import heads
from xsd.adapters.base import Adapter
from xsd.core import Batch, MetricError, ParameterError


@dataclass(frozen=True)
class Rollout:
    """accepted: int64 [N, S], drafts accepted when position s is the last one verified; -1 where no
    draft can follow (last position, padding).

    drafted: int64 [N, S], how many drafts had a place in the answer: min(gamma, n - 1 - s), -1 as
    above. lengths: int64 [N]. sequence: N
        cluster names.
    """

    accepted: Tensor
    drafted: Tensor
    lengths: Tensor
    sequence: list[str]
    index: list[int]
    gamma: int
    mode: str

    def per_start(self) -> tuple[Tensor, list[str]]:
        """(accepted, cluster) of every start that had room for gamma drafts: float [M]. One value a
        start, all starts weigh the same."""
        full = self.drafted == self.gamma
        rows = full.nonzero()[:, 0].tolist()
        return self.accepted[full].float(), [self.sequence[row] for row in rows]

    def rounds(self) -> list[list[int]]:
        """The rounds a decode loop would visit, per answer: from s = 0 (token 0 known from the
        prefill), s += accepted + 1 (the bonus token)."""
        result = []
        for row, length in enumerate(self.lengths.tolist()):
            counts, position = [], 0
            while position < length - 1:
                counts.append(int(self.accepted[row, position]))
                position += counts[-1] + 1
            result.append(counts)
        return result

    def mean_accepted(self) -> float:
        """Accepted draft tokens a verification, without the bonus, over the rounds of
        :meth:`rounds` (the field's mean accepted length is this + 1)."""
        rounds = [count for counts in self.rounds() for count in counts]
        if not rounds:
            raise MetricError(
                "no answer has a second position, so nothing could be drafted; use longer answers")
        return sum(rounds) / len(rounds)

    def conditional(self) -> list[float]:
        """P(draft k right | drafts 1…k-1 right), k = 1…gamma, over starts with room for k; NaN
        where no start got that far."""
        rates = []
        for k in range(1, self.gamma + 1):
            reached = (self.accepted >= k - 1) & (self.drafted >= k)
            rates.append(
                float((
                    self.accepted[reached] >= k).float().mean()) if reached.any() else float("nan"))
        return rates

    def marginal(self) -> list[float]:
        """P(drafts 1…k all right), k = 1…gamma, over starts with room for k; NaN where there is
        none."""
        rates = []
        for k in range(1, self.gamma + 1):
            room = self.drafted >= k
            rates.append(
                float((self.accepted[room] >= k).float().mean()) if room.any() else float("nan"))
        return rates


@torch.no_grad()
def drafted_tokens(adapter: Adapter, batch: Batch, head: heads.Head, gamma: int) -> Tensor:
    """Draft tokens from every start: int64 [B, S, gamma]; entry [b, s, k-1] is drafted for position
    s + k. Means something where s + k is real. An adapter with a draft vocabulary of its own drafts
    among those tokens only."""
    head = heads.head_of(adapter, head)
    batch_size, size = batch.mask.shape
    if adapter.shift == 0:
        tokens = heads.top_tokens(head, adapter.align(batch).aligned)
        padded = F.pad(tokens, (0, gamma), value=-1)
        return torch.stack([padded[:, k:k + size] for k in range(1, gamma + 1)], dim=-1)
    if not hasattr(adapter, "unroll"):
        raise ParameterError(
            f"{adapter.level} predicts the next state but cannot be unrolled; give it an unroll() "
            "as in adapters/eagle.py"
        )
    known = batch.ids_by_verifier if adapter.fuses_tokens else None
    results = adapter.unroll(batch.drafter, batch.verifier, gamma, known)
    return torch.stack([heads.top_tokens(head, states) for states in results],
                       dim=-1).view(batch_size, size, gamma)


def count_accepted(drafts: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """drafts: int64 [B, S, gamma]; ids: int64 [B, S]; mask: bool [B, S] → (accepted, drafted),
    int64 [B, S], -1 where no draft can follow."""
    gamma = drafts.shape[-1]
    padded, real = F.pad(ids, (0, gamma), value=-2), F.pad(mask, (0, gamma), value=False)
    size = ids.shape[1]
    exists = torch.stack([real[:, k:k + size]
                          for k in range(1, gamma + 1)], dim=-1) & mask[..., None]
    truth = torch.stack([padded[:, k:k + size] for k in range(1, gamma + 1)], dim=-1)
    accepted = ((drafts == truth) & exists).long().cumprod(-1).sum(-1)
    drafted = exists.sum(-1)
    return accepted.masked_fill(drafted == 0, -1), drafted.masked_fill(drafted == 0, -1)


def self_rollout(adapter: Adapter, batches: Iterable[Batch], head: heads.Head, *,
                 gamma: int = 5) -> Rollout:
    """Roll an adapter out from every position of every answer.

    Args: batches: right-padded (ShardDataset.batches, source.PackedStates.batches). head: the
    verifier's LM head. gamma: drafts a round.
    Raises: ParameterError for gamma < 1; MetricError for an empty stream or batches of different
    modes.
    """
    if gamma < 1:
        raise ParameterError(f"gamma must be at least 1 draft token a round, not {gamma}")
    was_training = adapter.training
    adapter.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    sequence: list[str] = []
    index: list[int] = []
    modes: set[str] = set()
    for batch in batches:
        accepted, drafted = count_accepted(drafted_tokens(adapter, batch, head, gamma),
                                           batch.ids_by_verifier, batch.mask)
        parts.append((accepted, drafted, batch.mask.sum(-1)))
        sequence += batch.sequence
        index += batch.index
        modes.add(batch.mode)
    adapter.train(was_training)
    if not parts:
        raise MetricError("there is no batch to roll out; check the dataset and its split")
    if len(modes) > 1:
        raise MetricError(
            f"batches of {' and '.join(sorted(modes))} pairs cannot share one figure; roll each "
            "mode out alone"
        )
    width = max(accepted.shape[1] for accepted, _, _ in parts)
    stacked: list[Any] = [
        torch.cat([F.pad(part[i], (0, width - part[i].shape[1]), value=-1) for part in parts])
        for i in (0, 1)
    ]
    return Rollout(stacked[0], stacked[1], torch.cat([part[2] for part in parts]), sequence, index,
                   gamma, modes.pop())


@dataclass(frozen=True)
class VocabularyCost:
    """What drafting among k tokens costs. size: k. coverage: share of the answers' tokens that can
    be drafted at all.

    full, reduced: accepted drafts a verification with all tokens and with these. head_share: k / V,
    of the head's rows a draft step reads.
    """

    size: int
    coverage: float
    full: float
    reduced: float
    head_share: float

    @property
    def kept(self) -> float:
        """Share of the accepted drafts that is left; NaN where the whole vocabulary accepts
        none."""
        return self.reduced / self.full if self.full else float("nan")


def vocabulary_cost(adapter: Adapter, batches: Sequence[Batch], head: Tensor, ids: Tensor, *,
                    gamma: int = 5) -> VocabularyCost:
    """Roll an adapter out twice, with the whole head [V, D] and with its rows ``ids`` int64 [k];
    the adapter itself stays as it is.

    Raises: ParameterError when the adapter has a draft vocabulary already (there is no whole one to
    compare with), or ids are not the
    head's.
    """
    if adapter.draft_ids is not None:
        raise ParameterError(
            f"this {adapter.level} drafts {len(adapter.draft_ids)} tokens only; give one of the "
            "whole vocabulary"
        )
    reduced = heads.draft_head(head, ids)
    answers = torch.cat([batch.ids_by_verifier[batch.mask] for batch in batches])
    full, fewer = (self_rollout(adapter, batches, one, gamma=gamma).mean_accepted()
                   for one in (head, reduced))
    return VocabularyCost(len(ids), float((reduced.rows[answers] >= 0).float().mean()), full, fewer,
                          len(ids) / len(head))
