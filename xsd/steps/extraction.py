"""Step 01: paired hidden states of the training set and of every held-out set, into the run
folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from xsd.core import ParameterError
from xsd.evaluate import floors
from xsd.extract import monitor
from xsd.files import provenance, write_json
from xsd.runs import folder, parameters
from xsd.sensors import folder as dataset_folder
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets
from xsd.steps import extract_request

if TYPE_CHECKING:
    from xsd.models import loading

PAIR_FILE = "shards/pair.json"
"""What later steps need of the pair without loading it: its name, every token's text, the prompts'
ids."""


def shard_folder(run_dir: str | os.PathLike[str], split: str, data: str, mode: str) -> Path:
    """Where the pairs of one data set and mode stand in a run."""
    return folder.resolve(run_dir) / "shards" / f"{split}_{datasets.name_of(data)}" / mode


def run(given: parameters.ExtractParameters, *, progress: Any = None) -> dict[str, Any]:
    """Extract what is missing and write ``results/extract.json``; a finished run is found again.

    progress: as in extract.run.extract. Returns the results. Raises: ShardError when the run folder
    was begun with other settings or
    another pair, MetricError when a sequence is in training and in test, and as the rooms below.
    """
    # Only who extracts waits for the models' libraries, three seconds in each of the notebooks that
    # read what is extracted.
    from xsd.extract import run as extraction
    from xsd.models import loading

    pair = loading.load_pair(given.pair)
    plans = {}
    if given.n_train_sequences:
        plans["train", given.data] = (given.n_train_sequences, given.train_modes)
    plans |= {("test", name): (given.n_test_sequences, given.test_modes) for name in given.test_data}
    roots = {(split, name): datasets.prepare(given.run_dir, name, split, n_sequences=n,
                                             seed=given.seed, workers=given.workers)
             for (split, name), (n, _) in plans.items()}
    samples = {(split, name): datasets.samples(roots[split, name], split,
                                               questions_per_sequence=given.questions_per_sequence,
                                               n_sequences=n, n_event_frames=pair.n_event_frames,
                                               canvas=pair.event_canvas,
                                               ) for (split, name), (n, _) in plans.items()}
    train_sequences = [
        sample.sequence for (split, _), some in samples.items() if split == "train"
        for sample in some
    ]
    for (split, _), some in samples.items():
        if split == "test" and train_sequences:
            datasets.guard(train_sequences, [sample.sequence for sample in some])
    hashes = {key: dataset_folder.data_hash(root) for key, root in roots.items()}
    counts = {}
    for (split, name), (n, modes) in plans.items():
        place = shard_folder(given.run_dir, split, name, modes[0]).parent
        request = extract_request.Request(
            data=extract_request.here(roots[split, name]), split=split, n_sequences=n,
            questions_per_sequence=given.questions_per_sequence,
            pair=given.pair if given.pair == "embedded" else extract_request.here(given.pair),
        )  # fmt: skip
        request.save(place, first=True)
        report = extraction.extract(
            pair, samples[split, name], place, modes=modes, max_new_tokens=given.max_new_tokens,
            dtype=given.dtype, batch_size=given.batch_size, seed=given.seed, config={
                "split": split, "data": datasets.name_of(name), "data_hash": hashes[split, name]
            }, progress=progress,
        )
        if not report.finished:
            raise ParameterError(
                f"the extraction of {split} {name} was interrupted after {report.n} samples; run "
                "it again to continue"
            )
        request.save(place)
        clips = {(sample.sequence, sample.clip) for sample in samples[split, name]}
        counts[split, name] = {
            "sequences": len({sample.sequence
                              for sample in samples[split, name]}), "clips": len(clips),
            "event_frames": datasets.event_frames_of(roots[split, name], split, clips,
                                                     pair.n_event_frames, pair.event_canvas),
            "pairs": report.n, "tokens": report.tokens, "gb": report.gb, "modes": list(modes),
        }
    _save_pair_file(given, pair, {sample.question for some in samples.values() for sample in some})
    return _save_results(given, pair, counts, hashes)


def _save_pair_file(given: parameters.ExtractParameters, pair: loading.Pair,
                    questions: set[str]) -> None:
    verifier = pair.verifier
    prompts = {
        question: [token for part in verifier.prompt_ids(question) for token in part]
        for question in sorted(questions)
    }
    texts = [verifier.token_text(token) for token in range(verifier.vocab_size)]
    about = {
        "pair": given.pair, "eos": sorted(verifier.eos_token_ids), "prompt_ids": prompts,
        "token_texts": texts
    }
    about |= {"event_canvas": pair.event_canvas}
    about |= {"data": given.data, "test_data": list(given.test_data)
              }  # as given: a dataset folder is found again by its path
    write_json(folder.resolve(given.run_dir) / PAIR_FILE, about)


def pair_file(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """pair, eos, prompt_ids by question, token_texts by id. Raises: ParameterError when nothing was
    extracted here."""
    path = folder.resolve(run_dir) / PAIR_FILE
    if not path.is_file():
        raise ParameterError(
            f"the run {run_dir} holds no extraction; run notebook 01 with run_dir={run_dir} first")
    return json.loads(path.read_text(encoding="utf-8"))


def _save_results(given: parameters.ExtractParameters, pair: loading.Pair,
                  counts: Mapping[tuple[str, str], dict], hashes: Mapping[tuple[str, str],
                                                                          str]) -> dict[str, Any]:
    results: dict[str, Any] = {"pair": pair.name, "modes": list(given.test_modes), "test": {}}
    training: list[list[int]] = []
    if given.n_train_sequences:
        training = answers(open_pairs(given.run_dir, "train", given.data, given.train_modes[0]))
        results["train"] = counts["train", given.data]
    for (split, name), found in counts.items():
        if split == "test":
            own = answers(open_pairs(given.run_dir, split, name, given.test_modes[0]))
            rate = floors.duplicate_rate(own, training or None)
            results["test"][datasets.name_of(name)] = {
                **found, "duplicate_rate": rate.shared, "answers_in_training": rate.in_training
            }
    results["duplicate_rate"] = next(iter(results["test"].values()))["duplicate_rate"]
    results["data_hash"] = hashes.get(("train", given.data)) or next(iter(hashes.values()))
    results["data_hashes"] = {
        f"{split}_{datasets.name_of(name)}": value for (split, name), value in hashes.items()
    }
    results["weights"] = {
        "drafter": pair.drafter.weights_hash(), "verifier": pair.verifier.weights_hash()
    }
    results["provenance"] = provenance(seed=given.seed, data_hash=results["data_hash"],
                                       parameters=given.model_dump())
    folder.save_results(given.run_dir, "extract", results)
    return results


def answers(dataset: ShardDataset) -> list[list[int]]:
    """The verifier's token ids of every sample, as lists; no state is read."""
    return [ids.tolist() for ids in dataset.ids("verifier")]


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """What was extracted, a data set a row: data, sequences, clips, pairs, tokens, duplicate
    answers."""
    rows = [{"data": "training", **results["train"]}] if "train" in results else []
    rows += [{"data": f"held out: {name}", **found} for name, found in results["test"].items()]
    names = ["data", "sequences", "clips", "pairs", "tokens", "modes", "duplicate_rate"]
    return pd.DataFrame(rows).reindex(columns=names)


def progress(run_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Where every extraction of a run stands, from its files alone (also while another process
    writes, or after it died).

    Columns: pairs (data set and mode), state, done, total, rate (samples/s), left (time), gb, last
    write.
    """
    rows = []
    for one in monitor.status(folder.resolve(run_dir)):
        left = monitor.duration(
            one.eta_s) if one.state == "running" and one.eta_s is not None else ""
        name = f"{one.folder.parent.name}/{one.folder.name}"
        rows.append((name, one.state, one.done, one.total, one.rate, left, one.gb,
                     f"{monitor.duration(one.idle_s)} ago"))
    return pd.DataFrame(
        rows, columns=["pairs", "state", "done", "total", "rate", "left", "gb", "last write"])


def errors(run_dir: str | os.PathLike[str]) -> list[str]:
    """What went wrong in these extractions, oldest first: errors of processes, and restarts after
    crashes."""
    return [str(event) for event in monitor.events(folder.resolve(run_dir))]


def examples(run_dir: str | os.PathLike[str], data: str, n: int = 5,
             mode: str = "free_running") -> pd.DataFrame:
    """A few held-out answers of both models: question, what the drafter said, what the verifier
    said."""
    stored = open_pairs(run_dir, "test", data, mode).table()
    step = max(1, len(stored) // n)
    chosen = stored.iloc[::step].head(n)
    return pd.DataFrame({
        "clip": chosen["sequence"] + "/" + chosen["clip"], "question": chosen["question"],
        "the drafter (events)": chosen["text_by_drafter"],
        "the verifier (video)": chosen["text_by_verifier"],
    }).reset_index(drop=True)


def open_pairs(run_dir: str | os.PathLike[str], split: str, data: str, mode: str) -> ShardDataset:
    """The stored pairs. Raises: ParameterError naming what the run holds when it does not hold
    these; ShardError when they are damaged."""
    place = shard_folder(run_dir, split, data, mode)
    if not place.is_dir():
        held = sorted(f"{path.parent.name}/{path.name}"
                      for path in (folder.resolve(run_dir) / "shards").glob("*/*") if path.is_dir())
        raise ParameterError(
            f"the run {run_dir} holds no {mode} pairs of {split} {datasets.name_of(data)} (it "
            f"holds: {', '.join(held) or 'none'}); run "
            "notebook 01 with this data set and mode first")
    return ShardDataset(place, expected_mode=mode)  # type: ignore[arg-type]


def ensure(run_dir: str, seed: int, *, data: str = datasets.SIMULATED,
           test_data: Sequence[str] = (), progress: Any = None) -> None:
    """Extract with the smoke parameters when the run holds nothing at all, so that each notebook
    runs alone."""
    if not (folder.resolve(run_dir) / PAIR_FILE).is_file():
        values = {
            "run_dir": run_dir, "seed": seed, "data": data,
            **({"test_data": list(test_data)} if test_data else {})
        }
        run(parameters.ExtractParameters.checked(values), progress=progress)
