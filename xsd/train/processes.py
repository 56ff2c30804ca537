"""Several processes, one training: what ``accelerate launch`` or ``torchrun`` started
(docs/adapters.md, section 5). The group is accelerate's; alone, nothing is started or sent."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xsd.core import Batch


class Processes:
    """rank: this process, from 0. size: how many there are. writes: whether this one keeps the run
    folder. device: its own, the n-th GPU under several processes."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device, self._state = 0, 1, device, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # only here: a second to import

            self._state = PartialState(cpu=device.type == "cpu")
            self.rank, self.size = self._state.process_index, self._state.num_processes
            self.device = device if device.type == "cpu" else self._state.device
        self.writes = self.rank == 0

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
        """Sums of this process → sums over all, as plain numbers; of the same names in each."""
        own = [torch.as_tensor(value, dtype=torch.float64).cpu() for value in values.values()]
        together = self.sum(torch.stack(own).to(self.device))
        return dict(zip(values, together.tolist(), strict=True))

    def rows(self, batch: Batch) -> Batch:
        """This process's answers of a batch: every ``size``-th from ``rank`` on, possibly none."""
        if self.size == 1:
            return batch
        own = {name: value[self.rank::self.size] for name, value in vars(batch).items()
               if name not in ("mode", "context")}
        return dataclasses.replace(batch, **own)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum over all processes, in one message."""
        if self._state is None:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in own]))
        pieces = flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
