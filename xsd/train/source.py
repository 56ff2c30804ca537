"""Where training takes its batches from: paired states packed in memory when they fit, streamed
from shards when they do not. Validation is whole sequences; a test split is refused."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from xsd.core import Batch, PairedStates, TrainingError
from xsd.shards import chunks, loader

MEMORY_LIMIT_GB = 4.0
"""Above this, states are streamed from disk every epoch instead of being kept."""
_NOTHING = "the dataset holds no position to train on; extract some answers first"
COLUMNS = ("drafter", "verifier", "ids_by_drafter", "ids_by_verifier")


class _States:
    """What both kinds of sources share. dataset: the shards they are of, None for others."""

    dataset: Any = None

    @property
    def context_layers(self) -> dict[str, list[int]]:
        """The layers whose contexts are stored beside the pairs, by role. Raises: ShardError for
        none, TrainingError for pairs that are on no disk."""
        if self.dataset is None:
            raise TrainingError("block drafters (D1, D2, D5F) read contexts, which are stored "
                                "beside shards; give a shard dataset")
        return self.dataset.contexts.layers

    def with_context(self, batch: Batch, wanted: Mapping[str, Sequence[int]]) -> Batch:
        """A batch with what a block drafter reads besides (base.Adapter.context_layers)."""
        return self.dataset.with_context(batch, wanted) if wanted else batch


class PackedStates(_States):
    """All answers of a dataset in four flat tensors (COLUMNS: [T, D_d], [T, D_v], int64 [T] twice,
    with one zero row behind the end for padding); a batch is one gather, right-padded with zeros.
    manifest: of the shards they were read from, else None."""

    manifest: dict[str, Any] | None = None

    def __init__(self, samples: Iterable[PairedStates]) -> None:
        held = list(samples)
        self.sequence, self.split = [one.sequence for one in held], [one.split for one in held]
        answers = [(one.hidden_by_drafter, one.hidden_by_verifier, one.ids_by_drafter,
                    one.ids_by_verifier) for one in held]
        lengths = [min(map(len, answer)) for answer in answers]
        modes = {one.mode for one in held}
        if not any(lengths):
            raise TrainingError(_NOTHING)
        if len(modes) > 1:
            raise TrainingError(
                f"the dataset mixes {' and '.join(sorted(modes))} pairs; train on one mode")
        self.mode = modes.pop()
        columns = (torch.cat([*(one[:n] for one, n in zip(column, lengths, strict=True)),
                              column[0].new_zeros(1, *column[0].shape[1:])])
                   for column in zip(*answers, strict=True))
        self._keep(columns, torch.tensor(lengths))

    def _keep(self, columns: Iterable[Tensor], lengths: Tensor) -> None:
        self.drafter, self.verifier, self.ids_by_drafter, self.ids_by_verifier = columns
        self.drafter_size, self.hidden_size = self.drafter.shape[-1], self.verifier.shape[-1]
        self.lengths, self.starts = lengths, lengths.cumsum(0) - lengths

    @classmethod
    def of_shards(cls, dataset: Any) -> Self:
        """The same of a shard dataset, filled batch by batch: half the memory."""
        self, table = cls.__new__(cls), dataset.table()
        self.dataset = dataset
        self.manifest, self.mode = dataset.manifest, dataset.mode
        self.sequence, self.split = list(table["sequence"]), list(table["split"])
        counts = table[["n_tokens_drafter", "n_tokens_verifier"]].min(axis=1)
        end, at = int(counts.sum()), 0
        if not end:
            raise TrainingError(_NOTHING)
        columns = (torch.zeros(end + 1, dataset.drafter_size),
                   torch.zeros(end + 1, dataset.verifier_size),
                   *torch.zeros(2, end + 1, dtype=torch.int64))
        for batch in dataset.batches(256):
            n = int(batch.mask.sum())
            for column, name in zip(columns, COLUMNS, strict=True):
                column[at:at + n] = getattr(batch, name)[batch.mask]
            at += n
        self._keep(columns, torch.from_numpy(counts.to_numpy().copy()))
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def has_token_ids(self) -> bool:
        """False where the source kept no token ids (they read as -1)."""
        return bool((self.ids_by_verifier >= 0).all())

    def fingerprint(self) -> str:
        """Hex digest of every value, so that a resumed run can tell that its data is the same."""
        about = json.dumps([self.sequence, self.lengths.tolist(), self.mode])
        return digest((self.drafter, self.verifier, self.ids_by_verifier), about)

    def batches(self, indices: Tensor, batch_size: int, *,
                shuffle_seed: int | None = None) -> Iterator[Batch]:
        """The samples ``indices``, shuffled by the seed or as given; empty ones are left out."""
        indices = indices[self.lengths[indices] > 0]
        if shuffle_seed is not None:
            draw = torch.Generator().manual_seed(shuffle_seed)
            indices = indices[torch.randperm(len(indices), generator=draw)]
        end = len(self.drafter) - 1
        for chosen in indices.split(batch_size) if len(indices) else ():
            steps = torch.arange(int(self.lengths[chosen].max()))
            mask = steps < self.lengths[chosen, None]
            rows = torch.where(mask, self.starts[chosen, None] + steps, end).flatten()
            drafter, verifier, *ids = (
                getattr(self, name).index_select(0, rows).unflatten(0, mask.shape)
                for name in COLUMNS)
            yield Batch(drafter.float(), verifier.float(), *ids, mask,
                        [self.sequence[i] for i in chosen.tolist()], chosen.tolist(), self.mode)


class StreamedStates(_States):
    """A shard dataset too large for memory, through shards.loader; used like PackedStates."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.mode, self.manifest = dataset, dataset.mode, dataset.manifest
        table = dataset.table()
        self.sequence, self.split = list(table["sequence"]), list(table["split"])
        self.drafter_size, self.hidden_size = dataset.drafter_size, dataset.verifier_size
        self.has_token_ids = dataset.has_token_ids

    def __len__(self) -> int:
        return len(self.sequence)

    def fingerprint(self) -> str:
        """Hex digest of the manifest, which holds the shards' checksums, and of the part it is."""
        table = self.dataset.table()
        part = [list(table[name]) for name in ("sequence", "clip", "question")]
        text = json.dumps([self.manifest, part], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def batches(self, indices: Tensor, batch_size: int, *,
                shuffle_seed: int | None = None) -> Iterator[Batch]:
        """As PackedStates.batches, read a few ahead; shuffled shard by shard."""
        yield from loader.Loader(self.dataset, batch_size=batch_size, shuffle_seed=shuffle_seed,
                                 indices=indices.tolist(), prefetch=2)


States = PackedStates | StreamedStates


def open_states(dataset: Any, *, memory_limit_gb: float = MEMORY_LIMIT_GB) -> States:
    """PackedStates of a shard dataset, a sequence of PairedStates or a list of Batch;
    StreamedStates of a shard dataset that is too large (by its first sample's bytes). Raises:
    TrainingError when there is nothing in it or part of it is of the test split."""
    if isinstance(dataset, States):
        states: States = dataset
    elif len(dataset) == 0:
        raise TrainingError("the dataset is empty; extract some answers first")
    elif isinstance(first := dataset[0], Batch):
        states = PackedStates(_unpad(dataset))
    elif not hasattr(dataset, "manifest"):
        states = PackedStates(dataset)
    else:
        size = first.hidden_by_drafter.nbytes + first.hidden_by_verifier.nbytes
        large = len(dataset) * size / 1e9 > memory_limit_gb
        states = StreamedStates(dataset) if large else PackedStates.of_shards(dataset)
    refuse_test_split(states.split)
    return states


def _unpad(batches: Iterable[Batch]) -> Iterator[PairedStates]:
    """The samples of padded batches, one by one (question and clip are not in a batch)."""
    for batch in batches:
        for row, name in enumerate(batch.sequence):
            columns = (getattr(batch, column)[row][batch.mask[row]] for column in COLUMNS)
            yield PairedStates(name, str(batch.index[row]), "", *columns, batch.mode)


def ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches in the same order, each one made while the one before it is used."""
    iterator = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, iterator, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, iterator, None)
            yield batch


def refuse_test_split(split: Sequence[str]) -> None:
    """Raises: TrainingError when any sample is labelled "test"."""
    if n := sum(label.strip().lower() == "test" for label in split):
        raise TrainingError(f"{n} of {len(split)} samples are of the test split, which may not "
                            "train or stop anything; pass the train split's shards")


def split_by_sequence(sequence: Sequence[str], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training indices, validation indices), whole sequences each; about ``share`` of the samples,
    at least one sequence, validate. Imported chunks that name none are cut once, with a warning.
    Raises: TrainingError when there is only one sequence: neighbouring clips overlap, so cutting
    one would leak."""
    names, size = sorted(set(sequence)), len(sequence)
    if names == [chunks.UNKNOWN] and size > 1:
        cut = size - max(1, round(share * size))
        warnings.warn(f"the pairs do not name their sequences, so their last {size - cut} validate"
                      "; clips at the cut may overlap (xsd data import-chunks --data names them)",
                      stacklevel=2)
        return torch.arange(cut), torch.arange(cut, size)
    if len(names) < 2:
        raise TrainingError(f"all samples come from one sequence ({names[0]}), which cannot be cut "
                            "into training and validation; extract a second one")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held: set[str] = set()
    for index in order[:-1]:
        held.add(names[index])
        if sum(name in held for name in sequence) >= share * size:
            break
    chosen = torch.tensor([name in held for name in sequence])
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def digest(tensors: Iterable[Tensor], about: str = "") -> str:
    """Hex digest over a text and the values of some tensors, in order."""
    found = hashlib.sha256(about.encode())
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
