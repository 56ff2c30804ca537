"""What every verb says on stderr, the lock on what it writes, what stands beside the package."""

import contextlib
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from xsd.core import ParameterError


def say(sentence: str) -> int:
    """One line on stderr, without escapes that a name may hold; returns the exit status 2."""
    with contextlib.suppress(OSError, AttributeError):  # stderr may be closed
        print("xsd:", re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", sentence), file=sys.stderr, flush=True)
    return 2


def alone(folder: Path, name: str = "writer.lock") -> Any:
    """A lock that one process holds, for a ``with`` block. Raises: StorageError in the others."""
    from xsd.files import FolderLock

    return FolderLock(folder, name)


def beside(module: str) -> Any:
    """A module beside the package. Raises: ParameterError where it was not shipped."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or "?"):
            raise
        raise ParameterError(f"this verb needs {module}, which stands beside the package: run xsd "
                             "from a checkout") from error
