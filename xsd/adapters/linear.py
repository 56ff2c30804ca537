"""Closed-form adapters, the cheap floors under every trained one: identity, ridge regression
(Hoerl and Kennard 1970) and orthogonal Procrustes (Schönemann 1966: R = U Vᵀ of the centred
cross-covariance), fitted from streamed batches: only sums are kept, in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from xsd.adapters.base import Adapter, Reads, eye_linear
from xsd.core import Batch, ParameterError, TrainingError

KINDS = ("identity", "ridge", "procrustes")


class LinearAdapter(Adapter):
    """x W + b with frozen weights. reads "verifier" (next state from this one) and "both"
    (drafter[t+1], verifier[t]) have shift 1, as B1 and L5F."""

    pointwise = True

    def __init__(self, hidden_size: int = 4096, *, level: str = "ridge",
                 drafter_size: int | None = None, reads: Reads = "drafter") -> None:
        self.reads = reads
        self.shift = 0 if reads == "drafter" else 1
        self.drafter_lead = 1 if reads == "both" else 0
        if level == "identity" and drafter_size not in (None, hidden_size):
            raise ParameterError(f"the identity needs one width, not drafter {drafter_size} and "
                                 f"verifier {hidden_size}; use ridge or procrustes")
        super().__init__(hidden_size, drafter_size=drafter_size)
        self.level, self.options = level, {"reads": reads}
        self.input_map = nn.Identity()
        width = {"drafter": self.drafter_size, "verifier": hidden_size,
                 "both": self.drafter_size + hidden_size}[reads]
        self.map = eye_linear(width, hidden_size)
        self.requires_grad_(False)

    def forward(self, *states: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, D] (or drafter and verifier) → [B, S, D_v]."""
        return self.map(torch.cat(states[:2 if self.reads == "both" else 1], dim=-1))


def fit_linear(kind: str, batches: Iterable[Batch], *, reads: Reads = "drafter",
               ridge: float = 1e-3, scale: bool = True) -> LinearAdapter:
    """Fit one of KINDS in one pass over batches. ridge: penalty as a share of the inputs' mean
    variance. scale: let Procrustes also scale. Raises: ParameterError for an unknown kind;
    TrainingError when the stream holds no real position."""
    if kind not in KINDS:
        raise ParameterError(f"unknown closed form {kind!r}; choose one of {', '.join(KINDS)}")
    count, adapter, sums = 0, None, {}
    for batch in batches:
        if adapter is None:
            adapter = LinearAdapter(batch.verifier.shape[-1], level=kind,
                                    drafter_size=batch.drafter.shape[-1], reads=reads)
        inputs, _, target, _, mask = adapter.inputs_of(batch)
        x, y = torch.cat(inputs, dim=-1)[mask].double(), target[mask].double()
        count += len(x)
        for name, term in {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y}.items():
            sums[name] = sums[name] + term if name in sums else term
    if adapter is None or count == 0:
        raise TrainingError(f"no position to fit {kind!r} on: the stream of batches is empty; "
                            "check the dataset and its split")
    if kind == "identity":
        return adapter.eval()
    mean_x, mean_y = sums["x"] / count, sums["y"] / count
    covariance = sums["xx"] / count - torch.outer(mean_x, mean_x)
    cross = sums["xy"] / count - torch.outer(mean_x, mean_y)
    if kind == "ridge":
        penalty = max(ridge * covariance.diagonal().mean().item(), 1e-12)
        eye = torch.eye(len(covariance), dtype=torch.float64)
        weight = torch.linalg.solve(covariance + penalty * eye, cross)
    else:
        left, singular, right = torch.linalg.svd(cross, full_matrices=False)
        weight = left @ right
        if scale:
            weight = weight * (singular.sum() / covariance.diagonal().sum().clamp_min(1e-12))
    adapter.map.weight.copy_(weight.T)
    adapter.map.bias.copy_(mean_y - mean_x @ weight)
    return adapter.eval()
