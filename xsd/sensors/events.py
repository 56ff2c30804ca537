"""Event streams: the record, its checks, and its files (docs/sensors.md, section 3)."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from xsd.core import EventError, VideoError
from xsd.files import atomic_write
from xsd.sensors import event_files

OFFICIAL_LIMIT_US = 100_000
"""The official EventGPT code refuses streams this long (it was tuned for 50 ms)."""
MOST_PIXELS, LONGEST_SIDE, LONGEST_US = 1 << 23, 1 << 14, 24 * 3600 * 1_000_000
"""Of a sensor and of a recording: what is larger is no event camera's (65535 is a -1 that was
wrapped), but takes the memory."""


@dataclass(frozen=True, eq=False)
class Events:
    """N events. x, y: uint16 [N] pixels; t_us: int64 [N] µs; p: uint8 [N], 1 (ON) where a pixel got
    brighter, 0 (OFF) darker. width, height: of the sensor, where known."""

    x: np.ndarray
    y: np.ndarray
    t_us: np.ndarray
    p: np.ndarray
    width: int | None = None
    height: int | None = None

    def __len__(self) -> int:
        return len(self.t_us)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sensor; where unknown, the largest x and y plus one."""
        return (int(self.x.max()) + 1 if self.width is None else self.width,
                int(self.y.max()) + 1 if self.height is None else self.height)

    def between(self, start_us: int, end_us: int) -> Self:
        """Events with start_us <= t < end_us; the stream must be in order of time."""
        first, last = np.searchsorted(self.t_us, [start_us, end_us], side="left")
        return self.where(slice(first, last))

    def where(self, chosen: slice | np.ndarray) -> Self:
        """The events that a slice, a mask or indices choose."""
        return Events(self.x[chosen], self.y[chosen], self.t_us[chosen], self.p[chosen], self.width,
                      self.height)


def empty(width: int | None = None, height: int | None = None) -> Events:
    """A stream of no event."""
    x, y, t_us, p = (np.empty(0, dtype) for dtype in (np.uint16, np.uint16, np.int64, np.uint8))
    return Events(x, y, t_us, p, width, height)


def join(streams: Sequence[Events]) -> Events:
    """One stream after the other (no sorting); the sensor size is the first one's."""
    if not streams:
        return empty()
    columns = (np.concatenate([getattr(stream, name) for stream in streams])
               for name in ("x", "y", "t_us", "p"))
    return Events(*columns, streams[0].width, streams[0].height)


def from_columns(columns: Mapping[str, Any], *, width: int | None = None, height: int | None = None,
                 name: str = "the event stream") -> Events:
    """Events from arrays of whole numbers under x, y, t, p (p may be bool, 0/1 or -1/1), which may
    be stored as floats; t_offset is added to t. Raises: EventError for missing columns or numbers
    that are none of these; nothing is rounded or wrapped."""
    found: dict[str, np.ndarray] = {}
    for column, spellings in event_files.SPELLINGS.items():
        keys = [spelling for spelling in spellings if spelling in columns]
        if len(keys) != 1:
            there = ", ".join(str(key)[:40] for key in list(columns)[:20]) or "nothing"
            what = f"no column {column!r}" if not keys else f"several columns for {column!r}"
            raise EventError(f"{name} has {what} (found: {there}); events need x, y, t and p")
        found[column] = _whole(np.asarray(columns[keys[0]]), column, name)
    if len({len(values) for values in found.values()}) > 1:
        said = ", ".join(f"{column} {len(values)}" for column, values in found.items())
        raise EventError(f"{name}: columns differ in length ({said})")
    x, y, t, p = found.values()
    if p.dtype.str[1:] == "u4":
        p = p.astype(np.int32)  # v2e writes its -1 as 4294967295
    in_sensor, offset = "pixel coordinates must lie in the sensor, from 0 on", 1 << 61
    for what, values, lowest, highest, hint in (
            ("x", x, 0, LONGEST_SIDE - 1, in_sensor), ("y", y, 0, LONGEST_SIDE - 1, in_sensor),
            ("t", t, -offset, offset, "expected microseconds"),
            ("polarity", p, -1, 1, "expected 0 or -1 (OFF) and 1 (ON)")):
        if values.size and (values.min() < lowest or values.max() > highest):
            raise EventError(f"{name}: {what} runs from {values.min()} to {values.max()}; {hint}")
    if (p < 0).any() and (p == 0).any():
        raise EventError(f"{name}: polarity holds both -1 and 0; OFF is one of the two")
    offset = columns.get("t_offset", 0)
    if abs(offset) > 1 << 61:
        raise EventError(f"{name}: t_offset is {offset}; expected microseconds")
    return Events(x.astype(np.uint16), y.astype(np.uint16), t.astype(np.int64) + offset,
                  (p > 0).astype(np.uint8), width, height)


def _whole(values: np.ndarray, column: str, name: str) -> np.ndarray:
    """The column, if it holds nothing but whole numbers, exactly."""
    kinds = "biuf" if column == "p" else "iuf"
    good = values.ndim == 1 and values.dtype.kind in kinds
    if good and values.dtype.kind == "f" and values.size:
        # beyond this a float skips whole numbers: the times were rounded when they were saved
        exact = 2 ** (np.finfo(values.dtype).nmant + 1)
        good = bool(np.isfinite(values).all() and (np.rint(values) == values).all()
                    and np.abs(values).max() <= exact)
    if not good:
        raise EventError(f"{name}: column {column!r} is {values.dtype} of shape {values.shape}, "
                         "which is not read; expected whole numbers [N], t in microseconds "
                         "(seconds times 1e6, rounded)")
    return values


def check_events(events: Events, name: str = "the event stream") -> None:
    """Raises: EventError when the stream is empty, not in order of time, or outside its sensor."""
    if len(events) == 0:
        raise EventError(f"{name} is empty; at least one event is needed (choose another clip or a "
                         "longer window)")
    times = events.t_us
    backwards = np.flatnonzero(np.diff(times) < 0)
    if backwards.size:
        first = backwards[0]
        raise EventError(f"{name} is not sorted by time: event {first + 1} at {times[first + 1]} "
                         f"µs follows {times[first]} µs; sort by t before saving")
    if times[0] < 0:
        raise EventError(f"{name} begins at {times[0]} µs; times must not be negative")
    if times[-1] - times[0] > LONGEST_US:
        raise EventError(f"{name} runs from {times[0]} to {times[-1]} µs, more than a day; "
                         "expected t in microseconds")
    for axis, values, size in (("x", events.x, events.width), ("y", events.y, events.height)):
        if size is not None and values.max() >= size:
            raise EventError(
                f"{name}: {axis} reaches {values.max()} but the sensor is {events.width}x"
                f"{events.height} (width x height); give its right size (width and height of "
                "read_events, sensor_size of notebook 09)")
    if math.prod(events.size) > MOST_PIXELS:
        raise EventError(f"{name}: a sensor of {events.size[0]}x{events.size[1]} pixels; at most "
                         f"{MOST_PIXELS} in all are painted")


def official_limit_note(events: Events) -> str | None:
    """What to say where the official EventGPT code would refuse the stream (100 ms or longer)."""
    duration = int(events.t_us[-1] - events.t_us[0]) if len(events) else 0
    if duration < OFFICIAL_LIMIT_US:
        return None
    return (f"the stream lasts {duration / 1000:.1f} ms; the official EventGPT code, tuned for 50 "
            "ms, refuses 100 ms and more; used here all the same")


def read_events(path: str | Path, *, width: int | None = None, height: int | None = None) -> Events:
    """Read and check an event file. width, height: of the sensor, if the file does not say.
    Raises: as event_files.read_columns, from_columns and check_events."""
    return checked(event_files.read_columns(Path(path)), str(path), width=width, height=height)


def checked(columns: Mapping[str, Any], name: str, *, width: int | None = None,
            height: int | None = None) -> Events:
    """Events from the columns of a file, checked. Raises: as from_columns and check_events."""
    size: dict[str, int] = {}
    for axis, given in (("width", width), ("height", height)):
        if (side := columns.get(axis) if given is None else given) is not None:
            side = np.asarray(side)
            if side.size != 1 or side.dtype.kind not in "iu" or not (
                    1 <= side.item() <= LONGEST_SIDE):
                raise EventError(f"{name}: its {axis} is not one whole number from 1 to "
                                 f"{LONGEST_SIDE}")
            size[axis] = side.item()
    events = from_columns(columns, name=name, **size)
    check_events(events, name)
    return events


def write_events(path: str | Path, events: Events) -> None:
    """Write the dataset's pickled dict in a ``.npy``; the same events give the same bytes."""
    content: dict[str, Any] = {
        "x": np.array(events.x, np.uint16), "y": np.array(events.y, np.uint16),
        "t": np.array(events.t_us, np.int64), "p": np.array(events.p, np.uint8)}
    if events.width is not None and events.height is not None:
        content |= {"width": int(events.width), "height": int(events.height)}
    buffer = io.BytesIO()
    np.save(buffer, content, allow_pickle=True)
    atomic_write(path, buffer.getvalue())


@dataclass(frozen=True, eq=False)
class Recording:
    """frames: uint8 [T, H, W] grey or [T, H, W, 3], perhaps none. times_us: int64 [T], rising."""

    events: Events
    frames: np.ndarray
    times_us: np.ndarray


def read_aedat4(path: str | Path, **size: int | None) -> Recording:
    """Events and frames of an ``.aedat4`` file (DAVIS cameras); a frame's time is the middle of its
    exposure. size and Raises: as :func:`read_events`; VideoError for frames of other kinds."""
    found = event_files.read_columns(Path(path))
    frames, times = found["frames"], found["times"].astype(np.int64)
    kinds = set(found["formats"].tolist())
    if kinds == {"I;16"}:
        frames = (frames >> 8).astype(np.uint8)
    elif kinds not in (set(), {"L"}, {"RGB"}):
        raise VideoError(f"{path}: its frames are {', '.join(sorted(kinds))}; expected grey "
                         "or RGB")
    if (np.diff(times) <= 0).any():
        raise VideoError(f"{path}: the times of its frames do not rise; record it again")
    return Recording(checked(found, str(path), **size), frames, times)
