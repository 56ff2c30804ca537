"""What tensors a checkpoint folder holds, read so that what is checked is what is loaded, how they
differ from what a model expects, and the drafter's tower. Whatever is missing, damaged, ambiguous
or does not fit is a CheckpointError."""

import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from xsd.core import CheckpointError
from xsd.models.checkpoint_files import LAYOUTS, check_files, read_config, read_json

TOWER = "model.visual_tower."
"""Where EventGPT's CLIP begins: ``model.visual_tower.visual_tower.vision_model.*``."""
IGNORED = ("position_ids", "rotary_emb.inv_freq")
"""Buffers that older files carry and no model reads."""
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps",
           "attention_dropout", "projection_dim")
_WEIGHTS = ("F16", "BF16", "F32", "F64", torch.float16, torch.bfloat16, torch.float32,
            torch.float64)


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


def weight_files(folder: Path) -> list[Path]:
    """The one file or the shards of the one index. Raises: CheckpointError for none, or several."""
    found = [name for name in LAYOUTS if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"no weights in {folder}: expected model.safetensors, "
                              "pytorch_model.bin or a shard index; download the checkpoint again")
    shards = found
    for index in (name for name in found if name.endswith(".index.json")):
        try:
            shards = sorted(set(read_json(folder / index)["weight_map"].values()))
            suffix = Path(index.removesuffix(".index.json")).suffix
            strangers = [name for name in shards
                         if Path(name).name != name or Path(name).suffix != suffix]
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder / index} is not a shard index with a 'weight_map'; "
                                  "download it again") from error
        if strangers or not shards:
            raise CheckpointError(f"{folder / index} names {_few(strangers) or 'no shard'}; it may "
                                  f"name *{suffix} files of its own folder alone")
    # an index may stand beside the one file that it names
    if len(found) > 1 and [*shards, f"{shards[0]}.index.json"] != found:
        raise CheckpointError(f"{folder} holds its weights more than once ({', '.join(found)}); "
                              "move away what is out of date")
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {len(absent)} of {len(shards)} weight shards "
                              f"({_few(absent)}); download the missing files")
    return [folder / name for name in shards]


def open_tensors(folder: Path) -> dict[str, Any]:
    """Name → tensor, or a slice of a safetensors file that is read when it is indexed, of all the
    folder's weights. Raises: CheckpointError for a damaged file, a name that stands twice, numbers
    that are no weights, and the names of LoRA, PEFT or a wrapper."""
    found: dict[str, Any] = {}
    for path in weight_files(folder):
        here = slices(path) if path.suffix == ".safetensors" else load_bin(path)
        if twice := sorted(found.keys() & here.keys()):
            raise CheckpointError(f"{path} holds {_few(twice)}, which another shard holds, too; "
                                  "download the shards of one version")
        if odd := [f"{name} as {kind}" for name, tensor in here.items()
                   if (kind := _kind(tensor)) not in _WEIGHTS and not name.endswith(IGNORED)]:
            raise CheckpointError(f"{path} stores {_few(odd)}; weights in float16, bfloat16 or "
                                  "float32 are expected (quantise while loading: --quant)")
        found |= here
    wrapped = next((name for name in found if "lora_" in name or ".base_layer." in name
                    or name.startswith(("base_model.model.", "module.", "_orig_mod."))), None)
    if wrapped is not None:
        raise CheckpointError(f"{folder} holds {wrapped}: names of PEFT or of a training wrapper; "
                              "merge adapters (merge_and_unload), unwrap the model and save again")
    return found


def slices(path: Path) -> dict[str, Any]:
    """Name → slice of a safetensors file, read when it is indexed. Raises: CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({path.stat().st_size} "
                              f"bytes; {error}); download it again") from error


def _kind(tensor: Any) -> Any:
    return tensor.dtype if isinstance(tensor, torch.Tensor) else tensor.get_dtype()


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, list[int]]:
    """Name → shape of what :func:`open_tensors` gives."""
    return {name: list(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())
            for name, tensor in tensors.items()}


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin file, memory-mapped where its format allows; nothing else is unpickled."""
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        if mapped and any(one.compress_type for one in zipfile.ZipFile(path).infolist()):
            raise CheckpointError(f"{path} is compressed, which torch never does and would unpack "
                                  "without a bound; convert it to safetensors")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was not unpickled, because that "
                              "could run code; convert it to safetensors") from error
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({str(error).splitlines()[0]}); "
                              "download it again") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) and
                                              isinstance(tensor, torch.Tensor)
                                              for name, tensor in found.items()):
        holds = _few(list(map(str, found))) if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(f"{path} is no state dict of names and tensors (it holds {holds}); "
                              "save the model's state_dict() alone, best as safetensors")
    return found


def check_room(folder: Path, model: nn.Module, shapes: Mapping[str, Sequence[int]],
               lacks: str | tuple[()]) -> None:
    """Before a model is filled: it may not be much larger than its files. model: on the meta
    device. Raises: CheckpointError with both numbers."""
    wanted = sum(tensor.numel() for name, tensor in model.state_dict().items()
                 if not name.startswith(lacks))
    held = sum(math.prod(shape) for shape in shapes.values())
    if wanted > 4 * held + 10**8:
        raise CheckpointError(f"{folder}: config.json describes a model of {wanted:.3g} numbers, "
                              f"but the weights hold {held:.3g}; take both from one checkpoint")


# --- the drafter's vision tower: where it is, how it is built, its weights


def find_tower(folder: Path, raw: dict[str, Any], override: str | Path | None, *,
               needed: bool) -> Path | None:
    """The CLIP folder: ``override``, or what the raw config names (from the checkpoint's folder on,
    wherever xsd is started)."""
    named = raw.get("mm_visual_tower")
    beside = folder / named if isinstance(named, str) and named else None
    if override is not None and not Path(override).is_dir():
        raise CheckpointError(f"vision_tower={override} is no folder; give the folder of the "
                              "CLIP model (config.json and weights)")
    chosen = beside if override is None else Path(override)
    if chosen is not None and (override is not None or (chosen / "config.json").is_file()):
        check_files(chosen)
        return chosen
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
        found = read_config(clip_folder)
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
    weights = {name.split("vision_model.", 1)[1]: tensor[...]
               for name, tensor in open_tensors(folder).items()
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
