"""Floors: what drafts achieve that never look at the sensor; an adapter's merit is what it adds
(docs/metrics.md, section 7). What a floor drafts is a rule of :mod:`xsd.decode.rules`, the one
that would draft live."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from xsd.core import MetricError
from xsd.decode import rules

Ids = Sequence[int]


class Floor:
    """A drafting rule tried on stored answers. name: what it is called in tables. rules: one rule
    for all answers, or a list with one for each."""
    def __init__(self, name: str, rules: rules.Rule | Sequence[rules.Rule]) -> None:
        self.name, self._rules = name, rules

    def rule(self, sample: int) -> rules.Rule:
        """What drafts in the answer at this place of the list."""
        return self._rules if callable(self._rules) else self._rules[sample]

    def draft(self, prefix: Ids, gamma: int, sample: int) -> list[int]:
        """Up to gamma tokens after a prefix of answer ``sample``; fewer, or none, when the rule has
        nothing to say."""
        return rules.draft(self.rule(sample), prefix, gamma)

    def match(self, answers: Sequence[Ids]) -> list[np.ndarray]:
        """Per answer, bool [n]: is the floor's next token after the verifier's own prefix the
        verifier's? Its draft–verify rounds follow from that exactly (rounds.from_matches).

        Raises: MetricError for empty answers, or as many others as it has no rule for."""
        lists = as_lists(answers)
        if not callable(self._rules) and len(self._rules) != len(lists):
            raise MetricError(
                f"the floor {self.name!r} was made for {len(self._rules)} answers but is asked "
                f"about {len(lists)}; give it one prompt, or one drafter answer, an answer")
        return [np.array([self.rule(i)(ids[:t]) == token for t, token in enumerate(ids)])
                for i, ids in enumerate(lists)]


def position_mode(training_answers: Sequence[Ids]) -> Floor:
    """The most frequent token at each position of the training answers. Raises: MetricError without
    training answers."""
    return Floor("position mode", rules.stored(rules.position_modes(as_lists(training_answers))))


def ngram(training_answers: Sequence[Ids], n: int = 4) -> Floor:
    """A table of the training answers: rules.NGramTable. Raises: MetricError without training
    answers, ParameterError for n below 1."""
    return Floor(f"{n}-gram", rules.NGramTable(as_lists(training_answers), n))


def prompt_lookup(prompts: Sequence[Ids] | None = None, longest: int = 3) -> Floor:
    """Copies from the sample's own prompt (token ids in the verifier's tokenizer; None: from the
    answer alone), or from the answer so far. Raises: ParameterError for longest below 1."""
    if prompts is None:
        return Floor("prompt lookup", rules.prompt_lookup((), longest))
    return Floor("prompt lookup", [rules.prompt_lookup(_plain(ids), longest) for ids in prompts])


def drafter_tokens(ids_by_drafter: Sequence[Ids]) -> Floor:
    """The drafter's own tokens, no adapter: its token at position t against the verifier's at t.
    On free-running pairs that is its own text at the same place (the reference's token-level
    baseline). A shorter answer of the drafter drafts nothing beyond its end."""
    return Floor("drafter tokens", [rules.stored(_plain(ids)) for ids in ids_by_drafter])


class DuplicateRate(NamedTuple):
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
    counts, known = Counter(map(tuple, as_lists(answers))), None
    n = counts.total()
    if training_answers is not None:
        trained = set(map(tuple, as_lists(training_answers)))
        known = sum(count for text, count in counts.items() if text in trained) / n
    shared = sum(count for count in counts.values() if count > 1) / n
    return DuplicateRate(n, len(counts), shared, 1 - len(counts) / n, known)


def as_lists(answers: Iterable[Any]) -> list[list[int]]:
    """Answers as plain lists of ints. Raises: MetricError without answers or with an empty one."""
    lists = [_plain(ids) for ids in answers]
    if not lists:
        raise MetricError("a floor needs answers but the list is empty; pass the verifier's token "
                          "ids of the split")
    empty = [i for i, ids in enumerate(lists) if not ids]
    if empty:
        raise MetricError(
            f"answers {empty[:5]} have no token; drop those samples or extract them again")
    return lists


def _plain(ids: Any) -> list[int]:
    return [int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
