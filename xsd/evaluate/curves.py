"""Curves of the token table: acceptance by position and by draft, the unbroken prefix, histograms.
``tau=None`` means the token truth (``match``); a number means the reference's ``cosine > tau``.
Intervals draw whole sequences (docs/metrics.md, section 6); with fewer than two there is none."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from xsd.evaluate import table
from xsd.evaluate.statistics import LEVEL, Interval, bootstrap_columns, bootstrap_ratio

RESAMPLES = 400


class Level:
    """The answers of one level as arrays, sorted by cluster: what curves count at any threshold
    without another look at the table's rows. about: one row per answer (table.answers); rows: int64
    [N, S], the row of the table at each position, and first, the position of column 0; inside: bool
    [N, S], the positions that there are. match, cosine: [N, S], where they were asked for."""

    def __init__(self, name: str, tokens: pd.DataFrame, *columns: str) -> None:
        self.name, self.first = name, int(tokens["position"].min())
        about, grids, inside = table.answers(tokens, *columns)
        codes, names = pd.factorize(about["sequence"])
        order = np.argsort(codes, kind="stable")
        self.about, self.inside = about.iloc[order], inside[order]
        self.columns = {name: grid[order] for name, grid in zip(columns, grids, strict=True)}
        self._clusters = list(map(str, names))
        self._starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        self._there = self._by_cluster(self.inside)
        self._counts: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def _by_cluster(self, grid: np.ndarray) -> np.ndarray:
        """int64 [K, S]; sums of counts are exact, so intervals are those of the single answers."""
        return np.add.reduceat(grid, self._starts, axis=0, dtype=np.int64)

    def right(self, tau: float | None, cosine: str = "cosine") -> np.ndarray:
        """bool [N, S]: same token (``tau=None``), or cosine > tau."""
        if tau is None:
            return self.columns["match"].astype(bool)
        return (self.columns[cosine].astype(float) > tau) & self.inside

    def counts(self, tau: float | None, cosine: str = "cosine") -> tuple[np.ndarray, np.ndarray]:
        """int64 [K, S] twice: of each cluster the answers right at a position, and right there and
        everywhere before. Counted once for each threshold."""
        if (tau, cosine) not in self._counts:
            ok = self.right(tau, cosine)
            survived = np.arange(ok.shape[1]) < _prefixes(ok)[:, None]
            self._counts[tau, cosine] = self._by_cluster(ok), self._by_cluster(survived)
        return self._counts[tau, cosine]

    def by_position(self, tau: float | None = None, *, cosine: str = "cosine",
                    max_positions: int = 30, **draws: Any) -> pd.DataFrame:
        """The rows of :func:`by_position`."""
        n = min(self._there.shape[1], max(0, max_positions - self.first))
        there, sides = self._there[:, :n], [one[:, :n] for one in self.counts(tau, cosine)]
        found = bootstrap_columns(np.hstack(sides), there, self._clusters, **draws) if n else []
        return pd.DataFrame({
            "level": self.name, "position": self.first + np.arange(n), "n": there.sum(axis=0),
            **{f"{name}{end}": [getattr(one, end[1:] or "value") for one in line]
               for name, line in (("marginal", found[:n]), ("survival", found[n:]))
               for end in ("", "_low", "_high")},
        })

    def unbroken_prefix(self, tau: float | None = None, **draws: Any) -> Interval:
        """Mean number of tokens right from the start before the first wrong one."""
        prefix = self.counts(tau)[1].sum(axis=1)
        answers = np.diff(self._starts, append=len(self.inside))
        return bootstrap_ratio(prefix, answers, self._clusters, **draws)


def _prefixes(ok: np.ndarray) -> np.ndarray:
    """int64 [N]: how many stand before the first False of each row, bool [N, S]."""
    return np.where(ok.all(axis=1), ok.shape[1], ok.argmin(axis=1))


def levels(tokens: pd.DataFrame, tau: float | None = None,
           cosine: str = "cosine") -> Iterator[Level]:
    """The levels of a table, with what this threshold looks at. Raises: MetricError if it is not a
    token table."""
    column = "match" if tau is None else cosine
    table.check(tokens, column)
    for name, part in tokens.groupby("level", sort=False, observed=True):
        yield Level(str(name), part, column)


def by_position(tokens: pd.DataFrame, tau: float | None = None, *, cosine: str = "cosine",
                max_positions: int = 30, resamples: int = RESAMPLES, confidence: float = LEVEL,
                seed: int = 0) -> pd.DataFrame:
    """Acceptance at each position of each level: level, position, n (samples that have it),
    marginal, the share of them right there, and survival, right there and everywhere before (what a
    draft needs), each with _low and _high. Raises: MetricError if it is not a token table."""
    draws = {"n_resamples": resamples, "level": confidence, "seed": seed}
    found = [one.by_position(tau, cosine=cosine, max_positions=max_positions, **draws)
             for one in levels(tokens, tau, cosine)]
    return pd.concat([part for part in found if len(part)], ignore_index=True)


def unbroken_prefix(tokens: pd.DataFrame, tau: float | None = None, *, resamples: int = RESAMPLES,
                    confidence: float = LEVEL, seed: int = 0) -> pd.DataFrame:
    """Mean number of tokens right from the start before the first wrong one, one row per level:
    level, value, low, high, n (samples)."""
    draws = {"n_resamples": resamples, "level": confidence, "seed": seed}
    rows = [{"level": one.name, **vars(one.unbroken_prefix(tau, **draws))}
            for one in levels(tokens, tau)]
    return pd.DataFrame(rows)[["level", "value", "low", "high", "n"]]


def unbroken_prefix_histogram(tokens: pd.DataFrame, tau: float | None = None) -> pd.DataFrame:
    """How many samples had 0, 1, 2 … tokens right before the first wrong one: level, length, n,
    share."""
    pieces = []
    for one in levels(tokens, tau):
        length, n = np.unique(_prefixes(one.right(tau)), return_counts=True)
        pieces.append(pd.DataFrame({"level": one.name, "length": length, "n": n,
                                    "share": n / n.sum()}))
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
