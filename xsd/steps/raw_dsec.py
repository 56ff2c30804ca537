"""Raw DSEC sequences into a dataset folder: ``xsd data prepare-dsec`` and notebook 08."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.core import ParameterError
from xsd.embedded import raw_sequence
from xsd.files import FolderLock, read_json, write_json
from xsd.runs import progress
from xsd.sensors import dsec, folder, frames

SETTINGS = "preparation.json"


def prepare(source: str | Path, root: str | Path, *, split: str = "train", clip_ms: int = 1000,
            hop_ms: int = 500, video_size: tuple[int, int] | None = None,
            canvas: frames.Canvas = "slice", rectify: bool = False) -> dict[str, Any]:
    """sensors.dsec.prepare under one bar per sequence. How the clips were cut is kept in
    ``preparation.json``, so that one folder never mixes two ways.

    Returns: its summary and gb (of the whole folder). Raises: ParameterError for a clip or hop that
    is not positive, or a folder begun with other settings; as sensors.dsec.prepare.
    """
    if clip_ms < 1 or hop_ms < 1:
        raise ParameterError(
            f"a clip of {clip_ms} ms every {hop_ms} ms cannot be cut; both must be at least 1 ms")
    dsec.sequence_folders(source)  # nothing is written where there is nothing to read
    root = Path(root)
    settings = {"split": split, "clip_ms": clip_ms, "hop_ms": hop_ms, "canvas": canvas,
                "video_size": list(video_size) if video_size else None, "rectify": rectify}
    bars: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.writing(root))
        _check_settings(root / SETTINGS, settings)

        def show(sequence: str, done: int, total: int) -> None:
            if sequence not in bars:
                bar = progress.tqdm(total=total, desc=sequence, unit="clip")
                bars[sequence] = stack.enter_context(bar)
            bars[sequence].update(done - bars[sequence].n)

        summary = dsec.prepare(source, root, split=split, clip_us=1000 * clip_ms,
                               hop_us=1000 * hop_ms, video_size=video_size, canvas=canvas,
                               rectify=rectify, progress=show)
    files = (path for path in root.rglob("*") if path.is_file())
    return {**summary, "gb": sum(path.stat().st_size for path in files) / 1e9}


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """The folder's way to cut clips: written, or compared with the one that it was begun with."""
    if path.is_file():
        before = read_json(path, ParameterError, "delete it and give the same settings again")
        for name, value in settings.items():
            there = before.get(name) if isinstance(before, dict) else before
            if there != value:
                raise ParameterError(f"{path.parent} was begun with {name}={there!r}, not "
                                     f"{value!r}; choose another folder, or the same settings")
    write_json(path, settings)


def sentence(summary: Mapping[str, Any], root: str | Path) -> str:
    """The summary in plain words, notes below it."""
    done = f"{root}: {summary['clips']} clips of {summary['sequences']} sequences written"
    if summary["resumed"]:
        done += f", {summary['resumed']} sequences were there already"
    if summary["skipped"]:
        done += f", {summary['skipped']} windows skipped (fewer than five events, or no picture)"
    return "\n".join([f"{done}; the folder holds {summary['gb']:.3f} GB",
                      *(f"note: {note}" for note in summary["notes"])])


def simulated_source(source: str | Path, *, n_sequences: int = 2, seed: int = 0,
                     duration_s: float = 1.5) -> None:
    """Make sure that ``source`` holds simulated sequences in DSEC's raw format."""
    for index in range(n_sequences):
        place = Path(source) / f"simulated_{seed:02d}_{index:02d}"
        with FolderLock(source):
            if not (place / "images" / "timestamps.txt").is_file():  # written last
                raw_sequence.write(place, seed=1000 * seed + index, duration_s=duration_s)


def table(root: str | Path) -> pd.DataFrame:
    """What a dataset folder holds, one row per clip: sequence, clip, start_s (from its sequence's
    first clip), events, events_per_s, width, height."""
    rows = []
    for record in folder.open_folder(root):
        events = folder.load_events(record)
        start_us, end_us = record.t_us or (int(events.t_us[0]), int(events.t_us[-1]) + 1)
        seconds = (end_us - start_us) / 1e6
        rows.append([record.sequence, record.clip, start_us, len(events), len(events) / seconds,
                     events.width, events.height])
    columns = ["sequence", "clip", "start_s", "events", "events_per_s", "width", "height"]
    frame = pd.DataFrame(rows, columns=columns)
    first_us = frame.groupby("sequence")["start_s"].transform("min")
    return frame.assign(start_s=(frame["start_s"] - first_us) / 1e6)
