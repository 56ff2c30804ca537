"""Number formats of the weights (docs/models.md, "Number formats")."""

from __future__ import annotations

import resource
import sys
from collections import Counter

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from xsd.core import ParameterError

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16,
          "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16}
TOWERS = ("visual_tower", "video_tower", "image_tower", "vision_tower")
PROJECTORS = ("visual_projector", "feature_adaptor", "multi_modal_projector")
KEPT_WHOLE = ("lm_head", *(f"model.{name}" for name in (*TOWERS, *PROJECTORS)))
"""Modules never quantised, by full name: transformers matches from the start of the path."""


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A name of ``DTYPES`` as a torch dtype. Raises: ParameterError for another name."""
    if not isinstance(name, torch.dtype) and name not in DTYPES:
        raise ParameterError(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES.get(name, name)


def quantization_config(quant: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """``"4bit"`` (NF4, double quantisation; computing in ``dtype``) or ``"8bit"`` (LLM.int8).
    Raises: ParameterError for another name."""
    if quant not in ("4bit", "8bit"):
        raise ParameterError(f"quantisation {quant!r} is unknown; choose '4bit', '8bit' or none")
    return BitsAndBytesConfig(load_in_4bit=quant == "4bit", load_in_8bit=quant == "8bit",
                              bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(KEPT_WHOLE))


def dtype_map(model: nn.Module) -> dict[str, dict[str, int]]:
    """Per top module (two levels of names) the number of stored values by dtype."""
    found: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        top = ".".join(parts[:2]) if parts[0] == "model" else parts[0]
        dtype = str(parameter.dtype).removeprefix("torch.")
        found.setdefault(top, Counter())[dtype] += parameter.numel()
    return {top: dict(counts) for top, counts in found.items()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes the parameters and buffers take in memory."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_memory_bytes(device: str | torch.device = "cpu") -> int:
    """Peak since start: of the CUDA allocator, or of the process (resident set) on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
