"""Files of tensors, as safetensors and as torch's .pt: ours carry a digest of all they hold, which
is compared on loading; what others made is bounded before anything is allocated. Nothing in a file
is executed, no name in it imported."""

import hashlib
import json
import pickletools
import reprlib
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from xsd import files
from xsd.core import CheckpointError

AGAIN = "copy it again, or train again"
PICKLE_LIMIT = 1 << 24
"""Bytes of the pickle inside a .pt file: names, shapes and settings, not the tensors."""
_HARMLESS = {"_codecs encode", "collections OrderedDict", "torch Size", "torch device",
             "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2"}
_END = b"PK\5\6"  # where the last record of a zip file begins
_HEX = 64


# --- safetensors


def digest_of(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over a text and names, dtypes, shapes and bytes of tensors on the CPU."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Tensors and a configuration with their digest in its header, atomically; the same values
    give the same bytes. Raises: StorageError."""
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
           for name, tensor in tensors.items()}
    text = json.dumps(config, sort_keys=True, default=str)
    signed = json.loads(text) | {"digest": digest_of(text, own)}
    # one entry only: the library writes several in no fixed order
    metadata = {"config": json.dumps(signed, sort_keys=True)}
    files.atomic_write(path, safetensors.torch.save(own, metadata))


def read(path: Path, *, weights: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration without its digest, {} where there is none; tensors, which ``weights=False``
    leaves out together with the comparison). A file of an older version has no digest, which is
    said. Raises: CheckpointError when it is no such file or was changed after it was written."""
    text, tensors = _open(path, weights)
    config = files.parse_json(text, f"the configuration in {path}", CheckpointError,
                              AGAIN) if text else {}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} has no configuration in its header; {AGAIN}")
    digest = config.pop("digest", None)
    if weights and digest is None and config.get("format") in (None, "xsd-adapter-1"):
        unchecked(path)
    elif weights and digest != digest_of(json.dumps(config, sort_keys=True), tensors):
        raise CheckpointError(f"{path} was changed after it was written (its digest differs); "
                              f"{AGAIN}")
    return config, tensors


def read_any(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that need not be ours. Raises: CheckpointError."""
    return _open(path, weights=True)[1]


def _open(path: Path, weights: bool) -> tuple[str, dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names, metadata = file.keys() if weights else (), file.metadata() or {}
            if not {"config", "format"} >= metadata.keys():  # a flip in the name of either
                raise ValueError(f"its header names {', '.join(metadata)[:80]}")
            return metadata.get("config", ""), {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the library raises many kinds
        raise CheckpointError(f"{path} is damaged or no safetensors file ({short(error)}); {AGAIN}"
                              ) from error


def unchecked(path: Path) -> None:
    """Say, once for each file, that nothing in it can be compared."""
    warnings.warn(f"{path} holds no digest (it is older, or made elsewhere): damage to it cannot "
                  "be seen", stacklevel=3)


def short(error: BaseException) -> str:
    """The first line of a library's message, at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines[0] else type(error).__name__


# --- JSON beside them, with a digest of itself


def write_signed(path: Path, record: Mapping[str, Any]) -> None:
    """JSON with a digest of itself, so that a changed byte is seen; atomic."""
    files.atomic_write(path, _signed(json.loads(json.dumps(record, default=str))))


def read_signed(path: Path, way_out: str) -> dict[str, Any]:
    """A record of :func:`write_signed`, without its digest; one of an older version has none.
    Raises: CheckpointError when it is no record or was changed after it was written."""
    record = files.read_json(path, CheckpointError, way_out)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no record; {way_out}")
    marks = [record.pop(name, None) for name in ("digest", "signed")]  # one flip spares one
    if any(marks) and _signed(record).encode() != path.read_bytes():
        raise CheckpointError(f"{path} was changed after it was written (its digest differs); "
                              f"{way_out}")
    return record


def _signed(record: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    signed = {**record, "digest": digest, "signed": True}
    return json.dumps(signed, indent=1, sort_keys=True) + "\n"


# --- torch's .pt


def write_pt(path: Path, value: Any) -> None:
    """``torch.save``, atomically, with a digest of the file as its zip comment. Raises:
    StorageError."""
    with files.atomic_path(path) as temporary, open(temporary, "w+b") as file:
        hashing = _Hashing(file)
        try:
            torch.save(value, hashing)
        except RuntimeError as error:  # torch's zip writer hides what its file said
            raise hashing.failed or error from error
        file.seek(-2, 2)  # the length of the comment, so far 0
        file.write(_HEX.to_bytes(2, "little") + hashing.digest.hexdigest().encode())


class _Hashing:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.failed: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()


def check_pt(path: Path, file: IO[bytes]) -> None:
    """Raises: CheckpointError when a file of :func:`write_pt` was changed."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 22))  # an end without a comment
    if file.read(4) == _END or size < 22 + _HEX:
        return unchecked(path)
    file.seek(size - _HEX - 2)
    end, found = file.read(), hashlib.sha256()
    file.seek(0)
    left = size - _HEX - 2
    while data := file.read(min(left, 1 << 20)):
        found.update(data)
        left -= len(data)
    found.update(b"\0\0")
    if end != _HEX.to_bytes(2, "little") + found.hexdigest().encode():
        raise CheckpointError(f"{path} was changed after it was written (its digest differs); "
                              f"{AGAIN}")


def read_pt(path: Path, *, ours: bool = False, stand_ins: Mapping[str, type] | None = None,
            device: str | torch.device = "cpu") -> Any:
    """What a .pt file holds. ours: of :func:`write_pt`, compared with its digest. stand_ins: last
    name of a class in it → what stands in for it. Raises: CheckpointError when it is damaged,
    would run code, or would take more memory than the file has bytes."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            if ours:
                check_pt(path, file)
            names = _globals(file)
            known = {name: stand_in for name in names
                     for last, stand_in in (stand_ins or {}).items() if name.endswith(f" {last}")}
            _refuse_others(names - known.keys())
            file.seek(0)
            allowed = [(stand_in, name.replace(" ", ".")) for name, stand_in in known.items()]
            stack.enter_context(torch.serialization.safe_globals(allowed))
            return torch.load(file, map_location=device, weights_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # unpickling raises nearly everything
            raise CheckpointError(f"{path} cannot be read without running code in it, or is "
                                  f"damaged ({short(error)}); convert it where it was made, or "
                                  "train again") from error


def _globals(file: IO[bytes]) -> set[str]:
    """"module name" of all that the pickles name, none of it imported. Raises: ValueError for a
    zip whose files unpack to more than it has bytes."""
    size, start = file.seek(0, 2), file.seek(0)
    if file.read(4) == b"PK\3\4":
        held = zipfile.ZipFile(file).infolist()
        pickled = [one for one in held if one.filename.split("/")[-1] == "data.pkl"]
        if sum(one.file_size for one in held) > size or len(pickled) != 1:
            raise ValueError("its parts are larger than the file")
        if pickled[0].file_size > PICKLE_LIMIT:
            raise ValueError(f"more than {PICKLE_LIMIT >> 20} MB of settings")
        return _named(pickletools.genops(zipfile.ZipFile(file).read(pickled[0])))
    file.seek(start)
    found: set[str] = set()
    for _ in range(5):  # the format before: magic number, version, machine, value, keys
        found |= _named(pickletools.genops(file))
    return found


def _named(operations: Iterable[tuple[Any, Any, int | None]]) -> set[str]:
    found, texts = set(), []
    for operation, value, _ in operations:
        if operation.name in ("GLOBAL", "INST"):
            found.add(value)
        elif operation.name == "STACK_GLOBAL":
            found.add(" ".join(texts[-2:]))
        elif isinstance(value, str):
            texts.append(value)
    return found


def _refuse_others(names: set[str]) -> None:
    others = sorted(name for name in names if name not in _HARMLESS and not (
        name.startswith("torch ") and (name.endswith("Storage") or name.split()[1].islower())))
    if others:
        raise ValueError(f"it names {', '.join(others)[:200]}")


def plain(tensors: Any, room: int, path: Path) -> dict[str, Tensor]:
    """The tensors of a mapping, if it holds nothing else and each is as large as it looks. room:
    bytes of the file they came from. Raises: CheckpointError."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path} holds no tensors by name; {AGAIN}")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)
                and tensor.layout == torch.strided and tensor.device.type != "meta"
                and not tensor.is_quantized and tensor.numel() * tensor.element_size() <= room):
            raise CheckpointError(f"{path}: {reprlib.repr(name)} is no tensor of as many values as "
                                  f"the file has; {AGAIN}")
    return dict(tensors)
