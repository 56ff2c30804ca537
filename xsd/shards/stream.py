"""Batches from a run folder: shuffled across shards by a seed, padded on the right, float32. For
large runs: loader.Loader."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from xsd.core import Batch, PairedStates, ShardError
from xsd.shards.reader import ShardReader
from xsd.shards.store import ShardDataset


def order_of(n: int, shuffle_seed: int | None, indices: Sequence[int] | None = None) -> list[int]:
    """The positions 0…n-1 (or ``indices``) in reading order: as they are, or permuted by the seed
    alone."""
    order = list(range(n)) if indices is None else [range(n)[int(i)] for i in indices]
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    return order


def batches(dataset: ShardDataset, *, batch_size: int, shuffle_seed: int | None = None,
            indices: Sequence[int] | None = None) -> Iterator[Batch]:
    """The dataset (or its ``indices``) once, ``batch_size`` samples at a time; the last batch may
    be smaller.

    Position t of both models is kept where both have one: in free_running mode a sample has
    min(S_d, S_v) positions. Padding is 0 in states and ids, and False in the mask. Raises:
    ShardError for a batch size below 1.
    """
    if batch_size < 1:
        raise ShardError(f"batch_size={batch_size}; expected at least 1")
    order = order_of(len(dataset), shuffle_seed, indices)
    reader = ShardReader(dataset)
    for start in range(0, len(order), batch_size):
        yield reader.batch(order[start:start + batch_size])


def collate(pairs: Sequence[PairedStates], index: Sequence[int]) -> Batch:
    """Samples to one padded batch. Raises: ShardError if their modes differ."""
    modes = {pair.mode for pair in pairs}
    if len(modes) != 1:
        raise ShardError(
            f"a batch mixes {' and '.join(sorted(modes)) or 'no'} pairs; read one run folder at a "
            "time"
        )
    lengths = [min(len(pair.ids_by_drafter), len(pair.ids_by_verifier)) for pair in pairs]
    padded = {
        name: pad_sequence(
            [getattr(pair, name)[:n]
             for pair, n in zip(pairs, lengths, strict=True)], batch_first=True)
        for name in ("hidden_by_drafter", "hidden_by_verifier", "ids_by_drafter", "ids_by_verifier")
    }
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return Batch(padded["hidden_by_drafter"].float(), padded["hidden_by_verifier"].float(),
                 padded["ids_by_drafter"], padded["ids_by_verifier"], mask,
                 [pair.sequence for pair in pairs], list(index), pairs[0].mode,
                 )
