"""One stage of a training from scratch: AdamW over a fixed number of steps, warm-up and cosine, a
checkpoint that it goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from xsd.core import TrainingError
from xsd.files import atomic_path


@dataclass(frozen=True)
class StageConfig:
    """steps of optimisation, learning rate at its peak; bf16: autocast, on a GPU or a CPU that has
    it (2.5 times faster there, and many times slower where it is emulated)."""

    steps: int
    batch_size: int
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    bf16: bool = True
    seed: int = 0
    save_every: int = 100


def schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then cosine to 5 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def mask_of(seen: Tensor) -> Tensor:
    """What is added to scores, 0 where ``seen`` (bool) and very low elsewhere, in the dtype of a
    stage's products."""
    kind = seen.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    mask = torch.zeros(seen.shape, device=seen.device, dtype=dtype)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)


def run(what: str, modules: Sequence[tuple[nn.Module, float]], loss_at: Callable[[int], Tensor],
        config: StageConfig, *, device: str = "cpu", checkpoint: Path | None = None,
        progress: Callable[[int, int, float], None] | None = None) -> list[float]:
    """Take ``config.steps`` steps down ``loss_at(step)``; resumes from ``checkpoint`` when it is
    there.

    Args:
        what: names the loss in a sentence. modules: (module, its share of the learning rate).
        loss_at: the loss of a step, computed under autocast when config.bf16 says so.
        progress: called with (step, total, loss) after every step.

    Returns: the loss of every step. Raises: TrainingError when a loss is not finite, or when the
    checkpoint is another training's.
    """
    groups = [{"params": list(module.parameters()), "scale": scale} for module, scale in modules]
    parameters = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay,
                                  betas=(0.9, 0.98))
    owners = nn.ModuleList([module for module, _ in modules])
    history: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved.get("config") != asdict(config):
            kept = saved.get("config", "none were kept")
            raise TrainingError(
                f"{checkpoint} is of a training with other settings ({kept}); choose another "
                "folder, or delete it"
            )
        owners.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        history = saved["history"]
    owners.train()
    bf16 = config.bf16 and (device.split(":")[0] != "cpu" or
                            torch.ops.mkldnn._is_mkldnn_bf16_supported())
    while (step := len(history)) < config.steps:
        share = schedule(step, config.steps, config.warmup_steps)
        for group in optimiser.param_groups:
            group["lr"] = group["scale"] * config.learning_rate * share
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
            loss = loss_at(step)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the {what} loss is {float(loss.detach())} at step {step}; "
                f"lower learning_rate (now {config.learning_rate}) and resume from {checkpoint}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        history.append(float(loss.detach()))
        if progress:
            progress(len(history), config.steps, history[-1])
        due = len(history) % config.save_every == 0 or len(history) == config.steps
        if checkpoint is not None and due:
            state = {"model": owners.state_dict(), "optimiser": optimiser.state_dict(),
                     "history": history, "config": asdict(config)}
            with atomic_path(checkpoint) as path:
                torch.save(state, path)
    return history
