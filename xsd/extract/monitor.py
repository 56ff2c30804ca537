"""What became of an extraction, from its files alone: how far it is, how fast, whether it lives,
and what went wrong (lines of ``errors.jsonl``). No writer is waited for or disturbed."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from xsd.core import ShardError, StorageError
from xsd.extract import ranks
from xsd.files import append_line, lock_holder
from xsd.shards import format as layout

ERRORS = "errors.jsonl"


@dataclass(frozen=True)
class Status:
    """One run folder now. state: "running" is by process ``pid``. total: planned samples, None if
    unknown. rate: samples a second over its last batches, eta_s: seconds left; None where nothing
    was timed. idle_s: since the last write."""

    folder: Path
    mode: str
    state: Literal["finished", "running", "stopped"]
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
        timed = self.state == "running" and self.eta_s is not None
        left = f", {duration(self.eta_s)} left" if timed else ""
        who = f" (process {self.pid})" if self.pid else ""
        return (f"{self.folder}: {self.state}{who}, {self.done}{share} samples{pace}{left}, "
                f"{self.gb:.3f} GB, last write {duration(self.idle_s)} ago")


@dataclass(frozen=True)
class Event:
    """One line of a run's errors. kind: "error" (a process's last words) or "restart"."""

    kind: str
    what: str
    pid: int
    part: str
    time_s: float

    def __str__(self) -> str:
        who = f"process {self.pid}" + (f", part {self.part}" if self.part else "")
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time_s))
        return f"{when}  {self.kind} ({who}): {self.what}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``5 h 20 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def runs(folder: str | Path) -> list[Path]:
    """Every folder with a manifest of states: ``folder`` itself, its kinds of pairs, the parts of
    several processes, or a notebook run's ``shards/*/*``. Raises: ShardError if there is none."""
    kinds = [Path(folder)]
    for pattern in ("*/", "*/*/", "shards/*/*/"):
        kinds += sorted(Path(folder).glob(pattern))
    places = [place for kind in kinds for place in (kind, *sorted(kind.glob(f"{ranks.PARTS}/")))]
    found = [place for place in dict.fromkeys(places) if (place / layout.MANIFEST).is_file()]
    if not found:
        raise ShardError(f"no run of an extraction in {folder}; give the folder that it wrote")
    return found


def status(folder: str | Path) -> list[Status]:
    """Every run in a folder. Raises: ShardError if there is none."""
    found = []
    for place in runs(folder):
        try:
            found.append(_status(place))
        except (ShardError, FileNotFoundError):
            if (place / layout.MANIFEST).is_file():  # else a part that was joined just now
                raise
    return found


def _status(folder: Path) -> Status:
    manifest = layout.read_manifest(folder)
    size, written, done = 0, 0.0, manifest["n_samples"]
    for path in sorted(folder.iterdir()):
        # a file the writer removed just now; a damaged piece, which will be extracted again
        with contextlib.suppress(OSError, SafetensorError, IndexError):
            about = path.stat()
            if path.is_file():
                size, written = size + about.st_size, max(written, about.st_mtime)
            if piece := re.fullmatch(r"pending-(\d{1,12})-\w+\.safetensors", path.name):
                with safe_open(path, "pt") as file:
                    n = file.get_slice("offsets_drafter").get_shape()[0] - 1
                done = max(done, int(piece[1]) + n)
    part = manifest["config"].get("part")
    total = (part if isinstance(part, dict) else manifest["config"]).get("n_samples")
    total = total if isinstance(total, int) else None
    last = layout.read_times(folder)[-20:]
    seconds = sum(line["seconds"] for line in last)
    rate = sum(line["n"] for line in last) / seconds if seconds else None
    eta_s = (total - done) / rate if rate and total is not None else None
    pid = None if manifest["finished"] else lock_holder(folder)
    state = "finished" if manifest["finished"] else "stopped" if pid is None else "running"
    return Status(folder, manifest["mode"], state, done, total, rate, eta_s, size / 1e9,
                  max(time.time() - written, 0.0), pid)


def note(folder: str | Path, kind: str, what: str, *, pid: int | None = None,
         part: str = "") -> None:
    """Add one line to the errors of a run; on a full disk, only this line is lost."""
    event = Event(kind, " ".join(what.split()), pid or os.getpid(), part, round(time.time(), 3))
    with contextlib.suppress(OSError, StorageError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        append_line(Path(folder) / ERRORS, json.dumps(asdict(event)))


@contextlib.contextmanager
def recording(folder: str | Path, part: str = "") -> Iterator[None]:
    """An exception that leaves this block is noted in the run's errors, and goes on."""
    try:
        yield
    except Exception as error:
        note(folder, "error", f"{type(error).__name__}: {error}", part=part)
        raise


def events(folder: str | Path) -> list[Event]:
    """Errors and restarts of the runs in a folder, or of the run it is part of; oldest first."""
    kinds = [place.parent if place.match(ranks.PARTS) else place for place in runs(folder)]
    names = [field.name for field in fields(Event)]
    found = [Event(*(line[name] for name in names))
             for file in dict.fromkeys(kind.resolve().parent / ERRORS for kind in kinds)
             for line in layout.read_lines(file, *names)
             if isinstance(line["time_s"], int | float) and abs(line["time_s"]) < 1e10]
    return sorted(found, key=lambda event: event.time_s)


def report(folder: str | Path) -> str:
    """What ``xsd data status`` prints: one line per run, then the ten latest errors."""
    states, found = status(folder), events(folder)
    lines = [str(one) for one in states]
    if found:
        shown = ", the last 10" if len(found) > 10 else ""
        lines.append(f"errors and restarts ({len(found)}{shown}):")
        lines += [f"  {event}" for event in found[-10:]]
    if any(one.state == "stopped" for one in states):
        lines.append("stopped runs are continued by the command that began them")
    return "\n".join(lines)
