"""One trainer for L1–L5, L5F, B1 and levels of one's own: the reference's recipe, and the one that
optimises tokens (docs/adapters.md, section 5).

A run folder holds best.safetensors and final.safetensors (with their .json), config.json,
history.json, provenance.json and checkpoint.pt. The same call on the same folder continues an
interrupted run to the same weights, bit for bit, and returns a finished one at once. Under
``accelerate launch`` or ``torchrun`` the same call trains on several processes
(:mod:`xsd.train.processes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xsd import files
from xsd.adapters import heads, registry
from xsd.adapters.base import Aligned
from xsd.core import Batch, ParameterError, TrainingError
from xsd.train import guards, parts, source, start
from xsd.train.epochs import EpochLoop, FitResult, Progress
from xsd.train.recipes import FitConfig


def fit_adapter(
    level: Any, dataset: Any, *, folder: str | Path, config: FitConfig | None = None,
    profile: str = "reference", head: heads.Head | None = None, seed: int = 0,
    validation: Any = None, held_out: Sequence[Any] | guards.Marks = (),
    device: str | torch.device = "cpu", progress: Progress = None,
) -> FitResult:
    """Train one adapter of a level on paired states.

    Args:
        level: of ours by name, or your own: "module:Class", a class, or an object, of which a copy
        is trained from its present weights (registry.create_adapter; it is checked first).
        dataset: a ShardDataset, a sequence of PairedStates, a list of Batch, or what
        source.open_states made of one (pack once, train many).
        folder: the run folder, created; an unfinished run of the same configuration, seed and data
        in it is continued.
        config: how; ``profile`` is short for FitConfig(profile). head: the verifier's LM head,
        weight [V, D_v] or callable; needed by token terms, and for token acceptance in the history.
        validation: another dataset of *train* sequences; by default whole sequences of ``dataset``
        are held back.
        held_out: the sets that adapters are judged on later (ShardDatasets, or guards.marks_of
        them): nothing of them may be in ``dataset`` or ``validation``, under whatever name.
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
            "head; pass head= (a weight [V, D])")
    training = Training(level, dataset, folder, config, head=head, seed=seed,
                        validation=validation, held_out=held_out, device=device)
    devices = [] if training.device.type == "cpu" else [training.device]
    try:
        with torch.random.fork_rng(devices=devices):
            training.prepare()
            return training.run(progress)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory while training {training.level}: lower batch_size (now "
            f"{config.batch_size}) and raise accumulation (now {config.accumulation})") from error


class Training(EpochLoop):
    """One training: its data, adapter, optimiser and folder. :func:`fit_adapter` is the way to run
    one; the parts are for measuring."""

    def __init__(self, level: Any, dataset: Any, folder: str | Path, config: FitConfig, *,
                 head: heads.Head | None = None, seed: int = 0, validation: Any = None,
                 held_out: Sequence[Any] | guards.Marks = (),
                 device: str | torch.device = "cpu") -> None:
        super().__init__(files.name_of(level), folder, config, seed, torch.device(device))
        self.spec = level
        self.states = self.validation_states = source.open_states(dataset)
        guards.refuse_held_out(self.states, held_out)
        if validation is None:
            train, held = source.split_by_sequence(self.states.sequence, config.validation_share,
                                                   seed)
        else:
            self.validation_states = source.open_states(validation)
            guards.refuse_held_out(self.validation_states, held_out)
            shared = set(self.states.sequence) & set(self.validation_states.sequence)
            if shared:
                raise TrainingError(
                    f"sequence {min(shared)} is in both training and validation data; keep whole "
                    "sequences apart")
            train, held = torch.arange(len(self.states)), torch.arange(len(self.validation_states))
        self.train_indices, self.validation_indices = train, held
        self.head, self.full_head = start.choose_heads(self.level, config, self.objective,
                                                       self.states, self.train_indices, head,
                                                       self.device)
        self.identity["data"] = self.states.fingerprint()
        if isinstance(level, torch.nn.Module):  # another beginning is another training
            self.identity["start"] = source.digest(level.state_dict().values())

    def prepare(self) -> None:
        """The adapter and its optimiser, from the seed (draws from torch's global generator)."""
        torch.manual_seed(self.seed)
        new = start.new_adapter(self.spec, self.config, self.states, self.train_indices, self.head,
                                self.full_head)
        self.adapter = new.to(self.device)
        self.about = {"adapter": self.adapter.config()}
        self.parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=self.config.learning_rate,
                                           weight_decay=self.config.weight_decay, fused=True)

    def _batches(self, states: source.States, indices: Tensor,
                 shuffle_seed: int | None = None) -> Iterator[Batch]:
        """This process's share of every batch, on its device; the next one is fetched meanwhile
        where fetching takes long."""
        found = states.batches(indices, self.config.batch_size, shuffle_seed=shuffle_seed)
        if self.device.type != "cpu" and isinstance(states, source.PackedStates):
            found = source.ahead(found)  # streamed ones are read ahead already
        return (source.to_device(self.processes.rows(batch), self.device) for batch in found)

    def train_pass(self, epoch: int) -> dict[str, float]:
        """As EpochLoop.train_pass; each step is the mean over all its positions, however
        accumulation and processes cut it."""
        self.adapter.train()
        pieces = parts.plan(self.adapter, self.config)
        sums: dict[str, Any] = dict.fromkeys(("total", *self.objective.weights), 0.0)
        count = 0.0
        batches = self._batches(self.states, self.train_indices, self.seed * 7919 + epoch)
        groups = iter(lambda: list(itertools.islice(batches, self.config.accumulation)), [])
        for number, group in enumerate(groups, start=1):
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
                                      (norms / scale).tolist(), norms.tolist())
                losses["total"].backward()
                total += losses.pop("total").detach()
                for name, value in losses.items():
                    sums[name] = sums[name] + value.detach() * norms[0]
            step = self.step(total, epoch, number)
            sums["total"] = sums["total"] + step * whole[0] / self.processes.size
            count += float(whole[0])
        if count == 0:
            raise TrainingError(
                f"no answer is long enough to train {self.level}, which predicts the next state; "
                "extract longer answers")
        return {f"train_{name}": value / count for name, value in self.processes.sums(sums).items()}

    def predictions(self) -> Iterator[Aligned]:
        """As EpochLoop.predictions."""
        self.adapter.eval()
        for batch in self._batches(self.validation_states, self.validation_indices):
            if len(batch.mask):  # else another process has all of it
                yield self.adapter.align(batch)

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the adapter."""
        return self.adapter.state_dict()

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Take them back."""
        self.adapter.load_state_dict(weights)

    def save(self, name: str, row: dict[str, Any]) -> None:
        """Write ``<name>.safetensors`` with where it comes from."""
        registry.save_adapter(self.adapter, self.folder / f"{name}.safetensors",
                              epoch=row["epoch"], seed=self.seed, data=self.identity["data"],
                              profile=self.config.profile)
