"""Drafting rules over token ids alone: functions ``prefix ids -> next id, or None``. Decoding and
:mod:`xsd.evaluate.floors` ask the same rule, so a floor is what would really have been drafted."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from xsd.core import ParameterError

Rule = Callable[[Sequence[int]], int | None]
_START = -1
"""Stands before the first token of an answer, so that a table can know that a sentence begins."""


def draft(rule: Rule, prefix: Sequence[int], gamma: int) -> list[int]:
    """At most gamma tokens after the prefix, fewer where the rule has nothing to say."""
    text = list(prefix)
    for _ in range(gamma):
        token = rule(text)
        if token is None:
            break
        text.append(token)
    return text[len(prefix):]


class NGramTable:
    """The most frequent token after the last n-1 tokens of the training answers (the lowest id on a
    tie), backing off to shorter contexts. The start of the answer counts as context."""
    def __init__(self, answers: Iterable[Iterable[int]], n: int = 4) -> None:
        """Raises: ParameterError for n below 1."""
        if n < 1:
            raise ParameterError(f"an n-gram table needs n of at least 1 but got {n}")
        self.n = n
        counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in answers:
            padded = [_START] * (n - 1) + list(ids)
            for t in range(n - 1, len(padded)):
                for length in range(n):
                    counts[tuple(padded[t - length:t])][padded[t]] += 1
        self.table = {context: _most_frequent(counter) for context, counter in counts.items()}
        self.counts = counts

    def __call__(self, prefix: Sequence[int]) -> int | None:
        """The next token; None only from a table of no answers."""
        context = tuple([_START] * (self.n - 1) + list(prefix))[len(prefix):]
        return next((self.table[context[start:]]
                     for start in range(self.n) if context[start:] in self.table), None)


    def children(self, prefix: Sequence[int], k: int) -> list[tuple[int, float]]:
        """The at most k likeliest next tokens, best first, with the logs of their probabilities:
        count / (all + 1) after the longest known context, what is missing from shorter ones at 0.4
        of theirs for each token left out (Brants 2007, "stupid backoff")."""
        context = tuple([_START] * (self.n - 1) + list(prefix))[len(prefix):]
        found: dict[int, float] = {}
        weight = 1.0
        for start in range(self.n):
            counter = self.counts.get(context[start:])
            if counter:
                total = counter.total() + 1
                for token, count in counter.most_common(k):
                    found.setdefault(token, weight * count / total)
                weight *= 0.4
            if len(found) >= k:
                break
        best = sorted(found.items(), key=lambda one: (-one[1], one[0]))[:k]
        return [(token, math.log(share)) for token, share in best]


def position_modes(answers: Iterable[Iterable[int]]) -> list[int]:
    """The most frequent token at each position of the answers, for :func:`stored`."""
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for ids in answers:
        for t, token in enumerate(ids):
            counts[t][token] += 1
    return [_most_frequent(counts[t]) for t in range(len(counts))]


def stored(ids: Sequence[int]) -> Rule:
    """The token that a stored answer has at this position, whatever the prefix says."""
    return lambda prefix: ids[len(prefix)] if len(prefix) < len(ids) else None


def prompt_lookup(prompt: Sequence[int] = (), longest: int = 3) -> Rule:
    """What followed the last tokens where they stood before, in the prompt or the answer so far
    (Saxena 2023, apoorvumang/prompt-lookup-decoding): the longest match of at most ``longest``
    tokens, the latest among equals (transformers' takes the earliest). Raises: ParameterError."""
    if longest < 1:
        raise ParameterError(
            f"prompt lookup needs a match of at least 1 token but longest is {longest}")

    def after(prefix: Sequence[int]) -> int | None:
        text = [*prompt, *prefix]
        for size in range(min(longest, len(text) - 1), 0, -1):
            for at in range(len(text) - size - 1, -1, -1):
                if text[at:at + size] == text[-size:]:
                    return text[at + size]
        return None

    return after


def _most_frequent(counter: Counter[int]) -> int:
    return min(counter, key=lambda token: (-counter[token], token))
