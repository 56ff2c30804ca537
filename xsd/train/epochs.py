"""What every training here shares: epochs, what validation counts, the best weights, and a folder
that continues an interrupted run to the same weights, bit for bit."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd import files
from xsd.adapters import heads, tensor_files
from xsd.core import CheckpointError, StorageError, TrainingError, reading
from xsd.train import folders, guards, objectives, source
from xsd.train.processes import Processes

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
Progress = Callable[[dict[str, Any]], None] | None


@dataclass(frozen=True)
class FitResult:
    """best_path: of the best weights. history: one row per epoch. seconds: training time of all
    sessions. parameters: trained ones. best_epoch: from 1."""

    level: str
    folder: Path
    best_path: Path
    history: list[dict[str, Any]]
    seconds: float
    parameters: int
    best_epoch: int


class OtherTraining(TrainingError):
    """The folder holds another training. asked: what the one asked for is called in its files."""

    def __init__(self, message: str, asked: str) -> None:
        super().__init__(message)
        self.asked = asked


class EpochLoop:
    """One training, an epoch at a time. fit.Training and lora_fit.LoraTraining say what differs:
    prepare() what trains, and its optimiser (may draw from torch's global generator);
    train_pass(epoch) over the training answers, giving the means of the loss and its terms
    (``train_total``, ``train_<term>``); predictions(): aligned, target, ids and mask of one batch
    of validation answers after another; weights(), restore(weights) and save("best" | "final",
    row). They set identity (what makes a run another one), about (what config.json says besides),
    head, parameters and optimiser."""

    best_name = "best.safetensors"
    next_weight = 0.0  # of the loss against the next state (L5; train/parts.py)
    to_save_memory = ""
    head: heads.Head | None
    parameters: list[torch.nn.Parameter]
    optimiser: torch.optim.Optimizer

    def __init__(self, level: str, folder: str | Path, config: Any, seed: int,
                 device: torch.device) -> None:
        self.level, self.folder, self.config, self.seed = level, Path(folder), config, seed
        self.objective = objectives.parse(config.objective)
        self.processes = Processes(device)
        self.device = self.processes.device
        self.identity: dict[str, Any] = {"level": level, "seed": seed, "config": asdict(config)}
        self.about: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.best: list[float] = []
        self._lock: files.FolderLock | None = None  # of the process that writes, while it does
        self.best_epoch, self.finished = 0, False

    def take(self, dataset: Any, validation: Any, held_out: Sequence[Any] | guards.Marks,
             **options: Any) -> None:
        """Open the training answers and those that choose the best epoch: of another dataset, or
        whole sequences held back. Raises: TrainingError as :mod:`source` and :mod:`guards`."""
        self.states = self.validation_states = source.open_states(dataset, **options)
        guards.refuse_held_out(self.states, held_out)
        self.identity["data"] = self.states.fingerprint()
        if validation is None:
            self.train_indices, self.validation_indices = source.split_by_sequence(
                self.states.sequence, self.config.validation_share, self.seed)
            return
        self.validation_states = source.open_states(validation, **options)
        guards.refuse_validation(self.states, self.validation_states, held_out)
        self.identity["validation"] = self.validation_states.fingerprint()
        self.train_indices = torch.arange(len(self.states))
        self.validation_indices = torch.arange(len(self.validation_states))

    def run(self, progress: Progress = None) -> FitResult:
        """Train on from where the folder stands until the last epoch, or until patience is over.
        The caller's random stream stays as it was."""
        devices = [] if self.device.type == "cpu" else [self.device]
        try:
            with torch.random.fork_rng(devices=devices):
                self.prepare()
                with self._only_writer():
                    while not self.finished:
                        row = self._epoch(len(self.history))
                        self._keep(row)
                        if progress is not None and self.processes.writes:
                            progress(row)
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"out of memory while training {self.level}: lower batch_size (now "
                                f"{self.config.batch_size}) and raise accumulation (now "
                                f"{self.config.accumulation}){self.to_save_memory}") from error
        return FitResult(self.level, self.folder, self.folder / self.best_name, self.history,
                         sum(row["seconds"] for row in self.history),
                         sum(parameter.numel() for parameter in self.parameters), self.best_epoch)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        start = time.perf_counter()
        rate = self.set_rate(epoch)
        # dropout and noise of an epoch depend on nothing before it: resuming is exact
        torch.manual_seed(self.seed * 1_000_003 + epoch + 1 + 7_368_787 * self.processes.rank)
        row = {"epoch": epoch + 1, "learning_rate": rate, **self.train_pass(epoch)}
        row["train_seconds"] = time.perf_counter() - start
        row |= self.evaluate()
        if not math.isfinite(row["validation_total"]):
            raise self._not_a_number(f"epoch {epoch + 1}, validation")
        return row | {"seconds": time.perf_counter() - start}

    def set_rate(self, epochs: float) -> float:
        """The learning rate after so many epochs: a cosine from the highest to the lowest."""
        low, high = self.config.minimum_learning_rate, self.config.learning_rate
        rate = low + (high - low) * (1 + math.cos(math.pi * epochs / self.config.epochs)) / 2
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return rate

    def step(self, loss: Tensor, epoch: int, number: int) -> Tensor:
        """One optimiser step from the gradients that stand in the parameters; returns the step's
        loss over all processes. Raises: TrainingError when it is not a number."""
        self.processes.add_gradients(self.parameters)
        loss = self.processes.sum(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not math.isfinite(float(norm + loss)):
            raise self._not_a_number(f"epoch {epoch + 1}, step {number}")
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss

    def _not_a_number(self, where: str) -> TrainingError:
        kept = "no epoch was finished"
        if self.best_epoch:
            best = self.folder / self.best_name
            kept = f"the last good checkpoint is {best} (epoch {self.best_epoch})"
        return TrainingError(
            f"training {self.level} stopped at {where}: the loss or its gradient is not a number; "
            f"{kept}; lower learning_rate (now {self.config.learning_rate:g}) or look for NaN in "
            "the states")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation, teacher-forced, means over positions: terms, cosine, both acceptances."""
        names = [f"validation_{name}" for name in ("total", *self.objective.weights)]
        names += ["cosine_similarity", *(f"accept_{threshold:.2f}" for threshold in THRESHOLDS)]
        names += ["token_acceptance"] if self.head is not None else []
        sums: dict[str, Any] = dict.fromkeys(["count", "next", "next_count", *names], 0.0)
        for aligned, target, ids, mask in self.predictions():
            n = int(mask.sum())
            for name, value in (self._judge(aligned, target, ids, mask) if n else {}).items():
                sums[name] = sums[name] + value.double() * n
            sums["count"] += n
            later = mask[:, 1:]
            if self.next_weight and later.any():
                found = self.objective(aligned[:, :-1], target[:, 1:], ids[:, 1:], later, self.head)
                sums["next"] += float(found["total"]) * int(later.sum())
                sums["next_count"] += int(later.sum())
        means = self.processes.sums(sums)
        count, following, n_following = map(means.pop, ("count", "next", "next_count"))
        if count == 0:
            raise TrainingError(f"no validation answer is long enough for {self.level}; raise "
                                "validation_share or extract longer answers")
        means = {name: value / count for name, value in means.items()}
        if n_following:  # the same sum as train_total
            means["validation_total"] += self.next_weight * following / n_following
        return means

    def _judge(self, aligned: Tensor, target: Tensor, ids: Tensor,
               mask: Tensor) -> dict[str, Tensor]:
        losses = self.objective(aligned, target, ids, mask, self.head)
        values = {f"validation_{name}": value for name, value in losses.items()}
        similar = F.cosine_similarity(aligned[mask], target[mask], dim=-1)
        values["cosine_similarity"] = similar.mean()
        values |= {f"accept_{threshold:.2f}": (similar > threshold).float().mean()
                   for threshold in THRESHOLDS}
        if self.head is not None:
            said = heads.top_tokens(self.head, aligned[mask])
            values["token_acceptance"] = (said == ids[mask]).float().mean()
        return values

    def _keep(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        score = [-row["validation_total"]]
        if getattr(self.config, "select_by", "loss") == "token_acceptance":
            score = [row["token_acceptance"], *score]  # the loss decides between equals
        better = not self.best or score > self.best
        if better:
            self.best, self.best_epoch = score, row["epoch"]
        late = row["epoch"] - self.best_epoch >= self.config.patience
        self.finished = row["epoch"] >= self.config.epochs or late
        if self._lock is not None:
            if not self._lock.path.exists():
                raise StorageError(f"{self.folder} was deleted or moved while {self.level} was "
                                   "training in it; start the training again")
            if better:
                self.save("best", row)
            if self.finished:
                self.save("final", row)
            self._write()
        self.processes.wait()

    def _write(self) -> None:
        if len(self.history) == 1:
            tensor_files.write_signed(self.folder / folders.CONFIG, {
                **self.identity, **self.about, "objective": str(self.objective),
                "training": self.named})
            files.write_json(self.folder / "provenance.json", files.provenance(
                seed=self.seed, data_hash=self.identity["data"], device=str(self.device)))
        files.write_json(self.folder / folders.HISTORY, self.history)
        state = {"identity": self._identity(), **{name: getattr(self, name)
                                                  for name in folders.KEPT},
                 "adapter": self.weights(), "optimiser": self.optimiser.state_dict()}
        tensor_files.write_pt(self.folder / folders.CHECKPOINT, state)
        if self.finished:
            folders.write_checksums(self.folder)

    def _identity(self) -> str:
        return json.dumps(self.identity, sort_keys=True, default=str)

    @property
    def named(self) -> str:
        """What this training is called in its own files."""
        return folders.digest_of(self._identity())

    @contextlib.contextmanager
    def _only_writer(self) -> Iterator[None]:
        """One writer to the folder, which takes what killed ones left. A finished training is
        found also where another process writes, or nobody may."""
        refused = self._lock = None
        with contextlib.ExitStack() as stack:
            try:
                if self.processes.writes:
                    self._lock = stack.enter_context(files.FolderLock(self.folder))
                    for place in (self.folder, self.folder / "best", self.folder / "final"):
                        files.remove_leftovers(place)
            except StorageError as error:
                refused = error
            self._resume()
            if refused and not self.finished:
                raise refused
            if self._lock and self.finished and not (self.folder / folders.CHECKSUMS).exists():
                folders.write_checksums(self.folder)
            yield
        self._lock = None

    def _resume(self) -> None:
        stored = folders.read_checkpoint(self.folder, self.device)
        self.processes.wait()  # nobody writes before all have read
        if stored is None:
            return
        if different := folders.differences(stored["identity"], self.identity):
            raise OtherTraining(f"{self.folder} holds another training: {different}; choose "
                                "another folder or delete it", self.named)
        folders.check_best(self.folder / self.best_name, stored["best_epoch"])
        with reading(f"{self.folder / folders.CHECKPOINT} does not fit its training",
                     CheckpointError, folders.AGAIN):
            self.restore(stored["adapter"])
            self.optimiser.load_state_dict(stored["optimiser"])
        for name in folders.KEPT:
            setattr(self, name, stored[name])
