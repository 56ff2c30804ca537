"""Any event recording or any video before the pair. What is missing is made, and said so."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from xsd.core import ROOT, EventError, PairedStates, ParameterError, Sample, VideoError
from xsd.embedded import dvs
from xsd.evaluate import held_out, statistics, table
from xsd.evaluate.comparison import UNITS
from xsd.models.loading import Pair
from xsd.runs import folder
from xsd.sensors import event_files, frames, names, timed_video
from xsd.sensors import events as event_streams
from xsd.sensors.events import Events
from xsd.shards.store import MemoryPairs

N_VIDEO = 8
SHIPPED = "davis_road"
"""The recording that comes with the project: a DAVIS346 beside a road, events and grey pictures."""


@dataclass(frozen=True, eq=False)
class Source:
    """A recording on one clock. pictures: uint8 [T, H, W, 3] at times_us int64 [T], or None. kind:
    which of the two was made here."""

    name: str
    events: Events
    pictures: np.ndarray | None
    times_us: np.ndarray
    kind: Literal["both recorded", "events from the video", "pictures from the events"]

    @property
    def span_us(self) -> tuple[int, int]:
        """Start and end (not included) of what can be cut into clips."""
        if self.pictures is None:
            return int(self.events.t_us[0]), int(self.events.t_us[-1]) + 1
        gap = int(np.median(np.diff(self.times_us))) if len(self.times_us) > 1 else 40_000
        return int(self.times_us[0]), int(self.times_us[-1]) + gap


def open_source(path: str | Path, *, max_seconds: float = 10.0, max_side: int = 346, seed: int = 0,
                sensor_size: tuple[int, int] | None = None, video: str | Path = "",
                offset_ms: float = 0.0) -> Source:
    """``"davis_road"``, an event file or a video (its first max_seconds, at most max_side wide and
    high). sensor_size: width and height of the sensor, where an event file does not say. video: of
    the same scene beside an event file; its first picture is offset_ms after the first event
    (before it where negative). Raises: EventError, also where the two share no time; VideoError,
    also for a single picture; ParameterError for the sensor_size of a video, or one beside a
    video."""
    shipped = str(path) == SHIPPED
    path = ROOT / "data/davis_road/davis346_road.aedat4" if shipped else folder.resolve(path)
    suffix = path.suffix.lower()
    if video:
        return _beside(path, folder.resolve(video), offset_ms, sensor_size,
                       max_seconds=max_seconds, max_side=max_side)
    if suffix in timed_video.SUFFIXES:
        if sensor_size:
            raise ParameterError(f"sensor_size is of event files; the events of {path} are made on "
                                 "its pictures (max_side)")
        pictures, times = timed_video.read(path, max_seconds=max_seconds, max_side=max_side)
        if len(pictures) < 2:
            raise VideoError(
                f"{path} holds a single picture; the event-camera model needs at least two")
        made = dvs.simulate_events(timed_video.luminance(pictures), times, dvs.DvsConfig(),
                                   np.random.default_rng(seed))
        return Source(path.stem, made, pictures, times, "events from the video")
    if suffix not in event_files.SUFFIXES:
        raise EventError(f"{path}: files of type {path.suffix or '(none)'} are not read here; "
                         f"expected one of {', '.join(event_files.SUFFIXES)} (events) or "
                         f"{', '.join(timed_video.SUFFIXES)} (videos)")
    size = dict(zip(("width", "height"), sensor_size, strict=True)) if sensor_size else {}
    if suffix == ".aedat4":
        found = event_streams.read_aedat4(path, **size)
        if len(found.frames):  # else events alone, from a sensor that takes no pictures
            grey = found.frames.ndim == 3
            pictures = np.repeat(found.frames[..., None], 3, axis=3) if grey else found.frames
            return Source(path.stem, found.events, pictures, found.times_us, "both recorded")
        events = found.events
    else:
        events = event_streams.read_events(path, **size)
    return Source(path.stem, events, None, np.empty(0, np.int64), "pictures from the events")


def _beside(path: Path, video: Path, offset_ms: float, sensor_size: tuple[int, int] | None,
            **limits: Any) -> Source:
    """An event file and a video on the events' clock."""
    if path.suffix.lower() in timed_video.SUFFIXES:
        raise ParameterError(f"{path} is a video, and so is {video}; give an event file beside it")
    if not abs(offset_ms) < 1e12:
        raise ParameterError(f"offset_ms is {offset_ms:g}; give milliseconds below 1e12")
    found = open_source(path, sensor_size=sensor_size)
    pictures, times = timed_video.read(video, **limits)
    start = int(found.events.t_us[0])
    made = Source(found.name, found.events, pictures,
                  times - times[0] + start + round(1000 * offset_ms), "both recorded")
    if len(found.events.between(*made.span_us)) < 5:
        lasts, (first, last) = int(found.events.t_us[-1]) - start, made.span_us
        raise EventError(f"{path} and {video} share no time: the events last {lasts / 1e6:.2f} s, "
                         f"the video goes from {(first - start) / 1e6:.2f} to "
                         f"{(last - start) / 1e6:.2f} s of them; give another offset_ms")
    return made


def cut(source: Source, *, clip_ms: int = 1000, hop_ms: int = 500, max_clips: int = 6,
        canvas: frames.Canvas = "sensor") -> list[Sample]:
    """One sample per clip (its question still empty): event frames and 8 pictures of every whole
    window with five events. A recording shorter than a clip is one clip. Raises: ParameterError for
    a clip, hop or number below 1; EventError when no window is left."""
    if min(clip_ms, hop_ms, max_clips) < 1:
        raise ParameterError(f"clips of {clip_ms} ms every {hop_ms} ms, {max_clips} of them: each "
                             "must be at least 1")
    start, end = source.span_us
    length = min(1000 * clip_ms, end - start)
    made: list[Sample] = []
    starts = range(start, end - length + 1, 1000 * hop_ms)
    if len(starts) > 1_000_000:
        raise ParameterError(f"{source.name}: {(end - start) / 1e6:.0f} s every {hop_ms} ms make "
                             f"{len(starts)} clips; give a longer hop_ms")
    for k, first in enumerate(starts):
        events = source.events.between(first, first + length)
        inside = np.flatnonzero((source.times_us >= first) & (source.times_us < first + length))
        if len(events) < 5 or (source.pictures is not None and len(inside) == 0):
            continue
        if source.pictures is None:
            video = np.stack(frames.event_frames(events, N_VIDEO, canvas="sensor"))
        else:
            video = source.pictures[inside[frames.uniform_indices(len(inside), N_VIDEO)]]
        made.append(Sample(source.name, f"{k:06d}", "", frames.event_frames(events, canvas=canvas),
                           video, (first, first + length), "test", "recorded"))
        if len(made) == max_clips:
            return made
    if not made:
        raise EventError(f"{source.name}: no window of {length / 1000:.0f} ms holds five events; "
                         "choose longer clips or another recording")
    return made


def asked(clips: Sequence[Sample], questions: Sequence[str]) -> list[Sample]:
    """Every clip with every question. Raises: DatasetError for a question that is none."""
    questions = [names.check_question(one, "questions") for one in questions]
    return [replace(clip, question=question) for clip in clips for question in questions]


def held_out_pairs(pair: Pair, pairs: Sequence[PairedStates]) -> held_out.HeldOut:
    """The pairs of a cell as a held-out set, which evaluate.table.measure takes."""
    texts = [pair.verifier.token_text(token) for token in range(pair.verifier.vocab_size)]
    return held_out.of(pairs[0].sequence, MemoryPairs(pairs),
                       pair.verifier.head.weight.float().cpu(), texts=texts)


def summary(tokens: pd.DataFrame, *, gamma: int = 5, resamples: int = 400,
            seed: int = 0) -> pd.DataFrame:
    """One row per level: token acceptance and accepted drafts per round (without an interval where
    it is of one sequence: its clips overlap), median cosine, tokens, answers."""
    cosine = table.drafted(tokens).groupby("level", observed=True)["cosine"].median()
    rows = []
    for level, part in table.counts(tokens, gamma).groupby("level", sort=False, observed=True):
        row: dict[str, Any] = {"level": level}
        for name, (above, below) in UNITS.items():
            found = statistics.bootstrap_ratio(part[above], part[below], part["sequence"],
                                               n_resamples=resamples, seed=seed)
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row | {"median_cosine": float(cosine[level]),
                           "tokens": int(part["positions"].sum()), "answers": len(part)})
    return pd.DataFrame(rows)

