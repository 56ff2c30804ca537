"""Floors: what drafts that never look at the sensor achieve (docs/metrics.md, section 7). An
adapter's merit is its distance above them.

On published traces of the real pair a 4-gram table of other clips' answers beats every published
adapter; a figure without its floors means nothing. What a floor drafts is a rule of
:mod:`xsd.decode.rules`, the one that would draft live.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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

        Raises: MetricError for empty answers, or as many others as it has no rule for.
        """
        lists = as_lists(answers)
        if not callable(self._rules) and len(self._rules) != len(lists):
            raise MetricError(
                f"the floor {self.name!r} was made for {len(self._rules)} answers but is asked "
                f"about {len(lists)}; give it one prompt, or one drafter answer, an answer")
        return [np.array([self.rule(i)(ids[:t]) == token for t, token in enumerate(ids)])
                for i, ids in enumerate(lists)]


class PositionMode(Floor):
    """The most frequent token at each position of the training answers."""
    def __init__(self, training_answers: Sequence[Ids]) -> None:
        """Raises: MetricError without training answers."""
        self.tokens = rules.position_modes(as_lists(training_answers))
        super().__init__("position mode", rules.stored(self.tokens))


class NGram(Floor):
    """A table of the training answers: rules.NGramTable."""
    def __init__(self, training_answers: Sequence[Ids], n: int = 4) -> None:
        """Raises: MetricError without training answers, ParameterError for n below 1."""
        super().__init__(f"{n}-gram", rules.NGramTable(as_lists(training_answers), n))


class PromptLookup(Floor):
    """Copies from the sample's own prompt, or from the answer so far: rules.prompt_lookup.

    prompts: token ids of each sample's prompt in the verifier's tokenizer, or None to look in the
    answer alone.
    """
    def __init__(self, prompts: Sequence[Ids] | None = None, longest: int = 3) -> None:
        """Raises: ParameterError for longest below 1."""
        one = None if prompts is not None else rules.prompt_lookup((), longest)
        super().__init__("prompt lookup",
                         one or [rules.prompt_lookup(_plain(ids), longest) for ids in prompts])


class DrafterTokens(Floor):
    """The drafter's own tokens, no adapter: its token at position t against the verifier's at t.

    On teacher-forced pairs this is the drafter's next token after the verifier's prefix; on
    free-running pairs the drafter's own text at the same place (the token-level baseline of the
    reference). A shorter answer of the drafter drafts nothing beyond its end.
    """
    def __init__(self, ids_by_drafter: Sequence[Ids]) -> None:
        super().__init__("drafter tokens", [rules.stored(_plain(ids)) for ids in ids_by_drafter])


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
            "split")
    empty = [i for i, ids in enumerate(lists) if not ids]
    if empty:
        raise MetricError(
            f"answers {empty[:5]} have no token; drop those samples or extract them again")
    return lists


def _plain(ids: Any) -> list[int]:
    return [int(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
