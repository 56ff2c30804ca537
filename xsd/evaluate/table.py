"""The token table: one pass of the adapters over a held-out set, one row per level and position of
an answer, from which everything else is computed. Its columns: docs/metrics.md, section 1. Text
columns are categorical, so that a row takes about 100 bytes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from xsd.core import Batch, MetricError
from xsd.evaluate import drafting, rounds
from xsd.evaluate.held_out import HeldOut
from xsd.evaluate.kernels import cosines
from xsd.files import import_object

DRAFTER = "drafter_tokens"
KEYS = ("level", "sample", "sequence", "position")
"""What a table of any origin holds."""
Column = Callable[[pd.DataFrame], pd.Series]


def measure(adapters: Mapping[str, Any], pairs: HeldOut, *, gamma: int | None, top_k: int = 5,
            batch_size: int = 64, drafter: bool = True,
            kinds: Callable[[Sequence[str]], Sequence[str]] | None = None,
            columns: Sequence[str | Column] = ()) -> pd.DataFrame:
    """The token table of a held-out set; every batch is read once and every adapter runs once,
    where the adapters are (a GPU, where they were moved to one).

    Args: adapters: level → adapter, left in the mode it was found in. gamma: drafts per round;
        None: the one-step cosines alone, no head is applied. drafter: the drafter's own tokens as a
        level, too. kinds: token texts of an answer → the kind of word of each. columns: a user's
        metric columns, functions of the table (or "module:function") that give one value per row;
        the column is called like the function.
    Raises: MetricError when there is no token to predict, or a state is not finite.
    """
    read = [getattr(one, "context_layers", {}) for one in adapters.values()]
    contexts = {role: layers for one in read for role, layers in one.items()}
    table = of_batches(adapters, pairs.batches(batch_size, contexts), pairs.head, gamma=gamma,
                       top_k=top_k, drafter=drafter and pairs.has_ids)
    index, known = table["sample"].to_numpy(), pairs.samples
    table["sample"] = _categorical(pairs.keys, index)
    for place, name in enumerate(("clip", "question"), start=3):
        table.insert(place, name, _categorical(known[name], index))
    if pairs.texts is not None and gamma is not None:
        for side in ("draft", "verifier"):
            table[f"{side}_token"] = _categorical(pairs.texts, table[f"{side}_id"].to_numpy())
        if kinds is not None:
            of_answers = [kinds([pairs.texts[token] for token in ids]) for ids in pairs.answers]
            first = np.cumsum([0, *map(len, of_answers)])
            at = first[index] + table["position"] + 1
            table["kind"] = _categorical(np.concatenate(of_answers), at)
    for one in columns:
        column = import_object(one) if isinstance(one, str) else one
        table[column.__name__] = np.asarray(column(table))
    return table


def of_batches(adapters: Mapping[str, Any], batches: Iterable[Batch], head: torch.Tensor, *,
               gamma: int | None, top_k: int = 1, drafter: bool = False) -> pd.DataFrame:
    """The table of batches of any origin, the samples being called by their index: measure for
    states that are on no disk. Raises: as measure, and MetricError for batches of two modes."""
    if gamma is not None and gamma < 1:
        raise MetricError(f"gamma must be at least 1 draft token per round, not {gamma}")
    training = [one for one in adapters.values() if getattr(one, "training", False)]
    pieces: dict[str, list[drafting.Columns]] = {name: [] for name in adapters}
    if drafter and gamma is not None:
        pieces[DRAFTER] = []
    clusters, mode, place = {}, None, _device_of(adapters)
    head = head.to(place)
    for model in training:
        model.eval()
    try:
        for batch in batches:
            mode = mode or batch.mode
            if batch.mode != mode:
                raise MetricError("free_running and teacher_forced batches came in one "
                                  "evaluation; measure each mode by itself")
            clusters.update(zip(batch.index, batch.sequence, strict=True))
            batch = batch.to(place)
            for level, adapter in adapters.items():
                pieces[level] += _within_memory(adapter, batch, head, gamma, top_k)
            if DRAFTER in pieces:
                pieces[DRAFTER].append(drafter_rows(batch, gamma))
    finally:
        for model in training:
            model.train()
    return _joined(pieces, clusters)


def _device_of(adapters: Mapping[str, Any]) -> torch.device:
    """Where the adapters stand, which the states go to."""
    numbers = (one for adapter in adapters.values() if isinstance(adapter, torch.nn.Module)
               for one in (*adapter.parameters(), *adapter.buffers()))
    return next(numbers, torch.zeros(0)).device


def _within_memory(adapter: Any, batch: Batch, *options: Any) -> list[drafting.Columns]:
    """The rows of a batch, of its halves where the memory does not do for it."""
    half = len(batch.index) // 2
    with contextlib.suppress(*[torch.OutOfMemoryError] * (half > 0)):
        return [rows(adapter, batch, *options)]
    torch.cuda.empty_cache()
    return [part for cut in (slice(half), slice(half, None))
            for part in _within_memory(adapter, batch.rows(cut), *options)]


@torch.no_grad()
def rows(adapter: Any, batch: Batch, head: torch.Tensor, gamma: int | None = None,
         top_k: int = 1) -> drafting.Columns:
    """The numbers of the table for one batch: its columns as arrays, and ``index``, the place of
    the sample in its data set. {} when the batch holds no token to predict."""
    found = drafting.one_step(adapter, batch, None if gamma is None else head, top_k)
    if gamma is None or not found:
        return found
    if adapter.shift:
        return found | drafting.greedy_loop(adapter, batch, head, gamma)
    mask = batch.mask.cpu().numpy()
    match = np.zeros(mask.shape, dtype=bool)
    match[mask] = found["one_step_match"]
    return found | {"match": match[mask], "cosine": found["one_step_cosine"],
                    "accepted": rounds.runs_of(match, gamma)[mask]}


def drafter_rows(batch: Batch, gamma: int) -> drafting.Columns:
    """The drafter's own tokens without an adapter; the cosine is the raw states' where both models
    have one width."""
    mask = batch.mask.cpu().numpy()
    row, at = mask.nonzero()
    match = (batch.ids_by_drafter == batch.ids_by_verifier).cpu().numpy() & mask
    cosine = np.full(len(row), np.nan, np.float32)
    if batch.drafter.shape == batch.verifier.shape:
        cosine = cosines(batch.drafter, batch.verifier, batch.mask).cpu().numpy()[mask]
    of_batch = {"verifier_id": batch.ids_by_verifier, "draft_id": batch.ids_by_drafter}
    return {
        "index": np.asarray(batch.index)[row], "position": at - 1,
        **{name: ids.cpu().numpy()[mask] for name, ids in of_batch.items()},
        "match": match[mask], "one_step_match": match[mask],
        "cosine": cosine, "one_step_cosine": cosine,
        "accepted": rounds.runs_of(match, gamma)[mask],
        "one_step_rank": np.where(match[mask], 0, drafting.MISSED).astype(np.uint8),
    }


_TYPES = {
    "position": np.int32, "draft_id": np.int32, "verifier_id": np.int32, "match": bool,
    "cosine": np.float64, "draft_probability": np.float64, "accepted": np.int32,
    "one_step_match": bool, "one_step_cosine": np.float64, "one_step_rank": np.uint8,
    "cross_entropy": np.float32,
}


def _joined(pieces: Mapping[str, Sequence[drafting.Columns]],
            clusters: Mapping[int, str]) -> pd.DataFrame:
    """Columns of all levels and batches as one frame; sample is the sample's index."""
    parts = [(number, part) for number, some in enumerate(pieces.values()) for part in some if part]
    if not parts:
        raise MetricError(
            "no batch held a token to predict; check that the evaluation set is not empty")
    whole = pd.concat([pd.DataFrame(part).assign(level=number) for number, part in parts],
                      ignore_index=True)
    index = whole["index"].to_numpy()
    places = pd.Index(clusters).get_indexer(index)
    keys = {"level": pd.Categorical.from_codes(whole["level"], list(pieces)), "sample": index,
            "sequence": _categorical(list(clusters.values()), places)}
    types = {name: dtype for name, dtype in _TYPES.items() if name in whole}
    return pd.DataFrame(keys).join(whole[list(types)].astype(types))


def _categorical(values: Sequence[str], places: np.ndarray) -> pd.Categorical:
    """``values[places]`` as a column that holds each different value once."""
    codes, categories = pd.factorize(np.asarray(values, dtype=object))
    return pd.Categorical.from_codes(codes[places], list(categories))


def join(tables: Mapping[str, pd.DataFrame], name: str = "data") -> pd.DataFrame:
    """Tables of several held-out sets (or runs) as one, with a column that says which."""
    parts = [part.assign(**{name: key}) for key, part in tables.items()]
    whole = pd.concat(parts, ignore_index=True)
    for column in parts[0].select_dtypes("category"):
        whole[column] = pd.api.types.union_categoricals([part[column] for part in parts])
    return whole.astype({name: "category"})


def drafted(tokens: pd.DataFrame) -> pd.DataFrame:
    """The rows that a decode loop drafts: all but the answers' first tokens."""
    return tokens[tokens["position"] >= 0]


def check(tokens: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The table itself, once it is known to hold KEYS and these columns. Raises: MetricError naming
    the missing columns, or when there is no row."""
    missing = [name for name in (*KEYS, *columns) if name not in tokens]
    if missing:
        raise MetricError(f"the token table lacks the column(s) {', '.join(missing)}; it needs "
                          f"{', '.join((*KEYS, *columns))}, one row per token")
    if tokens.empty:
        raise MetricError(
            "the token table has no row; choose a level and a run that were evaluated")
    return tokens


Answers = tuple[pd.DataFrame, list[np.ndarray], np.ndarray]


def answers(tokens: pd.DataFrame, *columns: str) -> Answers:
    """The table answer by answer, as arrays: (about, [column as [N, S] padded with 0, …], inside
    bool [N, S]), positions ascending. about: one row per answer and level in the table's order: run
    and data where there are such columns, level, sample, sequence."""
    keys = [name for name in ("run", "data", "level", "sample") if name in tokens]
    at = tokens["position"].to_numpy()
    codes = [one.cat.codes.to_numpy() if one.dtype == "category" else pd.factorize(one)[0]
             for one in (tokens[name] for name in keys)]
    begins = np.ones(len(tokens), dtype=bool)  # where the row before is of another answer
    begins[1:] = np.any([np.diff(one) != 0 for one in codes], axis=0)
    order, number = slice(None), begins.cumsum() - 1
    firsts = tokens[keys].iloc[np.flatnonzero(begins)]
    if firsts.duplicated().any() or not (begins[1:] | (np.diff(at) > 0)).all():
        number = tokens.groupby(keys, sort=False, observed=True).ngroup().to_numpy()
        order = np.lexsort((at, number))
    lengths = np.bincount(number)
    inside = np.arange(lengths.max(initial=0)) < lengths[:, None]
    grids = []
    for name in columns:
        values = tokens[name].to_numpy()[order]
        grid = np.zeros(inside.shape, dtype=values.dtype)
        grid[inside] = values
        grids.append(grid)
    starts = np.arange(len(tokens))[order][lengths.cumsum() - lengths]
    about = tokens[[*keys, "sequence"]].iloc[starts]
    return about.reset_index(drop=True), grids, inside


def by_level(tokens: pd.DataFrame, *columns: str) -> Iterator[tuple[str, *Answers]]:
    """Each level's name, and its answers."""
    for level, part in tokens.groupby("level", sort=False, observed=True):
        yield str(level), *answers(part, *columns)


def counts(tokens: pd.DataFrame, gamma: int) -> pd.DataFrame:
    """What the paired, clustered bootstrap resamples: one row per answer and level with matched,
    positions, accepted, drafted, bonus, rounds beside level, sample and sequence. gamma: as the
    table was measured with, for levels that feed on themselves."""
    about, (match,), inside = answers(drafted(tokens), "match")
    lengths = inside.sum(axis=1)
    walked = rounds.walk(rounds.runs_of(match, gamma), lengths, gamma)
    return about.assign(matched=match.sum(axis=1), positions=lengths, **walked.per_request())


def answers_as_rows(matches: Sequence[Sequence[bool]], gamma: int, *, level: str = "",
                    first: int = 0, clusters: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows of a drafter without states, a floor say, from its one-step matches: bool [n] for each
    answer, from position ``first`` on. The samples are called by their index."""
    match, lengths = rounds.pad(matches)
    inside = np.arange(match.shape[1]) < lengths[:, None]
    index, at = inside.nonzero()
    part = {"index": index, "position": at + first, "match": match[inside],
            "one_step_match": match[inside], "cosine": np.full(len(at), np.nan),
            "accepted": rounds.runs_of(match, gamma)[inside]}
    return _joined({level: [part]}, dict(enumerate(clusters or map(str, range(len(lengths))))))
