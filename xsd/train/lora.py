"""L6: LoRA beside q, k, v, o of the drafter's decoder: put in, run teacher-forced, merged
(docs/adapters.md, section 7). It changes the drafter itself, so it needs the model and its prompts,
not stored states alone; a merged drafter is an ordinary one."""

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xsd import files
from xsd.adapters import registry, tensor_files
from xsd.core import CheckpointError, ParameterError, TrainingError, reading
from xsd.train import objectives, recipes
from xsd.train.recipes import Above0, Count, From0, Share

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj"]
LEVEL, TARGETS = "L6", get_args(Target)
SETTINGS = "adapter_config.json"
_ABOUT = ("base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision")
"""Settings that change nothing in a merged weight."""


@dataclass(frozen=True)
class LoraFitConfig:
    """How to train L6; the defaults are the reference's. alpha: LoRA's scale, times 1 / rank.
    dropout: on LoRA's input. batch_size: answers a forward pass. accumulation: passes a step.
    gradient_checkpointing: recompute layers in the backward pass, for less memory and a third more
    time. patience: epochs without a better validation loss."""

    rank: Count = 16
    alpha: Above0 = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: tuple[Target, ...] | list[Target] = TARGETS
    objective: str = "tokens"
    epochs: Count = 20
    batch_size: Count = 1
    accumulation: Count = 16
    learning_rate: Above0 = 1e-4
    minimum_learning_rate: From0 = 1e-6
    weight_decay: From0 = 0.01
    clip: Above0 = 1.0
    patience: Count = 5
    validation_share: Share = 0.1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        recipes.check_fields(self)
        if not self.targets:
            raise ParameterError(f"targets are some of {', '.join(TARGETS)}, not none")
        objectives.parse(self.objective)


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """(name inside the model, module) of the language decoder. Raises: TrainingError for none."""
    for name in ("model.language_model", "model"):
        with contextlib.suppress(AttributeError):
            if hasattr(decoder := model.get_submodule(name), "layers"):
                return name, decoder
    raise TrainingError(f"{type(model).__name__} has no decoder at model.layers or "
                        "model.language_model.layers; pass the drafter's model")


def attach(model: nn.Module, *, rank: int = 16, alpha: float = 32, dropout: float = 0.05,
           targets: Sequence[str] = TARGETS) -> peft.PeftModel:
    """Put LoRA, zero at first, into the decoder's layers of ``model`` (in place) and freeze
    everything else. Raises: TrainingError when the model already carries LoRA."""
    # The whole name from the root: the CLIP tower also has q_proj, k_proj and v_proj, under the
    # same last names.
    names = rf"{re.escape(decoder_of(model)[0])}\.layers\.\d+\.self_attn\.({'|'.join(targets)})"
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TrainingError(f"{type(model).__name__} already carries LoRA weights; merge or unload "
                            "them first, or load the drafter again")
    # bitsandbytes reorders 4-bit weights in a CPU's first inference pass: gradients then stop
    # there, without an error; to save them, it puts them back
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.state_dict()
            layer.support_avx512bf16_for_cpu = False
    tuned = peft.get_peft_model(model, settings)
    settings.base_model_name_or_path = None  # a path of this machine says nothing on another
    return tuned


def size_of(hidden_size: int, layers: int, *, rank: int = 16,
            targets: Sequence[str] = TARGETS) -> int:
    """Weights of LoRA beside square projections, none loaded: 16 777 216 for 4096 and 32 layers."""
    return layers * len(targets) * rank * 2 * hidden_size


def is_quantised(model: nn.Module) -> bool:
    """Whether the decoder's weights are held as 4-bit or 8-bit codes."""
    return not decoder_of(model)[1].layers[0].self_attn.q_proj.weight.is_floating_point()


def merge_saved(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the LoRA weights in ``folder`` to the model's own (in place). Raises: CheckpointError
    when the folder holds none, they were changed or exchanged, or are another model's;
    TrainingError for a quantised model."""
    folder = Path(folder)
    if is_quantised(model):
        raise TrainingError("merging into quantised weights rounds nearly all of the training "
                            "away: load the drafter in bfloat16 and merge there")
    settings, weights = read(folder)
    foreign = f"the LoRA weights in {folder} are of another model"
    targets = re.fullmatch(r".*\(([a-z_|]+)\)", str(settings.get("target_modules")))
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    # A rank above every width of the weights would be made before it is compared.
    if not targets or not any(rank in weight.shape for weight in weights.values()) or not (
            isinstance(alpha, (int, float)) and math.isfinite(alpha)):
        raise CheckpointError(f"{foreign}, or asks for more than L6 has; load the drafter they "
                              "were trained on")
    with reading(foreign, CheckpointError, "load the drafter they were trained on"):  # by peft
        tuned = attach(model, rank=rank, alpha=alpha, dropout=0.0, targets=targets[1].split("|"))
    try:
        _check_same(tuned, settings, weights, foreign)
    except CheckpointError:
        tuned.unload()
        raise
    peft.set_peft_model_state_dict(tuned, weights)
    return tuned.merge_and_unload(safe_merge=True).requires_grad_(False).eval()


def _check_same(tuned: peft.PeftModel, settings: dict[str, Any], weights: dict[str, Tensor],
                foreign: str) -> None:
    """Raises: CheckpointError for other names or shapes, and for settings that L6 has not."""
    expected, found = ({name: weight.shape for name, weight in some.items()}
                       for some in (_weights(tuned), weights))
    if found != expected:
        different = min(name for name, _ in expected.items() ^ found.items())
        raise CheckpointError(f"{foreign} ({different}); load the drafter they were trained on")
    own = json.loads(json.dumps(tuned.peft_config["default"].to_dict(), default=str))
    other = [f"{name}={reprlib.repr(value)}" for name, value in settings.items()
             if name not in _ABOUT and value and value != own.get(name)]
    if other:
        raise CheckpointError(f"{foreign}: {', '.join(other[:3])} is not L6's; merge them with "
                              "peft")


def save(tuned: peft.PeftModel, folder: str | Path, **info: Any) -> None:
    """Write the LoRA weights as peft does: adapter_config.json and adapter_model.safetensors, whose
    header says what both are of, with a digest. info: JSON values kept with it."""
    settings, path = Path(folder) / SETTINGS, Path(folder) / registry.LORA
    files.write_json(settings, tuned.peft_config["default"].to_dict())
    tensor_files.write(path, _weights(tuned), {"format": "xsd-lora-2", "level": LEVEL,
                                               "settings": files.sha256_of(settings), "info": info})


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's settings and the weights in a folder. Raises: CheckpointError when there are none, or
    they were changed after they were written, or exchanged."""
    path = folder / registry.LORA
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no readable LoRA weights ({path.name} is missing); "
                              "give the run's best folder")
    registry.check(folder)
    weights = tensor_files.read(path)[1]
    way_out = "give the run's best folder, or train again"
    settings = files.read_json(folder / SETTINGS, CheckpointError, way_out, dict)
    return settings, tensor_files.plain(weights, path.stat().st_size, folder)


def _weights(tuned: peft.PeftModel) -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)


def forced_states(model: nn.Module, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """The drafter's state before each token of each answer, with gradient.

        input    [ prompt 0 … L-1 | a   b  ]     the last token c is never read
        states   [            L-1   L   L+1 ]     predict a, b, c

    prompts: B embeddings [L_i, D_d], vision included. answers: B int64 [S_i]. Returns: post-norm
    [B, S, D_d], zero as padding."""
    embed = model.get_input_embeddings()
    pairs = list(zip(prompts, answers, strict=True))
    lines = [torch.cat([prompt.to(embed.weight), embed(ids[:-1])]) for prompt, ids in pairs]
    hidden = decoder_of(model)[1](inputs_embeds=pad_sequence(lines, batch_first=True),
                                  use_cache=False).last_hidden_state
    rows = [row[len(prompt) - 1:len(prompt) - 1 + len(ids)]
            for row, (prompt, ids) in zip(hidden, pairs, strict=True)]
    return pad_sequence(rows, batch_first=True)
