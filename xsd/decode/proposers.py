"""What drafts (docs/decoding.md, "Who drafts"). A proposer is told what has been verified and
offers draft tokens; it never decides. ``hidden[t]`` *predicts* token t."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from xsd.core import ParameterError, not_finite
from xsd.decode import rules
from xsd.decode.acceptance import Sampling, greedy
from xsd.decode.overlap import Stop, Timeline
from xsd.decode.tracks import DrafterTrack, History, n_common
from xsd.decode.trees import Drafts, Tree


def never() -> bool:
    """The ``stop`` of a proposal that nobody is waiting for."""
    return False


class Proposer(Protocol):
    """needs_verifier: cannot draft before the verifier's first state is known."""

    needs_verifier: bool

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        """A new request; may run in another thread while the verifier prefills."""

    def propose(self, gamma: int, stop: Stop = never) -> Drafts:
        """Drafts of at most ``gamma`` tokens one after the other; ends early at EOS or when
        ``stop()`` turns True."""

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """The verifier's own tokens [n] (accepted drafts, then the bonus), and hidden [n, D_v]."""

    # Who may draft in a tree (hybrid.TreeProposer) has one method more, children(path, k): the at
    # most k likeliest ids after the verified text and these drafts, best first, each with the log
    # of its probability; and says with a true ``steps`` that asking costs a model's step.


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
    confidence: float = 0.5  # of a draft that comes without a probability
    steps = False
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

    def children(self, path: Sequence[int], k: int) -> list[tuple[int, float]]:
        """As :class:`Proposer` says it; here the one draft there is, at ``confidence``."""
        self._free = True  # no draft is too unlikely for a tree: it weighs them itself
        token = self.next_token(path)
        return [] if token is None else [(token, math.log(self.confidence))]

    def next_token(self, drafts: Sequence[int]) -> int | None:
        """The token after ``known`` and the drafts of this round, or None to end the round."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it drafts")


class FromLogits(TokenByToken):
    """A model's head says what is drafted: a subclass gives :meth:`logits`. draft_ids: the id of
    each of their places, int64 [n]; None: the place itself. sampling: draws drafts in place of the
    likeliest, for a verifier that samples at these settings."""

    steps = True
    draft_ids: Tensor | None = None
    sampling: Sampling | None = None

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        super().begin(sample, timeline)
        if self.sampling is not None:  # draws of its own: the verifier's must not depend on them
            self._draws = replace(self.sampling, seed=self.sampling.seed + 1).begin()

    def propose(self, gamma: int, stop: Stop = never) -> Drafts:
        self._drawn: list[tuple[int, Tensor]] = []
        drafts = super().propose(gamma, stop)
        return drafts if self.sampling is None else Tree.chain(drafts, self._drawn[:len(drafts)])

    def logits(self, drafts: Sequence[int]) -> Tensor:
        """Of what may follow ``known`` and these drafts, [n]."""
        raise NotImplementedError(f"{type(self).__name__} has no logits")

    def next_token(self, drafts: Sequence[int]) -> int | None:
        """argmax, or None where it is unlikely and drafting costs time."""
        logits = self.logits(drafts)
        if self.min_probability > 0 and not self._free and (
                float(logits.softmax(-1).max()) < self.min_probability):
            return None
        if self.sampling is not None:
            (token, *drawn), = self.draws(logits, 1)
            self._drawn.append(tuple(drawn))
            return token
        place = greedy(logits[None], self)[0]
        return int(place if self.draft_ids is None else self.draft_ids[place])

    def draws(self, logits: Tensor, k: int) -> list[tuple[int, int, Tensor]]:
        """At most k ids drawn without replacement, each with its rank and what it was drawn from
        (Tree.drawn)."""
        greedy(logits[None], self)
        left = self._draws.probabilities(logits)
        if self.draft_ids is not None:
            wide = left.new_zeros(int(self.draft_ids.max()) + 1)
            left = wide.scatter_(0, self.draft_ids.cpu(), left)
        found: list[tuple[int, int, Tensor]] = []
        while len(found) < k and float(left.sum()) > 0:
            left = left / left.sum()
            token = self._draws.draw(left)
            found.append((token, len(found), left))
            left = left.clone()
            left[token] = 0.0
        return found

    def logits_in_tree(self, path: Sequence[int]) -> Tensor | None:
        """:meth:`logits` after any path that was itself offered; None where no position is left."""
        if self.track and not self.track.has_room(len(self.known) + len(path)):
            return None
        return self.logits(path)

    def children(self, path: Sequence[int], k: int) -> list[tuple[int, float]]:
        logits = self.logits_in_tree(path)
        if logits is None:
            return []
        logs, places = logits.float().log_softmax(-1).topk(min(k, len(logits)))
        if not math.isfinite(float(logs[0])):
            raise not_finite(self.role)
        ids = places if self.draft_ids is None else self.draft_ids[places]
        return list(zip(ids.tolist(), logs.tolist(), strict=True))


class AdapterProposer(FromLogits):
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
        if (ids := getattr(adapter, "draft_ids", None)) is not None:
            self.draft_ids = ids[ids < draft_vocab_size]

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        super().begin(sample, timeline)
        numbers = getattr(self.adapter, "parameters", tuple)()  # it may stand on another GPU
        self.verifier_states = History(next((one.device for one in numbers), None))
        self._guesses: dict[tuple[int, ...], Tensor] = {}  # of a tree: what follows each path
        self._walked, self.drafted_states = None, []
        self.kept = self.adapter.keep() if hasattr(self.adapter, "keep") else None

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        if self.needs_verifier:
            self.verifier_states.replace(len(self.known), hidden)
        if self.kept is not None:
            # own predictions gave way to the verifier's states; else what was rejected goes
            agreed = 0 if self.needs_verifier else 1 + n_common(self._walked or (), tokens)
            self.kept.forget(len(self.known) + agreed)
        self._walked = None
        self._guesses.clear()
        super().observe(tokens, hidden)

    def logits_in_tree(self, path: Sequence[int]) -> Tensor | None:
        path = tuple(path)
        if not path or self._walked is None or path[:-1] != tuple(self._walked):
            self._turn_to(path)
        found = super().logits_in_tree(path)
        if self.needs_verifier and found is not None:
            self._guesses[path] = self.verifier_states.rows()[-1:].clone()
        return found

    def _turn_to(self, path: tuple[int, ...]) -> None:
        """From the path walked last to another one: own predictions as they were along it."""
        base, same = len(self.known), n_common(self._walked or (), path)
        if self.needs_verifier:
            self.verifier_states.length = base
            for place in range(len(path)):
                self.verifier_states.replace(base + place, self._guesses[path[:place]])
        if self.kept is not None:
            self.kept.forget(base + same + (not self.needs_verifier))

    def logits(self, drafts: Sequence[int]) -> Tensor:
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
            logits = self._draft_logits(self.lm_head(predicted[None])[0])
        if self.needs_verifier:
            self.verifier_states.replace(len(text), predicted[None])
        self.drafted_states = [*self.drafted_states[:len(drafts)], predicted]  # (Cosine)
        self._walked = list(drafts)
        return logits

    def _draft_logits(self, logits: Tensor) -> Tensor:
        """Of what may be drafted, from all [V] or the draft vocabulary's own [k] logits."""
        if self.draft_ids is None:
            return logits[:self.draft_vocab_size]
        own = self.adapter.draft_ids
        if len(logits) != len(own):
            return logits[self.draft_ids]
        return logits if len(own) == len(self.draft_ids) else logits[own < self.draft_vocab_size]


class DrafterTokens(FromLogits):
    """The drafter's own head, no adapter: the floor under every adapter."""

    def __init__(self, track: DrafterTrack, draft_vocab_size: int,
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.track, self.draft_vocab_size = track, draft_vocab_size
        self.eos_token_ids = eos_token_ids

    def logits(self, drafts: Sequence[int]) -> Tensor:
        self.track.follow([*self.known, *drafts])
        return self.track.logits[:self.draft_vocab_size]


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

    def children(self, path: Sequence[int], k: int) -> list[tuple[int, float]]:
        if hasattr(self.rule, "children"):
            return self.rule.children([*self.known, *path], k)
        return super().children(path, k)
