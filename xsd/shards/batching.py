"""Which answers are read in what order, and which share a batch: a function of (seed, epoch,
lengths) alone, so that a stream can be taken up again at any batch (docs/shards.md, Streaming)."""

import bisect
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from xsd.core import ShardError, at_least_one

Item = tuple[int, int]
"""(index in the dataset, positions both models have)."""


def check_bounds(batch_size: int | None = None, tokens_per_batch: int | None = None,
                 max_padding: float | None = None) -> None:
    """What a batch may hold: answers, and positions with padding, at most; max_padding: the share
    of positions that padding stays below (None: any). Raises: ShardError for no possible batch."""
    if batch_size is None and tokens_per_batch is None:
        raise ShardError("a batch needs a bound; give batch_size (answers), tokens_per_batch "
                         "(positions with padding), or both")
    at_least_one(ShardError, batch_size=batch_size, tokens_per_batch=tokens_per_batch)
    if max_padding is not None and not 0 <= max_padding < 1:
        raise ShardError(f"max_padding={max_padding}; expected a share in [0, 1), or None for "
                         "batches of any lengths")


def shuffled(shards: Sequence[int], items_of: Callable[[int], Iterable[Item]], *, seed: int | None,
             epoch: int, buffer: int) -> Iterator[Item]:
    """Every item of the shards once; ``items_of`` is called when a shard's turn comes. The shards
    are drawn, and each item from a buffer of so many; seed None gives them as they stand."""
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
    """Indices of one batch after another, each when it is full, at the end what is left, shortest
    first. Raises: ShardError for an answer longer than tokens_per_batch."""
    most, room = (math.inf if bound is None else bound for bound in (batch_size, tokens_per_batch))
    edges = [1]
    open_batches: dict[int, tuple[list[int], int]] = {}  # by range: indices, the longest of them

    def full(chosen: list[int], longest: int) -> bool:
        return len(chosen) >= most or (len(chosen) + 1) * longest > room

    for index, length in items:
        if length < 1:
            continue
        if length > room:
            raise ShardError(
                f"sample {index} has {length} positions but tokens_per_batch={tokens_per_batch}; "
                "allow at least as many as the longest answer has")
        place = 0 if max_padding is None else _range_of(length, edges, max_padding)
        chosen, longest = open_batches.pop(place, ([], 0))
        longest = max(longest, length)
        if full(chosen, longest):
            yield chosen
            chosen, longest = [], length
        chosen.append(index)
        if full(chosen, longest):
            yield chosen
        else:
            open_batches[place] = chosen, longest
    for place in sorted(open_batches):
        yield open_batches[place][0]


def _range_of(length: int, edges: list[int], max_padding: float) -> int:
    """The range of lengths (edge k-1, edge k] that holds ``length``; edges are added as needed.
    Edge k ≤ edge k-1 / (1 - max_padding), so shortest / longest > 1 - max_padding in each."""
    while edges[-1] < length:
        edges.append(max(edges[-1] + 1, int(edges[-1] * (1 / (1 - max_padding)))))
    return bisect.bisect_left(edges, length)
