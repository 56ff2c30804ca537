"""P0, the pixel-level baseline, and its training: event pictures towards the camera's
(docs/adapters.md, section 8).

Seconds at small sizes, so an interrupted training begins again; a finished one is found by
studies.pixels.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from xsd.adapters import tensor_files
from xsd.adapters.base import alignment_loss
from xsd.core import CheckpointError, ParameterError, TrainingError
from xsd.train import source

VALIDATION_SHARE = 0.2


class PixelAlignment(nn.Module):
    """P0, the pixel baseline, event images to RGB images: Linear N→h, LayerNorm, ReLU, dropout,
    Linear h→h, LayerNorm, ReLU, Linear h→N, + residual; N = image_size² · channels."""

    level, reads, shift, causal = "P0", "pixels", 0, True

    def __init__(self, image_size: int = 224, *, channels: int = 3, width: int = 512,
                 dropout: float = 0.1) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"image_size": image_size, "channels": channels,
                                        "width": width, "dropout": dropout}
        self.n_pixels = image_size * image_size * channels
        self.enter = nn.Linear(self.n_pixels, width)
        self.enter_norm = nn.LayerNorm(width)
        self.middle = nn.Linear(width, width)
        self.middle_norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, self.n_pixels)
        self.dropout = nn.Dropout(dropout)

    def config(self) -> dict[str, Any]:
        """Level and options: what :func:`load` needs to build this module again."""
        return {"level": self.level, "options": dict(self.options)}

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] (or [B, N]) → the same shape."""
        flat = images.flatten(1)
        if flat.shape[1] != self.n_pixels:
            raise ParameterError(f"P0 was made for {self.n_pixels} values an image and got "
                                 f"{flat.shape[1]}; resize to {self.options['image_size']} pixels")
        x = self.dropout(F.relu(self.enter_norm(self.enter(flat))))
        return (flat + self.leave(F.relu(self.middle_norm(self.middle(x))))).view_as(images)

    def compute_loss(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """MSE + 0.5 (1 - cos) over whole images: total_loss, mse_loss, cos_loss, cos_sim."""
        return alignment_loss(self(images).flatten(1)[:, None], target.flatten(1)[:, None])


def load(path: Path) -> PixelAlignment:
    """The P0 that registry.save_adapter wrote, in eval mode. Raises: CheckpointError when the file
    is damaged, or does not hold what its configuration says."""
    config, tensors = tensor_files.read(path)
    try:
        with torch.device("meta"):  # the file's tensors take the places; nothing else is allocated
            adapter = PixelAlignment(**config["options"])
        adapter.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no whole P0 ({tensor_files.short(error)}); train it "
                              "again") from error
    return adapter.eval()


@dataclass(frozen=True)
class PixelPairs:
    """events, video: float32 [N, 3, s, s] in 0…1, one scene each. sequence, split: N names.
    duration_ms: of each pair's clip, 0 where unknown."""

    events: Tensor
    video: Tensor
    sequence: Sequence[str]
    split: Sequence[str]
    duration_ms: Sequence[int] = ()

    def subset(self, chosen: Sequence[int]) -> PixelPairs:
        """The pairs at these places."""
        names = ([column[i] for i in chosen] if column else ()
                 for column in (self.sequence, self.split, self.duration_ms))
        return PixelPairs(self.events[chosen], self.video[chosen], *names)


def mean_picture(pairs: PixelPairs, seed: int = 0) -> Tensor:
    """Mean of the camera pictures that :func:`fit` trains on with this seed, [3, s, s]: what a
    model that sees nothing would answer."""
    return pairs.video[source.split_by_sequence(pairs.sequence, VALIDATION_SHARE, seed)[0]].mean(0)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of whole pictures: [N, 3, s, s] (or one [3, s, s] against all) → [N]."""
    return F.cosine_similarity(a.expand_as(b).flatten(1), b.flatten(1), dim=1)


def fit(pairs: PixelPairs, *, width: int, epochs: int, batch_size: int, learning_rate: float,
        seed: int = 0, progress: Callable[[dict[str, Any]], None] | None = None
        ) -> tuple[PixelAlignment, list[dict[str, Any]], int]:
    """Train P0 on MSE + 0.5 (1 - cos), AdamW, cosine schedule; the epoch with the least loss on
    whole held-back train sequences is kept.

    width: of the middle layers (512 in the reference). Returns: the adapter in eval mode, a row per
    epoch, the kept epoch (from 1). Raises: TrainingError for a test split, a single sequence, or
    NaN; ParameterError for pictures that are no square pairs.
    """
    source.refuse_test_split(pairs.split)
    shape = pairs.events.shape
    if shape != pairs.video.shape or len(shape) != 4 or shape[-1] != shape[-2]:
        raise ParameterError(f"P0 needs square pictures in pairs, not {list(shape)} and "
                             f"{list(pairs.video.shape)}")
    train, held = source.split_by_sequence(pairs.sequence, VALIDATION_SHARE, seed)
    history: list[dict[str, Any]] = []
    best, best_epoch, kept = math.inf, 0, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = PixelAlignment(shape[-1], channels=shape[1], width=width)
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs, 1e-6)
        for epoch in range(1, epochs + 1):
            total = _pass(adapter, optimiser, pairs, train, batch_size)
            if not math.isfinite(total):
                raise TrainingError(
                    f"training P0 stopped in epoch {epoch}: the loss is not a number; lower "
                    f"learning_rate (now {learning_rate:g})")
            schedule.step()
            adapter.eval()
            with torch.no_grad():
                judged = adapter.compute_loss(pairs.events[held], pairs.video[held])
            loss = float(judged["total_loss"])
            history.append({"epoch": epoch, "train_total": total, "validation_total": loss,
                            "cosine_similarity": float(judged["cos_sim"])})
            if loss < best:
                best, best_epoch, kept = loss, epoch, copy.deepcopy(adapter.state_dict())
            if progress is not None:
                progress(history[-1])
    adapter.load_state_dict(kept)
    return adapter.eval(), history, best_epoch


def _pass(adapter: PixelAlignment, optimiser: torch.optim.Optimizer, pairs: PixelPairs,
          train: Tensor, batch_size: int) -> float:
    """One epoch; the mean loss, not finite as soon as a loss or a gradient is not."""
    adapter.train()
    total = 0.0
    for chosen in train[torch.randperm(len(train))].split(batch_size):
        loss = adapter.compute_loss(pairs.events[chosen], pairs.video[chosen])["total_loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        if not torch.isfinite(loss.detach() + norm):
            return math.nan
        optimiser.step()
        total += float(loss.detach()) * len(chosen)
    return total / len(train)


@torch.no_grad()
def align(adapter: PixelAlignment, events: Tensor, batch_size: int = 256) -> Tensor:
    """The adapter's pictures as they come, also below 0 and above 1: [N, 3, s, s] → the same."""
    adapter.eval()
    return torch.cat([adapter(part) for part in events.split(batch_size)])


def speed(adapter: PixelAlignment, events: Tensor, *, batch_size: int = 64,
          repeats: int = 5) -> dict[str, Any]:
    """What P0 costs here: pairs_per_s and ms_per_batch (median of ``repeats``); weight_bytes, and
    peak_bytes that a batch takes besides: its pictures, and input and output of the widest
    layer."""
    batch, widest = events[:batch_size], [0]

    def note(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        widest.append(given[0].nbytes + made.nbytes)

    with contextlib.ExitStack() as hooks:
        for layer in adapter.modules():
            if not list(layer.children()):
                hooks.callback(layer.register_forward_hook(note).remove)
        align(adapter, batch)
    timed = Timer("align(adapter, batch)", num_threads=torch.get_num_threads(),
                  globals={"align": align, "adapter": adapter, "batch": batch})
    seconds = sorted(timed.timeit(1).median for _ in range(repeats))[repeats // 2]
    return {"pairs_per_s": len(batch) / seconds, "ms_per_batch": 1e3 * seconds,
            "batch_size": len(batch), "threads": torch.get_num_threads(),
            "weight_bytes": sum(one.nbytes for one in adapter.parameters()),
            "peak_bytes": batch.nbytes + max(widest)}
