"""Number formats of the weights (docs/models.md, "Number formats")."""

import resource
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_torchao_available

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


def quantization_config(quant: str, dtype: torch.dtype,
                        device: str = "cpu") -> BitsAndBytesConfig | TorchAoConfig:
    """``"4bit"`` (NF4, double quantisation; computing in ``dtype``) or ``"8bit"`` (LLM.int8), both
    of bitsandbytes; ``"int4"``: torchao's 4 bits in groups, whose kernel reads them once for up to
    some tens of rows. Raises: ParameterError for another name; for int4 without torchao, or in
    other numbers than bfloat16 on a GPU."""
    if quant not in ("4bit", "8bit", "int4"):
        raise ParameterError(f"quantisation {quant!r} is unknown; choose '4bit', '8bit', 'int4' or "
                             "none")
    if quant == "int4":
        return TorchAoConfig(_torchao(dtype, device), modules_to_not_convert=list(KEPT_WHOLE))
    return BitsAndBytesConfig(load_in_4bit=quant == "4bit", load_in_8bit=quant == "8bit",
                              bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(KEPT_WHOLE))


def _torchao(dtype: torch.dtype, device: str) -> Any:
    if not is_torchao_available():
        raise ParameterError("quant='int4' is done by torchao, which is not installed; pip install "
                             "'xsd[int4]', or give '4bit' (bitsandbytes)")
    if torch.device(device).type == "cpu":
        from torchao.prototype.quantization.int4 import inference_workflow

        return inference_workflow.PrototypeInt4WeightOnlyConfig(32, set_inductor_config=False)
    if dtype != torch.bfloat16:
        raise ParameterError(f"quant='int4' computes in bfloat16 on a GPU, not in {dtype}; give "
                             "dtype='bfloat16', or '4bit' (bitsandbytes)")
    from torchao import quantization

    return quantization.Int4WeightOnlyConfig(  # torch's own kernel; others ask for more packages
        128, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a weight: itself, or the parts of a packed one of torchao."""
    if not is_traceable_wrapper_subclass(tensor.data):
        return [tensor]
    return [getattr(tensor.data, name) for name in tensor.data.__tensor_flatten__()[0]]


def dtype_map(model: nn.Module) -> dict[str, dict[str, int]]:
    """Per top module (two levels of names) the number of stored values by dtype."""
    found: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        top = ".".join(parts[:2]) if parts[0] == "model" else parts[0]
        for one in stored(parameter):
            dtype = str(one.dtype).removeprefix("torch.")
            found.setdefault(top, Counter())[dtype] += one.numel()
    return {top: dict(counts) for top, counts in found.items()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes the parameters and buffers take in memory."""
    tensors = {one.data_ptr(): one for tensor in (*model.parameters(), *model.buffers())
               for one in stored(tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_memory_bytes(device: str | torch.device = "cpu") -> int:
    """Peak since start: of the CUDA allocator, or of the process (resident set) on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
