"""The baseline every speed-up is measured against: greedy decoding, one token a step."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xsd.core import DecoderHandle, Generation, ParameterError
from xsd.decode.acceptance import GREEDY, Greedy
from xsd.decode.overlap import Timeline


@torch.inference_mode()
def generate(verifier: DecoderHandle, sample: Any, max_new_tokens: int,
             clock: Callable[[], float] = time.perf_counter,
             acceptance: Greedy = GREEDY) -> Generation:
    """Greedy (or sampled) continuation of ``sample`` up to and with the first EOS, without rounds;
    a span for the prefill and one for each further token. Raises: ParameterError if max_new_tokens
    < 1; as acceptance.greedy."""
    check_length(max_new_tokens)
    timeline, acceptance = Timeline(clock), acceptance.begin()

    def said(logits: Tensor) -> int:
        return acceptance.said(acceptance.rows(logits, verifier)[0])

    with timeline.span("verifier", "prefill"):
        state = verifier.prefill(sample)
        ids = [said(state.logits[None])]
    first_token_s = timeline.now()
    while ids[-1] not in verifier.eos_token_ids and len(ids) < max_new_tokens:
        with timeline.span("verifier", "step"):
            _, logits = verifier.extend(state, torch.tensor(ids[-1:], device=state.logits.device))
            ids.append(said(logits[-1:]))
    finish = "eos" if ids[-1] in verifier.eos_token_ids else "length"
    return Generation(tuple(ids), finish, (), timeline.spans(), first_token_s, timeline.now())


def check_length(max_new_tokens: int) -> None:
    """Raises: ParameterError unless at least one token is asked for."""
    if max_new_tokens < 1:
        raise ParameterError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
