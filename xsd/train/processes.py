"""Several processes, one training: what ``accelerate launch`` or ``torchrun`` started
(docs/adapters.md, section 5).

Every process holds the whole adapter, takes every n-th answer of each batch and adds its gradients
to the others'. Process 0 writes. The group itself is accelerate's (gloo on CPU, NCCL on GPUs);
alone, nothing is started and nothing is sent.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xsd.core import Batch


class Processes:
    """rank: this process, from 0. size: how many there are."""
    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self._state = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # only here: a second to import

            self._state = PartialState(cpu=device.type == "cpu")
            self.rank, self.size = self._state.process_index, self._state.num_processes
        self._where = self.device(device)

    @property
    def writes(self) -> bool:
        """Whether this process keeps the run folder."""
        return self.rank == 0

    def device(self, asked: torch.device) -> torch.device:
        """This process's own device: the n-th GPU under several processes."""
        return asked if self._state is None or asked.type == "cpu" else self._state.device

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, on all of them."""
        if self._state is None:
            return values
        from accelerate.utils import reduce

        return reduce(values, "sum")

    def sums(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Sums of this process → sums over all, as plain numbers; every process holds the same
        names."""
        together = self.sum(
            torch.stack([
                torch.as_tensor(value, dtype=torch.float64).cpu() for value in values.values()
            ]).to(self._where))
        return dict(zip(values, together.tolist(), strict=True))

    def rows(self, batch: Batch) -> Batch:
        """This process's answers of a batch: every ``size``-th from ``rank`` on, possibly none."""
        if self.size == 1:
            return batch
        names = ("drafter", "verifier", "ids_by_drafter", "ids_by_verifier", "mask", "sequence",
                 "index")
        return dataclasses.replace(
            batch, **{name: getattr(batch, name)[self.rank::self.size] for name in names})

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum over all processes, in one message."""
        if self._state is None:
            return
        flat = self.sum(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                       for p in parameters]))
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]),
                                    strict=True):
            parameter.grad = piece.view_as(parameter)
