"""Language training of the embedded models: many questions about one clip in one row, kept apart by
a block mask.

    row:   [ prefix: prompt start + visual tokens | question 1 answer 1 | question 2 answer 2 | … ]
    sees:    prefix ← everything                    only itself + prefix    only itself + prefix

Every segment continues the positions of the prefix, as if it stood alone: answers cannot leak facts
into each other (which flatters the loss), and the expensive prefix is computed once for all of
them. Tokens that state a fact weigh more than function words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.embedded_pair.reading import Readers
from studies.embedded_pair.stage import StageConfig, mask_of, run


@dataclass(frozen=True)
class Segment:
    """One question with its answer as ids. question: ids after the visual tokens. answer: ids
    ending in EOS. weight: one per answer id."""

    question: list[int]
    answer: list[int]
    weight: list[float]


@dataclass(frozen=True)
class LanguageConfig(StageConfig):
    """Batch in clips, questions asked per clip and step. A token that states a fact weighs
    ``fact_weight``; the tower follows at ``tower_rate`` of the learning rate."""

    questions_per_clip: int = 6
    fact_weight: float = 3.0
    tower_rate: float = 0.6


@dataclass(frozen=True)
class PackedRow:
    """ids: int64 [L] (0 where visual tokens stand). segment: int64 [L], 0 prefix, 1… questions.
    position: int64 [L]. target, weight: [L]."""

    ids: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    target: np.ndarray
    weight: np.ndarray


def pack(before: list[int], n_visual: int, segments: Sequence[Segment]) -> PackedRow:
    """Lay out one row; target[i] is the id that position i must predict, -100 where nothing is
    asked."""
    prefix = len(before) + n_visual
    ids, segment, position = [*before, *[0] * n_visual], [0] * prefix, list(range(prefix))
    target, weight = [-100] * prefix, [0.0] * prefix
    for number, s in enumerate(segments, start=1):
        tokens = s.question + s.answer
        ids += tokens
        segment += [number] * len(tokens)
        position += list(range(prefix, prefix + len(tokens)))
        target += [-100] * (len(s.question) - 1) + s.answer + [-100]
        weight += [0.0] * (len(s.question) - 1) + s.weight + [0.0]
    return PackedRow(*(np.array(a) for a in (ids, segment, position, target)),
                     np.array(weight, dtype=np.float32))


def collate(rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, positions, targets int64 [B, L], weights [B, L] and the block mask bool [B, 1, L, L]
    (True: may be seen)."""
    length = max(len(row.ids) for row in rows)

    def padded(name: str, value: float) -> Tensor:
        columns = [getattr(row, name) for row in rows]
        return torch.from_numpy(np.stack([
            np.pad(column, (0, length - len(column)), constant_values=value) for column in columns
        ]))

    segment, order = padded("segment", -1), torch.arange(length)
    earlier = order[:, None] >= order[None, :]
    own_or_prefix = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    # padding sees itself, so that no row of the softmax is empty
    seen = earlier & own_or_prefix | torch.eye(length, dtype=torch.bool)
    return (padded("ids", 0), padded("position", 0), padded("target", -100), padded("weight", 0.0),
            seen[:, None])


def train_decoder(
    *, embed: Callable[[Tensor], Tensor], visual: Callable[[np.ndarray], Tensor],
    decode: Callable[[Tensor, Tensor, Tensor], Tensor], lm_head: Callable[[Tensor], Tensor],
    trained: nn.Module, tower: nn.Module, readers: Readers, before: list[int], n_visual: int,
    segments: Callable[[int, np.random.Generator], Sequence[Segment]], n_clips: int,
    config: LanguageConfig, device: str = "cpu", checkpoint: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train a decoder (and its projector) on packed rows; resumes from ``checkpoint``.

    embed: ids [B, L] → [B, L, D]. visual: clip numbers [B] → visual tokens [B, n_visual, D], with
    gradient to projector and tower. decode: embeddings [B, L, D], additive mask [B, 1, L, L],
    positions [B, L] → post-norm states [B, L, D]. lm_head: states [N, D] → logits [N, V]. trained:
    owns the decoder's and the projector's parameters. tower: trained along at ``tower_rate`` of the
    learning rate, as what still asks for comparison over time must be written into it. readers:
    what the lower half is asked beside the language. before: ids before the visual tokens.
    segments: clip number, generator → the questions of this step.

    Returns: the loss of every step. Raises: TrainingError when the loss is not finite.
    """
    prefix = len(before) + n_visual

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, step])
        clips = np.sort(rng.choice(n_clips, size=min(config.batch_size, n_clips), replace=False))
        rows = [pack(before, n_visual, segments(int(clip), rng)) for clip in clips]
        ids, positions, targets, weights, seen = (t.to(device) for t in collate(rows))
        embeddings = embed(ids)
        tokens = visual(clips).to(embeddings.dtype)
        embeddings = torch.cat([embeddings[:, :len(before)], tokens, embeddings[:, prefix:]], dim=1)
        states = decode(embeddings, mask_of(seen), positions)
        asked = targets >= 0
        weight = weights[asked]
        each = F.cross_entropy(lm_head(states[asked]).float(), targets[asked], reduction="none")
        asked_of_readers = readers.loss(clips, slice(len(before), prefix))
        return (each * weight).sum() / weight.sum() + asked_of_readers

    with readers.listening():
        return run("language", [(trained, 1.0), (readers, 1.0), (tower, config.tower_rate)],
                   loss_at, config, device=device, checkpoint=checkpoint, progress=progress)
