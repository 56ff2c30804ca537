"""Two dialects of answers, and reading the facts back out of them."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.embedded_pair import corpus
from xsd.core import DatasetError, StorageError
from xsd.embedded import drive, language
from xsd.embedded.facts import seen_by_events

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
    assert all(right == expected for right, expected in language.score(
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
    correct, expected = language.score(wrong, facts, "vehicles", "verifier")["colour"]
    assert correct == expected - 1


def test_an_invented_thing_counts_against_the_answer():
    facts = next(f for f in FACTS if f["vehicles"])
    invented = language.answer(facts, "vehicles") + " And a red bus."
    correct, expected = language.score(invented, facts, "vehicles", "verifier")["kind"]
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
    with pytest.raises(DatasetError, match="none of the ten questions"):
        language.kind_of("How tall are you?")


def test_duplicate_rate_counts_every_member_of_a_group():
    assert language.duplicate_rate(["a", "a", "b", "c"]) == 0.5
    assert language.duplicate_rate([]) == 0.0


def test_labels_hide_from_the_drafter_what_events_cannot_show():
    for facts in FACTS:
        seen, known = corpus.labels(facts, "verifier"), corpus.labels(facts, "drafter")
        assert known["time"] == -1 and seen["time"] >= 0
        if not facts["moving"]:
            assert known["left"] == -1
        assert known["ahead_kind"] == corpus.labels(
            seen_by_events(facts) | {"moving": facts["moving"]}, "drafter")["ahead_kind"]


def test_a_corpus_reopens_and_refuses_another_configuration(tmp_path):
    built = corpus.build(tmp_path / "c", split="train", n_sequences=1, seed=4, size=48)
    again = corpus.build(tmp_path / "c", split="train", n_sequences=1, seed=4, size=48)
    assert built.video.tobytes() == again.video.tobytes() and built.layout.shape == (
        4, 13, 24, 24) and len(again) == 4
    assert len(built.dialogues("verifier")[0]) == 10
    with pytest.raises(DatasetError, match="holds the corpus"):
        corpus.build(tmp_path / "c", split="train", n_sequences=2, seed=4, size=48)


def test_a_corpus_that_does_not_fit_on_the_disk_is_refused_before_it_is_simulated(
        tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(
            StorageError,
            match=r"100 simulated drives take 0\.1 GB.*choose another folder or fewer drives"):
        corpus.build(tmp_path / "c", split="train", n_sequences=100, seed=4, size=96)
    assert not list((tmp_path / "c").iterdir())


def test_what_an_interrupted_simulation_left_does_not_count_against_the_disk(tmp_path, monkeypatch):
    (tmp_path / "video.npy").write_bytes(bytes(10**6))
    seen = []
    monkeypatch.setattr(corpus.shutil, "disk_usage",
                        lambda path: seen.append(list(path.iterdir())) or SimpleNamespace(free=0))
    with pytest.raises(StorageError):
        corpus.build(tmp_path, split="train", n_sequences=1, seed=4)
    assert seen == [[]]
