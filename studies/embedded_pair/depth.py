"""Where a recording is out of the shipped pair's depth: plain warnings, held against the simulated
world that it was trained on (notebook 09)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xsd.core import Sample
from xsd.embedded import drive
from xsd.sensors import events as event_streams
from xsd.steps import recordings


def known(n_sequences: int = 12, seed: int = 0) -> dict[str, Any]:
    """The world that the pair was trained on, seen in ``n_sequences`` training drives: rate,
    lowest and highest events per pixel and second; sizes of the sensors, (width, height); clip_ms;
    grey_share of the drives."""
    clips = [clip for one in drive.simulate(seed, "train", n_sequences) for clip in one.clips]
    rates = [_rate(clip.events, clip.t_us, clip.events.size) for clip in clips]
    start, end = clips[0].t_us
    return {"rate": (min(rates), max(rates)), "sizes": {clip.events.size for clip in clips},
            "clip_ms": (end - start) / 1000, "grey_share": drive.DriveConfig().grey_fraction}


def warnings(source: recordings.Source, clips: Sequence[Sample],
             world: dict[str, Any]) -> list[str]:
    """A sentence for each way in which the recording lies outside the world of :func:`known`."""
    said = []
    if source.kind == "pictures from the events":
        said.append("there is no video: the verifier is shown painted events, which it was not "
                    "trained on; its answers mean little")
    if source.kind == "events from the video":
        gap = float(np.median(np.diff(source.times_us))) / 1000
        said.append(f"the events are simulated from pictures {gap:.0f} ms apart; what moves far "
                    "between two of them jumps")
    (width, height), largest = source.events.size, max(world["sizes"])
    if width > 1.5 * largest[0] or height > 1.5 * largest[1]:
        said.append(f"the sensor has {width}x{height} pixels, the pair knows up to "
                    f"{largest[0]}x{largest[1]}: events are painted thinner")
    if abs(width / height - 4 / 3) > 0.15:
        said.append(f"the picture is {width}x{height}, the pair knows 4:3; only the central square "
                    "is seen")
    start, end = clips[0].t_us
    length, usual = (end - start) / 1000, world["clip_ms"]
    if abs(length - usual) > 0.1 * usual:
        said.append(f"a clip lasts {length:.0f} ms, the pair knows {usual:.0f} ms: it will "
                    "misjudge speed")
    if limit := event_streams.official_limit_note(source.events.between(start, end)):
        said.append(limit)
    rates = [_rate(source.events.between(*clip.t_us), clip.t_us, (width, height)) for clip in clips]
    low, high = world["rate"]
    if max(rates) > 1.5 * high or min(rates) < low / 1.5:
        said.append(f"{min(rates):.2f} to {max(rates):.2f} events per pixel and second; the pair "
                    f"knows {low:.2f} to {high:.2f}")
    if source.pictures is not None and _is_grey(source.pictures):
        said.append(f"the pictures are grey: no colour can be told ({world['grey_share']:.0%} of "
                    "the drives it was trained on were grey)")
    said.append("the pair knows simulated roads and ten questions; on anything else its answers "
                "keep their form but not their truth")
    return said


def _rate(events: event_streams.Events, span_us: tuple[int, int], size: tuple[int, int]) -> float:
    """Events per pixel and second."""
    return len(events) / (size[0] * size[1]) * 1e6 / (span_us[1] - span_us[0])


def _is_grey(pictures: np.ndarray) -> bool:
    some = pictures[::max(1, len(pictures) // 5)].astype(np.int16)
    return int(np.abs(some - some.mean(axis=3, keepdims=True)).max()) <= 2
