"""The metric kernels against the least that could be done: ``xsd bench metrics`` and ``make
bench-metrics`` (docs/metrics.md, section 11).

The stand-in for 11 000 answers × 50 positions × 4096 bf16 (9 GB, aligned and target) is a generated
file as large as the machine's free memory allows; it is streamed in batches through one buffer, by
the metrics and by the bare read alike, in the same rounds.
"""

from __future__ import annotations

import statistics as plain_statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import ratios, states
from xsd.core import ROOT
from xsd.evaluate import metrics, reliability
from xsd.evaluate.kernels import cosines, head_tokens
from xsd.evaluate.statistics import bootstrap_ratio
from xsd.models import planning

FULL = 11_000
"""Answers of the set that the file stands for."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. n_samples: of the generated file; None takes an eighth of the free memory,
    at most 640 and at least 64.

    vocabularies: the sizes at which the memory of the head pass over memory_rows states is
    compared. loop_positions: what the plain Python loop gets through.
    """

    n_samples: int | None = None
    full: int = FULL
    positions: int = 50
    width: int = 4096
    batch: int = 16
    vocabulary: int = 32_000
    head_samples: int = 5
    vocabularies: tuple[int, ...] = (16_000, 32_000, 128_000)
    memory_rows: int = 2_000
    loop_positions: int = 60
    resamples: int = 10_000
    repeats: int = 4


def hidden_pass(file: states.StateFile, n_batches: int | None = None) -> np.ndarray:
    """All that the hidden-state figures keep of the streamed set: the cosine of every position,
    float32 [answers, S]."""
    mask = torch.ones(file.shape[1:3], dtype=torch.bool)
    states = (torch.from_numpy(buffer).view(torch.bfloat16) for buffer in file.batches(n_batches))
    return np.concatenate([cosines(aligned, target, mask).numpy() for aligned, target in states])


def token_table(**columns: np.ndarray) -> pd.DataFrame:
    """Columns [answers, S] as a token table; every answer its own cluster, the dearest case."""
    n, size = next(iter(columns.values())).shape
    answer = np.repeat(np.arange(n), size)
    names = pd.Categorical.from_codes(answer, [f"s{i:06d}" for i in range(n)])
    return pd.DataFrame({
        "level": "", "sample": answer, "sequence": names, "position": np.tile(np.arange(size), n),
        **{name: values.reshape(-1) for name, values in columns.items()}
    })


def run(out: Path, sizes: Sizes | None = None) -> str:
    """Measure on one thread, write ``ratios.json`` into ``out`` and return the Markdown table with
    the facts below it."""
    sizes, threads = sizes or Sizes(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as place:
            measured, facts = _hidden(Path(place) / "states.bin", sizes)
        measured += _head(sizes)
        facts |= _statistics(sizes) | {"peak_memory_of_the_head_mb": head_memory(sizes)}
    finally:
        torch.set_num_threads(threads)
    ratios.save(out, measured, facts=facts)
    return ratios.table(measured) + "\n\n" + "\n".join(sentences(facts, sizes))


def n_samples_for(free_bytes: float | None, sizes: Sizes) -> int:
    """How many answers the file gets: an eighth of the free memory, between 64 and 640, a whole
    number of batches."""
    one = 4 * sizes.positions * sizes.width
    fits = 640 if free_bytes is None else min(640, max(64, int(free_bytes / 8 / one)))
    return max(1, (sizes.n_samples or fits) // sizes.batch) * sizes.batch


def _hidden(path: Path, sizes: Sizes) -> tuple[list[ratios.Ratio], dict[str, Any]]:
    file = states.StateFile(path, (sizes.batch, sizes.positions, sizes.width),
                            n_samples_for(planning.free_bytes("cpu"), sizes))
    first = torch.from_numpy(next(file.batches()).copy()).view(torch.bfloat16).reshape(
        2, -1, sizes.width)[:, :sizes.loop_positions]
    one_pass = file.n_samples * sizes.positions
    seconds = ratios.interleave(
        {
            "hidden pass": lambda: hidden_pass(file),
            "read and sum as float32": lambda: states.read_and_sum(file),
            "read and sum as words": lambda: states.read_and_sum_words(file),
            "plain loop": lambda: states.plain_loop(*first.tolist()),
            "loop of tensor operations": lambda: states.loop_of_tensors(*first),
        }, repeats=sizes.repeats,
    )

    def against(name: str, target: float | None, note: str, work: int = one_pass) -> ratios.Ratio:
        options = {"ours_work": one_pass, "alternative_work": work, "target": target, "note": note}
        return ratios.ratio("hidden-state pass", seconds, "hidden pass", name, **options)

    measured = [
        against("read and sum as float32", 0.5, "the same bytes as the numbers they are"),
        against("read and sum as words", None,
                "the same bytes as 64-bit integers: the speed of memory"),
        against("plain loop", 100, f"Python, {len(first[0])} positions", len(first[0])),
        against("loop of tensor operations", None, "a position at a time", len(first[0])),
    ]
    before, start = ratios.peak_bytes() / 1e6, time.perf_counter()
    whole = hidden_pass(file, -(-sizes.full // sizes.batch))
    passed = time.perf_counter() - start
    metrics.state_figures(token_table(one_step_cosine=whole))
    facts = {
        "file_gb": file.n_bytes / 1e9, "file_samples": file.n_samples,
        "full_pass_samples": len(whole),
        "full_pass_gb": file.n_bytes / 1e9 * len(whole) / file.n_samples,
        "full_pass_s": passed, "full_result_s": time.perf_counter() - start - passed,
        "full_pass_peak_growth_mb": ratios.peak_bytes() / 1e6 - before,
    }
    return measured, facts


def _head(sizes: Sizes) -> list[ratios.Ratio]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(sizes.head_samples, sizes.positions, sizes.width, generator=generator)
    weight = torch.randn(sizes.vocabulary, sizes.width, generator=generator).mul_(0.02)
    ids = torch.randint(0, sizes.vocabulary, states.shape[:2], generator=generator)
    flat, targets = states.flatten(0, 1), ids.flatten()
    seconds = ratios.interleave({
        "token metrics": lambda: head_tokens(flat, weight, top_k=5, targets=targets),
        "bare matrix product": lambda: flat @ weight.T,
    }, repeats=max(1, sizes.repeats - 2))
    note = f"top-5, cross-entropy; {len(flat)} × {sizes.width} × {sizes.vocabulary}"
    return [
        ratios.ratio("token metrics", seconds, "token metrics", "bare matrix product", target=0.7,
                     note=note)
    ]


def _statistics(sizes: Sizes) -> dict[str, Any]:
    """Seconds of the bootstrap and of whole results when every sample is its own cluster."""
    rng = np.random.default_rng(0)
    n, names = sizes.full, [f"s{i:06d}" for i in range(sizes.full)]
    length = np.full(n, sizes.positions)
    matched = rng.binomial(length, 0.7)
    shape = n, sizes.positions
    match = rng.binomial(1, 0.7, shape).astype(bool)
    table = token_table(
        one_step_match=match, one_step_rank=np.where(match, 0, 255),
        cross_entropy=np.full(shape, np.nan, np.float32),
        one_step_cosine=rng.uniform(0.5, 1.0, shape).astype(np.float32))
    resamples = {"n_resamples": sizes.resamples}
    return {
        "bootstrap_samples": n,
        "bootstrap_resamples": sizes.resamples,
        "bootstrap_s": _median_s(lambda: bootstrap_ratio(matched, length, names, **resamples)),
        "token_result_s": _median_s(lambda: metrics.token_figures(table)),
        "reliability_result_s": _median_s(lambda: reliability.figures(table)),
    }


def head_memory(sizes: Sizes) -> dict[str, float]:
    """Growth of a fresh process's peak memory while the head is applied, in MB, by vocabulary; the
    head's own weight is there before."""
    found = {}
    for vocabulary in sizes.vocabularies:
        code = ("from benchmarks import metrics; "
                f"print(metrics.head_growth_mb({sizes.memory_rows}, 128, {vocabulary}))")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              check=True, cwd=ROOT)
        found[str(vocabulary)] = float(done.stdout)
    return found


def head_growth_mb(rows: int, width: int, vocabulary: int) -> float:
    """Peak memory that ``head_tokens`` adds to this process, in MB; meant for a fresh process,
    whose peak nothing else has raised."""
    torch.set_num_threads(1)
    weight, states = torch.ones(vocabulary, width), torch.ones(rows, width)
    head_tokens(states[:2], weight[:64], top_k=5,
                targets=torch.zeros(2, dtype=torch.int64))  # libraries are loaded before the count
    before = ratios.peak_bytes() / 1e6
    head_tokens(states, weight, top_k=5, targets=torch.zeros(rows, dtype=torch.int64))
    return ratios.peak_bytes() / 1e6 - before


def sentences(facts: dict[str, Any], sizes: Sizes) -> list[str]:
    """The facts of a run as lines of a list."""
    memory = ", ".join(f"{mb:.0f} MB at {int(size):,} tokens".replace(",", " ")
                       for size, mb in facts["peak_memory_of_the_head_mb"].items())
    return [
        f"- The file held {facts['file_samples']} answers ({facts['file_gb']:.2f} GB); a pass over "
        f"{facts['full_pass_samples']} answers "
        f"({facts['full_pass_gb']:.1f} GB, the file again and again) took "
        f"{facts['full_pass_s']:.1f} s and raised the peak memory by "
        f"{facts['full_pass_peak_growth_mb']:.0f} MB; its result with intervals "
        f"{facts['full_result_s']:.1f} s.",
        f"- Bootstrap, {facts['bootstrap_resamples']} resamples of {facts['bootstrap_samples']} "
        "samples, each its own cluster: "
        f"{facts['bootstrap_s']:.2f} s (aim ≤ 2 s). Token result {facts['token_result_s']:.1f} s, "
        "reliability "
        f"{facts['reliability_result_s']:.1f} s.",
        f"- What the head pass adds to the peak memory: {memory} ({sizes.memory_rows} states; a "
        "whole matrix of logits takes "
        f"{4 * sizes.memory_rows * sizes.vocabularies[-1] / 1e6:.0f} MB at the largest).",
    ]


def _median_s(call: Callable[[], object], repeats: int = 3) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return plain_statistics.median(seconds)


if __name__ == "__main__":
    ratios.main("metrics", run)
