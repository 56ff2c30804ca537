"""Video files: their frames one after the other, and with their times."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xsd.core import VideoError, reading
from xsd.sensors import names

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601, as cameras and PIL's "L" have it."""


MOST_PIXELS, MOST_FRAMES, MOST_BYTES = 1 << 24, 100_000, 2 << 30
"""Of a picture; of a video; of what is kept of one."""
_KINDS = {"mov": rb".{4}(ftyp|moov|mdat|free|skip|wide)", "matroska": rb"\x1aE\xdf\xa3",
          "avi": rb"RIFF.{4}AVI ", "mpeg": rb"\0\0\x01\xba"}
"""What files of each of FFmpeg's containers begin with. It is told which to use: asked to guess, it
paints texts and follows play lists to other files."""
SUFFIXES = {".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska",
            ".avi": "avi", ".mpg": "mpeg", ".mpeg": "mpeg"}


@contextlib.contextmanager
def decoded(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """A video file's stream and frames (PyAV's). Raises: VideoError, also while it is read."""
    with reading(f"{path}: reading it needs the package av", VideoError, "pip install av"):
        import av
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise VideoError(f"{path}: videos of type {path.suffix or '(none)'} are not read; expected "
                         f"one of {', '.join(SUFFIXES)} or a folder of .png or .jpg images")
    names.check_plain(path, VideoError, "video file or folder of images")
    with reading(f"{path} does not decode as a video", VideoError,
                 "it may be cut off: make it again"):
        with open(path, "rb") as file:
            if not re.match(_KINDS[kind], file.read(16), re.DOTALL):
                raise VideoError(f"{path} does not decode as a video: it does not begin as "
                                 f"{path.suffix} files do; rename it, or make it again")
        # "file:", since FFmpeg takes what stands before a colon for a protocol
        with av.open(f"file:{path.resolve()}", format=kind,
                     options={"protocol_whitelist": "file"}) as container:
            shown = [one for one in container.streams.video  # a cover is a stream of one picture
                     if not one.disposition & av.stream.Disposition.attached_pic]
            if len(shown) != 1:
                many = f"{len(shown)} video streams; save the one to read alone"
                raise VideoError(f"{path} holds {many if shown else 'no video frame'}")
            stream = shown[0]
            if stream.sample_aspect_ratio not in (None, 0, 1):
                raise VideoError(f"{path}: its pixels are shown as {stream.sample_aspect_ratio}, "
                                 "not as squares; make it again with square pixels")
            if stream.format and any(one.is_alpha for one in stream.format.components):
                raise VideoError(f"{path} has transparent pixels, whose colour nobody knows; put "
                                 "it on a background before")
            if stream.width * stream.height > MOST_PIXELS:
                raise VideoError(f"{path}: frames of {stream.width}x{stream.height} pixels are not "
                                 f"read (at most {MOST_PIXELS}); scale the video down")
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield stream, container.decode(stream)


def upright(frame: Any, path: Path) -> np.ndarray:
    """A frame as players show it, uint8 [H, W, 3]: turned and mirrored as its file says. Raises:
    VideoError for a turn that is not by quarters."""
    picture = frame.to_ndarray(format="rgb24")
    for data in frame.side_data:
        if data.type.name != "DISPLAYMATRIX":
            continue
        right, down, _, right_of_y, down_of_y = np.frombuffer(data, np.int32)[:5] / 65536
        if abs(right) == abs(down_of_y) == 1 and down == right_of_y == 0:
            flips = right, down_of_y
        elif abs(down) == abs(right_of_y) == 1 and right == down_of_y == 0:
            picture, flips = picture.swapaxes(0, 1), (right_of_y, down)
        else:
            raise VideoError(f"{path} is to be shown turned by {frame.rotation} degrees; only "
                             "quarters are read: turn it before")
        picture = np.ascontiguousarray(picture[::int(flips[1]), ::int(flips[0])])
    return picture


def read(path: str | Path, *, max_seconds: float = 10.0,
         max_side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first ``max_seconds`` of a video file: frames uint8 [T, H, W, 3], at most ``max_side``
    long; times_us int64 [T], rising from 0 (by the average rate where a frame has no time)."""
    pictures: list[np.ndarray] = []
    times: list[int] = []
    path = Path(path)
    with decoded(path) as (stream, frames):
        step_us = max(1, int(1e6 / float(stream.average_rate))) if stream.average_rate else 40_000
        for frame in frames:
            time_us = None
            if frame.pts is not None and frame.time_base is not None:
                time_us = int(frame.pts * frame.time_base * 1_000_000)
            if time_us is None or (times and time_us <= times[-1]):
                time_us = times[-1] + step_us if times else 0
            if times and time_us - times[0] > max_seconds * 1e6:
                break
            picture = upright(frame, path)
            if max_side and max(sides := picture.shape[:2]) > max_side:
                height, width = (max(1, round(side * max_side / max(sides))) for side in sides)
                small = Image.fromarray(picture).resize((width, height), Image.Resampling.BOX)
                picture = np.asarray(small)
            pictures.append(picture)
            times.append(time_us)
            if (n := len(pictures)) > min(MOST_FRAMES, MOST_BYTES // pictures[-1].nbytes):
                raise VideoError(f"{path}: {n} frames of its first {max_seconds} s are more than "
                                 "fits; give less max_seconds or max_side")
    return _stacked(pictures, path), np.array(times, np.int64) - times[0]


def sampled(path: Path, choose: Callable[[int], list[int]]) -> np.ndarray:
    """The frames that ``choose`` names of so many, uint8 [n, H, W, 3]. Raises: VideoError."""
    # Counted first: one frame in memory at a time, and a container's own count is often wrong.
    with decoded(path) as (_, frames):
        n_available = sum(1 for _ in itertools.islice(frames, MOST_FRAMES + 1))
    if n_available > MOST_FRAMES:
        raise VideoError(f"{path} holds more than {MOST_FRAMES} frames; a clip is a short video")
    wanted = choose(n_available) if n_available else []
    with decoded(path) as (_, frames):
        pictures = {i: upright(frame, path)
                    for i, frame in enumerate(itertools.islice(frames, max(wanted, default=0) + 1))
                    if i in wanted}
    return _stacked([pictures[i] for i in wanted], path)


def _stacked(pictures: list[np.ndarray], path: Path) -> np.ndarray:
    if not pictures:
        raise VideoError(f"{path} holds no video frame")
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError(f"{path}: the frames change their size; make it again in one size")
    return np.stack(pictures)


def luminance(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] to float32 [T, H, W], 0…255."""
    return frames.astype(np.float32) @ LUMA
