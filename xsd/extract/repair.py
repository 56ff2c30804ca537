"""What became of a run: its status while it runs or after it died, and extracting again just what is damaged."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from xsd.core import PairedStates, Sample, ShardError
from xsd.extract import pairs, plan, run
from xsd.models.loading import Pair
from xsd.shards import format as layout
from xsd.shards import store
from xsd.shards import writer as shard_writer


@dataclass(frozen=True)
class Status:
    """One run folder now. state: "finished", "running" (by process pid) or "stopped". total: planned samples, None if unknown.

    rate: samples a second over its last batches, eta_s: seconds left; None where nothing was timed. idle_s: since the last write.
    """

    folder: Path
    mode: str
    state: str
    done: int
    total: int | None
    rate: float | None
    eta_s: float | None
    gb: float
    idle_s: float
    pid: int | None

    def __str__(self) -> str:
        share = f" of {self.total} ({100 * self.done / self.total:.0f} %)" if self.total else ""
        pace = f", {self.rate:.1f} samples/s" if self.rate else ""
        left = f", {self.eta_s:.0f} s left" if self.state == "running" and self.eta_s is not None else ""
        who = f" (process {self.pid})" if self.pid else ""
        return (
            f"{self.folder}: {self.state}{who}, {self.done}{share} samples{pace}{left}, "
            f"{self.gb:.3f} GB, last write {self.idle_s:.0f} s ago"
        )


def status(folder: str | Path) -> list[Status]:
    """Every run in a folder (the run itself, or its sub-folders by mode), without disturbing a writer. Raises: ShardError if none."""
    folder = Path(folder)
    places = [folder] if (folder / layout.MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{layout.MANIFEST}"))
    if not places:
        raise ShardError(f"no run of an extraction in {folder}; give the folder that `extract` wrote")
    return [_status(place) for place in places]


def _status(folder: Path) -> Status:
    manifest = layout.read_manifest(folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    done = manifest["n_samples"]
    for piece in sorted(folder.glob("pending-*.safetensors")):
        try:
            with safe_open(piece, "pt") as file:
                done = max(done, int(piece.stem.split("-")[1]) + file.get_slice("offsets_drafter").get_shape()[0] - 1)
        except (FileNotFoundError, SafetensorError):  # the writer removed it just now, or it is damaged and will be extracted again
            continue
    total = manifest["config"].get("n_samples")
    rate = _rate(folder)
    pid = None if manifest["finished"] else shard_writer.lock_holder(folder)
    return Status(
        folder,
        manifest["mode"],
        "finished" if manifest["finished"] else "running" if pid is not None else "stopped",
        done,
        total,
        rate,
        (total - done) / rate if rate and total is not None else None,
        sum(path.stat().st_size for path in files if path.exists()) / 1e9,
        max(time.time() - max((path.stat().st_mtime for path in files if path.exists()), default=0.0), 0.0),
        pid,
    )


def _rate(folder: Path, last: int = 20) -> float | None:
    path = folder / layout.TIMES
    if not path.exists():
        return None
    entries: list[dict[str, Any]] = []
    for line in path.read_text().splitlines()[-last:]:
        try:
            entries.append(json.loads(line))
        except ValueError:  # the last line of a killed writer
            continue
    seconds = sum(entry["seconds"] for entry in entries)
    return sum(entry["n"] for entry in entries) / seconds if seconds else None


def repair(pair: Pair, samples: Sequence[plan.Item], folder: str | Path) -> list[store.Problem]:
    """Extract the damaged shards of a run again, and nothing else. samples: the same as were given to extract().

    Returns what was mended. Raises: ShardError if the models or samples are not those of the run (naming the difference), or for a
    damaged manifest; StorageError while another process writes there.
    """
    folder = Path(folder)
    found = [problem for problem in store.verify(folder) if not problem.file.name.startswith("pending-")]
    if not found:
        return []
    manifest = layout.read_manifest(folder)
    config = manifest["config"]
    if "samples_hash" not in config:
        raise ShardError(f"{folder} was not written by an extraction; restore {found[0].file.name} from a copy")
    items = plan.order(samples, max_samples=config["max_samples"], seed=config["seed"])
    now = {"samples_hash": plan.plan_hash(items), "drafter": run.identity(pair.drafter), "verifier": run.identity(pair.verifier)}
    if "verifier_from" in config:
        raise ShardError(f"{folder} took the verifier's answers from another run; extract it again from that run into a new folder")
    difference = layout.first_difference({key: config[key] for key in now}, now)
    if difference:
        raise ShardError(f"{folder} cannot be repaired with these models and samples: {difference}; give those it was extracted with")
    writer = shard_writer.ShardWriter(folder, **{key: manifest[key] for key in ("mode", "tap", "dtype", "config", "samples_per_shard")})
    try:
        for number in sorted({problem.shard for problem in found if problem.shard is not None}):
            entry = manifest["shards"][number]
            writer.rewrite_shard(number, _again(pair, items, manifest["mode"], config, entry["first"], entry["n_samples"]))
        names = {problem.file.name for problem in found}
        for handle in (pair.drafter, pair.verifier):
            if layout.head_name(handle.role) in names:
                writer.save_head(handle.role, handle.head.weight, pair.draft_vocab_size)
        if layout.TIMES in names:
            writer.forget_times()
    finally:
        writer.close(finished=False)
    return found


def _again(pair: Pair, items: Sequence[plan.Item], mode: str, config: dict[str, Any], first: int, n: int) -> list[PairedStates]:
    """Samples first … first + n - 1, computed in the batches of the original run so that the bytes are the same."""
    size = config["batch_size"]
    begin, states = first - first % size, []
    for start in range(begin, first + n, size):
        loaded: list[Sample] = [item if isinstance(item, Sample) else item() for item in items[start : start + size]]
        states += pairs.PAIRS[mode](pair, loaded, config["max_new_tokens"], size)
    return states[first - begin : first - begin + n]
