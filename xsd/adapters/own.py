"""What every adapter can do, around a researcher's plain module (docs/extending.md)."""

import inspect
from typing import Any

from torch import Tensor, nn

from xsd.adapters.base import Adapter
from xsd.core import ParameterError


class OwnAdapter(Adapter):
    """What every adapter can do (shift, steps, unrolling, files), around a researcher's plain
    module.

    The module says ``reads`` and ``shift``, and where they differ from the defaults ``causal``,
    ``pointwise``, ``fuses_tokens`` and ``drafter_lead`` (1 for reads == "both"). Its forward takes
    the states that it reads, and ``mask`` if it wants one.
    """

    def __init__(self, module: nn.Module, hidden_size: int,
                 drafter_size: int | None = None) -> None:
        reads, shift = getattr(module, "reads", None), getattr(module, "shift", None)
        who = type(module).__name__
        if reads not in ("drafter", "verifier", "both"):
            raise ParameterError(f"{who}.reads is {reads!r}; say what forward takes: drafter, "
                                 "verifier, both")
        if shift != (0 if reads == "drafter" else 1):
            raise ParameterError(
                f"{who} reads {reads} with shift {shift!r}: shift is 0 where the drafter's states "
                "alone are read and 1 where the verifier's are, or it would see what it predicts")
        self.reads, self.shift = reads, shift
        super().__init__(hidden_size)
        self.drafter_size = drafter_size or hidden_size
        self.drafter_lead = getattr(module, "drafter_lead", 1 if reads == "both" else 0)
        for name in ("causal", "pointwise", "fuses_tokens"):
            setattr(self, name, getattr(module, name, getattr(self, name)))
        self._takes_mask = "mask" in inspect.signature(module.forward).parameters
        self.module = module

    def forward(self, *inputs: Tensor, mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """What the module says: [B, S, D] (or drafter and verifier) → [B, S, D_v]."""
        if self._takes_mask:
            keywords["mask"] = mask
        return self.module(*inputs, **keywords)
