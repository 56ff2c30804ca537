"""Pretraining of a vision tower on what is in the scene, before any language.

Grounding comes slowly through the language loss alone, so tower and projector first learn two
things at once: what stands in every patch and how it moves (linear classifiers on the tower's
states), and every fact of the clip (a learned query for each, two layers of cross-attention to the
visual tokens, a linear classifier: read as a decoder would read them). Both heads are thrown away
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.embedded_pair.models import Parts
from studies.embedded_pair.stage import StageConfig, run
from studies.embedded_pair.views import Material
from xsd.models.pixels import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class GroundingConfig:
    """epochs over the clips, batch in clips, learning rate at its peak; bf16: autocast (2.5 times
    faster where the CPU has it)."""

    epochs: float = 8.0
    batch_size: int = 32
    learning_rate: float = 8e-4
    weight_decay: float = 0.02
    warmup_steps: int = 100
    patch_weight: float = 0.5
    bf16: bool = True
    seed: int = 0
    save_every: int = 200

    def stage(self, n_clips: int) -> StageConfig:
        """The same as steps over so many clips."""
        steps = max(1, int(n_clips // self.batch_size * self.epochs))
        return StageConfig(steps, self.batch_size, self.learning_rate, self.weight_decay,
                           self.warmup_steps, self.bf16, self.seed, self.save_every)


class PatchReader(nn.Module):
    """Kind, colour and motion of what stands in every patch, read off its state by linear
    classifiers."""
    def __init__(self, width: int, n_kinds: int, n_colours: int, n_motions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kinds = nn.Linear(width, n_kinds)
        self.colours = nn.Linear(width, n_colours)
        self.motions = nn.Linear(width, n_motions)

    def forward(self, states: Tensor, codes: Tensor, colour_known: Tensor) -> Tensor:
        """Summed mean cross-entropies; background weighs a tenth among the kinds, colour and motion
        are asked where there is one.

        states: [B, F, P, C] without CLS. codes: int64 [B, F, P], ``kind << 6 | colour << 3 |
        motion``. colour_known: bool [B].
        """
        x = self.norm(states.float())
        kind, colour, motion = codes >> 6, codes >> 3 & 7, codes & 7
        weight = torch.ones(self.kinds.out_features, device=x.device)
        weight[0] = 0.1
        loss = F.cross_entropy(self.kinds(x).flatten(0, 2).float(), kind.flatten(), weight=weight)
        coloured, moving = (colour > 0) & colour_known[:, None, None], motion > 0
        if coloured.any():
            loss = loss + F.cross_entropy(self.colours(x[coloured]).float(), colour[coloured] - 1)
        if moving.any():
            loss = loss + F.cross_entropy(self.motions(x[moving]).float(), motion[moving] - 1)
        return loss


class GroundingHead(nn.Module):
    """Facts from the visual tokens [B, T, D]; what stands in every patch from the tower's states
    [B, F, P, C] (CLS first)."""
    def __init__(self, width: int, n_tokens: int, classes: Mapping[str, int],
                 patches: PatchReader) -> None:
        super().__init__()
        self.names = list(classes)
        self.queries = nn.Parameter(torch.randn(len(self.names), width) * 0.02)
        self.positions = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        layer = nn.TransformerDecoderLayer(width, 6, 2 * width, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        self.readers = nn.TransformerDecoder(layer, 2)
        self.norm = nn.LayerNorm(width)
        self.classifiers = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})
        self.patches = patches

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens: [B, T, D] → {fact: [B, classes]}."""
        queries = self.queries.expand(tokens.shape[0], -1, -1)
        x = self.norm(self.readers(queries, tokens + self.positions))
        return {name: self.classifiers[name](x[:, i]) for i, name in enumerate(self.names)}


def patch_codes(layout: np.ndarray, grid: int) -> np.ndarray:
    """Cells uint16 [B, F, c, c] → int64 [B, F, grid * grid]: the object in each patch, else the
    scenery that fills half of it, else 0."""
    batch, n_frames, cells, _ = layout.shape
    k = cells // grid
    blocks = layout.reshape(batch, n_frames, grid, k, grid, k).swapaxes(3, 4)
    blocks = blocks.reshape(batch, n_frames, grid * grid, k * k)
    kind = blocks >> 6
    objects = np.sort(np.where((kind >= 1) & (kind <= 7), blocks, 0), axis=-1)
    scenery = np.sort(np.where(kind > 7, blocks, 0), axis=-1)
    n_objects, n_scenery = (objects > 0).sum(-1), (scenery > 0).sum(-1)
    middle = np.clip(k * k - 1 - n_objects // 2, 0, k * k - 1)
    pick = np.take_along_axis(objects, middle[..., None], -1)[..., 0]
    background = np.where(n_scenery * 2 >= k * k, scenery[..., -1], 0)
    return np.where(n_objects >= max(1, k * k // 8), pick, background).astype(np.int64)


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [B, F, s, s, 3] → float32 [B, F, 3, s, s], CLIP-normalised."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 1, 4, 2, 3).float() / 255
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (pixels - mean) / std


def loss_of(logits: Mapping[str, Tensor], labels: Tensor, names: Sequence[str]) -> Tensor:
    """Mean cross-entropy over facts (labels int64 [B, n_facts], -1 ignored)."""
    total = torch.zeros(())
    for i, name in enumerate(names):
        known = labels[:, i] >= 0
        if known.any():
            total = total + F.cross_entropy(logits[name][known].float(), labels[known, i])
    return total / len(names)


def train_tower(parts: Parts, material: Material, head: GroundingHead, config: GroundingConfig, *,
                checkpoint: Path | None = None,
                progress: Callable[[int, int, float], None] | None = None) -> list[float]:
    """Train a model's tower and projector, and the head, on the frames that ``parts`` says; resumes
    from ``checkpoint`` when it is there. progress: called with (step, total, loss).

    Returns: the loss of every step. Raises: TrainingError as stage.run.
    """
    images, frames = material.images, list(parts.grounding_frames)
    trained = nn.ModuleList([parts.tower, parts.projector, head])
    device, truth = head.queries.device, torch.from_numpy(material.labels)
    per_epoch = len(images) // config.batch_size

    def loss_at(step: int) -> Tensor:
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(images))
        rows = np.sort(order[at * config.batch_size:(at + 1) * config.batch_size])
        states = parts.features(normalise(images[rows][:, frames]).to(device))
        logits = head(parts.project(states))
        cells = patch_codes(material.layout[rows][:, frames], int((states.shape[2] - 1)**0.5))
        codes = torch.from_numpy(cells).to(device)
        known = torch.from_numpy(material.colour_known[rows]).to(device)
        loss = loss_of(logits, truth[rows].to(device), head.names)
        return loss + config.patch_weight * head.patches(states[:, :, 1:], codes, known)

    return run("tower's", [(trained, 1.0)], loss_at, config.stage(len(images)),
               device=device.type, checkpoint=checkpoint, progress=progress)
