"""What an extraction was asked for, kept beside its shards (``extract.json``) so that it can be
repaired without being asked again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xsd.core import ROOT, ParameterError, ShardError
from xsd.extract import plan, ranks
from xsd.files import write_json
from xsd.runs import folder as run_folder
from xsd.sensors import folder as dataset_folder
from xsd.steps import data as datasets

if TYPE_CHECKING:
    from xsd.models import loading

FILE = "extract.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """The models and the samples of one extraction.

    data: a dataset folder, or davis_road. max_questions: the k first of its questions are asked of
    every clip; with questions_per_sequence the scheme of steps.data.asked instead, over the first
    n_sequences. duration: only clips of this length (``1s``, ``500ms``; clips that do not tell
    theirs are taken). event_frames: 5 or 1, 0 as the pair has it. dtype, quant, device: how the
    models are loaded. reuse_verifier: a finished run that brings the verifier's answers.
    """

    data: str
    split: str = "train"
    pair: str = "embedded"
    max_questions: int = 10
    questions_per_sequence: int = 0
    n_sequences: int | None = None
    duration: str = ""
    event_frames: int = 0
    dtype: str = "float32"
    quant: str | None = None
    device: str = "cpu"
    reuse_verifier: str | None = None

    def root(self) -> Path:
        """The dataset folder. Raises: ParameterError where there is none."""
        if self.data == datasets.SIMULATED:
            raise ParameterError(
                "give the folder of the drives; `xsd data simulate FOLDER` makes one")
        return datasets.root_of("", self.data, self.split)

    def load_pair(self) -> loading.Pair:
        """Both models, with the number of event frames asked for. Raises: as
        models.loading.load_pair."""
        from xsd.models import loading  # three seconds that only who extracts should wait for

        name = self.pair if self.pair == "embedded" else run_folder.resolve(self.pair)
        pair = loading.load_pair(name, dtype=self.dtype, device=self.device, quant=self.quant)
        frames = self.event_frames or pair.n_event_frames
        return dataclasses.replace(pair, n_event_frames=frames)

    def samples(self, pair: loading.Pair) -> list[plan.LazySample]:
        """The samples, read when their turn comes. Raises: DatasetError, ParameterError when no
        clip has the duration asked for."""
        root, frames = self.root(), pair.n_event_frames
        if self.questions_per_sequence:
            return datasets.samples(root, self.split, n_sequences=self.n_sequences,
                                    questions_per_sequence=self.questions_per_sequence,
                                    n_event_frames=frames, canvas=pair.event_canvas)
        records = _of_duration(dataset_folder.open_folder(root, self.split), self.duration, root)
        questions = datasets.questions_of(root, self.max_questions)
        return plan.folder_samples(records, questions, n_event_frames=frames,
                                   canvas=pair.event_canvas)

    def config(self) -> dict[str, Any]:
        """What belongs to the run besides models and samples, for extract.run.extract."""
        return {"split": self.split, "data": datasets.name_of(self.data),
                "data_hash": dataset_folder.data_hash(self.root()), "duration": self.duration,
                "quant": self.quant, "max_questions": self.max_questions}

    def save(self, folder: str | Path, *, first: bool = False) -> None:
        """Write extract.json into a run folder. first: only where there is none yet, as before an
        extraction that may be refused.

        Raises: StorageError.
        """
        if not (first and (Path(folder) / FILE).is_file()):
            write_json(Path(folder) / FILE, self)


def here(place: str | Path) -> str:
    """A path, given relative to the working directory, as a request keeps it: relative to the
    checkout where it lies inside, else absolute. Names of pairs and data sets stay as they are."""
    if place in ("embedded", datasets.SIMULATED, datasets.RECORDED):
        return str(place)
    path = Path(place).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def load(folder: str | Path, **changes: Any) -> Request:
    """The request of a run, or of one of its kinds of pairs or parts. changes: what is otherwise
    now (moved folders); None changes nothing.

    Raises: ShardError when the run does not say what it was extracted from and changes do not name
    data and pair.
    """
    folder = Path(folder)
    folder = folder.parent if folder.match(ranks.PARTS) else folder
    changes = {name: value for name, value in changes.items() if value is not None}
    for path in (folder / FILE, folder.parent / FILE):
        if path.is_file():
            try:
                stored = Request(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ShardError(f"{path} is damaged ({error}); delete it and give --pair, --data "
                                 "and --split") from error
            return dataclasses.replace(stored, **changes)
    if not {"data", "pair"} <= set(changes):
        raise ShardError(f"{folder} does not say what it was extracted from (no {FILE}); give "
                         "--pair, --data and --split")
    return Request(**changes)


def _of_duration(records: Sequence[dataset_folder.ClipRecord], duration: str,
                 root: Path) -> list[dataset_folder.ClipRecord]:
    if not duration:
        return list(records)
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
        raise ParameterError(
            f"{root} holds no clip of {duration}: its clips last "
            f"{', '.join(f'{length}ms' for length in there[:6])}; prepare the folder with that "
            "length, or drop it")
    return kept
