"""Hidden-state metrics: how close the aligned states come to the verifier's, and what a cosine
threshold would accept (docs/metrics.md, section 2).

The seven groups of the reference's evaluation, with intervals. What is kept of each position is its
cosine, four bytes against the thousands that the state had (11 000 answers of 50 positions: 2.2
MB), so median and percentiles are exact, any threshold set can be asked afterwards, and partial
results merge in any order and any split into the same answer to the last bit:
:meth:`HiddenStateMetrics.result` sorts the samples first.

A cosine threshold is *not* acceptance: the LM head decides (see tokens.py and reliability.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xsd.core import MetricError
from xsd.evaluate import checks
from xsd.evaluate.statistics import Interval, bootstrap_columns
from xsd.evaluate.tables import row

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
_ROWS_PER_STEP = 64
"""Rows converted to float32 at a time: two buffers of 64 × 4096 stay in a core's cache (measured
fastest of 4 … 128)."""


@dataclass(frozen=True)
class Summary:
    """Population figures (std divides by n) of n values; percentiles: {10: …, 25: …, …} by linear
    interpolation."""

    mean: float
    std: float
    min: float
    max: float
    median: float
    n: int
    percentiles: Mapping[int, float]


@dataclass(frozen=True)
class DraftAcceptance:
    """Group 5 at one threshold. prefill: mean of consecutive / length. decode: mean of (consecutive
    within the first gamma) / gamma."""

    prefill: Interval
    decode: Interval
    gamma: int


@dataclass(frozen=True)
class PositionRow:
    """Group 7 at one position: cosine mean and std, per threshold the share accepted (marginal) and
    the share accepted up to here (survival)."""

    position: int
    n: int
    mean: float
    std: float
    acceptance: Mapping[float, Interval]
    survival: Mapping[float, Interval]


@dataclass(frozen=True)
class HiddenStateResult:
    """All groups but the speed-up (group 6 needs times: speedup.reference_estimates). n: tokens;
    lengths and consecutive count samples."""

    thresholds: tuple[float, ...]
    gamma: int
    n_samples: int
    n_clusters: int
    cosine: Summary
    cosine_mean: Interval
    acceptance: Mapping[float, Interval]
    unbroken_prefix: Mapping[float, Summary]
    unbroken_prefix_mean: Mapping[float, Interval]
    lengths: Summary
    draft_acceptance: Mapping[float, DraftAcceptance]
    positions: tuple[PositionRow, ...]
    weighted: float
    """Mean of Σ cos a sample (the reference's weighted acceptance, in tokens); relaxed acceptance
    is ``acceptance · lengths.mean``."""
    def rows(self) -> list[dict[str, Any]]:
        """Long table: metric, threshold, position, value, low, high, n, n_clusters."""
        out = [row("cosine_mean", self.cosine_mean)]
        out += [
            row(f"cosine_{name}", getattr(self.cosine, name), n=self.cosine.n)
            for name in ("std", "min", "max", "median")
        ]
        out += [
            row(f"cosine_p{key}", value, n=self.cosine.n)
            for key, value in self.cosine.percentiles.items()
        ]
        for tau in self.thresholds:
            out.append(row("accept_at", self.acceptance[tau], threshold=tau))
            out.append(row("unbroken_prefix_mean", self.unbroken_prefix_mean[tau], threshold=tau))
            out += [
                row(f"unbroken_prefix_{name}", getattr(self.unbroken_prefix[tau], name), threshold=tau,
                    n=self.n_samples) for name in ("std", "min", "max", "median")
            ]
            out.append(
                row("draft_acceptance_prefill", self.draft_acceptance[tau].prefill, threshold=tau))
            out.append(
                row("draft_acceptance_decode", self.draft_acceptance[tau].decode, threshold=tau))
        out += [
            row(f"length_{name}", getattr(self.lengths, name), n=self.n_samples)
            for name in ("mean", "std", "min", "max")
        ]
        for at in self.positions:
            out.append(row("cosine_mean", at.mean, position=at.position, n=at.n))
            out.append(row("cosine_std", at.std, position=at.position, n=at.n))
            for tau in self.thresholds:
                out.append(row("accept_at", at.acceptance[tau], threshold=tau,
                               position=at.position))
                out.append(row("survival_at", at.survival[tau], threshold=tau,
                               position=at.position))
        return out


def cosines(aligned: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Cosine of each position's two states, accumulated in float32: [B, S, D] × 2 → float32 [B, S]
    on the states' device, NaN where masked.

    One pass: rows are converted a few at a time, so bf16 states never exist twice. Each row is
    reduced by itself: how a set is cut into
    batches does not change a bit.

    Raises: MetricError for other shapes, a row without real positions, a NaN or infinite state, a
    zero vector.
    """
    if aligned.dim() != 3:
        raise MetricError(
            f"aligned states must be [B, S, D] but are {list(aligned.shape)}; add the batch "
            "dimension"
        )
    checks.same_shape(aligned, target, "the aligned states", "the target states")
    if mask.shape != aligned.shape[:2]:
        raise MetricError(
            f"the mask has shape {list(mask.shape)} but the states need {list(aligned.shape[:2])} "
            "(samples × positions)"
        )
    checks.mask_lengths(mask)
    width = aligned.shape[-1]
    flat_aligned, flat_target = aligned.detach().reshape(-1,
                                                         width), target.detach().reshape(-1, width)
    real = mask.reshape(-1).to(aligned.device).nonzero().flatten()
    dense = len(real) == len(flat_aligned)
    step = min(
        len(real),
        _ROWS_PER_STEP if aligned.device.type == "cpu" else max(_ROWS_PER_STEP, 2**26 // width))
    left, right = (torch.empty(step, width, device=aligned.device) for _ in range(2))
    dots, squares, squares_of_target = (torch.empty(len(real), device=aligned.device)
                                        for _ in range(3))
    for start in range(0, len(real), step):
        stop = min(start + step, len(real))
        rows = slice(start, stop) if dense else real[start:stop]
        x, y = left[:stop - start], right[:stop - start]
        x.copy_(flat_aligned[rows])
        y.copy_(flat_target[rows])
        _dot(x, y, dots[start:stop])
        _dot(x, x, squares[start:stop])
        _dot(y, y, squares_of_target[start:stop])
    norms = squares.sqrt_().mul_(squares_of_target.sqrt_())
    _refuse_bad_states(dots, norms, real, mask.shape[1], flat_aligned, flat_target)
    out = torch.full((mask.numel(),), math.nan, device=aligned.device)
    out[real] = (dots / norms).clamp(-1.0, 1.0)
    return out.reshape(mask.shape)


def _dot(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Row by row: float32 [N, D] × 2 → [N]. On the CPU numpy's, which hands each row to BLAS
    without a temporary."""
    if x.device.type == "cpu":
        np.vecdot(x.numpy(), y.numpy(), out=out.numpy())
    else:
        torch.linalg.vecdot(x, y, out=out)


def _refuse_bad_states(dots: Tensor, norms: Tensor, real: Tensor, n_positions: int, aligned: Tensor,
                       target: Tensor) -> None:
    bad = ~(torch.isfinite(dots) & torch.isfinite(norms) & (norms > 0))
    if not bool(bad.any()):
        return
    flat = int(real[int(bad.nonzero()[0])])
    place = f"sample {flat // n_positions}, position {flat % n_positions} of the batch"
    for name, states in (("aligned", aligned), ("target", target)):
        if not bool(torch.isfinite(states[flat]).all()):
            raise MetricError(
                f"the {name} state at {place} is NaN or infinite; the adapter or the extraction "
                "produced it, so mend that first"
            )
        if not bool(states[flat].any()):
            raise MetricError(
                f"the {name} state at {place} is a zero vector, whose cosine has no meaning; it "
                "looks like padding under a True of the mask"
            )
    raise MetricError(
        f"the states at {place} are too large or too small for a float32 cosine; scale them or "
        "store them in float32"
    )


def unbroken_prefix(accepted: Tensor, mask: Tensor) -> Tensor:
    """Tokens accepted before the first rejection: Σ_t Π_{i≤t} accepted[i]·mask[i]; 0 when the first
    token is rejected.

    Args: accepted: bool [B, S]. mask: bool [B, S]. Returns: int64 [B]. Raises: MetricError if the
    shapes differ.
    >>> unbroken_prefix(torch.tensor([[True, True, False, True]]), torch.ones(1, 4,
    dtype=torch.bool)).tolist() [2]
    """
    checks.same_shape(accepted, mask, "accepted", "mask")
    return (accepted & mask).long().cumprod(dim=1).sum(dim=1)


class HiddenStateMetrics:
    """Streaming, mergeable. thresholds: cosines in ascending order. gamma: draft tokens a round.
    max_positions: rows of the per-position group."""
    def __init__(self, thresholds: Sequence[float] = THRESHOLDS, gamma: int = 5,
                 max_positions: int = 64) -> None:
        """Raises: MetricError for an empty threshold set, one outside (-1, 1), or gamma or
        max_positions below 1."""
        if not thresholds or not all(-1 < tau < 1 for tau in thresholds):
            raise MetricError(
                f"thresholds must be cosines between -1 and 1 but are {list(thresholds)}; the "
                f"reference's are {list(THRESHOLDS)}"
            )
        if gamma < 1 or max_positions < 1:
            raise MetricError(
                f"gamma and max_positions must be at least 1 but are {gamma} and {max_positions}")
        self.thresholds = tuple(sorted(float(tau) for tau in set(thresholds)))
        self.gamma = gamma
        self.max_positions = max_positions
        self._cosines: list[np.ndarray] = []
        self._clusters: list[str] = []

    def update(self, aligned: Tensor, target: Tensor, mask: Tensor,
               clusters: Sequence[str]) -> Tensor:
        """Add a batch: aligned and target [B, S, D], mask bool [B, S], clusters B sequence names.
        Returns the cosines float32 [B, S].

        Raises: MetricError (see cosines), and then nothing of the batch is kept.
        """
        names = checks.cluster_names(clusters, len(mask))
        cosine = cosines(aligned, target, mask)
        self._cosines += [
            line[keep] for line, keep in zip(cosine.cpu().numpy(),
                                             mask.cpu().numpy(), strict=True)
        ]
        self._clusters += names
        return cosine

    def merge(self, other: HiddenStateMetrics) -> HiddenStateMetrics:
        """Add another partial result (another worker's, another shard's) to this one and return it.
        Raises: MetricError for other settings."""
        mine, its = (self.thresholds, self.gamma,
                     self.max_positions), (other.thresholds, other.gamma, other.max_positions)
        if mine != its:
            raise MetricError(
                f"cannot merge metrics of thresholds, gamma, max_positions {mine} with {its}; "
                "measure both with one setting"
            )
        self._cosines += other._cosines
        self._clusters += other._clusters
        return self

    def values(self) -> np.ndarray:
        """Every cosine, float32 [tokens], in the order of the updates."""
        return np.concatenate([np.empty(0, np.float32), *self._cosines])

    def table(self) -> pd.DataFrame:
        """One row a sample in the order of the updates: cluster, length, cos_sum, accepted@τ,
        unbroken_prefix@τ (pairs arms sample by sample)."""
        cosine, mask = self._padded(range(len(self._cosines)))
        return pd.DataFrame({"cluster": self._clusters, **self._per_sample(cosine, mask)})

    def result(self, *, n_resamples: int = 2000, seed: int = 0) -> HiddenStateResult:
        """Every group with intervals clustered by sequence. Raises: MetricError before the first
        update."""
        if not self._cosines:
            raise MetricError("no sample has been measured yet; call update before result")
        order = sorted(range(len(self._cosines)), key=lambda i:
                       (self._clusters[i], self._cosines[i].tobytes()))
        clusters = [self._clusters[i] for i in order]
        cosine, mask = self._padded(order)
        sample = self._per_sample(cosine, mask)
        length, flat = sample["length"], np.sort(cosine[mask]).astype(np.float64)
        taken = {tau: sample[f"unbroken_prefix@{tau:g}"] for tau in self.thresholds}
        above, below = [sample["cos_sum"]], [length]
        for tau, run in taken.items():
            above += [
                sample[f"accepted@{tau:g}"], run, run / length,
                np.minimum(run, self.gamma) / self.gamma
            ]
            below += [length, *3 * [np.ones(len(length))]]
        drawn = bootstrap_columns(np.stack(above, axis=1), np.stack(below, axis=1), clusters,
                                  n_resamples=n_resamples, seed=seed)
        of = {tau: drawn[4 * i + 1:4 * i + 5] for i, tau in enumerate(self.thresholds)}
        return HiddenStateResult(
            thresholds=self.thresholds, gamma=self.gamma, n_samples=len(order),
            n_clusters=len(set(clusters)), cosine=summary(flat), cosine_mean=drawn[0],
            acceptance={tau: one[0] for tau, one in of.items()
                        }, unbroken_prefix={tau: summary(run) for tau, run in taken.items()},
            unbroken_prefix_mean={tau: one[1] for tau, one in of.items()}, lengths=summary(length),
            draft_acceptance={
                tau: DraftAcceptance(one[2], one[3], self.gamma) for tau, one in of.items()
            }, positions=self._positions(cosine, mask, clusters,
                                         seed), weighted=float(sample["cos_sum"].mean()),
        )

    def _padded(self, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 [N, S_max] (padding -2, below every threshold) and mask bool [N,
        S_max]."""
        lines = [self._cosines[i] for i in order]
        cosine = np.full((len(lines), max((len(line) for line in lines), default=0)), -2.0,
                         dtype=np.float32)
        for target, line in zip(cosine, lines, strict=True):
            target[:len(line)] = line
        return cosine, cosine > -1.5

    def _per_sample(self, cosine: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {
            "length": mask.sum(axis=1), "cos_sum": np.where(mask, cosine,
                                                            0).sum(axis=1, dtype=np.float64)
        }
        for tau in self.thresholds:
            accepted = cosine > np.float32(tau)
            out[f"accepted@{tau:g}"] = accepted.sum(axis=1)
            out[f"unbroken_prefix@{tau:g}"] = np.cumprod(accepted, axis=1, dtype=np.int64).sum(axis=1)
        return out

    def _positions(self, cosine: np.ndarray, mask: np.ndarray, clusters: list[str],
                   seed: int) -> tuple[PositionRow, ...]:
        width = min(self.max_positions, mask.shape[1])
        cosine, mask = cosine[:, :width], mask[:, :width]
        accepted = [cosine > np.float32(tau) for tau in self.thresholds]
        survived = [np.cumprod(line, axis=1, dtype=np.int64) for line in accepted]
        bands = bootstrap_columns(np.concatenate([*accepted, *survived], axis=1), mask, clusters,
                                  n_resamples=1000, seed=seed)
        rows = []
        for t in range(width):
            values = np.sort(cosine[mask[:, t], t]).astype(np.float64)
            at = {tau: bands[i * width + t] for i, tau in enumerate(self.thresholds)}
            up_to = {
                tau: bands[(i + len(accepted)) * width + t] for i, tau in enumerate(self.thresholds)
            }
            rows.append(
                PositionRow(t, len(values), float(values.mean()), float(values.std()), at, up_to))
        return tuple(rows)


def summary(values: Any) -> Summary:
    """Summary of a one-dimensional set of numbers, whatever their order. Raises: MetricError when
    empty."""
    values = np.sort(np.asarray(values, dtype=np.float64).reshape(-1))
    if len(values) == 0:
        raise MetricError(
            "there is nothing to summarise; check that the evaluation set is not empty")
    at = np.percentile(values, PERCENTILES)
    return Summary(float(values.mean()), float(values.std()), float(values[0]), float(values[-1]),
                   float(np.median(values)), len(values),
                   dict(zip(PERCENTILES, map(float, at), strict=True)),
                   )
