"""What every verb says on stderr, and the lock on what it writes."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any


def say(sentence: str) -> int:
    """One line on stderr, without escapes that a name may hold; returns the exit status 2."""
    with contextlib.suppress(OSError, AttributeError):  # stderr may be closed
        print("xsd:", re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", sentence), file=sys.stderr, flush=True)
    return 2


def alone(folder: Path, name: str = "writer.lock") -> Any:
    """A lock that one process holds, for a ``with`` block. Raises: StorageError in the others."""
    from xsd.files import FolderLock

    return FolderLock(folder, name)
