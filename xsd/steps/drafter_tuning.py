"""L6 as a step: LoRA of the drafter's decoder on a run's teacher-forced pairs, merged, and judged
on the run's held-out sets.

The drafter itself changes, so the pair is loaded and the prompts are made again from the run's
clips. Where the two widths differ (the embedded pair), a frozen ridge map stands between them; the
same map in front of the drafter as it came is the comparison. Writes ``<run_dir>/adapters/L6``:
best/ (LoRA), drafter/ (the merged drafter, an ordinary one), map/ (the ridge map).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xsd.adapters import linear, registry
from xsd.adapters.base import Adapter
from xsd.core import Batch, PairedStates, ParameterError
from xsd.evaluate import statistics, table
from xsd.extract import plan
from xsd.models import loading
from xsd.runs import parameters
from xsd.sensors import folder as dataset_folder
from xsd.shards import store
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets
from xsd.steps import extraction
from xsd.train import guards, lora, lora_fit, source

LEVEL = "L6"
CACHED_PROMPTS = 256
GAMMA = 5

Prompts = Callable[[PairedStates], Tensor]


def prompts(run_dir: str, data: str, split: str, pair: loading.Pair,
            dataset: ShardDataset) -> Prompts:
    """Stored pair → its whole prompt's embeddings [L, D_d] in the drafter, vision included; the
    last few are kept.

    Raises: ParameterError when a pair's clip is not in the data set any more.
    """
    table = dataset.table()
    questions = sorted(set(table["question"]))
    records = dataset_folder.open_folder(datasets.root_of(run_dir, data, split), split)
    grid = plan.folder_samples(records, questions, n_event_frames=pair.n_event_frames,
                               unstored=pair.event_canvas)
    found = {(sample.sequence, sample.clip, sample.question): sample for sample in grid}

    @lru_cache(maxsize=CACHED_PROMPTS)
    def embedded(key: tuple[str, str, str]) -> Tensor:
        if key not in found:
            raise ParameterError(
                f"clip {key[0]}/{key[1]} of the stored pairs is not in data set {data!r}; extract "
                "again with notebook 01"
            )
        return pair.drafter.prompt_embeddings(found[key].load())

    return lambda one: embedded((one.sequence, one.clip, one.question))


def run(given: parameters.TrainParameters, dataset: ShardDataset, head: Tensor, folder: Path,
        held_out: guards.Marks, *, progress: Callable[[dict[str, Any]], None] | None = None,
        ) -> dict[str, Any]:  # fmt: skip
    """Train (or find) L6 and return its line of ``results/train.json``, with token acceptance on
    each held-out set before and after.

    dataset: teacher-forced pairs of the train split. Raises: TrainingError as lora_fit.fit_lora.
    """
    about = extraction.pair_file(given.run_dir)
    pair = loading.load_pair(about["pair"])
    through = _map_between(dataset, given.seed)
    config = lora.LoraFitConfig(epochs=given.epochs, batch_size=4,
                                accumulation=max(1, given.batch_size // 4),
                                learning_rate=given.lora_learning_rate, objective=given.objective
                                or "tokens",
                                )  # fmt: skip
    result = lora_fit.fit_lora(pair.drafter.model, dataset,
                               prompts(given.run_dir, given.data, "train", pair, dataset),
                               folder=folder, head=head, config=config, adapter=through,
                               held_out=held_out, seed=given.seed, merge=True, progress=progress,
                               )  # fmt: skip
    loading.save_checkpoint(folder / "drafter", pair.drafter.model, pair.drafter.tokenizer,
                            pair.drafter.pixels)
    registry.save_adapter(through, folder / "map")
    best = result.history[result.best_epoch - 1]
    return {
        "reads": "drafter", "parameters": result.parameters, "seconds": result.seconds,
        "epochs": len(result.history), "best_epoch": result.best_epoch,
        "validation_loss": best["validation_total"],
        "validation_token_acceptance": best["token_acceptance"],
        "validation_cosine": best["cosine_similarity"], "held_out": {
            datasets.name_of(name): judge(given, name, pair, through, head)
            for name in about.get("test_data", [])
        },
    }


def _map_between(dataset: ShardDataset, seed: int) -> Adapter:
    """The ridge map from the drafter's states to the verifier's, of the sequences that L6 trains
    on."""
    states = source.open_states(dataset)
    train, _ = source.split_by_sequence(states.sequence, lora.LoraFitConfig.validation_share, seed)
    return linear.fit_linear("ridge", states.batches(train, 64))


def judge(given: parameters.TrainParameters, data: str, pair: loading.Pair, through: Adapter,
          head: Tensor) -> dict[str, Any]:
    """Token acceptance and accepted drafts a verification on a held-out set, with the drafter as
    extracted (before) and as it is (after).

    The difference is paired, start by start, its interval drawn by sequence.
    """
    dataset = extraction.open_pairs(given.run_dir, "test", data, "teacher_forced")
    prompt = prompts(given.run_dir, data, "test", pair, dataset)
    clusters = datasets.clusters(dataset.table()["sequence"].tolist(),
                                 dataset.table()["clip"].tolist())
    samples = {"before": iter(dataset), "after": _forced_again(dataset, prompt, pair)}
    found = {
        arm: table.of_batches({"L6": through}, _batches(some, clusters), head, gamma=GAMMA)
        for arm, some in samples.items()
    }
    line: dict[str, Any] = {}
    for arm, tokens in found.items():
        each = table.counts(tokens, GAMMA)
        line[arm] = {
            "token_acceptance": float(tokens["one_step_match"].mean()),
            "mean_accepted": float(each["accepted"].sum() / each["rounds"].sum()),
        }
    before, after = (table.starts(found[arm], GAMMA) for arm in ("before", "after"))
    if len(before):
        gain = statistics.bootstrap_difference(after["accepted"], before["accepted"],
                                               before["sequence"], n_resamples=400,
                                               seed=given.seed)
        line["gain_per_start"] = dataclasses.asdict(gain)
    return line


@torch.no_grad()
def _forced_again(dataset: ShardDataset, prompt: Prompts,
                  pair: loading.Pair) -> Iterator[PairedStates]:
    for sample in dataset:
        states = lora.forced_states(pair.drafter.model, [prompt(sample)],
                                    [sample.ids_by_verifier])[0]
        yield dataclasses.replace(sample, hidden_by_drafter=states.float())


def _batches(samples: Iterator[PairedStates], clusters: Sequence[str],
             size: int = 32) -> Iterator[Batch]:
    waiting: list[PairedStates] = []
    for index, sample in enumerate(samples):
        waiting.append(dataclasses.replace(sample, sequence=clusters[index]))
        if len(waiting) == size or index + 1 == len(clusters):
            yield store.collate(waiting, range(index + 1 - len(waiting), index + 1))
            waiting = []
