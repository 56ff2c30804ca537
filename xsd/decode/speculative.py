"""Lossless cross-modal speculative decoding: draft during the verifier's prefill, verify in one
pass, then rounds to the end (docs/decoding.md draws the cache at every step). Every token that
leaves is the argmax of a verifier row after exactly the tokens before it: that proves it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xsd.core import DecoderHandle, Generation, ParameterError, Round
from xsd.decode import overlap as lanes
from xsd.decode.autoregressive import check_length, greedy
from xsd.decode.proposers import Proposer
from xsd.decode.trees import Drafts, Tree


@torch.inference_mode()
def generate(verifier: DecoderHandle, proposer: Proposer, sample: Any, *, gamma: int,
             max_new_tokens: int, hide_prefill: bool = True, gamma_prefill: int | None = None,
             overlap: lanes.Overlap = "threads",
             clock: Callable[[], float] = time.perf_counter) -> Generation:
    """Greedy continuation of ``sample``, token for token the verifier's own.

    gamma: drafts a round. hide_prefill: draft while the verifier prefills, as many tokens as fit
    until it is done, at most ``gamma_prefill`` (default: the whole answer; with overlap="serial",
    where nothing ends the drafting, gamma). The first round is of phase "prefill_hiding", without
    drafts where none were ready. Raises: ParameterError if a gamma or max_new_tokens is below 1.
    """
    check_length(max_new_tokens)
    if gamma < 1 or (gamma_prefill is not None and gamma_prefill < 1):
        raise ParameterError(
            f"gamma is {gamma} and gamma_prefill {gamma_prefill}; draft at least 1 token, or use "
            "autoregressive.generate")
    timeline, eos = lanes.Timeline(clock), verifier.eos_token_ids
    positions = getattr(verifier, "max_positions", sys.maxsize)
    room = max_new_tokens - 1  # the bonus fills the last place
    hidden_drafts = min(room, gamma_prefill or (gamma if overlap == "serial" else room))
    if not hide_prefill or proposer.needs_verifier:
        hidden_drafts = 0
    (state, last, first_token_s), (drafts, started, drafted) = _prefill(
        verifier, proposer, sample, hidden_drafts, timeline, overlap)
    ids: list[int] = []
    rounds: list[Round] = []
    while True:
        hiding = not rounds
        kept = state.length + (not hiding)
        # as far as the plain loop may go, and no row further
        drafts = cut(drafts, max_new_tokens - len(ids) - 1, eos, positions - kept)
        if hiding and isinstance(drafts, Tree):
            drafts = drafts.first(drafts.under(last))  # no row is fed of what begins otherwise
        verify_start = timeline.now()
        predicted, hidden = _verify(verifier, state, drafts, last, hiding, timeline)
        path, tokens, bonus = accepted(drafts, predicted)
        ids += tokens
        last = ids[-1]
        finished = last in eos or len(ids) >= max_new_tokens
        if not finished:
            _keep(verifier, state, kept, path)
        said, parents = tuple(drafts), None
        if isinstance(drafts, Tree):
            said, parents = drafts.first(path).tokens, drafts.first(path).parents
        rounds.append(
            Round(said, len(path), bonus, started, drafted, verify_start, timeline.now(),
                  "prefill_hiding" if hiding else "decode", parents))
        if finished:
            break
        if parents is not None:
            hidden = hidden[[0, *(1 + node for node in path)]]
        if getattr(state, "context", None) is not None:
            proposer.read_context(state.context, state.length)
        proposer.observe(tokens, hidden[:len(tokens)])  # row i predicted tokens[i]
        started = timeline.now()
        wanted = min(gamma, max_new_tokens - len(ids) - 1)
        drafts = proposer.propose(wanted) if wanted else []
        drafted = timeline.now()
    return Generation(tuple(ids), "eos" if last in eos else "length", tuple(rounds),
                      timeline.spans(), first_token_s, timeline.now())


def _prefill(verifier: DecoderHandle, proposer: Proposer, sample: Any, n_drafts: int,
             timeline: lanes.Timeline, overlap: lanes.Overlap,
             ) -> tuple[tuple[Any, int, float], tuple[Sequence[int], float, float]]:
    """(state, token 0, when known) of the verifier and (drafts, start, end) of the drafter."""
    def prefill() -> tuple[Any, int, float]:
        with timeline.span("verifier", "prefill"):
            layers = getattr(proposer, "context_layers", ())
            state = verifier.prefill(sample, **({"layers": layers} if layers else {}))
            first = greedy(state.logits[None], verifier)[0]
        return state, first, timeline.now()

    def draft(stop: lanes.Stop) -> tuple[Sequence[int], float, float]:
        proposer.begin(sample, timeline)
        start = timeline.now()
        drafts = proposer.propose(n_drafts, stop) if n_drafts else []
        return drafts, start, timeline.now()

    return lanes.run_lanes(prefill, draft, overlap)


def _verify(verifier: DecoderHandle, state: Any, drafts: Drafts, last: int, hiding: bool,
            timeline: lanes.Timeline) -> tuple[list[int], Tensor]:
    """The verifier's tokens from the first draft's place on, and their states [n, D_v]."""
    predicted, hidden = ([last], [state.hidden[None]]) if hiding else ([], [])
    rows, parents = rows_to_feed(drafts, last, verifier.eos_token_ids, hiding)
    if rows:
        with timeline.span("verifier", "verify" if drafts else "step"):
            fed = torch.tensor(rows, device=state.logits.device)
            more, logits = (verifier.extend(state, fed) if parents is None else
                            verifier.extend(state, fed, parents))
            predicted += greedy(logits, verifier)
        hidden.append(more)
    return predicted, torch.cat(hidden)


def _keep(verifier: DecoderHandle, state: Any, kept: int, path: Sequence[int]) -> None:
    """Forget the rows of this round but the accepted ones: node i stands at kept + i."""
    if list(path) != list(range(len(path))):
        verifier.rollback(state, kept, [kept + node for node in path])
    elif state.length > kept + len(path):
        verifier.rollback(state, kept + len(path))


def accepted(drafts: Drafts, predicted: Sequence[int]) -> tuple[Sequence[int], list[int],
                                                                int | None]:
    """Which drafts the verifier agrees with, the tokens that leave, and the last of them where it
    is the verifier's own (:func:`judge`, and Tree.walk)."""
    if isinstance(drafts, Tree):
        path, bonus = drafts.walk(predicted)
        tokens = [drafts.tokens[node] for node in path]
    else:
        n, bonus = judge(drafts, predicted)
        path, tokens = range(n), list(drafts[:n])
    return path, tokens + ([] if bonus is None else [bonus]), bonus


def judge(drafts: Sequence[int], predicted: Sequence[int]) -> tuple[int, int | None]:
    """Length of the correct prefix of ``drafts``, and the verifier's own token after it (None where
    the last draft was EOS, which is never fed). ``predicted[i]`` stands where ``drafts[i]`` does.

    >>> judge([5, 6, 7], [5, 6, 9, 1]), judge([5, 6], [5, 6, 8]), judge([5, 0], [5, 0])
    ((2, 9), (2, 8), (2, None))
    """
    n = 0
    while n < len(drafts) and n < len(predicted) and drafts[n] == predicted[n]:
        n += 1
    return n, predicted[n] if n < len(predicted) else None


def cut(drafts: Drafts, room: int, eos: frozenset[int], rows: int = sys.maxsize) -> Drafts:
    """Drafts for at most ``room`` tokens and ``rows`` rows, none after the first EOS."""
    if isinstance(drafts, Tree):
        return drafts.cut(room, rows, eos)
    kept = list(drafts[:max(min(room, rows), 0)])
    end = next((i + 1 for i, token in enumerate(kept) if token in eos), len(kept))
    return kept[:end]


def rows_to_feed(drafts: Drafts, last: int, eos: frozenset[int],
                 hiding: bool) -> tuple[list[int], list[int] | None]:
    """What the verifier's pass reads: its own ``last`` token, which waits outside the cache, and
    the drafts; and of a tree, the row before each. Behind the prefill (hiding) ``last`` is token 0,
    of which the state is known: the drafts alone, and none where the first is another (a wrong
    first draft costs no pass at all)."""
    if isinstance(drafts, Tree):
        n = len(drafts.under(last)) if hiding else len(drafts)
        fed = drafts.only(range(n)) if hiding else drafts
        n = fed.n_fed(eos)
        rows, parents = list(fed.tokens[:n]), list(fed.parents[:n])
        return (rows, parents) if hiding else ([last, *rows], [-1, *(1 + p for p in parents)])
    kept = list(worth_feeding(drafts, eos))
    if hiding:
        return (kept if drafts and drafts[0] == last else []), None
    return [last, *kept], None


def worth_feeding(drafts: Sequence[int], eos: frozenset[int]) -> Sequence[int]:
    """The drafts whose rows somebody reads: nobody reads what follows EOS."""
    return drafts[:-1] if drafts and drafts[-1] in eos else drafts
