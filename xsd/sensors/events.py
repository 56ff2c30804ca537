"""Event streams: one record, safe reading of the usual files, checks, and the dataset's own file.

An event says that one pixel got brighter (ON, p = 1) or darker (OFF, p = 0) at one time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Events:
    """N events. x, y: uint16 [N] pixels; t_us: int64 [N] µs; p: uint8 [N], 0 OFF, 1 ON. width, height: of the sensor, where known."""

    x: np.ndarray
    y: np.ndarray
    t_us: np.ndarray
    p: np.ndarray
    width: int | None = None
    height: int | None = None

    def __len__(self) -> int:
        return len(self.t_us)

    def between(self, start_us: int, end_us: int) -> Events:
        """Events with start_us <= t < end_us; the stream must be in order of time."""
        first, last = np.searchsorted(self.t_us, [start_us, end_us], side="left")
        return Events(self.x[first:last], self.y[first:last], self.t_us[first:last], self.p[first:last], self.width, self.height)


def empty(width: int | None = None, height: int | None = None) -> Events:
    """A stream of no event."""
    return Events(np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.int64), np.empty(0, np.uint8), width, height)


def join(streams: Sequence[Events]) -> Events:
    """One stream after the other (no sorting); the sensor size is the first one's."""
    if not streams:
        return empty()
    columns = (np.concatenate([getattr(stream, name) for stream in streams]) for name in ("x", "y", "t_us", "p"))
    return Events(*columns, streams[0].width, streams[0].height)
