"""The file of a live run: JSON lines, a header first, appended sample by sample and synced, so that
an interrupted run continues where it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from xsd.core import ParameterError, StorageError
from xsd.files import provenance

Record = dict[str, Any]


class OtherConfiguration(ParameterError):
    """The file holds records of other settings."""


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All whole records of a file. Raises: StorageError when it is missing or has no header."""
    return _lines(Path(path))[0][1:]


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """files.provenance as it was when the file was begun. Raises: as :func:`read_records`."""
    return _lines(Path(path))[0][0].get("provenance", {})


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, the header first, and the number of bytes that are whole lines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}; run the benchmark first") from error
    whole = data[:data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise StorageError(
            f"{path} is damaged ({error}); move it away and measure again") from error
    if not lines:
        return [{}], 0
    if "header" not in lines[0]:
        raise StorageError(f"{path} is no record file of this benchmark (its first line is no "
                           "header); choose another path")
    return lines, len(whole)


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
        lines, whole = _lines(path)
        file.truncate(whole)
        header = json.loads(json.dumps(header))  # tuples and such as they come back
        found = lines[0].get("header")
        if found is None:
            origin = provenance(**{"seed": header.get("seed"), **(about or {})})
            _append(file, path, [{"header": header, "provenance": origin}])
        elif found != header:
            other = ", ".join(key for key in header if found.get(key) != header[key])
            raise OtherConfiguration(
                f"{path} was measured with another configuration ({other} differ); choose another "
                "path or the same settings")
        yield lines[1:], functools.partial(_append, file, path)


def _append(file: BinaryIO, path: Path, rows: Sequence[Any]) -> None:
    try:
        file.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free space and run "
                           "again, it continues there") from error
