"""Video files: their frames one after the other, and with their times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xsd.core import VideoError

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601, as cameras and PIL's "L" have it."""


@contextlib.contextmanager
def decoded(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """A video file's stream and frames (PyAV's). Raises: VideoError, also while it is read."""
    try:
        import av
    except ImportError as error:
        raise VideoError(f"{path}: reading video files needs the package av (pip install av); or "
                         "give a folder of .png images") from error
    if not path.is_file():
        raise VideoError(f"{path}: there is no such video file or folder of images")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video frame")
            stream = container.streams.video[0]
            yield stream, container.decode(stream)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path} does not decode as a video ({error}); it may be cut off: make it "
                         "again") from error


def read(path: str | Path, *, max_seconds: float = 10.0,
         max_side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first ``max_seconds`` of a video file: frames uint8 [T, H, W, 3], at most ``max_side``
    long; times_us int64 [T], rising from 0 (by the average rate where a frame has no time)."""
    pictures: list[np.ndarray] = []
    times: list[int] = []
    with decoded(Path(path)) as (stream, frames):
        step_us = int(1e6 / float(stream.average_rate)) if stream.average_rate else 40_000
        for frame in frames:
            time_us = None
            if frame.pts is not None and frame.time_base is not None:
                time_us = int(frame.pts * frame.time_base * 1_000_000)
            if time_us is None or (times and time_us <= times[-1]):
                time_us = times[-1] + step_us if times else 0
            if times and time_us - times[0] > max_seconds * 1e6:
                break
            pictures.append(_small(frame.to_ndarray(format="rgb24"), max_side))
            times.append(time_us)
    if not pictures:
        raise VideoError(f"{path} holds no video frame")
    return np.stack(pictures), np.array(times, np.int64) - times[0]


def _small(picture: np.ndarray, max_side: int | None) -> np.ndarray:
    sides = picture.shape[:2]
    if max_side is None or max(sides) <= max_side:
        return picture
    height, width = (max(1, round(side * max_side / max(sides))) for side in sides)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def luminance(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] to float32 [T, H, W], 0…255."""
    return frames.astype(np.float32) @ LUMA
