"""The baseline every speed-up is measured against: greedy decoding, one token a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xsd.core import DecoderHandle, Generation, ParameterError, not_finite
from xsd.decode.overlap import Timeline


@torch.inference_mode()
def generate(verifier: DecoderHandle, sample: Any, max_new_tokens: int,
             clock: Callable[[], float] = time.perf_counter) -> Generation:
    """Greedy continuation of ``sample`` up to and with the first EOS, without rounds; a span for
    the prefill and one for each further token. Raises: ParameterError if max_new_tokens < 1; as
    :func:`greedy`."""
    check_length(max_new_tokens)
    timeline = Timeline(clock)
    with timeline.span("verifier", "prefill"):
        state = verifier.prefill(sample)
        ids = greedy(state.logits[None], verifier)
    first_token_s = timeline.now()
    while ids[-1] not in verifier.eos_token_ids and len(ids) < max_new_tokens:
        with timeline.span("verifier", "step"):
            _, logits = verifier.extend(state, torch.tensor(ids[-1:], device=state.logits.device))
            ids += greedy(logits[-1:], verifier)
    finish = "eos" if ids[-1] in verifier.eos_token_ids else "length"
    return Generation(tuple(ids), finish, (), timeline.spans(), first_token_s, timeline.now())


def greedy(logits: Tensor, handle: object) -> list[int]:
    """The best id of each row of logits [n, V]. Raises: CheckpointError naming the handle's role
    where they are no numbers."""
    best = logits.argmax(-1, keepdim=True)  # of a row with NaN: the NaN
    if not all(map(math.isfinite, logits.gather(-1, best)[:, 0].tolist())):
        raise not_finite(getattr(handle, "role", "model"))
    return best[:, 0].tolist()


def check_length(max_new_tokens: int) -> None:
    """Raises: ParameterError unless at least one token is asked for."""
    if max_new_tokens < 1:
        raise ParameterError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
