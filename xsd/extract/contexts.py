"""Contexts of stored teacher-forced pairs (shards/contexts.py): one pass of each model over prompt
and answer, a clip at a time; an interrupted extraction goes on with the group it was in."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from xsd.core import ShardError
from xsd.extract import plan
from xsd.files import FolderLock, remove_leftovers
from xsd.models.handle import ModelHandle
from xsd.models.loading import Pair
from xsd.shards import contexts
from xsd.shards.format import TORCH_DTYPES
from xsd.shards.store import ShardDataset

CLIPS = 16
"""A file: what is done again after a kill."""


def default_layers(depth: int) -> list[int]:
    """Three layers of a decoder: 4, 7 and 10 of 12."""
    return sorted({round(depth * share) for share in (1 / 3, 7 / 12, 5 / 6)})


def extract(pair: Pair, items: Sequence[plan.LazySample], pairs: ShardDataset, *,
            roles: Sequence[str] = ("verifier",),
            layers: Mapping[str, Sequence[int]] | None = None, dtype: str = "fp16",
            progress: Callable[[int], None] | None = None) -> Mapping[str, object]:
    """Store the contexts of finished pairs beside them; found again where they stand already.
    items: the clips and questions that the pairs were extracted from. layers: by role; None:
    :func:`default_layers`. Returns the record. Raises: ShardError for pairs that are free-running,
    or of other samples or weights; ParameterError for a layer that is not there."""
    if pairs.mode != "teacher_forced":
        raise ShardError(f"{pairs.folder} holds {pairs.mode} pairs; contexts are of teacher_forced "
                         "ones, where both models have read the verifier's tokens")
    handles = {role: getattr(pair, role) for role in roles}
    wanted = {role: list((layers or {}).get(role) or default_layers(len(one.decoder.layers)))
              for role, one in handles.items()}
    by_name = {(one.sequence, one.clip, one.question): one for one in items}
    names = pairs.names()
    if unknown := [name for name in names if name not in by_name]:
        raise ShardError(f"{pairs.folder} holds {len(unknown)} answers about other clips or "
                         f"questions than these, such as {unknown[0]}; give the clips it was "
                         "extracted from")
    folder = pairs.folder / contexts.FOLDER
    if folder.is_symlink():
        raise ShardError(f"{folder} is a link, and nothing is written through one; remove it")
    with FolderLock(folder):
        remove_leftovers(folder)
        _write(folder, handles, by_name, names, pairs, progress, {
            "format": contexts.FORMAT, "pairs": contexts.identity(pairs.manifest),
            "layers": wanted, "dtype": dtype,
            "weights": {role: one.weights_hash() for role, one in handles.items()}})
    return contexts.Contexts(pairs.folder, pairs.manifest, verify=False).about


def _write(folder: Path, handles: Mapping[str, ModelHandle], by_name: Mapping[Any, plan.LazySample],
           names: Sequence[Any], pairs: ShardDataset, progress: Callable[[int], None] | None,
           about: dict[str, Any]) -> None:
    """Write the groups that are missing or damaged, and after each the record of those there are;
    groups of another record are made anew."""
    held: list[Any] = []
    with contextlib.suppress(ShardError):
        record = contexts.read(pairs.folder)
        held = record["files"] if all(record.get(name) == about[name] for name in about) else []
    ids, stored = pairs.ids("verifier"), TORCH_DTYPES[about["dtype"]]
    clips = list(enumerate([index for index, _ in some] for _, some in
                           groupby(enumerate(names), key=lambda one: one[1][:2])))
    groups = [clips[first:first + CLIPS] for first in range(0, len(clips), CLIPS)]
    counts = [sum(len(indices) for _, indices in group) for group in groups]
    for number, group in enumerate(groups):
        entry = held[number] if number < len(held) else None
        if not contexts.whole(folder / contexts.name_of(number), entry):
            tensors, clip, start = {}, {}, {}
            for place, indices in group:
                samples = plan.load([by_name[names[index]] for index in indices])
                for role, handle in handles.items():
                    shared, own, prompts = handle.contexts(
                        samples, [torch.from_numpy(ids[index]) for index in indices],
                        about["layers"][role])
                    tensors[f"{role}.clip.{place}"] = shared.to(stored)
                    for index, states, prompt in zip(indices, own, prompts, strict=True):
                        tensors[f"{role}.{index}"] = states.to(stored)
                        start[f"{role}.{index}"], clip[str(index)] = prompt, place
            held[number:number + 1] = [contexts.write(folder, group[0][1][0], number, tensors,
                                                      clip=clip, start=start)]
            contexts.write_record(folder, {
                **about, "files": held, "n_samples": sum(counts[:len(held)])})
        if progress is not None:
            progress(counts[number])
