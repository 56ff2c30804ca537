"""Images to CLIP pixels, as transformers' CLIPImageProcessor (PIL path) makes them."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xsd.core import CheckpointError, DatasetError
from xsd.files import write_json
from xsd.models.checkpoint_files import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")

_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3,
          "rescale_factor": 1 / 255}
_LONGEST_EDGE = 4096
_LARGE = 100_000
"""Bytes of a picture from which several are resized at a time, each in a thread."""


@dataclass(frozen=True)
class PixelSpec:
    """resize: shortest edge; crop: side of the centre crop (pixels); mean, std of RGB."""

    resize: int
    crop: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """N images uint8 [H,W,3] to float32 [N,3,crop,crop]. Raises: DatasetError for others."""
        if len(images) == 0:
            raise DatasetError("there is no image to preprocess: a sample needs at least one event "
                               "frame and one video frame")
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise DatasetError(
                    f"an image is {image.dtype} {list(image.shape)}; uint8 [H, W, 3] is expected")
        at_once = len(images) > 1 and max(image.size for image in images) > _LARGE
        found = _workers(os.getpid()).map if at_once else map  # a prefill waits for these
        return torch.from_numpy(np.stack(list(found(self._one, images))))

    def _one(self, image: np.ndarray) -> np.ndarray:
        # transformers truncates the longer edge (int), it does not round.
        sides, short = image.shape[:2], min(image.shape[:2])
        height, width = (int(self.resize * side / short) for side in sides)
        if (height, width) != sides:
            picture = Image.fromarray(image)
            image = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        rows = image[top:top + self.crop, left:left + self.crop].transpose(2, 0, 1)
        pixels = (rows.astype(np.float64) * (1 / 255)).astype(np.float32)
        mean, std = (np.float32(values)[:, None, None] for values in (self.mean, self.std))
        return np.ascontiguousarray((pixels - mean) / std)

    def write(self, folder: str | Path) -> None:
        """Write preprocessor_config.json in transformers' layout."""
        crop = {"height": self.crop, "width": self.crop}
        write_json(Path(folder) / _FILES[0], {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "resample": 3,
            "do_resize": True, "size": {"shortest_edge": self.resize}, "do_center_crop": True,
            "crop_size": crop, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": self.mean, "image_std": self.std})


@functools.lru_cache(maxsize=1)
def _workers(process: int) -> ThreadPoolExecutor:
    """Lasting threads of a process, as many as a clip has pictures; none forks."""
    return ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1),
                              thread_name_prefix="xsd-pixels")


def read_pixel_spec(*folders: Path | None, image_size: int) -> PixelSpec:
    """The first preprocessor configuration found in the folders, else CLIP's with ``image_size``.
    Raises: CheckpointError if a file is not JSON, its crop is not ``image_size``, or it asks for
    pixels of another kind."""
    for path in (folder / name for folder in folders if folder for name in _FILES):
        if not path.is_file():
            continue
        found = read_json(path)
        inner = (found.get(name) for name in ("video_processor", "image_processor"))
        found = next((one for one in inner if isinstance(one, dict) and one), found)
        if "image_mean" not in found and "size" not in found:
            continue
        size = found.get("size", image_size)
        if isinstance(size, dict):
            size = size.get("shortest_edge") or size.get("height") or image_size
        crop = found.get("crop_size", size) if found.get("do_center_crop", True) else size
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if crop != image_size:
            raise CheckpointError(f"{path} crops to {crop} pixels but the vision tower reads "
                                  f"{image_size}; use the preprocessor file of this tower")
        mean, std = found.get("image_mean", CLIP_MEAN), found.get("image_std", CLIP_STD)
        other = [f"{name}={found[name]!r}" for name, ours in _STEPS.items()
                 if name in found and found[name] != ours]
        if type(size) is not int or not image_size <= size <= _LONGEST_EDGE:
            other.append(f"size={str(size)[:40]}")
        if not all(isinstance(three, (list, tuple)) and len(three) == 3 and
                   all(isinstance(one, (int, float)) and -10 < one < 10 for one in three)
                   for three in (mean, std)) or min(std) <= 0:
            other.append(f"image_mean={str(mean)[:40]}, image_std={str(std)[:40]}")
        if other:
            raise CheckpointError(f"{path} sets {', '.join(other)}; pictures are resized to "
                                  f"{image_size} … {_LONGEST_EDGE} pixels (bicubic), cropped, "
                                  "divided by 255 and normalised by three means and deviations")
        return PixelSpec(size, crop, tuple(mean), tuple(std))
    return PixelSpec(image_size, image_size)
