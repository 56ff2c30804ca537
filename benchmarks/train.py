"""``xsd bench train``: tokens a second of the trainer against the bare loop over the same module on
data already in memory.

Counted: one pass over the same answers in the same batches. Ours is
:meth:`xsd.train.fit.Training.train_pass` as in a real training: gathering and padding each batch
from the packed states, the named objective with its curves, clipping, the NaN check, the optimiser.
The bare loop has the padded batches ready in a list and does forward, the reference's loss,
backward and the same AdamW step, no more. Evaluation and writing checkpoints are not training and
are not in it. Both train; their weights are thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import ratios
from xsd.adapters import registry
from xsd.adapters.base import alignment_loss
from xsd.core import PairedStates
from xsd.train import fit, source
from xsd.train.recipes import FitConfig

LEVELS = ("L1", "L4", "L5F")
AIM = 0.9


@dataclass(frozen=True)
class Size:
    """drafter, verifier: widths. answers, tokens: how many, and the longest. batch_size: answers a
    batch."""

    name: str
    drafter: int
    verifier: int
    answers: int
    tokens: int
    batch_size: int


SIZES = (Size("D = 192, as the embedded pair", 128, 192, 142, 32, 64),
         Size("D = 1024", 1024, 1024, 36, 16, 16))


def answers(size: Size, seed: int = 0) -> list[PairedStates]:
    """Random paired answers of half to all of ``size.tokens`` tokens, ten sequences."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index in range(size.answers):
        n = int(torch.randint(size.tokens // 2, size.tokens + 1, (1,), generator=draw))
        ids = torch.randint(100, (n,), generator=draw)
        states = (torch.randn(n, width, generator=draw) for width in (size.drafter, size.verifier))
        made.append(
            PairedStates(f"s{index % 10}", f"{index:06d}", "", *states, ids, ids, "teacher_forced",
                         split="train"))
    return made


def contenders(level: str, size: Size, states: source.PackedStates,
               folder: Path) -> tuple[dict[str, Callable[[], object]], int]:
    """The two passes over one module each, and the real positions in a pass."""
    config = FitConfig(batch_size=size.batch_size)
    training = fit.Training(level, states, folder, config)
    training.prepare()
    bare = registry.create_adapter(level, size.verifier, drafter_size=size.drafter).train()
    optimiser = torch.optim.AdamW(bare.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    batches = list(states.batches(training.train_indices, size.batch_size, shuffle_seed=0))

    def bare_pass() -> None:
        for batch in batches:
            aligned, target, _, mask = bare.align(batch)
            alignment_loss(aligned, target, mask)["total_loss"].backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    tokens = sum(int(batch.mask.sum()) for batch in batches)
    return {"trainer": lambda: training.train_pass(0), "bare loop": bare_pass}, tokens


def run(out: Path, *, sizes: tuple[Size, ...] = SIZES, levels: tuple[str, ...] = LEVELS,
        repeats: int = 9) -> str:
    """Measure, write ``ratios.json`` into ``out`` and return the Markdown table."""
    found, facts = [], {}
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        for size in sizes:
            states = source.PackedStates(answers(size))
            for level in levels:
                calls, tokens = contenders(level, size, states, Path(folder) / level)
                seconds = ratios.interleave(calls, repeats=repeats)
                one = ratios.ratio(f"{level}, {size.name}", seconds, "trainer", "bare loop",
                                   target=AIM, note="tokens a second")
                found.append(one)
                facts[one.name] = {
                    "tokens": tokens, "tokens_per_s": tokens / one.ours_s,
                    "bare_tokens_per_s": tokens / one.alternative_s
                }
    ratios.save(out, found, facts=facts | {"threads": torch.get_num_threads()})
    return ratios.table(found)


if __name__ == "__main__":
    ratios.main("train", run)
