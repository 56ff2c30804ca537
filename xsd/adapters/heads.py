"""The verifier's LM head as adapters draft through it: some positions at a time, and where wanted
some of its rows only (a reduced draft vocabulary: docs/adapters.md, section 4)."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd import files
from xsd.adapters import tensor_files
from xsd.core import CheckpointError, ParameterError

CHUNK = 1024
"""Positions whose logits exist at one time: 131 MB in float32 at a vocabulary of 32 000."""


@dataclass(frozen=True)
class DraftHead:
    """Some rows of a head. weight: [k, D]. ids: int64 [k], each row's full id. rows: int64 [V], the
    row of each full id, -1 outside."""

    weight: Tensor
    ids: Tensor
    rows: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] → [..., k] logits, in the order of ``ids``."""
        return F.linear(hidden, self.weight.to(hidden.dtype))


Head = Tensor | DraftHead | Callable[[Tensor], Tensor]
"""The verifier's LM head, never trained here: its weight [V, D], a callable [n, D] → [n, V] (a head
behind the final norm), or some of its rows."""


def read(path: str | Path, width: int | None = None) -> Tensor:
    """The verifier's LM head, float32 [V, D], in a .safetensors or .pt file, or in a folder whose
    shards hold one. width: D of the states it is for. Nothing in a file is executed. Raises:
    CheckpointError when there is none, more than one, it is damaged or of another width."""
    path = Path(path)
    found = sorted(path.rglob("head-verifier.safetensors")) if path.is_dir() else [path]
    digests = {files.sha256_of(one): one for one in found if one.is_file()}
    if len(digests) != 1:
        why = "does not exist"
        if path.is_dir():
            why = f"holds {len(found)} different" if found else "holds no"
            why += " LM heads of a verifier (head-verifier.safetensors)"
        raise CheckpointError(f"{path} {why}; give the head's own file")
    ((digest, file),) = digests.items()
    _check_listed(file, digest)
    try:
        held = tensor_files.read_any(file) if file.suffix == ".safetensors" else (
            tensor_files.read_pt(file))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged, or would run code "
                              f"({tensor_files.short(error.__cause__ or error)}); save the head's "
                              "weight alone") from error
    values = held.values() if isinstance(held, Mapping) else [held]
    matrices = {str(number): value for number, value in enumerate(values)
                if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
                and len(value)}
    if len(matrices) != 1:
        raise CheckpointError(f"{path} holds {len(matrices)} matrices; expected the one LM head of "
                              "shape [V, D]")
    (head,) = tensor_files.plain(matrices, file.stat().st_size, path).values()
    if width not in (None, head.shape[1]):
        raise CheckpointError(f"the head in {path} is for states {head.shape[1]} wide and "
                              f"these are {width} wide; give the head of their verifier")
    return head.float()


def _check_listed(file: Path, digest: str) -> None:
    """Raises: CheckpointError when the manifest beside a head knows it otherwise."""
    manifest = file.parent / "manifest.json"
    if not manifest.is_file():
        return
    held = files.read_json(manifest, CheckpointError, "extract again")
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # a manifest of something else
        listed = {one["file"]: one["sha256"] for one in held["heads"].values()}
        if listed.get(file.name, digest) != digest:
            raise CheckpointError(f"{file} does not match the checksum in its manifest; repair the "
                                  "run (xsd data repair) or give another head")


def draft_head(weight: Tensor, ids: Tensor) -> DraftHead:
    """The rows ``ids`` int64 [k] of a head [V, D]. Raises: ParameterError when an id is not in the
    head or stands twice."""
    size = len(weight)
    if len(ids) == 0 or len(ids.unique()) != len(ids) or not 0 <= ids.min() <= ids.max() < size:
        raise ParameterError(f"a draft vocabulary is distinct ids below {size}, at least one; take "
                             "heads.most_frequent()")
    rows = torch.full((size,), -1, dtype=torch.long, device=weight.device)
    rows[ids] = torch.arange(len(ids), device=weight.device)
    return DraftHead(weight[ids], ids, rows)


def head_of(adapter: Any, head: Head) -> Head:
    """The head an adapter drafts through: the rows of its own draft vocabulary where it has one,
    else ``head`` as it is."""
    ids = getattr(adapter, "draft_ids", None)
    if ids is None or not isinstance(head, Tensor):
        return head
    return draft_head(head, ids.to(head.device))


def most_frequent(answers: Iterable[Sequence[int] | Tensor], k: int) -> Tensor:
    """The k most frequent ids of some answers, ascending, int64 [≤ k]; of two equally frequent ones
    the smaller id. Raises: ParameterError for k < 1 or no token at all."""
    parts = [torch.as_tensor(answer, dtype=torch.long).flatten() for answer in answers]
    counts = torch.bincount(torch.cat(parts)) if parts else torch.zeros(0, dtype=torch.long)
    if k < 1 or not counts.any():
        raise ParameterError(f"a draft vocabulary needs at least one id and answers to count, not "
                             f"k = {k} of {int(counts.sum())} tokens")
    order = counts.argsort(descending=True, stable=True)[:k]
    return order[counts[order] > 0].sort().values


def logits_of(head: Head, hidden: Tensor) -> Tensor:
    """[n, D] post-norm states → [n, V], or [n, k] through a DraftHead."""
    return F.linear(hidden, head.to(hidden.dtype)) if isinstance(head, Tensor) else head(hidden)


def top_tokens(head: Head, hidden: Tensor, chunk: int = CHUNK) -> Tensor:
    """argmax tokens, as full ids whatever the head: [..., D] → int64 [...]; the logits of ``chunk``
    positions exist at one time."""
    parts = hidden.reshape(-1, hidden.shape[-1]).split(chunk)
    result = torch.cat([logits_of(head, part).argmax(-1) for part in parts])
    return (head.ids[result] if isinstance(head, DraftHead) else result).view(hidden.shape[:-1])
