"""Ten questions, two dialects of answers grounded in a clip's facts, and reading the facts back."""

from __future__ import annotations

import re
from typing import NamedTuple

from xsd.core import DatasetError
from xsd.embedded.answers import answers
from xsd.embedded.phrases import PHRASES, Dialect, Facts


class Question(NamedTuple):
    """kind: short name. text: as it is asked."""

    kind: str
    text: str


def questions() -> list[Question]:
    """The ten questions, most frequent first."""
    return [Question("key_elements", "What are the key elements in this scene?"),
            Question("happening", "What is happening in this scene?"),
            Question("vehicles", "Which vehicles are visible?"),
            Question("movement", "How are the vehicles moving?"),
            Question("people", "Are there any pedestrians or cyclists?"),
            Question("traffic_light", "What is the state of the traffic light?"),
            Question("time_of_day", "What time of day is it?"),
            Question("ego_motion", "How is the camera moving?"),
            Question("surroundings", "What are the surroundings of the road?"),
            Question("hazard", "What should the driver pay attention to?")]


def answer(facts: Facts, kind: str, dialect: Dialect = "verifier") -> str:
    """One of ``answers.answers``. Raises: DatasetError for an unknown kind of question."""
    texts = answers(facts, dialect)
    if kind not in texts:
        raise DatasetError(f"unknown kind of question {kind!r}; the world knows {sorted(texts)}")
    return texts[kind]


def _meanings() -> dict[str, tuple[str, str]]:
    """Phrase → (fact, value), longest phrases first, so that "on both sides" wins over "sides"."""
    rows = {(words, fact, value) for fact, values in PHRASES.items()
            for value, pair in values.items() for words in pair if words}
    rows |= {("on the left", "place", "left"), ("at the left edge", "place", "left"),
             ("on the right", "place", "right"), ("at the right edge", "place", "right"),
             ("on both sides", "place", "both"), ("along both edges", "place", "both"),
             ("static background", "scenery", "static")}
    found: dict[str, tuple[str, str]] = {}
    for words, fact, value in sorted(rows, key=lambda row: (-len(row[0]), row)):
        found.setdefault(words, (fact, value))
    return found


_MEANINGS = _meanings()
_PATTERN = re.compile(r"\b(" + "|".join(map(re.escape, _MEANINGS)) + r")\b")


def spans(text: str) -> list[tuple[int, int, str, str]]:
    """(start, end, fact, value) of every phrase that states a fact, in characters of the text."""
    return [(*match.span(), *_MEANINGS[match[1]]) for match in _PATTERN.finditer(text.lower())]


def mentions(text: str) -> list[tuple[str, str]]:
    """The facts an answer states, in order: [('colour', 'red'), ('kind', 'van'), …]."""
    return [(fact, value) for _, _, fact, value in spans(text)]


def word_kinds(text: str) -> list[tuple[str, str]]:
    """(word, kind) for every word: the fact it states, or ``function``."""
    kinds, end = [], 0
    for start, stop, fact, _ in spans(text):
        kind = {"kind": "object", "ego": "ego motion"}.get(fact, fact)
        kinds += [(word, "function") for word in text[end:start].split()]
        kinds += [(word, kind) for word in text[start:stop].split()]
        end = stop
    return kinds + [(word, "function") for word in text[end:].split()]
