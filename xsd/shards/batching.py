"""Which answers are read in what order, and which of them share a batch: numbers only, no state is
touched.

    shards, in an order drawn by the seed       3 │ 0 │ 2 │ 1
    a buffer of shuffle_buffer answers          [ . . . . ]  one is drawn, the next takes its place
    a bucket per range of lengths               1 │ 2 │ 3–4 │ 5–6 │ …     a batch is of one bucket

An epoch is a function of (seed, epoch, lengths) alone. That is what makes it the same for any
number of ranks and workers, and what lets a stream be taken up again at any batch.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from xsd.core import ShardError

Item = tuple[int, int]
"""(index in the dataset, positions both models have)."""


def check_bounds(batch_size: int | None = None, tokens_per_batch: int | None = None,
                 max_padding: float | None = None) -> None:
    """What a batch may hold. Raises: ShardError for values that allow no batch.

    batch_size: answers at most. tokens_per_batch: positions at most, padding included (answers ×
    the longest of them). max_padding: share of a batch's positions that padding stays below, in
    [0, 1); None does not look at lengths.
    """
    bounds = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch}
    if batch_size is None and tokens_per_batch is None:
        raise ShardError("a batch needs a bound; give batch_size (answers), tokens_per_batch "
                         "(positions with padding), or both")
    for name, value in bounds.items():
        if value is not None and value < 1:
            raise ShardError(f"{name}={value}; expected at least 1")
    if max_padding is not None and not 0 <= max_padding < 1:
        raise ShardError(f"max_padding={max_padding}; expected a share in [0, 1), or None for "
                         "batches of any lengths")


def shuffled(shards: Sequence[int], items_of: Callable[[int], Iterable[Item]], *, seed: int | None,
             epoch: int, buffer: int) -> Iterator[Item]:
    """Every item of the shards once; ``items_of`` is called when a shard's turn comes.

    seed: None gives them as they stand.
    """
    if seed is None:
        for shard in shards:
            yield from items_of(shard)
        return
    draw = random.Random(f"{seed}/{epoch}")
    order = list(shards)
    draw.shuffle(order)
    held: list[Item] = []
    for item in (item for shard in order for item in items_of(shard)):
        if len(held) < buffer:
            held.append(item)
            continue
        place = draw.randrange(buffer)
        out, held[place] = held[place], item
        yield out
    draw.shuffle(held)
    yield from held


def batched(items: Iterable[Item], *, batch_size: int | None = None,
            tokens_per_batch: int | None = None,
            max_padding: float | None = None) -> Iterator[list[int]]:
    """Indices of one batch after another, bounded as in :func:`check_bounds`; each is given out
    when it is full, what is left of the buckets at the end, shortest first.

    Answers without a position are left out. Raises: ShardError for an answer longer than
    tokens_per_batch.
    """
    def too_many(n: int, longest: int) -> bool:
        return ((batch_size is not None and n > batch_size) or
                (tokens_per_batch is not None and n * longest > tokens_per_batch))

    edges = [1]
    open_batches: dict[int, tuple[list[int], int]] = {}  # by bucket: indices, the longest of them
    for index, length in items:
        if length < 1:
            continue
        if tokens_per_batch is not None and length > tokens_per_batch:
            raise ShardError(
                f"sample {index} has {length} positions but tokens_per_batch={tokens_per_batch}; "
                "allow at least as many as the longest answer has")
        bucket = 0 if max_padding is None else _bucket(length, edges, max_padding)
        chosen, longest = open_batches.pop(bucket, ([], 0))
        longest = max(longest, length)
        if too_many(len(chosen) + 1, longest):
            yield chosen
            chosen, longest = [], length
        chosen.append(index)
        if too_many(len(chosen) + 1, longest):
            yield chosen
        else:
            open_batches[bucket] = chosen, longest
    for bucket in sorted(open_batches):
        yield open_batches[bucket][0]


def _bucket(length: int, edges: list[int], max_padding: float) -> int:
    """The range of lengths (edge k-1, edge k] that holds ``length``; edges are added as needed.

    Edge k ≤ edge k-1 / (1 - max_padding), so shortest / longest > 1 - max_padding in each range.
    """
    while edges[-1] < length:
        edges.append(max(edges[-1] + 1, int(edges[-1] * (1 / (1 - max_padding)))))
    return bisect.bisect_left(edges, length)
