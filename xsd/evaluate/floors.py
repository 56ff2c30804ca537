"""Floors: what drafts that never look at the sensor achieve (docs/metrics.md, section 7). An
adapter's merit is its distance above them.

On published traces of the real pair a 4-gram table of other clips' answers beats every published
adapter; a figure without its floors means nothing.

One interface: ``floor.match(answers)`` gives the teacher-forced next-token matches,
``floor.rounds(answers, gamma)`` the draft–verify
rounds in which the floor rolls on its *own* drafts. Token ids are plain integers; ``answers`` is a
list of id sequences (the verifier's, EOS included).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xsd.core import MetricError
from xsd.evaluate.acceptance import Rounds, rounds_from_lists

Ids = Sequence[int]
_START = -1
"""Stands before the first token of an answer, so that a table can know that a sentence begins."""


class Floor(ABC):
    """A drafter of token ids. Subclasses say what they draft after a prefix; ``name`` is the arm's
    name in tables."""

    name = "floor"

    @abstractmethod
    def draft(self, prefix: Ids, gamma: int, sample: int) -> list[int]:
        """Up to gamma tokens after the answer's prefix; ``sample`` is the answer's place in the
        list. Fewer, or none, when it has nothing to say."""

    def _ready(self, answers: Sequence[list[int]]) -> None:  # noqa: B027 - most can be asked anything
        """A floor that holds something of each sample refuses a list of another length here."""

    def match(self, answers: Sequence[Ids]) -> list[np.ndarray]:
        """Per answer, bool [n]: is the floor's next token after the verifier's own prefix the
        verifier's? Raises: MetricError for empty answers."""
        lists = as_lists(answers)
        self._ready(lists)
        return [
            np.array([self.draft(ids[:t], 1, i)[:1] == ids[t:t + 1] for t in range(len(ids))])
            for i, ids in enumerate(lists)
        ]

    def rounds(self, answers: Sequence[Ids], gamma: int = 5, *, start: int = 0) -> Rounds:
        """Greedy draft–verify rounds at gamma; positions beyond the answer are not drafted. start:
        tokens of each answer given for free.

        Raises: MetricError for empty answers, gamma below 1, or answers that end before ``start``.
        """
        lists = as_lists(answers)
        self._ready(lists)
        if gamma < 1:
            raise MetricError(f"gamma must be at least 1 draft token a round but is {gamma}")
        if not all(len(ids) > start for ids in lists):
            raise MetricError(
                f"an answer has no token after the {start} given ones; drop it from the comparison")
        flat: list[tuple[int, int, int, int]] = []
        for i, ids in enumerate(lists):
            at = start
            while at < len(ids):
                drafted = self.draft(ids[:at], min(gamma, len(ids) - at), i)
                accepted = 0
                while accepted < len(drafted) and drafted[accepted] == ids[at + accepted]:
                    accepted += 1
                bonus = int(at + accepted < len(ids))
                flat.append((accepted, len(drafted), bonus, i))
                at += accepted + bonus
        accepted, drafted, bonus, request = np.asarray(flat, dtype=np.int64).T
        return Rounds(accepted, drafted, bonus, request, len(lists), gamma)


class PositionMode(Floor):
    """The most frequent token at each position of the training answers (the lowest id on a tie),
    whatever came before."""

    name = "position mode"

    def __init__(self, training_answers: Sequence[Ids]) -> None:
        """Raises: MetricError without training answers."""
        counts: list[Counter[int]] = []
        for ids in as_lists(training_answers):
            for t, token in enumerate(ids):
                if t == len(counts):
                    counts.append(Counter())
                counts[t][token] += 1
        self.tokens = [_most_frequent(counter) for counter in counts]

    def draft(self, prefix: Ids, gamma: int, sample: int) -> list[int]:
        """The modes of the next positions."""
        return self.tokens[len(prefix):len(prefix) + gamma]


class NGram(Floor):
    """A table of the training answers: the most frequent token after the last n-1 tokens, backing
    off to shorter contexts.

    The start of the answer counts as context. n = 4: three tokens decide the fourth.
    """
    def __init__(self, training_answers: Sequence[Ids], n: int = 4) -> None:
        """Raises: MetricError without training answers or for n below 1."""
        if n < 1:
            raise MetricError(f"an n-gram table needs n of at least 1 but got {n}")
        self.n = n
        self.name = f"{n}-gram"
        counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in as_lists(training_answers):
            padded = [_START] * (n - 1) + ids
            for t in range(n - 1, len(padded)):
                for order in range(n):
                    counts[tuple(padded[t - order:t])][padded[t]] += 1
        self.table = {context: _most_frequent(counter) for context, counter in counts.items()}

    def draft(self, prefix: Ids, gamma: int, sample: int) -> list[int]:
        """Greedy, each token appended to its own context."""
        context = ([_START] * (self.n - 1) + list(prefix))[-(self.n - 1):] if self.n > 1 else []
        out = []
        for _ in range(gamma):
            token = next(self.table[tuple(context[i:])] for i in range(len(context) + 1)
                         if tuple(context[i:]) in self.table)
            out.append(token)
            context = [*context, token][1:] if self.n > 1 else []
        return out


class PromptLookup(Floor):
    """Copies what followed the last tokens when they last stood earlier in the sample's own prompt
    or answer so far (Saxena 2023).

    prompts: token ids of each sample's prompt in the verifier's tokenizer, or None to look in the
    answer alone. The longest match of at
    most ``longest`` tokens decides, the latest one among equals, and every draft is looked up anew
    with the drafts before it: the rule of decode.proposers.PromptLookup, which is what runs live.
    (transformers' own prompt lookup takes the earliest match.)
    """

    name = "prompt lookup"

    def __init__(self, prompts: Sequence[Ids] | None = None, longest: int = 3) -> None:
        """Raises: MetricError for longest below 1."""
        if longest < 1:
            raise MetricError(
                f"prompt lookup needs a match of at least 1 token but longest is {longest}")
        self.prompts = None if prompts is None else [_plain(ids) for ids in prompts]
        self.longest = longest

    def _ready(self, answers: Sequence[list[int]]) -> None:
        if self.prompts is not None and len(self.prompts) != len(answers):
            raise MetricError(
                f"prompt lookup holds {len(self.prompts)} prompts but is asked about "
                f"{len(answers)} answers; give one prompt an answer"
            )

    def draft(self, prefix: Ids, gamma: int, sample: int) -> list[int]:
        """The copied continuation; it ends where nothing matches."""
        text = [*(self.prompts[sample] if self.prompts is not None else []), *prefix]
        out: list[int] = []
        while len(out) < gamma and (token := self._next(text)) is not None:
            out.append(token)
            text.append(token)
        return out

    def _next(self, text: list[int]) -> int | None:
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            for at in range(len(text) - size - 1, -1, -1):
                if text[at:at + size] == text[-size:]:
                    return text[at + size]
        return None


class DrafterTokens(Floor):
    """The drafter's own tokens, no adapter: its token at position t against the verifier's at t.

    On teacher-forced pairs this is the drafter's next token after the verifier's prefix; on
    free-running pairs the drafter's own text at the same place (the token-level baseline of the
    reference).
    """

    name = "drafter tokens"

    def __init__(self, ids_by_drafter: Sequence[Ids]) -> None:
        """One id sequence a sample; a shorter one drafts nothing beyond its end."""
        self.ids_by_drafter = [_plain(ids) for ids in ids_by_drafter]

    def _ready(self, answers: Sequence[list[int]]) -> None:
        if len(self.ids_by_drafter) != len(answers):
            raise MetricError(
                f"{len(self.ids_by_drafter)} drafter answers but {len(answers)} verifier answers; "
                "both must cover the same samples"
            )

    def draft(self, prefix: Ids, gamma: int, sample: int) -> list[int]:
        """The drafter's tokens from the prefix's end on."""
        return self.ids_by_drafter[sample][len(prefix):len(prefix) + gamma]


def drafter_tokens(ids_by_drafter: Sequence[Ids], ids_by_verifier: Sequence[Ids],
                   gamma: int = 5) -> tuple[list[np.ndarray], Rounds]:
    """Matches and rounds of the drafter without an adapter. Raises: MetricError when the sample
    counts differ or an answer is empty."""
    floor = DrafterTokens(ids_by_drafter)
    matches = floor.match(ids_by_verifier)
    return matches, rounds_from_lists(matches, gamma)


@dataclass(frozen=True)
class DuplicateRate:
    """Exact duplicates among n answers. shared: share of answers that some other answer equals.
    repeated: share that could be dropped without losing a text (1 - distinct / n). in_training:
    share that stands in the training answers (None when none were given)."""

    n: int
    n_distinct: int
    shared: float
    repeated: float
    in_training: float | None


def duplicate_rate(answers: Sequence[Ids],
                   training_answers: Sequence[Ids] | None = None) -> DuplicateRate:
    """How templated the answers are. Raises: MetricError without answers."""
    texts = [tuple(ids) for ids in as_lists(answers)]
    counts = Counter(texts)
    known = None if training_answers is None else {tuple(ids) for ids in as_lists(training_answers)}
    return DuplicateRate(
        n=len(texts), n_distinct=len(counts),
        shared=sum(count for count in counts.values() if count > 1) / len(texts),
        repeated=1 - len(counts) / len(texts),
        in_training=None if known is None else sum(text in known for text in texts) / len(texts),
    )


def as_lists(answers: Iterable[Any]) -> list[list[int]]:
    """Answers as plain lists of ints. Raises: MetricError without answers or with an empty one."""
    lists = [_plain(ids) for ids in answers]
    if not lists:
        raise MetricError(
            "a floor needs answers but the list is empty; pass the verifier's token ids of the "
            "split"
        )
    empty = [i for i, ids in enumerate(lists) if not ids]
    if empty:
        raise MetricError(
            f"answers {empty[:5]} have no token; drop those samples or extract them again")
    return lists


def _plain(ids: Any) -> list[int]:
    return [int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]


def _most_frequent(counter: Counter[int]) -> int:
    return min(counter, key=lambda token: (-counter[token], token))
