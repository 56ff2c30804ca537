"""What drafts (docs/decoding.md, "Who drafts"). A proposer is told what has been verified and
offers draft tokens; it never decides. ``hidden[t]`` *predicts* token t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from xsd.core import ParameterError
from xsd.decode import rules
from xsd.decode.autoregressive import greedy
from xsd.decode.overlap import Stop, Timeline
from xsd.decode.tracks import DrafterTrack, History, n_common


def never() -> bool:
    """The ``stop`` of a proposal that nobody is waiting for."""
    return False


class Proposer(Protocol):
    """needs_verifier: cannot draft before the verifier's first state is known."""

    needs_verifier: bool

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        """A new request; may run in another thread while the verifier prefills."""

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        """At most ``gamma`` draft tokens; ends early at EOS or when ``stop()`` turns True."""

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """The verifier's own tokens [n] (accepted drafts, then the bonus), and hidden [n, D_v]."""


class Adapter(Protocol):
    """What decoding needs of an adapter: one step. ``reads`` says which states it looks at."""

    reads: Literal["drafter", "verifier", "both"]

    def step(self, drafter_states: Tensor | None, verifier_states: Tensor | None) -> Tensor:
        """The verifier's state [D_v] at position t, from the drafter's [t + 1, D_d] and the
        verifier's [t, D_v] (None for one it does not read). One with a true attribute
        ``fuses_tokens`` is also given ``tokens=``, int64 [t]: the ids of positions 0…t-1; one with
        a method ``keep`` is given ``kept=`` what that returned for this answer
        (adapters/attention.py); one with a true ``verified_only`` the drafter's states [n + 1] of n
        verified tokens alone."""


class TokenByToken:
    """One token after another: a subclass says :meth:`next_token`. min_probability: a less likely
    draft ends the round's drafting (drafts behind the prefill are free and go on)."""

    role = "drafter (or its adapter)"
    needs_verifier = False
    eos_token_ids: frozenset[int] = frozenset()
    min_probability: float = 0.0
    track: DrafterTrack | None = None

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        self.known: list[int] = []
        self.timeline = timeline or Timeline()
        if self.track is not None:
            self.track.begin(sample, timeline)

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        drafts: list[int] = []
        self._free = stop is not never
        while len(drafts) < gamma and not stop():
            if self.track and not self.track.has_room(len(self.known) + len(drafts)):
                break
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
        """argmax of logits [V], or None where it is unlikely and drafting costs time."""
        if self.min_probability > 0 and not self._free:
            likely, token = logits.softmax(-1).max(-1)
            return int(token) if float(likely) >= self.min_probability else None
        return greedy(logits[None], self)[0]

    def next_token(self, drafts: Sequence[int]) -> int | None:
        """The token after ``known`` and the drafts of this round, or None to end the round."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it drafts")


class AdapterProposer(TokenByToken):
    """States → adapter → the verifier's LM head → argmax over the ids that may be drafted → the
    token is fed back to the drafter. Own predictions stand in for verifier states until these are
    known. track: None only for adapters that read the verifier alone. lm_head: [..., D_v] → [...,
    V]. An adapter with ``draft_ids`` (int64 [k]) drafts among those; ``lm_head`` may then give
    their k logits alone, in that order."""
    def __init__(self, track: DrafterTrack | None, adapter: Adapter,
                 lm_head: Callable[[Tensor], Tensor], draft_vocab_size: int,
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        """Raises: ParameterError for an adapter that reads something else, or lacks its track."""
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
        self.verified_only = getattr(adapter, "verified_only", False)
        ids = getattr(adapter, "draft_ids", None)
        self.draft_ids = None if ids is None else ids[ids < draft_vocab_size]

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        super().begin(sample, timeline)
        numbers = getattr(self.adapter, "parameters", tuple)()  # it may stand on another GPU
        self.verifier_states = History(next((one.device for one in numbers), None))
        self.said: list[int | None] = []
        keep = getattr(self.adapter, "keep", None)
        self.kept = keep() if keep is not None else None

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        if self.needs_verifier:
            self.verifier_states.replace(len(self.known), hidden)
        if self.kept is not None:
            # own predictions gave way to the verifier's states; else what was rejected goes
            agreed = 0 if self.needs_verifier else 1 + n_common(self.said, tokens)
            self.kept.forget(len(self.known) + agreed)
        super().observe(tokens, hidden)

    def next_token(self, drafts: Sequence[int]) -> int | None:
        if self.needs_verifier and self.verifier_states.length == 0:
            raise ParameterError(
                "this adapter reads verifier states and none exist yet; in the prefill another "
                "proposer may draft (TwoPhase)")
        text, drafter_states = [*self.known, *drafts], None
        if self.track is not None:
            self.track.follow(self.known if self.verified_only else text)
            drafter_states = self.track.states()
        with self.timeline.span("adapter", "adapter"):
            more = {"tokens": torch.tensor(text, dtype=torch.long)} if self.fuses_tokens else {}
            if self.kept is not None:
                more["kept"] = self.kept
            predicted = self.adapter.step(drafter_states, self.verifier_states.rows(), **more)
            token = self.choose(self._draft_logits(self.lm_head(predicted[None])[0]))
            if self.draft_ids is not None and token is not None:
                token = int(self.draft_ids[token])
        if self.needs_verifier and token is not None:
            self.verifier_states.replace(len(text), predicted[None])
        self.said = [*drafts, token]
        return token

    def _draft_logits(self, logits: Tensor) -> Tensor:
        """Of what may be drafted, from all [V] or the draft vocabulary's own [k] logits."""
        if self.draft_ids is None:
            return logits[:self.draft_vocab_size]
        own = self.adapter.draft_ids
        if len(logits) != len(own):
            return logits[self.draft_ids]
        return logits if len(own) == len(self.draft_ids) else logits[own < self.draft_vocab_size]


class DrafterTokens(TokenByToken):
    """The drafter's own head, no adapter: the floor under every adapter."""
    def __init__(self, track: DrafterTrack, draft_vocab_size: int,
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.track, self.draft_vocab_size = track, draft_vocab_size
        self.eos_token_ids = eos_token_ids

    def next_token(self, drafts: Sequence[int]) -> int | None:
        self.track.follow([*self.known, *drafts])
        return self.choose(self.track.logits[:self.draft_vocab_size])


class RuleProposer(TokenByToken):
    """A rule over token ids (:mod:`xsd.decode.rules`), ``rule_of(sample)`` for each request."""
    def __init__(self, rule_of: Callable[[Any], rules.Rule],
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.rule_of, self.eos_token_ids = rule_of, eos_token_ids

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        super().begin(sample, timeline)
        self.rule = self.rule_of(sample)

    def next_token(self, drafts: Sequence[int]) -> int | None:
        return self.rule([*self.known, *drafts])


class TwoPhase:
    """One proposer for the prefill, another for the rounds; a shared drafter prefills once."""
    def __init__(self, first: Proposer, second: Proposer) -> None:
        self.first, self.second = first, second
        self.needs_verifier = first.needs_verifier
        self.context_layers = getattr(second, "context_layers", ())

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        self._active, timeline = self.first, timeline or Timeline()
        for proposer in (self.first, self.second):
            proposer.begin(sample, timeline)

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        return self._active.propose(gamma, stop)

    def read_context(self, context: Any, length: int) -> None:
        """For a block drafter in the rounds."""
        self.second.read_context(context, length)

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """The first observation ends the first phase: only the second proposer is told."""
        self._active = self.second
        self.second.observe(tokens, hidden)


class Checked:
    """A proposer from outside this project. Raises: ParameterError when it is no :class:`Proposer`,
    drafts too much, or something that is no id below ``vocab_size``."""
    def __init__(self, proposer: Proposer, vocab_size: int) -> None:
        self.name = type(proposer).__name__
        missing = [part for part in ("begin", "propose", "observe", "needs_verifier")
                   if not hasattr(proposer, part)]
        if missing:
            raise ParameterError(f"{self.name} is no proposer: it lacks {', '.join(missing)} "
                                 "(decode.proposers.Proposer says what each does)")
        self.proposer, self.vocab_size = proposer, vocab_size
        self.begin, self.observe = proposer.begin, proposer.observe
        self.needs_verifier = bool(proposer.needs_verifier)

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        drafts = list(self.proposer.propose(gamma, stop))
        if len(drafts) > gamma:
            raise ParameterError(f"{self.name} drafted {len(drafts)} tokens where at most {gamma} "
                                 "were asked for")
        for token in drafts:
            if isinstance(token, bool) or not isinstance(token, int) or not (
                    0 <= token < self.vocab_size):
                raise ParameterError(
                    f"{self.name} drafted {token!r}; a draft is a Python int, an id from 0 to "
                    f"{self.vocab_size - 1}")
        return drafts
