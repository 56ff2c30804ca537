"""Safe writing and reading, one writer to a folder, hashes, provenance, objects named by a text."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from xsd.core import ROOT, ParameterError, StorageError, XsdError, reading


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside ``target``; on success sync and rename it (the name is synced,
    too), on failure leave the target as it was. Raises: StorageError."""
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    with storing(target), contextlib.ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        stack.callback(temporary.unlink, missing_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        names = os.open(target.parent, os.O_RDONLY)
        stack.callback(os.close, names)
        os.fsync(names)  # the name is to survive a loss of power, too


def remove_leftovers(folder: str | Path, name: str = "") -> None:
    """Delete what killed processes left of :func:`atomic_path`; only where ``folder`` is locked."""
    for path in Path(folder).glob(f".{name}*.part"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def storing(target: str | Path) -> Iterator[None]:
    """An OSError in this block is a StorageError: ``target`` could not be written."""
    try:
        yield
    except OSError as error:
        why = f"{error.strerror or error}; check the folder's permissions or choose another one"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = ("the disk is full; free space or choose another output folder and run again "
                   "(nothing was lost)")
        raise StorageError(f"cannot write {target}: {why}") from error


def append_line(path: str | Path, text: str) -> None:
    """One line more, in one write: those of several processes do not mix. Raises: StorageError."""
    with storing(path), open(path, "ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def atomic_write(target: str | Path, data: bytes | str) -> None:
    """Write bytes or UTF-8 text through :func:`atomic_path`."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(target: str | Path, value: Any) -> None:
    """Atomic, sorted, indented JSON: the same value gives the same bytes."""
    atomic_write(target, json.dumps(value, indent=1, sort_keys=True, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # numpy and torch scalars
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def read_json(path: str | Path, error: type[XsdError], way_out: str, kind: type = object, *,
              max_bytes: int = 1 << 28) -> Any:
    """A JSON file, with or without a byte-order mark. Raises: ``error``, with the way out, when it
    is missing, damaged, nested too deep, larger than ``max_bytes`` or not of the ``kind``."""
    try:
        with open(os.open(path, os.O_NONBLOCK), "rb") as file:  # a pipe is not waited for
            data = file.read(max_bytes + 1)
    except OSError as problem:
        lost = isinstance(problem, FileNotFoundError)
        what = "is missing" if lost else f"cannot be read ({problem.strerror})"
        raise error(f"{path} {what}; {way_out}") from problem
    if len(data) > max_bytes:
        raise error(f"{path} is larger than {max_bytes >> 20} MB; {way_out}")
    return parse_json(data, str(path), error, way_out, kind)


def parse_json(text: str | bytes, what: str, error: type[XsdError], way_out: str,
               kind: type = object) -> Any:
    """The value that a JSON text stands for. Raises: ``error`` naming ``what``."""
    with reading(f"{what} is not JSON", error, way_out):
        found = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text,
                           object_pairs_hook=_once)
    if not isinstance(found, kind):
        raise error(f"{what} holds {type(found).__name__} and no "
                    f"{'fields' if kind is dict else kind.__name__}; {way_out}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises: ValueError for a name that stands twice; json would keep the last."""
    if len(found := dict(pairs)) < len(pairs):
        name = next(a for a, b in pairwise(sorted(one for one, _ in pairs)) if a == b)
        raise ValueError(f"{name[:80]!r} stands twice in one object")
    return found


def sha256_of(*paths: str | Path) -> str:
    """Hex digest over the bytes of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def fault(path: Path, digests: Collection[str], n_bytes: int | None = None) -> str | None:
    """What is wrong with a file of this size and one of these digests (if any); None: nothing."""
    if not path.is_file():
        return "is no file" if path.exists() else "is missing"
    if n_bytes is not None and (size := path.stat().st_size) != n_bytes:
        return f"has {size} bytes instead of {n_bytes}"
    return "does not match its checksum" if digests and sha256_of(path) not in digests else None


LOCK = "writer.lock"


class FolderLock:
    """One writer to a folder: an advisory lock until release() or the end of a ``with`` block, that
    dies with its process. name: its file. Raises: StorageError naming the process that has it."""

    def __init__(self, folder: str | Path, name: str = LOCK) -> None:
        self.path = Path(folder) / name
        with storing(folder):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                self._file = open(self.path, "a+")  # noqa: SIM115 (held until release)
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    self._file.seek(0)
                    holder = self._file.read().strip() or "unknown"
                    self._file.close()
                    raise StorageError(f"{folder} is being written by process {holder}; wait for "
                                       "it to finish, stop it, or choose another folder") from error
                # The last holder may have removed the name between our open and our lock.
                own = os.fstat(self._file.fileno()).st_ino
                if self.path.exists() and own == self.path.stat().st_ino:
                    break
                self._file.close()
        self._file.truncate(0)
        print(os.getpid(), end="", file=self._file, flush=True)

    @property
    def held(self) -> bool:
        """True until release()."""
        return not self._file.closed

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self.held:
            self.path.unlink(missing_ok=True)
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_holder(folder: str | Path, name: str = LOCK) -> int | None:
    """Process id of the writer at work in the folder; None if there is none, a killed one too."""
    with contextlib.suppress(FileNotFoundError), open(Path(folder) / name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text.isdigit() else 0
    return None


_PACKAGES = ("torch", "transformers", "numpy", "pandas", "plotly", "peft", "bitsandbytes",
             "papermill", "safetensors")


def provenance(*, seed: int | None = None, data_hash: str | None = None, device: str = "cpu",
               **extra: Any) -> dict[str, Any]:
    """Git revision and whether the tree was dirty, versions, machine, seed, data hash, device,
    command (``["notebook", <its file>]`` in a kernel); paths :func:`portable`, to be published."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    machine = {"system": platform.system(), "processor": platform.machine(),
               "cores": os.cpu_count()}
    return {"git_revision": _git("rev-parse", "HEAD") or "unknown",
            "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "versions": versions, "machine": machine, "seed": seed, "data_hash": data_hash,
            "device": device, "command": _command(), **portable(extra)}


def portable(value: Any) -> Any:
    """Nested records without this machine's folders: a path under the checkout becomes relative to
    it, another absolute one its last name, also between ``=`` and ``,`` (``run_dir=…``)."""
    if isinstance(value, Mapping):
        return {key: portable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(one) for one in value]
    if not isinstance(value, (str, Path)):
        return value
    text, path = str(value), Path(value)
    if "\n" not in text and path.is_absolute():
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    pieces = re.split("([=,])", text)
    return text if len(pieces) == 1 else "".join(
        piece if piece in "=," else portable(piece) for piece in pieces)


def _command() -> list[str]:
    if "ipykernel" in Path(sys.argv[0]).as_posix():
        name = os.environ.get("XSD_NOTEBOOK") or Path(os.environ.get("JPY_SESSION_NAME", "")).name
        return ["notebook", name] if name else ["notebook"]
    return [Path(sys.argv[0]).name, *portable(sys.argv[1:])]


def _git(*arguments: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                              timeout=10, check=True).stdout.strip()
    return ""


def import_object(text: str) -> Any:
    """What ``"module:Name"`` names: a researcher's own class or function, from an installed module
    or one in the working directory or the checkout. Naming a module runs it: call this with what
    the user typed, never with what a file says. Raises: ParameterError where it names none."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ParameterError(f"{text!r} names no object; write module:Name, such as my_levels:Mine")
    # a notebook runs in the checkout, but names what stands where its run was started
    places = (str(ROOT), os.environ.get("XSD_STARTED_IN"), os.getcwd())
    added = [folder for folder in dict.fromkeys(places) if folder and folder not in sys.path]
    sys.path.extend(added)
    try:
        with reading(f"{text!r} cannot be imported", ParameterError, f"put "
                     f"{module.partition('.')[0]}.py into the working directory or install it"):
            found: Any = importlib.import_module(module)
        for part in name.split("."):
            if not hasattr(found, part):
                raise ParameterError(f"the module {module} holds no {name}; check the name behind "
                                     "the colon")
            found = getattr(found, part)
    finally:
        for folder in added:
            sys.path.remove(folder)
    return found


def is_path(spec: Any) -> bool:
    """Whether a part is named by its file or folder."""
    return isinstance(spec, str) and (
        "/" in spec or "\\" in spec or spec.endswith((".safetensors", ".pt", ".pth")))


def name_of(spec: Any) -> str:
    """A part (name, class, object or path) in tables and folders: its text, ``level``, or class; of
    ``runs/a/adapters/L4/best.safetensors`` "L4 of a", of other paths the file or its folder."""
    if is_path(spec):
        parts = Path(spec.replace("\\", "/")).parts
        if re.fullmatch(r"(best|final|adapter)(_model)?\.\w+", parts[-1]) and len(parts) > 1:
            parts = parts[:-1]
        if parts[-2:-1] == ("adapters",) and len(parts) > 2:
            return f"{parts[-1]} of {parts[-3]}"
        return re.sub(r"\.(safetensors|pt|pth)$", "", parts[-1])
    if isinstance(spec, str):
        return spec
    built = spec if isinstance(spec, type) else type(spec)
    return getattr(spec, "level", "") or f"{built.__module__}:{built.__qualname__}"
