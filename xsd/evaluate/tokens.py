"""Token figures: what the verifier's LM head makes of the aligned states after the verified prefix,
against the verifier's own tokens (docs/metrics.md, section 3). What a greedy loop drafts is counted
by :func:`xsd.evaluate.table.counts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import rounds, table, tables
from xsd.evaluate.drafting import MISSED
from xsd.evaluate.hidden import spread
from xsd.evaluate.statistics import bootstrap_columns, bootstrap_positions
from xsd.evaluate.tables import row


def figures(tokens: pd.DataFrame, *, top_k: Sequence[int] = (1, 5), gamma: int = 5,
            max_positions: int = 64, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Every figure of every level as one long table: metric, threshold, position, value, low, high,
    n, n_clusters, level. Their definitions: docs/metrics.md, section 3; cross-entropy in nats,
    positions counted from the level's first predicted one.

    Raises: MetricError for a rank outside 1 … 254, gamma or max_positions below 1, an empty table.
    """
    ranks = sorted({1, *map(int, top_k)})
    if ranks[0] < 1 or ranks[-1] >= MISSED or gamma < 1 or max_positions < 1:
        raise MetricError("top_k must lie in 1 … 254, gamma and max_positions at 1 or above; got "
                          f"{list(top_k)}, {gamma}, {max_positions}")
    rows: list[dict[str, Any]] = []
    for level, about, (rank, loss), inside in table.by_level(tokens, "one_step_rank",
                                                             "cross_entropy"):
        rank = np.where(inside, rank, MISSED)
        clusters = about["sequence"].tolist()
        found = _overall(rank, loss, inside.sum(axis=1), clusters, ranks, gamma, n_resamples, seed)
        found += _by_position(rank[:, :max_positions] == 0, inside[:, :max_positions], clusters,
                              seed)
        rows += [{**one, "level": level} for one in found]
    return tables.frame(rows)


def _overall(rank: np.ndarray, loss: np.ndarray, lengths: np.ndarray, clusters: list[str],
             ranks: Sequence[int], gamma: int, n_resamples: int, seed: int) -> list[dict[str, Any]]:
    """rank: [N, S], 255 in the padding. loss: [N, S] in nats, 0 in the padding, NaN if unknown."""
    match, ones = rank == 0, np.ones(len(lengths))
    run = np.cumprod(match, axis=1, dtype=np.int64).sum(axis=1)
    walked = rounds.walk(rounds.runs_of(match, gamma), lengths, gamma)
    each = walked.per_request()
    above = [run, each["accepted"], *[(rank < k).sum(axis=1) for k in ranks]]
    below = [ones, each["rounds"], *len(ranks) * [lengths]]
    if not np.isnan(loss).any():
        above.append(loss.sum(axis=1, dtype=np.float64))
        below.append(lengths)
    drawn = bootstrap_columns(np.stack(above, axis=1), np.stack(below, axis=1), clusters,
                              n_resamples=n_resamples, seed=seed)
    of_top = dict(zip(ranks, drawn[2:], strict=False))
    out = [row("token_acceptance", of_top[1], threshold=None, position=None)]
    out += [row(f"token_top{k}", value) for k, value in of_top.items() if k > 1]
    out.append(row("token_unbroken_prefix_mean", drawn[0]))
    out += spread("token_unbroken_prefix", run, ["std", "min", "max", "median"])
    out.append(row("token_accepted_per_round", drawn[1]))
    with_bonus = float(walked.accepted.sum() + walked.bonus.sum()) / len(walked.accepted)
    out.append(row("token_accepted_per_round_with_bonus", with_bonus, n=len(walked.accepted)))
    if len(drawn) > 2 + len(ranks):
        out.append(row("token_cross_entropy", drawn[-1]))
    return out


def _by_position(match: np.ndarray, inside: np.ndarray, clusters: list[str],
                 seed: int) -> list[dict[str, Any]]:
    marginal, survival = bootstrap_positions([match], inside, clusters, n_resamples=1000,
                                             seed=seed)[0]
    survived = np.cumprod(match, axis=1, dtype=np.int64).astype(bool)
    before = np.column_stack([np.ones(len(match), dtype=bool), survived[:, :-1]]) & inside
    out = []
    for t, reached in enumerate(before.sum(axis=0)):
        out += [row("token_acceptance", marginal[t], position=t),
                row("token_survival", survival[t], position=t)]
        if reached:
            out.append(row("token_conditional", survived[:, t].sum() / reached, position=t,
                           n=int(inside[:, t].sum())))
    return out
