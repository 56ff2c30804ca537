"""The drafts of a greedy decode loop, computed from stored pairs.

The verifier's prefill gives the first token of an answer; every later one is drafted as a greedy
loop at gamma drafts it::

    answer      a   b c d   e   f g h i j            gamma = 5
    given       a
    round 1         b c x            two accepted, the verifier's d is the bonus token
    round 2                 e f y    …

A position holds the draft of the round that reaches it (the rejected one at a bonus position), so a
level that feeds on its own predictions (B1, L5F) is judged on them: self-rollout, never one step.
For all others this is the prediction after the verified prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xsd.adapters import heads
from xsd.adapters.base import Adapter
from xsd.core import Batch
from xsd.evaluate.acceptance import rounds_from_lists
from xsd.evaluate.counterfactual import Counts
from xsd.evaluate.hidden import cosines
from xsd.evaluate.tokens import head_tokens
from xsd.steps.evaluation_old import HeldOut


@dataclass(frozen=True)
class Drafts:
    """The loop's drafts over a held-out set, a list a sample, for positions 1 … n-1: ids int64,
    match bool, cosine and probability float32.

    cosine and probability are NaN where a drafter has none.
    """

    ids: list[np.ndarray]
    match: list[np.ndarray]
    cosine: list[np.ndarray]
    probability: list[np.ndarray]

    def of(self, used: Sequence[int]) -> Drafts:
        """Those of the samples ``used``."""
        return Drafts(*([column[i] for i in used]
                        for column in (self.ids, self.match, self.cosine, self.probability)))

    def counts(self, gamma: int) -> tuple[Counts, Counts]:
        """((matched, drafted positions), (accepted, rounds)) a sample."""
        each = rounds_from_lists(self.match, gamma).per_request()
        matched = np.array([hit.sum()
                            for hit in self.match]), np.array([len(hit) for hit in self.match])
        return matched, (each["accepted"], each["rounds"])


def loop_states(adapter: Adapter, batch: Batch, head: heads.Head, gamma: int) -> Tensor:
    """The state behind the draft at each position in a greedy loop at gamma, [B, S, D_v]; position
    0 is meaningless for shift 1.

    Shift 0: the aligned states. Shift 1: step k of the rollout from the round's start s for
    position s + k; a round that accepts all gamma drafts is followed by step gamma + 1, which the
    bonus token then replaces.
    """
    if adapter.shift == 0:
        return adapter.align(batch)[0]
    if batch.verifier.shape[1] < 2:  # answers of one token: nothing is drafted
        return torch.zeros_like(batch.verifier)
    steps = adapter.unroll(batch.drafter, batch.verifier, gamma + 1,
                           batch.ids_by_verifier if adapter.fuses_tokens else None)
    rolled = torch.stack(steps,
                         dim=2)  # [B, S, gamma + 1, D]: row s, step k-1 predicts position s + k
    right = torch.stack([
        F.pad(
            heads.top_tokens(head, rolled[:, :-k, k - 1]) == batch.ids_by_verifier[:, k:],
            (0, k)) for k in range(1, gamma + 1) if k < rolled.shape[1]
    ], dim=2,
                        )  # fmt: skip
    out = torch.zeros_like(batch.verifier)
    for row, length in enumerate(batch.mask.sum(-1).tolist()):
        start = 0
        while start < length - 1:
            accepted = int(right[row, start].long().cumprod(-1).sum())
            reach = min(accepted + 1, length - 1 - start)
            out[row, start + 1:start + 1 + reach] = rolled[row, start, :reach]
            start += accepted + 1
    return out


@torch.no_grad()
def drafts_of(adapter: Adapter, held_out: HeldOut, *, gamma: int, batch_size: int) -> Drafts:
    """What an adapter drafts on a held-out set. Samples of a single token have no position and give
    empty arrays."""
    drafts = Drafts([], [], [], [])
    head = heads.head_of(adapter, held_out.head)
    for batch in held_out.batches(batch_size):
        _collect(drafts, loop_states(adapter, batch, head, gamma), batch, head)
    return drafts


def _after_first(batch: Batch) -> Tensor:
    """bool [B, S], True on real positions but the first."""
    real = batch.mask.clone()
    real[:, 0] = False
    return real


def _cosines(states: Tensor, batch: Batch) -> Tensor:
    """Cosine to the verifier's states at positions 1 … n-1, float32 [B, S], NaN elsewhere."""
    cosine, later = torch.full(batch.mask.shape, math.nan), batch.mask[:, 1:]
    keep = later.any(dim=1)
    if bool(keep.any()):
        cosine[keep, 1:] = cosines(states[keep, 1:], batch.verifier[keep, 1:], later[keep])
    return cosine


def _collect(drafts: Drafts, states: Tensor, batch: Batch,
             head: Tensor | heads.DraftHead) -> None:
    real, cosine = _after_first(batch), _cosines(states, batch)
    reduced = isinstance(head, heads.DraftHead)
    said = head_tokens(states[real], head.weight if reduced else head)
    best = head.ids[said.top_ids[:, 0]] if reduced else said.top_ids[:, 0]
    ids, probability = torch.zeros_like(batch.ids_by_verifier), torch.zeros(real.shape)
    ids[real], probability[real] = best, (said.top_logits[:, 0] - said.logsumexp).exp()
    match = ids == batch.ids_by_verifier
    columns = (drafts.ids, drafts.match, drafts.cosine, drafts.probability)
    for row, line in enumerate(real):
        for column, values in zip(columns, (ids, match, cosine, probability), strict=True):
            column.append(values[row][line].numpy())


@torch.no_grad()
def drafter_drafts(held_out: HeldOut, batch_size: int) -> Drafts:
    """The drafter's own tokens without an adapter; cosine of the raw states where both models have
    one width."""
    drafts = Drafts([], [], [], [])
    for batch in held_out.batches(batch_size):
        real = _after_first(batch)
        same_width = batch.drafter.shape == batch.verifier.shape
        cosine = _cosines(batch.drafter, batch) if same_width else torch.full(real.shape, math.nan)
        match = batch.ids_by_drafter == batch.ids_by_verifier
        for row, line in enumerate(real):
            drafts.ids.append(batch.ids_by_drafter[row][line].numpy())
            drafts.match.append(match[row][line].numpy())
            drafts.cosine.append(cosine[row][line].numpy())
            drafts.probability.append(np.full(int(line.sum()), math.nan, np.float32))
    return drafts
