"""Pictures: event frames and video frames (docs/sensors.md, section 4)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from xsd.core import EventError, VideoError
from xsd.sensors import timed_video
from xsd.sensors.events import Events

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
Canvas = Literal["slice", "sensor"]


def event_frames(events: Events, n_frames: int = 5, *, canvas: Canvas = "slice",
                 by: Literal["count", "time"] = "count") -> list[np.ndarray]:
    """n_frames images uint8 [H, W, 3]: slices of the stream on white, OFF blue and ON red, the last
    event of a pixel winning. canvas: ``slice`` is the official size (the slice's largest x and y,
    plus one). by: ``count`` is the official cut, N // n_frames events each and the rest in the
    last; ``time`` equal durations. Raises: EventError for fewer events than frames, events outside
    the sensor, or an empty slice on the slice canvas."""
    if n_frames < 1:
        raise EventError(f"{n_frames} event frames were asked for; at least one is needed")
    if len(events) < n_frames:
        raise EventError(f"the stream holds {len(events)} events, too few for {n_frames} event "
                         "frames; choose a longer window")
    if by == "count":
        bounds = [i * (len(events) // n_frames) for i in range(n_frames)] + [len(events)]
    else:
        edges = np.linspace(events.t_us[0], events.t_us[-1], n_frames + 1)[1:-1]
        bounds = [0, *np.searchsorted(events.t_us, edges).tolist(), len(events)]
    right, lowest, (width, height) = events.x.max(), events.y.max(), events.size
    if right >= width or lowest >= height:
        raise EventError(f"events reach x {right}, y {lowest} but the sensor is {width}x{height} "
                         "(width x height)")
    cuts = list(itertools.pairwise(bounds))
    sizes = [(width, height)] * n_frames
    if canvas == "slice":
        for k, (first, last) in enumerate(cuts):
            if first == last:
                raise EventError(f"time slice {k} of {n_frames} holds no event, so its canvas has "
                                 "no size; use canvas='sensor' or by='count'")
            sizes[k] = int(events.x[first:last].max()) + 1, int(events.y[first:last].max()) + 1

    pictures = []
    for (first, last), (width, height) in zip(cuts, sizes, strict=True):
        painted = np.full(3 * width * height, 255, np.uint8)
        part = events.where(slice(first, last))
        red_byte = (part.y.astype(np.intp) * width + part.x) * 3
        painted[red_byte] = 255 * part.p  # where a pixel is named twice, numpy keeps the last
        painted[red_byte + 1] = 0
        painted[red_byte + 2] = 255 * (1 - part.p)
        pictures.append(painted.reshape(height, width, 3))
    return pictures


def uniform_indices(n_available: int, n_frames: int) -> list[int]:
    """floor(linspace(0, n_available - 1, n_frames)), in whole numbers: no rounding to go wrong.
    Raises: VideoError when nothing is available."""
    if n_available < 1 or n_frames < 1:
        raise VideoError(
            f"cannot sample {n_frames} frames from {n_available}; a video needs at least one frame")
    return [i * (n_available - 1) // max(1, n_frames - 1) for i in range(n_frames)]


def windows(times_us: np.ndarray, clip_us: int = 1_000_000,
            hop_us: int = 500_000) -> list[tuple[int, int]]:
    """Start and end in µs of every whole clip on the clock of the pictures (int64 [T], rising)."""
    gap = int(np.median(np.diff(times_us))) if len(times_us) > 1 else 0  # the last picture's
    last = int(times_us[-1]) + gap - clip_us
    return [(start, start + clip_us) for start in range(int(times_us[0]), last + 1, hop_us)]


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3], resized to ``size`` (width, height). Raises: VideoError for no image."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
            return np.asarray(picture.resize(size, Image.Resampling.BICUBIC) if size else picture)
    except FileNotFoundError as error:
        raise VideoError(f"{path}: there is no such image") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"{path} does not decode as an image ({error}); write it again") from error


def read_video(path: str | Path, n_frames: int = 8) -> np.ndarray:
    """Uniformly sampled frames of a video file or a folder of images: uint8 [n_frames, H, W, 3].
    Raises: VideoError for no frame, one that does not decode, images that differ in size."""
    path = Path(path)
    if path.is_dir():
        images = sorted(file for file in path.iterdir()
                        if file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith("."))
        if not images:
            raise VideoError(f"{path} holds no frame; expected .png or .jpg images")
        wanted = uniform_indices(len(images), n_frames)
        pictures = {i: read_image(images[i]) for i in dict.fromkeys(wanted)}
        if len({picture.shape for picture in pictures.values()}) > 1:
            raise VideoError(f"{path}: the images differ in size; a video's frames must all agree")
    else:
        # Counted first: one frame in memory at a time, and a container's own count is often wrong.
        with timed_video.decoded(path) as (_, frames):
            n_available = sum(1 for _ in frames)
        if n_available == 0:
            raise VideoError(f"{path} holds no video frame")
        wanted = uniform_indices(n_available, n_frames)
        with timed_video.decoded(path) as (_, frames):
            pictures = {i: frame.to_ndarray(format="rgb24")
                        for i, frame in enumerate(frames) if i in wanted}
    return np.stack([pictures[i] for i in wanted])
