"""Two dialects of answers, and reading the facts back out of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.embedded_pair.card import compare_facts
from xsd.core import DatasetError
from xsd.embedded import drive, language

KINDS = [question.kind for question in language.questions()]
COLOURS = ("red", "blue", "white", "black", "yellow", "green")


def _facts(indices):
    found = []
    for index in indices:
        found += [clip.facts for clip in drive.simulate_sequence(11, "test", index).clips[::2]]
    return found


FACTS = _facts(range(6))


@given(st.sampled_from(FACTS), st.sampled_from(KINDS), st.sampled_from(["verifier", "drafter"]))
def test_the_right_answer_scores_fully(facts, kind, dialect):
    assert all(right == expected for right, expected in compare_facts(
        language.answer(facts, kind, dialect), facts, kind, dialect).values())


@given(st.sampled_from(FACTS), st.sampled_from(KINDS))
def test_the_drafter_never_names_a_colour_or_the_time(facts, kind):
    stated = {fact for fact, _ in language.mentions(language.answer(facts, kind, "drafter"))}
    assert not stated & {"colour", "time", "sky"}


def test_a_wrong_colour_counts_against_the_answer():
    facts = next(f for f in FACTS if f["vehicles"] and f["vehicles"][0]["colour"])
    right = language.answer(facts, "vehicles")
    colour = facts["vehicles"][0]["colour"]
    wrong = right.replace(colour, next(c for c in COLOURS if c != colour), 1)
    correct, expected = compare_facts(wrong, facts, "vehicles", "verifier")["colour"]
    assert correct == expected - 1


def test_an_invented_thing_counts_against_the_answer():
    facts = next(f for f in FACTS if f["vehicles"])
    invented = language.answer(facts, "vehicles") + " And a red bus."
    correct, expected = compare_facts(invented, facts, "vehicles", "verifier")["kind"]
    assert expected == correct + 1


def test_the_dialects_differ_from_the_first_word():
    assert language.answer(FACTS[0],
                           "people").split()[0] != language.answer(FACTS[0], "people",
                                                                   "drafter").split()[0]


def test_word_kinds_cover_every_word():
    text = language.answer(FACTS[0], "key_elements")
    assert "".join(word for word, _ in language.word_kinds(text)).lower() == text.lower().replace(
        " ", "")


def test_an_unknown_kind_of_question_is_refused():
    with pytest.raises(DatasetError, match="unknown kind of question 'weather'"):
        language.answer(FACTS[0], "weather")
