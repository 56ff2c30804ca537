"""What ``xsd bench full-size`` measures, part by part; each returns what its row of the JSON
holds."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import full_size_pair
from xsd.bench import baselines, costs
from xsd.core import Generation, Sample, XsdError
from xsd.decode import autoregressive, proposers, speculative, tracks
from xsd.models import planning, quantization
from xsd.models.handle import ModelHandle


@dataclass
class Bench:
    """What the parts share. until: when the present one must end, on time.perf_counter. found: what
    the parts before it returned."""

    size: full_size_pair.Size
    device: str
    dtype: torch.dtype
    until: float = 0.0
    handles: dict[str, ModelHandle] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def verifier(self) -> ModelHandle:
        """In 16 or 32 bits, while it is loaded."""
        return self.handles["verifier"]

    @functools.cached_property
    def sample(self) -> Sample:
        """The request that everything is measured on."""
        return full_size_pair.sample(self.size)

    def left(self) -> float:
        """Seconds of the present part that are left."""
        return self.until - time.perf_counter()

    def settle(self) -> None:
        """Wait for what was started on the GPU."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give unused memory back, and count its peak anew."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def rows(table: Any) -> dict[str, Any]:
    """What costs.measure found, by operation."""
    return table.set_index("what")[["ms", "low", "high"]].astype(float).to_dict("index")


def load(bench: Bench) -> dict[str, Any]:
    """Both models in the dtype of the device, and how fast it reads memory."""
    found: dict[str, Any] = {}
    for role in ("drafter", "verifier"):
        start = time.perf_counter()
        model = full_size_pair.make(bench.size, role, bench.dtype, bench.device)
        bench.settle()
        bench.handles[role] = full_size_pair.handle_of(bench.size, role, model)
        found[role] = {
            "made_s": time.perf_counter() - start, "weight_bytes": quantization.weight_bytes(model)
        }
    machine = planning.measure_machine(bench.device, size=128 if bench.device == "cpu" else 768)
    read = quantization.weight_bytes(bench.verifier.decoder.layers) + (quantization.weight_bytes(
        bench.verifier.head))
    return found | {
        "machine": machine.name, "gb_s": machine.gb_s, "step_reads_bytes": read,
        "floor_ms": read / machine.gb_s / 1e6
    }


def prefills(bench: Bench) -> dict[str, Any]:
    """Both prefills and what of them is the processor's (pixels) and the tower's."""
    operations: dict[str, Callable[[], Any]] = {}
    for role in ("drafter", "verifier"):
        handle, sample = bench.handles[role], bench.sample
        operations |= {
            f"{role} prefill": lambda h=handle, s=sample: int(h.prefill(s).logits.argmax()),
            f"{role} pixels": lambda h=handle, s=sample: h.pixels(h.images(s)),
            f"{role} pixels, tower and projector": lambda h=handle, s=sample: h.visual_tokens(
                s, reuse=False)
        }
    return rows(costs.measure(operations, repeats=bench.size.repeats)) | {
        "positions": {
            role: bench.handles[role].prefill(bench.sample).length
            for role in ("drafter", "verifier")
        }
    }


def answers(bench: Bench, ways: Mapping[str, Callable[[int], Generation]],
            warm: int = 1) -> dict[str, Any]:
    """Medians of whole answers by each way in turn; one that fails says why and the others go
    on."""
    n, own = bench.size.tokens, bench.found.get("ids")
    found: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            for _ in range(warm):
                way(n)
            runs = [way(n) for _ in range(1 if bench.left() < 10 else 3)]
        except Exception as error:
            found[name] = {"error": sentence(error)}
            continue
        own = own or runs[0].ids
        total, first = (1e3 * statistics.median(getattr(run, what) for run in runs)
                        for what in ("total_s", "first_token_s"))
        found[name] = {
            "total_ms": total, "first_token_ms": first,
            "ms_per_token": (total - first) / max(len(runs[0].ids) - 1, 1),
            "tokens": len(runs[0].ids), "identical": runs[0].ids == tuple(own)
        }
    bench.found.setdefault("ids", own)
    return found


def ladder(bench: Bench) -> dict[str, Any]:
    """The greedy loops one may be compared with, but for the one that is compiled first."""
    handle, sample = bench.verifier, bench.sample
    plain = handle.plain()
    return answers(
        bench, {
            "ar": lambda n: autoregressive.generate(handle, sample, n),
            "ar, transformers' passes": lambda n: autoregressive.generate(plain, sample, n),
            "hf_generate": lambda n: baselines.hf_generate(handle, sample, n),
            "hf_prompt_lookup": lambda n: baselines.hf_prompt_lookup(handle, sample, n, 5),
        }) | {"steps": handle.steps_in_words()}


def static(bench: Bench) -> dict[str, Any]:
    """``generate`` over a static cache, on CUDA compiled first, which takes the longest."""
    return answers(bench,
                   {"hf_static": lambda n: baselines.hf_static(bench.verifier, bench.sample, n)},
                   warm=2)


def verification(bench: Bench) -> dict[str, Any]:
    """v(K) of the verifier, after an answer of some tokens."""
    return curve(bench, bench.verifier)


def curve(bench: Bench, handle: ModelHandle) -> dict[str, Any]:
    """v(K) of any verifier, in ms and in steps."""
    found = costs.verification_curve(handle, bench.sample, rows=bench.size.rows, context=8,
                                     repeats=bench.size.repeats)
    ms = dict(zip(map(str, found["rows"]), found["ms"].astype(float), strict=True))
    return {
        "ms": ms, "steps": {rows: one / ms["1"] for rows, one in ms.items()},
        "on": handle.steps_in_words()
    }


def overlap(bench: Bench) -> dict[str, Any]:
    """Both prefills and eight drafts: one after the other, in two streams, and the longer alone."""
    drafter = bench.handles["drafter"]
    proposer = proposers.DrafterTokens(tracks.DrafterTrack(drafter), bench.size.shared)
    lanes = costs.prefill_overlap(bench.verifier, proposer, bench.sample, n_drafts=8,
                                  repeats=bench.size.repeats)
    return rows(lanes) | {"hidden_share": costs.hidden_share(lanes)}


def in_fewer_bits(quant: str) -> Callable[[Bench], dict[str, Any]]:
    """The part that measures the verifier quantised so."""
    def part(bench: Bench) -> dict[str, Any]:
        start = time.perf_counter()
        model = full_size_pair.quantised(bench.verifier.model, quant, bench.dtype, bench.device)
        bench.settle()
        handle = full_size_pair.handle_of(bench.size, "verifier", model)
        found = {
            "made_s": time.perf_counter() - start, "weight_bytes": quantization.weight_bytes(model)
        }
        if quant == "4bit":
            bench.handles[quant] = handle
        answer = answers(bench, {"ar": lambda n: autoregressive.generate(handle, bench.sample, n)})
        return found | {"answer": answer["ar"], "v": curve(bench, handle)}

    return part


def small(bench: Bench) -> dict[str, Any]:
    """Both models in NF4 alone on the device: what a speculative answer takes at most."""
    verifier = bench.handles.pop("4bit")
    model = full_size_pair.quantised(bench.handles["drafter"].model, "4bit", bench.dtype,
                                     bench.device)
    bench.handles = {
        "drafter": full_size_pair.handle_of(bench.size, "drafter", model), "verifier": verifier
    }
    bench.clear()
    proposer = proposers.DrafterTokens(tracks.DrafterTrack(bench.handles["drafter"]),
                                       bench.size.shared, verifier.eos_token_ids)
    got = answers(
        bench, {
            "drafter's tokens": lambda n: speculative.generate(verifier, proposer, bench.sample,
                                                               gamma=5, max_new_tokens=n)
        })["drafter's tokens"]
    return got | {"peak_bytes": quantization.peak_memory_bytes(bench.device)}


def sentence(error: BaseException) -> str:
    """An error in one line."""
    said = str(error) if isinstance(error, XsdError) else f"{type(error).__name__}: {error}"
    return said.partition("\n")[0][:300]
