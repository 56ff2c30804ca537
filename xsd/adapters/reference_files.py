"""Adapter files of the published reference code (.pt) under this project's names: L1–L5, B1, L5F
(docs/adapters.md, section 1). A pickle that would run code is refused. B1's file says L5: the
folder ``B1`` it was written to, or ``level="B1"``, tells the two apart."""

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xsd.adapters import tensor_files
from xsd.core import CheckpointError

_LEVELS = {
    "L1_Bottleneck": "L1", "L2_MultiLayerBottleneck": "L2", "L3_WideBottleneck": "L3",
    "L4_Attention": "L4", "L5_EAGLE": "L5", "B1_EAGLE": "B1", "L5F_FusedEAGLE": "L5F",
}
_OPTIONS = {
    "bottleneck_dim": "bottleneck", "num_blocks": "n_blocks", "num_layers": "n_blocks",
    "num_heads": "n_heads", "ffn_dim": "ffn",
}
# Their names of tensors, as patterns, and ours.
_LAYER = {
    r"^layers\.0\.": "layer.", r"\.attn_norm\.": ".attention_norm.",
    r"\.attn\.in_proj_": ".query_key_value.", r"\.attn\.out_proj\.": ".attention_out.",
    r"\.ffn\.0\.": ".ffn_up.", r"\.ffn\.3\.": ".ffn_down.",
}
_BOTTLENECK = {
    r"^layers\.(\d+)\.(?=down_proj|up_proj|layer_norm|alpha_param)": r"blocks.\1.",
    r"\.down_proj\.": ".down.", r"\.up_proj\.": ".up.", r"\.layer_norm\.": ".norm.",
    r"\.alpha_param$": ".alpha",
}
_WIDE = {
    r"^blocks\.(\d+)\.0\.": r"down.\1.", r"^blocks\.(\d+)\.1\.": r"norms.\1.",
    r"^blocks\.(\d+)\.4\.": r"up.\1.",
}
_ATTENTION = _LAYER | {r"^output_proj\.0\.": "final_norm.", r"^output_proj\.1\.": "projection."}
_EAGLE = _LAYER | {
    r"^pos_embed$": "positions", r"^output_norm\.": "final_norm.",
    r"^output_proj\.": "projection.", r"^fusion_norm\.": "input_norm.",
    r"^fusion_proj\.": "fusion.", r"^gate\.0\.": "gate.",
}
_NAMES = {"L1": _BOTTLENECK, "L2": _BOTTLENECK, "L3": _WIDE, "L4": _ATTENTION, "L5": _EAGLE,
          "B1": _EAGLE, "L5F": _EAGLE}


class _PlainConfig:
    """Stands in for the configuration class pickled in the reference's L1 files."""


class _Dtype:
    """Stands in for numpy's dtype, so that a number is read and no object made."""

    def __init__(self, text: str, *_: Any) -> None:
        self.text = text

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like."""


def _number(dtype: _Dtype, data: bytes) -> Any:
    """A numpy scalar as a plain number."""
    return np.frombuffer(data, dtype.text)[0].item()


_STAND_INS = {"HiddenAdapterConfig": _PlainConfig, "dtype": _Dtype, "scalar": _number}


def read(path: Path, *, level: Any = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(level, hidden_size and options as create_adapter takes them, tensors by this project's
    names). level: "B1" or "L5" for a file that says L5. Raises: CheckpointError when it is damaged,
    would run code, is no adapter or another level than asked for, is an L4 of several layers, or
    fuses tokens (in front of the norm there, behind it here)."""
    stored = tensor_files.read_pt(path, stand_ins=_STAND_INS)
    if not isinstance(stored, Mapping) or "model_state_dict" not in stored:
        raise CheckpointError(f"{path} is no adapter checkpoint: it has no model_state_dict; give "
                              "a file that save_checkpoint wrote")
    tensor_files.unchecked(path)
    kind = stored.get("adapter_type", "L1_Bottleneck")
    if not isinstance(kind, str) or kind not in _LEVELS:
        raise CheckpointError(f"{path} holds a {reprlib.repr(kind)}; .pt files are read for "
                              f"{', '.join(_LEVELS)}, retrain the others")
    found = _LEVELS[kind]
    if found == "L5" and (level == "B1" or (level is None and "B1" in path.resolve().parts)):
        found = "B1"
    if level not in (None, found):
        raise CheckpointError(f"{path} holds an {found} ({kind}), not the {level} asked for; give "
                              "another file or leave level= out")
    raw = stored.get("config", {})
    raw = dict(raw) if isinstance(raw, Mapping) else dict(getattr(raw, "__dict__", {}))
    state = tensor_files.plain(stored["model_state_dict"], path.stat().st_size, path)
    tensors = {_renamed(name, found): tensor for name, tensor in state.items()}
    size, options = raw.get("hidden_dim", 4096), _options(path, found, raw, tensors)
    numbers = {"hidden_dim": size, **{key: options[key] for key in _OPTIONS.values()
                                      if key in options}, "layers": options.get("layers", 1)}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path} says {name}={reprlib.repr(value)}, which is no size; "
                                  "convert it where it was made, or train again")
    return {"level": found, "hidden_size": size, "options": options}, tensors


def _options(path: Path, level: str, raw: Mapping[str, Any],
             tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    options = {_OPTIONS[key]: value for key, value in raw.items() if key in _OPTIONS}
    if level == "L3":
        return {"wide" if key == "bottleneck" else key: value for key, value in options.items()}
    if level in ("L1", "L2"):
        return options
    options["layers"] = options.pop("n_blocks", 1)
    if level == "L4" and options["layers"] != 1:
        raise CheckpointError(f"{path} has {reprlib.repr(options['layers'])} bidirectional layers, "
                              "and L4 of several is causal here; retrain it with layers in its "
                              "options")
    if level == "L4":
        return options | {"causal": False}  # as it was trained
    if raw.get("use_token_embed") or any(name.startswith("token_") for name in tensors):
        raise CheckpointError(f"{path} fuses tokens in front of its norm, {level} here behind it; "
                              "train it again with token_fusion=True")
    if "positions" in tensors and tensors["positions"].dim() == 3:
        options["max_positions"] = tensors["positions"].shape[1]
    # beside verifier[t] stood drafter[t]
    return options | ({"drafter_lead": 0} if level == "L5F" else {})


def _renamed(name: str, level: str) -> str:
    if level not in ("L1", "L2"):  # their layers 1, 2, … come after our first one
        name = re.sub(r"^layers\.([1-9]\d*)", lambda one: f"further.{int(one[1]) - 1}", name)
    for pattern, replacement in _NAMES[level].items():
        name = re.sub(pattern, replacement, name)
    return name
