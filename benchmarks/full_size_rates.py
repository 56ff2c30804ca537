"""What ``xsd bench full-size`` measures of adapters, drafts, extraction and training."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import full_size_pair, train
from benchmarks.full_size_parts import Bench, answers, rows, sentence
from xsd.adapters import registry
from xsd.bench import costs
from xsd.core import Sample
from xsd.decode import blocks, proposers, speculative, tracks
from xsd.models import quantization
from xsd.train import fit, source
from xsd.train.recipes import FitConfig

DIALS, BLOCK = (0.8, 0.6, 1.0), 8
CONTEXT = 64
FREE, FORCED = 32, 50
"""Tokens of an answer in the extraction."""


def _adapter(bench: Bench, level: str) -> Any:
    torch.manual_seed(0)
    options, depth = {}, len(bench.verifier.decoder.layers)
    if level in registry.BLOCKS:
        options = {
            "context_layers": sorted({depth // 3, 2 * depth // 3, depth - 1}),
            "vocab_size": bench.size.shared
        }
    made = registry.create_adapter(level, bench.verifier.hidden_size,
                                   drafter_size=bench.handles["drafter"].hidden_size, **options)
    return made.to(bench.device, bench.dtype).eval()


def adapter_steps(bench: Bench) -> dict[str, Any]:
    """A step of every level with the head it drafts through, and of both models."""
    found, pair = {}, (bench.handles["drafter"], bench.verifier)
    for level in registry.LEVELS:
        if bench.left() < 3:
            return found | {"error": f"out of time before {level}"}
        try:
            adapter = _adapter(bench, level)
            one = rows(
                costs.step_costs(*pair, {level: adapter}, bench.sample, context=CONTEXT,
                                 repeats=bench.size.repeats))
        except Exception as error:
            one = {f"adapter {level}": {"error": sentence(error)}}
        found |= one
    return found


class Script:
    """Offers the right token with a given probability, else a wrong one."""
    def script(self, ids: tuple[int, ...], share: float) -> Any:
        """ids: the verifier's own answer."""
        self._ids, self._share, self._draw = ids, share, random.Random(0)
        return self

    def offered(self, at: int) -> int:
        """The draft at a place of the answer."""
        right = self._ids[min(at, len(self._ids) - 1)]
        wrong = right + 1 if right + 2 < self.draft_vocab_size else right - 1
        return right if self._draw.random() < self._share else wrong


class Dial(Script, proposers.AdapterProposer):
    """Pays for every draft with a step of an adapter."""
    def next_token(self, drafts: Any) -> int | None:
        super().next_token(drafts)
        return self.offered(len(self.known) + len(drafts))


class BlockDial(Script, blocks.BlockProposer):
    """Pays for all drafts of a round with one pass of a block drafter."""
    def propose(self, gamma: int, stop: Any = proposers.never) -> list[int]:
        super().propose(gamma, stop)
        return [self.offered(len(self.known) + k) for k in range(gamma)]


def dial(bench: Bench) -> dict[str, Any]:
    """Whole answers with drafts of a B1, and with blocks of a D1, that are right as often as
    dialled; the same ids as alone."""
    handle, sample, ids = bench.verifier, bench.sample, tuple(bench.found["ids"])
    made = handle.lm_head, bench.size.shared, handle.eos_token_ids
    steps, block = Dial(None, _adapter(bench, "B1"),
                        *made), BlockDial(None, _adapter(bench, "D1"), *made)

    def way(proposer: Any, share: float, gamma: int) -> Any:
        return lambda n: speculative.generate(handle, proposer.script(ids, share), sample, gamma=
                                              gamma, max_new_tokens=n)

    return answers(
        bench, {
            f"{share:g} right, {name}": way(proposer, share, gamma) for share in DIALS
            for name, proposer, gamma in (("5 drafts", steps, 5), ("15 drafts", steps, 15),
                                          (f"a block of {BLOCK}", block, BLOCK))
        })


@torch.inference_mode()
def blocks_of(bench: Bench) -> dict[str, Any]:
    """A pass of each block drafter with the head: with the prompt's context read before, and with
    all of it to read."""
    found: dict[str, Any] = {}
    for level in registry.BLOCKS:
        if bench.left() < 3:
            return found | {"error": f"out of time before {level}"}
        adapter, handle = _adapter(bench, level), bench.verifier
        track = tracks.DrafterTrack(bench.handles["drafter"])
        proposer = blocks.BlockProposer(track, adapter, handle.lm_head, bench.size.shared)
        state = handle.prefill(bench.sample, layers=proposer.context_layers)

        def begin(proposer: Any = proposer, state: Any = state) -> None:
            proposer.begin(bench.sample)
            proposer.observe([full_size_pair.FIRST_ID], state.hidden[None])
            if state.context:
                proposer.read_context(state.context, state.length)

        def first(proposer: Any = proposer) -> None:
            proposer.kept = proposer.adapter.keep()
            proposer.read = dict.fromkeys(proposer.roles, 0)
            proposer.propose(BLOCK)

        begin()
        found |= rows(
            costs.measure(
                {
                    f"{level}, a block of {BLOCK}": lambda p=proposer: p.propose(BLOCK),
                    f"{level}, the first block": first
                }, repeats=bench.size.repeats))
    return found


def extraction(bench: Bench) -> dict[str, Any]:
    """Answers a second by batch: the verifier's own, and both models forced along one."""
    found: dict[str, Any] = {"free": {}, "forced": {}}
    for batch in bench.size.batches:
        samples = [full_size_pair.sample(bench.size, i) for i in range(batch)]
        ids = [torch.arange(FORCED) + full_size_pair.FIRST_ID] * batch

        def free(some: list[Sample] = samples) -> None:
            bench.verifier.generate(some, FREE, batch_size=len(some))

        def forced(some: list[Sample] = samples, ids: Any = ids) -> None:
            for role in ("verifier", "drafter"):
                bench.handles[role].force(some, ids, batch_size=len(some))

        for name, work in (("forced", forced), ("free", free)):
            if bench.left() < 6:
                return found | {"error": f"out of time before batches of {batch}"}
            for role in ("verifier", "drafter"):
                bench.handles[role]._vision.clear()
            start = time.perf_counter()
            try:
                work()
            except torch.OutOfMemoryError:
                return found | {"error": f"batches of {batch} do not fit"}
            bench.settle()
            found[name][str(batch)] = batch / (time.perf_counter() - start)
    return found


def training(bench: Bench) -> dict[str, Any]:
    """Tokens a second of the trainer by level and batch, and the most memory it took."""
    width, (n, tokens) = bench.verifier.hidden_size, bench.size.answers
    states = source.PackedStates(
        train.answers(train.Size("", bench.handles["drafter"].hidden_size, width, n, tokens, 0)))
    bench.handles.clear()  # of the models nothing is needed any more
    found: dict[str, Any] = {}
    for level in ("L5F", "L1", "L4"):
        for batch in (4, 16, 64):
            if bench.left() < 4:
                return found | {"error": f"out of time before {level} in batches of {batch}"}
            bench.clear()
            with tempfile.TemporaryDirectory() as folder:
                one = fit.Training(level, states, Path(folder), FitConfig(batch_size=batch),
                                   device=bench.device)
                one.prepare()
                one.train_pass(0)
                bench.settle()
                start = time.perf_counter()
                one.train_pass(1)
                bench.settle()
            seconds = time.perf_counter() - start
            found.setdefault(level, {})[str(batch)] = {
                "tokens_per_s": float(states.lengths[one.train_indices].sum()) / seconds,
                "peak_bytes": quantization.peak_memory_bytes(bench.device)
            }
    return found
