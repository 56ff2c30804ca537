"""Real recordings of events and frames: one sensor, one clock (docs/sensors.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xsd.core import VideoError
from xsd.sensors import events as event_streams
from xsd.sensors.events import Events


@dataclass(frozen=True, eq=False)
class Recording:
    """frames: uint8 [T, H, W] grey or [T, H, W, 3]. times_us: int64 [T], rising."""

    events: Events
    frames: np.ndarray
    times_us: np.ndarray


def read_aedat4(path: str | Path) -> Recording:
    """Events and frames of an ``.aedat4`` file (DAVIS cameras); a frame's time is the middle of its
    exposure. Raises: as sensors.events.read_events; VideoError when it holds no frame."""
    events = event_streams.read_events(path)
    import aedat  # read_events has explained itself if it is missing

    try:
        found = [packet["frame"] for packet in aedat.Decoder(str(path)) if "frame" in packet]
    except RuntimeError as error:
        raise VideoError(f"{path}: its frames do not decode ({error}); the file may be cut off: "
                         "copy it again") from error
    if not found:
        raise VideoError(
            f"{path} holds no frame; expected a recording with events and frames (a DAVIS camera)")
    return Recording(events, np.stack([frame["pixels"] for frame in found]),
                     np.array([frame["t"] for frame in found], np.int64))
