"""The file of a live run: JSON lines, a header first, appended sample by sample and synced, so that
an interrupted run continues where it stopped."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from xsd.core import ParameterError, StorageError
from xsd.files import parse_json, provenance

Record = dict[str, Any]


class OtherConfiguration(ParameterError):
    """The file holds records of other settings."""


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All whole records of a file. Raises: StorageError when it is missing or has no header."""
    return _lines(Path(path))[0][1:]


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """files.provenance as it was when the file was begun. Raises: as :func:`read_records`."""
    return _lines(Path(path))[0][0].get("provenance", {})


def _lines(path: Path) -> tuple[list[dict[str, Any]], int, str]:
    """The lines, the header first; the number of bytes that are whole lines; the last check ("" of
    a file that was begun without)."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no file")
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}; run the benchmark first") from error
    whole, last, away = data[:data.rfind(b"\n") + 1], "", "move it away and measure again"
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        row = parse_json(text, f"{path} is damaged: line {number}", StorageError, away)
        if not isinstance(row, dict) or (
                number > 1 and not {"arm", "sample", "sequence", "repeat"} <= row.keys()):
            raise StorageError(f"{path}: line {number} is no record of this benchmark; {away}")
        check = row.pop("check", "")
        same = not check or text.decode() == json.dumps({**row, "check": check}, sort_keys=True)
        if not same or check != (
                _check(last, row) if last or (check and number == 1) else ""):
            raise StorageError(f"{path}: line {number} was changed after it was written (its check "
                               f"differs), or one before it is missing; {away}")
        last = check
        lines.append(row)
    if not lines:
        return [{}], 0, ""
    if not isinstance(lines[0].get("header"), dict):
        raise StorageError(f"{path} is no record file of this benchmark (its first line is no "
                           "header); choose another path")
    return lines, len(whole), last


def _check(before: str, row: Mapping[str, Any]) -> str:
    """Of a line and all before it, so that none can be changed, left out or moved."""
    return hashlib.sha256((before + json.dumps(row, sort_keys=True)).encode()).hexdigest()[:16]


@contextlib.contextmanager
def open_records(path: Path, header: dict[str, Any], about: Mapping[str, Any] | None = None,
                 ) -> Iterator[tuple[list[Record], Callable[[Sequence[Record]], None]]]:
    """Lock the file, check or write its header, drop a half-written line; yield the records and a
    durable append. about: goes into the provenance that the file is begun with. Raises:
    OtherConfiguration for records of another header; StorageError when nobody can write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; check the folder or "
                           "choose another one") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{path} is being written by another run; wait for it or choose "
                               "another path") from error
        lines, whole, last = _lines(path)
        file.truncate(whole)
        header = json.loads(json.dumps(header))  # tuples and such as they come back
        found, checks = lines[0].get("header"), [last] if last or not whole else []
        if found is None:
            origin = provenance(**{"seed": header.get("seed"), **(about or {})})
            _append(file, path, checks, [{"header": header, "provenance": origin}])
        elif found != header:
            other = ", ".join(key for key in header if found.get(key) != header[key])
            raise OtherConfiguration(
                f"{path} was measured with another configuration ({other} differ); choose another "
                "path or the same settings")
        yield lines[1:], functools.partial(_append, file, path, checks)


def _append(file: BinaryIO, path: Path, checks: list[str], rows: Sequence[Any]) -> None:
    """checks: the last one, where the file has them."""
    lines = []
    for row in json.loads(json.dumps(rows)):  # as they come back
        checks[:] = [_check(last, row) for last in checks]
        own = {**row, "check": checks[0]} if checks else row
        lines.append(json.dumps(own, sort_keys=True))
    try:
        file.write("".join(line + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free space and run "
                           "again, it continues there") from error
