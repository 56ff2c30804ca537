"""Extraction and shards against the plain ways: ``xsd bench extract`` and ``make bench-extract``
(docs/shards.md, "Measured").

Extraction is measured on the embedded pair and the shipped recording, all else on a generated run
(bench_streaming).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ratios
from benchmarks import streaming as bench_streaming
from xsd.core import Sample
from xsd.extract import pairs, plan
from xsd.models import loading
from xsd.models.batched import Continuation
from xsd.models.handle import ModelHandle
from xsd.steps import data


@dataclass(frozen=True)
class Sizes:
    """What is measured. n_questions: samples of the recording, answered in one batch. streaming: of
    the generated run."""

    n_questions: int = 30
    max_new_tokens: int = 48
    repeats: int = 3
    streaming: bench_streaming.Sizes = field(default_factory=bench_streaming.Sizes)


# --- extraction
# ------------------------------------------------------------------------------------------------


def extraction_ratios(pair: loading.Pair, samples: list[Sample],
                      sizes: Sizes) -> tuple[list[ratios.Ratio], dict[str, Any]]:
    """Pairs a second: all samples in one batch against one after another, for both kinds of pairs;
    and counts of the answers.

    The images' tokens are remembered from the warm-up on by every contender alike, so the vision
    towers are in none of these figures.
    """
    n, longest = len(samples), sizes.max_new_tokens
    known = pair.verifier.generate(samples, longest, batch_size=n)

    def free(batch_size: int) -> None:
        for start in range(0, n, batch_size):
            pairs.free_running_pairs(pair, samples[start:start + batch_size], longest, batch_size)

    def forced(batch_size: int) -> None:
        for start in range(0, n, batch_size):
            part = slice(start, start + batch_size)
            pairs.teacher_forced_pairs(pair, samples[part], longest, batch_size,
                                       verifier=known[part])

    contenders = {
        "free, batched": lambda: free(n),
        "free, one at a time": lambda: free(1),
        "forced, batched": lambda: forced(n),
        "forced, one at a time": lambda: forced(1),
        "forced, token by token": lambda: token_by_token(pair, samples, known),
        "forced, token by token in transformers":
            lambda: token_by_token(pair, samples, known, plain=True),
    }
    seconds = ratios.interleave(contenders, repeats=sizes.repeats)
    about = f"{n} pairs"
    found = [
        ratios.ratio("free-running pairs/s", seconds, "free, batched", "free, one at a time",
                     target=5, note=about),
        ratios.ratio("teacher-forced pairs/s, answers known", seconds, "forced, batched",
                     "forced, token by token in transformers", target=10, note=about,
                     ),
        ratios.ratio("the same against the handle's own fused steps", seconds, "forced, batched",
                     "forced, token by token"),
        ratios.ratio("the same against one pass for each sample", seconds, "forced, batched",
                     "forced, one at a time"),
        ratios.ratio("teacher-forced against free-running pairs/s", seconds, "forced, batched",
                     "free, one at a time"),
    ]
    lengths = [len(answer.ids) for answer in known]
    return found, {
        "pairs": n, "answer_tokens_mean": sum(lengths) / n, "answer_tokens_longest": max(lengths),
        "pairs_per_second": {
            name: n / sorted(values)[len(values) // 2] for name, values in seconds.items()
        }, "threads": torch.get_num_threads(),
    }


def token_by_token(pair: loading.Pair, samples: list[Sample], known: list[Continuation], *,
                   plain: bool = False) -> list[Tensor]:
    """Teacher-forced states without a batch: each sample alone, each token one step of the
    drafter's cache. A list of [n, D].

    plain: call the decoder as any user of transformers would, without the handle's fused steps
    (models.small_steps). As in pairs.teacher_forced_pairs, an answer ends with the position that
    predicts a token the drafter does not know.
    """
    found = []
    for sample, answer in zip(samples, known, strict=True):
        foreign = (answer.ids[:-1] >= pair.draft_vocab_size).nonzero()
        given = answer.ids[:int(foreign[0]) if len(foreign) else -1]
        steps = _plain_steps if plain else _own_steps
        found.append(steps(pair.drafter, sample, given))
    return found


def _own_steps(handle: ModelHandle, sample: Sample, given: Tensor) -> Tensor:
    state = handle.prefill(sample, reuse_vision=True)
    return torch.cat(
        [state.hidden[None], *(handle.extend(state, token[None])[0] for token in given)])


@torch.no_grad()
def _plain_steps(handle: ModelHandle, sample: Sample, given: Tensor) -> Tensor:
    embeds, cache, rows = handle.prompt_embeddings(sample)[None], None, []
    for place in range(len(given) + 1):
        output = handle.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.last_hidden_state[0, -1:])
        handle.lm_head(rows[-1]).argmax(-1)  # the drafter's own choice there belongs to a pair
        embeds = handle.model.get_input_embeddings()(given[place:place + 1])[None]
    return torch.cat(rows)


# --- all of it
# ------------------------------------------------------------------------------------------------


def run(out: Path, sizes: Sizes | None = None) -> str:
    """Measure everything, write ``ratios.json`` into ``out`` and return the tables as Markdown."""
    sizes = sizes or Sizes()
    pair = loading.load_pair("embedded")
    root = data.root_of(out, data.RECORDED, "test")
    lazy = data.samples(root, "test", n_event_frames=pair.n_event_frames, canvas=pair.event_canvas)
    found, facts = extraction_ratios(pair, plan.load(lazy[:sizes.n_questions]), sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        streamed, read_facts = bench_streaming.streaming_ratios(folder, sizes.streaming)
        counted = bench_streaming.bytes_per_pair(folder, sizes.streaming)
        memory = bench_streaming.peak_memory(folder, sizes.streaming)
    found += streamed
    ratios.save(out, found, facts={"extraction": facts, "streaming": read_facts,
                                   "bytes_per_pair": counted, "memory": memory})
    return "\n\n".join((ratios.table(found), bench_streaming.bytes_table(counted),
                        bench_streaming.memory_table(memory)))


if __name__ == "__main__":
    ratios.main("extract", run)
