"""A generated set of states on disk, and the least that could be done with it: read and sum, or a
plain loop over its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xsd.core import StorageError


class StateFile:
    """Aligned and target states, bf16, batch after batch on disk: ``aligned [batch, S, D] | target
    [batch, S, D]`` and so on."""

    def __init__(self, path: Path, shape: tuple[int, int, int], n_samples: int, *,
                 seed: int = 0) -> None:
        """Generate the file. shape: batch, S, D. Raises: StorageError when the disk is full."""
        self.path, self.shape = path, (2, *shape)
        self.n_batches = n_samples // shape[0]
        generator = torch.Generator().manual_seed(seed)
        try:
            with path.open("wb") as file:
                for _ in range(self.n_batches):
                    states = torch.randn(self.shape, generator=generator)
                    states[0].mul_(0.4).add_(states[1])  # cosines around 0.93
                    file.write(states.bfloat16().view(torch.int16).numpy().tobytes())
        except OSError as error:
            raise StorageError(f"the generated set does not fit into {path.parent} "
                               f"({error.strerror}); free space there") from error

    @property
    def n_samples(self) -> int:
        return self.n_batches * self.shape[1]

    @property
    def n_bytes(self) -> int:
        return 2 * self.n_batches * math.prod(self.shape)

    def batches(self, n_batches: int | None = None) -> Iterator[np.ndarray]:
        """int16 [2, batch, S, D], always the same buffer; from the file's start again where
        n_batches asks for more than it holds."""
        buffer = np.empty(self.shape, np.int16)
        with self.path.open("rb", buffering=0) as file:
            for at in range(n_batches or self.n_batches):
                if at % self.n_batches == 0:
                    file.seek(0)
                file.readinto(memoryview(buffer).cast("B"))
                yield buffer


def read_and_sum_words(file: StateFile) -> int:
    """The same bytes read in the same batches and summed as 64-bit integers: no number is looked
    at, memory sets the pace."""
    return sum(int(buffer.view(np.int64).sum()) for buffer in file.batches())


def read_and_sum(file: StateFile) -> float:
    """The bare alternative: the same bytes read in the same batches and summed in float32, in
    pieces that fit a core's cache (a whole tensor's ``sum(dtype=float32)`` takes five times as
    long)."""
    total, width = 0.0, file.shape[-1]
    for buffer in file.batches():
        for rows in torch.from_numpy(buffer).view(torch.bfloat16).view(-1, width).split(64):
            total += float(rows.float().sum())
    return total


def plain_loop(aligned: list[list[float]], target: list[list[float]]) -> list[float]:
    """The definition, number by number: the cosine of every position."""
    out = []
    for a, v in zip(aligned, target, strict=True):
        dot = sum(x * y for x, y in zip(a, v, strict=True))
        out.append(dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in v)))
    return out


def loop_of_tensors(aligned: Tensor, target: Tensor) -> list[float]:
    """One position after the other with tensor operations. aligned, target: bf16 [N, D]."""
    return [
        float(a @ v / (a.norm() * v.norm()))
        for a, v in ((a.float(), v.float()) for a, v in zip(aligned, target, strict=True))
    ]
