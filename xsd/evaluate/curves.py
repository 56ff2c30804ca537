"""Curves of the token table: acceptance by position and by draft, the unbroken prefix, histograms.
``tau=None`` means the token truth (``match``); a number means the reference's ``cosine > tau``.
Intervals draw whole sequences (docs/metrics.md, section 6); with fewer than two there is none."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from xsd.evaluate import table
from xsd.evaluate.statistics import LEVEL, bootstrap_columns, bootstrap_mean, bootstrap_positions

RESAMPLES = 400


def right(tokens: pd.DataFrame, tau: float | None = None, cosine: str = "cosine") -> np.ndarray:
    """bool [rows]: same token (``tau=None``) or cosine > tau. cosine: the column of it."""
    table.check(tokens, "match" if tau is None else cosine)
    if tau is None:
        return tokens["match"].to_numpy(bool)
    return tokens[cosine].to_numpy(float) > tau


def by_position(tokens: pd.DataFrame, tau: float | None = None, *, cosine: str = "cosine",
                max_positions: int = 30, resamples: int = RESAMPLES, confidence: float = LEVEL,
                seed: int = 0) -> pd.DataFrame:
    """Acceptance at each position of each level: level, position, n (samples that have it),
    marginal, the share of them right there, and survival, right there and everywhere before (what a
    draft needs), each with _low and _high. Raises: MetricError if it is not a token table."""
    pieces, draws = [], {"n_resamples": resamples, "level": confidence, "seed": seed}
    tokens = tokens.assign(_right=right(tokens, tau, cosine))
    firsts = tokens.groupby("level", observed=True)["position"].min()
    for level, about, (ok,), there in table.by_level(tokens, "_right"):
        ok, there = (grid[:, :max(0, max_positions - firsts[level])] for grid in (ok, there))
        if ok.shape[1]:
            found = bootstrap_positions([ok], there, about["sequence"], **draws)[0]
            pieces.append(pd.DataFrame({
                "level": level, "position": firsts[level] + np.arange(ok.shape[1]),
                "n": there.sum(axis=0),
                **{f"{name}{end}": [getattr(one, end[1:] or "value") for one in line]
                   for name, line in zip(("marginal", "survival"), found, strict=True)
                   for end in ("", "_low", "_high")},
            }))
    return pd.concat(pieces, ignore_index=True)


def unbroken_prefix(tokens: pd.DataFrame, tau: float | None = None, *, resamples: int = RESAMPLES,
                    confidence: float = LEVEL, seed: int = 0) -> pd.DataFrame:
    """Mean number of tokens right from the start before the first wrong one, one row per level:
    level, value, low, high, n (samples)."""
    draws = {"n_resamples": resamples, "level": confidence, "seed": seed}
    rows = [{"level": level, **vars(bootstrap_mean(prefix, clusters, **draws))}
            for level, clusters, prefix in _prefixes(tokens, tau)]
    return pd.DataFrame(rows)[["level", "value", "low", "high", "n"]]


def unbroken_prefix_histogram(tokens: pd.DataFrame, tau: float | None = None) -> pd.DataFrame:
    """How many samples had 0, 1, 2 … tokens right before the first wrong one: level, length, n,
    share."""
    pieces = []
    for level, _, prefix in _prefixes(tokens, tau):
        length, n = np.unique(prefix, return_counts=True)
        pieces.append(pd.DataFrame({"level": level, "length": length, "n": n,
                                    "share": n / n.sum()}))
    return pd.concat(pieces, ignore_index=True)


def _prefixes(tokens: pd.DataFrame, tau: float | None) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Each level, its clusters, and the unbroken prefix of every sample."""
    tokens = tokens.assign(_right=right(tokens, tau))
    for level, about, (ok,), _ in table.by_level(tokens, "_right"):
        yield level, about["sequence"], np.cumprod(ok, axis=1, dtype=np.int64).sum(axis=1)


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
                                    "cosine_high": edges[1:], "n": n, "share": n / len(values)}))
    return pd.concat(pieces, ignore_index=True)


def by_draft(tokens: pd.DataFrame, gamma: int) -> pd.DataFrame:
    """The drafts of a round, wherever it begins: level, draft (1 … gamma), n (starts with room for
    it), marginal: drafts 1 … k all right, and conditional: draft k right when those before it were
    (NaN where no start got that far)."""
    rows = []
    for level, _, (accepted,), inside in table.by_level(table.drafted(tokens), "accepted"):
        room = inside[:, ::-1].cumsum(axis=1)[:, ::-1]
        for k in range(1, gamma + 1):
            here = accepted[room >= k]
            rows.append({"level": level, "draft": k, "n": len(here), "marginal": _share(here >= k),
                         "conditional": _share(here[here >= k - 1] >= k)})
    return pd.DataFrame(rows)


def _share(found: np.ndarray) -> float:
    return float(found.mean()) if found.size else float("nan")


def by_kind(tokens: pd.DataFrame, *, n_resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Acceptance within each kind of word, of what a loop drafts: level, kind, value, low, high, n
    (tokens), n_clusters; the most frequent kinds first."""
    rows = []
    for level, part in table.drafted(tokens).groupby("level", sort=False, observed=True):
        sums = part.groupby(["sequence", "kind"], observed=True)["match"].agg(["sum", "size"])
        sums = sums.unstack(fill_value=0)
        drawn = bootstrap_columns(sums["sum"], sums["size"], sums.index, n_resamples=n_resamples,
                                  seed=seed)
        rows += [{"level": level, "kind": kind, **vars(one)}
                 for kind, one in zip(sums["size"], drawn, strict=True)]
    found = pd.DataFrame(rows)
    order = found.groupby("kind")["n"].max().sort_values(ascending=False, kind="stable").index
    found["place"] = order.get_indexer(found["kind"])
    found = found.sort_values(["level", "place"], kind="stable", ignore_index=True)
    return found[["level", "kind", "value", "low", "high", "n", "n_clusters"]]
