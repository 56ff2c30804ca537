"""The guard of an honest figure: what an adapter is judged on may neither train it nor stop its
training, by name and by hash (docs/adapters.md, section 5). An answer's digest is over the
verifier's ids and its states rounded to half precision, so that copies stored as fp16 and as fp32
are one; int8 and bf16 copies differ and are caught by their names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xsd.core import TrainingError
from xsd.shards import chunks
from xsd.train import source

POSITIONS = 4
"""An answer's digest is over this many of its first positions: the free-running and the
teacher-forced pair of one differ in length."""


@dataclass(frozen=True)
class Marks:
    """What held-out sets are known by: names, hashes of shard files, digests of answers."""

    sequences: frozenset[str]
    shards: frozenset[str]
    answers: frozenset[str]


def answer_digest(ids: Tensor, states: Tensor) -> str:
    """Hex digest of the beginning of the verifier's ids int64 [S] and states [S, D]; "" for none.
    """
    if not len(ids):
        return ""
    return source.digest((ids[:POSITIONS].to(torch.int64), states[:POSITIONS].to(torch.float16)))


def marks_of(datasets: Iterable[Any]) -> Marks:
    """Of held-out ShardDatasets (or sequences of PairedStates), for many trainings."""
    sequences, shards, answers = set(), set(), set()
    for dataset in datasets:
        shards |= _shard_hashes(getattr(dataset, "manifest", None))
        for sample in (dataset[i] for i in range(len(dataset))):
            sequences.add(sample.sequence)
            length = min(len(sample.ids_by_verifier), len(sample.ids_by_drafter))
            answers.add(answer_digest(sample.ids_by_verifier[:length],
                                      sample.hidden_by_verifier[:length]))
    return Marks(frozenset(sequences), frozenset(shards), frozenset(answers - {""}))


def _shard_hashes(manifest: dict[str, Any] | None) -> set[str]:
    return {shard["sha256"] for shard in manifest["shards"]} if manifest else set()


def refuse_held_out(states: source.States, sets: Sequence[Any] | Marks) -> None:
    """Raises: TrainingError when anything of the held-out ``sets`` (or their marks) is among
    ``states``, by name or by hash; of streamed states not each answer, but the shard files."""
    manifest = states.manifest
    if manifest and str(manifest["config"].get("split", "")).lower() == "test":
        raise TrainingError("the shards were extracted from the test split (their manifest says "
                            "so); train on the train split's shards")
    known = sets if isinstance(sets, Marks) else marks_of(sets)
    if shared := sorted(set(states.sequence) & known.sequences - {chunks.UNKNOWN}):
        raise TrainingError(f"sequence {shared[0]} is in the training data and in a held-out set "
                            f"({len(shared)} such); keep whole sequences apart")
    if _shard_hashes(manifest) & known.shards:
        raise TrainingError("a training shard file has a held-out shard's hash: it is a copy of "
                            "it; train on the train split's shards")
    if known.answers and isinstance(states, source.PackedStates):
        ends = states.lengths.cumsum(0)[:-1]
        answers = zip(states.ids_by_verifier[:-1].tensor_split(ends),
                      states.verifier[:-1].tensor_split(ends), strict=True)
        if copies := [row for row, answer in enumerate(answers)
                      if answer_digest(*answer) in known.answers]:
            raise TrainingError(
                f"{len(copies)} of {len(states)} training answers are held-out ones under other "
                f"names (first: sequence {states.sequence[copies[0]]}, by its hash); remove them "
                "from the training data")


def refuse_validation(states: source.States, validation: source.States,
                      sets: Sequence[Any] | Marks) -> None:
    """Raises: TrainingError when ``validation`` shares a sequence with the training ``states``, is
    of other widths, or anything of the held-out ``sets`` is in it."""
    refuse_held_out(validation, sets)
    shared = set(states.sequence) & set(validation.sequence) - {chunks.UNKNOWN}
    if states is validation or states.fingerprint() == validation.fingerprint():
        raise TrainingError("the validation data is the training data; give other pairs, or leave "
                            "it out")
    if shared:
        raise TrainingError(f"sequence {min(shared)} is in both training and validation data; keep "
                            "whole sequences apart")
    sizes = [(one.drafter_size, one.hidden_size) for one in (states, validation)]
    if sizes[0] != sizes[1]:
        raise TrainingError(f"training states are {sizes[0]} wide (drafter, verifier) and those of "
                            f"validation {sizes[1]}; validate on pairs of the same two models")
