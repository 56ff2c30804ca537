"""Hidden states as the first scripts for this task left them, converted to a run folder. A folder
holds index.json ({"config", "chunks": [{"path", "n_samples"}]}) and chunks/*.pt, each a dict
{"egpt_hidden", "vl_hidden": [n, S, D] float32 (or a list of n [S, D]), "seq_lens": [n], "metadata":
n dicts}; a single file is one such dict with "config". Both models ran freely, each answer was cut
to the shorter of the two (free_running, after the final norm), and token ids were not kept: -1,
marked as absent."""

import itertools
import json
import operator
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xsd.core import PairedStates, ShardError, reading
from xsd.files import read_json, sha256_of
from xsd.shards.writer import ShardWriter

_NEEDED = ("egpt_hidden", "vl_hidden", "seq_lens")
UNKNOWN = "unknown"
"""The sequence of every sample where no dataset folder names them."""
_TEXT, _PICKLE, _PIECES = 100_000, 1 << 27, 40_000
"""Longest text of a sample, in characters; largest pickle, in bytes; pieces of a config."""
_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_COPY = "restore it from a copy"


class _Dtype:
    """Stands in for numpy.dtype where a file is read: a plain number's, nothing larger."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biufSU":
            raise ValueError(f"numpy values of type {name}")

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def of(self, data: Any) -> np.ndarray:
        """The values behind some bytes: never more than these bytes hold."""
        return np.frombuffer(bytes(data), self.dtype)


class _Array:
    """Stands in for numpy's arrays, as :class:`_Dtype` for their types."""

    def __init__(self, *_: Any) -> None:
        self.values = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.values = dtype.of(data).reshape(shape, order="F" if fortran else "C")


_NUMPY = [(_Dtype, "numpy.dtype"), (_Array, "numpy.ndarray"),
          *((stand_in, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
            for stand_in, name in ((lambda dtype, data: dtype.of(data)[0].item(), "scalar"),
                                   (_Array, "_reconstruct")))]
_KNOWN = {name for _, name in _NUMPY} | {
    "collections.OrderedDict", "_codecs.encode", "__builtin__.set", "torch.Size", *(
    f"torch._utils._rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter")), *(
    f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int",
                                        "Short", "Char", "Byte", "Bool", "Untyped"))}
"""All that such a file may name: what makes tensors, and numpy's plain numbers."""


def _load(path: Path) -> Any:
    """What a .pt file holds, mapped, so that 1.6 GB are not held at once. Nothing in it is
    executed, and nothing is made that is larger than the file."""
    with reading(f"{path} cannot be read", ShardError, "it is truncated or not such a file"):
        if not path.exists():
            raise ShardError(f"{path} is missing; copy it beside the others, or extract those "
                             "samples again")
        if not path.is_file():
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            begin = file.read(8)
        if begin[:1] == b"\x80":
            raise ShardError(f"{path} is of torch's format before version 1.6, which cannot be "
                             "mapped; open it with torch.load where it was made, and save it again")
        if begin == b"version ":
            raise ShardError(f"{path} is a git-lfs pointer, not the file; run git lfs pull")
        with zipfile.ZipFile(path) as inside:
            (pickled,) = (one for one in inside.infolist() if one.filename.endswith("data.pkl"))
            if any(one.compress_type for one in inside.infolist()) or pickled.file_size > _PICKLE:
                raise ValueError("its records are compressed or too large")
            operations = pickletools.genops(inside.read(pickled))
        named = {str(argument).replace(" ", ".") for operation, argument, _ in operations
                 if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL")}
        if foreign := sorted(named - _KNOWN):
            raise ShardError(f"{path} cannot be read: it holds {', '.join(foreign[:3])}, not only "
                             "tensors, numpy's numbers and plain values; save it again without")
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_chunk(path: Path, n_samples: int | None = None) -> dict[str, Any]:
    """One file's samples, checked. n_samples: what the index announces, None without one."""
    data = _load(path)
    if absent := [key for key in _NEEDED if not isinstance(data, dict) or key not in data]:
        raise ShardError(f"{path} holds no {', '.join(absent)}; it is not a file of paired hidden "
                         "states")
    lengths = np.asarray(_values(path, "seq_lens", data["seq_lens"]))
    if lengths.ndim != 1 or (len(lengths) and (lengths.dtype.kind not in "iu" or min(lengths) < 0)):
        raise ShardError(f"{path}: seq_lens are {lengths.dtype} of shape {list(lengths.shape)}; "
                         f"expected whole numbers from 0 on, one a sample: {_COPY}")
    n, longest = len(lengths), max(lengths, default=0)
    states = {key: _values(path, key, data[key]) for key in _NEEDED[:2]}
    shapes = {key: _shape(path, key, states[key]) for key in states}
    fits = all(len(states[key]) == n and len(shapes[key]) == 3 for key in states) and all(
        len(one) >= length for rows in states.values()
        for one, length in zip(rows, lengths, strict=True))
    if n_samples not in (None, n) or not fits:
        raise ShardError(
            f"{path} disagrees with itself or the index: {n_samples} samples announced, {n} "
            f"lengths up to {longest}, states {' and '.join(map(str, shapes.values()))}; {_COPY}")
    lines = data.get("metadata") or [{}] * n
    if not isinstance(lines, (list, tuple)) or len(lines) != n or not all(
            isinstance(line, Mapping) for line in lines):
        raise ShardError(f"{path} holds other than {n} lines of metadata for {n} samples; {_COPY}")
    return {**states, "seq_lens": lengths.tolist(), "metadata": lines,
            "config": _config(path, data.get("config"))}


def _values(path: Path, key: str, given: Any) -> Any:
    """A tensor, or a list of them or of numbers; numpy's arrays as tensors. Raises: ShardError for
    anything else, and for a tensor that is larger than what it stands on."""
    if isinstance(given, (list, tuple)):
        return [one if isinstance(one, (int, float)) else _values(path, key, one) for one in given]
    found = given
    if isinstance(given, _Array):
        found = torch.from_numpy(given.values.astype(given.values.dtype.newbyteorder("=")))
    if not isinstance(found, Tensor):
        raise ShardError(f"{path}: {key} holds {type(given).__name__}; expected tensors: {_COPY}")
    plain = found.layout == torch.strided and found.device.type == "cpu" and not found.is_quantized
    if not plain or found.untyped_storage().nbytes() < found.nbytes:
        raise ShardError(f"{path}: {key} of shape {list(found.shape)} is not whole in the file; "
                         f"{_COPY}")
    return found


def _shape(path: Path, key: str, rows: Any) -> list[Any]:
    """[n, S, D] of a tensor, or of n tensors [S, D]; [] of lists that are none. Raises: ShardError
    for numbers that no shard holds bit for bit."""
    parts = [rows] if isinstance(rows, Tensor) else rows
    if wrong := {one.dtype for one in parts if isinstance(one, Tensor)} - _FLOATS:
        raise ShardError(f"{path}: {key} is of {wrong.pop()}, which no shard holds bit for bit; "
                         "save it again as torch.float32")
    if isinstance(rows, Tensor):
        return list(rows.shape)
    shapes = [tuple(getattr(one, "shape", ())) for one in rows]
    alike = all(len(shape) == 2 for shape in shapes) and len({shape[1] for shape in shapes}) < 2
    return [len(rows), "…", *{shape[1] for shape in shapes}] if alike and shapes else []


def _config(path: Path, given: Any) -> dict[str, Any]:
    """The settings, as JSON gives them back; written piece by piece, so that few bytes which stand
    for many are no harm. Raises: ShardError for others than a few plain values."""
    if not isinstance(given, Mapping | None):
        raise ShardError(f"{path}: its config is {type(given).__name__}, no dict; {_COPY}")
    with reading(f"{path}: its config cannot be kept", ShardError, _COPY):
        pieces = json.JSONEncoder(allow_nan=False).iterencode(given or {})
        found = list(itertools.islice(pieces, _PIECES + 1))
        if len(found) > _PIECES or sum(map(len, found)) > 10 * _PIECES:
            raise ValueError("it is nested too deep or too large")
        return json.loads("".join(found))


def _index(path: Path) -> tuple[list[tuple[Path, int]], dict[str, Any]]:
    """(file, samples) of every chunk, and the config, of a chunked folder or a single file."""
    if not path.is_dir():
        data = _load_chunk(path)
        return [(path, len(data["seq_lens"]))], data["config"]
    place = path / "index.json"
    if not place.is_file():
        raise ShardError(f"{path} has no index.json; give the folder that holds it and chunks/, or "
                         "one .pt file")
    index = read_json(place, ShardError, _COPY)
    with reading(f"{place} is not an index of chunks", ShardError, _COPY):
        chunks = [(path / "chunks" / Path(chunk["path"]).name, operator.index(chunk["n_samples"]))
                  for chunk in index["chunks"]]
        return chunks, _config(place, index.get("config"))


def read_chunks(path: str | Path, *, clips: Sequence[tuple[str, str]] | None = None, first: int = 0,
                progress: Callable[[int], None] | None = None) -> Iterator[PairedStates]:
    """The samples from number ``first`` on of a chunked folder or a .pt file. clips: (sequence,
    clip) of every scene of the dataset folder, which ``sample_idx`` counts; without it the sequence
    is "unknown" (scenes overlap: they may not pass as independent). Raises: ShardError for missing,
    truncated, foreign or inconsistent files."""
    chunks, config = _index(Path(path))
    done = 0
    for file, n_samples in chunks:
        if done + n_samples > first or n_samples < 0:
            data = _load_chunk(file, n_samples)
            for row in range(max(first - done, 0), n_samples):
                yield _sample(file, data, row, done + row, config, clips)
                if progress is not None:
                    progress(1)
        done += n_samples


def _sample(file: Path, data: Mapping[str, Any], row: int, number: int, config: Mapping[str, Any],
            clips: Sequence[tuple[str, str]] | None) -> PairedStates:
    line = data["metadata"][row]
    question, *texts = (line.get(key, "") for key in ("question", "egpt_text", "vl_text"))
    kept = {key: line[key] for key in ("sample_idx", "question_idx", "event_image_key")
            if key in line}
    scene = kept.get("sample_idx", number)
    plain = all(isinstance(one, (str, int)) for one in kept.values())
    if not (plain and all(isinstance(one, str) and len(one) <= _TEXT for one in (question, *texts))
            and isinstance(scene, int) and 0 <= scene < 1 << 40):
        raise ShardError(f"{file}: the metadata of sample {number} holds something else than "
                         "numbers from 0 on (sample_idx, question_idx) and texts of at most "
                         f"{_TEXT} characters (question, egpt_text, vl_text); {_COPY}")
    if clips is not None and scene >= len(clips):
        raise ShardError(f"sample {number} is of scene {scene} but the dataset folder has "
                         f"{len(clips)}; give the one it was extracted from")
    sequence, clip = clips[scene] if clips is not None else (UNKNOWN, f"{scene:06d}")
    n = data["seq_lens"][row]
    states = (data[name][row][:n].clone() for name in _NEEDED[:2])
    absent = torch.full((n,), -1, dtype=torch.int64)
    return PairedStates(sequence, clip, question, *states, absent, absent.clone(), "free_running",
                        "post_norm", *texts, str(config.get("split", "")), kept)


def import_chunks(path: str | Path, folder: str | Path, *, dtype: str = "fp32",
                  clips: Sequence[tuple[str, str]] | None = None,
                  head: Tensor | None = None, samples_per_shard: int = 256,
                  progress: Callable[[int], None] | None = None) -> int:
    """Convert to a run folder, or go on; returns the number of samples. dtype: fp32 keeps every
    bit. head: the verifier's LM head [V, D]. Raises: as read_chunks and ShardWriter."""
    path = Path(path)
    config = {"imported_from": path.name, "clips": clips is not None,
              "source_config": _index(path)[1],
              "source_hash": sha256_of(path / "index.json" if path.is_dir() else path)}
    with ShardWriter(folder, mode="free_running", dtype=dtype, config=config, token_ids=False,
                     samples_per_shard=samples_per_shard) as writer:
        if not writer.finished:
            if head is not None:
                writer.save_head("verifier", head, len(head))
            for states in read_chunks(path, clips=clips, first=writer.n_written, progress=progress):
                writer.write(states)
    return writer.n_written
