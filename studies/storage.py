"""Notebook 10: what the bytes of a stored state buy. The same pairs in every dtype, an adapter
trained on each, its acceptance held out.

The states are extracted once, in float32, and rewritten in the other dtypes, so that nothing
differs but the rounding. An adapter is judged twice: on exact held-out states, as it meets them
while decoding, and on held-out states stored like its training ones, as a run that has nothing else
would measure it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from studies.parameters import StorageParameters
from xsd.adapters import registry
from xsd.adapters.base import Adapter
from xsd.core import ParameterError
from xsd.evaluate import held_out, statistics, table
from xsd.evaluate.tables import sides
from xsd.extract import run as extract_run
from xsd.files import provenance
from xsd.models import loading
from xsd.runs import folder
from xsd.sensors import folder as dataset_folder
from xsd.shards import format as layout
from xsd.shards.store import ShardDataset
from xsd.shards.writer import ShardWriter
from xsd.steps import data as datasets
from xsd.steps import extraction
from xsd.train import fit, source
from xsd.train.recipes import FitConfig

MODE = "teacher_forced"
EXACT = "fp32"
FULL_SIZE = 4096
"""Width of the 7B pair's states, for the bytes beside the embedded pair's."""
FIGURES = {
    "token_acceptance": ("matched", "positions"),
    "accepted_per_round": ("accepted", "rounds"),
}
"""Figure → what is counted and what it is divided by, columns of ``table.counts``."""


def run(P: StorageParameters, *, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Extract, rewrite, train and judge what is missing; returns what it writes to
    ``results/storage.json``.

    progress: called with a line before each training. Raises: ParameterError when fp32 is not among
    the dtypes, MetricError when a sequence is in training and in test, and as the rooms below.
    """
    if EXACT not in P.dtypes:
        raise ParameterError(
            f"dtypes={P.dtypes} holds no {EXACT!r}, which the others are compared with; add it")
    exact = extract(P)
    stored = {
        dtype: {
            split: recode(one, storage_folder(P.run_dir, dtype, split), dtype)
            for split, one in exact.items()
        } for dtype in P.dtypes
    }
    judged = {dtype: held_out.of(dtype, sets["test"]) for dtype, sets in stored.items()}
    levels: dict[str, dict[str, Any]] = {}
    for level in P.levels:
        counts = {}
        for dtype, sets in stored.items():
            if progress is not None:
                progress(f"{level} on {dtype}")
            adapter = train(P, level, dtype, sets["train"])
            counts[dtype] = [
                table.counts(table.measure({level: adapter}, judged[where], gamma=P.gamma, top_k=1,
                                           drafter=False), P.gamma) for where in (EXACT, dtype)
            ]
        levels[level] = {dtype: _figures(P, own, counts[EXACT]) for dtype, own in counts.items()}
    widths = exact["train"].drafter_size, exact["train"].verifier_size
    results = {
        "levels": levels,
        "bytes_per_token": {dtype: bytes_per_token(dtype, *widths) for dtype in P.dtypes},
        "rounding": {dtype: rounding(exact["test"], of["test"]) for dtype, of in stored.items()},
        "gamma": P.gamma,
        "pairs": {split: len(one) for split, one in exact.items()},
        "tokens": {split: int(one.table()["n_tokens_verifier"].sum())
                   for split, one in exact.items()},
        "n_clusters": len(set(judged[EXACT].clusters)),
        "provenance": provenance(seed=P.seed, parameters=P.model_dump(),
                                 data_hash=str(exact["train"].manifest["config"].get("data_hash"))),
    }
    folder.save_results(P.run_dir, "storage", results)
    return results


def _figures(P: StorageParameters, own: list[pd.DataFrame],
             exact: list[pd.DataFrame]) -> dict[str, Any]:
    """Both figures of one adapter: on exact held-out states, minus that of the adapter trained on
    fp32, and as self-measured."""
    options = {"n_resamples": P.resamples, "seed": P.seed}
    clusters = list(own[0]["sequence"])
    found: dict[str, Any] = {}
    for figure, names in FIGURES.items():
        here, alike, there = ([counts[name] for name in names] for counts in (*own, exact[0]))
        found |= {
            figure: vars(statistics.bootstrap_ratio(*here, clusters, **options)),
            f"{figure}_difference": vars(
                statistics.bootstrap_ratio_difference(here, there, clusters, **options)),
            f"{figure}_self_measured": vars(
                statistics.bootstrap_ratio(*alike, clusters, **options)),
        }
    return found


# --- the same pairs in every dtype


def storage_folder(run_dir: str | os.PathLike[str], dtype: str, split: str) -> Path:
    """Where the pairs of one split stand in one dtype."""
    return folder.resolve(run_dir) / "storage" / dtype / split


def extract(P: StorageParameters) -> dict[str, ShardDataset]:
    """The training and the held-out pairs in float32, by split: those behind a path, or of the
    run's drives, extracted once and found again. Raises: ParameterError for pairs by path that are
    rounded already."""
    found: dict[str, ShardDataset] = {}
    sets = {"train": (P.data, P.n_train_sequences),
            "test": (P.test_data or P.data, P.n_test_sequences)}
    for split, (data, n) in sets.items():
        if extraction.stored(data, split) is None:
            found[split] = _extract(P, data, split, n)
            continue
        one = found[split] = extraction.open_pairs(P.run_dir, split, data, MODE)
        if one.manifest["dtype"] != EXACT:
            raise ParameterError(f"{data} holds states that are rounded to {one.manifest['dtype']} "
                                 f"already; give pairs extracted with --stored {EXACT}")
    statistics.check_disjoint(*(one.table()["sequence"] for one in found.values()))
    return found


def _extract(P: StorageParameters, data: str, split: str, n_sequences: int) -> ShardDataset:
    about = extraction.pair_file(P.run_dir)
    pair = loading.load_pair(about["pair"], **about.get("loads", {}))
    root = datasets.root_of(P.run_dir, data, split)
    samples = datasets.samples(root, split, questions_per_sequence=P.questions_per_sequence,
                               n_sequences=n_sequences, n_event_frames=pair.n_event_frames,
                               canvas=pair.event_canvas)
    place = storage_folder(P.run_dir, EXACT, split)
    settings = {"split": split, "data": datasets.name_of(data),
                "data_hash": dataset_folder.data_hash(root)}
    report = extract_run.extract(pair, samples, place, modes=(MODE,), dtype=EXACT,
                                 max_new_tokens=P.max_new_tokens, batch_size=32, seed=P.seed,
                                 config=settings)
    if not report.finished:
        raise ParameterError(f"the extraction of {split} was interrupted after {report.n} "
                             "samples; run it again to continue")
    return ShardDataset(place / MODE, expected_mode=MODE)


def recode(exact: ShardDataset, place: Path, dtype: str) -> ShardDataset:
    """The pairs of ``exact`` rewritten in another dtype under ``place/teacher_forced``; a finished
    rewrite is found again. Raises: ShardError when the folder holds pairs of other states."""
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


def train(P: StorageParameters, level: str, dtype: str, dataset: ShardDataset) -> Adapter:
    """The best checkpoint of a level trained on one dtype; every dtype begins at the same weights
    and sees the same order."""
    place = folder.resolve(P.run_dir) / "storage" / dtype / "adapters" / level
    config = FitConfig(profile=P.recipe, epochs=P.epochs, batch_size=P.batch_size,
                       learning_rate=P.learning_rate)
    fit.fit_adapter(level, source.open_states(dataset), folder=place, config=config,
                    head=dataset.head("verifier"), seed=P.seed)
    return registry.load_any_adapter(place / "best.safetensors", level=level)


# --- the results as tables


def bytes_per_token(dtype: layout.StoredDtype, drafter_size: int, verifier_size: int) -> int:
    """Of a shard: both models' states, their scales for int8, and both ids (docs/shards.md)."""
    scale = 4 if dtype == "int8" else 0
    return sum(width * layout.TORCH_DTYPES[dtype].itemsize + scale + 8
               for width in (drafter_size, verifier_size))


def sizes(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per dtype: bytes per token here and at the full width, their share of float32, the
    rounding error of a state."""
    exact = bytes_per_token(EXACT, FULL_SIZE, FULL_SIZE)
    rows = []
    for dtype, size in results["bytes_per_token"].items():
        full = bytes_per_token(dtype, FULL_SIZE, FULL_SIZE)
        rows.append({"dtype": dtype, "bytes per token": size, "bytes at 4096": full,
                     "share of fp32 at 4096": round(full / exact, 4),
                     "error of a state": results["rounding"][dtype]})
    return pd.DataFrame(rows)


def acceptance(results: Mapping[str, Any], figure: str = "token_acceptance") -> pd.DataFrame:
    """One row per level and dtype: bytes per token, one of FIGURES with its interval (``value``),
    its paired difference to fp32, and the same as self-measured."""
    rows = []
    for level, found in results["levels"].items():
        for dtype, one in found.items():
            size = results["bytes_per_token"][dtype]
            rows.append({"level": level, "dtype": dtype, "bytes_per_token": size,
                         **sides("value", one[figure]),
                         **sides("difference", one[f"{figure}_difference"]),
                         **sides("self_measured", one[f"{figure}_self_measured"])})
    return pd.DataFrame(rows)


def summary(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per dtype: the largest paired difference to fp32 over the levels, and how many of
    them exclude zero."""
    rows = []
    for dtype, part in acceptance(results).groupby("dtype", sort=False):
        largest = part.loc[part["difference"].abs().idxmax()]
        excluding = ((part["difference low"] > 0) | (part["difference high"] < 0)).sum()
        rows.append({"dtype": dtype, "largest difference": largest["difference"],
                     "low": largest["difference low"], "high": largest["difference high"],
                     "levels whose interval excludes zero": f"{excluding} of {len(part)}"})
    return pd.DataFrame(rows)
