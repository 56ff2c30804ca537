"""The files of a run that no manifest answers for (results, tables, the token table, notebooks):
each folder's ``digests.jsonl`` has a line for whatever was written under a name, so that a changed
file is named."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xsd.core import XsdError
from xsd.files import append_line, atomic_path, fault, sha256_of, write_json

RECORD = "digests.jsonl"


@contextlib.contextmanager
def sealed_path(target: str | Path) -> Iterator[Path]:
    """As files.atomic_path, and the digest is on record before the name is."""
    with atomic_path(target) as temporary:
        yield temporary
        record(Path(target), temporary)


def write_sealed(target: str | Path, value: Any) -> None:
    """As files.write_json, with the digest on record."""
    with sealed_path(target) as temporary:
        write_json(temporary, value)


def record(target: Path, written: Path | None = None) -> None:
    """Note what stands under a name, or is about to (``written``). Raises: StorageError."""
    append_line(target.parent / RECORD, _line(sha256_of(written or target), target.name))


def _line(digest: str, name: str) -> str:
    text = f"{digest} {name}"
    return f"{text} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def on_record(folder: str | Path) -> dict[str, set[str]]:
    """Name → the digests of all that was written under it; a damaged line is one of RECORD, which
    nothing fits. {} where there is no record."""
    path, found = Path(folder) / RECORD, {}
    if not path.is_file() or path.stat().st_size > 1 << 26:
        return {RECORD: set()} if path.exists() else {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.rsplit(" ", 1)[0].partition(" ")
        whole = _line(digest, name) == line and Path(name).name == name
        found.setdefault(name if whole else RECORD, set()).update([digest] if whole else [])
    return found


def problems(folder: Path) -> dict[Path, str]:
    """What is wrong with the files on record in a folder."""
    found = {}
    for name, digests in on_record(folder).items():
        if wrong := "is damaged" if name == RECORD else fault(folder / name, digests):
            found[folder / name] = wrong
    return found


def check(path: Path, error: type[XsdError], way_out: str) -> None:
    """Raises: ``error`` where a file is not what was written under its name."""
    digests = on_record(path.parent).get(path.name)
    if digests and path.is_file() and sha256_of(path) not in digests:
        raise error(f"{path} was changed after it was written (its checksum in {RECORD} differs); "
                    f"{way_out}")
