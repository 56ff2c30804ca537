"""One pass of an adapter over stored pairs: hidden-state, token and reliability metrics, and the
floors on exactly the same tokens.

An adapter that predicts the *next* state (shift 1) is not asked about an answer's first token, so
its floors are not either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xsd.core import Batch, MetricError
from xsd.evaluate import floors
from xsd.evaluate.counterfactual import Counts, FloorComparison, compare_with_floors
from xsd.evaluate.hidden import THRESHOLDS, HiddenStateMetrics
from xsd.evaluate.reliability_old import (
    Reliability,  # until notebooks 04 and 13 read the token table
)
from xsd.evaluate.statistics import N_RESAMPLES
from xsd.evaluate.tokens import TokenMetrics


class Aligner(Protocol):
    """What evaluation needs of an adapter. shift: 0, or 1 when position t predicts the state after
    t."""

    shift: int

    def align(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """aligned [B, S', D], target [B, S', D], ids int64 [B, S'], mask bool [B, S']."""


@dataclass
class Evaluation:
    """The metrics of one adapter with what the floors need. answers and ids_by_drafter: token ids a
    sample, in the order of the pass."""

    hidden: HiddenStateMetrics
    tokens: TokenMetrics
    reliability: Reliability
    shift: int
    clusters: list[str] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    ids_by_drafter: list[list[int]] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    left_out: int = 0
    """Samples without a token to predict (answers no longer than the shift)."""
    def floors(self, training_answers: Sequence[Any], prompts: Sequence[Any] | None = None,
               n: int = 4) -> list[floors.Floor]:
        """Position mode, n-gram table, prompt lookup (in the answer alone without prompts), the
        drafter's own tokens."""
        return [
            floors.PositionMode(training_answers),
            floors.NGram(training_answers, n),
            floors.PromptLookup(prompts),
            floors.DrafterTokens(self.ids_by_drafter),
        ]

    def above_floors(self, training_answers: Sequence[Any], prompts: Sequence[Any] | None = None, *,
                     per_round: bool = False, n_resamples: int = N_RESAMPLES, seed: int = 0,
                     ) -> FloorComparison:
        """The headline: token acceptance (or, per_round, accepted tokens a round) above the best
        floor, paired, on the same tokens.

        training_answers: the verifier's ids of *training* sequences. prompts: one id sequence a
        sample, in the order of ``index``.
        """
        table = self.tokens.table()
        arm: Counts = (table["accepted"], table["rounds"]) if per_round else (table["matched"],
                                                                              table["length"])
        each = {
            floor.name: self._counts(floor, per_round)
            for floor in self.floors(training_answers, prompts)
        }
        return compare_with_floors(arm, each, self.clusters, n_resamples=n_resamples, seed=seed)

    def _counts(self, floor: floors.Floor, per_round: bool) -> Counts:
        if per_round:
            counts = floor.rounds(self.answers, self.tokens.gamma, start=self.shift).per_request()
            return counts["accepted"], counts["rounds"]
        matches = [hit[self.shift:] for hit in floor.match(self.answers)]
        return np.array([hit.sum() for hit in matches]), np.array([len(hit) for hit in matches])


@torch.no_grad()
def evaluate(
    adapter: Aligner, batches: Iterable[Batch], head: Tensor, *,
    thresholds: Sequence[float] = THRESHOLDS, top_k: Sequence[int] = (1, 5), gamma: int = 5,
    max_positions: int = 64, vocabulary: int | None = None,
) -> Evaluation:
    """Run the adapter in eval mode over the batches; head: the verifier's [V, D]. vocabulary: ids
    below it may be drafted (default: all); of them an adapter with a draft vocabulary drafts its
    own alone.

    Raises: MetricError without batches, for batches of two modes, and as the metrics do.
    """
    out = Evaluation(HiddenStateMetrics(thresholds, gamma, max_positions),
                     TokenMetrics(top_k, gamma, max_positions),
                     Reliability(thresholds=thresholds, max_positions=max_positions), adapter.shift,
                     )
    training = getattr(adapter, "training", False)
    if training:
        adapter.eval()  # type: ignore[attr-defined]
    modes: set[str] = set()
    try:
        for batch in batches:
            modes.add(batch.mode)
            if len(modes) > 1:
                raise MetricError(
                    "free_running and teacher_forced batches came in one evaluation; measure each "
                    "mode by itself"
                )
            _update(out, adapter, batch, head, vocabulary)
    finally:
        if training:
            adapter.train()  # type: ignore[attr-defined]
    if not out.clusters:
        raise MetricError(
            "no batch held a token to predict; check that the evaluation set is not empty")
    return out


def _update(out: Evaluation, adapter: Aligner, batch: Batch, head: Tensor,
            vocabulary: int | None) -> None:
    aligned, target, ids, mask = adapter.align(batch)
    keep = mask.any(dim=1).cpu()
    out.left_out += int((~keep).sum())
    if not bool(keep.any()):
        return
    rows = keep.nonzero().flatten().tolist()
    names = [batch.sequence[i] for i in rows]
    if len(rows) < len(keep):
        aligned, target, ids, mask = (x[rows] for x in (aligned, target, ids, mask))
    cosine = out.hidden.update(aligned, target, mask, names)
    own = getattr(adapter, "draft_ids", None)
    match = out.tokens.update_states(aligned, ids, mask, names, head.to(aligned.device),
                                     draft_ids=own, vocabulary=vocabulary)
    out.reliability.update(cosine, match, mask.cpu(), names)
    for i in rows:
        length = int(batch.mask[i].sum())
        out.answers.append(batch.ids_by_verifier[i, :length].tolist())
        out.ids_by_drafter.append(batch.ids_by_drafter[i, :length].tolist())
        out.index.append(int(batch.index[i]))
    out.clusters += names
