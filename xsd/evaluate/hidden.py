"""Hidden-state figures: how close the aligned states come to the verifier's, and what a cosine
threshold would accept (docs/metrics.md, section 2).

The seven groups of the reference's evaluation with intervals, from the token table's
``one_step_cosine``: median and percentiles are exact, any threshold can be asked afterwards, and
tables of parts of a set, joined in any order, give the same figures to the last bit.

A cosine threshold is *not* acceptance: the LM head decides (see tokens.py and reliability.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import table, tables
from xsd.evaluate.statistics import bootstrap_columns
from xsd.evaluate.tables import row

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
_PADDING = -2.0
"""A cosine below every threshold."""


def figures(tokens: pd.DataFrame, *, thresholds: Sequence[float] = THRESHOLDS, gamma: int = 5,
            max_positions: int = 64, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Every figure of every level as one long table: metric, threshold, position, value, low, high,
    n, n_clusters, level.

    Over all tokens: cosine_mean, _std (divides by n), _min, _max, _median, _p10 … _p99. Per
    threshold: accept_at (share of tokens above it), unbroken_prefix_* (tokens before the first one
    below it), draft_acceptance_prefill (mean of unbroken / length) and _decode (mean of
    min(unbroken, gamma) / gamma). length_* of the answers. By position (counted from the level's
    first predicted one): cosine_mean, cosine_std, accept_at and survival_at (above it up to here).

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
    for level, part in tokens.groupby("level", sort=False, observed=True):
        about, (cosine,), lengths = table.answers(part, "one_step_cosine")
        inside = np.arange(cosine.shape[1]) < lengths[:, None]
        cosine = np.where(inside, cosine, _PADDING).astype(np.float32)
        clusters = about["sequence"].tolist()
        found = _overall(cosine, lengths, clusters, taus, gamma, n_resamples, seed)
        found += _by_position(cosine[:, :max_positions], clusters, taus, seed)
        rows += [{**one, "level": level} for one in found]
    return tables.frame(rows)


def summary(values: Any) -> dict[str, float]:
    """mean, std (divides by n), min, max, median and p10 … p99 of some numbers, whatever their
    order."""
    values = np.sort(np.asarray(values, dtype=np.float64).reshape(-1))
    out = {"mean": values.mean(), "std": values.std(), "min": values[0], "max": values[-1],
           "median": np.median(values)}  # fmt: skip
    at = np.percentile(values, PERCENTILES)
    return out | {f"p{key}": value for key, value in zip(PERCENTILES, at, strict=True)}


def _overall(cosine: np.ndarray, lengths: np.ndarray, clusters: list[str], taus: Sequence[float],
             gamma: int, n_resamples: int, seed: int) -> list[dict[str, Any]]:
    """cosine: float32 [N, S], padding -2; one answer a row."""
    n, inside = len(lengths), cosine > -1.5
    ones = np.ones(n)
    above = [np.where(inside, cosine, 0).sum(axis=1, dtype=np.float64)]
    below = [lengths]
    unbroken = {}
    for tau in taus:
        accepted = cosine > np.float32(tau)
        run = unbroken[tau] = np.cumprod(accepted, axis=1, dtype=np.int64).sum(axis=1)
        above += [accepted.sum(axis=1), run, run / lengths, np.minimum(run, gamma) / gamma]
        below += [lengths, ones, ones, ones]
    drawn = bootstrap_columns(np.stack(above, axis=1), np.stack(below, axis=1), clusters,
                              n_resamples=n_resamples, seed=seed)
    values = summary(cosine[inside])
    out = [row("cosine_mean", drawn[0], threshold=None, position=None)]
    out += [row(f"cosine_{name}", values[name], n=int(lengths.sum()))
            for name in values if name != "mean"]  # fmt: skip
    for i, tau in enumerate(taus):
        accept, mean, prefill, decode = drawn[4 * i + 1:4 * i + 5]
        of_samples = summary(unbroken[tau])
        out.append(row("accept_at", accept, threshold=tau))
        out.append(row("unbroken_prefix_mean", mean, threshold=tau))
        out += [row(f"unbroken_prefix_{name}", of_samples[name], threshold=tau, n=n)
                for name in ("std", "min", "max", "median")]  # fmt: skip
        out.append(row("draft_acceptance_prefill", prefill, threshold=tau))
        out.append(row("draft_acceptance_decode", decode, threshold=tau))
    of_lengths = summary(lengths)
    return out + [row(f"length_{name}", of_lengths[name], n=n)
                  for name in ("mean", "std", "min", "max")]  # fmt: skip


def _by_position(cosine: np.ndarray, clusters: list[str], taus: Sequence[float],
                 seed: int) -> list[dict[str, Any]]:
    inside, width = cosine > -1.5, cosine.shape[1]
    accepted = [cosine > np.float32(tau) for tau in taus]
    survived = [np.cumprod(line, axis=1, dtype=np.int64) for line in accepted]
    bands = bootstrap_columns(np.concatenate([*accepted, *survived], axis=1), inside, clusters,
                              n_resamples=1000, seed=seed)
    out = []
    for t in range(width):
        values = np.sort(cosine[inside[:, t], t]).astype(np.float64)
        out.append(row("cosine_mean", values.mean(), position=t, n=len(values)))
        out.append(row("cosine_std", values.std(), position=t, n=len(values)))
        for i, tau in enumerate(taus):
            up_to = bands[(len(taus) + i) * width + t]
            out.append(row("accept_at", bands[i * width + t], threshold=tau, position=t))
            out.append(row("survival_at", up_to, threshold=tau, position=t))
    return out
