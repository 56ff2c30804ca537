"""Which samples an extraction takes, in which order, and the hash that tells two plans apart."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from typing import Any

from xsd.core import ParameterError, Sample
from xsd.sensors import folder as dataset_folder


@dataclass(frozen=True)
class LazySample:
    """A sample that is read when its turn comes: ``load`` gives the core.Sample."""

    sequence: str
    clip: str
    question: str
    load: Callable[[], Sample]


Item = Sample | LazySample


def load(items: Iterable[Item]) -> list[Sample]:
    """The samples, read now."""
    return [item.load() if isinstance(item, LazySample) else item for item in items]


def folder_samples(records: Sequence[dataset_folder.ClipRecord], questions: Sequence[str], *,
                   n_event_frames: int = 5, canvas: Any = None) -> list[LazySample]:
    """Every clip with every question, clip by clip; images are read when needed, once per clip.
    canvas: on which events of clips without stored images are painted (load_sample)."""
    @lru_cache(maxsize=1)
    def clip(record: dataset_folder.ClipRecord) -> Sample:
        stored = dataset_folder.stored_frames(record, n_event_frames)
        return dataset_folder.load_sample(record, questions[0], n_event_frames=n_event_frames,
                                          canvas=None if stored else canvas)

    def read(record: dataset_folder.ClipRecord, question: str) -> Sample:
        return replace(clip(record), question=question)

    return [LazySample(record.sequence, record.clip, question, partial(read, record, question))
            for record in records for question in questions]


def order(samples: Sequence[Item], *, max_samples: int | None = None,
          max_scenes: int | None = None, seed: int = 0) -> list[Item]:
    """The samples clip by clip, so that a clip's images pass the vision tower once; clips keep the
    order of their first sample. max_samples, max_scenes: that many samples, or clips, of clips
    drawn by ``seed`` (None or -1: all). Raises: ParameterError for no samples, 0 or below -1."""
    if not samples:
        raise ParameterError("there are no samples to extract; give a clip and a question")
    for name, most in (("max_samples", max_samples), ("max_scenes", max_scenes)):
        if most is not None and (most == 0 or most < -1):
            raise ParameterError(f"{name}={most}; give a positive number, or -1 for all")
    clips: dict[tuple[str, str], list[Item]] = {}
    names = Counter((item.sequence, item.clip, item.question) for item in samples)
    if (most := names.most_common(1)[0])[1] > 1:
        raise ParameterError(f"clip {most[0][1]} of {most[0][0]} with the question {most[0][2]!r} "
                             f"stands {most[1]} times among the samples; give each once")
    for item in samples:
        clips.setdefault((item.sequence, item.clip), []).append(item)
    scenes = len(clips) if max_scenes in (None, -1) else max_scenes
    left = len(samples) if max_samples in (None, -1) else max_samples
    if scenes < len(clips) or left < len(samples):
        drawn = list(clips)
        random.Random(seed).shuffle(drawn)
        for place, key in enumerate(drawn):
            clips[key] = clips[key][:left] if place < scenes else []
            left -= len(clips[key])
    return [item for items in clips.values() for item in items]


def plan_hash(items: Sequence[Item]) -> str:
    """SHA-256 over names and questions, and over images in memory. Samples that are read later
    count by name: give their ``data_hash`` in the extraction's config."""
    digest = sha256()
    seen: dict[int, bytes] = {}
    for item in items:
        digest.update(repr((item.sequence, item.clip, item.question)).encode())
        for image in (*item.event_frames, item.video) if isinstance(item, Sample) else ():
            if id(image) not in seen:
                seen[id(image)] = sha256(repr(image.shape).encode() + image.tobytes()).digest()
            digest.update(seen[id(image)])
    return digest.hexdigest()
