"""Reading batches straight from shard files: one positioned read an answer and model, into the padded batch itself.

Nothing is mapped and no shard is held: what a reader keeps of a shard are its offsets, ids, scales and sequence names (8 to 40 bytes a
position, where the states have thousands). Any number of threads may read at the same time.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
_SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "I64": torch.int64}
_WAY_OUT = "run verify and repair, or extract again"


class ShardFile:
    """One open shard: where its tensors lie, and its offsets. Raises: ShardError naming the file when it is no such shard."""

    def __init__(self, path: Path, metadata_path: Path) -> None:
        self.path, self._metadata_path = path, metadata_path
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)  # closed once no thread reads from it any more
            size = int.from_bytes(self._bytes(0, 8), "little")
            header = json.loads(self._bytes(8, size)) if size < os.fstat(self._file).st_size else {}
            self._tensors = {
                name: (_SAFETENSORS[entry["dtype"]], entry["shape"], 8 + size + entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            self.offsets = {role: self.whole(f"offsets_{role}").numpy() for role in layout.ROLES}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path} cannot be read ({error!r}); {_WAY_OUT}") from error
        for role, offsets in self.offsets.items():
            if offsets[0] != 0 or bool((np.diff(offsets) < 0).any()) or offsets[-1] != self._tensors[f"hidden_by_{role}"][1][0]:
                raise ShardError(f"{path} holds offsets of the {role} that do not fit its states; {_WAY_OUT}")
        self.lengths: list[int] = np.minimum(*(np.diff(self.offsets[role]) for role in layout.ROLES)).tolist()
        self._sequence: list[str] | None = None
        self._columns: dict[str, Tensor] = {}

    def _bytes(self, start: int, n: int) -> bytes:
        data = os.pread(self._file, n, start)
        if len(data) != n:
            raise ShardError(f"{self.path} ends after {start + len(data)} bytes; {_WAY_OUT}")
        return data

    def whole(self, name: str) -> Tensor:
        """A small tensor, copied."""
        dtype, shape, _ = self._tensors[name]
        out = torch.empty(shape, dtype=dtype)
        self.fill(out, name, 0)
        return out

    def column(self, name: str) -> Tensor:
        """As :meth:`whole`, kept for the next call."""
        if name not in self._columns:
            try:
                self._columns[name] = self.whole(name)
            except KeyError as error:
                raise ShardError(f"{self.path} holds no {name}; {_WAY_OUT}") from error
        return self._columns[name]

    def fill(self, out: Tensor, name: str, row: int) -> None:
        """Rows ``row`` … ``row + len(out) - 1`` of a tensor into ``out`` (contiguous, of the stored dtype)."""
        dtype, shape, start = self._tensors[name]
        if out.dtype != dtype or list(out.shape[1:]) != shape[1:]:
            raise ShardError(f"{self.path} holds {name} as {dtype} {shape}, not the {out.dtype} of the manifest; {_WAY_OUT}")
        if not out.numel():
            return
        view = memoryview(out.view(torch.uint8).numpy()).cast("B")
        place = start + row * len(view) // len(out)
        while len(view):
            n = os.preadv(self._file, [view], place)
            if n == 0:
                raise ShardError(f"{self.path} ends after {place} bytes, inside {name}; {_WAY_OUT}")
            place, view = place + n, view[n:]

    @property
    def sequence(self) -> list[str]:
        """The sequence of each sample."""
        if self._sequence is None:
            try:
                self._sequence = pq.read_table(self._metadata_path, columns=["sequence"], use_threads=False)["sequence"].to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise ShardError(f"{self._metadata_path} cannot be read ({error}); {_WAY_OUT}") from error
        return self._sequence


class ShardReader:
    """Padded batches of a dataset by index; keeps the ``n_open`` shards used last open. dtype: a key of ``DTYPES``."""

    def __init__(self, dataset: ShardDataset, *, dtype: str = "float32", n_open: int = 16) -> None:
        if dtype not in DTYPES:
            raise ShardError(f"dtype={dtype!r}; states are delivered as one of {', '.join(DTYPES)}")
        self.dataset, self.dtype, self.n_open = dataset, DTYPES[dtype], n_open
        self._stored = layout.TORCH_DTYPES[dataset.manifest["dtype"]]
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, number: int) -> ShardFile:
        """A shard by its number in the manifest."""
        with self._lock:
            if number not in self._open:
                entry = self.dataset.manifest["shards"][number]
                self._open[number] = ShardFile(self.dataset.folder / entry["file"], self.dataset.folder / entry["metadata_file"])
                while len(self._open) > self.n_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def batch(self, index: Sequence[int]) -> Batch:
        """The samples at these indices, as ``stream.collate`` pads them: positions that both models have, 0 and False behind.

        drafter, verifier: [B, S, D] of the chosen dtype. Raises: ShardError naming a file that cannot be read.
        """
        places = [self.dataset.locate(i) for i in index]
        files = [self.shard(number) for number, _ in places]
        lengths = [file.lengths[row] for file, (_, row) in zip(files, places, strict=True)]
        longest = max(lengths)
        rows = [(file, row, n) for file, (_, row), n in zip(files, places, lengths, strict=True)]
        values: dict[str, Any] = {}
        for role, width in zip(layout.ROLES, (self.dataset.drafter_size, self.dataset.verifier_size), strict=True):
            values[role] = self._states(role, width, rows, longest)
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            for line, (file, row, n) in zip(ids, rows, strict=True):
                start = file.offsets[role][row]
                line[:n] = file.column(f"ids_by_{role}")[start : start + n]
            values[f"ids_by_{role}"] = ids
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        sequence = [file.sequence[row] for file, row, _ in rows]
        return Batch(**values, mask=mask, sequence=sequence, index=list(index), mode=self.dataset.mode)

    def _states(self, role: str, width: int, rows: Sequence[tuple[ShardFile, int, int]], longest: int) -> Tensor:
        name = f"hidden_by_{role}"
        out = torch.empty(len(rows), longest, width, dtype=self.dtype)
        direct = self._stored == self.dtype
        scratch = None if direct else torch.empty(longest, width, dtype=self._stored)
        for line, (file, row, n) in zip(out, rows, strict=True):
            start = int(file.offsets[role][row])
            if scratch is None:
                file.fill(line[:n], name, start)
            else:  # converted while still in the processor's cache
                file.fill(scratch[:n], name, start)
                scale = file.column(f"scale_by_{role}")[start : start + n] if self._stored == torch.int8 else None
                line[:n] = scratch[:n] if scale is None else layout.decode_states(scratch[:n], scale)
            line[n:] = 0
        return out
