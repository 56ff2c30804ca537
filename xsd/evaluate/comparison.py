"""An adapter against its floors, paired on the same samples (docs/metrics.md, section 7).
``options`` of every function: n_resamples, level, seed, as statistics.bootstrap takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate.statistics import Interval, bootstrap, minimum_detectable_effect

Counts = tuple[Any, Any]
"""(numerator [n], denominator [n]) of every sample: (matched, positions) for token acceptance,
(accepted, rounds) for accepted drafts per round."""
UNITS = {"token_acceptance": ("matched", "positions"), "accepted_per_round": ("accepted", "rounds")}
"""Unit → what is above and below the line, in columns of table.counts."""


@dataclass(frozen=True)
class FloorComparison:
    """above_best: arm − best floor. detectable: as :func:`detectable`."""

    arm: Interval
    floors: Mapping[str, Interval]
    best: str
    above_best: Interval
    detectable: float | None


def compare_with_floors(arm: Counts, floors: Mapping[str, Counts], clusters: Sequence[str],
                        **options: Any) -> FloorComparison:
    """arm and floors: counts of the same samples in the same order. The best floor is picked anew
    in every resample, so that no floor's luck on this data counts for it. Raises: MetricError
    without floors, for other lengths, or a zero denominator."""
    if not floors:
        raise MetricError("an acceptance figure without floors means nothing; pass at least the "
                          "position mode and the n-gram table")

    def each_and_above(sums: np.ndarray) -> np.ndarray:
        ratios = sums[:, 0::2] / sums[:, 1::2]
        return np.column_stack([ratios, ratios[:, 0] - ratios[:, 1:].max(axis=1)])

    columns = stacked({"adapter": arm, **floors})
    counted = columns[:, 1::2].sum(axis=0)
    own, *each, above = bootstrap(each_and_above, columns, clusters, [*counted, counted[0]],
                                  **options)
    found = dict(zip(floors, each, strict=True))
    best = max(found, key=lambda name: found[name].value)
    return FloorComparison(own, found, best, above, detectable(arm, floors[best], clusters))


def above_floors(counted: pd.DataFrame, below: Mapping[str, str],
                 **options: Any) -> dict[str, dict[str, FloorComparison]]:
    """Unit → level → its comparison, of all levels of table.counts. below: the floors, name →
    level. Raises: as compare_with_floors."""
    parts = dict(iter(counted.astype({"level": str}).groupby("level", sort=False)))
    clusters = next(iter(parts.values()))["sequence"].tolist()
    out = {}
    for unit, columns in UNITS.items():
        each = {level: part[list(columns)].to_numpy().T for level, part in parts.items()}
        floors = {name: each[level] for name, level in below.items()}
        out[unit] = {level: compare_with_floors(counts, floors, clusters, **options)
                     for level, counts in each.items()}
    return out


def rates(counts: Counts) -> np.ndarray:
    """The rate of every sample; one without a denominator counts as zero."""
    above, below = (np.asarray(values, dtype=np.float64) for values in counts)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def detectable(one: Counts, other: Counts, clusters: Sequence[str]) -> float | None:
    """The smallest true distance that these sequences would have shown; None for a single one."""
    if len(set(clusters)) < 2:
        return None
    return minimum_detectable_effect(rates(one) - rates(other), clusters)


def stacked(arms: Mapping[str, Counts]) -> np.ndarray:
    """[n, 2·arms], numerator and denominator of each arm side by side."""
    columns = [np.asarray(values, dtype=np.float64) for pair in arms.values() for values in pair]
    for name, pair in arms.items():
        if {len(values) for values in pair} != {len(columns[0])}:
            raise MetricError(f"arm {name!r} covers {len(pair[0])} samples but the comparison is "
                              f"over {len(columns[0])}; evaluate every arm on the same samples")
        if np.sum(pair[1]) <= 0:
            raise MetricError(
                f"arm {name!r} has nothing below the line; evaluate it on samples that have tokens")
    return np.stack(columns, axis=1)
