"""The held-out samples of a run with their pictures: what was extracted, read again from its data
set when needed."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Callable, Sequence

import numpy as np

from xsd.core import Sample
from xsd.evaluate import held_out
from xsd.models import loading
from xsd.sensors import folder as dataset_folder
from xsd.steps import data as datasets
from xsd.steps import extraction


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One held-out sample of a run. reference: the verifier's greedy ids as extracted, or None
    where they stop before the length asked for.

    load(): the pictures, read when needed. cluster: what intervals draw.
    """

    data: str
    key: str
    sequence: str
    cluster: str
    question: str
    reference: tuple[int, ...] | None
    load: Callable[[], Sample]


def mode_of(run_dir: str, split: str, data: str) -> str:
    held = [
        mode for mode in ("teacher_forced", "free_running")
        if extraction.shard_folder(run_dir, split, data, mode).is_dir()
    ]
    return held[0] if held else "teacher_forced"


def read(run_dir: str | os.PathLike[str], data: str, *, max_new_tokens: int = 0,
         n_event_frames: int = 5) -> list[HeldOut]:
    """All samples of a held-out set as notebook 01 extracted it, in its order.

    max_new_tokens: references are cut there, and left out where they end before it without EOS (0:
    no reference is read).
    Raises: ParameterError when the run does not hold the set.
    """
    stored = extraction.open_pairs(run_dir, "test", data, mode_of(str(run_dir), "test", data))
    about = extraction.pair_file(run_dir)
    eos, canvas = set(about["eos"]), about.get("event_canvas", "slice")
    table = stored.table()
    records = {
        (one.sequence, one.clip): one
        for one in dataset_folder.open_folder(datasets.root_of(run_dir, data, "test"), "test")
    }
    clusters = datasets.clusters(table["sequence"].tolist(), table["clip"].tolist())

    @functools.lru_cache(maxsize=2)
    def clip(sequence: str, name: str) -> Sample:
        record = records[sequence, name]
        painted = None if dataset_folder.stored_frames(record, n_event_frames) else canvas
        return dataset_folder.load_sample(record, "?", n_event_frames=n_event_frames,
                                          canvas=painted)

    out = []
    for place, (sequence, name, question) in enumerate(
            zip(table["sequence"], table["clip"], table["question"], strict=True)):
        ids = tuple(stored[place].ids_by_verifier.tolist()) if max_new_tokens else ()
        whole = bool(ids) and (len(ids) >= max_new_tokens or ids[-1] in eos)
        sample = Sample(sequence, name, question, (), np.zeros(0))
        out.append(
            HeldOut(
                datasets.name_of(data), sample.key, sequence, clusters[place], question,
                ids[:max_new_tokens] if whole else None,
                lambda sequence=sequence, name=name, question=question: dataclasses.replace(
                    clip(sequence, name), question=question),
            ))
    return out


def pairs(run_dir: str | os.PathLike[str], data: str,
          mode: str = "teacher_forced") -> held_out.HeldOut:
    """A held-out set of a run with all that is known of it; pictures are read when asked for.
    Raises: ParameterError when the run does not hold the set."""
    about = extraction.pair_file(run_dir)

    @functools.cache
    def samples() -> list[HeldOut]:
        _, info = loading.pair_folder(about["pair"])
        return read(run_dir, data, n_event_frames=int(info.get("n_event_frames", 5)))

    return held_out.of(datasets.name_of(data), extraction.open_pairs(run_dir, "test", data, mode),
                       texts=about["token_texts"], prompt_ids=about["prompt_ids"],
                       eos=about["eos"], load=lambda index: samples()[index].load())


def chosen(samples: Sequence[HeldOut], n: int, seed: int) -> list[HeldOut]:
    """``n`` samples, as many clusters as possible, drawn by ``seed``; in the order of the data
    set."""
    draw = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.cluster, []).append(place)
    for places in groups.values():
        draw.shuffle(places)
    turns = list(groups.values())
    draw.shuffle(turns)
    order = [
        places[turn] for turn in range(max(map(len, turns))) for places in turns
        if turn < len(places)
    ]
    return [samples[place] for place in sorted(order[:n])]
