"""Language training of the embedded models: many questions about one clip in one row, kept apart by a block mask.

    row:   [ prefix: prompt start + visual tokens | question 1 answer 1 | question 2 answer 2 | … ]
    sees:    prefix ← everything                    only itself + prefix    only itself + prefix

Every segment continues the positions of the prefix, as if it stood alone: answers cannot leak facts into each other (which flatters the
loss), and the expensive prefix is computed once for all of them. Tokens that state a fact weigh more than function words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xsd.core import TrainingError, atomic_path
from xsd.train.grounding import COLUMNS, PatchReader, loss_of, schedule


@dataclass(frozen=True)
class Segment:
    """One question with its answer as ids. question: ids after the visual tokens. answer: ids ending in EOS. weight: one a answer id."""

    question: list[int]
    answer: list[int]
    weight: list[float]


@dataclass(frozen=True)
class LanguageConfig:
    """steps of optimisation, batch in clips, questions asked per clip and step, share of segments in the other model's dialect."""

    steps: int = 2000
    batch_size: int = 12
    questions_per_clip: int = 6
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    fact_weight: float = 3.0
    tower_rate: float = 0.6
    register_weight: float = 1.0
    patch_weight: float = 0.5
    bf16: bool = True
    seed: int = 0
    save_every: int = 100


class FactRegisters(nn.Module):
    """One classifier a fact on the last visual positions, half way up the decoder; thrown away after training.

    The k-th of the last ``len(classes)`` visual positions has to know fact k there: it has seen every frame before it, and what it has
    gathered is a single step of attention away from any answer. Without it grounding comes slowly through the words alone (docs/log.md).
    """

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classifiers = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def forward(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy. states: [B, n_facts, D]. labels: int64 [B, n_facts], -1 where a fact is not asked."""
        x = self.norm(states.float())
        logits = {name: classifier(x[:, i]) for i, (name, classifier) in enumerate(self.classifiers.items())}
        return loss_of(logits, labels, list(self.classifiers))[0]


class SceneReader(nn.Module):
    """What stands in every patch and every frame, how it moves, and how the camera does, a third of the way up the decoder; thrown away.

    A tower sees one frame at a time, so what moves must be found by the decoder's first layers, which look back at earlier frames. The
    answers alone teach that too slowly (docs/log.md).
    """

    def __init__(self, width: int, patches: PatchReader, n_ego: int, n_columns: int = 48) -> None:
        super().__init__()
        self.patches, self.norm, self.ego = patches, nn.LayerNorm(width), nn.Linear(width, n_ego)
        self.columns = nn.Linear(width, n_columns)

    def forward(self, states: Tensor, frames: Tensor, codes: Tensor, columns: Tensor, colour_known: Tensor, ego: Tensor) -> Tensor:
        """Summed mean cross-entropies.

        states: [B, F, P, D] without CLS; codes, colour_known: as PatchReader's. frames: [B, G, D], one state a frame; columns: bool
        [B, G, n_columns], which kind of thing stands in which column. ego: int64 [B], -1 unknown; asked for at every patch of the
        later half of the frames, which have something to look back at.
        """
        loss = self.patches(states, codes, colour_known)
        present = columns.to(states.device).float()
        each = F.binary_cross_entropy_with_logits(
            self.columns(self.norm(frames.float())), present, reduction="none", pos_weight=torch.tensor(5.0, device=states.device)
        )
        loss = loss + each.mean() * COLUMNS
        if (ego >= 0).any():
            later = self.ego(self.norm(states[ego >= 0][:, states.shape[1] // 2 :].float()))
            loss = loss + F.cross_entropy(later.flatten(0, 2), ego[ego >= 0].repeat_interleave(later.shape[1] * later.shape[2]))
        return loss


@dataclass(frozen=True)
class PackedRow:
    """ids: int64 [L] (0 where visual tokens stand). segment: int64 [L], 0 prefix, 1… questions. position: int64 [L].

    target, weight: [L].
    """

    ids: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    target: np.ndarray
    weight: np.ndarray


def pack(before: list[int], n_visual: int, segments: Sequence[Segment]) -> PackedRow:
    """Lay out one row; target[i] is the id that position i must predict, -100 where nothing is asked."""
    prefix = len(before) + n_visual
    ids, segment, position = [*before, *[0] * n_visual], [0] * prefix, list(range(prefix))
    target, weight = [-100] * prefix, [0.0] * prefix
    for number, s in enumerate(segments, start=1):
        tokens = s.question + s.answer
        ids += tokens
        segment += [number] * len(tokens)
        position += list(range(prefix, prefix + len(tokens)))
        target += [-100] * (len(s.question) - 1) + s.answer + [-100]
        weight += [0.0] * (len(s.question) - 1) + s.weight + [0.0]
    return PackedRow(*(np.array(a) for a in (ids, segment, position, target)), np.array(weight, dtype=np.float32))


def collate(rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, positions, targets int64 [B, L], weights [B, L] and the block mask bool [B, 1, L, L] (True: may be seen)."""
    length = max(len(row.ids) for row in rows)

    def padded(name: str, value: float) -> Tensor:
        return torch.from_numpy(np.stack([np.pad(getattr(r, name), (0, length - len(r.ids)), constant_values=value) for r in rows]))

    segment = padded("segment", -1)
    order = torch.arange(length)
    seen = (order[:, None] >= order[None, :]) & ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None]))
    seen |= torch.eye(length, dtype=torch.bool)  # padding sees itself, so that no row of the softmax is empty
    return padded("ids", 0), padded("position", 0), padded("target", -100), padded("weight", 0.0), seen[:, None]


def train_decoder(
    *,
    embed: Callable[[Tensor], Tensor],
    visual: Callable[[np.ndarray], Tensor],
    decode: Callable[[Tensor, Tensor, Tensor], Tensor],
    lm_head: Callable[[Tensor], Tensor],
    trained: nn.Module,
    tower: nn.Module,
    registers: FactRegisters,
    middle: nn.Module,
    scene: SceneReader,
    early: nn.Module,
    patches: Callable[[Tensor], Tensor],
    frames: Callable[[Tensor], Tensor],
    codes: Callable[[np.ndarray, int], np.ndarray],
    columns: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    ego: np.ndarray,
    colour_known: np.ndarray,
    before: list[int],
    n_visual: int,
    segments: Callable[[int, np.random.Generator], Sequence[Segment]],
    n_clips: int,
    config: LanguageConfig,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train a decoder (and its projector) on packed rows; resumes from ``checkpoint``.

    Args:
        embed: ids [B, L] → [B, L, D]. visual: clip numbers [B] → visual tokens [B, n_visual, D], with gradient to projector and tower.
        decode: embeddings [B, L, D], additive mask [B, 1, L, L], positions [B, L] → post-norm states [B, L, D].
        lm_head: states [N, D] → logits [N, V]. trained: the module that owns the decoder's and the projector's parameters; tower: the
            tower, trained along at ``tower_rate`` of the learning rate: what still asks for comparison over time must be written into it.
        registers: fact classifiers on the last visual positions of ``middle``, a decoder layer. labels: int64 [N, n_facts], -1 not asked.
        scene: classifiers on the patches of ``early``, another one. patches: visual positions [B, n_visual, D] → [B, F, P, D].
        frames: visual positions → [B, G, D], one a frame. columns: clip numbers → bool [B, G, n_columns].
        codes: clip numbers, patches a side → int64 [B, F, P], the layout's code in every patch. ego: int64 [N], -1 not known;
            colour_known: bool [N].
        before: ids before the visual tokens. segments: clip number, generator → the questions of this step.

    Returns: the loss of every step. Raises: TrainingError when the loss is not finite.
    """
    groups = [
        {"params": [*trained.parameters(), *registers.parameters(), *scene.parameters()], "scale": 1.0},
        {"params": list(tower.parameters()), "scale": config.tower_rate},
    ]
    parameters = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    owners = nn.ModuleList([trained, tower, registers, scene])
    history: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        owners.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        history = saved["history"]
    owners.train()
    prefix = len(before) + n_visual
    gathered = slice(prefix - labels.shape[1], prefix)
    tapped: dict[nn.Module, Tensor] = {}

    def tap(module: nn.Module, given: tuple, result: Tensor | tuple) -> None:
        tapped[module] = result[0] if isinstance(result, tuple) else result

    hooks = [layer.register_forward_hook(tap) for layer in {middle, early}]
    while (step := len(history)) < config.steps:
        rng = np.random.default_rng([config.seed, step])
        clips = np.sort(rng.choice(n_clips, size=min(config.batch_size, n_clips), replace=False))
        rows = [pack(before, n_visual, segments(int(clip), rng)) for clip in clips]
        ids, positions, targets, weights, seen = (t.to(device) for t in collate(rows))
        for group in optimiser.param_groups:
            group["lr"] = group["scale"] * config.learning_rate * schedule(step, config.steps, config.warmup_steps)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=config.bf16):
            embeddings = embed(ids)
            tokens = visual(clips).to(embeddings.dtype)
            embeddings = torch.cat([embeddings[:, : len(before)], tokens, embeddings[:, prefix:]], dim=1)
            mask = torch.zeros(seen.shape, device=seen.device, dtype=torch.bfloat16 if config.bf16 else embeddings.dtype).masked_fill(
                ~seen, torch.finfo(torch.bfloat16).min
            )
            states = decode(embeddings, mask, positions)
            asked = targets >= 0
            logits = lm_head(states[asked])
        weight = weights[asked]
        loss = (F.cross_entropy(logits.float(), targets[asked], reduction="none") * weight).sum() / weight.sum()
        loss = loss + config.register_weight * registers(tapped[middle][:, gathered], torch.from_numpy(labels[clips]).to(device))
        looked = tapped[early][:, len(before) : prefix]
        seen_patches = patches(looked)
        truths = (codes(clips, int(seen_patches.shape[2] ** 0.5)), columns(clips), colour_known[clips], ego[clips])
        loss = loss + config.patch_weight * scene(seen_patches, frames(looked), *(torch.from_numpy(t).to(device) for t in truths))
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the language loss is {float(loss.detach())} at step {step}; "
                f"lower learning_rate (now {config.learning_rate}) and resume from {checkpoint}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        history.append(float(loss.detach()))
        if progress:
            progress(len(history), config.steps, history[-1])
        if checkpoint is not None and (len(history) % config.save_every == 0 or len(history) == config.steps):
            with atomic_path(checkpoint) as path:
                torch.save({"model": owners.state_dict(), "optimiser": optimiser.state_dict(), "history": history}, path)
    for hook in hooks:
        hook.remove()
    return history
