"""Reading batches straight from shard files: one positioned read an answer and model, into the
padded batch itself.

Nothing is mapped and no shard is held: what a reader keeps of a shard are its offsets, ids, scales
and sequence names (8 to 40 bytes a position, where the states have thousands). Any number of
threads may read at the same time.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from xsd.core import Batch, ShardError
from xsd.shards import format as layout
from xsd.shards.store import ShardDataset

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What states may be delivered in."""
_SAFETENSORS = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8,
    "I64": torch.int64
}
_WAY_OUT = "run verify and repair, or extract again"

SCRATCH = 1 << 20
"""Bytes that are read before they are converted: few enough to be still in the processor's cache
then."""


class ShardFile:
    """One open shard: where its tensors lie, and its offsets. Raises: ShardError naming the file
    when it is no such shard.

    stored, widths: dtype and width of the states by role, as the manifest has them. lengths:
    positions that both models have, a sample.
    """
    def __init__(self, path: Path, metadata_path: Path, stored: torch.dtype,
                 widths: Mapping[str, int]) -> None:
        self.path, self._metadata_path = path, metadata_path
        self._columns: dict[str, np.ndarray] = {}
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close,
                             self._file)  # closed once no thread reads from it any more
            size = int.from_bytes(os.pread(self._file, 8, 0), "little")
            header = json.loads(os.pread(self._file, size, 8)) if size < os.fstat(
                self._file).st_size else {}
            self._tensors = {
                name: (_SAFETENSORS[entry["dtype"]], list(entry["shape"]),
                       8 + size + int(entry["data_offsets"][0])) for name, entry in header.items()
                if name != "__metadata__"
            }
            self.offsets = {
                role: self.column(f"offsets_{role}").astype(np.int64).tolist()
                for role in layout.ROLES
            }
            found = {role: self._tensors[f"hidden_by_{role}"] for role in layout.ROLES}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path} cannot be read ({error!r}); {_WAY_OUT}") from error
        for role, (dtype, shape, _) in found.items():
            steps = np.diff(self.offsets[role])
            if (dtype, shape) != (stored, [self.offsets[role][-1], widths[role]
                                           ]) or self.offsets[role][0] != 0 or bool(
                                               (steps < 0).any()):
                raise ShardError(
                    f"{path} holds states of the {role} that fit neither its offsets nor the "
                    f"manifest; {_WAY_OUT}"
                )
        self.lengths: list[int] = np.minimum(*(np.diff(self.offsets[role])
                                               for role in layout.ROLES)).tolist()

    def read(self, view: memoryview, name: str, row: int, row_bytes: int) -> None:
        """Fill ``view`` from a tensor's ``row`` on."""
        place = self._tensors[name][2] + row * row_bytes
        while len(view):
            n = os.preadv(self._file, [view], place)
            if n == 0:
                raise ShardError(f"{self.path} ends after {place} bytes, inside {name}; {_WAY_OUT}")
            place, view = place + n, view[n:]

    def column(self, name: str) -> np.ndarray:
        """A small tensor of one number a position (or sample), read once."""
        if name in self._columns:
            return self._columns[name]
        if name not in self._tensors or len(self._tensors[name][1]) != 1:
            raise ShardError(f"{self.path} holds no {name} as a list of numbers; {_WAY_OUT}")
        dtype, (n,), _ = self._tensors[name]
        out = torch.empty(n, dtype=dtype).numpy()
        if n:
            self.read(memoryview(out).cast("B"), name, 0, out.itemsize)
        self._columns[name] = out
        return out

    @functools.cached_property
    def sequence(self) -> list[str]:
        """The sequence of each sample."""
        try:
            return pq.read_table(self._metadata_path, columns=["sequence"],
                                 use_threads=False)["sequence"].to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ShardError(
                f"{self._metadata_path} cannot be read ({error}); {_WAY_OUT}") from error


class Memory:
    """Blocks of memory used again as soon as no tensor stands on them any more: new memory costs
    more than filling it.

    At most ``n_blocks`` are kept; all are as large as the largest that was asked for.
    """
    def __init__(self, n_blocks: int) -> None:
        self._n_blocks, self._size = n_blocks, 0
        self._free: deque[np.ndarray] = deque()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        n = math.prod(shape) * dtype.itemsize
        self._size = max(self._size, n)
        block = None
        while block is None or len(block) < n:
            try:
                block = self._free.popleft()
            except IndexError:
                block = torch.empty(self._size, dtype=torch.uint8).numpy()
        lent = block[:]
        weakref.finalize(
            lent, self._give_back,
            block).atexit = False  # torch keeps ``lent`` for as long as a tensor uses it
        return torch.from_numpy(lent)[:n].view(dtype).view(*shape)

    def _give_back(self, block: np.ndarray) -> None:
        if len(self._free) < self._n_blocks and len(block) == self._size:
            self._free.append(block)


class ShardReader:
    """Padded batches of a dataset by index; keeps the ``n_open`` shards used last open. dtype: a
    key of ``DTYPES``.

    memory: where the states' tensors are taken from, by role; None for new ones.
    """
    def __init__(self, dataset: ShardDataset, *, dtype: str = "float32", n_open: int = 16,
                 memory: Mapping[str, Memory] | None = None) -> None:
        if dtype not in DTYPES:
            raise ShardError(f"dtype={dtype!r}; states are delivered as one of {', '.join(DTYPES)}")
        self.dataset, self.dtype, self.n_open, self.memory = dataset, DTYPES[dtype], n_open, memory
        self._stored = layout.TORCH_DTYPES[dataset.manifest["dtype"]]
        self._widths = {"drafter": dataset.drafter_size, "verifier": dataset.verifier_size}
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, number: int) -> ShardFile:
        """A shard by its number in the manifest."""
        with self._lock:
            if number not in self._open:
                paths = (self.dataset.folder / self.dataset.manifest["shards"][number][name]
                         for name in ("file", "metadata_file"))
                self._open[number] = ShardFile(*paths, self._stored, self._widths)
                while len(self._open) > self.n_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def batch(self, index: Sequence[int]) -> Batch:
        """The samples at these indices, as ``stream.collate`` pads them: positions that both models
        have, 0 and False behind.

        drafter, verifier: [B, S, D] of the chosen dtype. Raises: ShardError naming a file that
        cannot be read.
        """
        places = [self.dataset.locate(i) for i in index]
        rows = [(self.shard(number), row) for number, row in places]
        lengths = [file.lengths[row] for file, row in rows]
        shape = len(rows), max(lengths)
        ids = {role: np.zeros(shape, dtype=np.int64) for role in layout.ROLES}
        for role, lines in ids.items():
            for line, (file, row), n in zip(lines, rows, lengths, strict=True):
                start = file.offsets[role][row]
                line[:n] = file.column(f"ids_by_{role}")[start:start + n]
        return Batch(self._states("drafter", rows,
                                  lengths), self._states("verifier", rows, lengths),
                     torch.from_numpy(ids["drafter"]), torch.from_numpy(ids["verifier"]),
                     torch.from_numpy(np.arange(shape[1]) < np.array(lengths)[:, None]),
                     [file.sequence[row] for file, row in rows], list(index), self.dataset.mode,
                     )

    def _states(self, role: str, rows: Sequence[tuple[ShardFile, int]],
                lengths: Sequence[int]) -> Tensor:
        """[B, S, D] of one model: read as stored, a group of rows at a time where they must be
        converted."""
        longest, width = max(lengths), self._widths[role]
        shape = (len(rows), longest, width)
        out = torch.empty(shape,
                          dtype=self.dtype) if self.memory is None else self.memory[role].take(
                              shape, self.dtype)
        row_bytes = width * self._stored.itemsize
        line_bytes = longest * row_bytes
        direct = self._stored == self.dtype
        group = len(rows) if direct else max(1, min(len(rows), SCRATCH // max(1, line_bytes)))
        target = out if direct else torch.empty(group, longest, width, dtype=self._stored)
        scales = torch.zeros(group, longest) if self._stored == torch.int8 else None
        data = target.view(torch.uint8).numpy().reshape(-1)
        view = memoryview(data)
        for first in range(0, len(rows), group):
            part = rows[first:first + group]
            for at, ((file, row),
                     n) in enumerate(zip(part, lengths[first:first + group], strict=True)):
                start, line, end = file.offsets[role][
                    row], at * line_bytes, at * line_bytes + n * row_bytes
                file.read(view[line:end], f"hidden_by_{role}", start, row_bytes)
                data[end:line + line_bytes] = 0
                if scales is not None:
                    scales[at, :n] = torch.from_numpy(
                        file.column(f"scale_by_{role}")[start:start + n])
            if scales is not None:
                decoded = layout.decode_states(target[:len(part)].flatten(0, 1),
                                               scales[:len(part)].flatten())
                out[first:first + group] = decoded.view(len(part), longest, width)
            elif not direct:
                out[first:first + group] = target[:len(part)]
        return out
