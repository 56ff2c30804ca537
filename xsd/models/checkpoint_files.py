"""The files of a checkpoint folder and its config.json, checked before anything is built from them.
Whatever is missing, damaged, too large or may not be read is a CheckpointError."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xsd import files
from xsd.core import CheckpointError, XsdError

LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
           "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MOST_BYTES = 1 << 26
"""Of a JSON, vocabulary or template file (the largest vocabularies known take 40 MB)."""
_MOST = {"num_hidden_layers": 256, "hidden_size": 10**6, "intermediate_size": 10**7,
         "vocab_size": 10**8, "num_attention_heads": 10**4, "num_key_value_heads": 10**4,
         "head_dim": 10**5, "max_position_embeddings": 10**8, "projection_dim": 10**6,
         "num_channels": 1000, "image_size": 10**4, "patch_size": 10**4,
         "tokenizer_model_max_length": 10**8}
"""Whole numbers from 1 to this: more is no model, and would be built before it is compared."""
_OURS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal",
         "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
         "use_cache", "return_dict", "use_return_dict", "torchscript", "output_attentions",
         "output_hidden_states", "dtype", "torch_dtype", "auto_map", "transformers_weights",
         "fusion_config", "distributed_config", "base_model_tp_plan", "per_layer_config",
         "num_labels", "id2label", "label2id", "name_or_path", "_name_or_path")
"""Settings of config.json that say how, by which code or from which file to compute: that is the
engine's own choice, so they are not read."""
_TEMPLATES = "additional_chat_templates"
_QUANTISED = ("quantization_config", "compression_config")
_POINTERS = (b"version https://git-lfs", b"version https://hawser", b"# xet version")
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def check_files(folder: Path) -> None:
    """What may be read of a folder: whole files of its own (or of a hub cache's ``blobs``), no
    pointer to one, no web page, nothing over ``_MOST_BYTES`` but weights. Raises: CheckpointError
    for another, and for a LoRA adapter."""
    home = folder.resolve()
    own = {home, home / _TEMPLATES}
    if home.parent.name == "snapshots":
        own.add(home.parent.parent / "blobs")
    for path in sorted((*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*"))):
        weights = path.suffix in (".safetensors", ".bin")
        if path.is_dir() or not (weights or path.suffix in (".json", ".model", ".txt", ".jinja")):
            continue
        place = Path(os.path.realpath(path))
        if place.parent not in own:
            raise CheckpointError(f"{path} is a link to {place}, outside its folder; put the file "
                                  "itself there")
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file; copy it again from the original "
                                  "checkpoint")
        size = path.stat().st_size
        if not weights and size > _MOST_BYTES:
            raise CheckpointError(f"{path} is larger than {_MOST_BYTES >> 20} MB, which no "
                                  "configuration or vocabulary is; copy it again")
        with open(path, "rb") as file:
            start = file.read(64).lstrip().lower()
        if start.startswith(_POINTERS):
            raise CheckpointError(f"{path} is a git-lfs pointer ({size} bytes), not the file "
                                  "itself; run git lfs pull in its folder")
        if start.startswith(_PAGES):
            raise CheckpointError(f"{path} is a web page, not the file itself; download it again, "
                                  "signed in where the model asks for that")
    adapter = next((name for name in ADAPTERS if (folder / name).exists()), "")
    if adapter and any((folder / name).exists() for name in LAYOUTS):
        raise CheckpointError(f"{folder} holds {adapter} beside its weights, and whether it is "
                              "merged into them nobody can say; merge it and save again, or move "
                              "the adapter's files away")
    if adapter:
        raise CheckpointError(f"{folder} holds a LoRA adapter ({adapter}), not a whole model; "
                              "merge it into its base (merge_and_unload) and save that")


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON object. Raises: CheckpointError if it is missing, damaged or none."""
    way_out = "copy it again from the original checkpoint"
    found = files.read_json(path, CheckpointError, way_out, max_bytes=_MOST_BYTES)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object but a {type(found).__name__}; {way_out}")
    return found


def read_config(folder: Path, quant: str | None = None) -> dict[str, Any]:
    """config.json without ``_OURS``. quant: what the user asks for; it replaces what bitsandbytes
    left in the file. Raises: CheckpointError for a size that no model has, a number that is none,
    nesting without end, and a quantisation that nobody asked for."""
    return _checked(read_json(folder / "config.json"), folder / "config.json", quant)


def _checked(value: Any, path: Path, quant: str | None, key: str = "", depth: int = 0) -> Any:
    again = "copy the file again from the original checkpoint"
    if depth > 20:
        raise CheckpointError(f"{path} is nested too deep; {again}")
    if key in _QUANTISED and value:
        method = value.get("quant_method") if isinstance(value, dict) else None
        if method != "bitsandbytes":
            raise CheckpointError(f"{path} says that the weights are quantised ({key}, method "
                                  f"{method!r}), which is not read; give the 16-bit checkpoint, "
                                  f"or delete {key} where these weights are whole")
        if quant is None:
            raise CheckpointError(f"{path} asks for {'4' if value.get('load_in_4bit') else '8'}-bit"
                                  f" weights ({key}, left by bitsandbytes) and nobody else does; "
                                  f"pass --quant 4bit or 8bit, or delete {key}")
        return None
    if isinstance(value, dict):
        rope, scaling = value.get("rope_parameters"), value.get("rope_scaling")
        old = {"rope_theta": value.get("rope_theta"),
               **(scaling if isinstance(scaling, dict) else {})}
        said = [f"{name}={one!r}" for name, one in old.items() if one is not None and isinstance(
            rope, dict) and one != rope.get("rope_type" if name == "type" else name)]
        if said:
            raise CheckpointError(f"{path} says {said[0][:80]} beside another rope_parameters; of "
                                  "the two places one is not read: keep one")
        return {name: _checked(one, path, quant, name, depth + 1) for name, one in value.items()
                if name not in _OURS}
    if isinstance(value, list) and key not in _MOST:
        return [_checked(one, path, quant, "", depth + 1) for one in value]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if key in _MOST and value is not None and not (whole and 1 <= value <= _MOST[key]):
        raise CheckpointError(f"{path}: {key} is {value!r}; a whole number from 1 to {_MOST[key]} "
                              f"is expected, {again}")
    small = value is None or (isinstance(value, float) and 0 < value < 1)
    if (isinstance(value, float) and not math.isfinite(value)) or (
            key.endswith("_eps") and not small):
        raise CheckpointError(f"{path}: {key or 'a value'} is {value!r}, which no model computes "
                              f"with; {again}")
    return value


@contextlib.contextmanager
def answered(what: Any) -> Iterator[None]:
    """What a library raises over a file's content (some panic) as one sentence. Raises:
    CheckpointError naming ``what``."""
    try:
        yield
    except (XsdError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise CheckpointError(f"{what} could not be loaded: {reason}; check its files against the "
                              "original") from error
