"""Step 10: what the bytes of a stored state buy. The same pairs in every dtype, an adapter trained
on each, its acceptance held out.

The states are extracted once, in float32, and rewritten in the other dtypes, so that nothing
differs but the rounding. An adapter is judged
twice: on exact held-out states, as it meets them while decoding, and on held-out states stored like
its training ones, as a run that has
nothing else would measure it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from studies import parameters
from xsd.adapters import registry
from xsd.adapters.base import Adapter
from xsd.core import ParameterError
from xsd.evaluate import statistics
from xsd.evaluate.counterfactual import Counts
from xsd.extract import run as extract_run
from xsd.files import provenance
from xsd.models import loading
from xsd.runs import folder
from xsd.sensors import folder as dataset_folder
from xsd.shards import format as layout
from xsd.shards.store import ShardDataset
from xsd.shards.writer import ShardWriter
from xsd.steps import data as datasets
from xsd.steps import drafts, evaluation, extraction
from xsd.train import fit, source
from xsd.train.recipes import FitConfig

MODE = "teacher_forced"
EXACT = "fp32"
FULL_SIZE = 4096
"""Width of the 7B pair's states, for the bytes beside the embedded pair's."""


def storage_folder(run_dir: str | os.PathLike[str], dtype: str, split: str) -> Path:
    """Where the pairs of one split stand in one dtype."""
    return folder.resolve(run_dir) / "storage" / dtype / split


def bytes_per_token(dtype: layout.StoredDtype, drafter_size: int, verifier_size: int) -> int:
    """Of a shard: both models' states, their scales for int8, and both ids (docs/shards.md,
    "Format")."""
    scale = 4 if dtype == "int8" else 0
    return sum(width * layout.TORCH_DTYPES[dtype].itemsize + scale + 8
               for width in (drafter_size, verifier_size))


@dataclass(frozen=True)
class Study:
    """What step 10 found. results: as written to ``results/storage.json``."""

    results: dict[str, Any]

    def frame(self, figure: str = "token_acceptance") -> pd.DataFrame:
        """A row a level and dtype: bytes a token, the figure with its interval, its paired
        difference to fp32, the same as self-measured.

        figure: token_acceptance or accepted_per_round (draft tokens a round, self-rollout).
        """
        rows = []
        for level, found in self.results["levels"].items():
            for dtype, one in found.items():
                line: dict[str, Any] = {
                    "level": level, "dtype": dtype,
                    "bytes_per_token": self.results["bytes_per_token"][dtype]
                }
                for name, key in (("value", figure), ("difference", f"{figure}_difference"),
                                  ("self_measured", f"{figure}_self_measured")):
                    line |= {
                        name: one[key]["value"], f"{name} low": one[key]["low"],
                        f"{name} high": one[key]["high"]
                    }
                rows.append(line)
        return pd.DataFrame(rows)

    def sizes(self) -> pd.DataFrame:
        """A row a dtype: bytes a token here and at the full width, their share of float32, largest
        rounding error of a state."""
        rows = []
        for dtype, size in self.results["bytes_per_token"].items():
            full = bytes_per_token(dtype, FULL_SIZE, FULL_SIZE)  # type: ignore[arg-type]
            rows.append({
                "dtype": dtype, "bytes a token": size, "bytes at 4096": full,
                "share of fp32 at 4096": round(full / bytes_per_token("fp32", FULL_SIZE, FULL_SIZE),
                                               4), "error of a state": self.results["rounding"]
                                                                       [dtype],
            })
        return pd.DataFrame(rows)


def run(given: parameters.StorageParameters, *,
        progress: Callable[[str], None] | None = None) -> Study:
    """Extract, rewrite, train and judge what is missing, and write ``results/storage.json``.

    progress: called with a line before each training. Raises: ParameterError when fp32 is not among
    the dtypes, MetricError when a sequence
    is in training and in test, and as the rooms below.
    """
    if EXACT not in given.dtypes:
        raise ParameterError(
            f"dtypes={given.dtypes} holds no {EXACT!r}, which the others are compared with; add it")
    extraction.ensure(given.run_dir, given.seed, data=given.data)
    exact = _extracted(given)
    stored = {
        dtype: {
            split: recode(exact[split], storage_folder(given.run_dir, dtype, split), dtype)
            for split in exact
        } for dtype in given.dtypes
    }  # fmt: skip
    head = exact["test"].head("verifier")
    judged = {dtype: _held_out(dtype, sets["test"], head) for dtype, sets in stored.items()}
    clusters = judged[EXACT].clusters
    levels: dict[str, dict[str, Any]] = {}
    for level in given.levels:
        counts = {}
        for dtype, sets in stored.items():
            if progress is not None:
                progress(f"{level} on {dtype}")
            adapter = _trained(given, level, dtype, sets["train"], head)
            counts[dtype] = [_counts(given, adapter, judged[where]) for where in (EXACT, dtype)]
        levels[level] = {
            dtype: _figures(given, own, counts[EXACT], clusters) for dtype, own in counts.items()
        }
    widths = exact["train"].drafter_size, exact["train"].verifier_size
    results = {
        "levels": levels,
        "bytes_per_token": {dtype: bytes_per_token(dtype, *widths) for dtype in given.dtypes},
        "rounding": {dtype: rounding(exact["test"], sets["test"]) for dtype, sets in stored.items()},
        "gamma": given.gamma, "pairs": {split: len(one) for split, one in exact.items()},
        "tokens": {split: one.n_tokens
                   for split, one in exact.items()}, "n_clusters": len(set(clusters)),
        "provenance": provenance(seed=given.seed,
                                 data_hash=str(exact["train"].manifest["config"].get("data_hash")),
                                 parameters=given.model_dump()),
    }
    folder.save_results(given.run_dir, "storage", results)
    return Study(results)


# --- the same pairs in every dtype
# -------------------------------------------------------------------------------------------


def _extracted(given: parameters.StorageParameters) -> dict[str, ShardDataset]:
    """The training and the held-out pairs in float32, extracted once and found again."""
    counts = {"train": given.n_train_sequences, "test": given.n_test_sequences}
    roots = {split: datasets.root_of(given.run_dir, given.data, split) for split in counts}
    pair: loading.Pair | None = None
    found: dict[str, ShardDataset] = {}
    for split, n in counts.items():
        place = storage_folder(given.run_dir, EXACT, split) / MODE
        settings = {
            "split": split, "data": datasets.name_of(given.data),
            "data_hash": dataset_folder.data_hash(roots[split])
        }
        pair = pair or loading.load_pair(extraction.pair_file(given.run_dir)["pair"])
        samples = datasets.samples(roots[split], split,
                                   questions_per_sequence=given.questions_per_sequence,
                                   n_sequences=n, n_event_frames=pair.n_event_frames,
                                   canvas=pair.event_canvas,
                                   )  # fmt: skip
        report = extract_run.extract(pair, samples, place.parent, modes=(MODE,), dtype=EXACT,
                                     max_new_tokens=given.max_new_tokens, batch_size=32,
                                     seed=given.seed, config=settings,
                                     )  # fmt: skip
        if not report.finished:
            raise ParameterError(
                f"the extraction of {split} was interrupted after {report.n} samples; run it again "
                "to continue"
            )
        found[split] = ShardDataset(place, expected_mode=MODE)
    statistics.check_disjoint(found["train"].table()["sequence"], found["test"].table()["sequence"])
    return found


def recode(exact: ShardDataset, place: Path, dtype: str) -> ShardDataset:
    """The pairs of ``exact`` rewritten in another dtype under ``place/teacher_forced``; a finished
    rewrite is found again.

    Raises: ShardError when the folder holds pairs of other states.
    """
    if dtype == exact.manifest["dtype"]:
        return exact
    config = {**exact.manifest["config"], "recoded_from": exact.manifest["digest"]}
    with ShardWriter(place / exact.mode, mode=exact.mode, tap=exact.tap, dtype=dtype,
                     config=config) as out:
        if not out.finished:
            for role in exact.manifest["heads"]:
                out.save_head(role, exact.head(role), exact.draft_vocab_size(role))
            for i in range(out.n_written, len(exact)):
                out.write(exact[i])
    return ShardDataset(place / exact.mode)


def rounding(exact: ShardDataset, stored: ShardDataset) -> float:
    """Mean over answers and both models of ‖stored - exact‖ / ‖exact‖."""
    errors = []
    for one, other in zip(exact, stored, strict=True):
        for role in layout.ROLES:
            a, b = getattr(one, f"hidden_by_{role}"), getattr(other, f"hidden_by_{role}")
            errors.append(float((b - a).norm() / a.norm().clamp(min=1e-30)))
    return sum(errors) / len(errors)


def _held_out(name: str, dataset: ShardDataset, head: Tensor) -> evaluation.HeldOut:
    table = dataset.table()
    sequences, clips = table["sequence"].tolist(), table["clip"].tolist()
    keys = [
        evaluation.key_of(*line) for line in zip(sequences, clips, table["question"], strict=True)
    ]
    return evaluation.HeldOut(name, dataset, head, datasets.clusters(sequences, clips), keys)


# --- one adapter a dtype
# ------------------------------------------------------------------------------------------------


def _trained(given: parameters.StorageParameters, level: str, dtype: str, dataset: ShardDataset,
             head: Tensor) -> Adapter:
    """The best checkpoint of a level trained on one dtype; every dtype begins at the same weights
    and sees the same order."""
    place = folder.resolve(given.run_dir) / "storage" / dtype / "adapters" / level
    config = FitConfig(profile=given.profile, epochs=given.epochs, batch_size=given.batch_size,
                       learning_rate=given.learning_rate)
    fit.fit_adapter(level, source.open_states(dataset), folder=place, config=config, head=head,
                    seed=given.seed)
    return registry.load_any_adapter(place / "best.safetensors").eval()


def _counts(given: parameters.StorageParameters, adapter: Adapter,
            held_out: evaluation.HeldOut) -> tuple[Counts, Counts]:
    """(matched, drafted positions) and (accepted, rounds) a sample, of a greedy loop at gamma;
    samples of one token count nothing."""
    with torch.random.fork_rng(devices=[]):
        return drafts.drafts_of(adapter, held_out, gamma=given.gamma,
                                batch_size=64).counts(given.gamma)


def _figures(given: parameters.StorageParameters, own: list[tuple[Counts, Counts]],
             exact: list[tuple[Counts, Counts]], clusters: list[str]) -> dict[str, Any]:
    """Both figures of one adapter: on exact held-out states, minus that of the adapter trained on
    fp32, and as self-measured."""
    options = {"n_resamples": given.resamples, "seed": given.seed}
    found: dict[str, Any] = {}
    for place, figure in enumerate(("token_acceptance", "accepted_per_round")):
        here, there = own[0][place], exact[0][place]
        found[figure] = evaluation.interval(statistics.bootstrap_ratio(*here, clusters, **options))
        found[f"{figure}_difference"] = evaluation.interval(
            statistics.bootstrap_ratio_difference(here, there, clusters, **options))
        found[f"{figure}_self_measured"] = evaluation.interval(
            statistics.bootstrap_ratio(*own[1][place], clusters, **options))
    return found


def summary(results: Mapping[str, Any]) -> pd.DataFrame:
    """One line a dtype: the largest paired difference to fp32 over the levels, and how many of them
    exclude zero."""
    rows = []
    for dtype in results["bytes_per_token"]:
        differences = [
            found[dtype]["token_acceptance_difference"] for found in results["levels"].values()
        ]
        largest = max(differences, key=lambda one: abs(one["value"]))
        excluding = sum(one["low"] > 0 or one["high"] < 0 for one in differences)
        rows.append({
            "dtype": dtype, "largest difference": largest["value"], "low": largest["low"],
            "high": largest["high"],
            "levels whose interval excludes zero": f"{excluding} of {len(differences)}"
        })  # fmt: skip
    return pd.DataFrame(rows)
