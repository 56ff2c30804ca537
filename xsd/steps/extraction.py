"""Step 01: paired hidden states of the training set and of every held-out set, into the run folder;
and reading them there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.core import ParameterError
from xsd.evaluate import floors, statistics
from xsd.extract import plan
from xsd.files import provenance, write_json
from xsd.runs import folder, parameters
from xsd.sensors import folder as dataset_folder
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets

if TYPE_CHECKING:
    from xsd.models import loading

PAIR_FILE = "shards/pair.json"
"""What later steps need of the pair without loading it: its name, every token's text, the prompts'
ids."""
Key = tuple[str, str]
"""A data set of a run: its split, and its name as it was given."""


def shard_folder(run_dir: str | os.PathLike[str], split: str, data: str, mode: str) -> Path:
    """Where the pairs of one data set and mode stand in a run."""
    return folder.resolve(run_dir) / "shards" / f"{split}_{datasets.name_of(data)}" / mode


# --- extracting


def run(given: parameters.ExtractParameters, *, progress: Any = None) -> dict[str, Any]:
    """Extract what is missing and write ``results/extract.json``; a finished run is found again.

    progress: as in extract.run.extract. Returns the results. Raises: ShardError when the run folder
    was begun with other settings or another pair, MetricError when a sequence is in training and in
    test, and as the rooms below.
    """
    from xsd.models import loading  # three seconds that only who extracts should wait for

    pair = loading.load_pair(given.pair, **given.loads)
    asked = requests(given)
    samples = {key: request.samples(pair) for key, request in asked.items()}
    check_apart(samples)
    modes = {"train": given.train_modes, "test": given.test_modes}
    counts = {(split, name): extract(
        given.run_dir, name, request, pair, samples[split, name], modes=modes[split],
        max_new_tokens=given.max_new_tokens, dtype=given.dtype, batch_size=given.batch_size,
        seed=given.seed, progress=progress) for (split, name), request in asked.items()}
    return save(given, pair, samples, counts)


def requests(given: parameters.ExtractParameters) -> dict[Key, datasets.Request]:
    """What is asked of the training set, if any, and of each held-out one. Simulated drives are
    made here, once."""
    sizes = {"train": given.n_train_sequences, "test": given.n_test_sequences}
    names = [("train", given.data)] if given.n_train_sequences else []
    found = {}
    for split, name in (*names, *(("test", name) for name in given.test_data)):
        root = datasets.prepare(given.run_dir, name, split, n_sequences=sizes[split],
                                seed=given.seed, workers=given.workers)
        found[split, name] = datasets.Request(
            datasets.here(root), split, datasets.here(given.pair), n_sequences=sizes[split],
            questions_per_sequence=given.questions_per_sequence, **given.loads)
    return found


def check_apart(samples: Mapping[Key, Sequence[plan.LazySample]]) -> None:
    """Refuse a sequence that is in training and held out. Raises: MetricError naming it."""
    sequences: dict[str, list[str]] = {"train": [], "test": []}
    for (split, _), some in samples.items():
        sequences[split] += [sample.sequence for sample in some]
    if sequences["train"]:
        statistics.check_disjoint(sequences["train"], sequences["test"])


def extract(run_dir: str | os.PathLike[str], data: str, request: datasets.Request,
            pair: loading.Pair, samples: Sequence[plan.LazySample], *, modes: Sequence[str],
            **options: Any) -> dict[str, Any]:
    """The pairs of one data set, named as given, into the run folder. options: of
    extract.run.extract.

    Returns what was extracted: sequences, clips, event_frames (stored and painted), pairs, tokens,
    gb, modes. Raises: ParameterError when it was interrupted, and as extract.run.extract.
    """
    from xsd.extract import run as extraction

    root, split = request.root(), request.split
    place = shard_folder(run_dir, split, data, modes[0]).parent
    config = {"split": split, "data": datasets.name_of(data),
              "data_hash": dataset_folder.data_hash(root)}
    request.save(place, first=True)
    report = extraction.extract(pair, samples, place, modes=modes, config=config, **options)
    if not report.finished:
        raise ParameterError(f"the extraction of {split} {data} was interrupted after {report.n} "
                             "samples; run it again to continue")
    request.save(place)
    clips = {(sample.sequence, sample.clip) for sample in samples}
    frames = datasets.event_frames_of(root, split, clips, pair.n_event_frames, pair.event_canvas)
    return {"sequences": len({sequence for sequence, _ in clips}), "clips": len(clips),
            "event_frames": frames, "pairs": report.n, "tokens": report.tokens, "gb": report.gb,
            "modes": list(modes), "data_hash": config["data_hash"]}


def save(given: parameters.ExtractParameters, pair: loading.Pair,
         samples: Mapping[Key, Sequence[plan.LazySample]],
         counts: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    """Write ``shards/pair.json`` and ``results/extract.json``. counts: of :func:`extract`. Returns
    the results, with how templated the answers are."""
    _save_pair_file(given, pair, {one.question for some in samples.values() for one in some})
    training: list[list[int]] | None = None
    tests, hashes = {}, {}
    results: dict[str, Any] = {"pair": pair.name, "modes": list(given.test_modes), "test": tests}
    for (split, name), counted in counts.items():
        found, short = dict(counted), datasets.name_of(name)
        hashes[f"{split}_{short}"] = found.pop("data_hash")
        stored = open_pairs(given.run_dir, split, name, found["modes"][0])
        own = [ids.tolist() for ids in stored.ids("verifier")]
        if split == "train":
            results["train"], training = found, own
            continue
        rate = floors.duplicate_rate(own, training)
        tests[short] = {**found, "duplicate_rate": rate.shared,
                        "answers_in_training": rate.in_training}
    data_hash = next(iter(hashes.values()))  # the training set's, where there is one
    results |= {
        "duplicate_rate": next(iter(tests.values()))["duplicate_rate"], "data_hash": data_hash,
        "data_hashes": hashes,
        "weights": {handle.role: handle.weights_hash() for handle in (pair.drafter, pair.verifier)},
        "provenance": provenance(seed=given.seed, data_hash=data_hash,
                                 parameters=given.model_dump())
    }
    folder.save_results(given.run_dir, "extract", results)
    return results


def _save_pair_file(given: parameters.ExtractParameters, pair: loading.Pair,
                    questions: set[str]) -> None:
    verifier = pair.verifier
    prompts = {question: [token for part in verifier.prompt_ids(question) for token in part]
               for question in questions}
    write_json(folder.resolve(given.run_dir) / PAIR_FILE, {
        "pair": given.pair, "eos": sorted(verifier.eos_token_ids), "prompt_ids": prompts,
        "token_texts": [verifier.token_text(token) for token in range(verifier.vocab_size)],
        "event_canvas": pair.event_canvas, "loads": given.loads,
        # as given: a dataset folder is found again by its path
        "data": given.data, "test_data": list(given.test_data)
    })


# --- reading


def pair_file(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """pair, eos, prompt_ids by question, token_texts by id. Raises: ParameterError when nothing was
    extracted here."""
    path = folder.resolve(run_dir) / PAIR_FILE
    if not path.is_file():
        raise ParameterError(
            f"the run {run_dir} holds no extraction; run notebook 01 with run_dir={run_dir} first")
    return json.loads(path.read_text(encoding="utf-8"))


def open_pairs(run_dir: str | os.PathLike[str], split: str, data: str, mode: str) -> ShardDataset:
    """The stored pairs. Raises: ParameterError naming what the run holds when it does not hold
    these; ShardError when they are damaged."""
    place = shard_folder(run_dir, split, data, mode)
    if not place.is_dir():
        held = sorted(f"{path.parent.name}/{path.name}"
                      for path in (folder.resolve(run_dir) / "shards").glob("*/*") if path.is_dir())
        raise ParameterError(
            f"the run {run_dir} holds no {mode} pairs of {split} {datasets.name_of(data)} (it "
            f"holds: {', '.join(held) or 'none'}); run notebook 01 with this data set and mode "
            "first")
    return ShardDataset(place, expected_mode=mode)  # type: ignore[arg-type]
