"""Reading the scene off the decoder's lower half, before and beside any language.

A tower sees one frame at a time, so what moves must be found by the decoder's first layers, which
look back at earlier frames; the answers alone teach that slowly (docs/log.md). Two readers ask for
it: one at every patch, a third of the way up, one for the facts of the whole clip, half way up. As
nothing above that is asked, the stage before language runs the visual tokens through the lower half
alone, which shows a decoder four times as many clips in the same time. The readers are thrown away
after training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.embedded_pair.grounding import PatchReader, loss_of
from studies.embedded_pair.stage import StageConfig, mask_of, run

SCENE_WEIGHT = 0.5
"""Of what the patches are asked, beside the facts."""


@dataclass(frozen=True)
class ReadingConfig(StageConfig):
    """Batch in clips; the tower follows at ``tower_rate`` of the learning rate."""

    tower_rate: float = 0.6


class FactRegisters(nn.Module):
    """One classifier a fact on the last visual positions, half way up the decoder.

    The k-th of the last ``len(classes)`` visual positions has to know fact k there: it has seen
    every frame before it, and what it has gathered is a single step of attention away from any
    answer. Without it grounding comes slowly through the words alone (docs/log.md).
    """
    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classifiers = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy. states: [B, n_facts, D]. labels: int64 [B, n_facts], -1 where a fact
        is not asked."""
        x = self.norm(states.float())
        logits = {name: read(x[:, i]) for i, (name, read) in enumerate(self.classifiers.items())}
        return loss_of(logits, labels, list(self.classifiers))


class SceneReader(nn.Module):
    """What stands in every patch, how it moves, and how the camera does, a third of the way up the
    decoder."""
    def __init__(self, width: int, patches: PatchReader, n_ego: int) -> None:
        super().__init__()
        self.patches, self.norm, self.ego = patches, nn.LayerNorm(width), nn.Linear(width, n_ego)

    def forward(self, states: Tensor, codes: Tensor, colour_known: Tensor, ego: Tensor) -> Tensor:
        """Summed mean cross-entropies.

        states: [B, F, P, D] without CLS; codes, colour_known: as PatchReader's. ego: int64 [B], -1
        unknown; asked for at every patch of the later half of the frames, which have something to
        look back at.
        """
        loss, known = self.patches(states, codes, colour_known), ego >= 0
        if known.any():
            later = self.ego(self.norm(states[known][:, states.shape[1] // 2:].float()))
            wanted = ego[known].repeat_interleave(later.shape[1] * later.shape[2])
            loss = loss + F.cross_entropy(later.flatten(0, 2).float(), wanted)
        return loss


@dataclass(frozen=True)
class ClipTruths:
    """What the readers are asked about N clips.

    labels: int64 [N, n_facts], -1 not asked. ego: int64 [N], -1 not known. colour_known: bool [N].
    codes: clip numbers, patches per side → int64 [B, F, P], the layout's code in every patch.
    """

    labels: np.ndarray
    ego: np.ndarray
    colour_known: np.ndarray
    codes: Callable[[np.ndarray, int], np.ndarray]


class Readers(nn.Module):
    """Both readers, the two decoder layers they listen to, and the truth."""
    def __init__(self, registers: FactRegisters, scene: SceneReader, truths: ClipTruths, *,
                 middle: nn.Module, early: nn.Module,
                 patches: Callable[[Tensor], Tensor]) -> None:
        """patches: states of the visual positions [B, n_visual, D] → [B, F, P, D]. middle and early
        belong to the decoder."""
        super().__init__()
        self.registers, self.scene = registers, scene
        self._layers = (middle, early)  # a tuple: not this module's own parameters
        self._truths, self._patches = truths, patches
        self._tapped: dict[nn.Module, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what both layers put out at every pass inside this block."""
        def tap(module: nn.Module, given: tuple, result: Tensor | tuple) -> None:
            self._tapped[module] = result[0] if isinstance(result, tuple) else result

        hooks = [layer.register_forward_hook(tap) for layer in set(self._layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._tapped.clear()

    def loss(self, clips: np.ndarray, visual: slice) -> Tensor:
        """Weighted sum of both readers' losses on the last pass. visual: where the visual tokens
        stand."""
        middle, early = (self._tapped[layer] for layer in self._layers)
        truths, device = self._truths, middle.device
        n_facts = truths.labels.shape[1]
        facts = self.registers(middle[:, visual.stop - n_facts:visual.stop],
                               torch.from_numpy(truths.labels[clips]).to(device))
        seen = self._patches(early[:, visual])
        asked = (truths.codes(clips, int(seen.shape[2]**0.5)), truths.colour_known[clips],
                 truths.ego[clips])
        scene = self.scene(seen, *(torch.from_numpy(truth).to(device) for truth in asked))
        return facts + SCENE_WEIGHT * scene


def train_lower_half(
    *, embed: Callable[[Tensor], Tensor], visual: Callable[[np.ndarray], Tensor],
    decode: Callable[[Tensor, Tensor, Tensor], Tensor], trained: nn.Module, tower: nn.Module,
    readers: Readers, before: Sequence[int], n_visual: int, n_clips: int, config: ReadingConfig,
    device: str = "cpu", checkpoint: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train tower, projector and the decoder's lower half on what the readers ask; resumes from
    ``checkpoint``.

    Args: as language.train_decoder's; decode: through the layers up to the readers' upper one only.

    Returns: the loss of every step. Raises: TrainingError when the loss is not finite.
    """
    prefix = len(before) + n_visual
    start = torch.tensor([list(before)], device=device)
    positions = torch.arange(prefix, device=device)[None]
    seen = torch.ones(1, 1, prefix, prefix, dtype=torch.bool, device=device).tril()

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, step])
        clips = np.sort(rng.choice(n_clips, size=min(config.batch_size, n_clips), replace=False))
        tokens = visual(clips)
        opening = embed(start).expand(len(clips), -1, -1).to(tokens.dtype)
        embeddings = torch.cat([opening, tokens], dim=1)
        decode(embeddings, mask_of(seen).expand(len(clips), -1, -1, -1),
               positions.expand(len(clips), -1))
        return readers.loss(clips, slice(len(before), prefix))

    with readers.listening():
        return run("readers'", [(trained, 1.0), (readers, 1.0), (tower, config.tower_rate)],
                   loss_at, config, device=device, checkpoint=checkpoint, progress=progress)
