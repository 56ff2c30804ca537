"""Lossless cross-modal speculative decoding: draft during the verifier's prefill, verify in one
pass, then rounds to the end.

The verifier's cache, with P prompt positions and drafts x y z (docs/decoding.md draws it in full):

    prefill      [P]                      the last prompt row predicts token 0: x is checked for free, before anything is fed
    hiding       [P | x y z]              one extend; row i predicts the token after draft i
      x y accepted, z refused for b:
                 [P | x y]         b      rollback; b, the verifier's own token, waits outside the cache
    round        [P | x y | b u v w]      one extend of gamma + 1 rows: the waiting token and the next drafts
      u accepted, v refused for c:
                 [P | x y b u]     c

Whatever is drafted, every token that leaves is the argmax of a verifier row after exactly the
tokens before it; that is the whole proof of losslessness. What remains is rounding between one-row
and many-row passes, which :mod:`xsd.decode.certificate` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xsd.core import DecoderHandle, Generation, ParameterError, Round
from xsd.decode import overlap as lanes
from xsd.decode.autoregressive import check_length
from xsd.decode.proposers import Proposer, TwoPhase


@torch.inference_mode()
def generate(verifier: DecoderHandle, proposer: Proposer, sample: Any, *, gamma: int,
             max_new_tokens: int, hide_prefill: bool = True, gamma_prefill: int | None = None,
             first_proposer: Proposer | None = None, overlap: lanes.Overlap = "threads",
             clock: Callable[[], float] = time.perf_counter,
             ) -> Generation:
    """Greedy continuation of ``sample``, token for token the verifier's own, drafted by
    ``proposer``.

    gamma: drafts a round. hide_prefill: draft while the verifier prefills, as many tokens as fit
    until it is done, at most
    ``gamma_prefill`` (default: the whole answer; with overlap="serial", where nothing ends the
    drafting, gamma). first_proposer drafts that phase in place of ``proposer`` (an L4 before an
    L5F, which needs verifier states). overlap: "threads" (really concurrent) or "serial".

    Returns: Generation. Its rounds account for every token: ``sum(n_accepted + (bonus is not None))
    == len(ids)``; the first has phase
    "prefill_hiding" (with no drafts where none were ready). ``first_token_s`` is the end of the
    verifier's prefill, when token 0 is known.
    Raises: ParameterError if gamma, gamma_prefill or max_new_tokens < 1.
    """
    check_length(max_new_tokens)
    if gamma < 1 or (gamma_prefill is not None and gamma_prefill < 1):
        raise ParameterError(
            f"gamma is {gamma} and gamma_prefill {gamma_prefill}; draft at least 1 token, or use "
            "autoregressive.generate"
        )
    if first_proposer is not None:
        proposer = TwoPhase(first_proposer, proposer)
    timeline = lanes.Timeline(clock)
    room = max_new_tokens - 1  # the bonus fills the last place
    hidden_drafts = min(room, gamma_prefill or (gamma if overlap == "serial" else room))
    if not hide_prefill or proposer.needs_verifier:
        hidden_drafts = 0

    def prefill() -> tuple[Any, int, float]:
        with timeline.span("verifier", "prefill"):
            state = verifier.prefill(sample)
            first = int(state.logits.argmax())
        return state, first, timeline.now()

    def draft(stop: lanes.Stop) -> tuple[list[int], float, float]:
        proposer.begin(sample, timeline)
        start = timeline.now()
        drafts = proposer.propose(hidden_drafts, stop) if hidden_drafts else []
        return drafts, start, timeline.now()

    (state, first, first_token_s), (drafts, draft_start,
                                    draft_end) = lanes.run_lanes(prefill, draft, overlap)

    ids: list[int] = []
    rounds: list[Round] = []
    phase = "prefill_hiding"
    while True:
        drafts = _cut(drafts, max_new_tokens - len(ids) - 1, verifier.eos_token_ids)
        verify_start = timeline.now()
        if phase == "prefill_hiding":
            base = state.length
            predicted, hidden = [first], state.hidden[None]
            rows = _without_eos(drafts, verifier.eos_token_ids) if drafts[:1] == [first] else [
            ]  # a wrong first draft costs no pass at all
        else:
            base = state.length + 1
            predicted, hidden = [], None
            rows = [ids[-1], *_without_eos(drafts, verifier.eos_token_ids)]
        if rows:
            with timeline.span("verifier", "verify" if drafts else "step"):
                more, logits = verifier.extend(state, torch.tensor(rows,
                                                                   device=state.logits.device))
                predicted += logits.argmax(-1).tolist()
            hidden = more if hidden is None else torch.cat([hidden, more])
        n_accepted, bonus = judge(drafts, predicted)
        tokens = [*drafts[:n_accepted]] if bonus is None else [*drafts[:n_accepted], bonus]
        ids += tokens
        finished = ids[-1] in verifier.eos_token_ids or len(ids) >= max_new_tokens
        if not finished and state.length > base + n_accepted:
            verifier.rollback(state, base + n_accepted)
        rounds.append(
            Round(tuple(drafts), n_accepted, bonus, draft_start, draft_end, verify_start,
                  timeline.now(), phase))
        if finished:
            break
        _tell(proposer, tokens, hidden)
        phase = "decode"
        draft_start = timeline.now()
        wanted = min(gamma, max_new_tokens - len(ids) - 1)
        drafts = proposer.propose(wanted) if wanted else []
        draft_end = timeline.now()
    finish = "eos" if ids[-1] in verifier.eos_token_ids else "length"
    return Generation(tuple(ids), finish, tuple(rounds), timeline.spans(), first_token_s,
                      timeline.now())


def judge(drafts: Sequence[int], predicted: Sequence[int]) -> tuple[int, int | None]:
    """Length of the correct prefix of ``drafts``, and the verifier's own token after it.

    ``predicted[i]`` is the verifier's token where ``drafts[i]`` stands; one prediction more than
    drafts gives the bonus after full acceptance, none more (the last draft was EOS and never fed)
    gives None.

    >>> judge([5, 6, 7], [5, 6, 9, 1])
    (2, 9)
    >>> judge([5, 6], [5, 6, 8])
    (2, 8)
    >>> judge([5, 0], [5, 0])
    (2, None)
    """
    n = 0
    while n < len(drafts) and n < len(predicted) and drafts[n] == predicted[n]:
        n += 1
    return n, predicted[n] if n < len(predicted) else None


def _cut(drafts: Sequence[int], room: int, eos: frozenset[int]) -> list[int]:
    """At most ``room`` drafts, none after the first EOS."""
    kept: list[int] = []
    for token in drafts[:max(room, 0)]:
        kept.append(token)
        if token in eos:
            break
    return kept


def _without_eos(drafts: Sequence[int], eos: frozenset[int]) -> Sequence[int]:
    """The rows worth feeding: nobody reads what follows EOS."""
    return drafts[:-1] if drafts and drafts[-1] in eos else drafts


def _tell(proposer: Proposer, tokens: Sequence[int], hidden: Tensor) -> None:
    """hidden [rows, D_v] begins at the first new token; row i predicted ``tokens[i]``."""
    proposer.observe(tokens, hidden[:len(tokens)])
