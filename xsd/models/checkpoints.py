"""What tensors a checkpoint folder holds, and how they differ from what a model expects. Whatever
is missing, damaged or does not fit is a CheckpointError."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from xsd import files
from xsd.core import CheckpointError

TOWER = "model.visual_tower."
"""Where EventGPT's CLIP begins: ``model.visual_tower.visual_tower.vision_model.*``."""
IGNORED = ("position_ids", "rotary_emb.inv_freq")
"""Buffers that older files carry and no model reads."""
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps",
           "attention_dropout", "projection_dim")


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
    """One file or the shards of an index, safetensors before .bin."""
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
    """Name → shape of every tensor in the folder's weight files, from their headers."""
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
    """Tensors of a .bin file, memory-mapped where its format allows; nothing else is unpickled."""
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


# --- the drafter's vision tower: where it is, how it is built, its weights


def find_tower(folder: Path, raw: dict[str, Any], override: str | Path | None, *,
               needed: bool) -> Path | None:
    """The CLIP folder: ``override``, or what the raw config names, here or beside it."""
    if override is not None:
        if not Path(override).is_dir():
            raise CheckpointError(f"vision_tower={override} is no folder; give the folder of the "
                                  "CLIP model (config.json and weights)")
        return Path(override)
    named = raw.get("mm_visual_tower")
    for candidate in (Path(named), folder / named) if named else ():
        if (candidate / "config.json").is_file():
            return candidate
    if needed:
        raise CheckpointError(
            f"{folder} holds no vision-tower weights, and the tower its config names, {named!r}, "
            "is not on this machine (such configs carry a path of the machine they were saved on); "
            "pass vision_tower=<folder of CLIP ViT-L/14-336>")
    return None


def describe_tower(folder: Path, clip_folder: Path | None,
                   shapes: dict[str, list[int]]) -> dict[str, Any]:
    """CLIPVisionConfig fields: from the CLIP folder, else off the tensors (64 channels a head)."""
    if clip_folder is not None:
        found = read_json(clip_folder / "config.json")
        found = found.get("vision_config", found)
        return {name: found[name] for name in _FIELDS if name in found}
    prefix = next((name.partition("embeddings.")[0] for name in shapes
                   if name.startswith(TOWER) and "embeddings." in name), "")
    layers = prefix + "encoder.layers."
    try:
        width, _, patch, _ = shapes[prefix + "embeddings.patch_embedding.weight"]
        positions = shapes[prefix + "embeddings.position_embedding.weight"][0]
        inner = shapes[layers + "0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise CheckpointError(f"{folder} lacks the vision-tower tensor {error.args[0]}; download "
                              "it again or pass vision_tower") from error
    if width % 64:
        raise CheckpointError(
            f"{folder} does not say how its vision tower is built (width {width} is no CLIP of 64 "
            "channels a head); pass vision_tower=<its CLIP folder>")
    depth = len({name.removeprefix(layers).partition(".")[0]
                 for name in shapes if name.startswith(layers)})
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth,
            "num_attention_heads": width // 64, "patch_size": patch,
            "image_size": patch * round((positions - 1)**0.5), "hidden_act": "quick_gelu"}


def load_tower(clip: nn.Module, folder: Path) -> None:
    """Copy a CLIP folder's vision weights into the model."""
    tensor_shapes(folder)  # says what is wrong with a damaged file
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        loaded = load_file(path) if path.suffix == ".safetensors" else load_bin(path)
        weights |= {name.split("vision_model.", 1)[1]: tensor for name, tensor in loaded.items()
                    if "vision_model." in name and not name.endswith(IGNORED)}
    if not weights:
        raise CheckpointError(f"{folder} holds no CLIP vision tensors (names with "
                              "'vision_model.'); give the folder of a CLIP model")
    expected = clip.state_dict()
    mismatched = [(name, tensor.shape, expected[name].shape) for name, tensor in weights.items()
                  if name in expected and tensor.shape != expected[name].shape]
    if wrong := differences(expected.keys() - weights.keys(), (), mismatched):
        raise CheckpointError(f"the CLIP in {folder} does not fit this checkpoint: {wrong}; give "
                              "the CLIP the checkpoint was trained with")
    clip.load_state_dict(weights, strict=False)
