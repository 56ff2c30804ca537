"""What block drafters read besides the pairs: both models' states in some layers at every position
of prompt and answer, in ``contexts/`` beside the shards. The beginning of a prompt, pictures
included, is stored once for a clip (docs/shards.md, "Contexts")."""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xsd.core import Context, ShardError
from xsd.files import atomic_write, fault, read_json, write_json
from xsd.shards.manifest import Count

FOLDER, RECORD = "contexts", "contexts.json"
FORMAT = "xsd-contexts-1"
_AGAIN = "extract the contexts again (notebook 01 with contexts=verifier)"


def name_of(number: int) -> str:
    """File of a group of clips."""
    return f"contexts-{number:06d}.safetensors"


class _File(BaseModel):
    first: Count
    bytes: Count
    sha256: str


class _Record(BaseModel):
    format: Literal["xsd-contexts-1"]
    pairs: str
    layers: dict[Literal["drafter", "verifier"], list[Count]]
    files: list[_File]
    n_samples: Count
    check: str = ""  # of the first records, none


def _check(about: Mapping[str, Any]) -> str:
    """Of the record itself."""
    rest = {name: one for name, one in about.items() if name != "check"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, about: Mapping[str, Any]) -> None:
    """What the files in ``folder`` hold, and its own checksum."""
    write_json(folder / RECORD, {**about, "check": _check(about)})


def write(folder: Path, first: int, number: int, tensors: Mapping[str, Tensor],
          **about: Any) -> dict[str, Any]:
    """One group of clips, atomically; returns its entry in the record. tensors:
    "<role>.clip.<number>" [P, L · D] and "<role>.<index>" [n, L · D]. about: clip, index → number
    of its clip; start, "<role>.<index>" → prompt positions."""
    whole = {name: one.contiguous() for name, one in tensors.items()}
    data = save(whole, {"about": json.dumps(about, sort_keys=True)})
    atomic_write(folder / name_of(number), data)
    return {"first": first, "bytes": len(data), "sha256": sha256(data).hexdigest()}


class Contexts:
    """The contexts of a run folder's samples. about: its record: layers, by role, as the models
    count them (models/batched.py), weights, dtype, files. Raises: ShardError when there are none,
    they are unfinished or of other pairs."""

    def __init__(self, shards: Path, manifest: Mapping[str, Any], *, verify: bool = True) -> None:
        self.folder, self.verify = shards / FOLDER, verify
        self.about = read(shards)
        if self.about["pairs"] != identity(manifest):
            raise ShardError(f"{self.folder} belongs to other pairs than the shards beside it; "
                             f"{_AGAIN}")
        if self.about["n_samples"] != manifest["n_samples"]:
            raise ShardError(f"{self.folder} is unfinished: it has {self.about['n_samples']} of "
                             f"{manifest['n_samples']} samples; {_AGAIN}")
        self._open: dict[int, tuple[Any, Any]] = {}
        self._firsts = [one["first"] for one in self.about["files"]]

    @property
    def layers(self) -> dict[str, list[int]]:
        """The stored layers by role."""
        return self.about["layers"]

    def check(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Raises: ShardError when a role, or a layer of it, is not stored."""
        for role, layers in wanted.items():
            if list(layers) != self.layers.get(role):
                raise ShardError(f"{self.folder} holds {self.layers} and layers {list(layers)} of "
                                 f"the {role} are wanted; {_AGAIN}")

    def of(self, places: Sequence[int], roles: Sequence[str]) -> dict[str, Context]:
        """Of the samples at these places in the whole run, float32."""
        found = {}
        for role in roles:
            if role not in self.layers:
                raise ShardError(f"{self.folder} holds no states of the {role}; run notebook 01 "
                                 f"with contexts={','.join(sorted({*self.layers, role}))}")
            rows, starts = zip(*(self._one(place, role) for place in places), strict=True)
            found[role] = Context(pad_sequence(list(rows), batch_first=True).float(),
                                  torch.tensor(starts))
        return found

    def _one(self, place: int, role: str) -> tuple[Tensor, int]:
        number = max(0, bisect_right(self._firsts, place) - 1)
        path = self.folder / name_of(number)
        try:
            if number not in self._open:
                entry = self.about["files"][number] if number < len(self._firsts) else None
                if not whole(path, entry, hashed=self.verify):
                    raise ShardError(f"{path} is missing or does not match its checksum; {_AGAIN}")
                file = safetensors.safe_open(path, framework="pt")
                self._open[number] = file, json.loads(file.metadata()["about"])
            file, about = self._open[number]
            parts = [f"{role}.clip.{about['clip'][str(place)]}", f"{role}.{place}"]
            states, start = torch.cat(list(map(file.get_tensor, parts))), about["start"][parts[1]]
            if states.dim() != 2 or type(start) is not int or not 0 < start <= len(states):
                raise ValueError(f"{list(states.shape)} states, a prompt of {start!r}")
            return states, start
        except (LookupError, TypeError, ValueError, OSError, RuntimeError,
                safetensors.SafetensorError) as error:
            raise ShardError(f"{path} holds no sample {place} of the {role}; {_AGAIN}") from error


def read(shards: Path) -> dict[str, Any]:
    """The record of the contexts beside some shards, unfinished ones too. Raises: ShardError when
    there is none, or it cannot be read."""
    path = shards / FOLDER / RECORD
    if not path.is_file():
        raise ShardError(f"{shards} holds no contexts, which block drafters (D1, D2, D5F) "
                         "read; run notebook 01 with contexts=verifier (or verifier,drafter)")
    about = read_json(path, ShardError, _AGAIN)
    try:
        _Record.model_validate(about)
    except ValidationError as error:
        raise ShardError(f"{path} is no record of contexts; {_AGAIN}") from error
    if about.get("check", "") not in ("", _check(about)):
        raise ShardError(f"{path} was changed after it was written; {_AGAIN}")
    return about


def whole(path: Path, entry: Mapping[str, Any] | None, *, hashed: bool = True) -> bool:
    """Whether a group stands as its entry in the record says."""
    return entry is not None and not fault(path, [entry["sha256"]] if hashed else [],
                                           entry["bytes"])


def damaged(shards: Path, manifest: Mapping[str, Any]) -> dict[Path, str]:
    """What is wrong with the contexts beside some shards, by file; {} where there are none."""
    record = shards / FOLDER / RECORD
    if not record.exists():
        return {}
    try:
        files = Contexts(shards, manifest).about["files"]
    except ShardError as error:
        return {record: f"cannot be read ({error})"}
    places = {record.parent / name_of(number): one for number, one in enumerate(files)}
    return {path: "is missing or does not match its checksum" for path, entry in places.items()
            if not whole(path, entry)}


def identity(manifest: Mapping[str, Any]) -> str:
    """What contexts remember of the pairs they are of: the digests of their shards' bytes."""
    return sha256("".join(one["sha256"] for one in manifest["shards"]).encode()).hexdigest()
