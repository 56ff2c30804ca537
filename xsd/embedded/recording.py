"""Real recordings of events and frames: one sensor, one clock (docs/sensors.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xsd.core import VideoError
from xsd.sensors import event_files
from xsd.sensors import events as event_streams
from xsd.sensors.events import Events


@dataclass(frozen=True, eq=False)
class Recording:
    """frames: uint8 [T, H, W] grey or [T, H, W, 3]; T is 0 where the sensor takes none. times_us:
    int64 [T], rising."""

    events: Events
    frames: np.ndarray
    times_us: np.ndarray


def read_aedat4(path: str | Path, **size: int | None) -> Recording:
    """Events and frames of an ``.aedat4`` file (DAVIS cameras); a frame's time is the middle of its
    exposure. size and Raises: as in sensors.events.read_events; VideoError when its frames cannot
    be shown."""
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
    return Recording(event_streams.checked(found, str(path), **size), frames, times)
