"""Raw DSEC sequences, cut into clips of the dataset folder (docs/sensors.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xsd.core import DatasetError, EventError
from xsd.sensors import event_files, folder, frames
from xsd.sensors import events as event_streams
from xsd.sensors.events import Events

WIDTH, HEIGHT = event_files.DSEC_SENSOR.values()


@dataclass(frozen=True)
class DsecSequence:
    """One raw sequence. image_times_us: int64 [T], absolute. rectify_path: None without a map."""

    name: str
    events_path: Path
    rectify_path: Path | None
    image_paths: tuple[Path, ...]
    image_times_us: np.ndarray


def open_sequence(folder_path: str | Path) -> DsecSequence:
    """Look at a raw sequence without reading its events. Raises: DatasetError for missing files,
    times that do not rise or are not one an image."""
    root = Path(folder_path)
    events_path = root / "events" / "left" / "events.h5"
    times_path = root / "images" / "timestamps.txt"
    images = root / "images" / "left" / "rectified"
    for path in (events_path, times_path, images):
        if not path.exists():
            raise DatasetError(f"{root} is not a raw DSEC sequence: {path.relative_to(root)} is "
                               "missing; unpack the sequence's archives there")
    try:
        times = np.array([int(line) for line in times_path.read_text().split()], np.int64)
    except ValueError as error:
        raise DatasetError(
            f"{times_path} must hold one whole number (µs) a line: {error}") from error
    paths = tuple(sorted(images.glob("*.png")))
    if len(paths) != len(times) or not len(paths):
        raise DatasetError(
            f"{root}: {len(paths)} images but {len(times)} timestamps; unpack the images again")
    if (np.diff(times) <= 0).any():
        raise DatasetError(f"{times_path}: the times do not rise; copy the file again")
    rectify = events_path.with_name("rectify_map.h5")
    return DsecSequence(root.name, events_path, rectify if rectify.is_file() else None, paths,
                        times)


def read_window(sequence: DsecSequence, start_us: int, end_us: int, *,
                rectify: bool = False) -> Events:
    """Events with start_us <= t < end_us (absolute µs), without reading the whole file. rectify:
    move each to its rectified pixel, dropping those that leave the sensor. Raises: EventError when
    the file is unreadable; DatasetError when a wanted rectify map is missing."""
    try:
        with event_files.h5_module(sequence.events_path).File(sequence.events_path, "r") as file:
            offset = int(file["t_offset"][()])
            index = file["ms_to_idx"]  # of each ms, the first event with t >= 1000 * ms
            first_ms = min(max((start_us - offset) // 1000, 0), len(index) - 1)
            last_ms = max(-(-(end_us - offset) // 1000), 0)
            group = file["events"]
            last = int(index[last_ms]) if last_ms < len(index) else len(group["t"])
            part = slice(int(index[first_ms]), last)
            columns = {name: group[name][part] for name in ("x", "y", "t", "p")}
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise EventError(f"{sequence.events_path} could not be read as DSEC events ({error}); "
                         "download it again") from error
    columns["t"] = columns["t"].astype(np.int64) + offset
    events = event_streams.from_columns(columns, width=WIDTH, height=HEIGHT,
                                        name=str(sequence.events_path)).between(start_us, end_us)
    return _rectified(sequence, events) if rectify else events


def _rectified(sequence: DsecSequence, events: Events) -> Events:
    if (path := sequence.rectify_path) is None:
        raise DatasetError(f"sequence {sequence.name} has no events/left/rectify_map.h5; unpack it "
                           "or leave rectification out")
    try:
        with event_files.h5_module(path).File(path, "r") as file:
            table = file["rectify_map"][:]
    except (OSError, KeyError) as error:
        raise EventError(f"{path} could not be read ({error}); download it again") from error
    moved = np.rint(table[events.y, events.x]).astype(np.int64)
    kept = (moved >= 0).all(axis=1) & (moved[:, 0] < WIDTH) & (moved[:, 1] < HEIGHT)
    x, y = moved[kept].T.astype(np.uint16)
    return Events(x, y, events.t_us[kept], events.p[kept], WIDTH, HEIGHT)


def prepare(source: str | Path, root: str | Path, *, split: str, clip_us: int = 1_000_000,
            hop_us: int = 500_000, video_size: tuple[int, int] | None = None,
            canvas: frames.Canvas = "slice", rectify: bool = False,
            progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Cut every raw sequence under ``source`` that is not in the index yet into a dataset folder.
    video_size: width and height to resize the images to. progress(sequence, clips done, in all).
    Returns: {sequences, clips, skipped (too few events), resumed (sequences that were there),
    notes}. Raises: as :func:`sequence_folders` and :func:`read_window`; StorageError."""
    begun = (Path(root) / folder.INDEX).is_file()
    done = {record.sequence for record in folder.open_folder(root)} if begun else set()
    summary: dict[str, Any] = {"sequences": 0, "clips": 0, "skipped": 0, "resumed": 0, "notes": []}
    for place in sequence_folders(source):
        if place.name in done:
            summary["resumed"] += 1
            continue
        sequence = open_sequence(place)
        times = sequence.image_times_us
        cuts = frames.windows(times, clip_us, hop_us)
        with folder.FolderWriter(root, split, source="recorded") as writer:
            for k, (start_us, end_us) in enumerate(cuts):
                events = read_window(sequence, start_us, end_us, rectify=rectify)
                inside = np.flatnonzero((times >= start_us) & (times < end_us))
                if len(events) < 5 or len(inside) == 0:
                    summary["skipped"] += 1
                    continue
                note = event_streams.official_limit_note(events)
                if note and not summary["notes"]:
                    summary["notes"].append(f"{place.name}/{k:06d}: {note}")
                chosen = inside[frames.uniform_indices(len(inside), 8)]
                pictures = [frames.read_image(sequence.image_paths[i], video_size) for i in chosen]
                writer.add(place.name, f"{k:06d}", events=events, video=np.stack(pictures),
                           event_frames=frames.event_frames(events, 5, canvas=canvas),
                           t_us=(start_us, end_us))
                summary["clips"] += 1
                if progress:
                    progress(place.name, k + 1, len(cuts))
        summary["sequences"] += 1
    return summary


def sequence_folders(source: str | Path) -> list[Path]:
    """The raw sequences under ``source``, or itself. Raises: DatasetError when there is none."""
    source = Path(source)
    if (source / "events").is_dir():
        return [source]
    found = sorted(path.parent for path in source.glob("*/events") if path.is_dir())
    if not found:
        raise DatasetError(f"there is no raw DSEC sequence in {source}; expected "
                           "<sequence>/events/left/events.h5")
    return found
