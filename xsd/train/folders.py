"""A training's folder: its checkpoint, what is compared before it goes on, and what is checked of
it afterwards (docs/adapters.md, section 5)."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from xsd import files
from xsd.adapters import registry, tensor_files
from xsd.core import CheckpointError, XsdError
from xsd.shards import format as layout

CHECKPOINT, CONFIG, HISTORY, CHECKSUMS = ("checkpoint.pt", "config.json", "history.json",
                                          "checksums.json")
KEPT = {"history": list, "best": list, "best_epoch": int, "finished": bool}
"""What a checkpoint keeps besides weights and optimiser."""
AGAIN = "restore it from a copy, or delete the folder and train again"
EARLIER = "earlier"
_NOT_OURS = (EARLIER, files.LOCK, CHECKSUMS)


def differences(stored: str, asked: Mapping[str, Any]) -> str:
    """What makes a stored identity (JSON) another training than the one asked for, or ""."""
    held, now = (files.parse_json(text, "the checkpoint's identity", CheckpointError, AGAIN)
                 for text in (stored, json.dumps(asked, default=str)))
    if not isinstance(held, dict) or not isinstance(held.get("config"), dict):
        raise CheckpointError(f"the checkpoint does not say which training it is of; {AGAIN}")
    held, now = ({**one.pop("config"), **one} for one in (held, now))
    found = (layout.first_difference({name: held.get(name)}, {name: now.get(name)})
             for name in sorted({*held, *now}))
    return ", ".join(one[:200] for one in found if one)


def digest_of(identity: str) -> str:
    """What names a training in its own files."""
    return tensor_files.digest_of(identity, {})[:16]


def read_checkpoint(folder: Path, device: str | torch.device = "cpu") -> dict[str, Any] | None:
    """The state to go on from, None where there is none. Raises: CheckpointError when it is
    damaged, no checkpoint, or would run code."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = tensor_files.read_pt(path, ours=True, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged ({error.__cause__ or 'its digest differs'}); "
                              f"{AGAIN}") from error
    kinds = {**KEPT, "identity": str, "adapter": (Mapping, list), "optimiser": dict}
    if not (isinstance(state, dict) and all(isinstance(state.get(name), kind)
                                            for name, kind in kinds.items())
            and all(map(_is_row, state["history"]))
            and bool(state["history"]) <= state["best_epoch"] <= len(state["history"])
            and len(state["history"]) >= state["finished"]):
        raise CheckpointError(f"{path} is no checkpoint of a training; {AGAIN}")
    return state


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(
        isinstance(name, str) and isinstance(value, (int, float)) for name, value in row.items())


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of history.json, one per epoch. Raises: CheckpointError, also for changed ones."""
    path = folder / HISTORY
    rows = files.read_json(path, CheckpointError, AGAIN)
    needed = {"epoch", "validation_total", "cosine_similarity"}
    if not (isinstance(rows, list) and rows and all(map(_is_row, rows))
            and all(needed <= row.keys() for row in rows)):
        raise CheckpointError(f"{path} is no history of a training; {AGAIN}")
    listed = _listed(folder)
    if HISTORY in listed and listed[HISTORY] != files.sha256_of(path):
        raise CheckpointError(f"{path} does not match its checksum; {AGAIN}")
    return rows


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says of the training. Raises: CheckpointError."""
    about = tensor_files.read_signed(folder / CONFIG, AGAIN)
    if not isinstance(about.get("level"), str) or not isinstance(about.get("config"), dict):
        raise CheckpointError(f"{folder / CONFIG} does not say which training it is of; {AGAIN}")
    return about


def set_aside(place: Path, asked: str) -> None:
    """What stands in a level's folder, into its subfolder earlier/<level>_<when it ended>; the
    training called ``asked`` comes back from there. The checkpoint goes last: a kill before it
    leaves the training where it was, to be set aside again."""
    with files.FolderLock(place), files.storing(place):
        ended = datetime.fromtimestamp((place / CHECKPOINT).stat().st_mtime)
        target = place / EARLIER / f"{place.name}_{ended:%Y%m%d_%H%M%S}"
        while (target / CHECKPOINT).exists():  # two within a second
            target = target.with_name(f"{target.name}b")
        target.mkdir(parents=True, exist_ok=True)
        for path in _checkpoint_last(place):
            path.rename(target / path.name)
        for config in sorted((place / EARLIER).glob(f"*/{CONFIG}")):
            with contextlib.suppress(CheckpointError):  # another's damage is not in the way
                if (read_config(config.parent).get("training") == asked
                        and (config.parent / CHECKPOINT).exists()):
                    for path in _checkpoint_last(config.parent):
                        copy = shutil.copytree if path.is_dir() else shutil.copy2
                        copy(path, place / path.name)
                    shutil.rmtree(config.parent)
                    return


def _checkpoint_last(place: Path) -> list[Path]:
    held = [path for path in place.iterdir() if path.name not in (EARLIER, files.LOCK)]
    return sorted(held, key=lambda path: path.name == CHECKPOINT)


def write_checksums(folder: Path) -> None:
    """sha256 of every file of a finished training, in checksums.json. Raises: StorageError."""
    found = {path.relative_to(folder).as_posix(): files.sha256_of(path)
             for path in sorted(folder.rglob("*"))
             if path.is_file() and path.relative_to(folder).parts[0] not in _NOT_OURS
             and not path.name.endswith(".part")}
    tensor_files.write_signed(folder / CHECKSUMS, {"files": found})


def _listed(folder: Path) -> dict[str, str]:
    if not (folder / CHECKSUMS).is_file():
        return {}
    listed = tensor_files.read_signed(folder / CHECKSUMS, AGAIN).get("files")
    if not (isinstance(listed, dict) and all(isinstance(one, str) for one in listed.values())):
        raise CheckpointError(f"{folder / CHECKSUMS} lists no files; {AGAIN}")
    return listed


def problems(folder: Path) -> list[str]:
    """What is wrong with a training's folder, one sentence each: changed, missing, exchanged,
    unreadable and left-over files. An adapter alone, without its training, is looked at, too."""
    if holder := files.lock_holder(folder):
        return [f"{folder} is being written by process {holder}; look again when it has finished"]
    found = [f"{path} was left by a killed process; the same training again removes it"
             for path in sorted(folder.rglob(".*")) if path.suffix == ".part"]
    begun = any((folder / name).exists() for name in (HISTORY, CHECKPOINT, CHECKSUMS))
    if not begun and not any(folder.glob("final*")):  # or killed in its first epoch
        return found + [str(error) for _, error in _adapters(folder)]
    named = {name: str(error) for name, error in _records(folder)}
    for name, error in _adapters(folder):
        if not str(error).startswith(str(folder / CONFIG)):  # said already
            named.setdefault(name, str(error))
    try:
        listed = _listed(folder)
    except XsdError as error:
        listed, named[CHECKSUMS] = {}, str(error)
    for name, digest in listed.items():
        path = folder / name
        inside = ".." not in Path(name).parts
        if what := files.fault(path, [digest]) if inside else "is missing":
            named.setdefault(name, f"{path} {what}; {AGAIN}")
    if not (folder / CHECKSUMS).exists() and any(folder.glob("final*")):
        named[CHECKSUMS] = (f"{folder / CHECKSUMS} is missing, so nothing here can be compared; "
                            "the same training again writes it")
    return found + list(dict.fromkeys(named.values()))


def _adapters(folder: Path) -> Iterator[tuple[str, XsdError]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            registry.check(path)
        except XsdError as error:
            yield path.name, error
    best = "best", "best.safetensors"
    if (folder / CONFIG).exists() and not any((folder / name).exists() for name in best):
        yield best[1], CheckpointError(f"{folder} holds no best weights; {AGAIN}")


def _records(folder: Path) -> Iterator[tuple[str, XsdError]]:
    """Whether the last two agree, too: a kill may leave one epoch more in the history."""
    found: dict[str, Any] = {}
    for name, read in ((CONFIG, read_config), (HISTORY, read_history),
                       (CHECKPOINT, read_checkpoint)):
        try:
            found[name] = read(folder)
        except XsdError as error:
            yield name, error
    state, rows = found.get(CHECKPOINT), found.get(HISTORY)
    if state is not None and rows is not None and rows[:len(state["history"])] != state["history"]:
        yield HISTORY, CheckpointError(f"{folder / HISTORY} is not what the checkpoint says; the "
                                       "same training again mends it")


def check_best(path: Path, best_epoch: int) -> None:
    """Raises: CheckpointError when the best weights that a training is to go on from are missing,
    damaged or exchanged. A kill may have left those of the epoch that is now repeated."""
    if best_epoch and not path.exists():
        raise CheckpointError(f"{path} is missing, and the weights of epoch {best_epoch} are "
                              f"nowhere else; {AGAIN}")
    if best_epoch and path.is_file():
        registry.check(path)
