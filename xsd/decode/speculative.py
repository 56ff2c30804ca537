"""Lossless cross-modal speculative decoding: draft during the verifier's prefill, verify in one
pass, then rounds to the end (docs/decoding.md draws the cache at every step). Every token that
leaves is the argmax of a verifier row after exactly the tokens before it: that proves it."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xsd.core import DecoderHandle, Generation, ParameterError, Round
from xsd.decode import overlap as lanes
from xsd.decode.acceptance import GREEDY, Greedy
from xsd.decode.autoregressive import check_length
from xsd.decode.proposers import Proposer
from xsd.decode.trees import Drafts, Tree


@torch.inference_mode()
def generate(verifier: DecoderHandle, proposer: Proposer, sample: Any, *, gamma: int,
             max_new_tokens: int, hide_prefill: bool = True, gamma_prefill: int | None = None,
             overlap: lanes.Overlap = "threads",
             clock: Callable[[], float] = time.perf_counter,
             acceptance: Greedy = GREEDY) -> Generation:
    """Greedy continuation of ``sample``, the verifier's own ids, or what ``acceptance`` says.

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
    timeline, eos, acceptance = lanes.Timeline(clock), verifier.eos_token_ids, acceptance.begin()
    positions = getattr(verifier, "max_positions", sys.maxsize)
    room = max_new_tokens - 1  # the bonus fills the last place
    hidden_drafts = 0 if not hide_prefill or proposer.needs_verifier else min(
        room, gamma_prefill or (gamma if overlap == "serial" else room))
    (state, first, last, first_token_s), (drafts, started, drafted) = _prefill(
        verifier, proposer, sample, hidden_drafts, timeline, overlap, acceptance)
    ids: list[int] = []
    rounds: list[Round] = []
    while True:
        hiding = not rounds
        kept = state.length + (not hiding)
        # as far as the plain loop may go, and no row further
        drafts = cut(drafts, max_new_tokens - len(ids) - 1, eos, positions - kept,
                     last if hiding else None)
        verify_start = timeline.now()
        known = [acceptance.only(last, first)] if hiding else []
        rows, hidden = _verify(verifier, state, drafts, last, known, timeline, acceptance)
        path, bonus = acceptance.judge(drafts, rows, hidden, proposer)
        tokens = [tuple(drafts)[node] for node in path] + ([] if bonus is None else [bonus])
        ids += tokens
        last = ids[-1]
        finished = last in eos or len(ids) >= max_new_tokens
        if not finished:
            _keep(verifier, state, kept, path)
        if isinstance(drafts, Tree):
            drafts = drafts.first(path)
        rounds.append(
            Round(tuple(drafts), len(path), bonus, started, drafted, verify_start, timeline.now(),
                  "prefill_hiding" if hiding else "decode", getattr(drafts, "parents", None)))
        if finished:
            break
        if getattr(proposer, "context_layers", ()):
            proposer.read_context(state.context, state.length)
        if isinstance(drafts, Tree):
            hidden = hidden[[0, *(1 + node for node in path)]]
        proposer.observe(tokens, hidden[:len(tokens)])  # row i predicted tokens[i]
        started = timeline.now()
        wanted = min(gamma, max_new_tokens - len(ids) - 1)
        drafts = proposer.propose(wanted) if wanted else []
        drafted = timeline.now()
    return Generation(tuple(ids), "eos" if last in eos else "length", tuple(rounds),
                      timeline.spans(), first_token_s, timeline.now())


def _prefill(verifier: DecoderHandle, proposer: Proposer, sample: Any, n_drafts: int,
             timeline: lanes.Timeline, overlap: lanes.Overlap, acceptance: Greedy,
             ) -> tuple[tuple[Any, Any, int, float], tuple[Drafts, float, float]]:
    """(state, token 0's row, token 0, when known) of the verifier and (drafts, start, end) of the
    drafter."""
    def prefill() -> tuple[Any, Any, int, float]:
        with timeline.span("verifier", "prefill"):
            layers = getattr(proposer, "context_layers", ())
            state = verifier.prefill(sample, **({"layers": layers} if layers else {}))
            first = acceptance.rows(state.logits[None], verifier)[0]
            token = acceptance.said(first)
        return state, first, token, timeline.now()

    def draft(stop: lanes.Stop) -> tuple[Drafts, float, float]:
        proposer.begin(sample, timeline)
        start = timeline.now()
        drafts = proposer.propose(n_drafts, stop) if n_drafts else []
        return drafts, start, timeline.now()

    return lanes.run_lanes(prefill, draft, overlap)


def _verify(verifier: DecoderHandle, state: Any, drafts: Drafts, last: int, known: list[Any],
            timeline: lanes.Timeline, acceptance: Greedy) -> tuple[list[Any], Tensor]:
    """What is decided by from the first draft's place on, and the states [n, D_v] there. known:
    behind the prefill, of token 0."""
    found, hidden = known, [state.hidden[None]] if known else []
    rows, parents = rows_to_feed(drafts, last, verifier.eos_token_ids, bool(known))
    if rows:
        with timeline.span("verifier", "verify" if drafts else "step"):
            fed = torch.tensor(rows, device=state.logits.device)
            more, logits = (verifier.extend(state, fed) if parents is None else
                            verifier.extend(state, fed, parents))
            found = [*known, *acceptance.rows(logits, verifier)]
        hidden.append(more)
    return found, torch.cat(hidden)


def _keep(verifier: DecoderHandle, state: Any, kept: int, path: Sequence[int]) -> None:
    """Forget the rows of this round but the accepted ones: node i stands at kept + i."""
    if list(path) != list(range(len(path))):
        verifier.rollback(state, kept, [kept + node for node in path])
    elif state.length > kept + len(path):
        verifier.rollback(state, kept + len(path))


def cut(drafts: Drafts, room: int, eos: frozenset[int], rows: int = sys.maxsize,
        begins: int | None = None) -> Drafts:
    """Drafts for at most ``room`` tokens and ``rows`` rows, none after the first EOS. begins: of a
    tree, what begins with this token comes first: no row is fed of what begins otherwise."""
    if isinstance(drafts, Tree):
        found = drafts.cut(room, rows, eos)
        return found if begins is None else found.first(found.under(begins))
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
