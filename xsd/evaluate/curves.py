"""Curves of the token table: acceptance by position and by draft, the unbroken prefix, histograms.
Pictures of them: xsd/views/figures.py.

``tau=None`` means the token truth (``match``); a number means the reference's ``cosine > tau``.
Intervals draw whole sequences (docs/metrics.md, section 6); with fewer than two there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from xsd.evaluate import table
from xsd.evaluate.statistics import LEVEL, Interval, bootstrap_columns, bootstrap_mean

RESAMPLES = 400


def right(tokens: pd.DataFrame, tau: float | None = None, cosine: str = "cosine") -> np.ndarray:
    """bool [rows]: same token (``tau=None``) or cosine > tau. cosine: the column of it."""
    table.check(tokens, "match" if tau is None else cosine)
    if tau is None:
        return tokens["match"].to_numpy(bool)
    return tokens[cosine].to_numpy(float) > tau


def _levels(tokens: pd.DataFrame, ok: np.ndarray):
    """Of each level: its name, its answers (DataFrame), ok [rows] as [N, S] (False in the padding),
    lengths [N], and the first position."""
    for level, part in tokens.assign(_right=ok).groupby("level", sort=False, observed=True):
        about, (ok,), lengths = table.answers(part, "_right")
        yield level, about, ok, lengths, int(part["position"].min())


def by_position(tokens: pd.DataFrame, tau: float | None = None, *, cosine: str = "cosine",
                max_positions: int = 30, resamples: int = RESAMPLES, confidence: float = LEVEL,
                seed: int = 0) -> pd.DataFrame:
    """Acceptance at each position of each level.

    marginal: share of samples, among those that have the position, whose token there is right.
    survival: share, among the same samples, right there and everywhere before (what a draft needs);
    never above the marginal.

    Returns columns level, position, n, marginal, marginal_low, marginal_high, survival,
    survival_low, survival_high. Raises: MetricError if the table is not a token table.
    """
    pieces = []
    for level, about, ok, lengths, first in _levels(tokens, right(tokens, tau, cosine)):
        width = max(0, min(ok.shape[1], max_positions - first))
        if not width:
            continue
        unbroken = np.cumprod(ok, axis=1, dtype=np.int64)[:, :width]
        there = np.arange(width) < lengths[:, None]
        drawn = bootstrap_columns(np.concatenate([ok[:, :width], unbroken], axis=1), there,
                                  about["sequence"], n_resamples=resamples, level=confidence,
                                  seed=seed)
        piece = {"level": level, "position": first + np.arange(width), "n": there.sum(axis=0)}
        for name, found in (("marginal", drawn[:width]), ("survival", drawn[width:])):
            piece |= _columns(name, found)
        pieces.append(pd.DataFrame(piece))
    return pd.concat(pieces, ignore_index=True)


def _columns(name: str, found: Sequence[Interval]) -> dict[str, list[float]]:
    return {
        name: [one.value for one in found],
        f"{name}_low": [one.low for one in found],
        f"{name}_high": [one.high for one in found],
    }


def unbroken_prefix(tokens: pd.DataFrame, tau: float | None = None, *, resamples: int = RESAMPLES,
                    confidence: float = LEVEL, seed: int = 0) -> pd.DataFrame:
    """Mean number of tokens right from the start before the first wrong one, one row per level:
    level, value, low, high, n (samples)."""
    rows = []
    for level, about, ok, _, _ in _levels(tokens, right(tokens, tau)):
        prefix = np.cumprod(ok, axis=1, dtype=np.int64).sum(axis=1)
        found = bootstrap_mean(prefix, about["sequence"], n_resamples=resamples, level=confidence,
                               seed=seed)
        rows.append({"level": level, "value": found.value, "low": found.low, "high": found.high,
                     "n": found.n})  # fmt: skip
    return pd.DataFrame(rows)


def unbroken_prefix_histogram(tokens: pd.DataFrame, tau: float | None = None) -> pd.DataFrame:
    """How many samples had 0, 1, 2 … tokens right before the first wrong one: level, length, n,
    share."""
    pieces = []
    for level, _, ok, _, _ in _levels(tokens, right(tokens, tau)):
        n = np.bincount(np.cumprod(ok, axis=1, dtype=np.int64).sum(axis=1))
        length = np.flatnonzero(n)
        pieces.append(pd.DataFrame({"level": level, "length": length, "n": n[length],
                                    "share": n[length] / n.sum()}))  # fmt: skip
    return pd.concat(pieces, ignore_index=True)


def cosine_histogram(tokens: pd.DataFrame, column: str = "cosine", *, bins: int = 40,
                     low: float | None = None) -> pd.DataFrame:
    """Share of tokens in each cosine bin: level, cosine_low, cosine_high, n, share. ``low``
    defaults to the smallest cosine, rounded down."""
    start = float(np.floor(tokens[column].min() * 10) / 10) if low is None else low
    edges = np.linspace(min(start, 0.9), 1.0, bins + 1)
    pieces = []
    for level, values in tokens.groupby("level", sort=False, observed=True)[column]:
        n, _ = np.histogram(np.clip(values.to_numpy(float), edges[0], edges[-1]), edges)
        pieces.append(pd.DataFrame({"level": level, "cosine_low": edges[:-1],
                                    "cosine_high": edges[1:], "n": n,
                                    "share": n / len(values)}))  # fmt: skip
    return pd.concat(pieces, ignore_index=True)


def by_draft(tokens: pd.DataFrame, gamma: int) -> pd.DataFrame:
    """The drafts of a round, wherever it begins: level, draft (1 … gamma), n (starts with room for
    it), marginal: drafts 1 … k all right, and conditional: draft k right when those before it were
    (NaN where no start got that far)."""
    rows = []
    for level, part in table.drafted(tokens).groupby("level", sort=False, observed=True):
        _, (accepted,), lengths = table.answers(part, "accepted")
        room = lengths[:, None] - np.arange(accepted.shape[1])
        for k in range(1, gamma + 1):
            here, reached = room >= k, (room >= k) & (accepted >= k - 1)
            marginal, conditional = (
                float((accepted[some] >= k).mean()) if some.any() else float("nan")
                for some in (here, reached))
            rows.append({"level": level, "draft": k, "n": int(here.sum()), "marginal": marginal,
                         "conditional": conditional})  # fmt: skip
    return pd.DataFrame(rows)


def by_kind(tokens: pd.DataFrame, *, n_resamples: int = RESAMPLES,
            seed: int = 0) -> pd.DataFrame:
    """Acceptance within each kind of word, of what a loop drafts: level, kind, value, low, high, n
    (tokens), n_clusters; the most frequent kinds first."""
    rows = []
    for level, part in table.drafted(tokens).groupby("level", sort=False, observed=True):
        sums = part.groupby(["sequence", "kind"], observed=True)["match"].agg(["sum", "size"])
        sums = sums.unstack(fill_value=0)
        drawn = bootstrap_columns(sums["sum"], sums["size"], sums.index, n_resamples=n_resamples,
                                  seed=seed)
        rows += [{"level": level, "kind": kind, **vars(one)}
                 for kind, one in zip(sums["size"], drawn, strict=True)]  # fmt: skip
    found = pd.DataFrame(rows)
    order = found.groupby("kind")["n"].max().sort_values(ascending=False, kind="stable").index
    found["place"] = order.get_indexer(found["kind"])
    found = found.sort_values(["level", "place"], kind="stable", ignore_index=True)
    return found[["level", "kind", "value", "low", "high", "n", "n_clusters"]]
