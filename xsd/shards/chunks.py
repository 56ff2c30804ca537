"""Hidden states as the first scripts for this task left them, converted to a run folder.

A folder holds index.json ({"config", "chunks": [{"path", "n_samples"}]}) and chunks/*.pt, each a
dict {"egpt_hidden", "vl_hidden": [n, S, D] float32, "seq_lens": [n], "metadata": n dicts}; a single
file is one such dict with "config". Both models ran freely, each answer was cut to the shorter of
the two (free_running, after the final norm), and token ids were not kept: -1, marked as absent.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xsd.core import PairedStates, ShardError
from xsd.files import sha256_of
from xsd.shards.writer import ShardWriter

_NEEDED = ("egpt_hidden", "vl_hidden", "seq_lens")
UNKNOWN = "unknown"
"""The sequence of every sample where no dataset folder names them."""


def _load_chunk(path: Path, n_samples: int | None = None) -> dict[str, Any]:
    """One file's samples, checked; mapped, so that 1.6 GB are not held at once, and nothing in it
    is executed. n_samples: what the index announces, None without one."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing; copy it beside the others, or extract those samples "
                         "again") from error
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ShardError(f"{path} cannot be read ({str(error).strip().splitlines()[0]}); it is "
                         "truncated or not such a file") from error
    absent = [key for key in _NEEDED if not isinstance(data, dict) or key not in data]
    if absent:
        raise ShardError(
            f"{path} holds no {', '.join(absent)}; it is not a file of paired hidden states")
    drafter, verifier, lengths = (data[key] for key in _NEEDED)
    n, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    fits = all(t.dim() == 3 and len(t) == n and t.shape[1] >= longest for t in (drafter, verifier))
    if n_samples not in (None, n) or not fits:
        raise ShardError(
            f"{path} disagrees with itself or the index: {n_samples} samples announced, {n} "
            f"lengths up to {longest}, states {list(drafter.shape)} and {list(verifier.shape)}; "
            "restore it from a copy")
    if len(data.get("metadata") or [None] * n) != n:
        raise ShardError(f"{path} holds {len(data['metadata'])} lines of metadata for {n} samples; "
                         "restore it from a copy")
    return data


def _index(path: Path) -> tuple[list[tuple[Path, int]], dict[str, Any]]:
    """(file, samples) of every chunk, and the config, of a chunked folder or a single file."""
    if not path.is_dir():
        data = _load_chunk(path)
        return [(path, len(data["seq_lens"]))], dict(data.get("config") or {})
    if not (path / "index.json").is_file():
        raise ShardError(f"{path} has no index.json; give the folder that holds it and chunks/, or "
                         "one .pt file")
    try:
        index = json.loads((path / "index.json").read_text())
        chunks = [(path / "chunks" / Path(chunk["path"]).name, int(chunk["n_samples"]))
                  for chunk in index["chunks"]]
        return chunks, dict(index.get("config") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path / 'index.json'} is not an index of chunks ({error!r}); restore it "
                         "from a copy") from error


def read_chunks(path: str | Path, *, clips: Sequence[tuple[str, str]] | None = None, first: int = 0,
                progress: Callable[[int], None] | None = None) -> Iterator[PairedStates]:
    """The samples from number ``first`` on of a chunked folder or a .pt file. clips: (sequence,
    clip) of every scene of the dataset folder, which ``sample_idx`` counts; without it the sequence
    is "unknown" (scenes overlap: they may not pass as independent). Raises: ShardError for missing,
    truncated, foreign or inconsistent files."""
    chunks, config = _index(Path(path))
    done = 0
    for file, n_samples in chunks:
        if done + n_samples > first:
            data = _load_chunk(file, n_samples)
            for row in range(max(first - done, 0), n_samples):
                yield _sample(data, row, done + row, config, clips)
                if progress is not None:
                    progress(1)
        done += n_samples


def _sample(data: Mapping[str, Any], row: int, number: int, config: Mapping[str, Any],
            clips: Sequence[tuple[str, str]] | None) -> PairedStates:
    line = dict((data.get("metadata") or {row: {}})[row])
    scene = int(line.get("sample_idx", number))
    if clips is not None and scene >= len(clips):
        raise ShardError(f"sample {number} is of scene {scene} but the dataset folder has "
                         f"{len(clips)}; give the one it was extracted from")
    sequence, clip = clips[scene] if clips is not None else (UNKNOWN, f"{scene:06d}")
    n = int(data["seq_lens"][row])
    states = (data[name][row, :n].clone() for name in _NEEDED[:2])
    absent = torch.full((n,), -1, dtype=torch.int64)
    question, *texts = (str(line.get(key, "")) for key in ("question", "egpt_text", "vl_text"))
    kept = {key: line[key] for key in ("sample_idx", "question_idx", "event_image_key")
            if key in line}
    return PairedStates(sequence, clip, question, *states, absent, absent.clone(), "free_running",
                        "post_norm", *texts, str(config.get("split", "")), kept)


def import_chunks(path: str | Path, folder: str | Path, *, dtype: str = "fp32",
                  clips: Sequence[tuple[str, str]] | None = None,
                  head: Tensor | None = None, samples_per_shard: int = 256,
                  progress: Callable[[int], None] | None = None) -> int:
    """Convert to a run folder, or go on; returns the number of samples. dtype: fp32 keeps every
    bit. head: the verifier's LM head [V, D]. Raises: as read_chunks and ShardWriter."""
    path = Path(path)
    config = {"imported_from": path.name, "clips": clips is not None,
              "source_config": _index(path)[1],
              "source_hash": sha256_of(path / "index.json" if path.is_dir() else path)}
    with ShardWriter(folder, mode="free_running", dtype=dtype, config=config, token_ids=False,
                     samples_per_shard=samples_per_shard) as writer:
        if not writer.finished:
            if head is not None:
                writer.save_head("verifier", head, len(head))
            for states in read_chunks(path, clips=clips, first=writer.n_written, progress=progress):
                writer.write(states)
    return writer.n_written
