"""What tensors a checkpoint folder holds, read without loading them, and how they differ from what
a model expects."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xsd import files
from xsd.core import CheckpointError

Shape = tuple[int, ...]
TOWER = "model.visual_tower."
"""Where EventGPT's CLIP begins: ``model.visual_tower.visual_tower.vision_model.*``."""
IGNORED = ("position_ids", "rotary_emb.inv_freq")
"""Buffers that older files carry and no model reads."""


def differences(missing: Iterable[str], unexpected: Iterable[str],
                mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    """How a checkpoint's tensors differ from a model's, in words; empty where they do not.

    mismatched: (name, shape on disk, shape expected). IGNORED names never count as unexpected.
    """
    shapes = [f"{name} is {list(disk)}, expected {list(model)}"
              for name, disk, model in mismatched]
    left_over = [name for name in unexpected if not name.endswith(IGNORED)]
    parts = [f"{len(found)} {what} ({_few(sorted(found))})"
             for what, found in (("missing", list(missing)), ("unexpected", left_over),
                                 ("of another shape", shapes)) if found]
    return "; ".join(parts)


def _few(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f", and {len(names) - n} more" if len(names) > n else "")


def read_json(path: Path) -> Any:
    """A checkpoint's JSON file. Raises: CheckpointError if it is missing or damaged."""
    return files.read_json(path, CheckpointError, "copy it again from the original checkpoint")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: one file or the shards of its index, safetensors before
    .bin. Raises: CheckpointError if there are none, an index is damaged or a shard it names is
    missing."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = single.with_name(f"{single.name}.index.json")
        if index.is_file():
            try:
                shards = sorted(set(read_json(index)["weight_map"].values()))
            except (TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} is not a shard index with a 'weight_map'; download it again"
                ) from error
            absent = [name for name in shards if not (folder / name).is_file()]
            if absent:
                raise CheckpointError(
                    f"{folder} lacks {len(absent)} of {len(shards)} weight shards "
                    f"({_few(absent)}); download the missing files")
            return [folder / name for name in shards]
        if single.is_file():
            return [single]
    raise CheckpointError(f"no weights in {folder}: expected model.safetensors, pytorch_model.bin "
                          "or a shard index; download the checkpoint again")


def tensor_shapes(folder: Path) -> dict[str, Shape]:
    """Name → shape of every tensor in the folder's weight files, from their headers. Raises:
    CheckpointError if a file is truncated, damaged, or a pickle that holds more than tensors."""
    shapes: dict[str, Shape] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            shapes |= _safetensors_shapes(path)
        else:
            shapes |= {name: tuple(tensor.shape) for name, tensor in load_bin(path).items()}
    return shapes


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({path.stat().st_size} "
                              f"bytes; {error}); download it again") from error


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin file, memory-mapped where its format allows. Raises: CheckpointError if it
    is damaged or holds anything but tensors (nothing else is unpickled)."""
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was not unpickled, because that "
                              "could run code; convert it to safetensors") from error
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is truncated or damaged ({reason}); download it again") from error
