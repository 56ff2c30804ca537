"""Hidden-state figures: how close the aligned states come to the verifier's, and what a cosine
threshold would accept (docs/metrics.md, section 2). Tables of parts of a set, joined in any order,
give the same figures to the last bit. A threshold is *not* acceptance: see tokens.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import table, tables
from xsd.evaluate.statistics import bootstrap_columns, bootstrap_positions
from xsd.evaluate.tables import row

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
_PADDING = -2.0
"""A cosine below every threshold."""


def figures(tokens: pd.DataFrame, *, thresholds: Sequence[float] = THRESHOLDS, gamma: int = 5,
            max_positions: int = 64, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Every figure of every level as one long table: metric, threshold, position, value, low, high,
    n, n_clusters, level. Their definitions: docs/metrics.md, section 2.

    Raises: MetricError for thresholds outside (-1, 1), gamma or max_positions below 1, an empty
    table.
    """
    if not thresholds or not all(-1 < tau < 1 for tau in thresholds):
        raise MetricError(f"thresholds must be cosines between -1 and 1 but are "
                          f"{list(thresholds)}; the reference's are {list(THRESHOLDS)}")
    if gamma < 1 or max_positions < 1:
        raise MetricError(
            f"gamma and max_positions must be at least 1 but are {gamma} and {max_positions}")
    taus = sorted({float(tau) for tau in thresholds})
    rows: list[dict[str, Any]] = []
    for level, about, (cosine,), inside in table.by_level(tokens, "one_step_cosine"):
        cosine = np.where(inside, cosine, _PADDING).astype(np.float32)
        clusters = about["sequence"].tolist()
        found = _overall(cosine, clusters, taus, gamma, n_resamples, seed)
        found += _by_position(cosine[:, :max_positions], clusters, taus, seed)
        rows += [{**one, "level": level} for one in found]
    return tables.frame(rows)


def summary(values: Any) -> dict[str, float]:
    """mean, std (divides by n), min, max, median and p10 … p99 of some numbers, whatever their
    order."""
    values = np.sort(np.asarray(values, dtype=np.float64).reshape(-1))
    out = {"mean": values.mean(), "std": values.std(), "min": values[0], "max": values[-1],
           "median": np.median(values)}
    at = np.percentile(values, PERCENTILES)
    return out | {f"p{key}": value for key, value in zip(PERCENTILES, at, strict=True)}


def spread(name: str, values: Any, keys: Sequence[str], **about: Any) -> list[dict[str, Any]]:
    """Rows of those of :func:`summary`'s figures, without intervals."""
    found = summary(values)
    return [row(f"{name}_{key}", found[key], n=np.size(values), **about) for key in keys]


def _overall(cosine: np.ndarray, clusters: list[str], taus: Sequence[float], gamma: int,
             n_resamples: int, seed: int) -> list[dict[str, Any]]:
    """cosine: float32 [N, S], padding -2; one answer a row."""
    inside = cosine > -1.5
    lengths, ones = inside.sum(axis=1), np.ones(len(cosine))
    cosines = np.where(inside, cosine, 0).sum(axis=1, dtype=np.float64)
    ratios = {("cosine_mean", None): (cosines, lengths),
              ("accepted_weighted", None): (cosines, ones)}
    unbroken = {}
    for tau in taus:
        accepted = cosine > np.float32(tau)
        run = unbroken[tau] = np.cumprod(accepted, axis=1, dtype=np.int64).sum(axis=1)
        ratios |= {
            ("accept_at", tau): (accepted.sum(axis=1), lengths),
            ("accepted_relaxed", tau): (accepted.sum(axis=1), ones),
            ("unbroken_prefix_mean", tau): (run, ones),
            ("draft_acceptance_prefill", tau): (run / lengths, ones),
            ("draft_acceptance_decode", tau): (np.minimum(run, gamma) / gamma, ones),
        }
    above, below = (np.stack(one, axis=1) for one in zip(*ratios.values(), strict=True))
    drawn = bootstrap_columns(above, below, clusters, n_resamples=n_resamples, seed=seed)
    out = [row("cosine_mean", drawn[0], threshold=None, position=None)]
    out += spread("cosine", cosine[inside], [
        "std", "min", "max", "median", *(f"p{key}" for key in PERCENTILES)])
    for (name, tau), one in list(zip(ratios, drawn, strict=True))[1:]:
        out.append(row(name, one, threshold=tau))
        if name == "unbroken_prefix_mean":
            out += spread("unbroken_prefix", unbroken[tau], ["std", "min", "max", "median"],
                          threshold=tau)
    return out + spread("length", lengths, ["mean", "std", "min", "max"])


def _by_position(cosine: np.ndarray, clusters: list[str], taus: Sequence[float],
                 seed: int) -> list[dict[str, Any]]:
    inside = cosine > -1.5
    accepted = [cosine > np.float32(tau) for tau in taus]
    bands = bootstrap_positions(accepted, inside, clusters, n_resamples=1000, seed=seed)
    out = []
    for t in range(cosine.shape[1]):
        out += spread("cosine", cosine[inside[:, t], t], ["mean", "std"], position=t)
        for tau, (marginal, survival) in zip(taus, bands, strict=True):
            out += [row("accept_at", marginal[t], threshold=tau, position=t),
                    row("survival_at", survival[t], threshold=tau, position=t)]
    return out
