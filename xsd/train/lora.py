"""L6: LoRA beside q, k, v, o of the drafter's decoder: put in, run teacher-forced, merged
(docs/adapters.md, section 7). It changes the drafter itself, so it needs the model and its prompts,
not stored states alone; a merged drafter is an ordinary one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xsd import files
from xsd.core import CheckpointError, TrainingError
from xsd.train import objectives, recipes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoraFitConfig:
    """How to train L6; the defaults are the reference's. alpha: LoRA's scale, times 1 / rank.
    dropout: on LoRA's input. batch_size: answers a forward pass. accumulation: passes a step.
    gradient_checkpointing: recompute layers in the backward pass, for less memory and a third more
    time. patience: epochs without a better validation loss."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = TARGETS
    objective: str = "tokens"
    epochs: int = 20
    batch_size: int = 1
    accumulation: int = 16
    learning_rate: float = 1e-4
    minimum_learning_rate: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 1.0
    patience: int = 5
    validation_share: float = 0.1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        recipes.check_positive(self, ("rank", "alpha", "epochs", "batch_size", "accumulation",
                                      "learning_rate", "patience"))
        objectives.parse(self.objective)


# --- putting it in, taking it out


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """(name inside the model, module) of the language decoder. Raises: TrainingError when the model
    has none under the known names."""
    for name in ("model.language_model", "model"):
        try:
            decoder = model.get_submodule(name)
        except AttributeError:
            continue
        if hasattr(decoder, "layers"):
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
    return _attach(model, peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                                          target_modules=names))


def _attach(model: nn.Module, settings: peft.LoraConfig) -> peft.PeftModel:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TrainingError(f"{type(model).__name__} already carries LoRA weights; merge or unload "
                            "them first, or load the drafter again")
    _undo_inference_packing(model)
    tuned = peft.get_peft_model(model, settings)
    settings.base_model_name_or_path = None  # a path of this machine says nothing on another
    return tuned


def _undo_inference_packing(model: nn.Module) -> None:
    """bitsandbytes reorders 4-bit weights in a CPU's first inference pass: gradients then stop
    there, without an error."""
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.state_dict()  # puts reordered weights back in place, to save them
            layer.support_avx512bf16_for_cpu = False


def size_of(hidden_size: int, layers: int, *, rank: int = 16,
            targets: Sequence[str] = TARGETS) -> int:
    """Weights of LoRA beside square projections, none loaded: 16 777 216 for a hidden size of 4096
    and 32 layers."""
    return layers * len(targets) * rank * 2 * hidden_size


def is_quantised(model: nn.Module) -> bool:
    """Whether the decoder's weights are held as 4-bit or 8-bit codes."""
    return not decoder_of(model)[1].layers[0].self_attn.q_proj.weight.is_floating_point()


def merge_saved(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the LoRA weights in ``folder`` to the model's own (in place). Raises: CheckpointError
    when the folder holds none or they are another model's; TrainingError for a quantised model."""
    folder = Path(folder)
    if is_quantised(model):
        raise TrainingError("merging into quantised weights rounds nearly all of the training "
                            "away: load the drafter in bfloat16 and merge there")
    try:
        settings = peft.LoraConfig.from_pretrained(folder)
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no readable LoRA weights ({type(error).__name__}); "
                              "give the run's best folder") from error
    settings.inference_mode = False
    tuned = _attach(model, settings)
    expected, found = ({name: weight.shape for name, weight in some.items()}
                       for some in (_weights(tuned), weights))
    if found != expected:
        different = min(name for name, _ in expected.items() ^ found.items())
        tuned.unload()
        raise CheckpointError(f"the LoRA weights in {folder} are of another model ({different}); "
                              "load the drafter they were trained on")
    peft.set_peft_model_state_dict(tuned, weights)
    return tuned.merge_and_unload(safe_merge=True).requires_grad_(False).eval()


def save(tuned: peft.PeftModel, folder: str | Path) -> None:
    """Write the LoRA weights as peft does: adapter_model.safetensors and adapter_config.json."""
    with files.atomic_path(Path(folder) / "adapter_model.safetensors") as temporary:
        safetensors.torch.save_file({name: w.contiguous() for name, w in _weights(tuned).items()},
                                    temporary, metadata={"format": "pt"})
    files.write_json(Path(folder) / "adapter_config.json", tuned.peft_config["default"].to_dict())


def _weights(tuned: peft.PeftModel) -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)


def forced_states(model: nn.Module, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """The drafter's state before each token of each answer, with gradient.

        input    [ prompt 0 … L-1 | a   b  ]     the last token c is never read
        states   [            L-1   L   L+1 ]     predict a, b, c

    Args: prompts: B embeddings [L_i, D_d], vision included. answers: B int64 [S_i].
    Returns: post-norm [B, S, D_d], zero as padding.
    """
    embed = model.get_input_embeddings()
    pairs = list(zip(prompts, answers, strict=True))
    lines = [torch.cat([prompt.to(embed.weight), embed(ids[:-1])]) for prompt, ids in pairs]
    hidden = decoder_of(model)[1](inputs_embeds=pad_sequence(lines, batch_first=True),
                                  use_cache=False).last_hidden_state
    rows = [row[len(prompt) - 1:len(prompt) - 1 + len(ids)]
            for row, (prompt, ids) in zip(hidden, pairs, strict=True)]
    return pad_sequence(rows, batch_first=True)
