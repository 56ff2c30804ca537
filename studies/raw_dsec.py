"""Simulated drives in DSEC's own raw format, which notebook 08 prepares where it is given none
(docs/sensors.md, section 6). Luminance is rendered small and enlarged, which makes edges softer
than a real sensor's."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xsd.core import DatasetError
from xsd.embedded import dvs, scenes
from xsd.embedded.drive import LUMINANCE_HZ, VIDEO_HZ
from xsd.embedded.render import Renderer
from xsd.files import FolderLock, atomic_write
from xsd.sensors import containers, dsec
from xsd.sensors import events as event_streams
from xsd.sensors.timed_video import LUMA

CLOCK_START_US = 51_648_500_000
"""DSEC's clock is absolute; this is an arbitrary moment on it."""


def ensure(source: str | Path, *, n_sequences: int = 2, seed: int = 0,
           duration_s: float = 1.5) -> None:
    """Make sure that ``source`` holds simulated sequences."""
    with FolderLock(source):
        for index in range(n_sequences):
            place = Path(source) / f"simulated_{seed:02d}_{index:02d}"
            if not (place / "images" / "timestamps.txt").is_file():  # written last
                write(place, seed=1000 * seed + index, duration_s=duration_s)


def write(folder: str | Path, *, seed: int, duration_s: float = 1.5,
          image_size: tuple[int, int] = (360, 270),
          rendered: tuple[int, int] = (160, 120)) -> dict[str, Any]:
    """Write events, rectify map, rectified images (DSEC: 1440 x 1080) and timestamps. Returns:
    {events, images, duration_s}. Raises: DatasetError when the folder holds a sequence already."""
    folder = Path(folder)
    timestamps = folder / "images" / "timestamps.txt"
    if timestamps.exists():
        raise DatasetError(f"{folder} holds a raw sequence already; choose another folder")
    rng = np.random.default_rng([seed, 7])
    renderer = Renderer(scenes.sample_scene(rng), *rendered)
    simulator = dvs.DvsSimulator(dsec.HEIGHT, dsec.WIDTH, dvs.DvsConfig(), rng)
    pictures = folder / "images" / "left" / "rectified"
    pictures.mkdir(parents=True, exist_ok=True)
    parts, times = [], []
    for i in range(int(duration_s * LUMINANCE_HZ) + 1):
        image, _ = renderer.frame(i / LUMINANCE_HZ)
        time_us = i * 1_000_000 // LUMINANCE_HZ
        grey = Image.fromarray((image @ LUMA).astype(np.float32))
        grey = grey.resize((dsec.WIDTH, dsec.HEIGHT), Image.Resampling.BILINEAR)
        parts.append(simulator.step(np.asarray(grey), time_us))
        if i % (LUMINANCE_HZ // VIDEO_HZ) == 0:
            picture = Image.fromarray(image).resize(image_size, Image.Resampling.BICUBIC)
            picture.save(pictures / f"{len(times):06d}.png")
            times.append(CLOCK_START_US + time_us)
    stream = event_streams.join(parts)
    _write_events(folder / "events" / "left", stream)
    # last: without it the sequence is unfinished
    atomic_write(timestamps, "".join(f"{time}\n" for time in times))
    return {"events": len(stream), "images": len(times), "duration_s": duration_s}


def _write_events(folder: Path, stream: event_streams.Events) -> None:
    """t in µs after t_offset, ``ms_to_idx[ms]`` the first event with t >= 1000 ms, as DSEC."""
    import hdf5plugin

    folder.mkdir(parents=True, exist_ok=True)
    packed = hdf5plugin.Blosc(cname="zstd")
    t = stream.t_us.astype(np.uint32)
    with containers.open_h5(folder / "events.h5", "w") as file:
        for name, values in {"x": stream.x, "y": stream.y, "t": t, "p": stream.p}.items():
            file.create_dataset(f"events/{name}", data=values, **packed)
        last_ms = int(t[-1]) // 1000 if len(t) else 0
        file["ms_to_idx"] = np.searchsorted(t, np.arange(last_ms + 1) * 1000).astype(np.uint64)
        file["t_offset"] = CLOCK_START_US
    with containers.open_h5(folder / "rectify_map.h5", "w") as file:  # our lens does not distort
        x, y = np.meshgrid(np.arange(dsec.WIDTH), np.arange(dsec.HEIGHT))
        file.create_dataset("rectify_map", data=np.stack([x, y], -1).astype(np.float32), **packed)
