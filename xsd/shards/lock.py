"""One writer to a folder: an advisory lock that dies with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from xsd.core import StorageError

LOCK = "writer.lock"


class FolderLock:
    """Held from its making until release(). Raises: StorageError naming the process that has it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                self._file = open(self.path, "a+")  # noqa: SIM115 (held until release)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder may have removed the name between our open and our lock.
                own = os.fstat(self._file.fileno()).st_ino
                if self.path.exists() and own == self.path.stat().st_ino:
                    break
                self._file.close()
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise StorageError(f"{folder} is being written by process {holder}; wait for it to "
                               "finish, stop it, or choose another folder") from error
        except OSError as error:
            raise StorageError(f"cannot write in {folder}: {error.strerror or error}; check the "
                               "folder's permissions or choose another one") from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    @property
    def held(self) -> bool:
        """True until release()."""
        return not self._file.closed

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self.held:
            self.path.unlink(missing_ok=True)
            self._file.close()


def lock_holder(folder: str | Path) -> int | None:
    """Process id of the writer at work in the folder; None if there is none, a killed one too."""
    with contextlib.suppress(FileNotFoundError), open(Path(folder) / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text.isdigit() else 0
    return None
