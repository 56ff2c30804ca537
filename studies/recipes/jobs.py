"""One job of the study: train or solve, judge on the held-out answers, leave the record.

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

from studies.parameters import StudyParameters
from studies.recipes import grid, measure
from studies.recipes.grid import CLOSED_FORM, FLOORS, Job
from xsd.adapters import linear, registry
from xsd.evaluate import held_out
from xsd.evaluate.held_out import HeldOut
from xsd.files import write_json
from xsd.runs import folder
from xsd.shards.store import ShardDataset
from xsd.steps import extraction
from xsd.train import fit, guards, source
from xsd.train.recipes import FitConfig

MODE = "teacher_forced"
"""Decoding asks what follows the verifier's own prefix, so these pairs train and judge."""


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """What every job reads. states: of the train split, packed once. marks: what may not be among
    them. hashes: of both sets."""

    states: source.States
    train: ShardDataset
    test: HeldOut
    marks: guards.Marks
    hashes: dict[str, str]

    def part(self, share: float) -> source.States:
        """The states of the first ``share`` of the drives."""
        if share == 1:
            return self.states
        names = grid.sequences_of(self.states.sequence, share)
        return source.open_states(self.train.subset(sequences=names))


@functools.lru_cache(maxsize=1)
def opened(run_dir: str, data: str, test_data: str) -> Data:
    """The pairs of a run, kept for the next job of this process. Raises: ParameterError naming what
    the run holds when it does not hold these; ShardError when they are damaged."""
    train, test = (extraction.open_pairs(run_dir, split, name, MODE)
                   for split, name in (("train", data), ("test", test_data)))
    states = source.open_states(train)
    hashes = {"train": states.fingerprint(), "test": str(test.manifest["digest"])}
    return Data(states, train, held_out.of(test_data, test), guards.marks_of([test]), hashes)


def work(job: Job, P: StudyParameters) -> dict[str, Any]:
    """The record of a job: found, or trained and judged now.

    Returns: identity, reads, parameters, pairs, seconds (of training, with what the start cost),
    steps (of the optimiser), epochs, best_epoch and counts (columns of ``measure.measure``).
    Raises: TrainingError when its folder holds another training.
    """
    data = opened(P.run_dir, P.data, P.test_data)
    solved = job.recipe == CLOSED_FORM
    config = None if solved else grid.config_of(job.recipe, job.level, max_epochs=P.max_epochs,
                                                share=job.share)
    identity = {
        "data": data.hashes, "gamma": P.gamma, "threshold": P.threshold,
        "config": None if config is None else dataclasses.asdict(config),
    }
    place = folder.resolve(P.run_dir) / "study" / job.place
    stored = place / "results.json"
    if stored.is_file():
        record = json.loads(stored.read_text(encoding="utf-8"))
        if record["identity"] == json.loads(json.dumps(identity)):
            return record
    adapter, cost = _solve(job, data) if config is None else _train(job, data, config, place)
    counts = measure.measure(adapter, data.test, gamma=P.gamma, threshold=P.threshold,
                             batch_size=P.batch_size)
    record = {
        "identity": identity, "reads": adapter.reads,
        "parameters": registry.count_parameters(adapter), **cost, "counts": counts.to_dict("list"),
    }
    write_json(stored, record)
    # finished: best.safetensors and history.json stay
    (place / "checkpoint.pt").unlink(missing_ok=True)
    return record


def _solve(job: Job, data: Data) -> tuple[Any, dict[str, Any]]:
    kind, reads = FLOORS[job.level]
    states = data.part(job.share)
    began = time.perf_counter()
    adapter = linear.fit_linear(kind, states.batches(torch.arange(len(states)), 64), reads=reads)
    return adapter, {"seconds": time.perf_counter() - began, "steps": 0, "epochs": 0,
                     "best_epoch": 0, "pairs": len(states)}


def _train(job: Job, data: Data, config: FitConfig, place: Path) -> tuple[Any, dict[str, Any]]:
    states = data.part(job.share)
    began = time.perf_counter()
    result = fit.fit_adapter(job.level, states, folder=place, config=config, head=data.test.head,
                             held_out=data.marks, seed=job.seed)
    seconds = max(result.seconds, time.perf_counter() - began)
    used, _ = source.split_by_sequence(states.sequence, config.validation_share, job.seed)
    batches = math.ceil(len(used) / config.batch_size)
    epochs = len(result.history)
    return registry.load_any_adapter(result.best_path, level=job.level), {
        "seconds": seconds, "steps": epochs * math.ceil(batches / config.accumulation),
        "epochs": epochs, "best_epoch": result.best_epoch, "pairs": len(states),
    }
