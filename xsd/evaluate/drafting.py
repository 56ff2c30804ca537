"""What an adapter drafts on a batch of stored pairs: after the verified prefix (one step), and in a
greedy loop in which it feeds on its own predictions (self-rollout; docs/adapters.md, section 6, and
docs/teacher_forcing.md). The first token of an answer is the verifier's own, from its prefill.

With position s the last one verified, at gamma = 3::

    position       0 … s        s+1        s+2        s+3
    known          verified     draft 1    draft 2    draft 3
    drafter reads  drafter[s+1] gives 1, drafter[s+2] gives 2 …               shift 0: L1–L5
    verifier, both verified[0…s] gives p₁, which stands for verified[s+1] …   shift 1: B1, L5F
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xsd.adapters import heads
from xsd.core import Batch, ParameterError
from xsd.evaluate import rounds
from xsd.evaluate.kernels import HeadTokens, cosines, head_tokens

MISSED = 255
"""Rank of a right token that was not among the candidates."""
Columns = dict[str, np.ndarray]


def one_step(adapter: Any, batch: Batch, head: Tensor | None = None,
             top_k: int = 1) -> Columns:
    """Every predicted position after its verified prefix, sample by sample: index, position,
    verifier_id, one_step_cosine and, with the verifier's head [V, D], draft_id, draft_probability,
    one_step_match, one_step_rank, cross_entropy. Without a token to predict, nothing: {}.

    An adapter with a draft vocabulary drafts among its own tokens; the cross-entropy is the whole
    head's. Raises: MetricError as kernels do.
    """
    aligned, target, ids, mask = adapter.align(batch)
    if not bool(mask.any()):
        return {}
    keep = mask.any(dim=1)
    cosine = cosines(aligned[keep], target[keep], mask[keep])[mask[keep]]
    row, at = mask.nonzero(as_tuple=True)
    columns = {
        "index": torch.as_tensor(batch.index)[row.cpu()],
        "position": at + adapter.shift - 1,
        "verifier_id": ids[mask],
        "one_step_cosine": cosine,
    }
    if head is not None:
        columns |= _say(aligned[mask], head, ids[mask], top_k, getattr(adapter, "draft_ids", None))
    return _arrays(columns)


def _arrays(columns: dict[str, Tensor]) -> Columns:
    return {name: values.cpu().numpy() for name, values in columns.items()}


def _say(states: Tensor, head: Tensor, ids: Tensor, top_k: int,
         draft_ids: Tensor | None) -> dict[str, Tensor]:
    """What the head says of states [N, D], against the verifier's ids [N]."""
    whole = head_tokens(states, head.to(states.device), top_k=min(top_k, len(head)), targets=ids)
    said, candidates = whole, whole.top_ids
    if draft_ids is not None:
        said, candidates = _among(states, head, draft_ids, top_k)
    hit = candidates == ids[:, None]
    rank = torch.where(hit.any(dim=1), hit.int().argmax(dim=1), MISSED)
    return {
        "draft_id": candidates[:, 0],
        "draft_probability": (said.top_logits[:, 0] - said.logsumexp).exp(),
        "one_step_match": rank == 0,
        "one_step_rank": rank.to(torch.uint8),
        "cross_entropy": whole.cross_entropy,
    }


def _among(states: Tensor, head: Tensor, draft_ids: Tensor | None,
           top_k: int = 1) -> tuple[HeadTokens, Tensor]:
    """The best tokens among those that an adapter may draft (None: all), as the rows of the head
    that were applied and as full ids [N, k]."""
    own = None if draft_ids is None else draft_ids.to(head.device)
    rows = (head if own is None else head[own]).to(states.device)
    said = head_tokens(states, rows, top_k=min(top_k, len(rows)))
    return said, said.top_ids if own is None else own.to(states.device)[said.top_ids]


def greedy_loop(adapter: Any, batch: Batch, head: Tensor, gamma: int) -> Columns:
    """Positions 1 … n-1 of every answer as a loop drafts them that feeds on its own predictions:
    draft_id, draft_probability, match, cosine, accepted; for adapters of shift 1. Exact for greedy
    decoding: a draft counts only while every draft before it was right.

    A position holds the draft of the round that reaches it, the rejected one at a bonus position;
    where a round accepts all gamma drafts, the one it would have made next. accepted: by a round
    that begins there. Raises: ParameterError when the adapter cannot be unrolled.
    """
    row, at, states, accepted = _looped(adapter, batch, head, gamma)
    target = batch.verifier[row, at + 1]
    said, best = _among(states, head, adapter.draft_ids)
    real = torch.ones(1, len(at), dtype=torch.bool)
    columns = {
        "draft_id": best[:, 0],
        "draft_probability": (said.top_logits[:, 0] - said.logsumexp).exp(),
        "match": best[:, 0] == batch.ids_by_verifier[row, at + 1],
        "cosine": cosines(states[None], target[None], real)[0],
    }
    return _arrays(columns) | {"accepted": accepted}


def _looped(adapter: Any, batch: Batch, head: Tensor,
            gamma: int) -> tuple[np.ndarray, np.ndarray, Tensor, np.ndarray]:
    """Of every drafted position: its answer and position [N], the state behind its draft in the
    greedy loop [N, D], and what a round accepts that begins there [N]."""
    if not hasattr(adapter, "rolled"):
        raise ParameterError(f"{adapter.level} predicts the next state but cannot be unrolled; "
                             "give it an unroll() as in adapters/eagle.py")
    lengths = (batch.mask.sum(dim=-1) - 1).cpu().numpy()
    ids, steps = from_every_start(adapter, batch, head, gamma + 1)
    truth = np.stack([_later(batch.ids_by_verifier, k, -2) for k in range(1, gamma + 1)], axis=-1)
    run = (ids[..., :gamma] == truth).cumprod(axis=-1).sum(axis=-1)
    found = rounds.walk(run, lengths, gamma)
    # The rounds, bonus included, cover the drafted positions of all answers one after the other.
    cover = found.accepted + found.bonus
    step = np.concatenate([np.arange(n) for n in cover])
    step[step >= len(steps)] = 0  # beyond a block: what stands first in the next one
    row = np.repeat(np.arange(len(lengths)), lengths)
    at = np.concatenate([np.arange(n) for n in lengths])
    start = at - step
    states = batch.verifier.new_empty(len(at), batch.verifier.shape[-1])
    for k, predicted in enumerate(steps):
        chosen = np.flatnonzero(step == k)
        states[chosen] = predicted[row[chosen], start[chosen]].to(states.dtype)
    return row, at, states, run[row, at]


@torch.no_grad()
def alternatives(adapter: Any | None, batch: Batch, head: Tensor, *, gamma: int, top_k: int = 5,
                 drafter_head: Tensor | None = None) -> pd.DataFrame:
    """Why each draft of one answer (a batch of one) was accepted or not, one row per position of
    the token table, measured with the same gamma. adapter: None for the drafter's own tokens, which
    its head [V, D_d] says.

    draft_ids, verifier_ids: the ``top_k`` likeliest [k], with draft_probabilities and
    verifier_probabilities; rank: place of the verifier's token among all drafts there are, from 0
    on (-1: not in the draft vocabulary); margin: how far it is behind the best of them; certainty:
    how far the verifier's second is behind its first, both in nats. Raises: as greedy_loop."""
    if adapter is None:
        drafted, target, ids, mask = (batch.drafter, batch.verifier, batch.ids_by_verifier,
                                      batch.mask)
    else:
        drafted, target, ids, mask = adapter.align(batch)
    shift, own = getattr(adapter, "shift", 0), getattr(adapter, "draft_ids", None)
    at = mask[0].nonzero().flatten().cpu().numpy() + shift - 1
    drafted, target, ids = drafted[mask], target[mask], ids[mask].cpu()
    if shift:
        _, at, drafted, _ = _looped(adapter, batch, head, gamma)
    rows = drafter_head if adapter is None else head if own is None else head[own.to(head.device)]
    scores = torch.log_softmax(drafted.float().cpu() @ rows.float().cpu().T, dim=-1)
    verified = torch.log_softmax(target.float().cpu() @ head.float().cpu().T, dim=-1)
    place = torch.full((max(len(head), len(rows)), ), -1)  # of each id in the draft vocabulary
    place[torch.arange(len(rows)) if own is None else own.cpu()] = torch.arange(len(rows))
    known, its = place[ids] >= 0, scores.gather(1, place[ids].clamp(min=0)[:, None])
    (best, chosen), (sure, said) = (one.topk(min(top_k, one.shape[1]))
                                    for one in (scores, verified))
    return pd.DataFrame({
        "position": at, "rank": torch.where(known, (scores > its).sum(dim=1), -1).numpy(),
        "margin": (best[:, 0] - its[:, 0]).numpy(), "certainty": (sure[:, 0] - sure[:, 1]).numpy(),
        "draft_ids": (chosen if own is None else own.cpu()[chosen]).tolist(),
        "draft_probabilities": best.exp().tolist(),
        "verifier_ids": said.tolist(), "verifier_probabilities": sure.exp().tolist(),
    })


def from_every_start(adapter: Any, batch: Batch, head: Tensor,
                     n: int) -> tuple[np.ndarray, list[Tensor]]:
    """n drafts on own predictions from every position: their ids [B, S, n], and the states behind
    them, n × [B, S, D]. Entry [b, s, k - 1] is draft k when s is the last verified position; -1
    beyond the answer."""
    steps = adapter.rolled(batch, n)
    rows = heads.head_of(adapter, head.to(batch.verifier.device))
    ids = np.full((*batch.mask.shape, n), -1)
    for k, states in enumerate(steps):
        there = _later(batch.mask, k + 1, False)
        ids[there, k] = heads.top_tokens(rows, states[torch.from_numpy(there)]).cpu().numpy()
    return ids, steps


def _later(values: Tensor, k: int, fill: Any) -> np.ndarray:
    """[B, S] → what stands k positions later, ``fill`` beyond the end."""
    values = values.cpu().numpy()
    out = np.full_like(values, fill)
    out[:, :max(0, values.shape[1] - k)] = values[:, k:]
    return out
