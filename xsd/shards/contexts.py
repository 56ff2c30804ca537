"""What block drafters read besides the pairs: both models' states in some layers at every position
of prompt and answer, in ``contexts/`` beside the shards. The beginning of a prompt, pictures
included, is stored once for a clip (docs/shards.md, "Contexts")."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xsd.core import Context, ShardError
from xsd.files import atomic_write, parse_json, read_json, sha256_of, write_json

FOLDER, RECORD = "contexts", "contexts.json"
FORMAT = "xsd-contexts-1"
_AGAIN = "extract the contexts again (notebook 01 with contexts=verifier)"


def name_of(number: int) -> str:
    """File of a group of clips."""
    return f"contexts-{number:06d}.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], **about: Any) -> None:
    """One group of clips, atomically. tensors: "<role>.clip.<number>" [P, L · D] and
    "<role>.<index>" [n, L · D]. about: clip, index → number of its clip; start, "<role>.<index>" →
    prompt positions; made, what it was made from."""
    whole = {name: one.contiguous() for name, one in tensors.items()}
    atomic_write(path, save(whole, {"about": json.dumps(about, sort_keys=True)}))


def made_from(path: Path) -> str:
    """What a group says it was made from; "" where there is none, or it cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["about"])["made"]
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return ""


class Contexts:
    """The contexts of a run folder's samples. about: its record: layers, by role, as the models
    count them (models/batched.py), weights, dtype, files. Raises: ShardError when there are none,
    they are unfinished or of other pairs."""

    def __init__(self, shards: Path, manifest: Mapping[str, Any], *, verify: bool = True) -> None:
        self.folder, self.verify = shards / FOLDER, verify
        path = self.folder / RECORD
        if not path.is_file():
            raise ShardError(f"{shards} holds no contexts, which block drafters (D1, D2, D5F) "
                             "read; run notebook 01 with contexts=verifier (or verifier,drafter)")
        self.about = read_json(path, ShardError, _AGAIN)
        kinds = {"format": str, "pairs": str, "layers": dict, "files": list, "n_samples": int}
        if not isinstance(self.about, dict) or self.about.get("format") != FORMAT or not all(
                isinstance(self.about.get(name), kind) for name, kind in kinds.items()) or not all(
                isinstance(one, dict) and {"first", "bytes", "sha256"} <= one.keys()
                for one in self.about["files"]):
            raise ShardError(f"{path} is no record of contexts; {_AGAIN}")
        if self.about["pairs"] != identity(manifest):
            raise ShardError(f"{self.folder} belongs to other pairs than the shards beside it; "
                             f"{_AGAIN}")
        self._open: dict[int, Any] = {}
        self._about: dict[int, dict[str, Any]] = {}
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
        number = sum(first <= place for first in self._firsts) - 1
        file = self._file(number)
        about = self._about[number]
        try:
            clip = about["clip"][str(place)]
            return (torch.cat([file.get_tensor(f"{role}.clip.{clip}"),
                               file.get_tensor(f"{role}.{place}")]),
                    about["start"][f"{role}.{place}"])
        except (KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ShardError(f"{self.folder / name_of(number)} holds no sample {place} of the "
                             f"{role}; {_AGAIN}") from error

    def _file(self, number: int) -> Any:
        if number not in self._open:
            entry = self.about["files"][number]
            path = self.folder / name_of(number)
            if not path.is_file() or path.stat().st_size != entry["bytes"] or (
                    self.verify and sha256_of(path) != entry["sha256"]):
                raise ShardError(f"{path} is missing or does not match its checksum; {_AGAIN}")
            self._open[number] = file = safetensors.safe_open(path, framework="pt")
            self._about[number] = parse_json((file.metadata() or {}).get("about", ""),
                                             f"the header of {path}", ShardError, _AGAIN)
        return self._open[number]


def damaged(shards: Path, manifest: Mapping[str, Any]) -> dict[Path, str]:
    """What is wrong with the contexts beside some shards, by file; {} where there are none."""
    record = shards / FOLDER / RECORD
    if not record.exists():
        return {}
    try:
        files = enumerate(Contexts(shards, manifest).about["files"])
    except ShardError as error:
        return {record: f"cannot be read ({error})"}
    places = {record.parent / name_of(number): one["sha256"] for number, one in files}
    return {path: "is missing or does not match its checksum" for path, digest in places.items()
            if not path.is_file() or sha256_of(path) != digest}


def identity(manifest: Mapping[str, Any]) -> str:
    """What contexts remember of the pairs they are of: the digests of their shards' bytes."""
    return sha256("".join(one["sha256"] for one in manifest["shards"]).encode()).hexdigest()


def finish(folder: Path, manifest: Mapping[str, Any], layers: Mapping[str, Sequence[int]],
           firsts: Sequence[int], **about: Any) -> None:
    """Write the record of finished groups; firsts: place of each group's first sample."""
    files = [{"first": first, "bytes": (path := folder / name_of(number)).stat().st_size,
              "sha256": sha256_of(path)} for number, first in enumerate(firsts)]
    write_json(folder / RECORD, {
        "format": FORMAT, "pairs": identity(manifest), "n_samples": manifest["n_samples"],
        "layers": {role: list(some) for role, some in layers.items()}, "files": files, **about})
