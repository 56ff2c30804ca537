"""A training's folder: best and final adapter, configuration, history, provenance, and the
checkpoint that resumes it bit for bit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xsd import files
from xsd.core import CheckpointError, TrainingError

CHECKPOINT = "checkpoint.pt"


def fixed(value: Any) -> str:
    """One JSON line, the same for the same value."""
    return json.dumps(value, sort_keys=True, default=str)


def describe(folder: Path, identity: Mapping[str, Any], config: Mapping[str, Any],
             device: torch.device) -> None:
    """Write config.json and provenance.json, once a run. identity: level, seed, config and data of
    the run."""
    files.write_json(folder / "config.json", {**identity, **config})
    files.write_json(
        folder / "provenance.json",
        files.provenance(seed=identity["seed"], data_hash=identity["data"], device=str(device)))


def save(folder: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write history.json and the checkpoint. state: what :func:`read` gives back, ``history`` among
    it."""
    files.write_json(folder / "history.json", state["history"])
    with files.atomic_path(folder / CHECKPOINT) as temporary:
        torch.save({"identity": fixed(identity), **state}, temporary)


def read(folder: Path, identity: Mapping[str, Any], device: torch.device,
         what: str) -> dict[str, Any] | None:
    """The state of an earlier session of the same run, None where there is none.

    what: what makes a run another one, for the message. Raises: CheckpointError for a damaged
    checkpoint, TrainingError for another run's.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        stored = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); delete the folder and train again"
        ) from error
    if stored["identity"] != fixed(identity):
        raise TrainingError(
            f"{folder} holds another training ({what} differ); choose another folder or delete it")
    return stored
