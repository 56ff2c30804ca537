"""transformers' own greedy generation on the verifier: what a user would pick instead."""

import time
import weakref
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from xsd.core import Generation, Sample
from xsd.decode import autoregressive
from xsd.models.handle import ModelHandle


class _FirstToken(StoppingCriteria):
    """Called after every step; never stops anything, remembers when the first one ended."""
    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def hf_inputs(handle: ModelHandle, sample: Sample) -> dict[str, torch.Tensor]:
    """What ``model.generate`` takes: input_ids [1, L], a placeholder for each visual token, and
    pixel_values_videos."""
    before, after = handle.prompt_ids(sample.question)
    config = handle.model.config
    video_token = getattr(config, "video_token_id", None) or config.video_token_index
    pixels = handle.pixels(list(sample.video)).to(handle.device, handle.head.weight.dtype)
    ids = torch.tensor([[*before, *[video_token] * _n_visual(handle, sample), *after]],
                       device=handle.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values_videos": pixels[None]}


_ROUND = 256
_VISUAL_TOKENS: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()
"""Model → frames → visual tokens, counted in the warm-up, outside the measured time."""


def _n_visual(handle: ModelHandle, sample: Sample) -> int:
    counts = _VISUAL_TOKENS.setdefault(handle.model, {})
    if len(sample.video) not in counts:
        counts[len(sample.video)] = len(handle.visual_tokens(sample))
    return counts[len(sample.video)]


@torch.inference_mode()
def hf_generate(handle: ModelHandle, sample: Sample, max_new_tokens: int,
                **options: Any) -> Generation:
    """transformers' greedy ``generate`` on the same model, from pixels to ids; options go to it.
    ``first_token_s`` is the end of its first step, which prompt lookup may fill with several
    tokens. It keeps no rounds."""
    autoregressive.check_length(max_new_tokens)
    start = time.perf_counter()
    inputs = hf_inputs(handle, sample)
    length = inputs["input_ids"].shape[1]
    handle.check_length(length)
    room = handle.max_positions - length + 1  # transformers would go on beyond
    first, eos = _FirstToken(), handle.eos_token_ids
    output = handle.model.generate(**inputs, max_new_tokens=min(max_new_tokens, room),
                                   do_sample=False, eos_token_id=sorted(eos),
                                   pad_token_id=min(eos, default=0),
                                   stopping_criteria=StoppingCriteriaList([first]), **options)
    ids = output[0, length:].tolist()[:max_new_tokens]
    total_s = time.perf_counter() - start
    end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
    if ids[end - 1] not in eos and end < max_new_tokens:
        handle.check_length(length + end)
    return Generation(tuple(ids[:end]), "eos" if ids[end - 1] in eos else "length", (), (),
                      (first.at or start) - start, total_s)


def hf_static(handle: ModelHandle, sample: Sample, max_new_tokens: int) -> Generation:
    """transformers' ``generate`` over a static cache, which on CUDA compiles the decoder at its
    first calls (so warm up before you measure) and not on a CPU. The cache is a round number of
    positions: one of another size would be compiled for again."""
    before, after = handle.prompt_ids(sample.question)
    needed = len(before) + _n_visual(handle, sample) + len(after) + max_new_tokens
    return hf_generate(handle, sample, max_new_tokens, cache_implementation="static",
                       max_cache_len=-(-needed // _ROUND) * _ROUND)


def hf_prompt_lookup(handle: ModelHandle, sample: Sample, max_new_tokens: int,
                     n_drafts: int) -> Generation:
    """transformers' prompt lookup with at most ``n_drafts`` candidates a round, copied from the
    prompt. Placeholders of visual tokens are suppressed: outside the prompt they make the model's
    forward fail."""
    names = [f"{kind}_token_{word}" for kind in ("image", "video") for word in ("id", "index")]
    found = {getattr(handle.model.config, name, None) for name in names} - {None}
    return hf_generate(handle, sample, max_new_tokens, prompt_lookup_num_tokens=n_drafts,
                       suppress_tokens=sorted(found))
