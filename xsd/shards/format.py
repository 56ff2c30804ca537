"""What a run folder holds, byte by byte: stored samples, shard files, manifest (docs/shards.md)."""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load, save
from torch import Tensor

from xsd.core import Mode, PairedStates, ShardError, Tap, reading
from xsd.files import atomic_write, parse_json, read_json
from xsd.shards import manifest as form
from xsd.shards.manifest import StoredDtype

FORMAT, VERSION = "xsd-shards", 1
MANIFEST, TIMES = "manifest.json", "times.jsonl"
ROLES = ("drafter", "verifier")

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
                "int8": torch.int8}
REPAIR = "run verify and repair, or extract again"
KINDS = {"mode": get_args(Mode), "tap": get_args(Tap), "dtype": get_args(StoredDtype)}
"""What a run may be."""

TEXT_COLUMNS = ("sequence", "clip", "question", "split", "mode", "text_by_drafter",
                "text_by_verifier", "extra")
SCHEMA = pa.schema([*((name, pa.string()) for name in TEXT_COLUMNS),
                    *((f"n_tokens_{role}", pa.int64()) for role in ROLES)])


@dataclass(frozen=True)
class Row:
    """One sample as stored: hidden_by_*, ids_by_* and for int8 scale_by_*; text: TEXT_COLUMNS."""

    tensors: Mapping[str, Tensor]
    text: Mapping[str, str]

    def length(self, role: str) -> int:
        """Positions of that model."""
        return len(self.tensors[f"ids_by_{role}"])


def short_dtype(name: str) -> str:
    """``fp32`` for ``float32``, and so on; other names as they are."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


def shard_name(number: int, kind: str = "safetensors") -> str:
    """File of a shard; kind ``parquet``: of its metadata."""
    return f"shard-{number:06d}.{kind}"


def head_name(role: str) -> str:
    """File of a model's LM head."""
    return f"head-{role}.safetensors"


def encode_states(states: Tensor, dtype: StoredDtype) -> tuple[Tensor, Tensor | None]:
    """[S, D] to the stored dtype; the second value is the float32 scale [S] for int8, else None."""
    states = states.detach().cpu()
    if dtype != "int8":
        return states.to(TORCH_DTYPES[dtype]).contiguous(), None
    states = states.float()
    largest = states.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (states / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def decode_states(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Stored [..., D] (with its scale [...] for int8) to float32 [..., D]."""
    return stored.float() if scale is None else stored.float() * scale[..., None]


def encode(pair: PairedStates, dtype: StoredDtype) -> Row:
    """One sample in its stored form. Raises: ShardError for states and ids of other lengths,
    unequal lengths under teacher forcing, NaN or infinity, or an overflow of the dtype."""
    name = f"{pair.sequence}/{pair.clip} {pair.question!r}"
    tensors: dict[str, Tensor] = {}
    for role in ROLES:
        hidden, tokens = getattr(pair, f"hidden_by_{role}"), getattr(pair, f"ids_by_{role}")
        if hidden.dim() != 2 or hidden.shape[:1] != tokens.shape:
            raise ShardError(
                f"{name}: the {role} has states {list(hidden.shape)} and ids {list(tokens.shape)}; "
                "expected [S, D] and [S] of one length")
        if not hidden.isfinite().all():
            raise ShardError(f"{name}: the {role}'s states hold NaN or infinity; load the model in "
                             "float32 or bfloat16 and extract this sample again")
        states, scale = encode_states(hidden, dtype)
        if not states.isfinite().all():
            raise ShardError(f"{name}: the {role}'s states overflow dtype={dtype!r}; store them as "
                             "'bf16' or 'fp32'")
        tensors[f"hidden_by_{role}"] = states
        tensors[f"ids_by_{role}"] = tokens.detach().cpu().to(torch.int64).contiguous()
        if scale is not None:
            tensors[f"scale_by_{role}"] = scale
    text = {column: getattr(pair, column) for column in TEXT_COLUMNS}
    row = Row(tensors, {**text, "extra": json.dumps(dict(pair.extra), sort_keys=True)})
    n_drafter, n_verifier = map(row.length, ROLES)
    if pair.mode == "teacher_forced" and n_drafter != n_verifier:
        raise ShardError(f"{name}: teacher-forced pairs share their positions, but the drafter has "
                         f"{n_drafter} and the verifier {n_verifier}; force the drafter with the "
                         "verifier's ids")
    return row


def pack(rows: Sequence[Row], *, with_text: bool = False) -> bytes:
    """The bytes of a safetensors file. with_text: texts inside, as in pending pieces."""
    tensors = {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors}
    for role in ROLES:
        lengths = torch.tensor([0, *(row.length(role) for row in rows)], dtype=torch.int64)
        tensors[f"offsets_{role}"] = lengths.cumsum(0)
    # One metadata entry only: the library writes several in no fixed order.
    text = json.dumps([dict(row.text) for row in rows], sort_keys=True)
    return save(tensors, {"text": text} if with_text else None)


def unpack(data: bytes) -> list[Row]:
    """The rows of ``pack(rows, with_text=True)``. Raises: ShardError if it is no such file."""
    with reading("not a pending piece of a run", ShardError, "it will be extracted again"):
        tensors = load(data)
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        text = json.loads(header["__metadata__"]["text"])
        lengths = {role: tensors.pop(f"offsets_{role}").diff().tolist() for role in ROLES}
        cut = {name: one.split(lengths[name.rsplit("_", 1)[1]]) for name, one in tensors.items()}
        return [Row({name: parts[i] for name, parts in cut.items()}, {
            column: line[column] for column in TEXT_COLUMNS}) for i, line in enumerate(text)]


def pack_metadata(rows: Sequence[Row]) -> bytes:
    """The bytes of a shard's parquet file: one line per sample."""
    lines = [{**row.text, **{f"n_tokens_{role}": row.length(role) for role in ROLES}}
             for row in rows]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), out)
    return out.getvalue()


def extra_of(line: str, where: Path) -> dict[str, Any]:
    """The fields of a sample's ``extra``. Raises: ShardError."""
    return parse_json(line, f"{where} has a sample whose extra", ShardError, REPAIR, dict)


def read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file (of up to 64 MB) that hold all the keys."""
    if not path.is_file() or path.stat().st_size > 1 << 26:
        return []
    found = []
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(text))
    return [line for line in found if isinstance(line, dict) and set(keys) <= set(line)]


def read_times(folder: Path) -> list[dict[str, Any]]:
    """What batches took: the lines of ``first`` (sample), ``n`` samples and ``seconds``."""
    return [line for line in read_lines(folder / TIMES, "first", "n", "seconds")
            if all(type(line[key]) is int and 0 <= line[key] < 1 << 48 for key in ("first", "n"))
            and line["n"] and type(line["seconds"]) is float and math.isfinite(line["seconds"])]


def entry_of(name: str, data: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"file": name, "bytes": len(data), "sha256": sha256(data).hexdigest()}


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Sorted JSON with the digest of itself, so that a changed byte is seen."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    digest = sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "digest": digest}, indent=1, sort_keys=True) + "\n").encode()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Atomic. Raises: StorageError."""
    atomic_write(folder / MANIFEST, _manifest_bytes(manifest))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Raises: ShardError if there is none, or it is of another version, changed, or unknown."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        inside = sorted(found.parent.name for found in Path(folder).glob(f"*/{MANIFEST}"))
        hint = (f"give one of its sub-folders: {', '.join(inside)}"
                if inside else "run the extraction, or give the folder it wrote")
        raise ShardError(f"no {MANIFEST} in {folder}; {hint}")
    way_out = "restore it or extract again into a new folder"
    manifest = read_json(path, ShardError, way_out)
    kind = tuple(map(manifest.get, ("format", "version"))) if isinstance(manifest, dict) else None
    if kind in (None, (None, None)):
        raise ShardError(f"{path} is not a manifest of hidden states; {way_out}")
    if kind != (FORMAT, VERSION):
        raise ShardError(f"{path} is of format {kind[0]!r} version {kind[1]!r} but this code reads "
                         f"{FORMAT!r} version {VERSION}")
    if wrong := form.wrong_field(manifest):
        raise ShardError(f"{path} says {wrong}, which no writer of this format does; {way_out}")
    if _manifest_bytes(manifest) != path.read_bytes():
        raise ShardError(f"{path} was changed after it was written (its digest differs); {way_out}")
    if wrong := _contradiction(manifest):
        raise ShardError(f"{path} contradicts itself: {wrong}; {way_out}")
    return manifest


def _contradiction(manifest: Mapping[str, Any]) -> str | None:
    """What no writer of this format says: another file's name, numbers that do not fit."""
    first, places = 0, [(manifest["files"].get("times"), TIMES), *(
        (manifest["heads"].get(role), head_name(role)) for role in ROLES)]
    for number, shard in enumerate(manifest["shards"]):
        names = [shard_name(number, kind) for kind in ("safetensors", "parquet")]
        if names != [shard["file"], shard["metadata_file"]]:
            return f"it names the file {shard['file']!r} and {shard['metadata_file']!r} in place " \
                   f"of {names[0]} and {names[1]}"
        tokens = [shard[f"n_tokens_{role}"] for role in ROLES]
        if shard["first"] != first or 8 * (2 * shard["n_samples"] + sum(tokens)) > shard["bytes"]:
            return f"the samples and tokens of {names[0]}"
        first += shard["n_samples"]
    for entry, name in places:
        if entry and entry["file"] != name:
            return f"it names the file {entry['file']!r} in place of {name}"
    if first != manifest["n_samples"]:
        return f"n_samples={manifest['n_samples']} where its shards hold {first}"
    sizes = [manifest[f"hidden_size_{role}"] for role in ROLES]
    return "shards of no width" if manifest["shards"] and None in sizes else None


def outside(path: Path) -> bool:
    """Whether a file of a run is a link to somewhere else."""
    return path.is_symlink() and not path.resolve().is_relative_to(os.path.realpath(path.parent))


def listed_files(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, sha256) of every file the manifest answers for."""
    for shard in manifest["shards"]:
        yield shard["file"], shard["bytes"], shard["sha256"]
        yield shard["metadata_file"], shard["metadata_bytes"], shard["metadata_sha256"]
    for entry in (*manifest["heads"].values(), *manifest["files"].values()):
        yield entry["file"], entry["bytes"], entry["sha256"]


def check_same(folder: Path, manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises: ShardError naming the first setting in which the run was begun otherwise."""
    wanted = json.loads(json.dumps(dict(settings)))  # tuples become lists, as in the manifest
    sides = [{**side, "config": of_data(side["config"])}
             for side in ({key: manifest[key] for key in wanted}, wanted)]
    if difference := first_difference(*sides):
        raise ShardError(f"{folder} was begun with other settings: {difference}; use the same ones "
                         "or another folder")


def of_data(config: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """A run's settings without those that are no property of its data, nor ``more``."""
    return {key: value for key, value in config.items() if key not in ("batch_size", *more)}


def first_difference(stored: Any, wanted: Any, name: str = "") -> str | None:
    """``"config.quant is '4bit' in the folder but None now"`` for the first difference, or None."""
    if not (isinstance(stored, Mapping) and isinstance(wanted, Mapping)):
        same = stored == wanted
        return None if same else f"{name} is {stored!r} in the folder but {wanted!r} now"
    found = (first_difference(stored.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
             for key in sorted({*stored, *wanted}))
    return next(filter(None, found), None)
