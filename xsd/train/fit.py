"""One trainer for L1–L5, L5F and B1: the reference's recipe, and the one that optimises tokens (docs/adapters.md, section 5).

A run folder holds best.safetensors and final.safetensors (with their .json), config.json, history.json, provenance.json and
checkpoint.pt. The same call on the same folder continues an interrupted run to the same weights, bit for bit, and returns a finished
one at once.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd import core
from xsd.adapters import linear, registry
from xsd.adapters.base import Adapter
from xsd.core import Batch, CheckpointError, ParameterError, TrainingError
from xsd.train import objectives, source
from xsd.train.recipes import FitConfig

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)


@dataclass(frozen=True)
class FitResult:
    """best_path: best.safetensors. history: one row an epoch. seconds: training time, all sessions. parameters: of the adapter.
    best_epoch: from 1."""

    level: str
    folder: Path
    best_path: Path
    history: list[dict[str, Any]]
    seconds: float
    parameters: int
    best_epoch: int


def fit_adapter(
    level: str,
    dataset: Any,
    *,
    folder: str | Path,
    config: FitConfig | None = None,
    profile: str = "reference",
    head: objectives.Head | None = None,
    seed: int = 0,
    validation: Any = None,
    device: str | torch.device = "cpu",
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train one adapter of a level on paired states.

    Args:
        dataset: a shards.store.ShardDataset, a sequence of core.PairedStates, a list of core.Batch, or source.PackedStates (pack once,
            train many).
        folder: the run folder, created; an unfinished run of the same configuration, seed and data in it is continued.
        config: how; ``profile`` is short for FitConfig(profile). head: the verifier's LM head, weight [V, D_v] or callable; needed by
            token terms, and for token acceptance in the history.
        validation: another dataset of *train* sequences; by default whole sequences of ``dataset`` are held out.
        progress: called with each epoch's row.
    Raises: TrainingError for a test split, NaN, out of memory, a folder of another run; ParameterError for an unknown level or option.
    """
    config = config or FitConfig(profile=profile)
    if level not in registry.LEVELS:
        raise ParameterError(f"level {level!r} is not trained here; choose one of {', '.join(registry.LEVELS)}")
    if config.select_by == "token_acceptance" and head is None:
        raise TrainingError(
            f"profile {config.profile!r} selects by token acceptance and needs the verifier's LM head; pass head= (a weight [V, D])"
        )
    run = _Run(level, dataset, validation, Path(folder), config, head, seed, torch.device(device))
    try:
        return run.train(progress)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory while training {level}: lower batch_size (now {config.batch_size}) and raise accumulation (now "
            f"{config.accumulation})"
        ) from error


class _Run:
    """One training: its data, adapter, optimiser and folder."""

    def __init__(self, level, dataset, validation, folder, config, head, seed, device) -> None:
        self.level, self.folder, self.config, self.seed, self.device = level, folder, config, seed, device
        self.head = head.detach().float().to(device) if isinstance(head, Tensor) else head
        self.objective = objectives.parse(config.objective)
        self.states = source.open_states(dataset)
        if not self.states.has_token_ids:
            if self.objective.needs_head or config.select_by == "token_acceptance":
                raise TrainingError(
                    f"objective {config.objective!r} needs token ids and this dataset has none; use profile 'reference' or extract again"
                )
            self.head = None
        if validation is None:
            self.train_indices, self.validation_indices = source.split_by_sequence(self.states.sequence, config.validation_share, seed)
            self.validation_states = self.states
        else:
            self.validation_states = source.open_states(validation)
            shared = set(self.states.sequence) & set(self.validation_states.sequence)
            if shared:
                raise TrainingError(f"sequence {min(shared)} is in both training and validation data; keep whole sequences apart")
            self.train_indices = torch.arange(len(self.states))
            self.validation_indices = torch.arange(len(self.validation_states))
        self.identity = {"level": level, "seed": seed, "config": asdict(config), "data": self.states.fingerprint()}
        self.history: list[dict[str, Any]] = []
        self.best: list[float] = []
        self.best_epoch, self.finished = 0, False

    # --- the whole run ---------------------------------------------------------------------------------------------------------------

    def train(self, progress: Callable[[dict[str, Any]], None] | None) -> FitResult:
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            torch.manual_seed(self.seed)
            self.adapter = self._create().to(self.device)
            self.optimiser = torch.optim.AdamW(
                [p for p in self.adapter.parameters() if p.requires_grad],
                lr=self.config.learning_rate,
                weight_decay=self.config.weight_decay,
            )
            self._resume()
            while not self.finished:
                row = self._epoch(len(self.history))
                self._keep(row)
                if progress is not None:
                    progress(row)
        return self.result()

    def result(self) -> FitResult:
        seconds = sum(row["seconds"] for row in self.history)
        parameters = registry.count_parameters(self.adapter)
        return FitResult(self.level, self.folder, self.folder / "best.safetensors", self.history, seconds, parameters, self.best_epoch)

    def _create(self) -> Adapter:
        options = dict(self.config.adapter_options)
        if self.config.alpha is not None and self.level in ("L4", "L5", "B1", "L5F"):
            options.setdefault("alpha", self.config.alpha)
        if self.config.prediction_weight is not None and self.level in ("L5", "B1", "L5F"):
            options.setdefault("prediction_weight", self.config.prediction_weight)
        ridge = self.config.warm_start == "ridge"
        if ridge and self.level != "B1":
            options.setdefault("input_map", True)
        if ridge and self.level in ("B1", "L5F"):
            options.setdefault("residual_map", True)
        adapter = registry.create_adapter(self.level, self.states.hidden_size, drafter_size=self.states.drafter_size, **options)
        for module, reads in ((adapter.input_map, "drafter"), (getattr(adapter, "residual_map", None), adapter.reads)):
            if ridge and isinstance(module, torch.nn.Linear):
                closed = linear.fit_linear("ridge", self.states.batches(self.train_indices, self.config.batch_size), reads=reads)
                module.load_state_dict(closed.map.state_dict())
        if adapter.fuses_tokens:
            if not isinstance(self.head, Tensor):
                raise TrainingError(f"{self.level} with fused tokens takes its token table from the LM head; pass head= as a weight [V, D]")
            adapter.set_token_embedding(self.head.cpu())
        return adapter

    # --- one epoch -------------------------------------------------------------------------------------------------------------------

    def _rate(self, epoch: int) -> float:
        """Cosine from learning_rate to minimum_learning_rate over ``epochs``, one value an epoch (CosineAnnealingLR)."""
        low, high = self.config.minimum_learning_rate, self.config.learning_rate
        return low + (high - low) * (1 + math.cos(math.pi * epoch / self.config.epochs)) / 2

    def _epoch(self, epoch: int) -> dict[str, Any]:
        start = time.perf_counter()
        torch.manual_seed(self.seed * 1_000_003 + epoch + 1)  # dropout and noise of an epoch depend on nothing before it: resuming is exact
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(epoch)
        self.adapter.train()
        sums: dict[str, float] = {}
        count = 0
        batches = _mark_last(self.states.batches(self.train_indices, self.config.batch_size, shuffle_seed=self.seed * 7919 + epoch))
        for number, (batch, last) in enumerate(batches, start=1):
            batch = self._to_device(batch)
            losses = self._loss(batch)
            if losses is None:
                continue
            (losses["total"] / self.config.accumulation).backward()
            n = int(batch.mask.sum())
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * n
            count += n
            if number % self.config.accumulation == 0 or last:
                norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.clip)
                if not math.isfinite(sums["total"]) or not math.isfinite(float(norm)):
                    self._stop_for_nan(epoch, number)
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
        if count == 0:
            raise TrainingError(f"no answer is long enough to train {self.level}, which predicts the next state; extract longer answers")
        row = {"epoch": epoch + 1, "learning_rate": self._rate(epoch), **{f"train_{name}": value / count for name, value in sums.items()}}
        row |= self.evaluate()
        if not math.isfinite(row["validation_total"]):
            self._stop_for_nan(epoch, None)
        row["seconds"] = time.perf_counter() - start
        return row

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        moved = {
            name: getattr(batch, name).to(self.device) for name in ("drafter", "verifier", "ids_by_drafter", "ids_by_verifier", "mask")
        }
        return Batch(**moved, sequence=batch.sequence, index=batch.index, mode=batch.mode)

    def _loss(self, batch: Batch) -> dict[str, Tensor] | None:
        """The objective's terms on one batch, with L5's next-state term or further self-rollout steps inside ``total``; None without a
        target."""
        if self.config.noise:
            batch = _with_noise(batch, self.config.noise)
        adapter, autocast = self.adapter, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16")
        if adapter.shift and self.config.rollout_steps > 1:
            return self._rollout_loss(batch, autocast)
        with autocast:
            aligned, target, ids, mask = adapter.align(batch)
        if not mask.any():
            return None
        losses = self.objective(aligned.float(), target, ids, mask, self.head)
        weight = getattr(adapter, "prediction_weight", 0.0) if adapter.shift == 0 else 0.0
        if weight and mask[:, 1:].any():
            later = self.objective(aligned[:, :-1].float(), target[:, 1:], ids[:, 1:], mask[:, 1:], self.head)
            losses = {**losses, "total": losses["total"] + weight * later["total"]}
        return losses

    def _rollout_loss(self, batch: Batch, autocast: torch.autocast) -> dict[str, Tensor] | None:
        steps = min(self.config.rollout_steps, batch.mask.shape[1] - 1)
        if steps < 1 or not batch.mask[:, 1:].any():
            return None
        tokens = batch.ids_by_verifier if self.adapter.fuses_tokens else None
        with autocast:
            results = self.adapter.unroll(batch.drafter, batch.verifier, steps, tokens)
        total, first, norm = 0.0, {}, 0.0
        for k, aligned in enumerate(results, start=1):
            mask = batch.mask[:, k:]
            if not mask.any():
                break
            losses = self.objective(aligned[:, :-k].float(), batch.verifier[:, k:], batch.ids_by_verifier[:, k:], mask, self.head)
            weight = self.config.rollout_decay ** (k - 1)
            total, norm = total + weight * losses["total"], norm + weight
            first = first or losses
        return {**first, "total": total / norm}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation: the objective's terms, cosine, acceptance at each threshold and of tokens, means over positions, teacher-forced."""
        self.adapter.eval()
        sums: dict[str, float] = {}
        count = 0
        for batch in self.validation_states.batches(self.validation_indices, self.config.batch_size):
            aligned, target, ids, mask = self.adapter.align(self._to_device(batch))
            if not mask.any():
                continue
            n = int(mask.sum())
            values = {f"validation_{name}": value for name, value in self.objective(aligned, target, ids, mask, self.head).items()}
            similar = F.cosine_similarity(aligned[mask], target[mask], dim=-1)
            values["cosine_similarity"] = similar.mean()
            values |= {f"accept_{threshold:.2f}": (similar > threshold).float().mean() for threshold in THRESHOLDS}
            if self.head is not None:
                values["token_acceptance"] = (objectives.top_tokens(self.head, aligned[mask]) == ids[mask]).float().mean()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value) * n
            count += n
        if count == 0:
            raise TrainingError(f"no validation answer is long enough for {self.level}; raise validation_share or extract longer answers")
        return {name: value / count for name, value in sums.items()}

    # --- the folder ------------------------------------------------------------------------------------------------------------------

    def _keep(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        score = [-row["validation_total"]]
        if self.config.select_by == "token_acceptance":  # the loss decides between equals
            score = [row["token_acceptance"], *score]
        info = {"epoch": row["epoch"], "seed": self.seed, "data": self.identity["data"], "profile": self.config.profile}
        if not self.best or score > self.best:
            self.best, self.best_epoch = score, row["epoch"]
            registry.save_adapter(self.adapter, self.folder / "best.safetensors", **info)
        stale = row["epoch"] - self.best_epoch
        self.finished = row["epoch"] >= self.config.epochs or stale >= self.config.patience
        core.write_json(self.folder / "history.json", self.history)
        if row["epoch"] == 1:
            core.write_json(
                self.folder / "config.json", {**self.identity, "adapter": self.adapter.config(), "objective": str(self.objective)}
            )
            core.write_json(
                self.folder / "provenance.json", core.provenance(seed=self.seed, data_hash=self.identity["data"], device=str(self.device))
            )
        if self.finished:
            registry.save_adapter(self.adapter, self.folder / "final.safetensors", **info)
        with core.atomic_path(self.folder / "checkpoint.pt") as temporary:
            torch.save(
                {
                    "identity": _fixed(self.identity), "adapter": self.adapter.state_dict(), "optimiser": self.optimiser.state_dict(),
                    "history": self.history, "best": self.best, "best_epoch": self.best_epoch, "finished": self.finished,
                },
                temporary,
            )  # fmt: skip

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        try:
            stored = torch.load(path, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}); delete the folder and train again") from error
        if stored["identity"] != _fixed(self.identity):
            raise TrainingError(
                f"{self.folder} holds another training (level, configuration, seed or data differ); choose another folder or delete it"
            )
        self.adapter.load_state_dict(stored["adapter"])
        self.optimiser.load_state_dict(stored["optimiser"])
        self.history, self.best, self.best_epoch, self.finished = (stored[key] for key in ("history", "best", "best_epoch", "finished"))

    def _stop_for_nan(self, epoch: int, batch: int | None) -> None:
        where = f"epoch {epoch + 1}, " + ("validation" if batch is None else f"batch {batch}")
        kept = (
            f"the last good checkpoint is {self.folder / 'best.safetensors'} (epoch {self.best_epoch})"
            if self.best_epoch
            else "no epoch was finished"
        )
        raise TrainingError(
            f"training {self.level} stopped at {where}: the loss or its gradient is not a number; {kept}; "
            f"lower learning_rate (now {self.config.learning_rate:g}) or look for NaN in the states"
        )


def _fixed(value: Any) -> str:
    """One JSON line, the same for the same value."""
    return json.dumps(value, sort_keys=True, default=str)


def _mark_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """(batch, whether it is the last of the epoch)."""
    waiting: Batch | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting, False
        waiting = batch
    if waiting is not None:
        yield waiting, True


def _with_noise(batch: Batch, share: float) -> Batch:
    """The drafter's states moved by uniform noise of ± share × their standard deviation (the verifier's are targets too and stay clean)."""

    def moved(states: Tensor) -> Tensor:
        return states + (2 * torch.rand_like(states) - 1) * share * states[batch.mask].std()

    return Batch(
        moved(batch.drafter),
        batch.verifier,
        batch.ids_by_drafter,
        batch.ids_by_verifier,
        batch.mask,
        batch.sequence,
        batch.index,
        batch.mode,
    )
