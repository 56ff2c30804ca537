"""Reading straight from shard files: one positioned read per answer and model, into the padded
batch itself; only offsets, ids, scales and names are kept. Any number of threads may read."""

import functools
import hashlib
import json
import math
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from xsd.core import Batch, ShardError, reading
from xsd.shards import format as layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What states may be delivered in."""
HEADER, TEXT = 1 << 20, 1 << 20
"""Largest header of a shard, in bytes (ours have less than 1 kB), and texts of a sample."""
_SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
                "I8": torch.int8, "I64": torch.int64}


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, uint8 [bytes], to be filled."""
    return tensor.view(-1).view(torch.uint8).numpy()


def read_checked(folder: Path, entry: Mapping[str, Any], prefix: str = "", *,
                 verify: bool = True) -> bytes:
    """A small file that the manifest has an entry of. Raises: ShardError where it is another."""
    path = folder / entry[f"{prefix}file"]
    with reading(f"{path} cannot be read", ShardError, layout.REPAIR), open(path, "rb") as file:
        data = file.read(entry[f"{prefix}bytes"] + 1)
    if verify and hashlib.sha256(data).hexdigest() != entry[f"{prefix}sha256"]:
        raise ShardError(f"{path} does not match its checksum; {layout.REPAIR}")
    return data


def read_metadata(folder: Path, entry: Mapping[str, Any], columns: list[str] | None = None, *,
                  verify: bool = True) -> pa.Table:
    """Of a shard, one line per sample. Raises: ShardError naming a file that cannot be read, is of
    another form, or would need more memory than such lines do."""
    data = read_checked(folder, entry, "metadata_", verify=verify)
    with reading(f"{folder / entry['metadata_file']} cannot be read", ShardError, layout.REPAIR):
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(layout.TEXT_COLUMNS))
        about, names = file.metadata, file.schema_arrow.names
        packed = {about.row_group(i).column(j).compression for i in range(about.num_row_groups)
                  for j in range(about.num_columns)}
        kinds = [getattr(kind, "value_type", kind) for kind in file.schema_arrow.types]
        if about.num_rows != entry["n_samples"] or not packed <= {"SNAPPY", "UNCOMPRESSED"} or (
                names != layout.SCHEMA.names) or kinds != layout.SCHEMA.types:
            raise ValueError(f"{about.num_rows} lines of {', '.join(names)[:200]}")
        found = file.read(columns, use_threads=False)
        totals = [entry[name] - pc.sum(found[name]).as_py() for name in found.column_names
                  if name in entry]
        if any(column.null_count for column in found.columns) or any(totals):
            raise ValueError("a line lacks a value, or counts other tokens than the manifest")
        size = sum(pc.sum(pc.binary_length(part.dictionary).take(part.indices)).as_py() or 0
                   for column in found.columns for part in column.chunks
                   if pa.types.is_dictionary(part.type))
        if size > TEXT * (16 + len(found)):
            raise ValueError(f"{size >> 20} MB of text")
        kept = [layout.SCHEMA.field(name) for name in found.column_names]
        return found.replace_schema_metadata().cast(pa.schema(kept))


_checked: set[tuple[Any, ...]] = set()
"""What open files were when this process compared them with their checksums."""


class ShardFile:
    """One open shard. offsets: by role. lengths: per sample, positions that both models have.
    stored, widths: what the manifest says. vocabulary: by role, what ids stay below. verify:
    compare its checksum, once a process. Raises: ShardError for a file that is no such shard."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], stored: torch.dtype,
                 widths: Mapping[str, int], vocabulary: Mapping[str, int],
                 verify: bool = True) -> None:
        self.path = path = folder / entry["file"]
        self._metadata = functools.partial(read_metadata, folder, entry, verify=verify)
        self._columns: dict[str, np.ndarray] = {}
        self._vocabulary = vocabulary
        with reading(f"{path} cannot be read", ShardError, layout.REPAIR):
            self._file = os.open(path, os.O_RDONLY)
            # closed once no thread reads from it any more
            weakref.finalize(self, os.close, self._file)
            about = os.fstat(self._file)
            seen = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, entry["sha256"]
            if verify and seen not in _checked:
                with open(self._file, "rb", buffering=0, closefd=False) as whole:
                    if hashlib.file_digest(whole, "sha256").hexdigest() != entry["sha256"]:
                        raise ShardError(f"{path} does not match its checksum; {layout.REPAIR}")
                _checked.add(seen)
            size = int.from_bytes(os.pread(self._file, 8, 0), "little")
            end = about.st_size
            header = json.loads(os.pread(self._file, size, 8)) if size < min(end, HEADER) else {}
            header.pop("__metadata__", None)
            self._tensors = {name: _tensor(one, 8 + size, end) for name, one in header.items()}
            self.offsets: dict[str, list[int]] = {
                role: self.column(f"offsets_{role}").tolist() for role in layout.ROLES}
            found = {role: self._tensors[f"hidden_by_{role}"] for role in layout.ROLES}
        steps = {role: np.diff(self.offsets[role]) for role in layout.ROLES}
        for role, (dtype, shape, _) in found.items():
            n, start = entry[f"n_tokens_{role}"], self.offsets[role][:1]
            # int8 has a scale each; every position has an id
            columns = [f"{name}_by_{role}" for name in ("ids", "scale")[:1 + (dtype.itemsize == 1)]]
            long = [self._tensors.get(name, (0, []))[1] == [n] for name in columns]
            fits = (dtype, shape, start, self.offsets[role][-1:], len(steps[role])) == (
                stored, [n, widths[role]], [0], [n], entry["n_samples"])
            if not fits or not all(long) or bool((steps[role] < 0).any()):
                raise ShardError(f"{path} holds states of the {role} that fit neither its offsets "
                                 f"nor the manifest; {layout.REPAIR}")
        self.lengths: list[int] = np.minimum(*steps.values()).tolist()

    def read(self, target: np.ndarray, name: str, row: int, row_bytes: int) -> None:
        """Fill ``target`` (uint8) from a tensor's ``row`` on."""
        place = self._tensors[name][2] + row * row_bytes
        while len(target):
            n = os.preadv(self._file, [target], place)
            if n == 0:
                raise ShardError(f"{self.path} ends after {place} bytes, inside {name}; "
                                 f"{layout.REPAIR}")
            place, target = place + n, target[n:]

    def column(self, name: str) -> np.ndarray:
        """A small tensor of one number per position (or sample), read once and kept."""
        if name not in self._columns:
            dtype, shape, _ = self._tensors.get(name, (None, [], 0))
            if len(shape) != 1:
                raise ShardError(f"{self.path} holds no {name} as a list of numbers; "
                                 f"{layout.REPAIR}")
            out = torch.empty(shape[0], dtype=dtype)
            self.read(bytes_of(out), name, 0, out.itemsize)
            ids = self._vocabulary.get(name.removeprefix("ids_by_"))
            if ids and len(out) and not 0 <= int(out.min()) <= int(out.max()) < ids:
                raise ShardError(f"{self.path} holds {name} from {out.min()} to {out.max()}, but "
                                 f"the vocabulary has {ids} tokens; {layout.REPAIR}")
            self._columns[name] = out.numpy()
        return self._columns[name]

    @functools.cached_property
    def sequence(self) -> list[str]:
        """The sequence of each sample."""
        return self._metadata(columns=["sequence"])["sequence"].to_pylist()


def _tensor(entry: Mapping[str, Any], start: int, end: int) -> tuple[torch.dtype, list[int], int]:
    """(dtype, shape, place in the file), from the header. Raises: ValueError where it lies."""
    dtype, shape = _SAFETENSORS[entry["dtype"]], [int(n) for n in entry["shape"]]
    first, last = map(int, entry["data_offsets"])
    whole = math.prod(shape) * dtype.itemsize == last - first and min(shape, default=0) >= 0
    if not whole or first < 0 or start + last > end:
        raise ValueError(f"a tensor of shape {shape} in bytes {first} to {last}")
    return dtype, shape, start + first


class Memory:
    """At most ``n_blocks`` blocks of memory, each used again once no tensor stands on it: new
    memory costs more than filling it. All are as large as the largest that was asked for."""

    def __init__(self, n_blocks: int) -> None:
        self._n_blocks, self._size = n_blocks, 0
        self._free: deque[np.ndarray] = deque()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        n = math.prod(shape) * dtype.itemsize
        self._size = max(self._size, n)
        block = np.empty(0, dtype=np.uint8)
        while len(block) < self._size:
            try:
                block = self._free.popleft()
            except IndexError:
                block = torch.empty(self._size, dtype=torch.uint8).numpy()
        lent = block[:]
        # torch keeps ``lent`` for as long as a tensor uses it
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent)[:n].view(dtype).view(*shape)

    def _give_back(self, block: np.ndarray) -> None:
        if len(self._free) < self._n_blocks and len(block) == self._size:
            self._free.append(block)


class ShardReader:
    """Samples and padded batches of a run folder by (number of the shard, row in it), as ``dtype``.
    n_open: shards used last that stay open. memory: of batches' states, by role; None for new.
    verify: compare each shard's checksum when this process first opens it."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], *, dtype: str = "float32",
                 n_open: int = 16, memory: Mapping[str, Memory] | None = None,
                 verify: bool = True) -> None:
        if dtype not in DTYPES:
            raise ShardError(f"dtype={dtype!r}; states are delivered as one of {', '.join(DTYPES)}")
        self.dtype, self.memory = DTYPES[dtype], memory
        self._manifest, self._n_open = manifest, n_open
        self._stored = layout.TORCH_DTYPES[manifest["dtype"]]
        self._widths = {role: manifest[f"hidden_size_{role}"] for role in layout.ROLES}
        ids = {role: manifest["heads"].get(role, {}).get("vocab_size", 1 << 31)
               for role in layout.ROLES if manifest["token_ids"]}
        self._shard = functools.partial(ShardFile, folder, stored=self._stored,
                                        widths=self._widths, vocabulary=ids, verify=verify)
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, number: int) -> ShardFile:
        """An open shard, by its number in the manifest."""
        with self._lock:
            if number not in self._open:
                self._open[number] = self._shard(self._manifest["shards"][number])
                while len(self._open) > self._n_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def sample(self, number: int, row: int) -> dict[str, Tensor]:
        """hidden_by_* [S, D] and ids_by_* int64 [S] of one sample, the caller's own."""
        file, found = self.shard(number), {}
        for role in layout.ROLES:
            start, end = file.offsets[role][row:row + 2]
            found[f"hidden_by_{role}"] = self._states(role, [(file, row)], [end - start])[0]
            found[f"ids_by_{role}"] = torch.tensor(file.column(f"ids_by_{role}")[start:end])
        return found

    def batch(self, places: Sequence[tuple[int, int]], index: Sequence[int]) -> Batch:
        """The samples at these places, padded as by ``store.collate``. index: their names. Raises:
        ShardError naming a file that cannot be read."""
        rows = [(self.shard(number), row) for number, row in places]
        lengths = [file.lengths[row] for file, row in rows]
        ids = torch.zeros(2, len(rows), max(lengths), dtype=torch.int64)
        for role, lines in zip(layout.ROLES, ids.numpy(), strict=True):
            for line, (file, row), n in zip(lines, rows, lengths, strict=True):
                start = file.offsets[role][row]
                line[:n] = file.column(f"ids_by_{role}")[start:start + n]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        names = [file.sequence[row] for file, row in rows]
        return Batch(*(self._states(role, rows, lengths) for role in layout.ROLES), *ids, mask,
                     names, list(index), self._manifest["mode"])

    def _states(self, role: str, rows: Sequence[tuple[ShardFile, int]],
                lengths: Sequence[int]) -> Tensor:
        """[B, S, D] of one model, read in place, or converted an answer at a time."""
        shape = len(rows), max(lengths), self._widths[role]
        out = (self.memory[role].take if self.memory else torch.empty)(shape, dtype=self.dtype)
        same = self._stored == self.dtype
        scratch = torch.empty(0 if same else shape[1:], dtype=self._stored)
        for line, (file, row), n in zip(out, rows, lengths, strict=True):
            states, start = (line if same else scratch)[:n], file.offsets[role][row]
            file.read(bytes_of(states), f"hidden_by_{role}", start, shape[2] * states.itemsize)
            if self._stored == torch.int8:
                scale = file.column(f"scale_by_{role}")[start:start + n]
                states = layout.decode_states(states, torch.from_numpy(scale))
            if not same:
                line[:n] = states
            line[n:] = 0
        return out
