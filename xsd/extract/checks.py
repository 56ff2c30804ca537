"""What can be wrong with the runs of a folder: files, checksums, states that are no numbers or do
not give their ids, kinds of pairs of different runs. Checksums find damage; the rest finds what
somebody wrote anew, checksums included."""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from xsd.core import ShardError
from xsd.extract import monitor, pairs, ranks
from xsd.shards import contexts, reader, store
from xsd.shards import format as layout

_OF_A_KIND = ("layer", "part", "verifier_from")
"""Settings in which the kinds of pairs of one run may differ."""
_BLOCK = 4096
_JUDGED = 128
"""Samples of a run whose states are held against their ids."""
_ROUNDING = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 4e-2, "int8": 1e-1}
"""How far below the largest logit, as a share of it, an id's own may lie: of two that are nearly
equal, rounding may exchange the places."""
_ANEW = "repair the run (only this shard is extracted again)"


def verify(folder: str | Path,
           places: Iterable[Path] | None = None) -> dict[Path, list[store.Problem]]:
    """Problems of every run in a folder (a damaged manifest is one), by run. places: the runs, by
    default monitor.runs. Raises: ShardError if there is no run."""
    found: dict[Path, list[store.Problem]] = {}
    for place in monitor.runs(folder) if places is None else places:
        try:
            found[place] = store.verify(place)
            damaged = {problem.file.name for problem in found[place]}
            found[place] += _unreadable(place, damaged)
            found[place] += [store.Problem(path, what, "make them anew (xsd data contexts)")
                             for path, what in contexts.damaged(
                                 place, layout.read_manifest(place)).items()]
            if not found[place]:
                found[place] += _forged(place)
        except ShardError as error:
            found[place] = [*found.get(place, ()), _problem(place / layout.MANIFEST, error)]
    for place, problem in _mixed(found):
        found[place].append(problem)
    return found


def _forged(folder: Path) -> Iterator[store.Problem]:
    """What contradicts the rest of a run whose every checksum is right."""
    dataset = store.ShardDataset(folder, unfinished=True)
    table, config, mode = dataset.table(), dataset.manifest["config"], dataset.mode
    extracted, layer = "samples_hash" in config, config.get("layer", pairs.LAST)
    wrong = []
    if folder.name.split(".")[0] in pairs.MODES and folder.name != pairs.folder_name(mode, layer):
        wrong.append(f"says mode={mode!r} and layer={layer} in a folder called {folder.name}")
    if set(table["mode"]) - {mode}:
        wrong.append(f"says mode={mode!r} where its samples say {sorted(set(table['mode']))}")
    if extracted and dataset.tap != pairs.tap_of(layer):
        wrong.append(f"says tap={dataset.tap!r} of layer {layer}")
    planned = sha256("".join(map(repr, dataset.names())).encode())
    # with data_hash: of a dataset folder, whose samples count by name (plan.plan_hash)
    if "data_hash" in config and extracted and "part" not in config and (
            dataset.manifest["finished"] and planned.hexdigest() != config["samples_hash"]):
        wrong.append("holds other samples, or in another order, than were planned")
    digests = [shard["sha256"] for shard in dataset.manifest["shards"]]
    if len(set(digests)) < len(digests):
        wrong.append("names a shard twice, under two names")
    for what in wrong:
        yield store.Problem(folder / layout.MANIFEST, what, "somebody changed it, and its "
                            "checksums with it; restore it or extract again into a new folder")
    lengths = {role: np.array(list(map(len, dataset.ids(role)))) for role in layout.ROLES}
    apart = [table[f"n_tokens_{role}"].to_numpy() != lengths[role] for role in layout.ROLES]
    if mode == "teacher_forced":
        apart.append(lengths["drafter"] != lengths["verifier"])
    for number in sorted({dataset.locate(int(i))[0] for one in apart for i in one.nonzero()[0]}):
        yield store.Problem(folder / layout.shard_name(number), "holds answers of other lengths "
                            "than its metadata, or its mode, has", _ANEW, number)
    if extracted:
        yield from _not_their_ids(dataset)


@torch.inference_mode()
def _not_their_ids(dataset: store.ShardDataset) -> Iterator[store.Problem]:
    """Shards with a sample, of a few, whose states do not give its ids through the saved head."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(_JUDGED, len(dataset))).astype(int))
    coarse = max(_ROUNDING[dataset.manifest["dtype"]], *(
        _ROUNDING.get(layout.short_dtype(str(one.get("dtype"))), 4e-2) for role in layout.ROLES
        if isinstance(one := dataset.manifest["config"].get(role), dict)), 0.0)
    for role in dataset.manifest["heads"] if dataset.tap == "post_norm" else ():
        head, seen = dataset.head(role), set()
        for index in map(int, chosen):
            one, (number, _) = dataset[index], dataset.locate(index)
            logits = getattr(one, f"hidden_by_{role}") @ head.T
            own = logits.gather(1, getattr(one, f"ids_by_{role}")[:, None])[:, 0]
            below = (logits.amax(1) - own) / logits.abs().amax(1).clamp(min=1e-6)
            if number not in seen and float((below > coarse).float().mean()) > 0.05:
                seen.add(number)
                yield store.Problem(dataset.folder / layout.shard_name(number),
                                    f"holds states of the {role} that do not give its ids through "
                                    f"the saved head (sample {index})", _ANEW, number)


def _unreadable(folder: Path, damaged: set[str]) -> Iterator[store.Problem]:
    """Files of another form, or states with NaN or infinity, whose checksums are right."""
    manifest = layout.read_manifest(folder)
    dataset = store.ShardDataset(folder, unfinished=True) if not damaged else None
    for role in manifest["heads"] if dataset and dataset.tap == "post_norm" else ():
        try:
            dataset.head(role)
        except ShardError as error:
            yield _problem(folder / layout.head_name(role), error)
    kind = "scale" if manifest["dtype"] == "int8" else "hidden"
    reading = reader.ShardReader(folder, manifest)
    for number, shard in enumerate(manifest["shards"]):
        path, own = folder / shard["file"], {shard["file"], shard["metadata_file"]}
        if own & damaged:
            continue
        try:
            for role in layout.ROLES:
                reading.shard(number).column(f"ids_by_{role}")
            for line in reader.read_metadata(folder, shard)["extra"].to_pylist():
                layout.extra_of(line, path)
        except ShardError as error:
            yield _problem(path, error, number)
            continue
        with safe_open(path, "pt") as file:
            rows = {name: file.get_slice(name) for name in (f"{kind}_by_{role}"
                                                            for role in layout.ROLES)}
            wrong = [name for name, some in rows.items() if not all(
                some[start:start + _BLOCK].isfinite().all()
                for start in range(0, some.get_shape()[0], _BLOCK))]
        if wrong:
            yield store.Problem(path, f"holds NaN or infinity in {' and '.join(wrong)}", _ANEW,
                                number)


def _problem(path: Path, error: ShardError, number: int | None = None) -> store.Problem:
    """What reading a file said, as a problem of it."""
    what, _, way_out = str(error).removeprefix(f"{path} ").rpartition("; ")
    return store.Problem(path, what, way_out, number)


def _mixed(found: dict[Path, list[store.Problem]]) -> Iterator[tuple[Path, store.Problem]]:
    """Kinds of pairs, or parts, of other models, samples or settings than the run's first."""
    first: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for place in found:
        try:
            config = layout.read_manifest(place)["config"]
        except ShardError:
            continue
        if "samples_hash" not in config:
            continue
        config = layout.of_data(config, *_OF_A_KIND)
        run = place.parent.parent if place.match(ranks.PARTS) else place.parent
        other, wanted = first.setdefault(run, (place, config))
        if difference := layout.first_difference(wanted, config):
            yield place, store.Problem(place / layout.MANIFEST,
                                       f"is not of the run of {other.name}: {difference}",
                                       "they are of two runs: move one into a folder of its own")
