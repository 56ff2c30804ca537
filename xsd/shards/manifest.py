"""The fields of a manifest and what each may hold: a size that lies would be believed."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, ValidationError

from xsd.core import Mode, Tap

StoredDtype = Literal["fp32", "bf16", "fp16", "int8"]
"""How states are stored. int8: each row divided by its own float32 scale, max|row| / 127."""
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 48)]
Width = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]


class _File(BaseModel):
    file: str
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Shard(_File):
    metadata_file: str
    metadata_bytes: Count
    metadata_sha256: str
    first: Count
    n_samples: Count
    n_tokens_drafter: Count
    n_tokens_verifier: Count


class _Head(_File):
    vocab_size: Count
    draft_vocab_size: Count


class _Manifest(BaseModel):
    mode: Mode
    tap: Tap
    dtype: StoredDtype
    config: dict[str, Any]
    samples_per_shard: Annotated[int, Field(strict=True, ge=1)]
    token_ids: StrictBool
    hidden_size_drafter: Width | None
    hidden_size_verifier: Width | None
    n_samples: Count
    shards: list[_Shard]
    heads: dict[Literal["drafter", "verifier"], _Head]
    files: dict[Literal["times"], _File]
    finished: StrictBool
    max_seq_len: Count = 0
    provenance: dict[str, Any]


def wrong_field(manifest: Any) -> str | None:
    """The first field that is missing or holds something else, and what; None for none."""
    try:
        json.dumps(manifest, indent=1)  # as it is written: not nested too deep for that
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        one = error.errors()[0]
        where, held = ".".join(map(str, one["loc"])), repr(one["input"])
        return f"no {where}" if one["type"] == "missing" else f"{where}={held[:80]} ({one['msg']})"
    except RecursionError:
        return "more than can be nested"
    return None
