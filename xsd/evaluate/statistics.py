"""Intervals for what was measured on sequences of overlapping clips (docs/metrics.md, section 6).

Neighbouring clips overlap by half and one clip is asked ten questions, so samples are not
independent: whole *sequences* are drawn with replacement (the cluster bootstrap, Davison & Hinkley
1997, section 3.8) and a figure without its clusters is refused. Percentile intervals.
The same values in another order give the same interval to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError

N_RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its interval. n: what was counted (tokens, samples, rounds). With fewer than
    two clusters low and high are NaN: unknown."""

    value: float
    low: float
    high: float
    n: int
    n_clusters: int

    def excludes(self, value: float) -> bool:
        """True when ``value`` lies outside the interval (False when the interval is unknown)."""
        return self.low > value or self.high < value

    def text(self, percent: bool = True, digits: int | None = None) -> str:
        """``61.2 % [58.0, 64.1]``, or ``0.61 [0.58, 0.64]``; a dash for what is not known."""
        scale, usual, unit = (100, 1, " %") if percent else (1, 2, "")
        form = f".{usual if digits is None else digits}f"
        value, low, high = (
            "–" if math.isnan(number) else f"{scale * number:{form}}"
            for number in (self.value, self.low, self.high))
        bounds = "[–]" if low == "–" else f"[{low}, {high}]"
        return "–" if value == "–" else f"{value}{unit} {bounds}"


def cluster_sums(columns: Any, clusters: Sequence[Any]) -> np.ndarray:
    """Sum the columns [n, C] within each cluster → float64 [K, C], clusters in sorted order.

    Raises: MetricError on no samples, other lengths, or a value that is not finite.
    """
    columns = np.asarray(columns, dtype=np.float64)
    names = np.asarray([str(name) for name in clusters])
    if len(columns) == 0:
        raise MetricError(
            "there is no sample to resample; check that the evaluation set is not empty")
    columns = columns.reshape(len(columns), -1)
    if len(columns) != len(names):
        raise MetricError(f"{len(columns)} values but {len(names)} clusters; each value needs the "
                          "name of the sequence it comes from")
    if not np.isfinite(columns).all():
        row = int(np.argmin(np.isfinite(columns).all(axis=1)))
        raise MetricError(f"value {row} to resample is not finite; a NaN in one sample would "
                          "silently become the figure, so mend or drop that sample")
    order = np.argsort(names, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], names[order][1:] != names[order][:-1]]))
    if len(starts) == len(names):
        return columns[order]
    # Counts add up exactly in any order; fractions do not, so within a cluster these are added in
    # the order of their values.
    fractions = columns[:, (columns != np.floor(columns)).any(axis=0)]
    if fractions.shape[1]:
        order = np.lexsort((*fractions.T[::-1], names))
    return np.add.reduceat(columns[order], starts, axis=0)


def resampled_sums(sums: np.ndarray, *, n_resamples: int = N_RESAMPLES,
                   seed: int = 0) -> np.ndarray:
    """Draw K of the K cluster rows with replacement, n_resamples times, and add them up: [K, C] →
    float64 [R, C]."""
    n_clusters, n_columns = sums.shape
    rng = np.random.default_rng(seed)
    out = np.empty((n_resamples, n_columns))
    index_type = np.uint16 if n_clusters <= 2**16 else np.uint32
    if n_clusters <= 256:  # how often each cluster was drawn, times its sums: a matrix product
        step = 4_000_000 // n_clusters
        for start in range(0, n_resamples, step):
            counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters),
                                     size=min(step, n_resamples - start))
            out[start:start + len(counts)] = counts.astype(np.float64) @ sums
        return out
    # the same, the draws counted: a multinomial costs one binomial draw a cluster
    if n_columns > 8:
        step = max(1, 1_000_000 // n_clusters)
        for start in range(0, n_resamples, step):
            rows = min(step, n_resamples - start)
            drawn = rng.integers(0, n_clusters, size=(rows, n_clusters), dtype=index_type)
            counts = np.bincount((drawn + n_clusters * np.arange(rows)[:, None]).reshape(-1),
                                 minlength=rows * n_clusters)
            out[start:start + rows] = counts.reshape(rows, n_clusters).astype(np.float64) @ sums
        return out
    # Many clusters, few columns: gather. Two float columns travel as one complex number, which
    # halves the random reads.
    pairs = [
        sums[:, i] + 1j * sums[:, i + 1] if i + 1 < n_columns else sums[:, i]
        for i in range(0, n_columns, 2)
    ]
    step = max(1, 500_000 // n_clusters)
    for start in range(0, n_resamples, step):
        drawn = rng.integers(0, n_clusters, size=(min(step, n_resamples - start), n_clusters),
                             dtype=index_type)
        for i, pair in enumerate(pairs):
            total = pair.take(drawn).sum(axis=1)
            out[start:start + len(drawn), 2 * i] = total.real
            if np.iscomplexobj(total):
                out[start:start + len(drawn), 2 * i + 1] = total.imag
    return out


def bootstrap_mean(values: Any, clusters: Sequence[Any], **options: Any) -> Interval:
    """Mean over samples with its interval. values: n numbers. clusters: n sequence names. options:
    as bootstrap_columns. Raises: MetricError (see cluster_sums)."""
    return bootstrap_ratio(values, np.ones(len(_column(values))), clusters, **options)


def bootstrap_rows(values: Any, clusters: Any, **options: Any) -> Interval:
    """Mean over the rows of a table (tokens, say), those of a cluster added up before anything is
    drawn. options: as bootstrap_ratio."""
    codes, names = pd.factorize(clusters)
    sums = np.bincount(codes, weights=np.asarray(values, dtype=np.float64))
    return bootstrap_ratio(sums, np.bincount(codes), names, **options)


def bootstrap_ratio(numerator: Any, denominator: Any, clusters: Sequence[Any],
                    **options: Any) -> Interval:
    """Σ numerator / Σ denominator (accepted tokens over tokens), both resampled together. n of the
    result is Σ denominator. options: as bootstrap_columns.

    Raises: MetricError when the denominators sum to zero, and as cluster_sums.
    """
    return bootstrap_columns(_column(numerator), _column(denominator), clusters, **options)[0]


def bootstrap_columns(numerators: Any, denominators: Any, clusters: Sequence[Any], *,
                      n_resamples: int = N_RESAMPLES, level: float = LEVEL,
                      seed: int = 0) -> list[Interval]:
    """One ratio a column, all from the same resamples: numerators [n, C] → C intervals (a
    per-position curve with its band).

    denominators: [n, C], or fewer columns that stand for all of them in turn ([n, 1]; [n, S] under
    several curves of S positions). Raises: MetricError when C is no multiple of the denominators'
    columns, a denominator sums to zero, and as cluster_sums.
    """
    above, below = (np.asarray(one, dtype=np.float64) for one in (numerators, denominators))
    if len(above) != len(below):
        raise MetricError(f"{len(above)} numerators but {len(below)} denominators; a ratio needs "
                          "both of every sample")
    n, n_below = above.shape[1], below.shape[1]
    if n % n_below:
        raise MetricError(f"{n} columns of numerators cannot share {n_below} columns of "
                          "denominators; give one each, or one for all")
    sums = cluster_sums(np.concatenate([above, below], axis=1), clusters)
    total, turns = sums.sum(axis=0), n // n_below
    of = np.tile(total[n:], turns)
    if (of <= 0).any():
        raise MetricError("a ratio has nothing below the line (Σ denominator = 0); leave out "
                          "positions or groups without samples")
    drawn = resampled_sums(sums, n_resamples=n_resamples, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = drawn[:, :n] / np.tile(drawn[:, n:], (1, turns))
    low, high = _percentiles(ratios, len(sums), level)
    return [Interval(*map(float, (total[i] / of[i], low[i], high[i])), round(float(of[i])),
                     len(sums)) for i in range(n)]  # fmt: skip


def bootstrap_difference(first: Any, second: Any, clusters: Sequence[Any],
                         **options: Any) -> Interval:
    """Paired: mean of first − second over the same samples in the same order. Of one arm measured
    twice (A/A) the interval must hold zero, or the measurement itself is off."""
    first, second = (np.asarray(one, dtype=np.float64).reshape(-1) for one in (first, second))
    _paired(len(first), len(second))
    return bootstrap_mean(first - second, clusters, **options)


def bootstrap_ratio_difference(first: tuple[Any, Any], second: tuple[Any, Any],
                               clusters: Sequence[Any], *, n_resamples: int = N_RESAMPLES,
                               level: float = LEVEL, seed: int = 0) -> Interval:
    """Paired: Σa/Σb of the first arm minus Σc/Σd of the second, the same sequences drawn for both.
    Each arm is (numerator, denominator)."""
    columns = [_column(values) for values in (*first, *second)]
    for column in columns[1:]:
        _paired(len(columns[0]), len(column))
    sums = cluster_sums(np.concatenate(columns, axis=1), clusters)
    a, b, c, d = sums.sum(axis=0)
    if b <= 0 or d <= 0:
        raise MetricError("an arm of the comparison has nothing below the line (Σ denominator = "
                          "0); evaluate both arms on the same samples")
    drawn = resampled_sums(sums, n_resamples=n_resamples, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3]
    return interval_of(float(a / b - c / d), ratios, n=round(float(b)), n_clusters=len(sums),
                       level=level)


def interval_of(value: float, resampled: np.ndarray, *, n: int, n_clusters: int,
                level: float = LEVEL) -> Interval:
    """The percentile interval of resampled figures [R]; resamples without a denominator (NaN) are
    left out, one cluster gives no interval."""
    low, high = _percentiles(resampled[:, None], n_clusters, level)[:, 0]
    return Interval(value, float(low), float(high), n, n_clusters)


def _percentiles(resampled: np.ndarray, n_clusters: int, level: float) -> np.ndarray:
    """Both ends [2, C] of the columns [R, C], NaN where there is no interval."""
    ends = (1 - level) / 2, (1 + level) / 2
    out = np.full((2, resampled.shape[1]), np.nan)
    if n_clusters < 2:
        return out
    finite = np.isfinite(resampled)
    whole = finite.all(axis=0)  # all at once: a call for each column takes ten times as long
    out[:, whole] = np.quantile(resampled[:, whole], ends, axis=0)
    for i in np.flatnonzero(~whole & finite.any(axis=0)):
        out[:, i] = np.quantile(resampled[finite[:, i], i], ends)
    return out


def wilson(successes: int, n: int, *, level: float = LEVEL, n_clusters: int = 1) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); it takes the trials as independent, so it
    is a lower bound of the true width on clips.

    Raises: MetricError unless 0 ≤ successes ≤ n and n > 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise MetricError(f"a share needs 0 ≤ successes ≤ n and n > 0 but got {successes} of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n, n_clusters)


def minimum_detectable_effect(differences: Any, clusters: Sequence[Any], *, power: float = 0.8,
                              level: float = LEVEL) -> float:
    """Smallest true mean difference that this set of sequences would find with the given power:
    (z₁₋α/₂ + z_power)·SE, SE by clusters.

    Raises: MetricError with fewer than two clusters.
    """
    columns = np.concatenate(
        [_column(differences), np.ones((len(_column(differences)), 1))], axis=1)
    sums = cluster_sums(columns, clusters)
    if len(sums) < 2:
        raise MetricError("the minimum detectable effect needs at least two sequences; one "
                          "sequence says nothing about others")
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    residual = sums[:, 0] - mean * sums[:, 1]
    error = math.sqrt(len(sums) /
                      (len(sums) - 1) * float(residual @ residual)) / float(sums[:, 1].sum())
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * error


def check_disjoint(train_sequences: Iterable[str], test_sequences: Iterable[str]) -> None:
    """Leakage guard: clips of one sequence overlap, so a sequence may be in training or in test,
    never in both.

    Raises: MetricError naming the shared sequences, or when a side is empty (a check of nothing
    proves nothing).
    """
    train, test = set(train_sequences), set(test_sequences)
    if not train or not test:
        raise MetricError(
            "the leakage check needs the sequence names of both splits but one side is empty; read "
            "them from the manifests"
        )
    shared = sorted(train & test)
    if shared:
        raise MetricError(
            f"{len(shared)} sequences are in training and in test "
            f"({', '.join(shared[:3])}{' …' if len(shared) > 3 else ''}); "
            "overlapping clips leak answers, so split by sequence and train again")


def _column(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1, 1)


def _paired(n_first: int, n_second: int) -> None:
    if n_first != n_second:
        raise MetricError("a paired comparison needs the same samples in both arms but they hold "
                          f"{n_first} and {n_second}")
