"""Step 02: one adapter a level from the training pairs of a run; L6, the drafter's own LoRA, is in
:mod:`xsd.steps.drafter_tuning`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from xsd import files
from xsd.adapters import registry
from xsd.adapters.base import Adapter
from xsd.core import ParameterError
from xsd.runs import folder, parameters
from xsd.shards.store import ShardDataset
from xsd.steps import extraction
from xsd.train import fit, guards, recipes, source, start
from xsd.train.recipes import FitConfig

FULL_SIZE = 4096
"""Hidden size of the 7B pair, for the parameter counts beside the embedded pair's."""
FULL_LAYERS = 32
"""Layers of its drafter's decoder."""


def adapter_folder(run_dir: str | os.PathLike[str], level: Any) -> Path:
    """Where a level's training stands in a run; my_levels:Mine stands in adapters/my_levels.Mine."""
    return folder.resolve(run_dir) / "adapters" / re.sub(r"[:/\\]", ".", files.name_of(level))


def run(given: parameters.TrainParameters, *,
        progress: Callable[[str, dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train the levels that are missing and write ``results/train.json``; finished trainings are
    found again.

    progress: called with the level and each epoch's row. Raises: TrainingError when the run holds
    another training of a level, or when
    anything of the run's held-out sets is in the training data; ParameterError for an option that a
    level does not have.
    """
    extraction.ensure(given.run_dir, given.seed, data=given.data)
    dataset = extraction.open_pairs(given.run_dir, "train", given.data, given.mode)
    states = source.open_states(dataset)
    head = dataset.head("verifier")
    held_out = guards.marks_of(held_out_sets(given.run_dir))
    levels: dict[str, Any] = {}
    for spec in given.levels:
        level = files.name_of(spec)
        report = None if progress is None else lambda row, level=level: progress(level, row)
        if level == "L6":
            from xsd.steps import (
                # peft takes seconds to import and speaks on stderr; only L6 needs it
                drafter_tuning,
            )

            place = adapter_folder(given.run_dir, level)
            levels[level] = drafter_tuning.run(given, dataset, head, place, held_out,
                                               progress=report)
            continue
        result = fit.fit_adapter(spec, states, folder=adapter_folder(given.run_dir, level),
                                 config=config_of(given, level), head=head, seed=given.seed,
                                 held_out=held_out, progress=report,
                                 )
        best = result.history[result.best_epoch - 1]
        levels[level] = {
            "reads": load(given.run_dir, [spec])[level].reads, "parameters": result.parameters,
            "seconds": result.seconds, "epochs": len(result.history),
            "best_epoch": result.best_epoch, "validation_loss": best["validation_total"],
            "validation_token_acceptance": best.get("token_acceptance"),
            "validation_cosine": best["cosine_similarity"],
        }
    results = {
        "profile": given.profile, "mode": given.mode, "pairs": len(states),
        "hidden_size": states.hidden_size, "levels": levels,
        "provenance": files.provenance(seed=given.seed, data_hash=states.fingerprint(),
                                 parameters=given.model_dump()),
    }
    folder.save_results(given.run_dir, "train", results)
    return results


def config_of(given: parameters.TrainParameters, level: str) -> FitConfig:
    """The recipe of a level: its profile with what the parameters change; token fusion only for the
    levels that can."""
    recipe = recipes.settings(given.profile, level)
    return FitConfig(
        profile=recipe["profile"], objective=given.objective or recipe.get("objective"),
        epochs=given.epochs, batch_size=given.batch_size, learning_rate=given.learning_rate,
        position_decay=given.position_decay, noise=given.noise,
        token_fusion=recipe.get("token_fusion", False)
        or (given.token_fusion and level in start.FUSING), draft_vocabulary=given.draft_vocabulary
        or None,
    )


def held_out_sets(run_dir: str | os.PathLike[str]) -> list[ShardDataset]:
    """Every finished extraction of a held-out set in a run; unfinished ones hold nothing that
    anybody is judged on yet."""
    found = sorted((folder.resolve(run_dir) / "shards").glob("test_*/*/manifest.json"))
    sets = [ShardDataset(path.parent, unfinished=True) for path in found]
    return [one for one in sets if one.manifest["finished"]]


def trained(run_dir: str | os.PathLike[str]) -> list[str]:
    """The levels that a run holds: ours in the registry's order, then researchers' own."""
    found = (folder.resolve(run_dir) / "adapters").glob("*/best.safetensors")
    names = sorted(registry.read_config(path)["level"] for path in found)
    return [level for level in registry.LEVELS if level in names] + [
        name for name in names if name not in registry.LEVELS]


def load(run_dir: str | os.PathLike[str], levels: Sequence[Any]) -> dict[str, Adapter]:
    """The best checkpoint of each level, in eval mode, by its name. levels: as registry.resolve
    takes them. Raises: ParameterError naming the trained levels when one is missing."""
    have = trained(run_dir)
    missing = [files.name_of(level) for level in levels if files.name_of(level) not in have]
    if missing:
        raise ParameterError(
            f"the run {run_dir} holds no adapter {', '.join(missing)} (trained: "
            f"{', '.join(have) or 'none'}); train with notebook 02 and levels={','.join(missing)}")
    return {
        files.name_of(level): registry.load_any_adapter(adapter_folder(run_dir, level), level=level)
        for level in levels
    }


def ensure(run_dir: str, seed: int, levels: Sequence[str], *, data: str = "simulated") -> None:
    """Train with the smoke parameters when the run holds no adapter at all, so that each notebook
    runs alone."""
    if not trained(run_dir):
        run(
            parameters.TrainParameters.checked(
                {"run_dir": run_dir, "seed": seed, "levels": list(levels), "data": data}))


def history(run_dir: str | os.PathLike[str], levels: Sequence[str]) -> pd.DataFrame:
    """The epochs as ``views.figures.training_curves`` reads them: level, epoch, split, loss, each
    term as ``<term> loss``, and for validation token_acceptance, cosine and accept_0.90 …"""
    rows = []
    for level in levels:
        for row in json.loads(
            (adapter_folder(run_dir, level) / "history.json").read_text(encoding="utf-8")):
            line = {"level": level, "epoch": row["epoch"]}
            measured = {
                "token_acceptance": row.get("token_acceptance"), "cosine": row["cosine_similarity"]
            }
            measured |= {name: value for name, value in row.items() if name.startswith("accept_")}
            rows.append({**line, "split": "train", **_losses(row, "train")})
            rows.append({**line, "split": "validation", **_losses(row, "validation"), **measured})
    return pd.DataFrame(rows)


def most_terms(epochs: pd.DataFrame) -> str:
    """The level whose loss is the sum of the most terms; the first of several."""
    counts = {level: len(_terms_of(rows)) for level, rows in epochs.groupby("level", sort=False)}
    return max(counts, key=counts.__getitem__)


def _terms_of(rows: pd.DataFrame) -> list[str]:
    return [
        column for column in rows.columns
        if column.endswith(" loss") and rows[column].notna().all()
    ]


def terms(epochs: pd.DataFrame, level: str) -> pd.DataFrame:
    """The terms of one level's loss over its epochs, each divided by its first value in that split,
    as ``training_curves`` reads them."""
    rows = epochs[epochs["level"] == level]
    pieces = []
    for name in _terms_of(rows):
        first = rows.groupby("split")[name].transform("first")
        part = rows[["epoch", "split"]].assign(level=name.removesuffix(" loss"))
        pieces.append(part.assign(**{"loss against the first epoch": rows[name] / first}))
    return pd.concat(pieces, ignore_index=True)


def _losses(row: Mapping[str, Any], split: str) -> dict[str, float]:
    names = [name for name in row if name.startswith(f"{split}_") and name != "train_seconds"]
    terms = {name.removeprefix(f"{split}_"): row[name] for name in names}
    return {"loss" if name == "total" else f"{name} loss": value for name, value in terms.items()}


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The trained levels: what they read, parameters here and at the full size of 4096, epochs,
    best epoch, validation figures, seconds."""
    rows = []
    for level, found in results["levels"].items():
        if level == "L6":
            from xsd.train import lora

            full = lora.size_of(FULL_SIZE, FULL_LAYERS)
        elif level not in registry.LEVELS and ":" not in level:
            full = None  # an object has the one size it was made with
        else:
            with torch.device("meta"):  # counted, not filled
                full = registry.count_parameters(registry.create_adapter(level, FULL_SIZE))
        shown = {name: value for name, value in found.items() if name != "held_out"}
        rows.append({"level": level, **shown, "parameters at 4096": full})
    return pd.DataFrame(rows)
