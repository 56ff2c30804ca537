"""What tensors a checkpoint folder holds, read without loading them, and how they differ from what
a model expects."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xsd.core import CheckpointError

Shape = tuple[int, ...]
TOWER = "model.visual_tower."
"""Where EventGPT's CLIP begins: ``model.visual_tower.visual_tower.vision_model.*``."""
IGNORED = ("position_ids", "rotary_emb.inv_freq")
"""Buffers that older files carry and no model reads."""


@dataclass(frozen=True)
class KeyReport:
    """Names on disk against names expected. mismatched: name -> (shape on disk, shape expected)."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = []
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{len(names)} {what} ({_few(list(names))})")
        if self.mismatched:
            shapes = [
                f"{name} is {list(disk)}, expected {list(model)}"
                for name, (disk, model) in self.mismatched.items()
            ]
            parts.append(f"{len(shapes)} of another shape ({_few(shapes)})")
        return "; ".join(parts) or "all tensors present"


def _few(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f", and {len(names) - n} more" if len(names) > n else "")


def compare(on_disk: Mapping[str, Shape], expected: Mapping[str, Shape]) -> KeyReport:
    """Report the difference of two name → shape maps; IGNORED names never count."""
    return KeyReport(
        missing=tuple(sorted(expected.keys() - on_disk.keys())), unexpected=tuple(
            sorted(name for name in on_disk.keys() - expected.keys()
                   if not name.endswith(IGNORED))), mismatched={
                       name: (on_disk[name], expected[name])
                       for name in sorted(on_disk.keys() & expected.keys())
                       if on_disk[name] != expected[name]
                   },
    )


def expected_shapes(model: nn.Module) -> dict[str, Shape]:
    """Name → shape of every tensor a model reads from disk (it may stand on the meta device)."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tower_names(folder: Path, names: Mapping[str, Shape]) -> dict[str, str]:
    """Vision tensors of a CLIP folder (whole CLIP or vision model alone): name on disk → name
    inside CLIPVisionModel.

    Raises: CheckpointError if there are none.
    """
    found = {
        name: name.split("vision_model.", 1)[1] for name in names
        if "vision_model." in name and not name.endswith(IGNORED)
    }
    if not found:
        raise CheckpointError(
            f"{folder} holds no CLIP vision tensors (names with 'vision_model.'); give the folder "
            "of a CLIP model"
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON file. Raises: CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; give the directory that holds config.json and the weights"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}); copy it again from the original checkpoint") from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: one file or the shards of its index, safetensors before
    .bin.

    Raises: CheckpointError if there are none, an index is damaged or a shard it names is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        single = folder / f"{stem}.{suffix}"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} is not a shard index with a 'weight_map'; download it again"
                ) from error
            absent = [name for name in shards if not (folder / name).is_file()]
            if absent:
                raise CheckpointError(
                    f"{folder} lacks {len(absent)} of {len(shards)} weight shards "
                    f"({_few(absent)}); download the missing files"
                )
            return [folder / name for name in shards]
        if single.is_file():
            return [single]
    raise CheckpointError(
        f"no weights in {folder}: expected model.safetensors, pytorch_model.bin or a shard index; "
        "download the checkpoint again"
    )


def tensor_shapes(folder: Path) -> dict[str, Shape]:
    """Name → shape of every tensor in the folder's weight files, from their headers.

    Raises: CheckpointError if a file is truncated, damaged, or a pickle that holds more than
    tensors.
    """
    shapes: dict[str, Shape] = {}
    for path in weight_files(folder):
        shapes.update(
            _safetensors_shapes(path) if path.suffix ==
            ".safetensors" else {k: tuple(v.shape) for k, v in load_bin(path).items()})
    return shapes


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file ({size} bytes, header incomplete); "
                "download it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(
                f"{path} is no safetensors file (its header is not JSON); download it again"
            ) from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes on disk, {end} expected from its header; download "
            "it again"
        )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin file, memory-mapped where its format allows; nothing but tensors is
    unpickled (``weights_only``).

    Raises: CheckpointError if the file is damaged or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and was not unpickled, because that could run code; "
            "convert it to safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({str(error).splitlines()[0]}); download it again"
        ) from error
