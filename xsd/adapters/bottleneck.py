"""Adapters without a view of other positions: L1, L2, L3 (docs/adapters.md; 2 113 537, 6 324 227
and 16 797 698 parameters at 4096)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsd.adapters.base import Adapter, default_sizes


class BottleneckBlock(nn.Module):
    """x + α · up(dropout(GELU(down(LayerNorm(x))))), [..., D] → [..., D]; ``up`` starts at zero."""

    def __init__(self, hidden_size: int, bottleneck: int, *, dropout: float, alpha: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        nn.init.kaiming_normal_(self.down.weight, mode="fan_in", nonlinearity="linear")
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.up(self.dropout(F.gelu(self.down(self.norm(x)))))


class BottleneckAdapter(Adapter):
    """L1 (one block) and L2 (three): blocks, then a LayerNorm. At initialisation the output is
    LayerNorm(x)."""

    pointwise = True

    def __init__(self, hidden_size: int = 4096, *, level: str = "L1",
                 drafter_size: int | None = None, input_map: bool = False,
                 bottleneck: int | None = None, n_blocks: int | None = None, dropout: float = 0.1,
                 alpha: float = 0.1) -> None:
        super().__init__(hidden_size, drafter_size=drafter_size, input_map=input_map)
        self.level = level
        bottleneck = bottleneck or default_sizes(hidden_size)["bottleneck"]
        n_blocks = n_blocks or (3 if level == "L2" else 1)
        self.options |= {"bottleneck": bottleneck, "n_blocks": n_blocks, "dropout": dropout,
                         "alpha": alpha}
        self.blocks = nn.ModuleList(
            BottleneckBlock(hidden_size, bottleneck, dropout=dropout, alpha=alpha)
            for _ in range(n_blocks))
        self.final_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, D_d] → [B, S, D_v]; the mask is not needed, positions do not meet."""
        x = self.input_map(x)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)


class WideBottleneckAdapter(Adapter):
    """L3: LayerNorm, then blocks x + α · dropout(up(dropout(GELU(LayerNorm(down(x)))))) of a wide
    middle, then a LayerNorm."""

    pointwise = True

    def __init__(self, hidden_size: int = 4096, *, level: str = "L3",
                 drafter_size: int | None = None, input_map: bool = False, wide: int | None = None,
                 n_blocks: int = 2, dropout: float = 0.1, alpha: float = 0.1) -> None:
        super().__init__(hidden_size, drafter_size=drafter_size, input_map=input_map)
        self.level = level
        wide = wide or default_sizes(hidden_size)["wide"]
        self.options |= {"wide": wide, "n_blocks": n_blocks, "dropout": dropout, "alpha": alpha}
        self.input_norm = nn.LayerNorm(hidden_size)
        blocks = range(n_blocks)
        self.down = nn.ModuleList(nn.Linear(hidden_size, wide, bias=False) for _ in blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(wide) for _ in blocks)
        self.up = nn.ModuleList(nn.Linear(wide, hidden_size, bias=False) for _ in blocks)
        self.alphas = nn.ParameterList(torch.tensor(float(alpha)) for _ in blocks)
        self.dropout = nn.Dropout(dropout)
        self.final_norm = nn.LayerNorm(hidden_size)
        for down, up in zip(self.down, self.up, strict=True):
            nn.init.kaiming_normal_(down.weight, mode="fan_in")
            nn.init.zeros_(up.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, D_d] → [B, S, D_v]; the mask is not needed, positions do not meet."""
        x = self.input_norm(self.input_map(x))
        for down, norm, up, alpha in zip(self.down, self.norms, self.up, self.alphas, strict=True):
            x = x + alpha * self.dropout(up(self.dropout(F.gelu(norm(down(x))))))
        return self.final_norm(x)
