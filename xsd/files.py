"""Safe writing, hashes, where a number came from, and objects named by a text. Only the standard
library and xsd.core are imported here."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from xsd.core import ROOT, ParameterError, StorageError, XsdError


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside ``target``; on success sync and rename it, on failure leave the
    target as it was. Raises: StorageError when it cannot be written or the disk is full."""
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # gone, or the folder never was one
            temporary.unlink()


def storage_error(target: str | os.PathLike[str], error: OSError) -> StorageError:
    """What to raise where ``target`` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"cannot write {target}: the disk is full; free space or choose "
                            "another output folder and run again (nothing was lost)")
    return StorageError(f"cannot write {target}: {error.strerror or error}; check the folder's "
                        "permissions or choose another one")


def atomic_write(target: str | os.PathLike[str], data: bytes | str) -> None:
    """Write bytes or UTF-8 text through :func:`atomic_path`."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(target: str | os.PathLike[str], value: Any) -> None:
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


def read_json(path: str | os.PathLike[str], error: type[XsdError], way_out: str) -> Any:
    """A JSON file. Raises: ``error``, with the way out, when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise error(f"{path} is missing; {way_out}") from problem
    except (OSError, ValueError) as problem:
        raise error(f"{path} is not JSON ({problem}); {way_out}") from problem


def sha256_of(*paths: str | os.PathLike[str]) -> str:
    """Hex digest over the bytes of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


# --- where a number came from

_PACKAGES = ("torch", "transformers", "numpy", "pandas", "plotly", "peft", "bitsandbytes",
             "papermill", "safetensors")


def provenance(*, seed: int | None = None, data_hash: str | None = None, device: str = "cpu",
               **extra: Any) -> dict[str, Any]:
    """Git revision (and whether the tree was dirty), versions, machine, seed, data hash, device,
    command (``["notebook", <its file>]`` inside a kernel); paths :func:`portable`, since reports
    with these records are published."""
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
    if len(pieces) == 1:
        return text
    return "".join(piece if piece in "=," else portable(piece) for piece in pieces)


def _command() -> list[str]:
    if "ipykernel" in Path(sys.argv[0]).as_posix():
        name = os.environ.get("XSD_NOTEBOOK") or Path(os.environ.get("JPY_SESSION_NAME", "")).name
        return ["notebook", name] if name else ["notebook"]
    return [Path(sys.argv[0]).name, *portable(sys.argv[1:])]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                              timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# --- a researcher's own parts


def import_object(text: str) -> Any:
    """What ``"module:Name"`` names: a researcher's own class or function, from an installed module
    or one in the working directory or the checkout. Naming a module runs it: call this with what
    the user typed, never with what a file says. Raises: ParameterError where it names none."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ParameterError(f"{text!r} names no object; write module:Name, such as my_levels:Mine")
    # a notebook runs in the checkout, but names what stands where its run was started
    places = (os.environ.get("XSD_STARTED_IN"), os.getcwd(), str(ROOT))
    added = [folder for folder in dict.fromkeys(places) if folder and folder not in sys.path]
    sys.path.extend(added)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise ParameterError(
            f"{text!r} cannot be imported ({error}); put {module.partition('.')[0]}.py into the "
            "working directory or install it") from error
    except AttributeError as error:
        raise ParameterError(
            f"the module {module} holds no {name}; check the name behind the colon") from error
    finally:
        for folder in added:
            sys.path.remove(folder)
    return found


def is_path(spec: Any) -> bool:
    """Whether a part is named by its file or folder: a text with a separator or such a suffix."""
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
