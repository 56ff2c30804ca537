"""The dataset folder: clips of events and video with an index (docs/sensors.md, section 5). Clips
of one sequence overlap, so everything statistical goes by sequence."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from xsd.core import DatasetError, Sample, reading
from xsd.files import FolderLock, read_json, remove_leftovers, storing, write_json
from xsd.sensors import events as event_streams
from xsd.sensors import frames, names
from xsd.sensors.events import Events

INDEX = "EventGPT_Instruction_Subset.json"
QUESTIONS = "questions.json"
FACTS = "facts.json"
_CONTENT = ("event_npy", "event_image", "event_image_1f", "video", "mp4")


@dataclass(frozen=True)
class ClipRecord:
    """Where one clip's files should be (only the index has been looked at)."""

    root: Path
    split: str | None
    id: str
    sequence: str
    clip: str
    events_path: Path
    event_images: tuple[Path, ...]
    event_images_1f: tuple[Path, ...]
    video_dir: Path
    mp4_path: Path
    t_us: tuple[int, int] | None = None
    source: str | None = None


def open_folder(root: str | Path, split: str | None = None) -> list[ClipRecord]:
    """The clips of a dataset folder, in the order of its index: of ``root/<split>``, else the
    entries of ``root`` with that split; without a split of ``root``, else of all its subfolders.
    Raises: DatasetError for a missing folder or index, a malformed entry, a split without clips."""
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such dataset folder")
    if split is None:
        return [record for place in _indexed(root) for record, _ in _clips(place)]
    if (root / split / INDEX).is_file():
        return [record for record, _ in _clips(root / split)]
    if (places := _indexed(root)) != [root]:
        there = ", ".join(place.name for place in places)
        raise DatasetError(f"there is no {INDEX} in {root / split} nor in {root} (splits found: "
                           f"{there}); give the folder that holds it")
    records = [record for record, _ in _clips(root)]
    if chosen := [record for record in records if record.split == split]:
        return chosen
    splits = ", ".join(sorted({str(record.split) for record in records})) or "no clip at all"
    raise DatasetError(f"{root / INDEX} has no clip of split {split!r}; it has: {splits}")


def _indexed(root: Path) -> list[Path]:
    """``root`` where it has an index, else its subfolders that have one, in order of name."""
    found = [path.parent for path in (sorted(root.glob(INDEX)) or sorted(root.glob(f"*/{INDEX}")))]
    if not found:
        raise DatasetError(f"there is no {INDEX} in {root} nor in its subfolders; give the folder "
                           "that holds it")
    return found


def _clips(root: Path) -> list[tuple[ClipRecord, dict[str, Any]]]:
    """The index: every clip with its own entry."""
    index, clips = root / INDEX, []
    entries = read_json(index, DatasetError, "write it again", max_bytes=1 << 26)
    if not isinstance(entries, list):
        raise DatasetError(f"{index} holds a {type(entries).__name__}; expected a list of clips")
    for number, entry in enumerate(entries):
        with reading(f"{index}: entry {number} is malformed", DatasetError,
                     "a clip needs id, event_data and video_data"):
            clips.append((_record(root, entry), entry))
    return clips


def _record(root: Path, entry: Mapping[str, Any]) -> ClipRecord:
    events, video = names.inside(entry["event_data"]), names.inside(entry["video_data"])
    mp4 = names.inside(entry.get("mp4_data") or f"{video}.mp4")
    images, single = (tuple(root / kind / names.inside(name) for name in names.listed(entry, kind))
                      for kind in ("event_image", "event_image_1f"))
    if type(entry["id"]) not in (str, int):
        raise ValueError("its id is neither a text nor a number")
    name, split, source = str(entry["id"]), entry.get("split"), entry.get("source")
    for one in (name, *(one for one in (split, source) if one is not None)):
        names.plain(one)
    return ClipRecord(
        root, split, name, events.parent.as_posix(), events.stem,
        root / "event_npy" / events, images, single, root / "video" / video, root / "mp4" / mp4,
        names.span(entry.get("t_us")), source)


def load_events(record: ClipRecord) -> Events:
    """The clip's events, checked. Raises: EventError when the file is missing or bad;
    DatasetError where it is a link out of the folder."""
    return event_streams.read_events(names.within(record.root, record.events_path))


def stored_frames(record: ClipRecord, n_event_frames: int) -> tuple[Path, ...]:
    """The clip's stored event images where all ``n_event_frames`` of them are there, else none."""
    for paths in (record.event_images_1f, record.event_images):
        if len(paths) == n_event_frames and all(path.is_file() for path in paths):
            return tuple(names.within(record.root, path) for path in paths)
    return ()


def load_sample(record: ClipRecord, question: str, *, n_event_frames: int = 5,
                canvas: frames.Canvas | None = None) -> Sample:
    """One clip with one question. Event frames are the stored images where no canvas is asked for,
    else painted (on ``slice`` by default). Raises: DatasetError for a question of zero length or
    missing files; EventError and VideoError for bad ones."""
    names.check_question(question, f"clip {record.id}")
    stored = stored_frames(record, n_event_frames) if canvas is None else ()
    pictures = [frames.read_image(path) for path in stored] or frames.event_frames(
        load_events(record), n_event_frames, canvas=canvas or "slice")
    return Sample(sequence=record.sequence, clip=record.clip, question=question,
                  event_frames=pictures, video=load_video(record), t_us=record.t_us,
                  split=record.split, source=record.source or record.root.name)


def load_video(record: ClipRecord, n_frames: int = 8) -> np.ndarray:
    """uint8 [n_frames, H, W, 3] from the folder of images or the mp4. Raises: DatasetError."""
    for path in (record.video_dir, record.mp4_path):
        if names.within(record.root, path).is_dir():
            images = [names.within(record.root, image) for image in frames.images_in(path)]
            return frames.read_frames(images, n_frames)
        if path.exists():
            return frames.read_video(path, n_frames)
    raise DatasetError(f"clip {record.id} has no video: neither the folder {record.video_dir} nor "
                       f"the file {record.mp4_path} is there")


def write_questions(path: str | Path, questions: Iterable[tuple[str, int]]) -> None:
    """Write ``[{question, count}, …]``, the most frequent first (ties keep their order)."""
    write_json(path, [{"question": text, "count": int(count)}
                      for text, count in sorted(questions, key=lambda item: -item[1])])


def read_questions(path: str | Path, n: int = 10) -> list[str]:
    """The n most frequent (or first n) questions of a file or folder. Raises: DatasetError."""
    path = names.within(Path(path), Path(path) / QUESTIONS) if Path(path).is_dir() else Path(path)
    questions: list[Any] = []
    if path.suffix.lower() not in ("", ".txt", ".json"):
        raise DatasetError(f"{path}: questions are read from .json, or .txt with one a line")
    if path.suffix.lower() == ".json" or not path.is_file():
        entries = read_json(path, DatasetError, "write it again", max_bytes=1 << 24)
    else:
        with reading(f"{path} is not UTF-8 text", DatasetError, "save it again"), \
                open(path, encoding="utf-8-sig") as file:
            entries = list(filter(None, map(str.strip, file.read(1 << 24).split("\n"))))
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, OverflowError):
        if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
            entries = [{"question": entry} for entry in entries]
        ordered = sorted(entries, key=lambda entry: -int(entry.get("count", 0)))
        questions = [entry["question"] for entry in ordered][:n]
    if not questions or not all(isinstance(one, str) and one.strip() for one in questions):
        raise DatasetError(f"{path} is malformed, or holds no question or one of zero length; "
                           "expected a list of {question, count} or of texts, or a line for each")
    return [names.check_question(question, str(path)) for question in questions]


def read_facts(root: str | Path) -> dict[str, Any]:
    """What is true of each clip, by its id; empty where the folder does not say."""
    path = names.within(Path(root), Path(root) / FACTS)
    return read_json(path, DatasetError, "write it again", dict) if path.is_file() else {}


def data_hash(root: str | Path) -> str:
    """sha256 over names and bytes of the index, questions, facts and every file of the layout."""
    root, files = Path(root), {}
    for place in _indexed(root):
        found = [place / name for name in (INDEX, QUESTIONS, FACTS)]
        found += [path for name in _CONTENT for path in (place / name).rglob("*")
                  if not path.name.startswith(".")]
        files |= {path.relative_to(root).as_posix(): names.within(place, path)
                  for path in found if path.is_file()}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@contextlib.contextmanager
def writing(root: str | Path) -> Iterator[None]:
    """One writer to a dataset folder, who removes what killed ones left. Raises: StorageError."""
    with FolderLock(root):
        for place in (Path(root), *Path(root).glob("event_npy/*/")):
            remove_leftovers(place)
        yield


class FolderWriter:
    """Write clips into ``root``, as a context manager: the index last, so that it lists no half
    clip; one that is there is added to, clips of the same name replaced."""

    def __init__(self, root: str | Path, split: str, *, source: str | None = None) -> None:
        self.root, self.split, self.source = Path(root), split, source
        self._entries: dict[str, dict[str, Any]] = {}
        self._facts: dict[str, Any] = {}
        self._splits: dict[str, str] = {}
        if (self.root / INDEX).is_file():
            numbers: dict[str, int] = {}
            for number, (record, entry) in enumerate(_clips(self.root)):
                if (first := numbers.setdefault(record.id, number)) != number:
                    raise DatasetError(
                        f"id {record.id} stands twice in {self.root / INDEX} (entries {first} and "
                        f"{number}); give every clip its own before adding to the folder")
                self._entries[record.id] = entry
                self._splits[record.sequence] = str(record.split)
            self._facts = read_facts(self.root)

    def add(self, sequence: str, clip: str, *, events: Events, video: np.ndarray,
            event_frames: Sequence[np.ndarray] | None = None, t_us: tuple[int, int] | None = None,
            facts: Any = None) -> str:
        """Write one clip's files and return its id. video: uint8 [n, H, W, 3]. event_frames:
        painted on the sensor canvas if not given. facts: anything JSON can hold. Raises:
        DatasetError when the sequence is in another split, or a name is none; StorageError."""
        other = self._splits.setdefault(sequence, self.split)
        if other != self.split:
            raise DatasetError(f"sequence {sequence} is already in split {other!r}; clips of a "
                               f"sequence overlap, so it cannot also be in {self.split!r}")
        place = f"{sequence}/{clip}"
        with reading(f"clip {place[:80]!r} cannot be written", DatasetError, "name it otherwise"):
            names.inside(place)
            names.apart(place, self._entries)
        for name in _CONTENT:
            names.within(self.root, self.root / name / place)
        if event_frames is None:
            event_frames = frames.event_frames(events, 5, canvas="sensor")
        single = (frames.event_frames(events, 1, canvas="sensor")[0] if len(events) else
                  np.full_like(event_frames[0], 255))
        event_streams.write_events(self.root / "event_npy" / f"{place}.npy", events)
        images = [f"{place}_{i}.png" for i in range(len(event_frames))]
        for name, picture in zip(images, event_frames, strict=True):
            _write_png(self.root / "event_image" / name, picture)
        _write_png(self.root / "event_image_1f" / f"{place}_0.png", single)
        for i, picture in enumerate(video):
            _write_png(self.root / "video" / place / f"{i:06d}.png", picture)
        self._entries[place] = entry = {
            "id": place, "split": self.split, "event_data": f"{place}.npy", "video_data": place,
            "mp4_data": f"{place}.mp4", "event_image": images,
            "event_image_1f": [f"{place}_0.png"], "conversations": []}
        if t_us is not None:
            entry["t_us"] = list(map(int, t_us))
        if self.source is not None:
            entry["source"] = self.source
        if facts is not None:
            self._facts[place] = facts
        return place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self._facts:
                write_json(self.root / FACTS, self._facts)
            write_json(self.root / INDEX, [self._entries[key] for key in sorted(self._entries)])


def _write_png(path: Path, picture: np.ndarray) -> None:
    """Without a temporary name: nothing reads the file before the index lists it."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, format="PNG", compress_level=1)
