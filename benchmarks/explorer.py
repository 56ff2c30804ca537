"""The acceptance explorer over a token table of 11 000 answers × 50 positions × 3 levels: what each
control costs, against the plain functions of the table that say the same (``xsd bench explorer``).

The table is made up in the documented form (docs/metrics.md, section 1): answers of 110 sequences,
cosines that go with the matches, texts as categoricals. Seconds are of this process's CPU alone, so
that a busy machine changes little; figures of other revisions: docs/benchmarks/README.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import ratios
from xsd.evaluate import curves
from xsd.views import controls, explorers

LEVELS = {"L1": 0.70, "L4": 0.78, "L5F": 0.85}
"""Levels of the made-up table: the share of tokens that each gets right at position 0."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. actions: of every control."""

    samples: int = 11_000
    positions: int = 50
    sequences: int = 110
    actions: int = 7


def token_table(sizes: Sizes, seed: int = 0) -> pd.DataFrame:
    """The made-up token table, one row per level, answer and position."""
    draw, n = np.random.default_rng(seed), sizes.samples * sizes.positions
    answer = np.repeat(np.arange(sizes.samples), sizes.positions)
    position = np.tile(np.arange(sizes.positions, dtype=np.int32), sizes.samples)
    sequence, question = np.arange(sizes.samples) % sizes.sequences, np.arange(sizes.samples) % 10
    clip = np.arange(sizes.samples) // (10 * sizes.sequences)
    names = [f"s{a:03d}/{b:06d}/{i:08x}" for i, (a, b) in enumerate(zip(sequence, clip,
                                                                         strict=True))]

    def texts(codes: np.ndarray, said: list[str]) -> pd.Categorical:
        return pd.Categorical.from_codes(codes, said)

    about = {"sample": texts(answer, names),
             "sequence": texts(sequence[answer], [f"s{i:03d}" for i in range(sizes.sequences)]),
             "clip": texts(clip[answer], [f"{i:06d}" for i in range(int(clip.max()) + 1)]),
             "question": texts(question[answer], [f"Question {i}?" for i in range(10)]),
             "position": position}
    words = [f"▁word{i}" for i in range(400)]
    said = draw.integers(len(words), size=n)
    parts = []
    for number, share in enumerate(LEVELS.values()):
        match = draw.random(n) < share - 0.004 * position
        drafted = np.where(match, said, draw.integers(len(words), size=n))
        parts.append(pd.DataFrame({
            "level": texts(np.full(n, number), list(LEVELS)), **about, "match": match,
            "cosine": np.clip(draw.normal(np.where(match, 0.93, 0.8), 0.05), -1, 1),
            "draft_probability": draw.random(n), "accepted": np.where(match, 5, 0).astype(np.int32),
            "one_step_rank": np.where(match, 0, 255).astype(np.uint8),
            "draft_token": texts(drafted, words), "verifier_token": texts(said, words),
            "kind": texts(said % 6, ["colour", "count", "function", "motion", "object", "place"]),
        }))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(run=texts(np.zeros(len(table), int), ["made up · held out"]))


def actions(explorer: controls.AcceptanceExplorer) -> dict[str, Callable[[int], None]]:
    """What a hand does to each control, the n-th time."""
    def by_cosine(n: int) -> None:
        explorer.rule.value = "token" if n % 2 else "cosine"

    def threshold(n: int) -> None:
        explorer.rule.value = "cosine"
        explorer.tau.value = 0.6 + 0.03 * n

    def position(n: int) -> None:
        explorer.click(1 + n)

    def curve(n: int) -> None:
        explorer.curve.value = ["survival", "marginal"][n % 2]

    def levels(n: int) -> None:
        explorer.levels.value = list(LEVELS)[:1 + (n + 1) % 3] if n < 6 else list(LEVELS)

    def sample(n: int) -> None:
        explorer.samples.value = explorer.samples.options[1 + n][1]

    def search(n: int) -> None:
        explorer.search.value = f"s{n:03d} word{n}"

    return {"threshold": threshold, "accepted by": by_cosine, "curve": curve, "levels": levels,
            "position": position, "sample": sample, "search": search}


def cpu_ms(act: Callable[..., object], *given: object) -> float:
    """CPU milliseconds of this process for one call."""
    start = time.process_time()
    act(*given)
    return 1e3 * (time.process_time() - start)


def plain(table: pd.DataFrame, tau: float) -> None:
    """Curve and headline from the rows of the table."""
    curves.by_position(table, tau)
    curves.unbroken_prefix(table, tau)


def run(out: Path, sizes: Sizes | None = None) -> str:
    """Measure, write ``ratios.json`` into ``out`` and return the Markdown table: opening, each
    control, and the plain way, which works out curve and headline from the table's rows."""
    sizes = sizes or Sizes()
    small = explorers.ExplorerData(token_table(Sizes(20, 5, 2)))
    controls.AcceptanceExplorer(small)  # the libraries of widgets and figures are loaded now
    table = token_table(sizes)
    opened: list[controls.AcceptanceExplorer] = []
    opening = cpu_ms(lambda: opened.append(
        controls.AcceptanceExplorer(explorers.ExplorerData(table), levels=list(LEVELS))))
    explorer, found = opened[0], {}
    for name, act in actions(explorer).items():
        found[name] = statistics.median(cpu_ms(act, n) for n in range(sizes.actions))
    from_rows = statistics.median(cpu_ms(plain, table, tau) for tau in (0.7, 0.8, 0.9))
    facts = {"rows": len(table), "opening_ms": opening, "action_ms": found, "plain_ms": from_rows}
    ratios.save(out, [], facts=facts)
    rows = {"opening": opening, **found, "plain: curve and headline from the rows": from_rows}
    lines = [f"{len(table):,} rows, CPU ms (median of {sizes.actions})".replace(",", " "), "",
             "| control | ms |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {ms:.0f} |" for name, ms in rows.items())])


if __name__ == "__main__":
    ratios.main("explorer", run)
