"""Streaming from shards against plain reads and padded chunks; bytes on disk; memory: the second
half of ``xsd bench extract``.

The run is generated, as wide as the 7B pair's states; its files lie in the page cache for every
contender, so this is what the code costs, not what a disk gives.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ratios
from xsd.core import ROOT, PairedStates
from xsd.shards.loader import Loader
from xsd.shards.store import ShardDataset
from xsd.shards.writer import ShardWriter


@dataclass(frozen=True)
class Sizes:
    """Of the generated run. lengths: tokens of an answer, drawn evenly between the two. chunk_size:
    answers in a file of the reference's.

    narrow_width: of a second run, whose answers are as small as the embedded pair's.
    """

    n_answers: int = 256
    width: int = 4096
    narrow_width: int = 192
    lengths: tuple[int, int] = (20, 50)
    samples_per_shard: int = 64
    chunk_size: int = 64
    batch_size: int = 8
    repeats: int = 9


# --- the same answers in both formats
# --------------------------------------------------------------------------------------


def answers(n: int, width: int, lengths: tuple[int, int], seed: int = 0) -> Iterator[PairedStates]:
    """n teacher-forced pairs of random states [S, width]; one bank of numbers is cut anew for each,
    since only their amount matters."""
    generator = torch.Generator().manual_seed(seed)
    low, high = lengths
    bank = torch.randn(2 * high, width, generator=generator)
    for i in range(n):
        size = int(torch.randint(low, high + 1, (1,), generator=generator))
        start = int(torch.randint(0, high, (1,), generator=generator))
        states, ids = bank[start:start + size], torch.randint(0, 32_000, (size,),
                                                              generator=generator)
        yield PairedStates(f"sequence_{i // 40:04d}", f"{i // 10:06d}", f"Question {i % 10}?",
                           states, states, ids, ids, "teacher_forced",
                           text_by_drafter="x" * 4 * size, text_by_verifier="x" * 4 * size,
                           split="train",
                           )


def write_run(folder: Path, n: int, width: int, sizes: Sizes, dtype: str) -> ShardDataset:
    """A finished run of such answers."""
    with ShardWriter(folder, mode="teacher_forced", dtype=dtype,
                     samples_per_shard=sizes.samples_per_shard) as out:
        for states in answers(n, width, sizes.lengths):
            out.write(states)
    return ShardDataset(folder)


def write_chunks(folder: Path, n: int, width: int, sizes: Sizes) -> list[Path]:
    """The same answers as the reference keeps them: float32, padded to the longest of a chunk,
    torch.save (shards.chunks)."""
    folder.mkdir(parents=True)
    files, held = [], []
    for i, states in enumerate(answers(n, width, sizes.lengths)):
        held.append(states)
        if len(held) < sizes.chunk_size and i + 1 < n:
            continue
        pad = torch.nn.utils.rnn.pad_sequence
        chunk = {
            "egpt_hidden": pad([one.hidden_by_drafter for one in held], batch_first=True),
            "vl_hidden": pad([one.hidden_by_verifier for one in held], batch_first=True),
            "seq_lens": torch.tensor([len(one.ids_by_verifier) for one in held]), "metadata": [{
                "question": one.question, "egpt_text": one.text_by_drafter,
                "vl_text": one.text_by_verifier, "sample_idx": i // 10
            } for one in held],
        }
        files.append(folder / f"chunk_{i + 1 - len(held):06d}.pt")
        torch.save(chunk, files[-1])
        held = []
    return files


def _read_blocks(files: list[Path]) -> None:
    """1 MiB at a time into one buffer that never leaves the processor's cache: what no reader that
    hands its data on can reach."""
    buffer = bytearray(1 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                continue


def _read_shards(files: list[Path]) -> Callable[[], None]:
    """The plain sequential read that has a shard in memory afterwards: file after file into one
    buffer as large as the largest."""
    buffer = memoryview(bytearray(max(path.stat().st_size for path in files)))

    def read() -> None:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                place = 0
                while n := file.readinto(buffer[place:]):
                    place += n

    return read


def _stream(dataset: ShardDataset, sizes: Sizes, dtype: str) -> Callable[[], object]:
    loader = Loader(dataset, batch_size=sizes.batch_size, max_padding=0.2, shuffle_seed=0,
                    dtype=dtype, prefetch=2)
    return lambda: deque(loader, maxlen=0)


def streaming_ratios(folder: Path, sizes: Sizes) -> tuple[list[ratios.Ratio], dict[str, Any]]:
    """Shuffled, bucketed, padded batches of every answer against reading the same files, and
    against loading padded chunks."""
    wide = write_run(folder / "wide", sizes.n_answers, sizes.width, sizes, "fp16")
    n_narrow = sizes.n_answers * 4
    narrow = write_run(folder / "narrow", n_narrow, sizes.narrow_width, sizes, "fp16")
    chunks = write_chunks(folder / "chunks", sizes.n_answers, sizes.width, sizes)
    files = {
        name: sorted(path for path in (folder / name).iterdir() if path.suffix != ".json")
        for name in ("wide", "narrow")
    }
    n_bytes = {
        name: sum(path.stat().st_size for path in paths)
        for name, paths in (*files.items(), ("chunks", chunks))
    }
    contenders = {
        "stream as stored": _stream(wide, sizes, "float16"),
        "stream as float32": _stream(wide, sizes, "float32"),
        "plain read": _read_shards(files["wide"]),
        "read of 1 MiB blocks": lambda: _read_blocks(files["wide"]),
        "read into new memory":
            lambda: deque((path.read_bytes() for path in files["wide"]), maxlen=0),
        "torch.load of padded chunks":
            lambda: deque((torch.load(path, weights_only=True) for path in chunks), maxlen=0),
        "narrow stream": _stream(narrow, sizes, "float32"),
        "narrow plain read": _read_shards(files["narrow"]),
    }
    seconds = ratios.interleave(contenders, repeats=sizes.repeats, warmup=2)
    note = f"{n_bytes['wide'] / 1e6:.0f} MB, width {sizes.width}"
    found = [
        ratios.ratio("streaming bytes/s, as stored", seconds, "stream as stored", "plain read",
                     target=0.8, note=note),
        ratios.ratio("the same against a read that keeps nothing", seconds, "stream as stored",
                     "read of 1 MiB blocks"),
        ratios.ratio("the same against new memory for each file", seconds, "stream as stored",
                     "read into new memory"),
        ratios.ratio("streaming bytes/s, into float32", seconds, "stream as float32", "plain read"),
        ratios.ratio("answers/s, as stored", seconds, "stream as stored",
                     "torch.load of padded chunks", target=5),
        ratios.ratio("answers/s, both float32", seconds, "stream as float32",
                     "torch.load of padded chunks"),
        ratios.ratio("streaming bytes/s, small answers", seconds, "narrow stream",
                     "narrow plain read", note=f"width {sizes.narrow_width}, float32"),
    ]
    middle = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    return found, {
        "answers": sizes.n_answers, "answer_tokens": list(sizes.lengths), "bytes": n_bytes,
        "gb_per_second": {
            "stream as stored": n_bytes["wide"] / middle["stream as stored"] / 1e9,
            "plain read": n_bytes["wide"] / middle["plain read"] / 1e9,
            "torch.load of padded chunks": n_bytes["chunks"] /
                                           middle["torch.load of padded chunks"] / 1e9,
        }, "page_cache": "warm for every contender",
    }


# --- bytes and memory
# ------------------------------------------------------------------------------------------------


def bytes_per_pair(folder: Path, sizes: Sizes, n: int = 64) -> dict[str, Any]:
    """Bytes on disk a pair, all files of the run counted, over those of the reference's padded
    float32 chunks of the same answers.

    A pair of S tokens padded to L costs 8·D·L bytes there, and 4·D·S (bf16) or 2·(D + 4)·S (int8)
    here, besides 16·S for ids and texts.
    """
    chunks = sum(path.stat().st_size
                 for path in write_chunks(folder / "counted" / "chunks", n, sizes.width, sizes)) / n
    found: dict[str, Any] = {"reference": chunks, "pairs": n, "answer_tokens": list(sizes.lengths)}
    for dtype in ("fp32", "bf16", "fp16", "int8"):
        place = folder / "counted" / dtype
        write_run(place, n, sizes.width, sizes, dtype)
        own = sum(path.stat().st_size for path in place.iterdir()) / n
        found[dtype] = {"bytes": own, "share": own / chunks}
    return found


_PEAK = """
import sys
from collections import deque
from benchmarks.ratios import peak_bytes
from xsd.shards.loader import Loader
from xsd.shards.store import ShardDataset
dataset = ShardDataset(sys.argv[1])
loader = Loader(dataset, batch_size=int(sys.argv[2]), shuffle_seed=0, prefetch=2)
if sys.argv[3] == "stream":
    deque(loader, maxlen=0)
print(peak_bytes(), loader.memory_bound())
"""


def peak_memory(folder: Path, sizes: Sizes, times: tuple[int, ...] = (1, 2, 4)) -> dict[str, Any]:
    """Peak memory of a process that streams one epoch, at 1, 2 and 4 times the size, over one that
    only opens the smallest. In bytes."""
    def peak(place: Path, what: str) -> tuple[int, int]:
        command = [sys.executable, "-c", _PEAK, str(place), str(sizes.batch_size), what]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return tuple(int(value) for value in done.stdout.split())  # type: ignore[return-value]

    rows, opened = [], 0
    for factor in times:
        n = sizes.n_answers // times[-1] * factor
        place = folder / "memory" / str(factor)
        write_run(place, n, sizes.width, sizes, "fp16")
        size = sum(path.stat().st_size for path in place.iterdir())
        opened = opened or peak(place, "open")[0]
        streamed, bound = peak(place, "stream")
        rows.append({
            "times": factor, "dataset": size, "peak": streamed, "above_opening": streamed - opened,
            "bound": bound
        })
    return {"rows": rows, "largest_over_smallest": rows[-1]["peak"] / rows[0]["peak"]}


def memory_table(found: dict[str, Any]) -> str:
    """:func:`peak_memory` as a Markdown table, in MB."""
    lines = [
        "| dataset, MB | peak of the process, MB | of it streaming, MB | stated bound of the "
        "loader, MB |",
        "|---|---|---|---|"
    ]
    for row in found["rows"]:
        lines.append("| " + " | ".join(f"{row[name] / 1e6:.0f}"
                                       for name in ("dataset", "peak", "above_opening", "bound")) +
                     " |")
    return "\n".join(lines)


def bytes_table(found: dict[str, Any]) -> str:
    """:func:`bytes_per_pair` as a Markdown table."""
    aims = {"bf16": 0.4, "int8": 0.2}
    lines = [
        "| stored as | kB a pair | of the reference's padded float32 | aim | met |",
        "|---|---|---|---|---|"
    ]
    for dtype in ("fp32", "bf16", "fp16", "int8"):
        aim = aims.get(dtype)
        met = "" if aim is None else "yes" if found[dtype]["share"] <= aim else "**no**"
        share, kilobytes = found[dtype]["share"], found[dtype]["bytes"] / 1e3
        lines.append(
            f"| {dtype} | {kilobytes:.0f} | {share:.3f} | {'' if aim is None else f'≤ {aim:g}'} | "
            f"{met} |"
        )
    return "\n".join(lines)
