"""Writing a run folder: durable after every flush, resumable after any kill, one writer at a time.

    write … write  →  flush: pending-<first>-<check>.safetensors   (what is not yet a whole shard)
                   →  samples_per_shard reached: shard, its parquet, then the manifest (the point of
                      commitment), pieces removed

Whatever was flushed before the process died is found again; shard files are the same bytes as those
of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from safetensors.torch import save
from torch import Tensor

from xsd.core import Mode, PairedStates, ShardError, StorageError, Tap
from xsd.files import atomic_write, provenance, sha256_of
from xsd.shards import format as layout
from xsd.shards.lock import FolderLock


class ShardWriter:
    """Write paired states into ``folder``; opening it again with the same settings continues it.

    n_written: samples in shards and pieces, where a resumed run goes on. finished: the run is
    complete and takes no more. dtype: a format.StoredDtype, or torch's name of it (float32 for
    fp32). Memory: at most samples_per_shard encoded samples, about three times that while a shard
    is written.
    Raises: ShardError naming the setting that differs from the folder's; StorageError when another
    process writes there or the disk is full (the folder stays resumable).
    """

    def __init__(self, folder: str | Path, *, mode: Mode, tap: Tap = "post_norm",
                 dtype: str = "fp16", config: Mapping[str, Any] | None = None,
                 samples_per_shard: int = 256) -> None:
        dtype = layout.short_dtype(dtype)
        for name, value, kind in (("mode", mode, Mode), ("tap", tap, Tap),
                                  ("dtype", dtype, layout.StoredDtype)):
            if value not in get_args(kind):
                raise ShardError(
                    f"{name}={value!r} is unknown; expected one of {', '.join(get_args(kind))}")
        if samples_per_shard < 1:
            raise ShardError(f"samples_per_shard={samples_per_shard}; expected at least 1")
        self.folder, self.mode, self.tap, self.dtype = Path(folder), mode, tap, dtype
        self.samples_per_shard = samples_per_shard
        self._rows: list[layout.Row] = []
        self._durable = 0  # how many of _rows are already in pieces
        self._pieces: list[tuple[Path, int]] = []  # and the sample after each piece's last
        self._untimed = 0  # first sample without a line in the times
        self._lock = FolderLock(self.folder)
        settings = {"mode": mode, "tap": tap, "dtype": dtype,
                    "samples_per_shard": samples_per_shard, "config": dict(config or {})}
        try:
            self._open(json.loads(json.dumps(settings)))  # as JSON gives it back: tuples are lists
        except BaseException:
            self._lock.release()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        for left in self.folder.glob(".*.part"):  # half-written files of a killed process
            left.unlink()
        if (self.folder / layout.MANIFEST).exists():
            self.manifest = layout.read_manifest(self.folder)
            before = {key: self.manifest[key] for key in settings}
            if difference := layout.first_difference(before, settings):
                raise ShardError(f"{self.folder} was begun with other settings: {difference}; use "
                                 "the same ones or another folder")
            self._read_pieces()
            self._untimed = self.n_written
            return
        self.manifest = {}
        self._update(format=layout.FORMAT, version=layout.VERSION, **settings,
                     hidden_size_drafter=None, hidden_size_verifier=None, token_ids=True,
                     n_samples=0, shards=[], heads={}, files={}, finished=False,
                     provenance=provenance())

    def _update(self, **changes: Any) -> None:
        """Change the manifest, on disk first."""
        manifest = {**self.manifest, **changes}
        layout.write_manifest(self.folder, manifest)
        self.manifest = manifest

    def _read_pieces(self) -> None:
        """Take over what a stopped run left, up to the first damaged piece."""
        whole = True
        for path in sorted(self.folder.glob("pending-*.safetensors")):
            _, first, check = path.stem.split("-")
            skip, data = self.n_written - int(first), path.read_bytes()
            whole = whole and skip >= 0 and sha256(data).hexdigest()[:16] == check
            rows = layout.unpack(data)[skip:] if whole else []
            if not rows:
                path.unlink()
                continue
            self._rows += rows
            self._durable = len(self._rows)
            self._pieces.append((path, self.n_written))

    @property
    def committed(self) -> int:
        """Samples in complete shards."""
        return self.manifest["n_samples"]

    @property
    def n_written(self) -> int:
        """Samples taken so far, those of earlier runs included."""
        return self.committed + len(self._rows)

    @property
    def n_tokens(self) -> int:
        """The verifier's positions in all of them."""
        return (sum(shard["n_tokens_verifier"] for shard in self.manifest["shards"]) +
                sum(len(row.ids["verifier"]) for row in self._rows))

    @property
    def finished(self) -> bool:
        """True once close() has marked the run as complete."""
        return self.manifest["finished"]

    def write(self, pair: PairedStates) -> None:
        """Take one sample. Raises: ShardError for another mode, tap or width, NaN, or a finished
        run; StorageError."""
        name = f"{pair.sequence}/{pair.clip}"
        if self.finished:
            raise ShardError(
                f"{self.folder} is finished with {self.committed} samples; write to another folder")
        for field, wanted in (("mode", self.mode), ("tap", self.tap)):
            if getattr(pair, field) != wanted:
                raise ShardError(
                    f"{name} is of {field}={getattr(pair, field)!r} but {self.folder} holds "
                    f"{wanted!r}; one folder holds one kind of pair, so write the other to its own")
        row = layout.encode(pair, self.dtype)
        for role in layout.ROLES:
            width, before = row.states[role].shape[1], self.manifest[f"hidden_size_{role}"]
            if before is None and self._rows:
                before = self._rows[0].states[role].shape[1]
            if before not in (None, width):
                raise ShardError(f"{name}: the {role}'s states are {width} wide but {self.folder} "
                                 f"holds {before}")
        self._rows.append(row)
        if len(self._rows) - self._durable >= self.samples_per_shard:
            self.flush()

    def flush(self, seconds: float | None = None) -> None:
        """Make everything written so far survive a kill. seconds: what the samples since the last
        such call took, for the table. Raises: StorageError."""
        while len(self._rows) >= self.samples_per_shard:
            self._commit(self.samples_per_shard)
        if rest := self._rows[self._durable:]:
            data = layout.pack(rest, with_text=True)
            start = self.committed + self._durable
            path = self.folder / f"pending-{start:09d}-{sha256(data).hexdigest()[:16]}.safetensors"
            atomic_write(path, data)
            self._durable = len(self._rows)
            self._pieces.append((path, self.n_written))
        if seconds is not None and self.n_written > self._untimed:
            line = {"first": self._untimed, "n": self.n_written - self._untimed,
                    "seconds": round(seconds, 4)}
            try:
                with open(self.folder / layout.TIMES, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise StorageError(f"cannot write {self.folder / layout.TIMES}: {error.strerror}; "
                                   "free space and run again") from error
            self._untimed = self.n_written

    def _write_shard(self, number: int, first: int, rows: Sequence[layout.Row]) -> dict[str, Any]:
        """Both files of a shard; returns its entry for the manifest."""
        entry: dict[str, Any] = {"first": first, "n_samples": len(rows)}
        for kind, prefix, data in (("safetensors", "", layout.pack(rows)),
                                   ("parquet", "metadata_", layout.pack_metadata(rows))):
            name = layout.shard_name(number, kind)
            atomic_write(self.folder / name, data)
            entry |= {prefix + key: value for key, value in layout.entry_of(name, data).items()}
        for role in layout.ROLES:
            entry[f"n_tokens_{role}"] = sum(len(row.ids[role]) for row in rows)
        return entry

    def _commit(self, n: int) -> None:
        """The first n rows as a shard."""
        rows = self._rows[:n]
        entry = self._write_shard(len(self.manifest["shards"]), self.committed, rows)
        sizes = {f"hidden_size_{role}": rows[0].states[role].shape[1] for role in layout.ROLES}
        self._update(**sizes, shards=[*self.manifest["shards"], entry],
                     n_samples=self.committed + n)
        self._rows = self._rows[n:]
        self._durable = max(self._durable - n, 0)
        for path, end in self._pieces:
            if end <= self.committed:
                path.unlink(missing_ok=True)
        self._pieces = [(path, end) for path, end in self._pieces if end > self.committed]

    def save_head(self, role: str, weight: Tensor, draft_vocab_size: int) -> None:
        """Stage 0: a model's LM head, weight [V, D], beside its states. Raises: ShardError if the
        run has another head already."""
        data = save({"weight": weight.detach().cpu().contiguous()})
        path = self.folder / layout.head_name(role)
        entry = {**layout.entry_of(path.name, data), "vocab_size": weight.shape[0],
                 "draft_vocab_size": int(draft_vocab_size)}
        before = self.manifest["heads"].get(role, entry)
        if before != entry:
            raise ShardError(f"{self.folder} holds another LM head of the {role}; these states "
                             "come from another model, so use another folder")
        if (role in self.manifest["heads"] and path.is_file()
                and sha256_of(path) == entry["sha256"]):
            return
        atomic_write(path, data)
        self._update(heads={**self.manifest["heads"], role: entry})

    def rewrite_shard(self, number: int, pairs: Sequence[PairedStates]) -> None:
        """Replace a damaged shard by the same samples extracted again. Raises: ShardError for
        another number of samples; StorageError."""
        before = self.manifest["shards"][number]
        if len(pairs) != before["n_samples"]:
            raise ShardError(f"{self.folder / before['file']} holds {before['n_samples']} samples "
                             f"but {len(pairs)} were given to replace it")
        rows = [layout.encode(pair, self.dtype) for pair in pairs]
        entry = self._write_shard(number, before["first"], rows)
        if entry != before:  # another machine or library rounds otherwise
            shards = [*self.manifest["shards"]]
            shards[number] = entry
            self._update(shards=shards)

    def forget_times(self) -> None:
        """Drop a damaged file of times; the table then says NaN for the seconds."""
        self._update(files={})
        (self.folder / layout.TIMES).unlink(missing_ok=True)

    def mark_ids_absent(self) -> None:
        """Say that the source had no token ids (-1 in the shards): token metrics refuse the run."""
        self._update(token_ids=False)

    def close(self, finished: bool = True) -> None:
        """Flush and let others write. finished=False leaves the run to be continued. Raises:
        ShardError if nothing was written."""
        try:
            if not self._lock.held or self.finished:
                return
            self.flush()
            if not finished:
                return
            if self._rows:
                self._commit(len(self._rows))
            if not self.committed:
                raise ShardError(f"nothing was written to {self.folder}; give at least one sample")
            times, files = self.folder / layout.TIMES, {}
            if times.exists():
                files["times"] = layout.entry_of(layout.TIMES, times.read_bytes())
            self._update(files=files, finished=True)
        finally:
            self._lock.release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(StorageError):  # the first error is the one to tell
            self.close(finished=False)
