"""Pictures: event frames and video frames (docs/sensors.md, section 4)."""

import itertools
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from xsd.core import EventError, ParameterError, VideoError, reading
from xsd.sensors import names, timed_video
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
    pictures = []
    for k, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = events.where(slice(first, last))
        if canvas == "slice":
            if not len(part):
                raise EventError(f"time slice {k} of {n_frames} holds no event, so its canvas has "
                                 "no size; use canvas='sensor' or by='count'")
            width, height = int(part.x.max()) + 1, int(part.y.max()) + 1
        painted = np.full(3 * width * height, 255, np.uint8)
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
    """Start and end in µs of every whole clip on the clock of the pictures (int64 [T], rising).
    Raises: VideoError where that is a million clips and more."""
    gap = int(np.median(np.diff(times_us))) if len(times_us) > 1 else 0  # the last picture's
    starts = range(int(times_us[0]), int(times_us[-1]) + gap - clip_us + 1, hop_us)
    if len(starts) >= 1_000_000:
        raise VideoError(f"{len(times_us)} pictures from {times_us[0]} to {times_us[-1]} µs make "
                         f"{len(starts)} clips; check the times or choose a longer hop")
    return [(start, start + clip_us) for start in starts]


def size_of(text: str) -> tuple[int, int] | None:
    """``"480x360"`` as (width, height), at most 4096 each; empty: None. Raises: ParameterError."""
    if not text:
        return None
    width, sign, height = text.lower().partition("x")
    if not (sign and all(re.fullmatch("[0-9]{1,4}", side) and 0 < int(side) <= 4096
                         for side in (width, height))):
        raise ParameterError(f"a size is written WxH, such as 480x360, not {text!r}, and at "
                             "most 4096x4096")
    return int(width), int(height)


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A .png or .jpg as uint8 [H, W, 3], turned as its camera says, 16-bit grey scaled to 8 bits,
    resized to ``size`` (width, height). Raises: VideoError for no image and for kinds whose values
    would change on the way (docs/sensors.md, section 4)."""
    names.check_plain(path, VideoError, "image")
    with reading(f"{path} does not decode as an image", VideoError, "write it again as .png or "
                 ".jpg"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # asked here, unopened
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > timed_video.MOST_PIXELS:
                raise VideoError(f"{path}: a picture of {image.width}x{image.height} pixels is not "
                                 f"read (at most {timed_video.MOST_PIXELS}); scale it down")
            if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
                raise VideoError(f"{path} is animated; write its frames as one .png each")
            picture = _eight_bits(ImageOps.exif_transpose(image), path)
        return np.asarray(picture.resize(size, Image.Resampling.BICUBIC) if size else picture)


def _eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L") and not image.has_transparency_data:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise VideoError(f"{path}: grey values of more than 16 bits are not read")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA") if image.mode != "I;16" else image
        if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] < 255:
            raise VideoError(f"{path} has transparent pixels, whose colour nobody knows; put it on "
                             "a background before")
    elif image.mode not in ("1", "L", "P", "RGB"):
        raise VideoError(f"{path}: pictures of kind {image.mode} are not read; save it as RGB")
    return image.convert("RGB")


def in_order(paths: Iterable[Path]) -> list[Path]:
    """By the numbers in their names (2 before 10). Raises: VideoError where they leave it open."""
    numbers = {path: tuple(int(part) if k % 2 else part for k, part in
                           enumerate(re.split(r"(\d+)", path.stem))) for path in sorted(paths)}
    if any(len(parts) > 1 for parts in numbers.values()):
        one, other = (f([(parts[::2], path.name) for path, parts in numbers.items()])
                      for f in (min, max))
        if one[0] != other[0]:
            raise VideoError(f"{next(iter(numbers)).parent}: {one[1]} and {other[1]} are numbered "
                             "in two ways, which leaves their order open; name all frames alike")
    ordered = sorted(numbers, key=numbers.__getitem__)
    decimal = next((path for path in ordered if re.search(r"[0-9][.,][0-9]", path.stem)), None)
    if decimal and ordered != list(numbers):
        raise VideoError(f"{decimal.parent}: {decimal.name} and others have decimal numbers of "
                         "several lengths; number the frames 000000, 000001, …")
    for one, other in itertools.pairwise(ordered):
        if numbers[one] == numbers[other]:
            raise VideoError(f"{one.parent} holds {one.name} and {other.name}, twice the same "
                             "frame; keep one of them")
    return ordered


def images_in(folder: Path) -> list[Path]:
    """The .png and .jpg files of a folder that are not hidden, in order. Raises: VideoError."""
    with reading(f"{folder} cannot be read", VideoError, "give a folder of .png or .jpg images"):
        found = [path for path in folder.iterdir()
                 if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not found:
        raise VideoError(f"{folder} holds no frame; expected .png or .jpg images")
    return in_order(found)


def read_video(path: str | Path, n_frames: int = 8) -> np.ndarray:
    """Uniformly sampled frames of a video file or a folder of images: uint8 [n_frames, H, W, 3].
    Raises: VideoError for no frame, one that does not decode, images that differ in size."""
    path = Path(path)
    if not path.is_dir():
        return timed_video.sampled(path, lambda n: uniform_indices(n, n_frames))
    return read_frames(images_in(path), n_frames)


def read_frames(images: Sequence[Path], n_frames: int = 8) -> np.ndarray:
    """Uniformly sampled of these pictures: uint8 [n_frames, H, W, 3]. Raises: VideoError."""
    wanted = uniform_indices(len(images), n_frames)
    pictures = {i: read_image(images[i]) for i in dict.fromkeys(wanted)}
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise VideoError(f"{images[0].parent}: the images differ in size; a video's frames must "
                         "all agree")
    return np.stack([pictures[i] for i in wanted])
