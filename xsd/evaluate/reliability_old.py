"""What a cosine says about the token: P(token match | cosine), and how far Accept@τ misstates
acceptance (docs/metrics.md, section 8).

The reference assumed ≈99.9 % above 0.95, ≈98 % in 0.90–0.95, ≈90 % in 0.85–0.90, below 80 % under
that. Here it is counted. One object an adapter level; results of several levels stand side by side
in a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from xsd.core import MetricError
from xsd.evaluate import checks
from xsd.evaluate.hidden import THRESHOLDS
from xsd.evaluate.statistics import Interval, bootstrap_columns, wilson
from xsd.evaluate.tables import row

BANDS = (-1.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Edges of the cosine bands; a band is (low, high], so that "cosine > τ" is a union of bands."""


@dataclass(frozen=True)
class Band:
    """Tokens whose cosine lies in (low, high]. match: clustered by sequence; wilson: as if tokens
    were independent (narrower)."""

    low: float
    high: float
    n: int
    n_match: int
    match: Interval
    wilson: Interval


@dataclass(frozen=True)
class Misstatement:
    """One threshold against the truth. difference: Accept@τ − token acceptance, paired (above zero:
    the cosine overstates).

    match_above, match_below: P(match | cos > τ), P(match | cos ≤ τ); None where no token lies
    there.
    """

    threshold: float
    accepted: Interval
    matched: Interval
    difference: Interval
    match_above: Interval | None
    match_below: Interval | None


@dataclass(frozen=True)
class NeededThreshold:
    """The lowest τ at which at least ``share`` of the tokens above it match. None: no τ achieves
    it. n_above of n tokens would be accepted."""

    share: float
    threshold: float | None
    match_above: float | None
    n_above: int
    n: int


@dataclass(frozen=True)
class ReliabilityResult:
    """correlation: Pearson's, between cosine and match over tokens; None when either never varies.
    positions: for each τ, (position, P(match | cos > τ) there with its interval and n), positions
    without a token above τ left out."""

    n: int
    bands: tuple[Band, ...]
    thresholds: Mapping[float, Misstatement]
    positions: Mapping[float, tuple[tuple[int, Interval], ...]]
    needed: tuple[NeededThreshold, ...]
    correlation: float | None

    def rows(self) -> list[dict[str, Any]]:
        """Long table: metric, threshold, position, value, low, high, n, n_clusters; bands also
        carry band_low, band_high, n_match."""
        out = [{
            **row("match_given_cosine", b.match), "band_low": b.low, "band_high": b.high,
            "n_match": b.n_match
        } for b in self.bands]
        for tau, at in self.thresholds.items():
            out.append(row("overstatement", at.difference, threshold=tau))
            out += [
                row(name, value, threshold=tau) for name, value in (("match_above", at.match_above),
                                                                    ("match_below", at.match_below))
                if value is not None
            ]
            out += [
                row("match_above", share, threshold=tau, position=t)
                for t, share in self.positions[tau]
            ]
        return out


class Reliability:
    """Streaming, mergeable: keeps the cosine and the match of every token (five bytes)."""
    def __init__(
            self, bands: Sequence[float] = BANDS, thresholds: Sequence[float] = THRESHOLDS,
            shares: Sequence[float] = (0.8, 0.9, 0.95, 0.99), max_positions: int = 64,
    ) -> None:
        """bands: ascending edges from -1 to 1. shares: the match shares to find thresholds for.
        Raises: MetricError for edges out of order."""
        if len(bands) < 2 or list(bands) != sorted(set(bands)) or bands[0] != -1 or bands[-1] != 1:
            raise MetricError(f"bands must be ascending edges from -1 to 1 but are {list(bands)}")
        self.bands, self.thresholds, self.shares = tuple(bands), tuple(
            sorted(thresholds)), tuple(shares)
        self.max_positions = max_positions
        self._cosines: list[np.ndarray] = []
        self._matches: list[np.ndarray] = []
        self._clusters: list[str] = []

    def update(self, cosine: Tensor, match: Tensor, mask: Tensor, clusters: Sequence[str]) -> None:
        """Add what HiddenStateMetrics.update and TokenMetrics.update returned for one batch: cosine
        [B, S], match bool [B, S], mask, B names.

        Raises: MetricError for other shapes or a cosine that is NaN or outside [-1, 1] on a real
        position.
        """
        checks.mask_lengths(mask)
        checks.same_shape(cosine, mask, "cosine", "mask")
        checks.same_shape(match, mask, "match", "mask")
        names = checks.cluster_names(clusters, len(mask))
        keep = mask.cpu().numpy()
        values, hits = cosine.float().cpu().numpy(), match.cpu().numpy().astype(bool)
        if not (np.abs(values[keep]) <= 1).all():
            raise MetricError(
                "a cosine on a real position is NaN or outside [-1, 1]; pass the cosines that "
                "HiddenStateMetrics.update returned"
            )
        self._cosines += [line[real] for line, real in zip(values, keep, strict=True)]
        self._matches += [line[real] for line, real in zip(hits, keep, strict=True)]
        self._clusters += names

    def merge(self, other: Reliability) -> Reliability:
        """Add another partial result to this one and return it. Raises: MetricError for other
        settings."""
        if (self.bands, self.thresholds, self.shares) != (other.bands, other.thresholds,
                                                          other.shares):
            raise MetricError(
                "cannot merge reliability counts of other bands, thresholds or shares; measure "
                "both with one setting"
            )
        self._cosines += other._cosines
        self._matches += other._matches
        self._clusters += other._clusters
        return self

    def result(self, *, n_resamples: int = 2000, seed: int = 0) -> ReliabilityResult:
        """Bands without tokens are left out. Raises: MetricError before the first update."""
        if not self._cosines:
            raise MetricError("no token has been counted yet; call update before result")
        lengths = [len(line) for line in self._cosines]
        cosine, match = np.concatenate(self._cosines), np.concatenate(self._matches)
        sample = np.repeat(np.arange(len(lengths)), lengths)
        position = np.concatenate([np.arange(n) for n in lengths])
        ratios: list[tuple[np.ndarray, np.ndarray]] = [
        ]  # (numerator, denominator) over tokens, all drawn together below

        def add(above: np.ndarray, below: np.ndarray) -> int | None:
            if not below.any():
                return None
            ratios.append((above, below))
            return len(ratios) - 1

        edges = np.asarray(self.bands, dtype=np.float32)
        band = np.clip(np.searchsorted(edges, cosine, side="left") - 1, 0, len(edges) - 2)
        of_band = {i: add(match & (band == i), band == i) for i in range(len(edges) - 1)}
        everything, of_threshold = np.ones_like(match), {}
        for tau in self.thresholds:
            above = cosine > np.float32(tau)
            # Both shares have all tokens below the line, so their difference is a ratio too.
            whole = [
                add(above, everything),
                add(match, everything),
                add(above.astype(np.int8) - match, everything)
            ]
            of_threshold[tau] = *whole, add(match & above, above), add(match & ~above, ~above)
        width = min(self.max_positions, max(lengths))
        columns = [
            np.stack(
                [np.bincount(sample, weights=one[i], minlength=len(lengths))
                 for one in ratios], axis=1) for i in (0, 1)
        ]
        drawn = bootstrap_columns(*columns, self._clusters, n_resamples=n_resamples, seed=seed)
        positions = {}
        for tau in self.thresholds:
            above = (cosine > np.float32(tau)) & (position < width)
            right, seen = (np.zeros((len(lengths), width), dtype=bool) for _ in range(2))
            right[sample[above], position[above]], seen[sample[above],
                                                        position[above]] = match[above], True
            places = np.flatnonzero(seen.any(axis=0))
            shares = ()
            if places.size:
                shares = bootstrap_columns(right[:, places], seen[:, places], self._clusters,
                                           n_resamples=min(n_resamples, 1000), seed=seed)
            positions[tau] = tuple(zip(places.tolist(), shares, strict=True))
        bands = []
        for i, at in of_band.items():
            if at is not None:
                n, n_match = int(ratios[at][1].sum()), int(ratios[at][0].sum())
                unclustered = wilson(n_match, n, n_clusters=drawn[at].n_clusters)
                bands.append(
                    Band(self.bands[i], self.bands[i + 1], n, n_match, drawn[at], unclustered))
        varies = match.any() and not match.all() and cosine.min() < cosine.max()
        order = np.lexsort(
            (match, cosine))  # one order of addition, whatever the order of the updates
        return ReliabilityResult(
            n=len(match), bands=tuple(bands), thresholds={
                tau: Misstatement(tau, *(None if i is None else drawn[i] for i in at))
                for tau, at in of_threshold.items()
            }, positions=positions,
            needed=tuple(needed_threshold(cosine, match, share) for share in self.shares),
            correlation=float(np.corrcoef(cosine[order].astype(np.float64), match[order])[0, 1])
            if varies else None,
        )


def needed_threshold(cosine: np.ndarray, match: np.ndarray, share: float) -> NeededThreshold:
    """The lowest τ such that, among tokens with cosine > τ, at least ``share`` match. cosine: float
    [N], match: bool [N]."""
    order = np.argsort(-cosine, kind="stable")
    values, hits = cosine[order], np.cumsum(match[order])
    rates = hits / np.arange(1, len(hits) + 1)
    last_of_value = np.append(values[1:] != values[:-1],
                              True)  # tokens of one cosine are accepted together
    good = np.flatnonzero((rates >= share) & last_of_value)
    if good.size == 0:
        return NeededThreshold(share, None, None, 0, len(values))
    k = int(good[-1])
    below = float(values[k + 1]) if k + 1 < len(values) else -1.0
    return NeededThreshold(share, below, float(rates[k]), k + 1, len(values))
