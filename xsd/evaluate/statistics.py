"""Intervals for what was measured on sequences of overlapping clips (docs/metrics.md, section 6):
whole *sequences* are drawn with replacement (the cluster bootstrap, Davison & Hinkley 1997, section
3.8), percentile intervals. The same values in another order give the same interval to the last bit.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        value, low, high = ("–" if math.isnan(number) else f"{scale * number:{form}}"
                            for number in (self.value, self.low, self.high))
        bounds = "[–]" if low == "–" else f"[{low}, {high}]"
        return "–" if value == "–" else f"{value}{unit} {bounds}"


def cluster_sums(columns: Any, clusters: Sequence[Any]) -> np.ndarray:
    """Sum the columns [n, C] within each cluster → float64 [K, C], clusters in sorted order.
    Raises: MetricError on no samples, other lengths, or a value that is not finite."""
    columns = _columns(columns)
    if len(columns) == 0:
        raise MetricError(
            "there is no sample to resample; check that the evaluation set is not empty")
    if len(columns) != len(clusters):
        raise MetricError(f"{len(columns)} values but {len(clusters)} clusters; each value needs "
                          "the name of the sequence it comes from")
    codes, names = pd.factorize(pd.Series(clusters))
    codes = np.argsort(np.argsort(np.asarray(names).astype(str)))[codes]
    if not np.isfinite(columns).all():
        row = int(np.argmin(np.isfinite(columns).all(axis=1)))
        raise MetricError(f"value {row} to resample is not finite; a NaN in one sample would "
                          "silently become the figure, so mend or drop that sample")
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    if len(starts) == len(codes):
        return columns[order]
    # Counts add up exactly in any order; fractions do not, so within a cluster these are added in
    # the order of their values.
    fractions = columns[:, (columns != np.floor(columns)).any(axis=0)]
    if fractions.shape[1]:
        order = np.lexsort((*fractions.T[::-1], codes))
    return np.add.reduceat(columns[order], starts, axis=0)


def resampled_sums(sums: np.ndarray, *, n_resamples: int = N_RESAMPLES,
                   seed: int = 0) -> np.ndarray:
    """Draw K of the K cluster rows with replacement, n_resamples times, and add them up: [K, C] →
    float64 [R, C]: how often each cluster was drawn, times its sums, a matrix product."""
    n_clusters = len(sums)
    step = max(1, (4_000_000 if n_clusters <= 256 else 1_000_000) // n_clusters)
    if n_resamples <= step:
        return _drawn_once(n_clusters, n_resamples, seed) @ sums
    drawn = _drawn(n_clusters, n_resamples, seed, step)
    return np.concatenate([counts @ sums for counts in drawn])


@functools.lru_cache(maxsize=2)
def _drawn_once(n_clusters: int, n_resamples: int, seed: int) -> np.ndarray:
    return next(_drawn(n_clusters, n_resamples, seed, n_resamples))


def _drawn(n_clusters: int, n_resamples: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, float64 [at most step, K] a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, step):
        rows = min(step, n_resamples - start)
        if n_clusters <= 256:
            counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=rows)
        else:  # the same, the draws counted: a multinomial costs one binomial draw a cluster
            drawn = rng.integers(0, n_clusters, size=(rows, n_clusters),
                                 dtype=np.uint16 if n_clusters <= 2**16 else np.uint32)
            counts = np.bincount((drawn + n_clusters * np.arange(rows)[:, None]).reshape(-1),
                                 minlength=rows * n_clusters).reshape(rows, n_clusters)
        yield counts.astype(np.float64)


def bootstrap(figure: Callable[[np.ndarray], np.ndarray], columns: Any, clusters: Sequence[Any],
              counted: Sequence[float], *, n_resamples: int = N_RESAMPLES, level: float = LEVEL,
              seed: int = 0) -> list[Interval]:
    """Intervals of any figures of sums: figure makes [R, C] sums of the columns [n, C] into [R, F].

    counted: n of each figure. Resamples without a figure (NaN) are left out; one cluster gives no
    interval. Raises: MetricError as cluster_sums."""
    sums = cluster_sums(columns, clusters)
    low, high = np.full((2, len(counted)), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = figure(sums.sum(axis=0)[None])[0]
        if len(sums) > 1:
            drawn = figure(resampled_sums(sums, n_resamples=n_resamples, seed=seed))
            ends = (1 - level) / 2, (1 + level) / 2
            finite = np.isfinite(drawn)
            whole = finite.all(axis=0)  # all at once: a call for each takes ten times as long
            low[whole], high[whole] = np.quantile(drawn[:, whole], ends, axis=0)
            for i in np.flatnonzero(~whole & finite.any(axis=0)):
                low[i], high[i] = np.quantile(drawn[finite[:, i], i], ends)
    return [Interval(*map(float, one), round(float(n)), len(sums))
            for *one, n in zip(values, low, high, counted, strict=True)]


def bootstrap_mean(values: Any, clusters: Sequence[Any], **options: Any) -> Interval:
    """Mean over samples (or tokens, any rows) with its interval. values: n numbers. clusters: n
    sequence names. options: as bootstrap. Raises: MetricError (see cluster_sums)."""
    return bootstrap_ratio(values, np.ones(np.size(values)), clusters, **options)


def bootstrap_ratio(numerator: Any, denominator: Any, clusters: Sequence[Any],
                    **options: Any) -> Interval:
    """Σ numerator / Σ denominator (accepted tokens over tokens), both resampled together. n of the
    result is Σ denominator. options: as bootstrap. Raises: as bootstrap_columns."""
    return bootstrap_columns(numerator, denominator, clusters, **options)[0]


def bootstrap_columns(numerators: Any, denominators: Any, clusters: Sequence[Any],
                      **options: Any) -> list[Interval]:
    """One ratio a column, all from the same resamples: numerators [n, C] → C intervals (a
    per-position curve with its band). options: as bootstrap.

    denominators: [n, C], or fewer columns that stand for all of them in turn ([n, 1]; [n, S] under
    several curves of S positions). Raises: MetricError when C is no multiple of the denominators'
    columns, a denominator sums to zero, and as cluster_sums."""
    above, below = _columns(numerators), _columns(denominators)
    if len(above) != len(below):
        raise MetricError(f"{len(above)} numerators but {len(below)} denominators; a ratio needs "
                          "both of every sample")
    n, n_below = above.shape[1], below.shape[1]
    if n % n_below:
        raise MetricError(f"{n} columns of numerators cannot share {n_below} columns of "
                          "denominators; give one each, or one for all")
    turns = n // n_below

    def ratios(sums: np.ndarray) -> np.ndarray:
        return sums[:, :n] / np.tile(sums[:, n:], (1, turns))

    counted = np.tile(below.sum(axis=0), turns)
    return _known(bootstrap(ratios, np.hstack([above, below]), clusters, counted, **options))


def bootstrap_positions(rights: Sequence[Any], there: Any, clusters: Sequence[Any],
                        **options: Any) -> list[tuple[list[Interval], list[Interval]]]:
    """Of each right, bool [n, S]: the shares right at every position (marginal), and right there
    and everywhere before (survival), among the samples that have the position: there, bool [n, S].
    options: as bootstrap."""
    survived = [np.cumprod(one, axis=1, dtype=np.int64) for one in rights]
    drawn = bootstrap_columns(np.hstack([*rights, *survived]), there, clusters, **options)
    width = np.shape(there)[1]
    lines = [drawn[at:at + width] for at in range(0, len(drawn), width)]
    return list(zip(lines[:len(rights)], lines[len(rights):], strict=True))


def bootstrap_difference(first: Any, second: Any, clusters: Sequence[Any],
                         **options: Any) -> Interval:
    """Paired: mean of first − second over the same samples in the same order. Of one arm measured
    twice (A/A) the interval must hold zero, or the measurement itself is off."""
    first, second = _paired(first, second)
    return bootstrap_mean(first - second, clusters, **options)


def bootstrap_ratio_difference(first: tuple[Any, Any], second: tuple[Any, Any],
                               clusters: Sequence[Any], **options: Any) -> Interval:
    """Paired: Σa/Σb of the first arm minus Σc/Σd of the second, the same sequences drawn for both.
    Each arm is (numerator, denominator). options: as bootstrap."""
    def difference(sums: np.ndarray) -> np.ndarray:
        return sums[:, :1] / sums[:, 1:2] - sums[:, 2:3] / sums[:, 3:]

    columns = np.hstack(_paired(*first, *second))
    return _known(bootstrap(difference, columns, clusters, [columns[:, 1].sum()], **options))[0]


def _known(intervals: list[Interval]) -> list[Interval]:
    """The same. Raises: MetricError where a ratio had nothing below the line."""
    if not all(math.isfinite(one.value) for one in intervals):
        raise MetricError("a ratio has nothing below the line (Σ denominator = 0); leave out "
                          "positions, groups or arms without samples")
    return intervals


def wilson(successes: int, n: int, *, level: float = LEVEL, n_clusters: int = 1) -> Interval:
    """Wilson's score interval of a share (Wilson 1927), as if trials were independent: a lower
    bound of the true width on clips. Raises: MetricError unless 0 ≤ successes ≤ n and n > 0."""
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
    (z₁₋α/₂ + z_power)·SE, SE by clusters. Raises: MetricError with fewer than two clusters."""
    column = _columns(differences)
    sums = cluster_sums(np.hstack([column, np.ones_like(column)]), clusters)
    n_clusters, total, n = len(sums), sums[:, 0].sum(), sums[:, 1].sum()
    if n_clusters < 2:
        raise MetricError("the minimum detectable effect needs at least two sequences; one "
                          "sequence says nothing about others")
    residual = sums[:, 0] - total / n * sums[:, 1]
    error = math.sqrt(n_clusters / (n_clusters - 1) * float(residual @ residual)) / float(n)
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * error


def check_disjoint(train_sequences: Iterable[str], test_sequences: Iterable[str]) -> None:
    """Leakage guard: a sequence may be in training or in test. Raises: MetricError naming the
    shared sequences, or when a side is empty (a check of nothing proves nothing)."""
    train, test = set(train_sequences), set(test_sequences)
    if not train or not test:
        raise MetricError("the leakage check needs the sequence names of both splits but one side "
                          "is empty; read them from the manifests")
    shared = sorted(train & test)
    if shared:
        raise MetricError(f"{len(shared)} sequences are in training and in test "
                          f"({', '.join(shared[:3])}{' …' if len(shared) > 3 else ''}); "
                          "overlapping clips leak answers, so split by sequence and train again")


def _columns(values: Any) -> np.ndarray:
    """float64 [n, C]; a list of numbers is one column."""
    values = np.asarray(values, dtype=np.float64)
    return values if values.ndim == 2 else values.reshape(-1, 1)


def _paired(*arms: Any) -> list[np.ndarray]:
    """One column each. Raises: MetricError when they are of other lengths."""
    columns = [_columns(one) for one in arms]
    for one in columns:
        if len(one) != len(columns[0]):
            raise MetricError("a paired comparison needs the same samples in both arms but they "
                              f"hold {len(columns[0])} and {len(one)}")
    return columns
