"""Writing a run folder: durable after every flush, resumable after any kill, one writer at a time.

    write … write  →  flush: pending-<first>-<check>.safetensors   (what is not yet a whole shard)
                   →  samples_per_shard reached: shard, its parquet, then the manifest (the point of commitment), pieces removed

Whatever was flushed before the process died is found again; shard files are the same bytes as those
of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
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

LOCK = "writer.lock"


class FolderLock:
    """An advisory lock on a folder that dies with its process. Raises: StorageError naming the
    process that holds it."""
    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                self._file = open(self.path, "a+")  # noqa: SIM115 (held until release)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder may have removed the name between our open and our lock.
                if self.path.exists() and os.fstat(
                        self._file.fileno()).st_ino == self.path.stat().st_ino:
                    break
                self._file.close()
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise StorageError(
                f"{folder} is being written by process {holder}; wait for it to finish, stop it, "
                "or choose another folder"
            ) from error
        except OSError as error:
            raise StorageError(
                f"cannot write in {folder}: {error.strerror or error}; check the folder's "
                "permissions or choose another one"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    @property
    def held(self) -> bool:
        """True until release()."""
        return not self._file.closed

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        if self.held:
            self.path.unlink(missing_ok=True)
            self._file.close()


def lock_holder(folder: str | Path) -> int | None:
    """Process id of the writer at work in the folder, None if there is none (a killed writer holds
    nothing)."""
    try:
        with open(Path(folder) / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                return int(text) if text.isdigit() else 0
    except FileNotFoundError:
        return None
    return None


class ShardWriter:
    """Write paired states into ``folder``; opening a folder again with the same settings continues
    it.

    n_written: samples in shards and pieces, where a resumed run goes on. finished: the run is
    complete and takes no more.
    dtype: a layout.StoredDtype, or torch's name of it (float32 for fp32).
    Memory: at most samples_per_shard encoded samples, about three times that while a shard is
    written.
    Raises: ShardError naming the setting that differs from the folder's; StorageError when another
    process writes there or the
    disk is full (the folder stays resumable).
    """
    def __init__(self, folder: str | Path, *, mode: Mode, tap: Tap = "post_norm",
                 dtype: str = "fp16", config: Mapping[str, Any] | None = None,
                 samples_per_shard: int = 256,
                 ) -> None:
        dtype = layout.short_dtype(dtype)
        for name, value, choices in (("mode", mode, Mode), ("tap", tap, Tap), ("dtype", dtype,
                                                                               layout.StoredDtype)):
            if value not in get_args(choices):
                raise ShardError(
                    f"{name}={value!r} is unknown; expected one of {', '.join(get_args(choices))}")
        if samples_per_shard < 1:
            raise ShardError(f"samples_per_shard={samples_per_shard}; expected at least 1")
        self.folder, self.mode, self.tap, self.dtype = Path(folder), mode, tap, dtype
        self.samples_per_shard = samples_per_shard
        self._rows: list[layout.Row] = []
        self._durable = 0  # how many of _rows are already in pieces
        self._pieces: list[tuple[Path, int]] = []  # and the sample after each piece's last
        self._untimed = 0  # first sample without a line in the times
        self._lock = FolderLock(self.folder)
        try:
            self._open({
                "mode": mode, "tap": tap, "dtype": dtype, "samples_per_shard": samples_per_shard,
                "config": dict(config or {})
            })
        except BaseException:
            self._lock.release()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))  # as JSON gives it back: tuples are lists
        for left in self.folder.glob(".*.part"):  # half-written files of a killed process
            left.unlink()
        if (self.folder / layout.MANIFEST).exists():
            self.manifest = layout.read_manifest(self.folder)
            difference = layout.first_difference({key: self.manifest[key] for key in settings},
                                                 settings)
            if difference:
                raise ShardError(
                    f"{self.folder} was begun with other settings: {difference}; use the same ones "
                    "or another folder"
                )
            self._read_pieces()
            self._untimed = self.n_written
            return
        self.manifest = {
            "format": layout.FORMAT, "version": layout.VERSION,
            **settings, "hidden_size_drafter": None, "hidden_size_verifier": None,
            "token_ids": True, "n_samples": 0, "shards": [], "heads": {}, "files": {},
            "finished": False, "provenance": provenance(),
        }  # fmt: skip
        layout.write_manifest(self.folder, self.manifest)

    def _read_pieces(self) -> None:
        """Take over what a stopped run left; a piece that is damaged, and all after it, are dropped
        and extracted again."""
        whole = True
        for path in sorted(self.folder.glob("pending-*.safetensors")):
            _, first, check = path.stem.split("-")
            data = path.read_bytes()
            skip = self.n_written - int(first)
            rows = layout.unpack(
                data) if whole and skip >= 0 and sha256(data).hexdigest()[:16] == check else []
            whole = whole and bool(rows)
            if len(rows) <= skip or not rows:
                path.unlink()
                continue
            self._rows += rows[skip:]
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
        return sum(shard["n_tokens_verifier"] for shard in self.manifest["shards"]) + sum(
            len(row.ids["verifier"]) for row in self._rows)

    @property
    def finished(self) -> bool:
        """True once close() has marked the run as complete."""
        return self.manifest["finished"]

    def write(self, pair: PairedStates) -> None:
        """Take one sample. Raises: ShardError for another mode, tap or width, NaN, or a finished
        run; StorageError."""
        if self.finished:
            raise ShardError(
                f"{self.folder} is finished with {self.committed} samples; write to another folder")
        for name, wanted in (("mode", self.mode), ("tap", self.tap)):
            if getattr(pair, name) != wanted:
                raise ShardError(
                    f"{pair.sequence}/{pair.clip} is of {name}={getattr(pair, name)!r} but "
                    f"{self.folder} holds {wanted!r}; "
                    "one folder holds one kind of pair, so write the other to its own")
        row = layout.encode(pair, self.dtype)
        for role in layout.ROLES:
            key, width = f"hidden_size_{role}", row.states[role].shape[1]
            before = self.manifest[key] or (self._rows[0].states[role].shape[1]
                                            if self._rows else width)
            if before != width:
                raise ShardError(
                    f"{pair.sequence}/{pair.clip}: the {role}'s states are {width} wide but "
                    f"{self.folder} holds {before}"
                )
        self._rows.append(row)
        if len(self._rows) - self._durable >= self.samples_per_shard:
            self.flush()

    def flush(self, seconds: float | None = None) -> None:
        """Make everything written so far survive a kill. seconds: what these samples took, for the
        table. Raises: StorageError."""
        while len(self._rows) >= self.samples_per_shard:
            self._commit(self.samples_per_shard)
        rest = self._rows[self._durable:]
        if rest:
            data = layout.pack(rest, with_text=True)
            start = self.committed + self._durable
            path = self.folder / f"pending-{start:09d}-{sha256(data).hexdigest()[:16]}.safetensors"
            atomic_write(path, data)
            self._durable = len(self._rows)
            self._pieces.append((path, self.n_written))
        if seconds is not None and self.n_written > self._untimed:
            line = json.dumps({
                "first": self._untimed, "n": self.n_written - self._untimed,
                "seconds": round(seconds, 4)
            })
            try:
                with open(self.folder / layout.TIMES, "a") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise StorageError(
                    f"cannot write {self.folder / layout.TIMES}: {error.strerror}; free space and "
                    "run again"
                ) from error
            self._untimed = self.n_written

    def _write_shard(self, number: int, first: int, rows: Sequence[layout.Row]) -> dict[str, Any]:
        """Both files of a shard; returns its entry for the manifest."""
        name = layout.shard_name(number)
        text_name = str(Path(name).with_suffix(".parquet"))
        tensors, text = layout.pack(rows), layout.pack_metadata(rows)
        atomic_write(self.folder / name, tensors)
        atomic_write(self.folder / text_name, text)
        return {
            "file": name, "bytes": len(tensors), "sha256": sha256(tensors).hexdigest(),
            "metadata_file": text_name, "metadata_bytes": len(text),
            "metadata_sha256": sha256(text).hexdigest(), "first": first, "n_samples": len(rows),
            **{f"n_tokens_{role}": sum(len(row.ids[role]) for row in rows) for role in layout.ROLES},
        }  # fmt: skip

    def _commit(self, n: int) -> None:
        rows = self._rows[:n]
        entry = self._write_shard(len(self.manifest["shards"]), self.committed, rows)
        sizes = {f"hidden_size_{role}": rows[0].states[role].shape[1] for role in layout.ROLES}
        manifest = {
            **self.manifest, **sizes, "shards": [*self.manifest["shards"], entry],
            "n_samples": self.committed + n
        }
        layout.write_manifest(self.folder, manifest)
        self.manifest = manifest
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
        digest = sha256(data).hexdigest()
        entry = {
            "file": layout.head_name(role), "bytes": len(data), "sha256": digest,
            "vocab_size": weight.shape[0], "draft_vocab_size": int(draft_vocab_size),
        }  # fmt: skip
        before = self.manifest["heads"].get(role)
        if before == entry and (self.folder / entry["file"]).is_file() and sha256_of(
                self.folder / entry["file"]) == digest:
            return
        if before and before != entry:
            raise ShardError(
                f"{self.folder} holds another LM head of the {role}; these states come from "
                "another model, so use another folder"
            )
        atomic_write(self.folder / entry["file"], data)
        manifest = {**self.manifest, "heads": {**self.manifest["heads"], role: entry}}
        layout.write_manifest(self.folder, manifest)
        self.manifest = manifest

    def rewrite_shard(self, number: int, pairs: Sequence[PairedStates]) -> bool:
        """Replace a damaged shard by the same samples extracted again. Returns whether it is the
        same bytes as the lost one.

        Raises: ShardError for another number of samples; StorageError.
        """
        before = self.manifest["shards"][number]
        if len(pairs) != before["n_samples"]:
            raise ShardError(
                f"{self.folder / before['file']} holds {before['n_samples']} samples but "
                f"{len(pairs)} were given to replace it"
            )
        entry = self._write_shard(number, before["first"],
                                  [layout.encode(pair, self.dtype) for pair in pairs])
        if entry != before:  # another machine or library rounds otherwise
            shards = [*self.manifest["shards"]]
            shards[number] = entry
            manifest = {**self.manifest, "shards": shards}
            layout.write_manifest(self.folder, manifest)
            self.manifest = manifest
        return entry == before

    def forget_times(self) -> None:
        """Drop a damaged file of times; the table then says NaN for the seconds."""
        manifest = {**self.manifest, "files": {}}
        layout.write_manifest(self.folder, manifest)
        self.manifest = manifest
        (self.folder / layout.TIMES).unlink(missing_ok=True)

    def mark_ids_absent(self) -> None:
        """Say that the source had no token ids (they are -1 in the shards), so that token metrics
        refuse this run."""
        self.manifest = {**self.manifest, "token_ids": False}
        layout.write_manifest(self.folder, self.manifest)

    def close(self, finished: bool = True) -> None:
        """Flush and give the folder free. finished=False leaves the run to be continued. Raises:
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
            files = {}
            times = self.folder / layout.TIMES
            if times.exists():
                data = times.read_bytes()
                files["times"] = {
                    "file": layout.TIMES, "bytes": len(data), "sha256": sha256(data).hexdigest()
                }
            manifest = {**self.manifest, "files": files, "finished": True}
            layout.write_manifest(self.folder, manifest)
            self.manifest = manifest
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
