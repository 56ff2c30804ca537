"""One trainer for L1–L5, L5F and B1: the reference's recipe, and the one that optimises tokens
(docs/adapters.md, section 5).

A run folder holds best.safetensors and final.safetensors (with their .json), config.json,
history.json, provenance.json and checkpoint.pt. The same call on the same folder continues an
interrupted run to the same weights, bit for bit, and returns a finished one at once. Under
``accelerate launch`` or ``torchrun`` the same call trains on several processes
(:mod:`xsd.train.processes`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd import files
from xsd.adapters import heads, registry
from xsd.core import Batch, ParameterError, TrainingError
from xsd.train import guards, objectives, parts, run_folder, source, start
from xsd.train.processes import Processes
from xsd.train.recipes import FitConfig

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)


@dataclass(frozen=True)
class FitResult:
    """best_path: best.safetensors. history: one row an epoch. seconds: training time, all sessions.
    parameters: of the adapter.
    best_epoch: from 1."""

    level: str
    folder: Path
    best_path: Path
    history: list[dict[str, Any]]
    seconds: float
    parameters: int
    best_epoch: int


def fit_adapter(
    level: Any, dataset: Any, *, folder: str | Path, config: FitConfig | None = None,
    profile: str = "reference", head: heads.Head | None = None, seed: int = 0,
    validation: Any = None, held_out: Sequence[Any] | guards.HeldOut = (),
    device: str | torch.device = "cpu", progress: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train one adapter of a level on paired states.

    Args:
        level: of ours by name, or your own: "module:Class", a class, or an object, of which a copy
        is trained from its present weights (registry.resolve; it is checked first).
        dataset: a shards.store.ShardDataset, a sequence of core.PairedStates, a list of core.Batch,
        or source.PackedStates (pack once,
            train many).
        folder: the run folder, created; an unfinished run of the same configuration, seed and data
        in it is continued.
        config: how; ``profile`` is short for FitConfig(profile). head: the verifier's LM head,
        weight [V, D_v] or callable; needed by
            token terms, and for token acceptance in the history.
        validation: another dataset of *train* sequences; by default whole sequences of ``dataset``
        are held out.
        held_out: the sets that adapters are judged on later (ShardDatasets, or what guards.held_out
        made of them): nothing of them may be
            in ``dataset`` or ``validation``, under whatever name.
        progress: called with each epoch's row (in the process that writes).
    Raises: TrainingError for a test split, NaN, out of memory, a folder of another run;
    ParameterError for an unknown level or option.
    """
    config = config or FitConfig(profile=profile)
    if isinstance(level, str) and level not in registry.LEVELS and ":" not in level:
        raise ParameterError(
            f"level {level!r} is not trained here; choose one of {', '.join(registry.LEVELS)}, or "
            "name a class of your own as module:Class")
    if config.select_by == "token_acceptance" and head is None:
        raise TrainingError(
            f"profile {config.profile!r} selects by token acceptance and needs the verifier's LM "
            "head; pass head= (a weight [V, D])"
        )
    run = Training(level, dataset, folder, config, head=head, seed=seed, validation=validation,
                   held_out=held_out, device=device)
    try:
        return run.train(progress)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory while training {level}: lower batch_size (now {config.batch_size}) and "
            "raise accumulation (now "
            f"{config.accumulation})") from error


class Training:
    """One training: its data, adapter, optimiser and folder. :func:`fit_adapter` is the way to run
    one; the parts are for measuring."""
    def __init__(
        self, level: Any, dataset: Any, folder: str | Path, config: FitConfig, *,
        head: heads.Head | None = None, seed: int = 0, validation: Any = None,
        held_out: Sequence[Any] | guards.HeldOut = (), device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.spec, self.level = level, files.name_of(level)
        self.folder, self.config, self.seed = Path(folder), config, seed
        self.processes = Processes(torch.device(device))
        self.device = self.processes.device(torch.device(device))
        self.objective = objectives.parse(config.objective)
        self.states = source.open_states(dataset)
        guards.refuse_held_out(self.states, held_out)
        if validation is None:
            self.train_indices, self.validation_indices = source.split_by_sequence(
                self.states.sequence, config.validation_share, seed)
            self.validation_states = self.states
        else:
            self.validation_states = source.open_states(validation)
            guards.refuse_held_out(self.validation_states, held_out)
            shared = set(self.states.sequence) & set(self.validation_states.sequence)
            if shared:
                raise TrainingError(
                    f"sequence {min(shared)} is in both training and validation data; keep whole "
                    "sequences apart"
                )
            self.train_indices = torch.arange(len(self.states))
            self.validation_indices = torch.arange(len(self.validation_states))
        self.head, self.full_head = start.choose_heads(self.level, config, self.objective, self.states,
                                                self.train_indices, head, self.device)
        self.identity = {
            "level": self.level, "seed": seed, "config": asdict(config),
            "data": self.states.fingerprint()
        }
        if isinstance(level, torch.nn.Module):  # another beginning is another training
            self.identity["start"] = source.digest(level.state_dict().values())
        self.history: list[dict[str, Any]] = []
        self.best: list[float] = []
        self.best_epoch, self.finished = 0, False

    # --- the whole run
    # --------------------------------------------------------------------------------------------

    def train(self, progress: Callable[[dict[str, Any]], None] | None = None) -> FitResult:
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            self.prepare()
            self._resume()
            while not self.finished:
                row = self._epoch(len(self.history))
                self._keep(row)
                if progress is not None and self.processes.writes:
                    progress(row)
        return self.result()

    def prepare(self) -> None:
        """The adapter and its optimiser, from the seed (draws from torch's global generator)."""
        torch.manual_seed(self.seed)
        new = start.new_adapter(self.spec, self.config, self.states, self.train_indices, self.head,
                                self.full_head)
        self.adapter = new.to(self.device)
        self.parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=self.config.learning_rate,
                                           weight_decay=self.config.weight_decay, fused=True)

    def result(self) -> FitResult:
        seconds = sum(row["seconds"] for row in self.history)
        parameters = registry.count_parameters(self.adapter)
        return FitResult(self.level, self.folder, self.folder / "best.safetensors", self.history,
                         seconds, parameters, self.best_epoch)

    # --- one epoch
    # --------------------------------------------------------------------------------------------

    def _rate(self, epoch: int) -> float:
        """Cosine from learning_rate to minimum_learning_rate over ``epochs``, one value an epoch
        (CosineAnnealingLR)."""
        low, high = self.config.minimum_learning_rate, self.config.learning_rate
        return low + (high - low) * (1 + math.cos(math.pi * epoch / self.config.epochs)) / 2

    def _epoch(self, epoch: int) -> dict[str, Any]:
        start = time.perf_counter()
        row = {"epoch": epoch + 1, "learning_rate": self._rate(epoch), **self.train_pass(epoch)}
        row["train_seconds"] = time.perf_counter() - start
        row |= self.evaluate()
        if not math.isfinite(row["validation_total"]):
            self._stop_for_nan(epoch, None)
        row["seconds"] = time.perf_counter() - start
        return row

    def _batches(self, states: source.States, indices: Tensor,
                 shuffle_seed: int | None = None) -> Iterator[Batch]:
        """This process's share of every batch, on its device; the next one is fetched meanwhile
        where fetching takes long."""
        found = states.batches(indices, self.config.batch_size, shuffle_seed=shuffle_seed)
        if self.device.type != "cpu" and isinstance(
                states, source.PackedStates):  # streamed ones are read ahead already
            found = source.ahead(found)
        return (self._to_device(self.processes.rows(batch)) for batch in found)

    def train_pass(self, epoch: int) -> dict[str, float]:
        """One pass over the training data: the means of the loss and its terms, ``train_total``,
        ``train_<term>``."""
        torch.manual_seed(
            self.seed * 1_000_003 + epoch +
            1)  # dropout and noise of an epoch depend on nothing before it: resuming is exact
        if self.processes.rank:
            torch.manual_seed(self.seed * 1_000_003 + epoch + 1 + 7_368_787 * self.processes.rank)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(epoch)
        self.adapter.train()
        pieces = parts.plan(self.adapter, self.config)
        sums: dict[str, Any] = dict.fromkeys(("total", *self.objective.weights), 0.0)
        count = 0.0
        batches = self._batches(self.states, self.train_indices, self.seed * 7919 + epoch)
        for number, group in enumerate(_groups(batches, self.config.accumulation), start=1):
            own = [parts.norms(self.adapter, batch.mask, self.config) for batch in group]
            whole = self.processes.sum(torch.stack(own).sum(0))
            if whole[0] == 0:
                continue  # no answer of this step is long enough
            scale = whole.clamp_min(1e-12) * parts.factor_sum(pieces, whole, self.adapter)
            total = torch.zeros((), device=self.device)
            for batch, norms in zip(group, own, strict=True):
                if norms[0] == 0:
                    continue
                losses = parts.losses(self.adapter, batch, self.objective, self.head, self.config,
                                      (norms / scale).tolist(), norms.tolist())  # fmt: skip
                losses["total"].backward()
                total += losses.pop("total").detach()
                for name, value in losses.items():
                    sums[name] = sums[name] + value.detach() * norms[0]
            sums["total"] = sums["total"] + self._step(total, epoch,
                                                       number) * whole[0] / self.processes.size
            count += float(whole[0])
        if count == 0:
            raise TrainingError(
                f"no answer is long enough to train {self.level}, which predicts the next state; "
                "extract longer answers"
            )
        return {f"train_{name}": value / count for name, value in self.processes.sums(sums).items()}

    def _step(self, loss: Tensor, epoch: int, number: int) -> Tensor:
        """One optimiser step from the gradients that stand in the adapter; returns the step's loss
        over all processes."""
        self.processes.add_gradients(self.parameters)
        loss = self.processes.sum(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not math.isfinite(float(norm + loss)):
            self._stop_for_nan(epoch, number)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        names = ("drafter", "verifier", "ids_by_drafter", "ids_by_verifier", "mask")
        moved = {name: getattr(batch, name).to(self.device, non_blocking=True) for name in names}
        return Batch(**moved, sequence=batch.sequence, index=batch.index, mode=batch.mode)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation: the objective's terms, cosine, acceptance at each threshold and of tokens,
        means over positions, teacher-forced."""
        self.adapter.eval()
        judged = ["cosine_similarity", *(f"accept_{threshold:.2f}" for threshold in THRESHOLDS)]
        judged += ["token_acceptance"] if self.head is not None else []
        terms = [f"validation_{name}" for name in ("total", *self.objective.weights)]
        sums: dict[str, Any] = dict.fromkeys(["count", *terms, *judged], 0.0)
        for batch in self._batches(self.validation_states, self.validation_indices):
            if not len(batch.mask):
                continue  # another process has all of it
            aligned, target, ids, mask = self.adapter.align(batch)
            if not mask.any():
                continue
            n = int(mask.sum())
            values = {
                f"validation_{name}": value
                for name, value in self.objective(aligned, target, ids, mask, self.head).items()
            }
            similar = F.cosine_similarity(aligned[mask], target[mask], dim=-1)
            values["cosine_similarity"] = similar.mean()
            values |= {
                f"accept_{threshold:.2f}": (similar > threshold).float().mean()
                for threshold in THRESHOLDS
            }
            if self.head is not None:
                values["token_acceptance"] = (heads.top_tokens(
                    self.head, aligned[mask]) == ids[mask]).float().mean()
            for name, value in values.items():
                sums[name] = sums[name] + value.double() * n
            sums["count"] += n
        means = self.processes.sums(sums)
        count = means.pop("count")
        if count == 0:
            raise TrainingError(
                f"no validation answer is long enough for {self.level}; raise validation_share or "
                "extract longer answers"
            )
        return {name: value / count for name, value in means.items()}

    # --- the folder
    # --------------------------------------------------------------------------------------------

    def _keep(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        score = [-row["validation_total"]]
        if self.config.select_by == "token_acceptance":  # the loss decides between equals
            score = [row["token_acceptance"], *score]
        better = not self.best or score > self.best
        if better:
            self.best, self.best_epoch = score, row["epoch"]
        self.finished = row[
            "epoch"] >= self.config.epochs or row["epoch"] - self.best_epoch >= self.config.patience
        if self.processes.writes:
            self._write(row, better)
        self.processes.wait()

    def _write(self, row: dict[str, Any], better: bool) -> None:
        info = {
            "epoch": row["epoch"], "seed": self.seed, "data": self.identity["data"],
            "profile": self.config.profile
        }
        if better:
            registry.save_adapter(self.adapter, self.folder / "best.safetensors", **info)
        if row["epoch"] == 1:
            run_folder.describe(
                self.folder, self.identity,
                {"adapter": self.adapter.config(), "objective": str(self.objective)}, self.device)
        if self.finished:
            registry.save_adapter(self.adapter, self.folder / "final.safetensors", **info)
        state = {"adapter": self.adapter.state_dict(), "optimiser": self.optimiser.state_dict()}
        state |= {
            "history": self.history, "best": self.best, "best_epoch": self.best_epoch,
            "finished": self.finished
        }
        run_folder.save(self.folder, self.identity, state)

    def _resume(self) -> None:
        stored = run_folder.read(self.folder, self.identity, self.device,
                                 "level, configuration, seed or data")
        self.processes.wait()  # nobody writes before all have read
        if stored is None:
            return
        self.adapter.load_state_dict(stored["adapter"])
        self.optimiser.load_state_dict(stored["optimiser"])
        self.history, self.best, self.best_epoch, self.finished = (stored[key]
                                                                   for key in ("history", "best",
                                                                               "best_epoch",
                                                                               "finished"))

    def _stop_for_nan(self, epoch: int, step: int | None) -> None:
        where = f"epoch {epoch + 1}, " + ("validation" if step is None else f"step {step}")
        kept = (
            f"the last good checkpoint is {self.folder / 'best.safetensors'} (epoch "
            f"{self.best_epoch})"
            if self.best_epoch else "no epoch was finished")
        raise TrainingError(
            f"training {self.level} stopped at {where}: the loss or its gradient is not a number; "
            f"{kept}; "
            f"lower learning_rate (now {self.config.learning_rate:g}) or look for NaN in the states"
        )


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one optimiser step after another; the last step may have fewer."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group
