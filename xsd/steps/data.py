"""What a run looks at: simulated drives, the shipped recording or a dataset folder, and which
question each clip is asked.

Clips of a sequence overlap by half: asking each of them everything would count near duplicates many
times. By default a sequence is asked each question once, on one of its clips in turn. A data set of
a single sequence (the recording) asks every clip everything."""

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.core import ROOT, DatasetError, ParameterError, Sample
from xsd.embedded import drive, language
from xsd.extract import plan
from xsd.extract.pairs import MODES
from xsd.files import read_json, write_json
from xsd.runs import folder as run_folder
from xsd.runs import progress
from xsd.sensors import dsec, folder, frames
from xsd.shards.store import ShardDataset

SIMULATED, RECORDED = "simulated", "davis_road"
SEED_OFFSET = 1000
"""The embedded pair was trained on the simulated world's seed 0; runs draw from seed 1000 + theirs,
so no drive is shared with it."""


# --- data sets by name


def name_of(data: str) -> str:
    """The short name of a data set in run folders and tables: ``simulated``, ``davis_road``, or the
    folder's own name (of ``x/teacher_forced`` and ``x.pt``: ``x``)."""
    if data in (SIMULATED, RECORDED):
        return data
    path = Path(data).resolve()
    return path.parent.name if path.name.split(".")[0] in MODES else path.name.removesuffix(".pt")


def simulated_sequences(split: str, n_sequences: int, seed: int) -> list[str]:
    """Names of the drives that a run with this seed simulates."""
    return [f"{split}_{SEED_OFFSET + seed}_{index:05d}" for index in range(n_sequences)]


def root_of(run_dir: str | Path, data: str, split: str) -> Path:
    """The dataset folder behind a name. Raises: ParameterError for a folder that is not there, or
    training on the recording."""
    if data == SIMULATED:
        return run_folder.resolve(run_dir) / "data" / SIMULATED / split
    if data == RECORDED and split != "test":
        raise ParameterError(f"{RECORDED} is one short recording and only for testing; train on "
                             f"{SIMULATED!r} or on a dataset folder")
    root = ROOT / "data" / RECORDED if data == RECORDED else run_folder.resolve(data)
    if not root.is_dir():
        raise ParameterError(f"there is no data set {data!r}: give {SIMULATED!r}, {RECORDED!r}, or "
                             f"a dataset folder ({root} is none)")
    return root


def prepare(run_dir: str | Path, data: str, split: str, *, n_sequences: int,
            seed: int = 0, workers: int = 2) -> Path:
    """Make sure that the data set is there and return its folder; simulated drives are made once,
    by so many ``workers``, and found again. Raises: ParameterError when the run folder holds other
    drives than asked for, and as :func:`root_of`."""
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


# --- which clip is asked what


def questions_of(root: str | Path, sequences: Collection[str], n: int = 10,
                 file: str = "") -> list[str]:
    """The questions of a file, else the folder's own, most frequent first; the shipped recording is
    asked those of the simulated world. Raises: DatasetError for a folder without any."""
    if file or (Path(root) / folder.QUESTIONS).is_file():
        return folder.read_questions(run_folder.resolve(file) if file else root, n)
    if set(sequences) != {RECORDED}:
        raise DatasetError(f"{root} holds no {folder.QUESTIONS}, so nobody knows what to ask; give "
                           "questions_file=… (--questions-file): a text file with a question a "
                           "line, or JSON")
    return [question.text for question in language.questions()][:n]


def asked(clips: Sequence[tuple[str, str]], n_questions: int,
          questions_per_sequence: int) -> list[tuple[int, int]]:
    """Which clip is asked which question: (index of the clip, index of the question), clip by clip.

    clips: (sequence, clip) in the order of the data set. A sequence gets ``questions_per_sequence``
    questions (at most all), the first one and the clip that gets it shifting from sequence to
    sequence, so that neither a question nor a place in the drive is preferred."""
    by_sequence: dict[str, list[int]] = {}
    for index, (sequence, _) in enumerate(clips):
        by_sequence.setdefault(sequence, []).append(index)
    count = min(questions_per_sequence, n_questions)
    if len(by_sequence) == 1:
        return [(index, question) for index in range(len(clips)) for question in range(count)]
    return sorted((members[(number + i) % len(members)], (number * count + i) % n_questions)
                  for number, members in enumerate(by_sequence.values()) for i in range(count))


def samples(root: str | Path, split: str, *, questions_per_sequence: int = 10,
            max_questions: int = 10, questions_file: str = "", n_sequences: int | None = None,
            duration: str = "", n_event_frames: int = 5,
            canvas: str = "slice") -> list[plan.LazySample]:
    """The samples of a data set, read from disk when their turn comes.

    questions_per_sequence: as in :func:`asked`; 0 asks every clip the first ``max_questions`` of
    the folder or of ``questions_file``. n_sequences: the first so many (default: all). duration:
    only clips of this length. canvas: the pair's, on which event frames are painted where a clip
    has no stored images. Raises: DatasetError when the folder holds no such split or no question,
    ParameterError when no clip has the duration."""
    records = folder.open_folder(root, split)
    kept = set(list(dict.fromkeys(record.sequence for record in records))[:n_sequences])
    records = _of_duration([one for one in records if one.sequence in kept], duration, root)
    if not records:
        raise DatasetError(f"{root} holds no clip of split {split!r}; give a folder with its index")
    questions = questions_of(root, kept, max_questions, questions_file)
    grid = plan.folder_samples(records, questions, n_event_frames=n_event_frames, canvas=canvas)
    if not questions_per_sequence:
        return grid
    clips = [(record.sequence, record.clip) for record in records]
    return [grid[clip * len(questions) + question]
            for clip, question in asked(clips, len(questions), questions_per_sequence)]


def _of_duration(records: list[folder.ClipRecord], duration: str,
                 root: str | Path) -> list[folder.ClipRecord]:
    if not duration:
        return records
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", duration)
    if not found:
        raise ParameterError(f"duration={duration!r}; expected a length such as 1s or 500ms")
    wanted = float(found[1]) * (1e6 if found[2] == "s" else 1e3)
    lengths = [record.t_us[1] - record.t_us[0] if record.t_us else None for record in records]
    # A clip ends with a video frame, so its length is that of the nearest frame.
    kept = [record for record, length in zip(records, lengths, strict=True)
            if length is None or abs(length - wanted) <= 0.05 * wanted]
    if records and not kept:
        there = sorted({round(length / 1000) for length in lengths})
        raise ParameterError(f"{root} holds no clip of {duration}: its clips last "
                             f"{', '.join(f'{length}ms' for length in there[:6])}; prepare the "
                             "folder with that length, or drop it")
    return kept


def event_frames_of(root: str | Path, split: str, clips: Collection[tuple[str, str]],
                    n_event_frames: int, canvas: str) -> dict[str, Any]:
    """How many of these clips have stored event images, how many are painted, on which canvas."""
    stored = [bool(folder.stored_frames(record, n_event_frames))
              for record in folder.open_folder(root, split)
              if (record.sequence, record.clip) in clips]
    return {"stored": sum(stored), "painted": len(stored) - sum(stored), "canvas": canvas}


def pictures(pairs: ShardDataset, clips: Callable[[], list[folder.ClipRecord]],
             ) -> Callable[..., Sample]:
    """A function that reads the sample of a stored pair with its pictures: as the drafter saw them,
    or with so many ``n_event_frames``. clips: gives those it was extracted from."""
    @functools.cache
    def lazily(n_event_frames: int) -> list[plan.LazySample]:
        table, config = pairs.table(), pairs.manifest["config"]
        names = list(zip(table["sequence"], table["clip"], table["question"], strict=True))
        grid = plan.folder_samples(clips(), sorted(set(table["question"])),
                                   n_event_frames=n_event_frames or config.get("n_event_frames", 5),
                                   canvas=config.get("event_canvas", "slice"))
        known = {(one.sequence, one.clip, one.question): one for one in grid}
        return [known[name] for name in names]

    return lambda index, n_event_frames=0: lazily(n_event_frames)[index].load()


SETTINGS = "preparation.json"


def prepare_dsec(source: str | Path, root: str | Path, *, split: str = "train", clip_ms: int = 1000,
                 hop_ms: int = 500, video_size: tuple[int, int] | None = None,
                 canvas: frames.Canvas = "slice", rectify: bool = False) -> dict[str, Any]:
    """sensors.dsec.prepare under one bar per sequence. How the clips were cut is kept in
    ``preparation.json``, so that one folder never mixes two ways.

    Returns: its summary and gb (of the whole folder). Raises: ParameterError for a clip or hop that
    is not positive, or a folder begun with other settings; as sensors.dsec.prepare."""
    if clip_ms < 1 or hop_ms < 1:
        raise ParameterError(
            f"a clip of {clip_ms} ms every {hop_ms} ms cannot be cut; both must be at least 1 ms")
    dsec.sequence_folders(source)  # nothing is written where there is nothing to read
    root = Path(root)
    settings = {"split": split, "clip_ms": clip_ms, "hop_ms": hop_ms, "canvas": canvas,
                "video_size": list(video_size) if video_size else None, "rectify": rectify}
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.writing(root))
        if (root / SETTINGS).is_file():
            before = read_json(root / SETTINGS, ParameterError,
                               "delete it and give the same settings again")
            for name, value in settings.items():
                there = before.get(name) if isinstance(before, dict) else before
                if there != value:
                    raise ParameterError(f"{root} was begun with {name}={there!r}, not {value!r}; "
                                         "choose another folder, or the same settings")
        write_json(root / SETTINGS, settings)

        @functools.cache
        def bar(sequence: str, total: int) -> Any:
            return stack.enter_context(progress.tqdm(total=total, desc=sequence, unit="clip"))

        def show(sequence: str, done: int, total: int) -> None:
            bar(sequence, total).update(done - bar(sequence, total).n)

        summary = dsec.prepare(source, root, split=split, clip_us=1000 * clip_ms,
                               hop_us=1000 * hop_ms, video_size=video_size, canvas=canvas,
                               rectify=rectify, progress=show)
    files = (path for path in root.rglob("*") if path.is_file())
    return {**summary, "gb": sum(path.stat().st_size for path in files) / 1e9}


def dsec_sentence(summary: Mapping[str, Any], root: str | Path) -> str:
    """The summary in plain words, notes below it."""
    done = f"{root}: {summary['clips']} clips of {summary['sequences']} sequences written"
    if summary["resumed"]:
        done += f", {summary['resumed']} sequences were there already"
    if summary["skipped"]:
        done += f", {summary['skipped']} windows skipped (fewer than five events, or no picture)"
    return "\n".join([f"{done}; the folder holds {summary['gb']:.3f} GB",
                      *(f"note: {note}" for note in summary["notes"])])


def clips_table(root: str | Path) -> pd.DataFrame:
    """What a dataset folder holds, one row per clip: sequence, clip, start_s (from its sequence's
    first clip), events, events_per_s, width, height."""
    rows = []
    for record in folder.open_folder(root):
        events = folder.load_events(record)
        start_us, end_us = record.t_us or (int(events.t_us[0]), int(events.t_us[-1]) + 1)
        rows.append({"sequence": record.sequence, "clip": record.clip, "start_s": start_us,
                     "events": len(events), "events_per_s": 1e6 * len(events) / (end_us - start_us),
                     "width": events.width, "height": events.height})
    frame = pd.DataFrame(rows)
    first_us = frame.groupby("sequence")["start_s"].transform("min")
    return frame.assign(start_s=(frame["start_s"] - first_us) / 1e6)
