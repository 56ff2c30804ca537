"""Reading a run folder: memory-mapped, any sample by index, nothing executed; and checking it file
by file."""

from __future__ import annotations

import bisect
import copy
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xsd.core import Mode, PairedStates, ShardError, Tap
from xsd.files import sha256_of
from xsd.shards import format as layout

_OPEN_SHARDS = 16
"""Shards kept mapped at once; only pages that are read take memory."""


class ShardDataset:
    """The samples of a finished run folder, in the order written: ``len``, ``[i]``
    (core.PairedStates, float32 states), iteration.

    manifest: its JSON. mode, tap, drafter_size, verifier_size, has_token_ids: of all its samples.
    Raises: ShardError if the folder is no run, is unfinished (unless ``unfinished``: then its
    complete shards), is not of the
    expected mode or tap, or lacks a shard or holds a truncated one. Contents are compared with
    their checksums by verify().
    """
    def __init__(self, folder: str | Path, *, expected_mode: Mode | None = None,
                 expected_tap: Tap | None = None, unfinished: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = layout.read_manifest(self.folder)
        self.mode: Mode = self.manifest["mode"]
        self.tap: Tap = self.manifest["tap"]
        if expected_mode is not None and self.mode != expected_mode:
            raise ShardError(
                f"{self.folder} holds {self.mode} pairs but {expected_mode} ones are needed here; "
                f"extract with modes=({expected_mode!r},) or give that folder")
        if expected_tap is not None and self.tap != expected_tap:
            raise ShardError(
                f"{self.folder} holds states taken with tap={self.tap!r} but {expected_tap!r} is "
                "needed here; "
                f"extract again with tap={expected_tap!r}")
        if not self.manifest["finished"] and not unfinished:
            raise ShardError(
                f"{self.folder} is not finished ({self.manifest['n_samples']} samples in complete "
                "shards); "
                "run the same extraction again to continue it, or open it with unfinished=True")
        broken = list(_wrong_sizes(self.folder, self.manifest))
        if broken:
            raise ShardError("; ".join(str(problem) for problem in broken[:3]))
        self._firsts = [shard["first"] for shard in self.manifest["shards"]]
        self._indices: list[int] | None = None
        self._open: OrderedDict[int, tuple[Any, dict[str, Tensor]]] = OrderedDict()
        self._table: pd.DataFrame | None = None
        self._ids: dict[str, list[np.ndarray]] = {}

    @property
    def drafter_size(self) -> int:
        """Width D_d of the drafter's states."""
        return self.manifest["hidden_size_drafter"]

    @property
    def verifier_size(self) -> int:
        """Width D_v of the verifier's states."""
        return self.manifest["hidden_size_verifier"]

    @property
    def has_token_ids(self) -> bool:
        """False where the source kept no token ids; they then read as -1 and no token metric can be
        computed."""
        return self.manifest["token_ids"]

    @property
    def n_tokens(self) -> int:
        """The verifier's positions, over all samples."""
        return int(self.table()["n_tokens_verifier"].sum())

    def __len__(self) -> int:
        return self.manifest["n_samples"] if self._indices is None else len(self._indices)

    def __iter__(self) -> Iterator[PairedStates]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()
                }  # mapped files do not travel to worker processes

    def __getitem__(self, index: int) -> PairedStates:
        position = range(len(self))[index]  # IndexError out of range
        line = self.table().iloc[position]
        values = self._read(*self.locate(position))
        return PairedStates(line["sequence"], line["clip"], line["question"], **values,
                            mode=self.mode, tap=self.tap, text_by_drafter=line["text_by_drafter"],
                            text_by_verifier=line["text_by_verifier"], split=line["split"],
                            extra=json.loads(line["extra"]),
                            )

    @property
    def is_whole(self) -> bool:
        """False for a subset."""
        return self._indices is None

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the shard, row in it) of the sample at ``index``, 0 … len - 1."""
        position = index if self._indices is None else self._indices[index]
        number = bisect.bisect_right(self._firsts, position) - 1
        return number, position - self._firsts[number]

    def by_shard(self, indices: Sequence[int] | None = None) -> Mapping[int, Sequence[int]]:
        """Number of a shard → the indices that lie in it, ascending in both; all samples, or those
        at ``indices``.

        Of a whole run these are ranges, so that nothing grows with the number of samples.
        """
        if indices is None and self._indices is None:
            return {
                number: range(shard["first"], shard["first"] + shard["n_samples"])
                for number, shard in enumerate(self.manifest["shards"])
            }
        chosen = range(
            len(self)) if indices is None else [range(len(self))[int(i)] for i in indices]
        found: dict[int, list[int]] = {}
        for place, index in sorted((self.locate(i), i) for i in chosen):
            found.setdefault(place[0], []).append(index)
        return found

    def _read(self, number: int, row: int) -> dict[str, Tensor]:
        file, offsets = self._shard(number)
        values: dict[str, Tensor] = {}
        for role in layout.ROLES:
            start, end = (int(value) for value in offsets[role][row:row + 2])
            stored = file.get_slice(f"hidden_by_{role}")[start:end]
            scale = file.get_slice(
                f"scale_by_{role}")[start:end] if self.manifest["dtype"] == "int8" else None
            # A copy, so that the caller may change it and no mapping stays alive through it.
            decoded = layout.decode_states(stored, scale)
            values[f"hidden_by_{role}"] = decoded.clone(
            ) if decoded.dtype == stored.dtype else decoded
            values[f"ids_by_{role}"] = file.get_slice(f"ids_by_{role}")[start:end].clone()
        return values

    def _shard(self, number: int) -> tuple[Any, dict[str, Tensor]]:
        if number not in self._open:
            path = self.folder / self.manifest["shards"][number]["file"]
            try:
                file = safe_open(path, "pt")
                offsets = {role: file.get_tensor(f"offsets_{role}").clone() for role in layout.ROLES}
            except (SafetensorError, OSError) as error:
                raise ShardError(
                    f"{path} cannot be read ({error}); run verify and repair, or extract again"
                ) from error
            self._open[number] = (file, offsets)
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def table(self) -> pd.DataFrame:
        """One line a sample: sequence, clip, question, split, mode, text_by_*, extra (JSON),
        n_tokens_*, seconds (NaN if unknown)."""
        if self._table is None:
            frames = []
            for shard in self.manifest["shards"]:
                path = self.folder / shard["metadata_file"]
                try:
                    frames.append(pq.read_table(path).to_pandas())
                except (pa.ArrowException, OSError) as error:
                    raise ShardError(
                        f"{path} cannot be read ({error}); run verify and repair, or extract again"
                    ) from error
            table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(
                columns=[*layout.TEXT_COLUMNS, "n_tokens_verifier"])
            table["seconds"] = pd.Series(_seconds(self.folder, len(table)), dtype="float64")
            self._table = table
        return self._table.copy(deep=False)

    def ids(self, role: str) -> list[np.ndarray]:
        """The token ids [S] of every sample, int64, by "drafter" or "verifier"; no state is read.

        Kept once asked for: 8 bytes a token. Not to be changed. Raises: ShardError for a shard that
        cannot be read.
        """
        if role not in self._ids:
            shards = []
            for number in range(len(self.manifest["shards"])):
                file, offsets = self._shard(number)
                ids = file.get_tensor(f"ids_by_{role}").numpy().copy()
                shards.append(np.split(ids, offsets[role][1:-1].tolist()))
            places = map(self.locate, range(len(self)))
            self._ids[role] = [shards[number][row] for number, row in places]
        return self._ids[role]

    def head(self, role: str) -> Tensor:
        """Stage 0: the LM head's weight, float32 [V, D]; ``states @ head.T`` are the logits.
        Raises: ShardError if none was saved."""
        entry = self.manifest["heads"].get(role)
        if entry is None:
            held = ", ".join(self.manifest["heads"]) or "none"
            raise ShardError(
                f"{self.folder} holds no LM head of the {role!r} (it holds: {held}); extract "
                "again, or pass the head yourself"
            )
        if self.tap != "post_norm":
            raise ShardError(
                f"{self.folder} holds states taken before the final norm (tap={self.tap!r}) but "
                "this head expects 'post_norm'; "
                "re-extract with tap='post_norm' or load the head together with its norm")
        with safe_open(self.folder / entry["file"], "pt") as file:
            return file.get_tensor("weight").float().clone()

    def draft_vocab_size(self, role: str = "verifier") -> int:
        """Ids below it exist for both models. Raises: ShardError if no head was saved."""
        if role not in self.manifest["heads"]:
            raise ShardError(f"{self.folder} holds no LM head of the {role!r}; extract again")
        return self.manifest["heads"][role]["draft_vocab_size"]

    def subset(self, *, sequences: Sequence[str] | None = None,
               indices: Sequence[int] | None = None) -> ShardDataset:
        """The same files with fewer samples: those of the sequences, or at the indices, or both.
        Order is kept. Raises: ShardError."""
        chosen = list(
            range(len(self)) if indices is None else (range(len(self))[i] for i in indices))
        if sequences is not None:
            column = self.table()["sequence"].tolist()
            unknown = sorted(set(sequences) - set(column))
            if unknown:
                raise ShardError(
                    f"{self.folder} holds no sequence {', '.join(unknown)}; it holds "
                    f"{', '.join(sorted(set(column)))}"
                )
            chosen = [i for i in chosen if column[i] in set(sequences)]
        view = copy.copy(self)
        view._open, view._ids = OrderedDict(), {}
        view._table = self.table().iloc[chosen].reset_index(drop=True)
        view._indices = chosen if self._indices is None else [self._indices[i] for i in chosen]
        return view

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[list[int], list[int]]:
        """(training, validation) indices, split by sequence: no sequence is in both.

        Sequences are drawn by ``seed`` until validation holds at least ``fraction`` of the samples.
        Raises: ShardError with fewer than two sequences, or a fraction outside (0, 1).
        """
        if not 0 < fraction < 1:
            raise ShardError(
                f"fraction={fraction} of the samples for validation; expected a number between 0 "
                "and 1"
            )
        column = self.table()["sequence"].tolist()
        names = sorted(set(column))
        if len(names) < 2:
            raise ShardError(
                f"{self.folder} holds {len(names)} sequence; a split by sequence needs at least two"
            )
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        held: set[str] = set()
        for i in order[:-1]:
            held.add(names[i])
            if sum(name in held for name in column) >= fraction * len(column):
                break
        return [i for i, name in enumerate(column)
                if name not in held], [i for i, name in enumerate(column) if name in held]

    def verify(self) -> None:
        """Compare every file with its checksum. Raises: ShardError naming each damaged one and the
        way out."""
        found = verify(self.folder)
        if found:
            raise ShardError("; ".join(str(problem) for problem in found))


# --- checks
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One damaged file. shard: its number where a repair is to extract that shard again, else
    None."""

    file: Path
    what: str
    way_out: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.file} {self.what}; {self.way_out}"


_REPAIR = "repair the run (only this shard is extracted again) or restore the file from a copy"


def _shard_of(name: str) -> int | None:
    return int(name[6:12]) if name.startswith("shard-") else None


def _wrong_sizes(folder: Path, manifest: dict[str, Any]) -> Iterator[Problem]:
    for name, size, _ in layout.listed_files(manifest):
        path = folder / name
        if not path.is_file():
            yield Problem(path, "is missing", _REPAIR, _shard_of(name))
        elif path.stat().st_size != size:
            yield Problem(path, f"has {path.stat().st_size} bytes instead of {size}", _REPAIR,
                          _shard_of(name))


def verify(folder: str | Path) -> list[Problem]:
    """Every missing, truncated or changed file of a run, in order; empty when all is well. A
    damaged manifest is a ShardError."""
    folder = Path(folder)
    manifest = layout.read_manifest(folder)
    found = list(_wrong_sizes(folder, manifest))
    bad = {problem.file.name for problem in found}
    for name, _, digest in layout.listed_files(manifest):
        if name not in bad and sha256_of(folder / name) != digest:
            found.append(
                Problem(folder / name, "does not match its checksum", _REPAIR, _shard_of(name)))
    for path in sorted(folder.glob("pending-*.safetensors")):
        if not sha256_of(path).startswith(path.stem.split("-")[-1]):
            found.append(
                Problem(path, "does not match its checksum",
                        "run the same extraction again; these samples are extracted anew"))
    return found


def _seconds(folder: Path, n: int) -> list[float]:
    seconds = [float("nan")] * n
    path = folder / layout.TIMES
    if not path.exists():
        return seconds
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            first, count, total = int(entry["first"]), int(entry["n"]), float(entry["seconds"])
        except (ValueError, KeyError, TypeError):  # the last line of a killed writer
            continue
        for i in range(first, min(first + count, n)):
            seconds[i] = total / count
    return seconds
