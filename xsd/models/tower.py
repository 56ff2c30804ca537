"""The drafter's vision tower: where it is, how it is built, its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xsd.core import CheckpointError
from xsd.models import keymap
from xsd.models.eventgpt import EventGPTForCausalLM

_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps",
           "attention_dropout", "projection_dim")


def find(folder: Path, raw: dict[str, Any], override: str | Path | None, *,
         needed: bool) -> Path | None:
    """The CLIP folder: ``override``, or what the raw config names, here or beside it. Raises:
    CheckpointError if the override is no folder, or a needed tower is nowhere here."""
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


def describe(folder: Path, clip_folder: Path | None,
             shapes: dict[str, list[int]]) -> dict[str, Any]:
    """CLIPVisionConfig fields: from the CLIP folder, else read off the tensors (64 channels a
    head). Raises: CheckpointError if neither says enough."""
    if clip_folder is not None:
        found = keymap.read_json(clip_folder / "config.json")
        found = found.get("vision_config", found)
        return {name: found[name] for name in _FIELDS if name in found}
    prefix = next((name.partition("embeddings.")[0] for name in shapes
                   if name.startswith(keymap.TOWER) and "embeddings." in name), "")
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


def load_weights(model: EventGPTForCausalLM, folder: Path) -> None:
    """Copy a CLIP folder's vision weights into the model. Raises: CheckpointError if they do not
    fit."""
    keymap.tensor_shapes(folder)  # says what is wrong with a damaged file
    weights: dict[str, torch.Tensor] = {}
    for path in keymap.weight_files(folder):
        loaded = load_file(path) if path.suffix == ".safetensors" else keymap.load_bin(path)
        weights |= {name.split("vision_model.", 1)[1]: tensor for name, tensor in loaded.items()
                    if "vision_model." in name and not name.endswith(keymap.IGNORED)}
    if not weights:
        raise CheckpointError(f"{folder} holds no CLIP vision tensors (names with "
                              "'vision_model.'); give the folder of a CLIP model")
    clip = model.model.visual_tower.clip
    expected = clip.state_dict()
    mismatched = [(name, tensor.shape, expected[name].shape) for name, tensor in weights.items()
                  if name in expected and tensor.shape != expected[name].shape]
    if wrong := keymap.differences(expected.keys() - weights.keys(), (), mismatched):
        raise CheckpointError(f"the CLIP in {folder} does not fit this checkpoint: {wrong}; give "
                              "the CLIP the checkpoint was trained with")
    clip.load_state_dict(weights, strict=False)
