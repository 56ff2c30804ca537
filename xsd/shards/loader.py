"""A stream of shuffled batches over a run folder of any size: read ahead in the background, split
by rank and worker, resumable. One epoch is one numbered sequence of batches (batching.py), whoever
reads it; rank r of W takes every W-th, its DataLoader workers take those in turn."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from xsd.core import Batch, ShardError, at_least_one
from xsd.shards import batching
from xsd.shards import format as layout
from xsd.shards.reader import Memory, ShardReader
from xsd.shards.store import ShardDataset


class Loader(IterableDataset[Batch]):
    """Iterate over an epoch's batches (batching.check_bounds); the next iteration is the next
    epoch, in another order, or goes on where one was broken off. shuffle_seed: None reads in the
    order written. shuffle_buffer: answers from which the next is drawn. drop_uneven: leave out the
    last batches where not every rank gets one. indices: these samples only. prefetch: batches read
    ahead, by so many ``readers`` (threads). dtype: float32, bfloat16 or float16. Raises: ShardError
    for impossible settings or an unreadable file."""

    def __init__(self, dataset: ShardDataset, *, batch_size: int | None = None,
                 tokens_per_batch: int | None = None, max_padding: float | None = None,
                 shuffle_seed: int | None = None, shuffle_buffer: int = 1024, rank: int = 0,
                 world_size: int = 1, drop_uneven: bool = False,
                 indices: Sequence[int] | None = None, prefetch: int = 4, readers: int = 1,
                 dtype: str = "float32") -> None:
        at_least_one(ShardError, shuffle_buffer=shuffle_buffer, world_size=world_size,
                     prefetch=prefetch, readers=readers)
        if not 0 <= rank < world_size:
            raise ShardError(
                f"rank={rank} of world_size={world_size}; expected 0 … {world_size - 1}")
        self.dataset = dataset
        self.bounds = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch,
                       "max_padding": max_padding}
        batching.check_bounds(**self.bounds)
        self.shuffle_seed, self.shuffle_buffer = shuffle_seed, shuffle_buffer
        self.rank, self.world_size, self.drop_uneven = rank, world_size, drop_uneven
        self.prefetch, self.readers, self.dtype = prefetch, readers, dtype
        self.epoch = 0
        self._base = 0  # number of the batch, over all ranks, at which this position began
        self._taken = 0  # batches given out since
        self._by_shard = dataset.by_shard(indices)
        self._part: str | None = None
        if indices is not None or not dataset.is_whole:
            part = json.dumps([list(places) for places in self._by_shard.values()])
            self._part = hashlib.sha256(part.encode()).hexdigest()
        ahead = shuffle_buffer if shuffle_seed is not None else 1
        self._n_open = min(128, 8 + 4 * -(-ahead // dataset.manifest["samples_per_shard"]))
        self._memory: dict[str, Memory] | None = None
        self._reader()  # an unknown dtype is refused here

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}  # worker processes have their own

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch; needed before each one where DataLoader workers read."""
        self.epoch, self._base, self._taken = epoch, 0, 0

    def state(self, taken: int | None = None) -> dict[str, Any]:
        """Where the stream stands, as JSON. taken: batches received from DataLoader workers."""
        taken = self._taken if taken is None else taken
        return {"epoch": self.epoch, "batch": self._base + taken * self.world_size, **self._order()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state()`` was taken, with any number of ranks and workers. Raises:
        ShardError naming the first setting, or the data, that differs."""
        now = self._order()
        if difference := layout.first_difference({key: state.get(key) for key in now}, now):
            what = difference.replace("in the folder", "in the state")
            raise ShardError(f"this position is of another stream: {what}; build the loader with "
                             "the settings and data of the state")
        self.epoch, self._base, self._taken = int(state["epoch"]), int(state["batch"]), 0

    def _order(self) -> dict[str, Any]:
        """Everything that decides which batch has which number, as JSON gives it back."""
        return {**self.bounds, "shuffle_seed": self.shuffle_seed, "part": self._part,
                "shuffle_buffer": self.shuffle_buffer, "data": self.dataset.manifest["digest"]}

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if info is None and self._memory is None:
            self._memory = {role: Memory(self.prefetch + 2) for role in layout.ROLES}
        # A DataLoader's worker sends whole blocks to the main process: just what a batch needs.
        reader = self._reader(self._memory if info is None else None)

        def read(chosen: list[int]) -> Batch:
            return reader.batch([self.dataset.locate(i) for i in chosen], chosen)

        own = islice(self._own(reader), worker, None, n_workers)
        pool = ThreadPoolExecutor(self.readers, thread_name_prefix="shards")
        try:
            pending: deque[Future[Batch]] = deque(
                pool.submit(read, chosen) for chosen in islice(own, self.prefetch))
            while pending:
                batch = pending.popleft().result()
                pending.extend(pool.submit(read, chosen) for chosen in islice(own, 1))
                self._taken += 1
                yield batch
                del batch  # so that it is not held here while the consumer waits for the next
            self.set_epoch(self.epoch + 1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _own(self, reader: ShardReader) -> Iterator[list[int]]:
        """This rank's batches from the present position on."""
        start = self._base + self._taken * self.world_size
        planned = islice(self._planned(reader), start, None)
        while turn := list(islice(planned, self.world_size)):  # a batch for each rank
            if len(turn) > self.rank and not (self.drop_uneven and len(turn) < self.world_size):
                yield turn[self.rank]

    def _planned(self, reader: ShardReader) -> Iterator[list[int]]:
        """The epoch's batches of all ranks, as indices; a shard's offsets are read in its turn."""
        def items_of(number: int) -> Iterator[batching.Item]:
            lengths, chosen = reader.shard(number).lengths, self._by_shard[number]
            return ((index, lengths[self.dataset.locate(index)[1]]) for index in chosen)

        order = batching.shuffled(list(self._by_shard), items_of, seed=self.shuffle_seed,
                                  epoch=self.epoch, buffer=self.shuffle_buffer)
        return batching.batched(order, **self.bounds)

    def _reader(self, memory: Mapping[str, Memory] | None = None) -> ShardReader:
        own = {"dtype": self.dtype, "n_open": self._n_open, "memory": memory,
               "verify": self.dataset.verify}
        return ShardReader(self.dataset.folder, self.dataset.manifest, **own)

    def n_batches(self) -> int:
        """This rank's batches in the present epoch, from its beginning; reads all offsets."""
        n = sum(1 for _ in self._planned(self._reader()))
        return n // self.world_size + (not self.drop_uneven and self.rank < n % self.world_size)

    def memory_bound(self) -> int:
        """Bytes that an iteration holds at most (docs/shards.md, Memory); reads all offsets."""
        reader, shards = self._reader(), self.dataset.manifest["shards"]
        longest = max(max(reader.shard(number).lengths, default=0) for number in self._by_shard)
        positions = min(unit * self.bounds[name]
                        for name, unit in (("batch_size", longest), ("tokens_per_batch", 1))
                        if self.bounds[name] is not None)
        widths = self.dataset.drafter_size + self.dataset.verifier_size
        batch = positions * (widths * reader.dtype.itemsize + 2 * 8 + 1)
        line = longest * widths * layout.TORCH_DTYPES[self.dataset.manifest["dtype"]].itemsize
        scratch = 8 * line  # int8 is widened to float32 twice on the way
        kept = max(2 * 8 * (shard["n_tokens_drafter"] + shard["n_tokens_verifier"]) +
                   200 * shard["n_samples"] + 4096 for shard in shards)
        return ((self.prefetch + 2) * batch + self.readers * scratch +
                min(self._n_open, len(shards)) * kept)
