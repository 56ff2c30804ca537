"""Reading a run folder, and checking it file by file; nothing in it is executed."""

import bisect
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xsd.core import Batch, Mode, PairedStates, ShardError, Tap, at_least_one, reading
from xsd.files import fault, sha256_of
from xsd.shards import format as layout
from xsd.shards.contexts import Contexts
from xsd.shards.reader import ShardReader, read_checked, read_metadata


class ShardDataset:
    """The samples of a finished run folder (or of an ``unfinished`` one's complete shards), in the
    order written, as core.PairedStates with float32 states. drafter_size, verifier_size: widths D_d
    and D_v. has_token_ids: False where the source kept none (they read as -1). verify: compare the
    checksum of each file when it is first read (of shards, once a process). Raises: ShardError if
    the folder is no such run, is of another mode or tap, or lacks a shard or part of one."""

    def __init__(self, folder: str | Path, *, expected_mode: Mode | None = None,
                 expected_tap: Tap | None = None, unfinished: bool = False,
                 verify: bool = True) -> None:
        self.folder, self.verify = Path(folder), verify
        self.manifest: dict[str, Any] = layout.read_manifest(self.folder)
        self.mode: Mode = self.manifest["mode"]
        self.tap: Tap = self.manifest["tap"]
        self.drafter_size: int = self.manifest["hidden_size_drafter"]
        self.verifier_size: int = self.manifest["hidden_size_verifier"]
        self.has_token_ids: bool = self.manifest["token_ids"]
        if expected_mode not in (None, self.mode):
            raise ShardError(f"{folder} holds {self.mode} pairs but {expected_mode} ones are "
                             f"needed here; extract with modes=({expected_mode!r},) or give that "
                             "folder")
        if expected_tap not in (None, self.tap):
            raise ShardError(f"{folder} holds states taken with tap={self.tap!r} but "
                             f"{expected_tap!r} is needed here; extract again with it")
        if not self.manifest["finished"] and not unfinished:
            raise ShardError(f"{folder} is not finished ({self.manifest['n_samples']} samples in "
                             "complete shards); run the same extraction again to continue it, or "
                             "open it with unfinished=True")
        needed = {**self.manifest, "files": {}}  # without the times a run is as readable
        if broken := list(_damaged(self.folder, needed, checksums=False)):
            raise ShardError("; ".join(map(str, broken[:3])))
        self._firsts = [shard["first"] for shard in self.manifest["shards"]]
        self._indices: Sequence[int] = range(self.manifest["n_samples"])  # places in the whole run
        self._table: pd.DataFrame | None = None
        self._ids: dict[str, list[np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # open files do not travel to other processes
        return {name: value for name, value in vars(self).items()
                if name not in ("contexts", "_reader")}

    @functools.cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self.folder, self.manifest, verify=self.verify)

    @property
    def is_whole(self) -> bool:
        """False for a subset."""
        return isinstance(self._indices, range)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> PairedStates:
        position = range(len(self))[index]  # IndexError out of range, which ends an iteration
        values = self.table().iloc[position][list(layout.TEXT_COLUMNS)].to_dict()
        values["extra"] = layout.extra_of(values["extra"], self.folder)
        return PairedStates(**values, tap=self.tap, **self._reader.sample(*self.locate(position)))

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the shard, row in it) of the sample at ``index``, 0 … len - 1."""
        position = self._indices[index]
        number = bisect.bisect_right(self._firsts, position) - 1
        return number, position - self._firsts[number]

    def by_shard(self, indices: Sequence[int] | None = None) -> Mapping[int, Sequence[int]]:
        """Number of a shard → the indices that lie in it (all, or of ``indices``), ascending; of a
        whole run as ranges, so that nothing grows with the number of samples."""
        if indices is None and self.is_whole:
            return {number: range(shard["first"], shard["first"] + shard["n_samples"])
                    for number, shard in enumerate(self.manifest["shards"])}
        placed = sorted((self.locate(i), i) for i in self._chosen(indices))
        return {number: [index for _, index in some]
                for number, some in groupby(placed, lambda one: one[0][0])}

    def ids(self, role: str) -> list[np.ndarray]:
        """The token ids [S] of every sample, int64, kept once asked for; no state is read."""
        if role not in self._ids:
            files = map(self._reader.shard, range(len(self._firsts)))
            every = [ids for file in files for ids in np.split(file.column(f"ids_by_{role}"),
                                                               file.offsets[role][1:-1])]
            self._ids[role] = [every[i] for i in self._indices]
        return self._ids[role]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once and in order, padded as by :func:`collate`; loader.Loader shuffles."""
        at_least_one(ShardError, batch_size=batch_size)
        for start in range(0, len(self), batch_size):
            index = range(len(self))[start:start + batch_size]
            yield self._reader.batch([self.locate(i) for i in index], index)

    @functools.cached_property
    def contexts(self) -> Contexts:
        """What block drafters read besides. Raises: ShardError when it was not extracted."""
        return Contexts(self.folder, self.manifest, verify=self.verify)

    def with_context(self, batch: Batch, wanted: Mapping[str, Sequence[int]]) -> Batch:
        """A batch of these samples with the contexts of the layers ``wanted`` by role; as it is
        where none are. Raises: ShardError when others, or none, are stored."""
        if not wanted:
            return batch
        self.contexts.check(wanted)
        places = [self._indices[index] for index in batch.index]
        return replace(batch, context=self.contexts.of(places, list(wanted)))

    def table(self) -> pd.DataFrame:
        """One line per sample: format.SCHEMA and seconds (NaN if unknown)."""
        if self._table is None:
            parts = (read_metadata(self.folder, shard, verify=self.verify)
                     for shard in self.manifest["shards"])
            table = pa.concat_tables([layout.SCHEMA.empty_table(), *parts]).to_pandas()
            seconds = np.full(len(table), np.nan)
            for line in layout.read_times(self.folder):
                seconds[line["first"]:line["first"] + line["n"]] = line["seconds"] / line["n"]
            self._table = table.assign(seconds=seconds)
        return self._table.copy(deep=False)

    def names(self) -> list[tuple[str, str, str]]:
        """Sequence, clip and question of every sample."""
        columns = self.table()[["sequence", "clip", "question"]]
        return list(columns.itertuples(index=False, name=None))

    def head(self, role: str) -> Tensor:
        """The LM head's weight, float32 [V, D]. Raises: ShardError for none, or another tap."""
        entry, width = self._head(role), self.manifest[f"hidden_size_{role}"]
        if self.tap != "post_norm":
            raise ShardError(f"{self.folder} holds states taken before the final norm (tap="
                             f"{self.tap!r}) but this head expects 'post_norm'; re-extract with "
                             "tap='post_norm' or load the head together with its norm")
        data = read_checked(self.folder, entry, verify=self.verify)
        with reading(f"{self.folder / entry['file']} cannot be read", ShardError, layout.REPAIR):
            weight = load(data)["weight"]
            wanted = [entry["vocab_size"], width or weight.shape[-1]]
            if not (weight.is_floating_point() and list(weight.shape) == wanted
                    and weight.isfinite().all()):
                raise ValueError(f"it holds {weight.dtype} of shape {list(weight.shape)}, or NaN; "
                                 f"the states need {wanted}")
        return weight.float()

    def draft_vocab_size(self, role: str = "verifier") -> int:
        """Ids below it exist for both models; saved with the head."""
        return self._head(role)["draft_vocab_size"]

    def _head(self, role: str) -> dict[str, Any]:
        if role not in self.manifest["heads"]:
            held = ", ".join(self.manifest["heads"]) or "none"
            raise ShardError(f"{self.folder} holds no LM head of the {role!r} (it holds: {held}); "
                             "extract again, or pass the head yourself")
        return self.manifest["heads"][role]

    def subset(self, *, sequences: Sequence[str] | None = None,
               indices: Sequence[int] | None = None) -> Self:
        """These samples alone, of the same files. Raises: ShardError for an unknown sequence."""
        chosen = self._chosen(indices)
        if sequences is not None:
            column = self.table()["sequence"].tolist()
            if unknown := sorted(set(sequences) - set(column)):
                raise ShardError(f"{self.folder} holds no sequence {', '.join(unknown)}; it holds "
                                 f"{', '.join(sorted(set(column)))}")
            chosen = [i for i in chosen if column[i] in set(sequences)]
        view = copy.copy(self)
        view._ids = {}
        view._table = self.table().iloc[chosen].reset_index(drop=True)
        view._indices = [self._indices[i] for i in chosen]
        return view

    def _chosen(self, indices: Sequence[int] | None) -> list[int]:
        """The indices counted from 0, all of them for None."""
        every = range(len(self))
        return [every[int(i)] for i in (every if indices is None else indices)]


class MemoryPairs(list[PairedStates]):
    """Pairs in memory, read like a ShardDataset: for the few samples of a cell of one's own."""

    def table(self) -> pd.DataFrame:
        """One row per sample: sequence, clip, question, text_by_drafter, text_by_verifier."""
        return pd.DataFrame(map(vars, self), columns=["sequence", "clip", "question",
                                                      "text_by_drafter", "text_by_verifier"])

    def ids(self, role: str) -> list[np.ndarray]:
        """The token ids [S] of every sample by "drafter" or "verifier"."""
        return [getattr(one, f"ids_by_{role}").numpy() for one in self]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once and in order, ``batch_size`` at a time."""
        for start in range(0, len(self), batch_size):
            chosen = range(len(self))[start:start + batch_size]
            yield collate([self[i] for i in chosen], chosen)


def collate(pairs: Sequence[PairedStates], index: Sequence[int]) -> Batch:
    """One batch of float32 states: the positions that both models have, padded on the right with 0
    and False. Raises: ShardError if the modes differ."""
    modes = {pair.mode for pair in pairs}
    if len(modes) != 1:
        raise ShardError(f"a batch mixes {' and '.join(sorted(modes)) or 'no'} pairs; read one run "
                         "folder at a time")
    lengths = [min(len(pair.ids_by_drafter), len(pair.ids_by_verifier)) for pair in pairs]

    def padded(name: str) -> Tensor:
        rows = [getattr(pair, name)[:n] for pair, n in zip(pairs, lengths, strict=True)]
        return pad_sequence(rows, batch_first=True)

    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return Batch(padded("hidden_by_drafter").float(), padded("hidden_by_verifier").float(),
                 padded("ids_by_drafter"), padded("ids_by_verifier"), mask,
                 [pair.sequence for pair in pairs], list(index), pairs[0].mode)


@dataclass(frozen=True)
class Problem:
    """One damaged file. shard: its number, where a repair extracts that shard again."""

    file: Path
    what: str
    way_out: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.file} {self.what}; {self.way_out}"


def verify(folder: str | Path) -> list[Problem]:
    """Every missing, truncated or changed file of a run; a damaged manifest is a ShardError."""
    folder = Path(folder)
    again = "run the same extraction again; these samples are extracted anew"
    return [*_damaged(folder, layout.read_manifest(folder)), *(
        Problem(path, "does not match its checksum", again)
        for path in sorted(folder.glob("pending-*.safetensors"))
        if not sha256_of(path).startswith(path.stem.split("-")[-1]))]


def _damaged(folder: Path, manifest: Mapping[str, Any], checksums: bool = True
             ) -> Iterator[Problem]:
    """Files that are not as the manifest says."""
    for name, size, digest in layout.listed_files(manifest):
        path = folder / name
        outside = path.is_file() and layout.outside(path)
        if what := "is a link that leaves the folder" if outside else fault(
                path, [digest] if checksums else [], size):
            number = int(path.stem[6:]) if name.startswith("shard-") else None
            yield Problem(path, what, "repair the run (only this shard is extracted again) or "
                          "restore the file from a copy", number)
