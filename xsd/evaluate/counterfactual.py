"""Is it the sensor? An adapter against its floors, and arms that differ in what the drafter saw
(docs/metrics.md, section 7).

The headline of every adapter is its acceptance *above the best floor* on the same samples, with a
paired interval. The best floor is picked anew in every resample, so the comparison does not profit
from the luck of one floor being picked on the data it is then compared on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xsd.core import MetricError
from xsd.evaluate.statistics import (
    N_RESAMPLES,
    Interval,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    cluster_sums,
    interval_of,
    minimum_detectable_effect,
    resampled_sums,
)
from xsd.evaluate.tables import row

Counts = tuple[Any, Any]
"""(numerator [n], denominator [n]) of every sample: (matched, positions) for token acceptance,
(accepted, rounds) for accepted drafts per round."""


@dataclass(frozen=True)
class FloorComparison:
    """above_best: arm − best floor, in the metric's unit; the claim holds when its interval lies
    above zero. detectable: the smallest true distance that these sequences would have shown (None
    where there is but one)."""

    arm: Interval
    floors: Mapping[str, Interval]
    best: str
    above_best: Interval
    detectable: float | None


def compare_with_floors(arm: Counts, floors: Mapping[str, Counts], clusters: Sequence[str], *,
                        n_resamples: int = N_RESAMPLES, seed: int = 0) -> FloorComparison:
    """arm and floors: counts of the same samples in the same order. Raises: MetricError without
    floors, for other lengths, or a zero denominator."""
    if not floors:
        raise MetricError(
            "an acceptance figure without floors means nothing; pass at least the position mode "
            "and the n-gram table")
    draws = {"n_resamples": n_resamples, "seed": seed}
    sums = cluster_sums(_stacked({"adapter": arm, **floors}), clusters)
    value = _above(sums.sum(axis=0)[None])[0]
    each = {name: bootstrap_ratio(*counts, clusters, **draws) for name, counts in floors.items()}
    best = max(each, key=lambda name: each[name].value)
    above = interval_of(float(value), _above(resampled_sums(sums, **draws)),
                        n=round(float(np.sum(arm[1]))), n_clusters=len(sums))
    return FloorComparison(bootstrap_ratio(*arm, clusters, **draws), each, best, above,
                           _detectable(arm, floors[best], clusters))


def _above(sums: np.ndarray) -> np.ndarray:
    """[R, 2·(1 + floors)] resampled sums → arm − best floor [R]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[:, 0::2] / sums[:, 1::2]
    return ratios[:, 0] - ratios[:, 1:].max(axis=1)


def compare_arms(arms: Mapping[str, Counts], reference: str, clusters: Sequence[str], *,
                 n_resamples: int = N_RESAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Arms (real, blank and other-scene events, text only, verifier-self …) against one of them:
    for each a row with its value, its paired difference and what difference this set could have
    detected (None for the reference itself).

    Raises: MetricError when the reference is not among the arms or the arms cover other samples.
    """
    if reference not in arms:
        raise MetricError(
            f"the reference arm {reference!r} was not measured; choose among {', '.join(arms)}")
    _stacked(arms)
    draws = {"n_resamples": n_resamples, "seed": seed}
    out = []
    for name, counts in arms.items():
        line = row("acceptance", bootstrap_ratio(*counts, clusters, **draws), arm=name)
        found: dict[str, Any] = dict.fromkeys(
            ("difference", "difference_low", "difference_high", "differs", "detectable"))
        if name != reference:
            apart = bootstrap_ratio_difference(counts, arms[reference], clusters, **draws)
            found = {
                "difference": apart.value, "difference_low": apart.low,
                "difference_high": apart.high, "differs": apart.excludes(0.0),
                "detectable": _detectable(counts, arms[reference], clusters),
            }  # fmt: skip
        out.append(line | found)
    return out


def rates(counts: Counts) -> np.ndarray:
    """The rate of every sample; one without a denominator counts as zero."""
    above, below = (np.asarray(values, dtype=np.float64) for values in counts)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _detectable(one: Counts, other: Counts, clusters: Sequence[str]) -> float | None:
    if len(set(clusters)) < 2:
        return None
    return minimum_detectable_effect(rates(one) - rates(other), clusters)


def _stacked(arms: Mapping[str, Counts]) -> np.ndarray:
    """[n, 2·arms], numerator and denominator of each arm side by side."""
    columns = {name: [np.asarray(values, dtype=np.float64).reshape(-1) for values in counts]
               for name, counts in arms.items()}  # fmt: skip
    n = len(next(iter(columns.values()))[0])
    for name, pair in columns.items():
        if any(len(values) != n for values in pair):
            raise MetricError(
                f"arm {name!r} covers {len(pair[0])} samples but the comparison is over {n}; "
                "evaluate every arm on the same samples")
        if pair[1].sum() <= 0:
            raise MetricError(
                f"arm {name!r} has nothing below the line; evaluate it on samples that have tokens")
    return np.stack([values for pair in columns.values() for values in pair], axis=1)
