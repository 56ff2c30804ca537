"""Names, paths and questions that somebody else wrote, and what stands at a path."""

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xsd.core import DatasetError, XsdError

MOST_CHARACTERS = 2000
"""Of a question or a name."""


def check_plain(path: str | os.PathLike[str], error: type[XsdError], what: str) -> None:
    """Raises: ``error`` unless a plain file stands there: a pipe or a device is never opened."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as problem:
        raise error(f"{path}: there is no such {what}") from problem
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise error(f"{path} is {kind}, not the {what} that is expected there")


def inside(name: str) -> Path:
    """A path of the layout. Raises: ValueError for one that leaves the folder or is no name."""
    path = Path(plain(name))
    if ("\\" in name and "/" not in name) or re.match(r"\w+://", name):
        raise ValueError(f"path {name!r} is no relative path with / between its folders")
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"path {name!r} leaves the folder")
    if any(len(os.fsencode(part)) > 250 for part in path.parts) or len(path.parts) > 16:
        raise ValueError("a path in it is too long")
    return path


def apart(name: str, others: Iterable[str]) -> None:
    """Raises: ValueError where another name differs in capitals alone: some disks take it for the
    same."""
    for one in others:
        if one != name and one.casefold() == name.casefold():
            raise ValueError(f"{one[:80]!r} is there, which differs in capitals alone")


def plain(text: str) -> str:
    """Raises: ValueError for what is no text that can stand in a line."""
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise ValueError(f"{str(text)[:60]!r} is no text of at most {MOST_CHARACTERS} characters")
    if any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in text):
        raise ValueError(f"{text[:60]!r} holds control characters")
    return text


def listed(entry: Mapping[str, Any], kind: str) -> list[Any]:
    """A list of an index entry, empty where there is none. Raises: ValueError for anything else."""
    found = entry.get(kind) or []
    if not isinstance(found, list) or len(found) > 1000:
        raise ValueError(f"{kind} is not a list of names")
    return found


def span(t_us: Any) -> tuple[int, int] | None:
    """Start and end of a clip, where the entry says. Raises: ValueError for anything else."""
    if t_us is None:
        return None
    whole = isinstance(t_us, list) and [type(one) for one in t_us] == [int, int]
    if not whole or not 0 <= t_us[0] < t_us[1] < 1 << 61:
        raise ValueError(f"t_us is {str(t_us)[:60]}, not the start and end of a clip in µs")
    return t_us[0], t_us[1]


def within(root: Path, path: Path) -> Path:
    """``path``, where following its links does not leave the folder. Raises: DatasetError."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise DatasetError(f"{path} leads out of the dataset folder; copy what it links to into "
                           "the folder")
    return path


def check_question(question: Any, where: str) -> str:
    """The question. Raises: DatasetError for none, one of zero length, of more than
    MOST_CHARACTERS, or with control characters (a line break, too)."""
    if isinstance(question, str) and not any(map(str.isprintable, "".join(question.split()))):
        raise DatasetError(f"{where}: the question has zero length; ask something")
    try:
        return plain(question)
    except ValueError as error:
        raise DatasetError(f"{where}: the question {error}; ask in one line") from error
