"""Real recordings of events and frames, cut into clips as the simulated drives are, and held
against the event-camera model (docs/sensors.md, section 2)."""

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


def windows(recording: Recording) -> list[tuple[int, int]]:
    """Start and end of every whole clip, in µs. Raises: DatasetError when not one fits."""
    times = recording.times_us
    cuts = frames.windows(times, CLIP_US, HOP_US)
    if not cuts:
        raise DatasetError(f"the frames span {(times[-1] - times[0]) / 1e6:.2f} s, less than one "
                           f"clip of {CLIP_US / 1e6:.2f} s; record longer")
    return cuts


def write_clips(recording: Recording, root: str | Path, sequence: str, *,
                split: str = "test") -> int:
    """Cut a recording and write it as a dataset folder. Returns: the number of clips. Raises:
    DatasetError when it is too short; EventError for a window with fewer than five events."""
    cuts, times = windows(recording), recording.times_us
    with folder.FolderWriter(root, split, source="recorded") as writer:
        for k, (start_us, end_us) in enumerate(cuts):
            inside = np.flatnonzero((times >= start_us) & (times < end_us))
            video = recording.frames[inside[frames.uniform_indices(len(inside), 8)]]
            if video.ndim == 3:
                video = np.repeat(video[..., None], 3, axis=3)
            writer.add(sequence, f"{k:06d}", events=recording.events.between(start_us, end_us),
                       video=video, t_us=(start_us, end_us))
    return len(cuts)


def compare_with_simulation(recording: Recording, config: dvs.DvsConfig,
                            generator: np.random.Generator) -> dict[str, Any]:
    """Simulate events from the frames of a recording and hold them against its real ones: counts,
    shares of ON, and the Pearson correlation of counts in cells of 4 x 4 pixels over the time the
    frames span. Raises: EventError when either has no event."""
    luminance, times = recording.frames, recording.times_us
    if luminance.ndim == 4:
        luminance = timed_video.luminance(luminance)
    simulated = dvs.simulate_events(luminance, times, config, generator)
    real = recording.events.between(int(times[0]) + 1, int(times[-1]) + 1)
    if not len(real) or not len(simulated):
        raise EventError(f"nothing to compare: {len(real)} real and {len(simulated)} simulated "
                         "events while the frames were taken")
    edges = [np.arange(0, size + 4, 4) for size in luminance.shape[1:]]
    maps = [np.histogram2d(one.y, one.x, edges)[0].ravel() for one in (real, simulated)]
    return {
        "n_real": len(real), "n_simulated": len(simulated), "ratio": len(simulated) / len(real),
        "on_share_real": float(real.p.mean()), "on_share_simulated": float(simulated.p.mean()),
        "spatial_correlation": float(np.corrcoef(*maps)[0, 1]),
    }  # fmt: skip
