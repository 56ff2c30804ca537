"""What stands beside extracted pairs: what was asked for (``extract.json``), so that they can be
repaired without asking again, and what later steps need of the models, unloaded (``pair.json``);
and what an extraction will come to, said before it starts."""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, StrictInt

from xsd import digests
from xsd.core import PAIRS, ParameterError, ShardError
from xsd.extract import contexts, pairs, plan, ranks
from xsd.files import read_json, sha256_of
from xsd.runs import folder
from xsd.sensors import folder as dataset_folder
from xsd.shards.format import MANIFEST, ROLES, TORCH_DTYPES
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets

if TYPE_CHECKING:
    from xsd.models import loading

FILE, PAIR = "extract.json", "pair.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """The models and the samples of one extraction.

    data: a dataset folder, or davis_road. max_questions, questions_file, questions_per_sequence,
    n_sequences, duration: as in data.samples. event_frames: 5 or 1, 0 as the pair has it. dtype,
    quant, device: how the models are loaded. reuse_verifier: a finished run that brings the
    verifier's answers.
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
    questions_file: str = ""

    def root(self) -> Path:
        """The dataset folder. Raises: ParameterError where there is none."""
        if self.data == datasets.SIMULATED:
            raise ParameterError(
                "give the folder of the drives; `xsd data simulate FOLDER` makes one")
        return datasets.root_of("", self.data, self.split)

    def load_pair(self) -> loading.Pair:
        """Both models, with the number of event frames asked for. Raises: as load_pair."""
        from xsd.models import loading  # three seconds that only who extracts should wait for

        name = self.pair if self.pair in PAIRS else folder.resolve(self.pair)
        pair = loading.load_pair(name, dtype=self.dtype, device=self.device, quant=self.quant)
        return dataclasses.replace(pair, n_event_frames=self.event_frames or pair.n_event_frames)

    def samples(self, pair: loading.Pair) -> list[plan.LazySample]:
        """The samples, for this pair. Raises: as data.samples."""
        return datasets.samples(
            self.root(), self.split, n_sequences=self.n_sequences,
            questions_per_sequence=self.questions_per_sequence, max_questions=self.max_questions,
            questions_file=self.questions_file, duration=self.duration,
            n_event_frames=pair.n_event_frames, canvas=pair.event_canvas)

    def name(self) -> str:
        """The run's name where none is given, spelt as the first scripts did:
        ``chunked_train_1s_4bit_1f``."""
        parts = (self.split, self.duration or "all", self.quant or self.dtype,
                 "1f" if self.event_frames == 1 else "")
        return "_".join(["chunked", *filter(None, parts)])

    def about(self) -> dict[str, Any]:
        """For the manifest's provenance: the questions' file and its hash, where one was given."""
        path = folder.resolve(self.questions_file)
        return {"questions_file": {"name": path.name, "sha256": sha256_of(path)}} if (
            self.questions_file) else {}

    def config(self) -> dict[str, Any]:
        """What belongs to the run besides models and samples, for extract.run.extract."""
        return {"split": self.split, "data": datasets.name_of(self.data),
                "data_hash": dataset_folder.data_hash(self.root()), "duration": self.duration,
                "quant": self.quant, "max_questions": self.max_questions}

    def save(self, place: str | Path, *, first: bool = False) -> None:
        """Write extract.json into a run folder. first: only where there is none yet, as before an
        extraction that may be refused. Raises: StorageError."""
        if not (first and (Path(place) / FILE).is_file()):
            digests.write_sealed(Path(place) / FILE, self)


def here(place: str | Path) -> str:
    """A path as a request keeps it: relative to the checkout where it lies inside, else absolute.
    Names of pairs and data sets stay as they are."""
    names = (*PAIRS, datasets.SIMULATED, datasets.RECORDED)
    return str(place) if place in names else folder.shown(Path(place).resolve())


def load_request(place: str | Path, **changes: Any) -> Request:
    """The request of a run, or of one of its kinds of pairs or parts. changes: what is otherwise
    now (moved folders); None changes nothing. Raises: ShardError when the run does not say what it
    was extracted from and changes do not name data and pair."""
    place = Path(place)
    place = place.parent if place.match(ranks.PARTS) else place
    changes = {name: value for name, value in changes.items() if value is not None}
    for path in (place / FILE, place.parent / FILE):
        if path.is_file():
            way_out = "delete it and give --pair, --data and --split"
            try:
                stored = Request(**read_json(path, ShardError, way_out, max_bytes=1 << 16))
                for name, kinds in typing.get_type_hints(Request).items():
                    if not isinstance(value := getattr(stored, name), kinds):
                        raise TypeError(f"{name} is {value!r}")
            except TypeError as error:
                raise ShardError(f"{path} is damaged ({error}); {way_out}") from error
            return dataclasses.replace(stored, **changes)
    if not {"data", "pair"} <= set(changes):
        raise ShardError(f"{place} does not say what it was extracted from (no {FILE}); give "
                         "--pair, --data and --split")
    return Request(**changes)


def announced(pair: loading.Pair, samples: Sequence[plan.Item], *, modes: Sequence[str],
              max_new_tokens: int, dtype: str, batch_size: int | str) -> str:
    """What is about to be extracted, in a line: sequences, clips, questions, pairs, at most how
    many GB and, of more than 20 batches, how many hours, from one batch that is timed here."""
    n, clips = len(samples), len({(one.sequence, one.clip) for one in samples})
    asked = len({one.question for one in samples})
    both = pair.drafter, pair.verifier
    position = sum(one.hidden_size * TORCH_DTYPES[dtype].itemsize + 8 for one in both)
    gb = n * max_new_tokens * position * len(modes) / 1e9
    time_left, batch_size = "", 16 if batch_size == "auto" else batch_size
    if n > 20 * batch_size:
        some, began = plan.load(samples[:batch_size]), time.perf_counter()
        options = max_new_tokens, batch_size
        verifier = pairs.awake(pair, "verifier")
        answers = verifier.generate(some, max_new_tokens, batch_size=batch_size)
        for mode in modes:
            pairs.by_layer(mode, pair, some, *options, verifier=answers)
        hours = (time.perf_counter() - began) / batch_size * n / 3600
        time_left = f", about {hours:.1f} h as one batch took"
    return (f"{len({one.sequence for one in samples})} sequences, {clips} clips, {asked} "
            f"questions: {n} pairs in {len(modes)} kind(s), at most {gb:.3f} GB{time_left}")


def save_pair(place: Path, pair: loading.Pair, name: str, questions: set[str], **more: Any) -> None:
    """Write ``pair.json`` beside extracted pairs: what later steps need of the models."""
    verifier = pair.verifier
    prompts = {question: [token for part in verifier.prompt_ids(question) for token in part]
               for question in questions}
    digests.write_sealed(place / PAIR, {
        "pair": name, "eos": sorted(verifier.eos_token_ids), "prompt_ids": prompts,
        "token_texts": [verifier.token_text(token) for token in range(verifier.vocab_size)],
        "event_canvas": pair.event_canvas, **more
    })


class _Pair(BaseModel):
    """The fields of ``pair.json`` that all of them have."""

    pair: str
    eos: list[StrictInt]
    prompt_ids: dict[str, list[StrictInt]]
    token_texts: list[str]
    test_data: list[str] = []
    data: str = ""


def read_pair(path: Path) -> dict[str, Any]:
    """Raises: ParameterError where it is damaged, or of another form."""
    again = "run notebook 01 (or xsd data extract) again, which writes it anew"
    found = folder.read_record(path, again)
    with folder.as_written(path):  # pydantic's error is a ValueError
        _Pair.model_validate(found)
    return found


def add_contexts(run: str | Path, roles: Sequence[str]) -> str:
    """Store what block drafters read beside a run's finished teacher-forced pairs
    (extract.contexts.extract); returns a line that says what is there. Raises: as that, and
    ParameterError for a role that there is not."""
    if not roles or not set(roles) <= set(ROLES):
        raise ParameterError(f"contexts are of the {' or the '.join(ROLES)}, not of "
                             f"{', '.join(roles) or 'nobody'}")
    place = Path(run)
    place = place if (place / MANIFEST).is_file() else place / "teacher_forced"
    stored, request = ShardDataset(place), load_request(place)
    pair = request.load_pair()
    about = contexts.extract(pair, request.samples(pair), stored, roles=roles)
    gb = sum(one["bytes"] for one in about["files"]) / 1e9
    layers = ", ".join(f"layers {some} of the {role}" for role, some in about["layers"].items())
    return f"{place}: contexts of {len(stored)} answers, {layers}, {gb:.2f} GB"
