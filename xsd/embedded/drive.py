"""Simulated drives: a scene becomes overlapping one-second clips that two sensors saw at once, the
event camera at 60 Hz and the video camera at 20 Hz, as in DSEC."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

import numpy as np

from xsd import processes
from xsd.core import DatasetError
from xsd.embedded import dvs, language, render, scenes
from xsd.sensors import folder, frames
from xsd.sensors.events import Events
from xsd.sensors.timed_video import LUMA

LUMINANCE_HZ = 60
VIDEO_HZ = 20
CLIP_S, HOP_S = 1.0, 0.5
SPLIT_CODE = {"train": 1, "validation": 2, "test": 3}


@dataclass(frozen=True)
class DriveConfig:
    """Domain randomisation: of sequences the fraction with grey video, 96x72 or 160x120 instead of
    128x96 pixels, or a worse event camera. video_noise: largest deviation in grey levels."""

    grey_fraction: float = 0.12
    other_resolution_fraction: float = 0.2
    noisy_fraction: float = 0.25
    video_noise: float = 3.0


@dataclass(frozen=True)
class SimulatedClip:
    """video: uint8 [8, H, W, 3]. event_frames: five uint8 [H, W, 3]. t_us: start and end."""

    name: str
    events: Events
    video: np.ndarray
    event_frames: list[np.ndarray]
    facts: dict[str, Any]
    t_us: tuple[int, int]


@dataclass(frozen=True)
class Drive:
    """One sequence. The split is part of the seed, so train and test share none."""

    sequence: str
    clips: list[SimulatedClip]


def simulate_sequence(seed: int, split: str, index: int,
                      config: DriveConfig | None = None) -> Drive:
    """The same arguments give the same bytes. Raises: DatasetError for an unknown split."""
    if split not in SPLIT_CODE:
        raise DatasetError(f"unknown split {split!r}; the simulated world has {sorted(SPLIT_CODE)}")
    config = config or DriveConfig()
    rng = np.random.default_rng([seed, SPLIT_CODE[split], index])
    scene = scenes.sample_scene(rng)
    width, height = 128, 96
    if rng.random() < config.other_resolution_fraction:
        width, height = ((96, 72), (160, 120))[int(rng.integers(2))]
    grey = bool(rng.random() < config.grey_fraction)
    renderer = render.Renderer(scene, width, height)
    n = int(scenes.DURATION_S * LUMINANCE_HZ) + 1
    luminance = np.empty((n, height, width), np.float32)
    video, ids = [], []
    for i in range(n):
        filmed = i % (LUMINANCE_HZ // VIDEO_HZ) == 0
        image, identity = renderer.frame(i / LUMINANCE_HZ, with_ids=filmed)
        luminance[i] = image @ LUMA
        if filmed:
            video.append(luminance[i][..., None].repeat(3, 2) if grey else image.astype(np.float32))
            ids.append(np.where(identity >= render.SCENERY_ID, 0, identity))
    sigma = float(rng.uniform(0, config.video_noise))
    noise = rng.normal(0, sigma, (len(video), height, width, 1 if grey else 3))
    video = np.clip(np.stack(video) + noise, 0, 255).astype(np.uint8)
    times_us = (np.arange(n) * 1_000_000 // LUMINANCE_HZ).astype(np.int64)
    stream = dvs.simulate_events(luminance, times_us, _sensor(rng, config), rng)
    clips = [_clip(k, scene, stream, video, np.stack(ids), grey)
             for k in range(int((scenes.DURATION_S - CLIP_S) / HOP_S) + 1)]
    return Drive(f"{split}_{seed}_{index:05d}", clips)


def _sensor(rng: np.random.Generator, config: DriveConfig) -> dvs.DvsConfig:
    if rng.random() >= config.noisy_fraction:
        return dvs.DvsConfig()
    threshold = float(rng.uniform(0.15, 0.28))
    off = threshold * float(rng.uniform(0.9, 1.1))
    return dvs.DvsConfig(threshold, off, 0.04, cutoff_hz=float(rng.uniform(60, 300)),
                         leak_hz=float(rng.uniform(0.01, 0.1)),
                         shot_hz=float(rng.uniform(0.0, 0.5)))


def _clip(k: int, scene: scenes.Scene, stream: Events, video: np.ndarray, ids: np.ndarray,
          grey: bool) -> SimulatedClip:
    start_us = int(k * HOP_S * 1_000_000)
    end_us = start_us + int(CLIP_S * 1_000_000)
    events = stream.between(start_us, end_us)
    first, length = int(k * HOP_S * VIDEO_HZ), int(CLIP_S * VIDEO_HZ)
    truth = render.clip_facts(scene, ids[first:first + length],
                              (first + np.arange(length)) / VIDEO_HZ,
                              _events_by_identity(events, ids), grey=grey)
    chosen = [first + i for i in frames.uniform_indices(length, 8)]
    if len(events) >= 5:
        pictures = frames.event_frames(events, 5, canvas="sensor")
    else:  # a static scene may leave next to nothing; the honest picture of that is an empty one
        pictures = [np.full((*video.shape[1:3], 3), 255, np.uint8) for _ in range(5)]
    return SimulatedClip(f"{k:06d}", events, video[chosen], pictures, truth, (start_us, end_us))


def _events_by_identity(events: Events, ids: np.ndarray) -> dict[int, int]:
    """Events on each visible object and one pixel beside it, where its edges fire."""
    frame = np.clip(np.rint(events.t_us * VIDEO_HZ / 1_000_000).astype(int), 0, len(ids) - 1)
    height, width = ids.shape[1:]
    best = np.zeros(len(events), np.uint8)
    for dy, dx in product((-1, 0, 1), repeat=2):
        y = np.clip(events.y.astype(int) + dy, 0, height - 1)
        x = np.clip(events.x.astype(int) + dx, 0, width - 1)
        best = np.maximum(best, ids[frame, y, x])
    return {number: int(n) for number, n in enumerate(np.bincount(best)) if number and n}


def simulate(seed: int, split: str, n_sequences: int, *, workers: int = 1,
             first: int = 0) -> Iterator[Drive]:
    """Sequences ``first`` … ``first + n_sequences - 1`` in order, whatever the processes."""
    indices = range(first, first + n_sequences)
    if workers <= 1:
        yield from (simulate_sequence(seed, split, i) for i in indices)
        return
    with processes.pool(workers) as pool:
        yield from pool.map(simulate_sequence, repeat(seed), repeat(split), indices, chunksize=4)


def write_dataset(root: str | Path, *, split: str, n_sequences: int, seed: int, workers: int = 1,
                  progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Simulate a split and write it as a dataset folder with render.json and questions.json;
    progress(number of finished sequences). Returns: {sequences, clips, events, questions}."""
    n_clips = n_events = 0
    texts = [question.text for question in language.questions()]
    with folder.writing(root), folder.FolderWriter(root, split, source="simulated") as writer:
        for done, drive in enumerate(simulate(seed, split, n_sequences, workers=workers), start=1):
            for clip in drive.clips:
                writer.add(drive.sequence, clip.name, events=clip.events, video=clip.video,
                           event_frames=clip.event_frames, t_us=clip.t_us, facts=clip.facts)
                n_clips, n_events = n_clips + 1, n_events + len(clip.events)
            if progress:
                progress(done)
        folder.write_questions(Path(root) / folder.QUESTIONS, [(text, n_clips) for text in texts])
    return {"sequences": n_sequences, "clips": n_clips, "events": n_events, "questions": len(texts)}
