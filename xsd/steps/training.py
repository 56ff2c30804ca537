"""Step 02: one adapter a level from the training pairs of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from xsd.adapters import registry
from xsd.adapters.base import Adapter
from xsd.core import ParameterError, provenance
from xsd.runs import folder, parameters
from xsd.steps import extraction
from xsd.train import fit, source
from xsd.train.recipes import FitConfig

FULL_SIZE = 4096
"""Hidden size of the 7B pair, for the parameter counts beside the embedded pair's."""


def adapter_folder(run_dir: str | os.PathLike[str], level: str) -> Path:
    """Where a level's training stands in a run."""
    return folder.resolve(run_dir) / "adapters" / level


def run(given: parameters.TrainParameters, *, progress: Callable[[str, dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train the levels that are missing and write ``results/train.json``; finished trainings are found again.

    progress: called with the level and each epoch's row. Raises: TrainingError when the run holds another training of a level.
    """
    extraction.ensure(given.run_dir, given.seed, data=given.data)
    dataset = extraction.open_pairs(given.run_dir, "train", given.data, given.mode)
    states = source.open_states(dataset)
    head = dataset.head("verifier")
    config = FitConfig(profile=given.profile, epochs=given.epochs, batch_size=given.batch_size, learning_rate=given.learning_rate)
    levels = {}
    for level in given.levels:
        result = fit.fit_adapter(
            level,
            states,
            folder=adapter_folder(given.run_dir, level),
            config=config,
            head=head,
            seed=given.seed,
            progress=None if progress is None else lambda row, level=level: progress(level, row),
        )
        best = result.history[result.best_epoch - 1]
        levels[level] = {
            "reads": load(given.run_dir, [level])[level].reads,
            "parameters": result.parameters,
            "seconds": result.seconds,
            "epochs": len(result.history),
            "best_epoch": result.best_epoch,
            "validation_loss": best["validation_total"],
            "validation_token_acceptance": best.get("token_acceptance"),
            "validation_cosine": best["cosine_similarity"],
        }
    results = {
        "profile": given.profile,
        "mode": given.mode,
        "pairs": len(states),
        "hidden_size": states.hidden_size,
        "levels": levels,
        "provenance": provenance(seed=given.seed, data_hash=states.fingerprint(), parameters=given.model_dump()),
    }
    folder.save_results(given.run_dir, "train", results)
    return results


def trained(run_dir: str | os.PathLike[str]) -> list[str]:
    """The levels that a run holds, in the registry's order."""
    return [level for level in registry.LEVELS if (adapter_folder(run_dir, level) / "best.safetensors").is_file()]


def load(run_dir: str | os.PathLike[str], levels: Sequence[str]) -> dict[str, Adapter]:
    """The best checkpoint of each level, in eval mode. Raises: ParameterError naming the trained levels when one is missing."""
    missing = [level for level in levels if level not in trained(run_dir)]
    if missing:
        have = ", ".join(trained(run_dir)) or "none"
        raise ParameterError(
            f"the run {run_dir} holds no adapter {', '.join(missing)} (trained: {have}); train with notebook 02 and "
            f"levels={','.join(missing)}"
        )
    return {level: registry.load_any_adapter(adapter_folder(run_dir, level) / "best.safetensors").eval() for level in levels}


def ensure(run_dir: str, seed: int, levels: Sequence[str], *, data: str = "simulated") -> None:
    """Train with the smoke parameters when the run holds no adapter at all, so that each notebook runs alone."""
    if not trained(run_dir):
        run(parameters.TrainParameters.checked({"run_dir": run_dir, "seed": seed, "levels": list(levels), "data": data}))


def history(run_dir: str | os.PathLike[str], levels: Sequence[str]) -> pd.DataFrame:
    """The epochs as ``views.figures.training_curves`` reads them: level, epoch, split, loss, token_acceptance and cosine (validation)."""
    rows = []
    for level in levels:
        for row in json.loads((adapter_folder(run_dir, level) / "history.json").read_text(encoding="utf-8")):
            line = {"level": level, "epoch": row["epoch"]}
            measured = {"token_acceptance": row.get("token_acceptance"), "cosine": row["cosine_similarity"]}
            rows.append({**line, "split": "train", "loss": row["train_total"]})
            rows.append({**line, "split": "validation", "loss": row["validation_total"], **measured})
    return pd.DataFrame(rows)


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The trained levels: what they read, parameters here and at the full size of 4096, epochs, best epoch, validation figures, seconds."""
    rows = []
    for level, found in results["levels"].items():
        with torch.device("meta"):  # counted, not filled
            full = registry.count_parameters(registry.create_adapter(level, FULL_SIZE))
        rows.append({"level": level, **found, "parameters at 4096": full})
    return pd.DataFrame(rows)
