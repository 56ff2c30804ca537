"""Real recordings by a sensor that saw events and frames at once, cut into clips in the dataset
folder layout (docs/sensors.md, section 2).

The same conventions as the simulated drives: a clip lasts one second and overlaps the next by half,
its video is 8 uniformly sampled frames of the window, its event frames are 5 slices of equal count
on the sensor canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xsd.core import DatasetError, EventError, VideoError
from xsd.embedded import dvs
from xsd.sensors import events as event_streams
from xsd.sensors import folder, frames, timed_video
from xsd.sensors.events import Events

CLIP_US = 1_000_000
HOP_US = 500_000


@dataclass(frozen=True, eq=False)
class Recording:
    """Events and frames of one sensor on one clock. frames: uint8 [T, H, W] grey or [T, H, W, 3];
    times_us: int64 [T], rising."""

    events: Events
    frames: np.ndarray
    times_us: np.ndarray


def read_aedat4(path: str | Path) -> Recording:
    """Events and frames of an ``.aedat4`` file (DAVIS cameras); a frame's time is the middle of its
    exposure.

    Raises: EventError when the file or the package ``aedat`` is missing or the events are bad;
    VideoError when it holds no frame.
    """
    events = event_streams.read_events(path)
    import aedat  # read_events has explained itself if it is missing

    try:
        found = [packet["frame"] for packet in aedat.Decoder(str(path)) if "frame" in packet]
    except RuntimeError as error:
        raise VideoError(
            f"{path}: its frames do not decode ({error}); the file may be cut off: copy it again"
        ) from error
    if not found:
        raise VideoError(
            f"{path} holds no frame; expected a recording with events and frames (a DAVIS camera)")
    return Recording(events, np.stack([frame["pixels"] for frame in found]),
                     np.array([frame["t"] for frame in found], np.int64))


def windows(recording: Recording, clip_us: int = CLIP_US,
            hop_us: int = HOP_US) -> list[tuple[int, int]]:
    """Start and end (not included) of every whole clip, in µs, from the first frame on. The last
    frame lasts one frame interval.

    Raises: DatasetError when the recording is shorter than one clip.
    """
    times = recording.times_us
    start, end = int(times[0]), int(times[-1])
    if len(times) > 1:
        end += int(np.median(np.diff(times)))
    if end - start < clip_us:
        raise DatasetError(
            f"the recording lasts {(end - start) / 1e6:.2f} s, less than one clip of "
            f"{clip_us / 1e6:.2f} s; use a shorter clip"
        )
    return [(first, first + clip_us) for first in range(start, end - clip_us + 1, hop_us)]


def write_clips(recording: Recording, root: str | Path, sequence: str, *, split: str = "test",
                clip_us: int = CLIP_US, hop_us: int = HOP_US, n_video: int = 8,
                ) -> int:
    """Cut a recording and write it as a dataset folder; ``source`` is ``recorded``.

    Returns: the number of clips. Raises: DatasetError when it is too short; EventError for a window
    with fewer than five events.
    """
    cuts = windows(recording, clip_us, hop_us)
    with folder.FolderWriter(root, split, source="recorded") as writer:
        for k, (start_us, end_us) in enumerate(cuts):
            inside = np.flatnonzero((recording.times_us >= start_us)
                                    & (recording.times_us < end_us))
            video = recording.frames[inside[frames.uniform_indices(len(inside), n_video)]]
            if video.ndim == 3:
                video = np.repeat(video[..., None], 3, axis=3)
            writer.add(sequence, f"{k:06d}", events=recording.events.between(start_us, end_us),
                       video=video, t_us=(start_us, end_us))
    return len(cuts)


def compare_with_simulation(recording: Recording, config: dvs.DvsConfig,
                            generator: np.random.Generator, cell: int = 4) -> dict[str, Any]:
    """Simulate events from the frames of a recording and hold them against its real ones, over the
    time the frames span.

    Returns: n_real, n_simulated, ratio, on_share_real, on_share_simulated, and the Pearson
    correlation of the event counts in cells of
    ``cell`` x ``cell`` pixels. Raises: EventError when either has no event.
    """
    luminance = recording.frames if recording.frames.ndim == 3 else timed_video.luminance(
        recording.frames)
    simulated = dvs.simulate_events(luminance, recording.times_us, config, generator)
    real = recording.events.between(int(recording.times_us[0]) + 1, int(recording.times_us[-1]) + 1)
    if not len(real) or not len(simulated):
        raise EventError(
            f"nothing to compare: {len(real)} real and {len(simulated)} simulated events while the "
            "frames were taken"
        )
    height, width = luminance.shape[1:]
    maps = [_counts(events, height, width, cell) for events in (real, simulated)]
    return {
        "n_real": len(real), "n_simulated": len(simulated), "ratio": len(simulated) / len(real),
        "on_share_real": float(real.p.mean()), "on_share_simulated": float(simulated.p.mean()),
        "spatial_correlation": float(np.corrcoef(maps[0], maps[1])[0, 1]),
    }


def _counts(events: Events, height: int, width: int, cell: int) -> np.ndarray:
    rows, columns = -(-height // cell), -(-width // cell)
    return np.bincount((events.y // cell).astype(np.intp) * columns + events.x // cell,
                       minlength=rows * columns).astype(np.float64)
