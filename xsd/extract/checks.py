"""What can be wrong with the runs of a folder: files, checksums, states that are no numbers, kinds
of pairs of different runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from xsd.core import ShardError
from xsd.extract import monitor, ranks
from xsd.shards import format as layout
from xsd.shards import store

_OF_A_KIND = ("layer", "part", "verifier_from")
"""Settings in which the kinds of pairs of one run may differ."""
_BLOCK = 4096


def verify(folder: str | Path) -> dict[Path, list[store.Problem]]:
    """Problems of every run in a folder (a damaged manifest is one), by run. Raises: ShardError if
    there is no run."""
    found: dict[Path, list[store.Problem]] = {}
    for place in monitor.runs(folder):
        try:
            problems = store.verify(place)
            damaged = {problem.file.name for problem in problems}
            found[place] = problems + list(_not_finite(place, damaged))
        except ShardError as error:
            manifest = place / layout.MANIFEST
            what, _, way_out = str(error).removeprefix(f"{manifest} ").rpartition("; ")
            found[place] = [store.Problem(manifest, what, way_out)]
    for place, problem in _mixed(found):
        found[place].append(problem)
    return found


def _not_finite(folder: Path, damaged: set[str]) -> Iterator[store.Problem]:
    """Shards whose checksum is right but whose states hold NaN or infinity: no writer of ours
    wrote them."""
    manifest = layout.read_manifest(folder)
    kind = "scale" if manifest["dtype"] == "int8" else "hidden"
    for number, shard in enumerate(manifest["shards"]):
        path = folder / shard["file"]
        if path.name in damaged:
            continue
        with safe_open(path, "pt") as file:
            wrong = [name for name in (f"{kind}_by_{role}" for role in layout.ROLES)
                     if not _finite(file.get_slice(name))]
        if wrong:
            yield store.Problem(path, f"holds NaN or infinity in {' and '.join(wrong)}",
                                "repair the run (only this shard is extracted again)", number)


def _finite(rows: Any) -> bool:
    """rows: of a safetensors file, read a block at a time."""
    starts = range(0, rows.get_shape()[0], _BLOCK)
    return all(bool(torch.isfinite(rows[start:start + _BLOCK]).all()) for start in starts)


def _mixed(found: dict[Path, list[store.Problem]]) -> Iterator[tuple[Path, store.Problem]]:
    """Kinds of pairs, or parts, that stand in one run folder but come from other models, samples or
    settings than the first."""
    first: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for place, problems in found.items():
        if any(problem.file.name == layout.MANIFEST for problem in problems):
            continue
        config = layout.read_manifest(place)["config"]
        if "samples_hash" not in config:
            continue
        config = layout.of_data(config, *_OF_A_KIND)
        run = place.parent.parent if place.match(ranks.PARTS) else place.parent
        other, wanted = first.setdefault(run, (place, config))
        if difference := layout.first_difference(wanted, config):
            yield place, store.Problem(place / layout.MANIFEST,
                                       f"is not of the run of {other.name}: {difference}",
                                       "they are of two runs: move one into a folder of its own")
