"""Where training takes its batches from: paired states packed in memory when they fit, streamed
from shards when they do not.

Also the two guards of an honest validation: sequences are never cut in two, and a test split is
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from xsd.core import Batch, PairedStates, TrainingError
from xsd.shards import loader

MEMORY_LIMIT_GB = 4.0
"""Above this, states are streamed from disk every epoch instead of being kept."""


class PackedStates:
    """All answers of a dataset in four flat tensors; a batch is one gather, right-padded with
    zeros.

    drafter: [T, D_d], verifier: [T, D_v], ids_by_drafter, ids_by_verifier: int64 [T], with one zero
    row behind the end for padding.
    manifest: of the shards they were read from, None for anything else.
    """

    manifest: dict[str, Any] | None = None

    def __init__(self, samples: Iterable[PairedStates]) -> None:
        columns: tuple[list[Tensor], ...] = ([], [], [], [])
        self.sequence: list[str] = []
        self.split: list[str] = []
        lengths: list[int] = []
        modes: set[str] = set()
        for sample in samples:
            pieces = (sample.hidden_by_drafter, sample.hidden_by_verifier, sample.ids_by_drafter,
                      sample.ids_by_verifier)
            length = min(len(piece) for piece in pieces)
            for column, piece in zip(columns, pieces, strict=True):
                column.append(piece[:length])
            lengths.append(length)
            modes.add(sample.mode)
            self.sequence.append(sample.sequence)
            self.split.append(sample.split)
        if not any(lengths):
            raise TrainingError(
                "the dataset holds no position to train on; extract some answers first")
        if len(modes) > 1:
            raise TrainingError(
                f"the dataset mixes {' and '.join(sorted(modes))} pairs; train on one mode")
        self.mode = modes.pop()
        packed = [
            torch.cat([*column, column[0].new_zeros(1, *column[0].shape[1:])]) for column in columns
        ]
        self.drafter, self.verifier, self.ids_by_drafter, self.ids_by_verifier = packed
        self.lengths = torch.tensor(lengths)
        self.starts = self.lengths.cumsum(0) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def drafter_size(self) -> int:
        return self.drafter.shape[-1]

    @property
    def hidden_size(self) -> int:
        return self.verifier.shape[-1]

    @property
    def has_token_ids(self) -> bool:
        """False where the source kept no token ids (they read as -1)."""
        return bool((self.ids_by_verifier >= 0).all())

    def fingerprint(self) -> str:
        """Hex digest of every value, so that a resumed run can tell that its data is the same."""
        digest = hashlib.sha256(
            json.dumps([self.sequence, self.lengths.tolist(), self.mode]).encode())
        for tensor in (self.drafter, self.verifier, self.ids_by_verifier):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def batches(self, indices: Tensor, batch_size: int, *,
                shuffle_seed: int | None = None) -> Iterator[Batch]:
        """The samples ``indices`` in batches; shuffled by the seed, else in the given order. Empty
        answers are left out."""
        indices = indices[self.lengths[indices] > 0]
        if shuffle_seed is not None:
            indices = indices[torch.randperm(len(indices),
                                             generator=torch.Generator().manual_seed(shuffle_seed))]
        end = len(self.drafter) - 1
        for start in range(0, len(indices), batch_size):
            chosen = indices[start:start + batch_size]
            steps = torch.arange(int(self.lengths[chosen].max()))
            mask = steps < self.lengths[chosen, None]
            rows = torch.where(mask, self.starts[chosen, None] + steps, end).flatten()
            columns = (self.drafter, self.verifier, self.ids_by_drafter, self.ids_by_verifier)
            drafter, verifier, *ids = (column.index_select(0, rows).unflatten(0, mask.shape)
                                       for column in columns)
            names = [self.sequence[i] for i in chosen.tolist()]
            yield Batch(drafter.float(), verifier.float(), *ids, mask, names, chosen.tolist(),
                        self.mode)


class StreamedStates:
    """A shard dataset too large for memory, through shards.loader, which reads ahead; the same face
    as PackedStates."""
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        table = dataset.table()
        self.sequence, self.split = list(table["sequence"]), list(table["split"])
        first = dataset[0]
        self.drafter_size, self.hidden_size = first.hidden_by_drafter.shape[
            -1], first.hidden_by_verifier.shape[-1]
        self.mode, self.manifest = dataset.mode, dataset.manifest
        self.has_token_ids = dataset.has_token_ids

    def __len__(self) -> int:
        return len(self.sequence)

    def fingerprint(self) -> str:
        """Hex digest of the manifest, which holds the shards' checksums, and of what part of it
        this is."""
        table = self.dataset.table()
        part = [list(table[name]) for name in ("sequence", "clip", "question")]
        return hashlib.sha256(
            json.dumps([self.manifest, part], sort_keys=True, default=str).encode()).hexdigest()

    def batches(self, indices: Tensor, batch_size: int, *,
                shuffle_seed: int | None = None) -> Iterator[Batch]:
        """As PackedStates.batches, read from disk a few batches ahead; shuffled shard by shard, so
        in another order than packed states."""
        yield from loader.Loader(self.dataset, batch_size=batch_size, shuffle_seed=shuffle_seed,
                                 indices=indices.tolist(), prefetch=2)


States = PackedStates | StreamedStates


def ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches in the same order, each one made while the one before it is used."""
    iterator = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, iterator, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, iterator, None)
            yield batch


def unpad(batches: Iterable[Batch]) -> Iterator[PairedStates]:
    """The samples of padded batches, one by one (question and clip are not in a batch and stay
    empty)."""
    for batch in batches:
        for row, name in enumerate(batch.sequence):
            real = batch.mask[row]
            yield PairedStates(name, str(batch.index[row]), "", batch.drafter[row][real],
                               batch.verifier[row][real], batch.ids_by_drafter[row][real],
                               batch.ids_by_verifier[row][real], batch.mode,
                               )  # fmt: skip


def open_states(dataset: Any, *, memory_limit_gb: float = MEMORY_LIMIT_GB) -> States:
    """PackedStates of a shard dataset, a sequence of PairedStates or a list of Batch;
    StreamedStates of a shard dataset that is too large.

    Raises: TrainingError when there is nothing in it or part of it is of the test split.
    """
    if isinstance(dataset, PackedStates | StreamedStates):
        states: States = dataset
    elif len(dataset) == 0:
        raise TrainingError("the dataset is empty; extract some answers first")
    elif hasattr(dataset, "manifest") and _gigabytes(dataset) > memory_limit_gb:
        states = StreamedStates(dataset)
    elif isinstance(dataset[0], Batch):
        states = PackedStates(unpad(dataset))
    else:
        states = PackedStates(dataset[i] for i in range(len(dataset)))
        states.manifest = getattr(dataset, "manifest", None)
    refuse_test_split(states.split)
    return states


def _gigabytes(dataset: Any) -> float:
    """Estimate from the first sample's bytes."""
    first = dataset[0]
    return len(dataset) * sum(t.numel() * t.element_size()
                              for t in (first.hidden_by_drafter, first.hidden_by_verifier)) / 1e9


def refuse_test_split(split: Sequence[str]) -> None:
    """Raises: TrainingError when any sample is labelled "test": what selects a checkpoint cannot
    also judge it."""
    n = sum(label.strip().lower() == "test" for label in split)
    if n:
        raise TrainingError(
            f"{n} of {len(split)} samples are of the test split, which may not train or stop "
            "anything; pass the train split's shards"
        )


def split_by_sequence(sequence: Sequence[str], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training indices, validation indices), whole sequences each; about ``share`` of the samples,
    at least one sequence, validate.

    Raises: TrainingError when there is only one sequence: neighbouring clips overlap, so cutting
    one would leak.
    """
    names = sorted(set(sequence))
    if len(names) < 2:
        raise TrainingError(
            f"all samples come from one sequence ({names[0]}), which cannot be cut into training "
            "and validation; extract a second one"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held: set[str] = set()
    for index in order[:-1]:
        held.add(names[index])
        if sum(name in held for name in sequence) >= share * len(sequence):
            break
    chosen = torch.tensor([name in held for name in sequence])
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def digest(tensors: Iterable[Tensor]) -> str:
    """Hex digest over the values of some tensors, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
