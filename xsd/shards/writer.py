"""Writing a run folder: durable after every flush, resumable after any kill, the same bytes as in
one go. What is not yet a whole shard is flushed into pieces (``pending-<first>-<check>``); a whole
one is its two files, then the manifest (the point of commitment), then pieces are removed."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

from xsd.core import Mode, PairedStates, ShardError, StorageError, Tap, at_least_one
from xsd.files import FolderLock, append_line, atomic_write, provenance, remove_leftovers, sha256_of
from xsd.shards import format as layout


class ShardWriter:
    """Write paired states into ``folder``; opening it again with the same settings continues it.
    dtype: a format.StoredDtype, or torch's name of it. token_ids: False where the source had none.
    about: for the provenance; compared with nothing. Raises: ShardError naming the setting that
    differs from the folder's; StorageError for another writer or a full disk (resumable)."""

    def __init__(self, folder: str | Path, *, mode: Mode, tap: Tap = "post_norm",
                 dtype: str = "fp16", config: Mapping[str, Any] | None = None,
                 samples_per_shard: int = 256, token_ids: bool = True,
                 about: Mapping[str, Any] | None = None) -> None:
        dtype = layout.short_dtype(dtype)
        settings = {"mode": mode, "tap": tap, "dtype": dtype,
                    "samples_per_shard": samples_per_shard, "config": dict(config or {})}
        for name, known in layout.KINDS.items():
            if settings[name] not in known:
                raise ShardError(
                    f"{name}={settings[name]!r} is unknown; expected one of {', '.join(known)}")
        at_least_one(ShardError, samples_per_shard=samples_per_shard)
        self.folder, self.dtype = Path(folder), dtype
        self.samples_per_shard = samples_per_shard
        self._rows: list[layout.Row] = []
        self._durable = 0  # how many of _rows are already in pieces
        self._pieces: list[tuple[Path, int]] = []  # and the sample after each piece's last
        self._untimed = 0  # first sample without a line in the times
        self._spent = 0.0  # seconds since the last of these
        self._lock = FolderLock(self.folder)
        try:
            self._open(settings, token_ids, dict(about or {}))
        except BaseException:
            self._lock.release()
            raise

    def _open(self, settings: dict[str, Any], token_ids: bool, about: dict[str, Any]) -> None:
        remove_leftovers(self.folder)
        if (self.folder / layout.MANIFEST).exists():
            self.manifest = layout.read_manifest(self.folder)
            layout.check_same(self.folder, self.manifest, settings)
            self._read_pieces()
            self._untimed = self.n_written
            return
        self.manifest = {}
        now = datetime.now(UTC)
        origin = provenance(created=now.isoformat(timespec="seconds"), date=str(now.date()),
                            **about)
        self._update(format=layout.FORMAT, version=layout.VERSION, **settings, token_ids=token_ids,
                     hidden_size_drafter=None, hidden_size_verifier=None, n_samples=0, shards=[],
                     heads={}, files={}, finished=False, max_seq_len=0, provenance=origin)

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
        """Samples in shards and pieces, those of earlier runs included: where to go on."""
        return self.committed + len(self._rows)

    @property
    def n_tokens(self) -> int:
        """The verifier's positions in all of them."""
        return (sum(shard["n_tokens_verifier"] for shard in self.manifest["shards"]) +
                sum(row.length("verifier") for row in self._rows))

    @property
    def finished(self) -> bool:
        """True once close() has marked the run as complete."""
        return self.manifest["finished"]

    def write(self, pair: PairedStates) -> None:
        """Take one sample. Raises: ShardError for one that is not of this run; StorageError."""
        name = f"{pair.sequence}/{pair.clip}"
        if self.finished:
            raise ShardError(
                f"{self.folder} is finished with {self.committed} samples; write to another folder")
        for field in ("mode", "tap"):
            if (own := getattr(pair, field)) != (wanted := self.manifest[field]):
                raise ShardError(f"{name} is of {field}={own!r} but {self.folder} holds "
                                 f"{wanted!r}; one folder holds one kind of pair, so write the "
                                 "other to its own")
        row = layout.encode(pair, self.dtype)
        before = _widths(self._rows[0]) if self._rows else self.manifest
        for key, width in _widths(row).items():
            if before[key] not in (None, width):
                raise ShardError(f"{name}: the {key.removeprefix('hidden_size_')}'s states are "
                                 f"{width} wide but {self.folder} holds {before[key]}")
        self._rows.append(row)
        if len(self._rows) - self._durable >= self.samples_per_shard:
            self.flush()

    def took(self, seconds: float, every: int = 0, every_s: float = 0.0) -> None:
        """Note what the last samples took, and flush: now, or every so many samples or seconds."""
        self._spent += seconds
        gathered = self.n_written - self._untimed
        if (not (every or every_s) or (every and gathered >= every)
                or (every_s and self._spent >= every_s)):
            self.flush(self._spent)

    def flush(self, seconds: float | None = None) -> None:
        """Make everything so far survive a kill. seconds: what it took since the last such call."""
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
            append_line(self.folder / layout.TIMES, json.dumps(line))
            self._untimed, self._spent = self.n_written, 0.0

    def _write_shard(self, number: int, first: int, rows: Sequence[layout.Row]) -> dict[str, Any]:
        """Both files of a shard; returns its entry for the manifest."""
        entry: dict[str, Any] = {"first": first, "n_samples": len(rows)}
        for kind, prefix, data in (("safetensors", "", layout.pack(rows)),
                                   ("parquet", "metadata_", layout.pack_metadata(rows))):
            name = layout.shard_name(number, kind)
            atomic_write(self.folder / name, data)
            entry |= {prefix + key: value for key, value in layout.entry_of(name, data).items()}
        for role in layout.ROLES:
            entry[f"n_tokens_{role}"] = sum(row.length(role) for row in rows)
        return entry

    def _commit(self, n: int) -> None:
        """The first n rows as a shard."""
        rows, shards = self._rows[:n], self.manifest["shards"]
        entry = self._write_shard(len(shards), self.committed, rows)
        longest = max(row.length("verifier") for row in rows)
        self._update(**_widths(rows[0]), shards=[*shards, entry], n_samples=self.committed + n,
                     max_seq_len=max(longest, self.manifest.get("max_seq_len", 0)))
        self._rows = self._rows[n:]
        self._durable = max(self._durable - n, 0)
        while self._pieces and self._pieces[0][1] <= self.committed:
            self._pieces.pop(0)[0].unlink(missing_ok=True)

    def save_head(self, role: str, weight: Tensor, draft_vocab_size: int) -> None:
        """A model's LM head, weight [V, D]. Raises: ShardError if the run has another already."""
        data, heads = save({"weight": weight.detach().cpu().contiguous()}), self.manifest["heads"]
        path = self.folder / layout.head_name(role)
        entry = {**layout.entry_of(path.name, data), "vocab_size": weight.shape[0],
                 "draft_vocab_size": int(draft_vocab_size)}
        if heads.get(role, entry) != entry:
            raise ShardError(f"{self.folder} holds another LM head of the {role}; these states "
                             "come from another model, so use another folder")
        if role in heads and path.is_file() and sha256_of(path) == entry["sha256"]:
            return
        atomic_write(path, data)
        self._update(heads={**heads, role: entry})

    def rewrite_shard(self, number: int, pairs: Sequence[PairedStates]) -> None:
        """Replace a damaged shard. Raises: ShardError for another number of samples."""
        before = self.manifest["shards"][number]
        if len(pairs) != before["n_samples"]:
            raise ShardError(f"{self.folder / before['file']} holds {before['n_samples']} samples "
                             f"but {len(pairs)} were given to replace it")
        rows = [layout.encode(pair, self.dtype) for pair in pairs]
        entry = self._write_shard(number, before["first"], rows)
        if entry != before:  # another machine or library rounds otherwise
            shards = self.manifest["shards"]
            self._update(shards=[*shards[:number], entry, *shards[number + 1:]])

    def forget_times(self) -> None:
        """Drop a damaged file of times; the table then says NaN for the seconds."""
        self._update(files={})
        (self.folder / layout.TIMES).unlink(missing_ok=True)

    def close(self, finished: bool = True) -> None:
        """Flush and let others write. Raises: ShardError if a finished run would be empty."""
        try:
            if not self._lock.held or self.finished:
                return
            self.flush(self._spent or None)
            if not finished:
                return
            if self._rows:
                self._commit(len(self._rows))
            if not self.committed:
                raise ShardError(f"nothing was written to {self.folder}; give at least one sample")
            times = self.folder / layout.TIMES
            self._update(finished=True, files={} if not times.exists() else {
                "times": layout.entry_of(layout.TIMES, times.read_bytes())})
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # after an error, that one is to be told
        with contextlib.suppress(StorageError) if kind else contextlib.nullcontext():
            self.close(finished=kind is None)


def _widths(row: layout.Row) -> dict[str, int]:
    """Width of the states of both models, as the manifest names them."""
    states = {role: row.tensors[f"hidden_by_{role}"] for role in layout.ROLES}
    return {f"hidden_size_{role}": one.shape[1] for role, one in states.items()}
