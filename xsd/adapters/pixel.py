"""P0: the pixel-level baseline, an MLP from event images to RGB images (docs/adapters.md; 154 556
416 parameters at 224×224×3)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from xsd.adapters.base import alignment_loss
from xsd.core import ParameterError


class PixelAlignment(nn.Module):
    """Linear N→h, LayerNorm, ReLU, dropout, Linear h→h, LayerNorm, ReLU, Linear h→N, + residual; N
    = image_size² · channels."""

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
        """Level and options: what create_adapter needs to build this module again."""
        return {"level": self.level, "options": dict(self.options)}

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] (or [B, N]) → the same shape."""
        flat = images.flatten(1)
        if flat.shape[1] != self.n_pixels:
            raise ParameterError(
                f"P0 was made for {self.n_pixels} values an image and got {flat.shape[1]}; resize "
                f"to {self.options['image_size']} pixels")
        x = self.dropout(F.relu(self.enter_norm(self.enter(flat))))
        return (flat + self.leave(F.relu(self.middle_norm(self.middle(x))))).view_as(images)

    def compute_loss(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """MSE + 0.5 (1 - cos) over whole images: total_loss, mse_loss, cos_loss, cos_sim."""
        return alignment_loss(self(images).flatten(1)[:, None], target.flatten(1)[:, None])
