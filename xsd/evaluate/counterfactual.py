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
"""(numerator [n], denominator [n]) a sample: (matched, length) for token acceptance, (accepted,
rounds) for accepted a round."""


@dataclass(frozen=True)
class FloorComparison:
    """above_best: arm − best floor, in the metric's unit; the claim holds when its interval lies
    above zero."""

    arm: Interval
    floors: Mapping[str, Interval]
    best: str
    above_best: Interval

    def sentence(self, unit: str = "of the tokens") -> str:
        """One honest sentence."""
        verdict = "is above" if self.above_best.value > 0 else "is below"
        if not self.above_best.excludes(0.0):
            verdict = "cannot be told from"
        percent = unit.startswith("of")
        floor = f"{self.best}, {self.floors[self.best].text(percent)}"
        return (
            f"The adapter's {self.arm.text(percent)} {unit} {verdict} the best floor ({floor}): "
            f"difference {self.above_best.text(percent)} over {self.above_best.n_clusters} "
            "sequences."
        )


def compare_with_floors(arm: Counts, floors: Mapping[str, Counts], clusters: Sequence[str], *,
                        n_resamples: int = N_RESAMPLES, seed: int = 0) -> FloorComparison:
    """arm and floors: per-sample counts in the same order. Raises: MetricError without floors, for
    other lengths, or a zero denominator."""
    if not floors:
        raise MetricError(
            "an acceptance figure without floors means nothing; pass at least the position mode "
            "and the n-gram table"
        )
    options = {"n_resamples": n_resamples, "seed": seed}
    names = list(floors)
    columns = _stacked({"adapter": arm, **floors})
    sums = cluster_sums(columns, clusters)
    value = _above(sums.sum(axis=0)[None])[0]
    drawn = _above(resampled_sums(sums, **options))
    each = {name: bootstrap_ratio(*floors[name], clusters, **options) for name in names}
    return FloorComparison(
        arm=bootstrap_ratio(*arm, clusters, **options), floors=each,
        best=max(names, key=lambda name: each[name].value),
        above_best=interval_of(float(value), drawn, n=round(float(np.sum(arm[1]))),
                               n_clusters=len(sums)),
    )


def _above(sums: np.ndarray) -> np.ndarray:
    """[R, 2·(1 + floors)] resampled sums → arm − best floor [R]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[:, 0::2] / sums[:, 1::2]
    return ratios[:, 0] - ratios[:, 1:].max(axis=1)


def compare_arms(arms: Mapping[str, Counts], reference: str, clusters: Sequence[str], *,
                 n_resamples: int = N_RESAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Arms (real, blank and other-scene events, text only, verifier-self …) against one of them: a
    row an arm with its value, its paired difference and what difference this set could have
    detected.

    Raises: MetricError when the reference is not among the arms or the arms cover other samples.
    """
    if reference not in arms:
        raise MetricError(
            f"the reference arm {reference!r} was not measured; choose among {', '.join(arms)}")
    _stacked(arms)
    options = {"n_resamples": n_resamples, "seed": seed}
    out = []
    for name, counts in arms.items():
        line = {"arm": name, **row("acceptance", bootstrap_ratio(*counts, clusters, **options))}
        if name != reference:
            difference = bootstrap_ratio_difference(counts, arms[reference], clusters, **options)
            line.update(difference=difference.value, difference_low=difference.low,
                        difference_high=difference.high)
            line["differs"] = difference.excludes(0.0)
            if len(set(clusters)) > 1:
                per_sample = _rates(counts) - _rates(arms[reference])
                line["detectable"] = minimum_detectable_effect(per_sample, clusters)
        out.append(line)
    return out


def _rates(counts: Counts) -> np.ndarray:
    """Per-sample rates; a sample without a denominator counts as zero."""
    above, below = np.asarray(counts[0], dtype=np.float64), np.asarray(counts[1], dtype=np.float64)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _stacked(arms: Mapping[str, Counts]) -> np.ndarray:
    """[n, 2·arms], numerator and denominator of each arm side by side."""
    columns = {
        name: [np.asarray(values, dtype=np.float64).reshape(-1) for values in counts]
        for name, counts in arms.items()
    }
    n = len(next(iter(columns.values()))[0])
    for name, pair in columns.items():
        if any(len(values) != n for values in pair):
            raise MetricError(
                f"arm {name!r} covers {len(pair[0])} samples but the comparison is over {n}; "
                "evaluate every arm on the same samples"
            )
        if pair[1].sum() <= 0:
            raise MetricError(
                f"arm {name!r} has nothing below the line; evaluate it on samples that have tokens")
    return np.stack([values for pair in columns.values() for values in pair], axis=1)
