"""What tensors a checkpoint folder holds, and how they differ from what a model expects."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xsd import files
from xsd.core import CheckpointError

TOWER = "model.visual_tower."
"""Where EventGPT's CLIP begins: ``model.visual_tower.visual_tower.vision_model.*``."""
IGNORED = ("position_ids", "rotary_emb.inv_freq")
"""Buffers that older files carry and no model reads."""


def differences(missing: Iterable[str], unexpected: Iterable[str],
                mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    """In words; empty for none. mismatched: (name, shape on disk, shape expected)."""
    kinds = {"missing": list(missing),
             "unexpected": [name for name in unexpected if not name.endswith(IGNORED)],
             "of another shape": [f"{name} is {list(disk)}, expected {list(model)}"
                                  for name, disk, model in mismatched]}
    return "; ".join(f"{len(found)} {what} ({_few(sorted(found))})"
                     for what, found in kinds.items() if found)


def _few(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f", and {len(names) - n} more" if len(names) > n else "")


def read_json(path: Path) -> Any:
    """A checkpoint's JSON file. Raises: CheckpointError if it is missing or damaged."""
    return files.read_json(path, CheckpointError, "copy it again from the original checkpoint")


def weight_files(folder: Path) -> list[Path]:
    """One file or the shards of an index, safetensors before .bin. Raises: CheckpointError if one
    is missing or an index damaged."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = single.with_name(f"{single.name}.index.json")
        if index.is_file():
            try:
                shards = sorted(set(read_json(index)["weight_map"].values()))
            except (TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index} is not a shard index with a 'weight_map'; download "
                                      "it again") from error
            if absent := [name for name in shards if not (folder / name).is_file()]:
                raise CheckpointError(f"{folder} lacks {len(absent)} of {len(shards)} weight shards"
                                      f" ({_few(absent)}); download the missing files")
            return [folder / name for name in shards]
        if single.is_file():
            return [single]
    raise CheckpointError(f"no weights in {folder}: expected model.safetensors, pytorch_model.bin "
                          "or a shard index; download the checkpoint again")


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor in the folder's weight files, from their headers. Raises:
    CheckpointError if a file is damaged or a pickle of more than tensors."""
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            shapes |= {name: list(tensor.shape) for name, tensor in load_bin(path).items()}
            continue
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                shapes |= {name: file.get_slice(name).get_shape() for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or no safetensors file "
                                  f"({path.stat().st_size} bytes; {error}); download it again"
                                  ) from error
    return shapes


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin file, memory-mapped where its format allows. Raises: CheckpointError if it
    is damaged or holds anything else, which is not unpickled."""
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was not unpickled, because that "
                              "could run code; convert it to safetensors") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({str(error).splitlines()[0]}); "
                              "download it again") from error
