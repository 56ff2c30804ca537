"""What a cosine says about the token: P(token match | cosine), and how far Accept@τ misstates
acceptance (docs/metrics.md, section 8); counted from a token table, rows without a cosine left out.
The reference assumed ≈99.9 % above 0.95, ≈98 % in 0.90–0.95, ≈90 % in 0.85–0.90, else below 80 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import table, tables
from xsd.evaluate.statistics import bootstrap_columns, bootstrap_ratio, wilson
from xsd.evaluate.tables import row

BANDS = (-1.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Edges of the cosine bands; a band is (low, high], so that "cosine > τ" is a union of bands."""
CURVE = (-1.0, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""The finer bands of a reliability curve."""
THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
ONE_STEP = ("one_step_cosine", "one_step_match")
"""The columns that are read unless others are named: each prediction after the verified prefix."""


def bands(tokens: pd.DataFrame, edges: Sequence[float] = BANDS, *,
          columns: tuple[str, str] = ONE_STEP, n_resamples: int = 2000,
          seed: int = 0) -> pd.DataFrame:
    """The share of matching tokens by cosine band: level, cosine (the band's mean), cosine_low,
    cosine_high, n, n_match, n_clusters, rate with low and high (clustered by sequence), and
    wilson_low, wilson_high, as if tokens were independent (narrower). Empty bands are left out.
    Raises: MetricError for edges that do not ascend from -1 to 1, or a cosine beyond them."""
    if len(edges) < 2 or list(edges) != sorted(set(edges)) or edges[0] != -1 or edges[-1] != 1:
        raise MetricError(f"bands must be ascending edges from -1 to 1 but are {list(edges)}")
    rows = []
    for level, part in levels(tokens, columns):
        at = np.searchsorted(np.asarray(edges, np.float32), part["cosine"], side="left") - 1
        part = part.assign(band=at.clip(0, len(edges) - 2), n=1)
        sums = part.groupby(["sequence", "band"], observed=True)[["match", "n", "cosine"]].sum()
        sums = sums.unstack(fill_value=0)
        drawn = bootstrap_columns(sums["match"], sums["n"], sums.index, n_resamples=n_resamples,
                                  seed=seed)
        matched, counted, cosines = (sums[name].to_numpy().sum(axis=0)
                                     for name in ("match", "n", "cosine"))
        for i, (band, of) in enumerate(zip(sums["n"], drawn, strict=True)):
            unclustered = wilson(int(matched[i]), of.n)
            rows.append({
                "level": level, "cosine": cosines[i] / counted[i], "cosine_low": edges[band],
                "cosine_high": edges[band + 1], "n": of.n, "n_match": int(matched[i]),
                "n_clusters": of.n_clusters, "rate": of.value, "low": of.low, "high": of.high,
                "wilson_low": unclustered.low, "wilson_high": unclustered.high,
            })
    return pd.DataFrame(rows)


def curve(tokens: pd.DataFrame, *, n_resamples: int = 400, seed: int = 0) -> pd.DataFrame:
    """The bands of a reliability curve, as a greedy loop drafts (views.figures.reliability_curve);
    without a cosine an empty frame."""
    return bands(tokens, CURVE, columns=("cosine", "match"), n_resamples=n_resamples, seed=seed)


def figures(tokens: pd.DataFrame, *, thresholds: Sequence[float] = THRESHOLDS,
            edges: Sequence[float] = BANDS, max_positions: int = 64, n_resamples: int = 2000,
            seed: int = 0) -> pd.DataFrame:
    """Every figure of every level as one long table: metric, threshold, position, value, low, high,
    n, n_clusters, level. match_given_cosine by band (band_low, band_high, n_match); for each τ
    overstatement, match_above (also by position) and match_below: docs/metrics.md, section 8.
    Those of no token are left out."""
    rows = []
    draws = {"n_resamples": n_resamples, "seed": seed}
    kept = ["level", "rate", "low", "high", "n", "n_clusters", "cosine_low", "cosine_high",
            "n_match"]
    drawn = bands(tokens, edges, **draws).reindex(columns=kept).rename(columns={
        "rate": "value", "cosine_low": "band_low", "cosine_high": "band_high"
    })
    grids = table.by_level(_known(tokens), "cosine", "match")
    for level, about, (cosine, match), inside in grids:
        own = drawn[drawn["level"] == level].assign(metric="match_given_cosine", position=None)
        rows += own.to_dict("records")
        for tau in sorted(thresholds):
            above = inside & (cosine > np.float32(tau))
            found = _at_threshold(above, match, inside, about["sequence"], max_positions, draws)
            rows += [one | {"level": level, "threshold": tau} for one in found]
    return tables.frame(rows)


def _at_threshold(above: np.ndarray, match: np.ndarray, inside: np.ndarray, clusters: pd.Series,
                  max_positions: int, draws: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """bool [answers, positions] each: cosine above τ, token right, a position of the answer."""
    # Both shares have all tokens below the line, so their difference is a ratio too.
    ratios = {
        "overstatement": (above.astype(int) - match, inside),
        "match_above": (match & above, above),
        "match_below": (match & ~above, inside & ~above),
    }
    for name, (hits, of) in ratios.items():
        if of.any():
            yield row(name, bootstrap_ratio(hits.sum(axis=1), of.sum(axis=1), clusters, **draws))
    places = np.flatnonzero(above[:, :max_positions].any(axis=0))
    if places.size:
        draws = {**draws, "n_resamples": min(draws["n_resamples"], 1000)}
        values = bootstrap_columns((match & above)[:, places], above[:, places], clusters, **draws)
        yield from (row("match_above", value, position=int(place))
                    for place, value in zip(places, values, strict=True))


def _known(tokens: pd.DataFrame, columns: tuple[str, str] = ONE_STEP) -> pd.DataFrame:
    """The rows that have a cosine, the columns of cosine and match under these names."""
    names = ["level", "sample", "sequence", "position", *columns]
    known = tokens.loc[tokens[columns[0]].notna(), names].set_axis(
        [*names[:4], "cosine", "match"], axis=1)
    if (known["cosine"].abs() > 1).any():
        raise MetricError("a cosine lies outside [-1, 1]; measure it with table.measure")
    return known


def levels(tokens: pd.DataFrame, columns: tuple[str, str] = ONE_STEP) -> Any:
    """Each level that has cosines, and its rows."""
    return _known(tokens, columns).groupby("level", sort=False, observed=True)
