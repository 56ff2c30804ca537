"""Raw DSEC sequences into a dataset folder, with progress and a summary: ``xsd data prepare-dsec`` and
notebook 08."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.core import ParameterError
from xsd.embedded import raw_sequence
from xsd.files import write_json
from xsd.runs import progress as bars
from xsd.sensors import dsec, folder

SETTINGS = "preparation.json"


def size_of(text: str) -> tuple[int, int] | None:
    """``"480x360"`` as (width, height); empty is None. Raises: ParameterError otherwise."""
    if not text:
        return None
    width, sign, height = text.lower().partition("x")
    if not (sign and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ParameterError(f"a picture size is written WxH, such as 480x360, not {text!r}")
    return int(width), int(height)


def prepare(source: str | Path, root: str | Path, *, split: str = "train", clip_ms: int = 1000,
            hop_ms: int = 500, video_size: tuple[int, int] | None = None, canvas: str = "slice",
            rectify: bool = False,
            ) -> dict[str, Any]:
    """sensors.dsec.prepare under a bar a sequence; a stopped run continues with the next unfinished
    sequence.

    Returns: {sequences, clips, skipped, resumed, notes, gb (of the whole folder)}.
    How the clips were cut is kept in ``preparation.json``, so that one folder never mixes two ways.
    Raises: ParameterError for a clip or hop that is not positive, or a folder begun with other
    settings; as sensors.dsec.prepare.
    """
    if clip_ms < 1 or hop_ms < 1:
        raise ParameterError(
            f"a clip of {clip_ms} ms every {hop_ms} ms cannot be cut; both must be at least 1 ms")
    settings = {
        "split": split, "clip_ms": clip_ms, "hop_ms": hop_ms,
        "video_size": list(video_size) if video_size else None, "canvas": canvas,
        "rectify": rectify,
    }  # fmt: skip
    _check_settings(Path(root) / SETTINGS, settings)
    running: dict[str, Any] = {}

    def show(sequence: str, done: int, total: int) -> None:
        if sequence not in running:
            running[sequence] = bars.tqdm(total=total, desc=sequence, unit="clip")
        running[sequence].update(done - running[sequence].n)

    try:
        if (Path(source) / "events").is_dir() or any(Path(source).glob("*/events")):
            write_json(Path(root) / SETTINGS, settings)
        summary = dsec.prepare(
            source,
            root,
            split=split,
            clip_us=1000 * clip_ms,
            hop_us=1000 * hop_ms,
            video_size=video_size,
            canvas=canvas,
            rectify=rectify,
            progress=show,  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        for bar in running.values():
            bar.close()
    summary["gb"] = sum(path.stat().st_size
                        for path in Path(root).rglob("*") if path.is_file()) / 1e9
    return summary


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        raise ParameterError(
            f"{path.parent} was begun with {name}={before.get(name)!r}, not {settings[name]!r}; "
            "choose another folder, or the same settings"
        )


def sentence(summary: Mapping[str, Any], root: str | Path) -> str:
    """The summary in plain words, notes below it."""
    done = f"{root}: {summary['clips']} clips of {summary['sequences']} sequences written"
    if summary["resumed"]:
        done += f", {summary['resumed']} sequences were there already"
    if summary["skipped"]:
        done += f", {summary['skipped']} windows skipped (fewer than five events, or no picture)"
    return "\n".join([
        f"{done}; the folder holds {summary['gb']:.3f} GB",
        *(f"note: {note}" for note in summary["notes"])
    ])


def simulated_source(source: str | Path, *, n_sequences: int = 2, seed: int = 0,
                     duration_s: float = 1.5) -> list[str]:
    """Make sure that ``source`` holds simulated sequences in DSEC's raw format, made once and found
    again. Returns: their names."""
    names = [f"simulated_{seed:02d}_{index:02d}" for index in range(n_sequences)]
    for index, name in enumerate(names):
        if not (Path(source) / name / "images" / "timestamps.txt").is_file():  # written last
            raw_sequence.write(Path(source) / name, seed=1000 * seed + index, duration_s=duration_s)
    return names


def table(root: str | Path) -> pd.DataFrame:
    """What a dataset folder holds, a clip a row: sequence, clip, start_s (from its sequence's first
    clip), events, events_per_s, width, height."""
    rows = []
    for record in folder.open_folder(root):
        stream = folder.load_events(record)
        start_us, end_us = record.t_us if record.t_us else (int(stream.t_us[0]),
                                                            int(stream.t_us[-1]) + 1)
        rows.append({
            "sequence": record.sequence, "clip": record.clip, "start_us": start_us,
            "events": len(stream), "events_per_s": len(stream) / ((end_us - start_us) / 1e6),
            "width": stream.width, "height": stream.height,
        })
    frame = pd.DataFrame(rows)
    frame.insert(2, "start_s",
                 (frame["start_us"] - frame.groupby("sequence")["start_us"].transform("min")) / 1e6)
    return frame.drop(columns="start_us")
