"""Floors: drafts that never look at the sensor."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.decode import acceptance, proposers, rules
from xsd.evaluate.floors import (
    drafter_tokens,
    duplicate_rate,
    ngram,
    position_mode,
    prompt_lookup,
)
from xsd.evaluate.rounds import from_matches

TRAIN = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 3, 4, 9], [7, 2, 8, 9]]


def test_position_mode_says_the_most_frequent_token_of_each_place():
    floor = position_mode(TRAIN)
    assert floor.draft([], 9, 0) == [1, 2, 3, 4, 9]
    assert [m.tolist() for m in floor.match([[1, 5, 3], [7, 2, 3, 4, 9, 9]])
            ] == [[True, False, True], [False, True, True, True, True, False],]


def test_ngram_follows_context_and_backs_off():
    floor = ngram(TRAIN, n=3)
    assert floor.draft([], 5, 0) == [1, 2, 3, 4, 9]
    assert floor.draft([7, 2], 2, 0) == [8, 9]
    assert floor.draft([6, 6, 3], 1, 0) == [4]  # unseen pair: the token after 3
    assert floor.draft(
        [6, 6, 6], 1,
        0) == [2]  # unseen token: the most frequent of all (2 and 9 stand four times; the lower id)
    assert ngram(TRAIN, n=1).draft([3], 2, 0) == [2, 2]


def test_ngram_rounds_roll_on_its_own_drafts():
    rounds = from_matches(ngram(TRAIN, n=3).match([[1, 2, 3, 5, 9]]), 5)
    assert rounds.accepted.tolist() == [3, 1] and rounds.drafted.tolist() == [
        5, 1
    ] and rounds.bonus.tolist() == [1, 0]
    assert rounds.mean_accepted == 2.0


def drafted_live(floor, answers, gamma):
    """The rounds as a greedy loop would have them, draft by draft: (accepted, bonus) of each."""
    found = []
    for sample, ids in enumerate(answers):
        at = 0
        while at < len(ids):
            drafts = floor.draft(ids[:at], min(gamma, len(ids) - at), sample)
            accepted, _ = acceptance.judge(drafts, ids[at:])
            bonus = int(at + accepted < len(ids))
            found.append((accepted, bonus))
            at += accepted + bonus
    return found


def test_a_rule_has_the_same_rounds_live_and_replayed():
    """Inside an accepted run the drafts are the verifier's tokens, so replaying one-step matches is
    exact (docs/teacher_forcing.md)."""
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 4, size=rng.integers(3, 30)).tolist() for _ in range(60)]
    asked = answers[30:]
    for floor in (ngram(answers[:30], n=4), position_mode(answers[:30]), prompt_lookup(),
                  drafter_tokens([ids[1:] for ids in asked])):
        rounds = from_matches(floor.match(asked), 4)
        replayed = list(zip(rounds.accepted.tolist(), rounds.bonus.tolist(), strict=True))
        assert replayed == drafted_live(floor, asked, 4)


def test_prompt_lookup_copies_from_prompt_and_answer():
    floor = prompt_lookup([[10, 11, 12, 13, 14]])
    assert floor.draft([11, 12], 3, 0) == [13, 14, 11]
    assert floor.draft([50], 3, 0) == []
    assert prompt_lookup().draft([1, 2, 3, 1, 2], 2, 0) == [3, 1]
    rounds = from_matches(floor.match([[12, 13, 14, 50]]), 3)
    assert rounds.accepted.tolist() == [0, 2]  # nothing for the first token; after 12: 13 14 12
    with pytest.raises(MetricError, match="'prompt lookup' was made for 1 answers but is asked a"):
        floor.match([[1], [2]])


def test_drafter_tokens_without_an_adapter():
    floor, answers = drafter_tokens([torch.tensor([1, 2, 9, 4]), [5]]), [[1, 2, 3, 4], [5, 6]]
    matches = floor.match([torch.tensor(ids) for ids in answers])
    assert [m.tolist() for m in matches] == [[True, True, False, True], [True, False]]
    assert from_matches(matches, 2).accepted.tolist() == [2, 1, 1]
    with pytest.raises(MetricError, match="'drafter tokens' was made for 1 answers but is asked a"):
        drafter_tokens([[1]]).match([[1], [2]])


def test_duplicates_are_counted_both_ways():
    rate = duplicate_rate([[1, 2], [1, 2], [3]], training_answers=[[3], [4]])
    assert (rate.shared, rate.repeated, rate.in_training) == (2 / 3, pytest.approx(1 / 3), 1 / 3)


def test_empty_input_is_named():
    with pytest.raises(MetricError, match="the list is empty"):
        ngram([])
    with pytest.raises(MetricError, match=r"answers \[1\] have no token"):
        position_mode([[1], []])
    with pytest.raises(MetricError, match="but gamma is 0"):
        from_matches(position_mode([[1]]).match([[1]]), 0)


TRACES = os.environ.get("XSD_REFERENCE_TRACES", "")


@pytest.mark.skipif(
    not TRACES,
    reason="set XSD_REFERENCE_TRACES to the published token traces (not redistributable)")
def test_floors_on_published_traces_of_the_real_pair():
    rows = json.loads(Path(TRACES).read_text())["rows"]
    answers = [row["verifier_ids"] for row in rows]
    fold = [i * 8 // len(answers) for i in range(len(answers))
            ]  # neighbouring clips overlap: whole stretches are held out
    hits, accepted, n_rounds = [], 0, 0
    for k in range(8):
        floor = ngram([ids for ids, f in zip(answers, fold, strict=True) if f != k])
        held_out = [ids for ids, f in zip(answers, fold, strict=True) if f == k]
        hits += floor.match(held_out)
        rounds = from_matches(floor.match(held_out), 5)
        accepted, n_rounds = accepted + rounds.accepted.sum(), n_rounds + len(rounds.accepted)
    assert np.concatenate(hits).mean() == pytest.approx(0.73, abs=0.02)
    assert accepted / n_rounds == pytest.approx(1.99, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(prompt=st.lists(st.integers(0, 3),
                       max_size=12), answer=st.lists(st.integers(0, 3), max_size=12),
       gamma=st.integers(1, 6), longest=st.integers(1, 4),
       )
def test_prompt_lookup_drafts_live_what_its_floor_drafts(prompt, answer, gamma, longest):
    live = proposers.RuleProposer(lambda sample: rules.prompt_lookup(sample, longest))
    live.begin(prompt)
    live.observe(answer, torch.zeros(0))
    assert prompt_lookup([prompt], longest).draft(answer, gamma, 0) == live.propose(gamma)


def test_prompt_lookup_takes_the_latest_of_the_longest_matches():
    assert prompt_lookup([[1, 2, 3, 9, 1, 2, 4, 9, 2, 5]]).draft([1, 2], 1, 0) == [4]
