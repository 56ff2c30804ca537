"""One job of the study: train or solve, judge on the held-out answers, leave the record. Light to
import, for the worker processes.

A job's folder holds best.safetensors, config.json, history.json, provenance.json (a training's) and
results.json: what it cost and the counts of every held-out answer. A record of other data, another
configuration or another γ is not taken for this one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from studies.recipes import grid as study_recipes
from studies.recipes import measure as study_measure
from studies.recipes.grid import CLOSED_FORM, FLOORS, Job
from xsd.adapters import linear, registry
from xsd.files import write_json
from xsd.shards.store import ShardDataset
from xsd.train import fit, guards, source
from xsd.train.recipes import FitConfig

MODE = "teacher_forced"
"""Decoding asks what follows the verifier's own prefix, so these pairs train and judge."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all jobs of a study share. folder: ``<run_dir>/study``. train, test: shard folders.
    batch_size: held-out answers at a time."""

    folder: Path
    train: Path
    test: Path
    max_epochs: int
    gamma: int
    threshold: float
    batch_size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """What every training reads. states: of the train split, packed once. held_out: what may not be
    among them. hashes: of both sets."""

    states: source.States
    train: ShardDataset
    test: ShardDataset
    head: torch.Tensor
    held_out: guards.Marks
    hashes: dict[str, str]

    def part(self, share: float) -> source.States:
        """The states of the first ``share`` of the drives."""
        if share == 1:
            return self.states
        return source.open_states(
            self.train.subset(sequences=study_recipes.sequences_of(self.states.sequence, share)))


@functools.lru_cache(maxsize=1)
def opened(train: Path, test: Path) -> Data:
    """The pairs behind two shard folders, kept for the next job of this process. Raises: ShardError
    when they are damaged."""
    training, judging = ShardDataset(train,
                                     expected_mode=MODE), ShardDataset(test, expected_mode=MODE)
    states = source.open_states(training)
    hashes = {"train": states.fingerprint(), "test": str(judging.manifest["digest"])}
    return Data(states, training, judging, training.head("verifier"), guards.marks_of([judging]),
                hashes)


def work(job: Job, setting: Setting) -> dict[str, Any]:
    """The record of a job: found, or trained and judged now.

    Returns: identity, reads, parameters, pairs, seconds (of training, with what the start cost),
    steps (of the optimiser), epochs,
    best_epoch and counts (columns of ``study_measure.measure``). Raises: TrainingError when its
    folder holds another training.
    """
    data = opened(setting.train, setting.test)
    solved = job.recipe == CLOSED_FORM
    config = None if solved else study_recipes.config_of(
        job.recipe, job.level, max_epochs=setting.max_epochs, share=job.share)
    identity: dict[str, Any] = {
        "data": data.hashes, "gamma": setting.gamma, "threshold": setting.threshold
    }
    identity["config"] = None if config is None else dataclasses.asdict(config)
    place = setting.folder / job.place
    stored = place / "results.json"
    if stored.is_file():
        record = json.loads(stored.read_text(encoding="utf-8"))
        if record["identity"] == json.loads(json.dumps(identity)):
            return record
    adapter, cost = _solve(job, data) if config is None else _train(job, data, config, place)
    batches = data.test.batches(setting.batch_size)
    counts = study_measure.measure(adapter, batches, data.head, gamma=setting.gamma,
                                   threshold=setting.threshold)
    about = {
        "identity": identity, "reads": adapter.reads,
        "parameters": registry.count_parameters(adapter)
    }
    record = {**about, **cost, "counts": study_measure.to_columns(counts)}
    write_json(stored, record)
    (place / "checkpoint.pt").unlink(
        missing_ok=True)  # finished: best.safetensors and history.json stay
    return record


def _solve(job: Job, data: Data) -> tuple[Any, dict[str, Any]]:
    kind, reads = FLOORS[job.level]
    states = data.part(job.share)
    began = time.perf_counter()
    adapter = linear.fit_linear(kind, states.batches(torch.arange(len(states)), 64),
                                reads=reads)  # type: ignore[arg-type]
    return adapter, {
        "seconds": time.perf_counter() - began, "steps": 0, "epochs": 0, "best_epoch": 0,
        "pairs": len(states)
    }


def _train(job: Job, data: Data, config: FitConfig, place: Path) -> tuple[Any, dict[str, Any]]:
    states = data.part(job.share)
    began = time.perf_counter()
    result = fit.fit_adapter(job.level, states, folder=place, config=config, head=data.head,
                             held_out=data.held_out, seed=job.seed)
    used = len(source.split_by_sequence(states.sequence, config.validation_share, job.seed)[0])
    steps = len(result.history) * math.ceil(
        math.ceil(used / config.batch_size) / config.accumulation)
    cost = {
        "epochs": len(result.history), "best_epoch": result.best_epoch, "pairs": len(states),
        "steps": steps
    }
    return registry.load_any_adapter(
        result.best_path), {**cost, "seconds": max(result.seconds,
                                                   time.perf_counter() - began)}
