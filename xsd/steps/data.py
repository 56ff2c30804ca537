"""Which clips a run looks at and which question each clip is asked: simulated drives, the shipped
recording, or a dataset folder.

Clips of a sequence overlap by half, so asking each of them everything would count near duplicates
many times. Here a sequence is asked each question once, on one of its clips in turn::

    sequence 0      clip 0: q0 q4 q8    clip 1: q1 q5 q9    clip 2: q2 q6    clip 3: q3 q7
    sequence 1      clip 1: q0 q4 q8    clip 2: q1 q5 q9    clip 3: q2 q6    clip 0: q3 q7

A data set of a single sequence (the recording) asks every clip everything; its clusters are then
clips, which overlap: weak intervals.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.core import ROOT, DatasetError, ParameterError, Sample
from xsd.embedded import drive, language
from xsd.extract import plan
from xsd.runs import folder as run_folder
from xsd.sensors import folder

SIMULATED = "simulated"
RECORDED = "davis_road"
SEED_OFFSET = 1000
"""The embedded pair was trained on the simulated world's seed 0; runs draw from seed 1000 + theirs,
so no drive is shared with it."""


def name_of(data: str) -> str:
    """The short name of a data set in run folders and tables: ``simulated``, ``davis_road``, or the
    folder's own name."""
    return data if data in (SIMULATED, RECORDED) else Path(data).resolve().name


def simulated_sequences(split: str, n_sequences: int, seed: int) -> list[str]:
    """Names of the drives that a run with this seed simulates."""
    return [f"{split}_{SEED_OFFSET + seed}_{index:05d}" for index in range(n_sequences)]


def root_of(run_dir: str | os.PathLike[str], data: str, split: str) -> Path:
    """The dataset folder behind a name. Raises: ParameterError for a folder that is not there, or
    training on the recording."""
    if data == SIMULATED:
        return run_folder.resolve(run_dir) / "data" / SIMULATED / split
    if data == RECORDED:
        if split != "test":
            raise ParameterError(f"{RECORDED} is one short recording and only for testing; train "
                                 f"on {SIMULATED!r} or on a dataset folder")
        return ROOT / "data" / RECORDED
    root = run_folder.resolve(data)
    if not root.is_dir():
        raise ParameterError(f"there is no data set {data!r}: give {SIMULATED!r}, {RECORDED!r}, or "
                             f"a dataset folder ({root} is none)")
    return root


def prepare(run_dir: str | os.PathLike[str], data: str, split: str, *, n_sequences: int,
            seed: int = 0, workers: int = 2) -> Path:
    """Make sure that the data set is there and return its folder; simulated drives are made once
    and found again.

    workers: processes that simulate (the drives do not depend on it). Raises: ParameterError when
    the run folder holds other drives than asked for, and as :func:`root_of`.
    """
    root = root_of(run_dir, data, split)
    if data != SIMULATED:
        return root
    if not (root / folder.INDEX).is_file():
        drive.write_dataset(root, split=split, n_sequences=n_sequences, seed=SEED_OFFSET + seed,
                            workers=workers)
        return root
    wanted = simulated_sequences(split, n_sequences, seed)
    found = sorted({record.sequence for record in folder.open_folder(root)})
    if found != wanted:
        raise ParameterError(
            f"{root} holds {len(found)} drives ({found[0]} …) but this run asks for {len(wanted)} "
            f"({wanted[0]} …); choose another run_dir, or delete the run folder and begin again")
    return root


def questions_of(root: str | os.PathLike[str], n: int | None = None) -> list[str]:
    """The folder's own questions, most frequent first, else the ten of the simulated world."""
    if (Path(root) / folder.QUESTIONS).is_file():
        return folder.read_questions(root, n or 10)
    return [question.text for question in language.questions()][:n]


def asked(clips: Sequence[tuple[str, str]], n_questions: int,
          questions_per_sequence: int) -> list[tuple[int, int]]:
    """Which clip is asked which question: (index of the clip, index of the question), clip by clip.

    clips: (sequence, clip) in the order of the data set. A sequence gets ``questions_per_sequence``
    questions (at most all), the first one and the clip that gets it shifting from sequence to
    sequence, so that neither a question nor a place in the drive is preferred.
    """
    by_sequence: dict[str, list[int]] = {}
    for index, (sequence, _) in enumerate(clips):
        by_sequence.setdefault(sequence, []).append(index)
    count = min(questions_per_sequence, n_questions)
    if len(by_sequence) == 1:
        return [(index, question) for index in range(len(clips)) for question in range(count)]
    return sorted((members[(number + i) % len(members)], (number * count + i) % n_questions)
                  for number, members in enumerate(by_sequence.values()) for i in range(count))


def samples(root: str | os.PathLike[str], split: str, *, questions_per_sequence: int = 10,
            n_sequences: int | None = None, n_event_frames: int = 5,
            canvas: str = "slice") -> list[plan.LazySample]:
    """The samples of a data set, read from disk when their turn comes; the first ``n_sequences``
    sequences (default: all).

    canvas: the pair's, on which event frames are painted where a clip has no stored images.
    Raises: DatasetError when the folder holds no such split or no question.
    """
    records = folder.open_folder(root, split)
    kept = set(list(dict.fromkeys(record.sequence for record in records))[:n_sequences])
    records = [record for record in records if record.sequence in kept]
    if not records:
        raise DatasetError(f"{root} holds no clip of split {split!r}; give a folder with its index")
    questions = questions_of(root)
    grid = plan.folder_samples(records, questions, n_event_frames=n_event_frames, canvas=canvas)
    clips = [(record.sequence, record.clip) for record in records]
    return [grid[clip * len(questions) + question]
            for clip, question in asked(clips, len(questions), questions_per_sequence)]


def event_frames_of(root: str | os.PathLike[str], split: str, clips: Collection[tuple[str, str]],
                    n_event_frames: int, canvas: str) -> dict[str, Any]:
    """How the event frames of these clips come about: how many clips have stored images, how many
    are painted, and on which canvas."""
    stored = [bool(folder.stored_frames(record, n_event_frames))
              for record in folder.open_folder(root, split)
              if (record.sequence, record.clip) in clips]
    return {"stored": sum(stored), "painted": len(stored) - sum(stored), "canvas": canvas}


def pictures(run_dir: str | os.PathLike[str], data: str, samples: pd.DataFrame,
             about: Mapping[str, Any]) -> Callable[[int], Sample]:
    """A function that reads the held-out sample in a row of ``samples`` (sequence, clip, question)
    with its pictures. about: the run's pair file, which names the pair and its canvas."""
    names = list(zip(samples["sequence"], samples["clip"], samples["question"], strict=True))

    @functools.cache
    def lazily() -> dict[tuple[str, str, str], plan.LazySample]:
        from xsd.models import loading  # brings the models' libraries, which few readers need

        _, info = loading.pair_folder(about["pair"])
        grid = plan.folder_samples(folder.open_folder(root_of(run_dir, data, "test"), "test"),
                                   sorted({question for *_, question in names}),
                                   n_event_frames=info.get("n_event_frames", 5),
                                   canvas=about.get("event_canvas", "slice"))
        return {(one.sequence, one.clip, one.question): one for one in grid}

    return lambda index: lazily()[names[index]].load()
