"""The training corpus of the embedded pair: simulated clips as plain arrays, with facts as labels
and both dialects as text.

Pictures are kept at the models' size (shortest edge resized, centre square cut, as CLIP's
preprocessing does) in memory-mapped uint8 files, so a corpus larger than memory costs nothing and a
second start finds it ready.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xsd import processes
from xsd.core import DatasetError, StorageError
from xsd.embedded import drive, language, render, scenes
from xsd.embedded.language import seen_by_events
from xsd.embedded.render import centre_square
from xsd.embedded.scenes import COLOURS, SURROUNDINGS, VEHICLES
from xsd.files import atomic_write
from xsd.sensors import frames

Answers = Callable[[dict[str, Any], language.Dialect], dict[str, str]]
"""Facts of a clip → kind of question → answer: language.answers, or prose.answers."""
_PLACES = ("left", "ahead", "right")
VEHICLE_MOTIONS = ("parked", "approaching", "away", "waiting", "crossing_right", "crossing_left")
_PEDESTRIAN = ("none", "crossing_right", "crossing_left", "standing_left", "standing_right")

LABELS: dict[str, tuple[str, ...]] = {
    "time": scenes.TIMES, "sky": scenes.SKIES, "ego": tuple(scenes.EGO),
    "left": SURROUNDINGS, "right": SURROUNDINGS, "light": ("none", *scenes.LIGHTS, "unknown"),
    **{f"{place}_kind": ("none", *VEHICLES) for place in _PLACES},
    **{f"{place}_colour": tuple(COLOURS) for place in _PLACES},
    **{f"{place}_motion": VEHICLE_MOTIONS for place in _PLACES},
    **{f"{place}_distance": ("near", "far") for place in _PLACES},
    "pedestrian": _PEDESTRIAN, "pedestrian_colour": tuple(COLOURS),
    "cyclist": ("none", "left", "right"), "cyclist_colour": tuple(COLOURS),
}
"""The facts as classification targets; -1 where a clip (or an event camera) does not decide one."""

LAYOUT_KINDS = ("nothing", *VEHICLES, "pedestrian", "cyclist", "light", *SURROUNDINGS)
"""What can stand in a cell of the layout."""

LAYOUT_MOTIONS = ("none", *VEHICLE_MOTIONS, "standing")
"""How it moves: at most eight, as a cell has three bits for it."""
_CELLS = 24


def layout(seed: int, split: str, index: int) -> np.ndarray:
    """uint16 [4, 13, 24, 24]: the layout codes of a simulated sequence's clips (see Corpus); in the
    last five, what stands still before a static camera is left out, as it leaves no events."""
    rng = np.random.default_rng([seed, drive.SPLIT_CODE[split], index])
    scene = scenes.sample_scene(rng)
    renderer = render.Renderer(scene, _CELLS * 16 // 3, _CELLS * 4)
    static = scene.ego == "stopped"
    codes = np.zeros((2, 256), np.uint16)  # by identity: for the video, and for the events

    def set_code(number: int, kind: str, colour: str | None, motion: str = "none",
                 still: bool = True) -> None:
        code = LAYOUT_KINDS.index(kind) << 6 | LAYOUT_MOTIONS.index(motion)
        painted = 0 if colour is None else 1 + list(COLOURS).index(colour) << 3
        codes[:, number] = code | painted, 0 if static and still else code

    for number, actor in enumerate(scene.actors, start=1):
        still = actor.motion in ("parked", "waiting", "standing")
        set_code(number, actor.kind, actor.colour, actor.motion, still)
    for i, name in enumerate(SURROUNDINGS):
        set_code(render.SCENERY_ID + i, name, None)
    if scene.light:
        set_code(render.LIGHT_ID, "light", scene.light)
    out = np.empty((4, 13, _CELLS, _CELLS), np.uint16)
    video = [i / drive.VIDEO_HZ for i in frames.uniform_indices(drive.VIDEO_HZ, 8)]
    fifths = [0.1 + 0.2 * i for i in range(5)]
    for clip in range(4):
        for k, moment in enumerate((*video, *fifths)):
            _, identity = renderer.frame(clip * drive.HOP_S + moment, with_ids=True)
            out[clip, k] = codes[int(k >= 8)][centre_square(identity)][2::4, 2::4]
    return out


def labels(facts: dict[str, Any], dialect: language.Dialect) -> dict[str, int]:
    """Class numbers of every fact, -1 for what that sensor cannot know or what has no value
    here."""
    seen = facts if dialect == "verifier" else seen_by_events(facts)
    values = {name: seen[name] for name in ("time", "sky", "ego", "left", "right")}
    values["light"] = seen["light"] or "none"
    for place in _PLACES:
        thing = next((v for v in seen["vehicles"] if v["place"] == place), None)
        values[f"{place}_kind"] = thing["kind"] if thing else "none"
        for name in ("colour", "motion", "distance"):
            values[f"{place}_{name}"] = thing and thing[name]
    people = {person["kind"]: person for person in reversed(seen["people"])}
    walker, rider = people.get("pedestrian"), people.get("cyclist")
    values["pedestrian"] = walker["motion"] if walker else "none"
    if values["pedestrian"] == "standing":
        values["pedestrian"] += f"_{walker['place']}"
    values["cyclist"] = rider["place"] if rider else "none"
    values["pedestrian_colour"] = walker and walker["colour"]
    values["cyclist_colour"] = rider and rider["colour"]
    return {
        name: allowed.index(values[name]) if values[name] in allowed else -1
        for name, allowed in LABELS.items()
    }


def square(pictures: list[np.ndarray] | np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, H, W, 3] → uint8 [N, size, size, 3]: bicubic shortest edge, centre crop (before
    CLIP's normalisation)."""
    out = np.empty((len(pictures), size, size, 3), np.uint8)
    for i, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        short = min(height, width)
        if short != size:
            new = (int(width * size / short), int(height * size / short))
            picture = np.asarray(Image.fromarray(picture).resize(new, Image.Resampling.BICUBIC))
        top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
        out[i] = picture[top:top + size, left:left + size]
    return out


@dataclass(frozen=True)
class Dialogue:
    """A question, its answer, and the (start, end) characters of the answer that state a fact.
    whole: False where the answer goes on."""

    question: str
    answer: str
    fact_spans: tuple[tuple[int, int], ...]
    whole: bool = True


@dataclass(frozen=True)
class Corpus:
    """video: uint8 [N, 8, s, s, 3]. event_frames: uint8 [N, 5, s, s, 3]. layout: uint16 [N, 13, 24,
    24]. facts and sequence: N entries.

    layout: what stands in each of 24x24 cells at the 8 video times and in the middle of 5 fifths of
    the clip: ``kind << 6 | colour << 3 | motion`` (kinds as in LAYOUT_KINDS, motions as in
    LAYOUT_MOTIONS; colour 0 none, else 1 + its place in COLOURS).
    """

    video: np.ndarray
    event_frames: np.ndarray
    layout: np.ndarray
    facts: list[dict[str, Any]]
    sequence: list[str]

    def __len__(self) -> int:
        return len(self.facts)

    def answers(self, dialect: language.Dialect,
                say: Answers = language.answers) -> list[list[str]]:
        """Per clip the ten answers, in the order of language.questions(), as ``say`` words them."""
        texts = [say(facts, dialect) for facts in self.facts]
        return [[of_clip[q.kind] for q in language.questions()] for of_clip in texts]

    def dialogues(self, dialect: language.Dialect,
                  say: Answers = language.answers) -> list[list[Dialogue]]:
        """Per clip the ten questions with their answers, in the order of language.questions()."""
        asked = language.questions()
        return [[Dialogue(q.text, text, tuple(found[:2] for found in language.spans(text)))
                 for q, text in zip(asked, texts, strict=True)]
                for texts in self.answers(dialect, say)]

    def label_matrix(self, dialect: language.Dialect) -> np.ndarray:
        """int64 [N, len(LABELS)]."""
        rows = [list(labels(facts, dialect).values()) for facts in self.facts]
        return np.array(rows, dtype=np.int64)


def build(folder: str | Path, *, split: str, n_sequences: int, seed: int, size: int = 96,
          workers: int = 1, progress: Callable[[int], None] | None = None) -> Corpus:
    """Simulate (or reopen, if the folder holds exactly this corpus) and return the memory-mapped
    corpus.

    Raises: DatasetError when the folder holds another corpus; StorageError, before anything is
    simulated, when the disk is too full for it.
    """
    folder = Path(folder)
    wanted = {"split": split, "n_sequences": n_sequences, "seed": seed, "size": size, "version": 3}
    done = folder / "corpus.json"
    paths = [folder / f"{name}.npy" for name in ("video", "events", "layout")]
    if done.exists():
        found = json.loads(done.read_text())
        if found["config"] != wanted:
            raise DatasetError(f"{folder} holds the corpus {found['config']}, not {wanted}; choose "
                               "another folder or delete it")
        arrays = (np.load(path, mmap_mode="r") for path in paths)
        return Corpus(*arrays, found["facts"], found["sequence"])
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:  # of a simulation that was cut short: it would count against the free space
        path.unlink(missing_ok=True)
    n_clips = n_sequences * 4
    needed, free = n_clips * 13 * (3 * size**2 + 2 * _CELLS**2), shutil.disk_usage(folder).free
    if free < needed:  # writing to a memory map on a full disk would end the process without a word
        raise StorageError(
            f"{n_sequences} simulated drives take {needed / 1e9:.1f} GB in {folder}, where "
            f"{free / 1e9:.1f} GB are free; free some space, choose another folder or fewer drives")
    video, events = (np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8,
                                               shape=(n_clips, n, size, size, 3))
                     for path, n in zip(paths, (8, 5), strict=False))
    facts, sequence = [], []
    drives = drive.simulate(seed, split, n_sequences, workers=workers)
    for n, simulated in enumerate(drives, start=1):
        for clip in simulated.clips:
            video[len(facts)] = square(clip.video, size)
            events[len(facts)] = square(clip.event_frames, size)
            facts.append(clip.facts)
            sequence.append(simulated.sequence)
        if progress:
            progress(n)
    video.flush()
    events.flush()
    with processes.pool(workers) as pool:
        numbers = range(n_sequences)
        codes = np.concatenate(
            list(pool.map(layout, repeat(seed), repeat(split), numbers, chunksize=8)))
    np.save(paths[2], codes)
    atomic_write(done, json.dumps({"config": wanted, "facts": facts, "sequence": sequence}))
    return Corpus(video, events, codes, facts, sequence)
