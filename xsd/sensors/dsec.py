"""Raw DSEC sequences, cut into clips of the dataset folder (docs/sensors.md, section 6)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xsd.core import DatasetError, EventError, reading
from xsd.sensors import containers, event_files, folder, frames
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
        if not (path.is_dir() if path == images else path.is_file()):
            raise DatasetError(f"{root} is not a raw DSEC sequence: {path.relative_to(root)} is "
                               "missing; unpack the sequence's archives there")
    with reading(f"{times_path} must hold one whole number (µs) a line", DatasetError,
                 "copy the file again"), open(times_path, encoding="utf-8-sig") as file:
        lines = file.read(1 << 24).split()  # more than any sequence's
        times = np.array([int(line) for line in lines], np.int64)
    paths = tuple(frames.in_order(images.glob("*.png")))
    if len(paths) != len(times) or not len(paths):
        raise DatasetError(
            f"{root}: {len(paths)} images but {len(times)} timestamps; unpack the images again")
    if (np.diff(times) <= 0).any():
        raise DatasetError(f"{times_path}: the times do not rise; copy the file again")
    if times[0] < 0 or times[-1] - times[0] > event_streams.LONGEST_US:
        raise DatasetError(f"{times_path}: the times run from {times[0]} to {times[-1]} µs, more "
                           "than a day; copy the file again")
    rectify = events_path.with_name("rectify_map.h5")
    return DsecSequence(root.resolve().name, events_path, rectify if rectify.is_file() else None,
                        paths, times)


def read_window(sequence: DsecSequence, start_us: int, end_us: int, *,
                rectify: bool = False) -> Events:
    """Events with start_us <= t < end_us (absolute µs), without reading the whole file. rectify:
    move each to its rectified pixel, dropping those that leave the sensor. Raises: EventError when
    the file is unreadable; DatasetError when a wanted rectify map is missing."""
    path = sequence.events_path
    with reading(f"{path} could not be read as DSEC events", EventError, "download it again"), \
            containers.open_h5(path) as file:
        offset, index = containers.h5_number(file, "t_offset"), _column(file, "ms_to_idx")
        columns = {name: _column(file, f"events/{name}") for name in ("x", "y", "t", "p")}
        t = columns["t"]  # of each ms, ms_to_idx has the first event with t >= 1000 * ms
        first_ms = min(max((start_us - offset) // 1000, 0), len(index) - 1)
        last_ms = max(-(-(end_us - offset) // 1000), 0)
        last = int(index[last_ms]) if last_ms < len(index) else len(t)
        first = int(index[first_ms])
        read = {name: containers.h5_part(file, column, slice(first, last))
                for name, column in columns.items()}
        events = event_streams.from_columns(read | {"t_offset": offset}, width=WIDTH,
                                            height=HEIGHT, name=str(path))
        if not (0 <= first <= last <= len(t)
                and (first == 0 or t[first - 1] < 1000 * first_ms)
                and (last == len(t) or t[last] >= 1000 * last_ms)):
            raise EventError(f"{path}: ms_to_idx does not lead to the events from {first_ms} "
                             f"to {last_ms} ms; download it again")
    if len(events):
        event_streams.check_events(events, str(path))
    events = events.between(start_us, end_us)
    return _rectified(sequence, events) if rectify else events


def _column(file: Any, name: str) -> Any:
    node = containers.h5_node(file, name)
    if node is None or not hasattr(node, "dtype") or len(node.shape) != 1:
        raise EventError(f"{file.filename} could not be read as DSEC events: it has no column "
                         f"{name}; download it again")
    return node


def _rectified(sequence: DsecSequence, events: Events) -> Events:
    if (path := sequence.rectify_path) is None:
        raise DatasetError(f"sequence {sequence.name} has no events/left/rectify_map.h5; unpack it "
                           "or leave rectification out")
    with reading(f"{path} could not be read", EventError, "download it again"), \
            containers.open_h5(path) as file:
        node = containers.h5_node(file, "rectify_map")
        if node.shape != (HEIGHT, WIDTH, 2) or node.dtype.kind != "f":
            raise ValueError(f"rectify_map is {node.dtype} {node.shape}")
        table = containers.h5_part(file, node)
    moved = np.rint(table[events.y, events.x])
    kept = ((moved >= 0) & (moved < [WIDTH, HEIGHT])).all(axis=1)  # NaN is neither
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
    source = Path(source).resolve()  # its name is the sequence's
    if (source / "events").is_dir():
        return [source]
    found = sorted(path.parent for path in source.glob("*/events") if path.is_dir())
    if not found:
        raise DatasetError(f"there is no raw DSEC sequence in {source}; expected "
                           "<sequence>/events/left/events.h5")
    return found
