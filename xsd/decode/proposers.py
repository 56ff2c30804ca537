"""What drafts: adapters over a drafter's or the verifier's own states, the drafter's own head,
n-gram tables, prompt lookup, a script.

A proposer is told what has been verified and offers draft tokens; it never decides. Position t of
an answer means the same thing for
both models: ``hidden[t]`` *predicts* token t (it was read after token t-1), in every room of this
project.

The drafter's cache (:class:`DrafterTrack`) holds the prompt and the tokens the drafter was given;
its own drafts are among them until the verifier has spoken. With m tokens verified and gamma = 3:

    [prompt | 0 .. m-1]                state m drafts token x          cached = known
    [prompt | 0 .. m-1 | x]            state m+1 drafts y
    [prompt | 0 .. m-1 | x y]          state m+2 drafts z              z itself is never fed: nobody would read its state
    observe: x accepted, y refused for b
    [prompt | 0 .. m-1 | x]            rollback to the common prefix of cached and known ...
    [prompt | 0 .. m-1 | x b]          ... then one extend with what is missing (here b; after full acceptance z and the bonus)

The rollback and the extend happen at the next ``propose``, so that the last round of a request does
not pay for a round that never comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from xsd.core import DecoderHandle, ParameterError
from xsd.decode import rules
from xsd.decode.overlap import Stop, Timeline


def never() -> bool:
    """The ``stop`` of a proposal that nobody is waiting for."""
    return False


class Proposer(Protocol):
    """What :mod:`xsd.decode.speculative` needs. ``needs_verifier``: cannot draft before the
    verifier's first state is known."""

    needs_verifier: bool

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        """A new request; may run in another thread while the verifier prefills."""

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        """At most ``gamma`` draft tokens after the known ones; ends early at EOS or when ``stop()``
        turns True."""

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """``tokens`` [n] are now the verifier's own (accepted drafts, then the bonus); ``hidden``
        [n, D_v] predicted each of them."""


class Adapter(Protocol):
    """What decoding needs of an adapter: one step. ``reads`` says which states it looks at."""

    reads: Literal["drafter", "verifier", "both"]

    def step(self, drafter_states: Tensor | None, verifier_states: Tensor | None) -> Tensor:
        """Drafter states [n, D_d] and verifier states [m, D_v] of positions 0… → [D_v]: the
        verifier's state at the next position.

        "drafter": n = t + 1 states, predicts position t. "verifier": m = t states, predicts
        position t. "both": n = t + 1, m = t. One with a true attribute ``fuses_tokens`` is also
        given ``tokens=``, int64 [t]: the ids of positions 0…t-1.
        """


class History:
    """States of positions 0…n-1 in one growing buffer, so that a step reads a view and copies
    nothing."""
    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.length = 0

    def append(self, rows: Tensor) -> None:
        """rows: [k, D]."""
        end = self.length + rows.shape[0]
        if self._buffer is None or end > self._buffer.shape[0]:
            grown = rows.new_empty(max(64, 2 * end), rows.shape[1])
            if self._buffer is not None:
                grown[:self.length] = self._buffer[:self.length]
            self._buffer = grown
        self._buffer[self.length:end] = rows
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget positions >= length."""
        self.length = min(self.length, length)

    def rows(self) -> Tensor | None:
        """[n, D], a view; None before the first append."""
        return None if self._buffer is None else self._buffer[:self.length]


class DrafterTrack:
    """The drafter's cache along the answer, with the state of every position; two proposers of one
    request may share it."""
    def __init__(self, drafter: DecoderHandle) -> None:
        self.drafter = drafter
        self.cached: list[int] = []
        self.history = History()
        self._timeline = Timeline()

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        """Prefill the prompt: ``cached`` is empty, ``history`` holds the state that predicts token
        0."""
        self._timeline = timeline or Timeline()
        self.cached, self.history = [], History()
        with self._timeline.span("drafter", "prefill"):
            self.state = self.drafter.prefill(sample)
            self.prompt_length = self.state.length
            self.logits = self.state.logits
            self.history.append(self.state.hidden[None])

    def follow(self, known: Sequence[int]) -> None:
        """Make the cache hold exactly prompt + known: roll back to the common prefix, extend with
        the rest."""
        same = 0
        for mine, verified in zip(self.cached, known, strict=False):
            if mine != verified:
                break
            same += 1
        missing = list(known[same:])
        if same == len(self.cached) and not missing:
            return
        with self._timeline.span("drafter", "draft"):
            if same < len(self.cached):
                self.drafter.rollback(self.state, self.prompt_length + same)
                self.history.truncate(same + 1)
                self.cached = self.cached[:same]
            if missing:
                # The verifier may say ids that the drafter has no embedding for (padding of a wider
                # vocabulary): it reads id 0 there.
                readable = [token if token < self.drafter.vocab_size else 0 for token in missing]
                hidden, logits = self.drafter.extend(
                    self.state, torch.tensor(readable, device=self.logits.device))
                self.history.append(hidden)
                self.logits = logits[-1]
                self.cached += missing
            else:
                self.logits = self.drafter.lm_head(self.states()[-1:])[0]

    def states(self) -> Tensor:
        """[len(cached) + 1, D_d]; the last row predicts the next token."""
        return self.history.rows()


class _Drafting:
    """The loop that all token-by-token proposers share: make room for one token after another until
    gamma, EOS or stop.

    min_probability: a draft whose own probability is lower ends the round's drafting (drafts behind
    the prefill are free and go on).
    """

    needs_verifier = False
    eos_token_ids: frozenset[int] = frozenset()
    min_probability: float = 0.0

    def __init__(self) -> None:
        self.known: list[int] = []
        self._free = False
        self.timeline = Timeline()

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        self.known = []
        self.timeline = timeline or Timeline()

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        drafts: list[int] = []
        self._free = stop is not never
        while len(drafts) < gamma and not stop():
            token = self.next_token(drafts)
            if token is None:
                break
            drafts.append(token)
            if token in self.eos_token_ids:
                break
        return drafts

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        self.known += tokens

    def choose(self, logits: Tensor) -> int | None:
        """argmax of logits [V], or None where it is less likely than ``min_probability`` and
        drafting costs time."""
        if self.min_probability > 0 and not self._free:
            likely, token = logits.softmax(-1).max(-1)
            return int(token) if float(likely) >= self.min_probability else None
        return int(logits.argmax())

    def next_token(self, drafts: Sequence[int]) -> int | None:
        raise NotImplementedError(f"{type(self).__name__} does not say what it drafts")


class AdapterProposer(_Drafting):
    """States → adapter → the verifier's LM head → argmax over the ids that may be drafted → the
    token is fed back to the drafter.

    adapter: see :class:`Adapter`. lm_head: the verifier's, [..., D_v] → [..., V]. draft_vocab_size:
    ids below it may be drafted.
    track: the drafter's cache (None only for adapters that read the verifier alone). Own
    predictions stand in for verifier states that
    do not exist yet (self-rollout); a verified state replaces its prediction as soon as it is
    known. An adapter with ``draft_ids`` (int64 [k], its reduced draft vocabulary) drafts among
    those; ``lm_head`` may then give their k logits alone, in that order.
    """
    def __init__(self, track: DrafterTrack | None, adapter: Adapter, lm_head: Callable[[Tensor],
                                                                                       Tensor],
                 draft_vocab_size: int, eos_token_ids: frozenset[int] = frozenset(),
                 ) -> None:
        super().__init__()
        if adapter.reads not in ("drafter", "verifier", "both"):
            raise ParameterError(
                f"adapter reads {adapter.reads!r}; decoding knows 'drafter', 'verifier' and 'both'")
        if track is None and adapter.reads != "verifier":
            raise ParameterError(
                f"an adapter that reads {adapter.reads!r} needs a drafter; pass its DrafterTrack")
        self.track = track if adapter.reads != "verifier" else None
        self.adapter, self.lm_head = adapter, lm_head
        self.draft_vocab_size, self.eos_token_ids = draft_vocab_size, eos_token_ids
        self.needs_verifier = adapter.reads != "drafter"
        self.fuses_tokens = getattr(adapter, "fuses_tokens", False)
        ids = getattr(adapter, "draft_ids", None)
        self.draft_ids: Tensor | None = None if ids is None else ids[ids < draft_vocab_size]
        self._kept = None if ids is None or len(
            self.draft_ids) == len(ids) else ids < draft_vocab_size
        self.verifier_states = History()

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        super().begin(sample, timeline)
        self.verifier_states = History()
        if self.track is not None:
            self.track.begin(sample, timeline)

    def join(self, timeline: Timeline | None = None) -> None:
        """Begin a request on a track that another proposer has just prefilled."""
        super().begin(None, timeline)
        self.verifier_states = History()

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        if self.needs_verifier:
            self.verifier_states.truncate(len(self.known))
            self.verifier_states.append(hidden)
        super().observe(tokens, hidden)

    def next_token(self, drafts: Sequence[int]) -> int | None:
        if self.needs_verifier and self.verifier_states.length == 0:
            raise ParameterError(
                "this adapter reads verifier states and none exist yet; draft in the prefill with "
                "a first_proposer instead"
            )
        drafter_states = None
        if self.track is not None:
            self.track.follow([*self.known, *drafts])
            drafter_states = self.track.states()
        with self.timeline.span("adapter", "adapter"):
            if self.fuses_tokens:
                tokens = torch.tensor([*self.known, *drafts], dtype=torch.long)
                predicted = self.adapter.step(drafter_states, self.verifier_states.rows(),
                                              tokens=tokens)
            else:
                predicted = self.adapter.step(drafter_states, self.verifier_states.rows())
            token = self.choose(self._draft_logits(self.lm_head(predicted[None])[0]))
            if self.draft_ids is not None and token is not None:
                token = int(self.draft_ids[token])
        if self.needs_verifier and token is not None:
            self.verifier_states.truncate(len(self.known) + len(drafts))
            self.verifier_states.append(predicted[None])
        return token

    def _draft_logits(self, logits: Tensor) -> Tensor:
        """Of the tokens that may be drafted, from all [V] or from the draft vocabulary's own
        [k]."""
        if self.draft_ids is None:
            return logits[:self.draft_vocab_size]
        if len(logits) == len(
                self.adapter.draft_ids):  # the head's rows of the draft vocabulary alone
            return logits if self._kept is None else logits[self._kept]
        return logits[self.draft_ids]


class DrafterTokens(_Drafting):
    """The drafter's own head, no adapter: plain speculative decoding, and the floor under every
    adapter."""
    def __init__(self, track: DrafterTrack, draft_vocab_size: int,
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.track, self.draft_vocab_size, self.eos_token_ids = track, draft_vocab_size, eos_token_ids

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        super().begin(sample, timeline)
        self.track.begin(sample, timeline)

    def join(self, timeline: Timeline | None = None) -> None:
        """Begin a request on a track that another proposer has just prefilled."""
        super().begin(None, timeline)

    def next_token(self, drafts: Sequence[int]) -> int | None:
        self.track.follow([*self.known, *drafts])
        return self.choose(self.track.logits[:self.draft_vocab_size])


class RuleProposer(_Drafting):
    """A rule over token ids (:mod:`xsd.decode.rules`), made anew for each request: ``rule_of(sample)``.

    An n-gram table, ``RuleProposer(lambda sample: table)``, is the floor that costs nothing; with
    the sample's prompt in hand the rule may be ``rules.prompt_lookup``.
    """
    def __init__(self, rule_of: Callable[[Any], rules.Rule],
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.rule_of, self.eos_token_ids = rule_of, eos_token_ids

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        super().begin(sample, timeline)
        self.rule = self.rule_of(sample)

    def next_token(self, drafts: Sequence[int]) -> int | None:
        return self.rule([*self.known, *drafts])


class OracleProposer(_Drafting):
    """Drafts by a script, for tests and ceilings: ``script(known ids, gamma) -> draft ids``."""
    def __init__(self, script: Callable[[Sequence[int], int], Sequence[int]]) -> None:
        super().__init__()
        self.script = script

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        return list(self.script(tuple(self.known), gamma))[:gamma]


class TwoPhase:
    """One proposer for the prefill, another for the rounds after it (e.g. L4, then L5F); a shared
    drafter is prefilled once."""
    def __init__(self, first: Proposer, second: Proposer) -> None:
        self.first, self.second = first, second
        self.needs_verifier = first.needs_verifier
        self._active = first

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        self._active = self.first
        self.first.begin(sample, timeline)
        track = getattr(self.second, "track", None)
        if track is not None and track is getattr(self.first, "track", None):
            self.second.join(timeline)
        else:
            self.second.begin(sample, timeline)

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        return self._active.propose(gamma, stop)

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """The first observation ends the first phase; only the second proposer needs to be told
        anything from then on."""
        self._active = self.second
        self.second.observe(tokens, hidden)
