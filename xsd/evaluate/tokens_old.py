"""Token metrics: what the verifier's LM head makes of the aligned states, against the verifier's
own tokens (docs/metrics.md, section 3).

This is the truth that the cosine only guesses at. The head is applied in pieces of the vocabulary
with a running argmax, top-k and log-sum-exp: memory does not grow with the vocabulary. What is kept
of a position is the rank of the right token (one byte), so partial results merge in any order and
every figure can be bootstrapped by sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xsd.core import MetricError
from xsd.evaluate import checks
from xsd.evaluate.acceptance import Acceptance, Rounds, rounds_from_matches
from xsd.evaluate.hidden_old import Summary, summary
from xsd.evaluate.statistics import Interval, bootstrap_columns
from xsd.evaluate.tables import row

_MISSED = 255
"""Rank of a right token that was not among the candidates."""


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
                chunk: int = 4096, rows: int = 2048, vocabulary: int | None = None,
                ) -> HeadTokens:
    """Apply an LM head without ever holding [N, V]: at most ``rows × chunk`` logits exist at a
    time, in float32.

    Args: hidden: [N, D] states after the final norm. weight: [V, D]. targets: int64 [N], for the
    cross-entropy. vocabulary: ids at or above
    it are left out (tokens that are never drafted). Raises: MetricError when widths differ, top_k
    exceeds the vocabulary, a target lies outside, or a state is not finite.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise MetricError(
            f"the LM head is {list(weight.shape)} ([V, D]) but the states are {list(hidden.shape)} "
            "([N, D]); the widths must agree, so "
            "load the head of the model whose space the states are in")
    size = min(vocabulary or len(weight), len(weight))
    if not 1 <= top_k <= size:
        raise MetricError(f"top_k must be between 1 and the vocabulary's {size} but is {top_k}")
    if not bool(torch.isfinite(hidden).all()):
        raise MetricError(
            "a state given to the LM head is NaN or infinite; the adapter or the extraction "
            "produced it, so mend that first"
        )
    if targets is not None:
        if targets.shape != hidden.shape[:1]:
            raise MetricError(
                f"{len(hidden)} states but targets of shape {list(targets.shape)}; give one token "
                "id a state"
            )
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < size:
            raise MetricError(
                f"a target id lies outside the head's {size} tokens; the ids and the head must be "
                "the same model's"
            )
    parts = [
        _head_rows(hidden[at:at + rows], weight, size, top_k,
                   None if targets is None else targets[at:at + rows], chunk)
        for at in range(0, len(hidden), rows)
    ] or [_head_rows(hidden, weight, size, top_k, targets, chunk)]
    ids, logits, total, right = (None
                                 if parts[0][i] is None else torch.cat([part[i] for part in parts])
                                 for i in range(4))
    return HeadTokens(ids, logits, total, right, None if right is None else total - right)


def _head_rows(hidden: Tensor, weight: Tensor, size: int, top_k: int, targets: Tensor | None,
               chunk: int) -> tuple[Tensor | None, ...]:
    hidden = hidden.float()
    n = len(hidden)
    top_logits, top_ids = hidden.new_full((n, 0), -torch.inf), torch.empty(
        (n, 0), dtype=torch.int64, device=hidden.device)
    total = hidden.new_full((n,), -torch.inf)
    right = None if targets is None else hidden.new_zeros(n)
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        logits = hidden @ weight[start:stop].float().T
        if right is not None:
            inside = ((targets >= start) & (targets < stop)).nonzero().flatten()
            right[inside] = logits[inside, targets[inside] - start]
        if top_k == 1:
            best, at = logits.max(dim=1, keepdim=True)
        else:
            best, at = logits.topk(min(top_k, stop - start), dim=1)
        peak = best[:, :1]
        top_logits, order = torch.cat([top_logits, best], dim=1).sort(dim=1, descending=True,
                                                                      stable=True)
        top_ids = torch.cat([top_ids, at + start], dim=1).gather(1, order)[:, :top_k]
        top_logits = top_logits[:, :top_k]
        total = torch.logaddexp(total, peak[:, 0] + logits.sub_(peak).exp_().sum(dim=1).log())
    return top_ids, top_logits, total, right


def drafted_ids(hidden: Tensor, weight: Tensor, draft_ids: Tensor | None, *, top_k: int = 1,
                vocabulary: int | None = None, **options: Any) -> Tensor:
    """int64 [N, k'], best first: what an adapter drafts that may draft only draft_ids, int64 [k]
    (None: any id below vocabulary).

    k' = top_k, or as many as there are. hidden, weight, options: as head_tokens. Raises:
    MetricError as head_tokens.
    """
    if draft_ids is None:
        return head_tokens(hidden, weight, top_k=min(top_k, len(weight)), vocabulary=vocabulary,
                           **options).top_ids
    own = draft_ids.to(weight.device)
    own = own[own < (vocabulary or len(weight))]
    return own[head_tokens(hidden, weight[own], top_k=min(top_k, max(1, len(own))),
                           **options).top_ids]


@dataclass(frozen=True)
class TokenPosition:
    """One position: match (marginal), survival = every token up to here matched, conditional =
    match given all before matched (None: never)."""

    position: int
    n: int
    match: Interval
    survival: Interval
    conditional: float | None


@dataclass(frozen=True)
class TokenResult:
    """n of the intervals: tokens for shares, samples for means over samples, rounds for accepted
    per round."""

    gamma: int
    n_samples: int
    n_clusters: int
    acceptance: Interval
    top_k: Mapping[int, Interval]
    unbroken_prefix: Summary
    unbroken_prefix_mean: Interval
    accepted_per_round: Interval
    rounds: Acceptance
    positions: tuple[TokenPosition, ...]
    cross_entropy: Interval | None

    def rows(self) -> list[dict[str, Any]]:
        """Long table: metric, threshold, position, value, low, high, n, n_clusters."""
        out = [row("token_acceptance", self.acceptance)]
        out += [row(f"token_top{k}", value) for k, value in self.top_k.items() if k > 1]
        out.append(row("token_unbroken_prefix_mean", self.unbroken_prefix_mean))
        out += [
            row(f"token_unbroken_prefix_{name}", getattr(self.unbroken_prefix, name), n=self.n_samples)
            for name in ("std", "min", "max", "median")
        ]
        out.append(row("token_accepted_per_round", self.accepted_per_round))
        out.append(
            row("token_accepted_per_round_with_bonus", self.rounds.mean_accepted_with_bonus,
                n=self.rounds.n_rounds))
        if self.cross_entropy is not None:
            out.append(row("token_cross_entropy", self.cross_entropy))
        for at in self.positions:
            out.append(row("token_acceptance", at.match, position=at.position))
            out.append(row("token_survival", at.survival, position=at.position))
            if at.conditional is not None:
                out.append(row("token_conditional", at.conditional, position=at.position, n=at.n))
        return out


class TokenMetrics:
    """Streaming, mergeable. top_k: the ranks asked for, e.g. (1, 5). gamma: draft tokens a round.
    max_positions: rows of the per-position group."""
    def __init__(self, top_k: Sequence[int] = (1, 5), gamma: int = 5,
                 max_positions: int = 64) -> None:
        """Raises: MetricError for a rank outside 1 … 254, or gamma or max_positions below 1."""
        self.top_k = tuple(sorted({1, *map(int, top_k)}))
        if self.top_k[0] < 1 or self.top_k[-1] >= _MISSED or gamma < 1 or max_positions < 1:
            raise MetricError(
                "top_k must lie in 1 … 254, gamma and max_positions at 1 or above; got "
                f"{list(top_k)}, {gamma}, {max_positions}"
            )
        self.gamma = gamma
        self.max_positions = max_positions
        self._ranks: list[np.ndarray] = []
        self._cross_entropy: list[np.ndarray | None] = []
        self._clusters: list[str] = []

    def update(self, predicted: Tensor, ids: Tensor, mask: Tensor, clusters: Sequence[str], *,
               cross_entropy: Tensor | None = None) -> Tensor:
        """Add a batch. predicted: int64 [B, S] draft tokens, or [B, S, K] candidates best first;
        ids: int64 [B, S] the verifier's tokens;
        mask: bool [B, S]; clusters: B sequence names; cross_entropy: [B, S] in nats. Returns match
        bool [B, S] on the CPU (False where
        masked).

        Raises: MetricError for other shapes, ids that are not integers, rows without real
        positions; then nothing of the batch is kept.
        """
        predicted, ids, mask = predicted.cpu(), ids.cpu(), mask.cpu()
        checks.mask_lengths(mask)
        names = checks.cluster_names(clusters, len(mask))
        checks.token_ids(ids, mask, "the verifier's ids")
        candidates = predicted.unsqueeze(-1) if predicted.dim() == 2 else predicted
        if candidates.dim(
        ) != 3 or candidates.shape[:2] != ids.shape or candidates.is_floating_point():
            raise MetricError(
                "predicted must be integer ids [B, S] or [B, S, K] for ids of shape "
                f"{list(ids.shape)} but is "
                f"{str(predicted.dtype).removeprefix('torch.')} {list(predicted.shape)}; logits go "
                "through head_tokens first"
            )
        hit = candidates == ids.unsqueeze(-1)
        rank = torch.where(hit.any(dim=-1),
                           hit.int().argmax(dim=-1), _MISSED).to(torch.uint8).cpu().numpy()
        keep = mask.cpu().numpy()
        losses: Any = [None] * len(rank)
        if cross_entropy is not None:
            checks.same_shape(cross_entropy, ids, "cross_entropy", "ids")
            losses = cross_entropy.detach().float().cpu().numpy()
        self._ranks += [line[real] for line, real in zip(rank, keep, strict=True)]
        self._cross_entropy += [
            None if line is None else line[real] for line, real in zip(losses, keep, strict=True)
        ]
        self._clusters += names
        return hit[..., 0] & mask

    def update_states(self, aligned: Tensor, ids: Tensor, mask: Tensor, clusters: Sequence[str],
                      weight: Tensor, *, draft_ids: Tensor | None = None, **options: Any,
                      ) -> Tensor:
        """Add a batch of aligned states [B, S, D] through the verifier's head weight [V, D]
        (options: see head_tokens). draft_ids: int64 [k], the only ids that may be drafted; a token
        outside them is missed, its cross-entropy is the whole head's. Returns match bool [B, S].

        Raises: MetricError (see head_tokens and update).
        """
        if aligned.dim() != 3 or aligned.shape[:2] != mask.shape:
            raise MetricError(
                f"aligned states must be [B, S, D] over the mask's {list(mask.shape)} but are "
                f"{list(aligned.shape)}"
            )
        checks.token_ids(ids.cpu(), mask.cpu(), "the verifier's ids")
        real = mask.to(aligned.device)
        out = head_tokens(aligned[real], weight, top_k=min(self.top_k[-1], len(weight)),
                          targets=ids.to(aligned.device)[real], **options)
        drafted = out.top_ids if draft_ids is None else drafted_ids(
            aligned[real], weight, draft_ids, top_k=self.top_k[-1], **options)
        candidates = torch.full((*mask.shape, drafted.shape[1]), -1, dtype=torch.int64,
                                device=aligned.device)
        candidates[real] = drafted
        losses = torch.zeros(mask.shape, device=aligned.device)
        losses[real] = out.cross_entropy
        return self.update(candidates, ids, mask, clusters, cross_entropy=losses)

    def merge(self, other: TokenMetrics) -> TokenMetrics:
        """Add another partial result to this one and return it. Raises: MetricError for other
        settings."""
        mine, its = (self.top_k, self.gamma, self.max_positions), (other.top_k, other.gamma,
                                                                   other.max_positions)
        if mine != its:
            raise MetricError(
                f"cannot merge metrics of top_k, gamma, max_positions {mine} with {its}; measure "
                "both with one setting"
            )
        self._ranks += other._ranks
        self._cross_entropy += other._cross_entropy
        self._clusters += other._clusters
        return self

    def matches(self) -> tuple[Tensor, Tensor]:
        """match and mask, bool [N, S_max], samples in the order of the updates."""
        ranks, mask = self._padded(range(len(self._ranks)))
        return torch.from_numpy((ranks == 0) & mask), torch.from_numpy(mask)

    def table(self) -> pd.DataFrame:
        """One row a sample in the order of the updates: cluster, length, matched, unbroken_prefix,
        rounds, accepted (pairs arms sample by sample)."""
        match, mask = self.matches()
        each = rounds_from_matches(match, mask, self.gamma).per_request()
        hit = match.numpy()
        return pd.DataFrame({
            "cluster": self._clusters, "length": mask.numpy().sum(axis=1),
            "matched": hit.sum(axis=1), "unbroken_prefix": np.cumprod(hit, axis=1,
                                                                  dtype=np.int64).sum(axis=1),
            "rounds": each["rounds"], "accepted": each["accepted"],
        })

    def result(self, *, n_resamples: int = 2000, seed: int = 0) -> TokenResult:
        """Every figure with intervals clustered by sequence. Raises: MetricError before the first
        update."""
        if not self._ranks:
            raise MetricError("no sample has been measured yet; call update before result")
        losses = [b"" if line is None else line.tobytes() for line in self._cross_entropy]
        order = sorted(range(len(self._ranks)), key=lambda i:
                       (self._clusters[i], self._ranks[i].tobytes(), losses[i]))
        clusters = [self._clusters[i] for i in order]
        ranks, mask = self._padded(order)
        match, length = (ranks == 0) & mask, mask.sum(axis=1)
        run = np.cumprod(match, axis=1, dtype=np.int64).sum(axis=1)
        rounds: Rounds = rounds_from_matches(torch.from_numpy(match), torch.from_numpy(mask),
                                             self.gamma)
        each = rounds.per_request()
        above = [run, each["accepted"], *[((ranks < k) & mask).sum(axis=1) for k in self.top_k]]
        below = [np.ones(len(order)), each["rounds"], *len(self.top_k) * [length]]
        if all(line is not None for line in self._cross_entropy):
            above.append(np.array([np.sum(self._cross_entropy[i], dtype=np.float64)
                                   for i in order]))
            below.append(length)
        drawn = bootstrap_columns(np.stack(above, axis=1), np.stack(below, axis=1), clusters,
                                  n_resamples=n_resamples, seed=seed)
        top_k = dict(zip(self.top_k, drawn[2:], strict=False))
        return TokenResult(gamma=self.gamma, n_samples=len(order), n_clusters=len(set(clusters)),
                           acceptance=top_k[1], top_k=top_k, unbroken_prefix=summary(run),
                           unbroken_prefix_mean=drawn[0], accepted_per_round=drawn[1],
                           rounds=Acceptance.of(rounds),
                           positions=self._positions(match, mask, clusters, seed),
                           cross_entropy=drawn[-1] if len(drawn) > 2 + len(top_k) else None,
                           )

    def _padded(self, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        lines = [self._ranks[i] for i in order]
        shape = len(lines), max((len(line) for line in lines), default=0)
        ranks, mask = np.full(shape, _MISSED, dtype=np.uint8), np.zeros(shape, dtype=bool)
        for i, line in enumerate(lines):
            ranks[i, :len(line)], mask[i, :len(line)] = line, True
        return ranks, mask

    def _positions(self, match: np.ndarray, mask: np.ndarray, clusters: list[str],
                   seed: int) -> tuple[TokenPosition, ...]:
        width = min(self.max_positions, mask.shape[1])
        match, mask = match[:, :width], mask[:, :width]
        survived = np.cumprod(match, axis=1, dtype=np.int64).astype(bool)
        bands = bootstrap_columns(np.concatenate([match, survived], axis=1), mask, clusters,
                                  n_resamples=1000, seed=seed)
        before = np.concatenate([np.ones(
            (len(match), 1), dtype=bool), survived[:, :-1]], axis=1) & mask
        rows = []
        for t in range(width):
            reached = int(before[:, t].sum())
            conditional = float(survived[:, t].sum() / reached) if reached else None
            rows.append(
                TokenPosition(t, int(mask[:, t].sum()), bands[t], bands[width + t], conditional))
        return tuple(rows)
