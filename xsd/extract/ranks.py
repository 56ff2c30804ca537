"""One extraction by several processes (docs/extraction.md): which samples are whose, and how their
parts become the run that one process would have written. Ranks never wait for each other; the one
that finds all parts finished joins them, by renaming files."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed

from xsd.core import ParameterError, ShardError, StorageError
from xsd.files import FolderLock, atomic_write, lock_holder, storing
from xsd.shards import format as layout

PARTS = "part-*-of-*"
_WAIT_S = 120.0
_SETTINGS = ("mode", "tap", "dtype", "samples_per_shard", "hidden_size_drafter",
             "hidden_size_verifier", "token_ids", "heads")


@dataclass(frozen=True)
class Rank:
    """This process's number among ``world_size`` that share one extraction."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ParameterError(f"RANK={self.rank} of WORLD_SIZE={self.world_size}; expected a "
                                 f"rank from 0 to {self.world_size - 1}")

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Of torch.distributed where a process group was made, else RANK and WORLD_SIZE as torchrun
        and accelerate set them. Raises: ParameterError if they are no numbers."""
        distributed = torch.distributed
        if environment is None and distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        given = os.environ if environment is None else environment
        rank, size = given.get("RANK", "0"), given.get("WORLD_SIZE", "1")
        if not (rank.isdigit() and size.isdigit()):
            raise ParameterError(f"RANK={rank!r} and WORLD_SIZE={size!r} are set but are no "
                                 "numbers; unset them, or start with torchrun")
        return cls(int(rank), int(size))

    @property
    def part_name(self) -> str:
        """``1 of 4``; empty for the only process."""
        return f"{self.rank} of {self.world_size}" if self.world_size > 1 else ""

    def share(self, n_samples: int, samples_per_shard: int) -> range:
        """This rank's samples: whole shards, in one stretch; empty where ranks outnumber them."""
        n_shards = -(-n_samples // samples_per_shard)
        begin, end = (n_shards * rank // self.world_size * samples_per_shard
                      for rank in (self.rank, self.rank + 1))
        return range(min(begin, n_samples), min(end, n_samples))

    def part(self, folder: Path) -> Path:
        """Where this rank writes."""
        return folder / f"part-{self.rank:04d}-of-{self.world_size:04d}"


def finished(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished run in ``folder``, None where there is none."""
    manifest = layout.read_manifest(folder) if (folder / layout.MANIFEST).is_file() else None
    return manifest if manifest and manifest["finished"] else None


def check_begun(folder: Path, rank: Rank, settings: Mapping[str, Any]) -> bool:
    """True if ``folder`` holds the finished run already. settings: those of a ShardWriter. Raises:
    ShardError if it was begun by another number of processes, or finished with other settings."""
    if done := finished(folder):
        layout.check_same(folder, done, settings)
        return True
    sizes = {int(path.name.rsplit("-", 1)[1]) for path in folder.glob(PARTS)}
    if (folder / layout.MANIFEST).is_file():
        sizes.add(1)
    if others := sizes - {rank.world_size}:
        raise ShardError(
            f"{folder} was begun by {min(others)} process(es) but {rank.world_size} would continue "
            "it now; start as many again (RANK and WORLD_SIZE may be set by hand for one of them), "
            "or extract into another folder")
    return False


def join(folder: Path, world_size: int, n_samples: int, samples_per_shard: int) -> bool:
    """Make one run of the parts once all are finished; True when the folder holds that run. Killed
    half-way, it is continued; another process that joins is waited for. Raises: ShardError if parts
    differ in their settings or a file is missing; StorageError."""
    ranks = [Rank(number, world_size) for number in range(world_size)]
    parts = [rank.part(folder) for rank in ranks if rank.share(n_samples, samples_per_shard)]
    end = time.monotonic() + _WAIT_S
    while True:
        if finished(folder) and not any(part.exists() for part in parts):
            return True
        if not finished(folder) and not all(finished(part) for part in parts):
            # The parts may have gone between the two looks, into a run that is finished now.
            return finished(folder) is not None
        try:
            with FolderLock(folder):
                if not finished(folder):
                    _join(folder, parts)
                for part in parts:
                    shutil.rmtree(part, ignore_errors=True)
                return True
        except StorageError:  # of another's lock, or a disk that is full
            at_work = finished(folder) or lock_holder(folder) is not None
            if not at_work or time.monotonic() > end:
                raise
            time.sleep(0.05)


def _join(folder: Path, parts: list[Path]) -> None:
    manifests = {part: layout.read_manifest(part) for part in parts}
    first, shards, times, n_samples = manifests[parts[0]], [], [], 0
    moves = {folder / entry["file"]: (parts[0] / entry["file"], entry["bytes"])
             for entry in first["heads"].values()}
    for part, manifest in manifests.items():
        if difference := layout.first_difference(_common(first), _common(manifest)):
            raise ShardError(f"{part} does not belong to {parts[0].name}: {difference}; delete the "
                             "part that is wrong and extract it again")
        times += [{**line, "first": n_samples + line["first"]} for line in layout.read_times(part)]
        for entry in manifest["shards"]:
            names = {"file": layout.shard_name(len(shards)),
                     "metadata_file": layout.shard_name(len(shards), "parquet")}
            moves |= {folder / new: (part / entry[key], entry[key.replace("file", "bytes")])
                      for key, new in names.items()}
            shards.append({**entry, **names, "first": n_samples + entry["first"]})
        n_samples += manifest["n_samples"]
    for target, (source, size) in moves.items():
        there = source if source.is_file() else target  # renamed before by a killed join
        if not there.is_file() or there.stat().st_size != size:
            raise ShardError(f"{source} is missing or truncated; repair {source.parent}, then "
                             "start any rank again")
    with storing(folder):
        for target, (source, _) in moves.items():
            if source.is_file():
                os.replace(source, target)
    files = {}
    if times:
        data = "".join(json.dumps(line) + "\n" for line in times).encode()
        atomic_write(folder / layout.TIMES, data)
        files["times"] = layout.entry_of(layout.TIMES, data)
    config = {key: value for key, value in first["config"].items() if key != "part"}
    layout.write_manifest(folder, {
        **first, "config": config, "shards": shards, "n_samples": n_samples, "files": files,
        "max_seq_len": max(one.get("max_seq_len", 0) for one in manifests.values()),
        "provenance": {**first["provenance"], "processes": len(parts)}
    })


def _common(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the parts of one run share."""
    return {**{key: manifest[key] for key in _SETTINGS},
            "config": layout.of_data(manifest["config"], "part")}
