"""The arms of a live comparison, by name; every one is a function ``(sample, max_new_tokens) ->
Generation`` on the same loaded models.

| name | what drafts |
|---|---|
| ``ar`` | nobody: the project's own greedy loop, the reference of every equality check |
| ``hf_generate``, ``hf_prompt_lookup`` | transformers' own ``generate`` on the verifier: what a user would pick instead |
| ``drafter`` | the drafter's own tokens, no adapter |
| ``ngram``, ``prompt_lookup`` | a table of training answers; the prompt and the answer so far |
| ``L1`` … ``L5F``, ``B1``, any key of ``adapters`` | that adapter |
| ``L4+L5F``, ``L4+ngram`` | the first during the verifier's prefill, the second in the rounds after it |
"""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from xsd.core import Generation, ParameterError, Sample
from xsd.decode import autoregressive, proposers, rules, speculative, tracks
from xsd.decode.overlap import Overlap
from xsd.models.handle import ModelHandle
from xsd.models.loading import Pair

BASELINES = ("ar", "hf_generate", "hf_prompt_lookup")
PLAIN = (*BASELINES, "drafter", "ngram", "prompt_lookup")


@dataclass(frozen=True)
class Arm:
    """lossless: claims the verifier's own ids. baseline: one of those a speed-up is measured
    against.

    info: the settings (adapter weights included) that must not change when a run is resumed.
    """

    name: str
    run: Callable[[Sample, int], Generation]
    verifier: ModelHandle
    lossless: bool = True
    baseline: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


def build(name: str, pair: Pair, adapters: Mapping[str, proposers.Adapter] | None = None, *,
          gamma: int = 5, gamma_prefill: int | None = None, hide_prefill: bool = True,
          overlap: Overlap = "threads", min_probability: float = 0.0,
          ngram: Callable[[Sequence[int]], int | None] | None = None, ngram_hash: str = "",
          label: str | None = None,
          ) -> Arm:
    """The arm called ``name`` (see the table above); ``label`` is its name in the records where one
    name is measured with two settings.

    adapters: level → adapter with ``reads`` and ``step``. ngram: prefix ids → next id or None (for
    ``ngram``); ngram_hash: of what
    the table was made from, kept in the arm's info. gamma_prefill: at most so many drafts behind
    the prefill.
    min_probability: a less likely draft ends the drafting of its round. Raises: ParameterError
    naming the arms there are.
    """
    adapters = adapters or {}
    verifier = pair.verifier
    if name in BASELINES:
        run = {
            "ar": lambda sample, n: autoregressive.generate(verifier, sample, n),
            "hf_generate": lambda sample, n: hf_generate(verifier, sample, n),
            "hf_prompt_lookup": lambda sample, n: hf_prompt_lookup(verifier, sample, n, gamma),
        }[name]
        return Arm(label or name, run, verifier, baseline=True, info={"kind": name})
    first, main = _proposers(name, pair, adapters, ngram)
    for each in (first, main):
        if each is not None:
            each.min_probability = min_probability  # type: ignore[attr-defined]

    def run(sample: Sample, max_new_tokens: int) -> Generation:
        return speculative.generate(verifier, main, sample, gamma=gamma,
                                    max_new_tokens=max_new_tokens, gamma_prefill=gamma_prefill,
                                    hide_prefill=hide_prefill, first_proposer=first,
                                    overlap=overlap,
                                    )

    info = {
        "kind": name, "gamma": gamma, "gamma_prefill": gamma_prefill, "hide_prefill": hide_prefill,
        "overlap": overlap
    }
    info["min_probability"] = min_probability
    info["adapters"] = {
        level: adapter_hash(adapters[level]) for level in name.split("+") if level in adapters
    }
    if name not in ("ngram", "prompt_lookup") and hasattr(pair.drafter, "weights_hash"):
        info["drafter"] = pair.drafter.weights_hash()
    if "ngram" in name.split("+"):
        info["ngram"] = ngram_hash
    return Arm(label or name, run, verifier, info=info)


def _proposers(
    name: str, pair: Pair, adapters: Mapping[str, Any],
    ngram: Callable[[Sequence[int]], int | None] | None
) -> tuple[proposers.Proposer | None, proposers.Proposer]:
    drafter, verifier = pair.drafter, pair.verifier
    eos, ids = verifier.eos_token_ids, pair.draft_vocab_size or verifier.draft_vocab_size
    if name == "drafter":
        return None, proposers.DrafterTokens(tracks.DrafterTrack(drafter), ids, eos)
    levels = name.split("+")
    if "ngram" in levels and ngram is None:
        raise ParameterError(
            "the arm 'ngram' needs a table: pass ngram=, a function from prefix ids to the next id")
    if name == "ngram":
        return None, proposers.RuleProposer(lambda sample: ngram, eos)
    if name == "prompt_lookup":
        def lookup(sample: Sample) -> rules.Rule:
            before, after = verifier.prompt_ids(sample.question)
            return rules.prompt_lookup([*before, *after])

        return None, proposers.RuleProposer(lookup, eos)
    missing = [
        level for place, level in enumerate(levels)
        if level not in adapters and not (place and level == "ngram")
    ]
    if missing or len(levels) > 2:
        have = ", ".join([*PLAIN, *sorted(adapters)])
        raise ParameterError(
            f"no arm {name!r}: it names {', '.join(missing) or 'three phases'}; there are {have}, "
            "and two adapters as 'L4+L5F'"
        )
    track = tracks.DrafterTrack(drafter)  # shared by both phases: one drafter prefill a request
    made: list[proposers.Proposer] = []
    for level in levels:
        if level == "ngram":
            made.append(proposers.RuleProposer(lambda sample: ngram, eos))
            continue
        adapter = adapters[level].eval() if hasattr(adapters[level], "eval") else adapters[level]
        made.append(
            proposers.AdapterProposer(track, adapter, draft_head(verifier, adapter), ids, eos))
    return (None, made[0]) if len(made) == 1 else (made[0], made[1])


def draft_head(verifier: Any, adapter: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The verifier's head as an adapter drafts through it: only the rows of its draft vocabulary,
    where it has one."""
    ids = getattr(adapter, "draft_ids", None)
    if ids is None or not hasattr(verifier, "head"):
        return verifier.lm_head
    rows = verifier.head.weight.detach()[ids.to(
        verifier.head.weight.device)]  # copied once, read for every draft
    return lambda hidden: torch.nn.functional.linear(hidden.to(rows.device, rows.dtype), rows)


def available_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def adapter_hash(adapter: Any) -> str:
    """First 16 hex digits of SHA-256 over the adapter's tensors; "" for one without any."""
    if not hasattr(adapter, "state_dict"):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# --- transformers' own generation
# ------------------------------------------------------------------------------------------


class _FirstToken(StoppingCriteria):
    """Called after every step; never stops anything, remembers when the first one ended."""
    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def hf_inputs(handle: ModelHandle, sample: Sample) -> dict[str, torch.Tensor]:
    """What ``model.generate`` takes for the verifier: input_ids [1, L] with one video token for
    each visual one, pixel_values_videos."""
    before, after = handle.prompt_ids(sample.question)
    config = handle.model.config
    video_token = getattr(config, "video_token_id", None) or config.video_token_index
    pixels = handle.pixels(list(sample.video)).to(handle.device, handle.head.weight.dtype)
    ids = torch.tensor([[*before, *[video_token] * _n_visual(handle, sample), *after]],
                       device=handle.device)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels[None]
    }


_VISUAL_TOKENS: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()
"""Model → frames → visual tokens, found once (in the warm-up) so that counting them does not enter
the measured time."""


def _n_visual(handle: ModelHandle, sample: Sample) -> int:
    counts = _VISUAL_TOKENS.setdefault(handle.model, {})
    if len(sample.video) not in counts:
        counts[len(sample.video)] = len(handle.visual_tokens(sample))
    return counts[len(sample.video)]


@torch.inference_mode()
def hf_generate(handle: ModelHandle, sample: Sample, max_new_tokens: int,
                **options: Any) -> Generation:
    """transformers' greedy ``generate`` on the same model, from pixels to ids; options go to it
    (``prompt_lookup_num_tokens``).

    ``first_token_s`` is the end of its first step (with prompt lookup that step may already give
    several tokens). No rounds: it keeps none.
    """
    autoregressive.check_length(max_new_tokens)
    start = time.perf_counter()
    inputs = hf_inputs(handle, sample)
    first = _FirstToken()
    output = handle.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False,
                                   eos_token_id=sorted(handle.eos_token_ids),
                                   pad_token_id=min(handle.eos_token_ids, default=0),
                                   stopping_criteria=StoppingCriteriaList([first]), **options,
                                   )
    ids = output[0, inputs["input_ids"].shape[1]:].tolist()[:max_new_tokens]
    total_s = time.perf_counter() - start
    end = next((i + 1 for i, token in enumerate(ids) if token in handle.eos_token_ids), len(ids))
    finish = "eos" if ids[end - 1] in handle.eos_token_ids else "length"
    return Generation(tuple(ids[:end]), finish, (), (), (first.at or start) - start, total_s)


def hf_prompt_lookup(handle: ModelHandle, sample: Sample, max_new_tokens: int,
                     n_drafts: int) -> Generation:
    """transformers' prompt lookup with at most ``n_drafts`` candidates a round.

    Its candidates are copied from the prompt, which holds a placeholder for every visual token; a
    placeholder outside the prompt makes the model's forward fail, so they are suppressed
    (candidates then end before them; an answer never holds one).
    """
    config = handle.model.config
    ids = [
        getattr(config, f"{kind}_token_{word}", None) for kind in ("image", "video")
        for word in ("id", "index")
    ]
    placeholders = sorted({token for token in ids if token is not None})
    return hf_generate(handle, sample, max_new_tokens, prompt_lookup_num_tokens=n_drafts,
                       suppress_tokens=placeholders)
