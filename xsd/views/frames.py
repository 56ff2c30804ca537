"""The tidy tables behind the pictures: from one row a token to acceptance by position, reliability,
accepted length.

The **token table** is what every function here reads; one row per position of one answer under one
level:

``level`` str · ``sample`` str · ``sequence`` str (the cluster of every interval) · ``position`` int
from 0, without holes · ``cosine`` float · ``match`` bool (the draft token is the verifier's) and,
where known, ``run``, ``clip``, ``question``, ``draft_token``, ``verifier_token`` (texts),
``draft_probability``.

``tau=None`` means the token truth (``match``); a number means the reference's ``cosine > tau``.
Intervals are percentile bootstraps that draw whole sequences (docs/metrics.md); with fewer than two
sequences there is none (NaN).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from xsd.core import MetricError

REQUIRED = ("level", "sample", "sequence", "position", "cosine", "match")
RESAMPLES = 400


def check(tokens: pd.DataFrame) -> pd.DataFrame:
    """The table itself, once it is known to hold what the functions here read.

    Raises: MetricError naming the missing columns, or when there is no row.
    """
    missing = [name for name in REQUIRED if name not in tokens.columns]
    if missing:
        raise MetricError(
            f"the token table lacks the column(s) {', '.join(missing)}; it needs "
            f"{', '.join(REQUIRED)}, one row a token"
        )
    if tokens.empty:
        raise MetricError(
            "the token table has no row; choose a level and a run that were evaluated")
    return tokens


def accepted(tokens: pd.DataFrame, tau: float | None = None) -> np.ndarray:
    """bool [rows]: same token (``tau=None``) or cosine > tau."""
    return tokens["match"].to_numpy(bool) if tau is None else tokens["cosine"].to_numpy(float) > tau


def _unbroken(tokens: pd.DataFrame, ok: np.ndarray) -> np.ndarray:
    """bool [rows]: accepted here and at every earlier position of the same sample and level."""
    keys = [name for name in ("run", "level", "sample") if name in tokens.columns]
    table = tokens[[*keys, "position"]].reset_index(drop=True).assign(_ok=ok)
    running = table.sort_values("position", kind="stable").groupby(keys, sort=False,
                                                                   observed=True)["_ok"].cummin()
    return running.reindex(table.index).to_numpy(bool)


def _draws(n_clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each resample: int [resamples, n_clusters]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples)


def _ratio_interval(hits: np.ndarray, counts: np.ndarray, draws: np.ndarray,
                    confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of sum(hits)/sum(counts) over drawn clusters. hits, counts: [C, P];
    returns low [P], high [P]."""
    if len(hits) < 2:
        nothing = np.full(hits.shape[1], np.nan)
        return nothing, nothing
    top, bottom = draws @ hits, draws @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(bottom > 0, top / bottom, np.nan)
    tail = (1 - confidence) / 2
    filled = ~np.all(np.isnan(ratios), axis=0)
    low, high = np.full(hits.shape[1], np.nan), np.full(hits.shape[1], np.nan)
    low[filled], high[filled] = np.nanquantile(ratios[:, filled], (tail, 1 - tail), axis=0)
    return low, high


def by_position(tokens: pd.DataFrame, tau: float | None = None, *, max_positions: int = 30,
                resamples: int = RESAMPLES, confidence: float = 0.95, seed: int = 0,
                ) -> pd.DataFrame:
    """Acceptance at each position of each level.

    marginal: share of samples, among those that have the position, whose token there is accepted.
    survival: share, among the same
    samples, accepted there and everywhere before (what a draft needs). survival <= marginal at each
    position.

    Returns columns level, position, n, marginal, marginal_low, marginal_high, survival,
    survival_low, survival_high.
    Raises: MetricError if the table is not a token table.
    """
    check(tokens)
    ok = accepted(tokens, tau)
    table = tokens[["level", "sequence", "position"]].assign(marginal=ok,
                                                             survival=_unbroken(tokens, ok), n=1)
    table = table[table["position"] < max_positions]
    pieces = []
    for level, part in table.groupby("level", sort=False, observed=True):
        sums = part.groupby(["sequence", "position"],
                            observed=True)[["marginal", "survival",
                                            "n"]].sum().unstack(fill_value=0)
        counts = sums["n"].to_numpy(float)
        draws = _draws(len(sums), resamples, seed)
        piece = {
            "level": level, "position": sums["n"].columns.to_numpy(),
            "n": counts.sum(axis=0).astype(int)
        }
        for name in ("marginal", "survival"):
            hits = sums[name].to_numpy(float)
            piece[name] = hits.sum(axis=0) / counts.sum(axis=0)
            piece[f"{name}_low"], piece[f"{name}_high"] = _ratio_interval(
                hits, counts, draws, confidence)
        pieces.append(pd.DataFrame(piece))
    return pd.concat(pieces, ignore_index=True)


def unbroken_prefix(tokens: pd.DataFrame, tau: float | None = None, *, resamples: int = RESAMPLES,
                    confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Mean number of tokens accepted before the first rejection, a level a row: level, value, low,
    high, n (samples)."""
    check(tokens)
    table = tokens[["level", "sequence",
                    "sample"]].assign(length=_unbroken(tokens, accepted(tokens, tau)))
    samples = table.groupby(["level", "sequence", "sample"], sort=False,
                            observed=True)["length"].sum().reset_index()
    rows = []
    for level, part in samples.groupby("level", sort=False, observed=True):
        sums = part.groupby("sequence", observed=True)["length"].agg(["sum",
                                                                      "count"]).to_numpy(float)
        low, high = _ratio_interval(sums[:, :1], sums[:, 1:], _draws(len(sums), resamples, seed),
                                    confidence)
        rows.append({
            "level": level, "value": part["length"].mean(), "low": low[0], "high": high[0],
            "n": len(part)
        })
    return pd.DataFrame(rows)


def unbroken_prefix_histogram(tokens: pd.DataFrame, tau: float | None = None) -> pd.DataFrame:
    """How many samples had 0, 1, 2 … tokens accepted before the first rejection: level, length, n,
    share."""
    check(tokens)
    table = tokens[["level", "sample"]].assign(length=_unbroken(tokens, accepted(tokens, tau)))
    lengths = table.groupby(["level", "sample"], sort=False,
                            observed=True)["length"].sum().reset_index()
    counted = lengths.groupby(["level", "length"], sort=True,
                              observed=True).size().rename("n").reset_index()
    counted["share"] = counted["n"] / counted.groupby("level", observed=True)["n"].transform("sum")
    return counted


def cosine_histogram(tokens: pd.DataFrame, *, bins: int = 40,
                     low: float | None = None) -> pd.DataFrame:
    """Share of tokens in each cosine bin: level, cosine_low, cosine_high, n, share. ``low``
    defaults to the smallest cosine, rounded down."""
    check(tokens)
    start = float(np.floor(tokens["cosine"].min() * 10) / 10) if low is None else low
    edges = np.linspace(min(start, 0.9), 1.0, bins + 1)
    pieces = []
    for level, part in tokens.groupby("level", sort=False, observed=True):
        counts, _ = np.histogram(np.clip(part["cosine"].to_numpy(float), edges[0], edges[-1]),
                                 edges)
        pieces.append(
            pd.DataFrame({
                "level": level, "cosine_low": edges[:-1], "cosine_high": edges[1:], "n": counts,
                "share": counts / len(part)
            }))
    return pd.concat(pieces, ignore_index=True)


def reliability(tokens: pd.DataFrame, *, edges: np.ndarray | None = None,
                resamples: int = RESAMPLES, confidence: float = 0.95,
                seed: int = 0) -> pd.DataFrame:
    """P(same token | cosine in a band): level, cosine (the band's mean), cosine_low, cosine_high,
    n, rate, low, high; empty bands are left out."""
    check(tokens)
    edges = np.concatenate([[-1.0], np.arange(0.5, 1.0001, 0.05)]) if edges is None else np.asarray(
        edges, float)
    band = np.clip(
        np.searchsorted(edges, tokens["cosine"].to_numpy(float), side="left") - 1, 0,
        len(edges) - 2)
    table = tokens[["level", "sequence", "cosine", "match"]].assign(band=band, n=1)
    pieces = []
    for level, part in table.groupby("level", sort=False, observed=True):
        sums = part.groupby(["sequence", "band"],
                            observed=True)[["match", "n", "cosine"]].sum().unstack(fill_value=0)
        hits, counts, cosines = (sums[name].to_numpy(float) for name in ("match", "n", "cosine"))
        low, high = _ratio_interval(hits, counts, _draws(len(sums), resamples, seed), confidence)
        bands, total = sums["n"].columns.to_numpy(int), counts.sum(axis=0)
        piece = {
            "level": level, "cosine": cosines.sum(axis=0) / total, "cosine_low": edges[bands],
            "cosine_high": edges[bands + 1], "n": total.astype(int),
            "rate": hits.sum(axis=0) / total, "low": low, "high": high,
        }
        pieces.append(pd.DataFrame(piece))
    return pd.concat(pieces, ignore_index=True)
