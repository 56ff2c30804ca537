"""Figures of one step after the verified prefix, as one long table: how close the aligned states
come to the verifier's and what a cosine threshold would accept, which is *not* acceptance
(docs/metrics.md, section 2); what the verifier's LM head makes of the states (section 3); what a
reduced draft vocabulary costs. What a greedy loop drafts is counted by
:func:`xsd.evaluate.table.counts`. Tables of parts of a set, joined in any order, give the same
figures to the last bit."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.core import Batch, MetricError, ParameterError
from xsd.evaluate import rounds, table, tables
from xsd.evaluate.drafting import MISSED
from xsd.evaluate.statistics import bootstrap_columns, bootstrap_positions
from xsd.evaluate.tables import row

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
Rows = list[dict[str, Any]]


def state_figures(tokens: pd.DataFrame, *, thresholds: Sequence[float] = THRESHOLDS, gamma: int = 5,
                  max_positions: int = 64, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Every figure of every level's states: metric, threshold, position, value, low, high, n,
    n_clusters, level (docs/metrics.md, section 2). Raises: MetricError for thresholds outside
    (-1, 1), gamma or max_positions below 1, an empty table."""
    if not thresholds or not all(-1 < tau < 1 for tau in thresholds):
        raise MetricError(f"thresholds must be cosines between -1 and 1 but are "
                          f"{list(thresholds)}; the reference's are {list(THRESHOLDS)}")
    if gamma < 1 or max_positions < 1:
        raise MetricError(
            f"gamma and max_positions must be at least 1 but are {gamma} and {max_positions}")
    taus = sorted({float(tau) for tau in thresholds})

    def of_level(clusters: list[str], inside: np.ndarray, cosine: np.ndarray) -> Rows:
        inside = inside & ~np.isnan(cosine)
        cosine = np.where(inside, cosine, -2.0).astype(np.float32)  # below every threshold
        return _states(cosine, inside, clusters, taus, gamma, n_resamples, seed) + (
            _states_by_position(*(grid[:, :max_positions] for grid in (cosine, inside)), clusters,
                                taus, seed))

    return _by_level(tokens, of_level, "one_step_cosine")


def token_figures(tokens: pd.DataFrame, *, top_k: Sequence[int] = (1, 5), gamma: int = 5,
                  max_positions: int = 64, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Every figure of every level's tokens, as :func:`state_figures` (docs/metrics.md, section 3):
    cross-entropy in nats, positions counted from the level's first predicted one. Raises:
    MetricError for a rank outside 1 … 254, gamma or max_positions below 1, an empty table."""
    ranks = sorted({1, *map(int, top_k)})
    if ranks[0] < 1 or ranks[-1] >= MISSED or gamma < 1 or max_positions < 1:
        raise MetricError("top_k must lie in 1 … 254, gamma and max_positions at 1 or above; got "
                          f"{list(top_k)}, {gamma}, {max_positions}")

    def of_level(clusters: list[str], inside: np.ndarray, rank: np.ndarray,
                 loss: np.ndarray) -> Rows:
        rank = np.where(inside, rank, MISSED)
        return _tokens(rank, loss, inside.sum(axis=1), clusters, ranks, gamma, n_resamples,
                       seed) + _tokens_by_position(rank[:, :max_positions] == 0,
                                                   inside[:, :max_positions], clusters, seed)

    return _by_level(tokens, of_level, "one_step_rank", "cross_entropy")


def _by_level(tokens: pd.DataFrame, of_level: Callable[..., Rows], *columns: str) -> pd.DataFrame:
    """The rows of each level, from its clusters, what is inside its answers and these columns."""
    return tables.frame([
        {**one, "level": level} for level, about, grids, inside in table.by_level(tokens, *columns)
        for one in of_level(about["sequence"].tolist(), inside, *grids)])


def summary(values: Any) -> dict[str, float]:
    """mean, std (divides by n), min, max, median and p10 … p99 of some numbers, whatever their
    order."""
    values = np.sort(np.asarray(values, dtype=np.float64).reshape(-1))
    out = {"mean": values.mean(), "std": values.std(), "min": values[0], "max": values[-1],
           "median": np.median(values)}
    at = np.percentile(values, PERCENTILES)
    return out | {f"p{key}": value for key, value in zip(PERCENTILES, at, strict=True)}


def _spread(name: str, values: Any, keys: Sequence[str], **about: Any) -> Rows:
    """Rows of those of :func:`summary`'s figures, without intervals."""
    found = summary(values)
    return [row(f"{name}_{key}", found[key], n=np.size(values), **about) for key in keys]


def _unbroken(right: np.ndarray) -> np.ndarray:
    """How many of each row stand before the first that is not right: bool [N, S] → int64 [N]."""
    return np.cumprod(right, axis=1, dtype=np.int64).sum(axis=1)


def _states(cosine: np.ndarray, inside: np.ndarray, clusters: list[str], taus: Sequence[float],
            gamma: int, n_resamples: int, seed: int) -> Rows:
    """cosine: float32 [N, S], padding -2; one answer a row."""
    lengths, ones = inside.sum(axis=1), np.ones(len(cosine))
    cosines = np.where(inside, cosine, 0).sum(axis=1, dtype=np.float64)
    ratios = {("cosine_mean", None): (cosines, lengths),
              ("accepted_weighted", None): (cosines, ones)}
    unbroken = {}
    for tau in taus:
        accepted = cosine > np.float32(tau)
        run = unbroken[tau] = _unbroken(accepted)
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
    out += _spread("cosine", cosine[inside], [
        "std", "min", "max", "median", *(f"p{key}" for key in PERCENTILES)])
    for (name, tau), one in list(zip(ratios, drawn, strict=True))[1:]:
        out.append(row(name, one, threshold=tau))
        if name == "unbroken_prefix_mean":
            out += _spread("unbroken_prefix", unbroken[tau], ["std", "min", "max", "median"],
                           threshold=tau)
    return out + _spread("length", lengths, ["mean", "std", "min", "max"])


def _states_by_position(cosine: np.ndarray, inside: np.ndarray, clusters: list[str],
                        taus: Sequence[float], seed: int) -> Rows:
    accepted = [cosine > np.float32(tau) for tau in taus]
    bands = bootstrap_positions(accepted, inside, clusters, n_resamples=1000, seed=seed)
    out = []
    for t in range(cosine.shape[1]):
        out += _spread("cosine", cosine[inside[:, t], t], ["mean", "std"], position=t)
        for tau, (marginal, survival) in zip(taus, bands, strict=True):
            out += [row("accept_at", marginal[t], threshold=tau, position=t),
                    row("survival_at", survival[t], threshold=tau, position=t)]
    return out


def _tokens(rank: np.ndarray, loss: np.ndarray, lengths: np.ndarray, clusters: list[str],
            ranks: Sequence[int], gamma: int, n_resamples: int, seed: int) -> Rows:
    """rank: [N, S], 255 in the padding. loss: [N, S] in nats, 0 in the padding, NaN if unknown."""
    match, ones = rank == 0, np.ones(len(lengths))
    run = _unbroken(match)
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
    out += _spread("token_unbroken_prefix", run, ["std", "min", "max", "median"])
    with_bonus = float(walked.accepted.sum() + walked.bonus.sum()) / len(walked.accepted)
    out += [row("token_accepted_per_round", drawn[1]),
            row("token_accepted_per_round_with_bonus", with_bonus, n=len(walked.accepted))]
    if len(drawn) > 2 + len(ranks):
        out.append(row("token_cross_entropy", drawn[-1]))
    return out


def _tokens_by_position(match: np.ndarray, inside: np.ndarray, clusters: list[str],
                        seed: int) -> Rows:
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


def vocabulary_cost(adapter: Adapter, batches: Sequence[Batch], head: Tensor, ids: Tensor, *,
                    gamma: int = 5) -> dict[str, float]:
    """What a reduced draft vocabulary costs (docs/adapters.md, section 4): let an adapter, which
    stays as it is, draft with the whole head [V, D] and with its rows ``ids`` int64 [k]. A token
    outside them is never drafted, so it ends a round.

    Returns size: k; coverage: share of the answers' tokens that can be drafted at all; full and
    reduced: accepted drafts per round with all tokens and with these; kept: their ratio (NaN where
    all tokens accept none); head_share: k / V, of the head's rows that a draft step reads.
    Raises: ParameterError when the adapter has a draft vocabulary already (there is no whole one to
    compare with), or ids are not the head's."""
    if adapter.draft_ids is not None:
        raise ParameterError(f"this {adapter.level} drafts {len(adapter.draft_ids)} tokens only; "
                             "give one of the whole vocabulary")
    if not 0 <= int(ids.min()) <= int(ids.max()) < len(head):
        raise ParameterError(f"a draft vocabulary is ids below {len(head)}")
    fewer = copy.deepcopy(adapter)
    fewer.set_draft_vocabulary(ids)
    tokens = table.of_batches({"full": adapter, "reduced": fewer}, batches, head, gamma=gamma)
    sums = table.counts(tokens, gamma).groupby("level", observed=True)[["accepted", "rounds"]].sum()
    full, reduced = (sums["accepted"] / sums["rounds"])[["full", "reduced"]].tolist()
    answers = torch.cat([batch.ids_by_verifier[batch.mask] for batch in batches])
    return {
        "size": len(ids), "coverage": float(torch.isin(answers, ids).float().mean()),
        "full": full, "reduced": reduced, "kept": reduced / full if full else float("nan"),
        "head_share": len(ids) / len(head),
    }
