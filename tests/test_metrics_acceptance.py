"""The acceptance schema: identities, replayed rounds, conventions."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError, Round
from xsd.evaluate.acceptance import (
    Acceptance,
    Rounds,
    rounds_from_lists,
    rounds_from_matches,
    rounds_from_requests,
)


@settings(max_examples=60, deadline=None)
@given(matches=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6),
       gamma=st.integers(1, 6))
def test_replayed_rounds_equal_the_plain_loop_and_cover_the_answer(matches, gamma):
    rounds = rounds_from_lists(matches, gamma)
    expected = []
    for i, hit in enumerate(matches):
        at = 0
        while at < len(hit):
            k = 0
            while k < gamma and at + k < len(hit) and hit[at + k]:
                k += 1
            expected.append((k, min(gamma, len(hit) - at), int(at + k < len(hit)), i))
            at += k + 1
    assert list(zip(rounds.accepted, rounds.drafted, rounds.bonus, rounds.request,
                    strict=True)) == expected
    each = rounds.per_request()
    assert (each["accepted"] + each["bonus"]).tolist() == [len(hit) for hit in matches]
    figures = Acceptance.of(rounds)  # its identities are asserted on the way
    assert figures.mean_accepted == pytest.approx(sum(figures.marginal))
    assert figures.n_accepted + figures.n_bonus == sum(map(len, matches))


def test_a_worked_example():
    #            a b x · ·   then bonus c; d e f accepted at gamma 3, bonus g; h accepted, answer over
    match = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1]], dtype=torch.bool)
    figures = Acceptance.of(rounds_from_matches(match, torch.ones_like(match), gamma=3))
    assert figures.histogram == (0, 1, 1, 1)
    assert figures.marginal == (1.0, 2 / 3, 1 / 3)
    assert figures.conditional == (
        1.0, 1.0, 1 / 2,
    )  # the last round drafted one token only, so it is not counted as a refusal of the second
    assert (figures.mean_accepted, figures.mean_accepted_with_bonus) == (2.0, 8 / 3)
    assert figures.acceptance_rate == 6 / 7
    assert figures.convention("vLLM") == {
        "mean_acceptance_length": 3.0, "draft_acceptance_rate": 6 / 7,
        "per_position_acceptance_rate": figures.marginal,
    }
    assert figures.convention("eagle")["tau"] == figures.convention(
        "sglang")["accept_length"] == 8 / 3
    assert figures.convention("vispec")["tau"] == 2.0
    with pytest.raises(MetricError, match="unknown convention 'tgi'"):
        figures.convention("tgi")


def test_per_request_and_per_round_means_differ_as_they_should():
    figures = Acceptance.of(rounds_from_lists(
        [[True] * 5, [False] * 4], gamma=5))  # one round of 5 accepted; four rounds of none
    assert (figures.mean_accepted, figures.mean_accepted_per_request) == (1.0, 2.5)
    assert figures.request_histogram == (1, 0, 0, 0, 0, 1)


def test_live_rounds_enter_the_same_schema():
    times = {"draft_start_s": 0.0, "draft_end_s": 0.1, "verify_start_s": 0.1, "verify_end_s": 0.2}
    live = [[
        Round((4, 5, 6), n_accepted=2, bonus=9, **times),
        Round((7,), n_accepted=1, bonus=None, **times)
    ], []]
    figures = Acceptance.of(rounds_from_requests(live, gamma=3))
    assert (figures.n_rounds, figures.n_requests, figures.n_accepted, figures.n_bonus,
            figures.n_drafted) == (2, 1, 3, 1, 4)
    live[0].insert(0, Round(tuple(range(9)), n_accepted=4, bonus=1, phase="prefill_hiding",
                            **times))
    assert rounds_from_requests(live).gamma == 9
    assert Acceptance.of(rounds_from_requests(live, gamma=3, phase="decode")) == figures
    with pytest.raises(MetricError, match="drafted 9 tokens but gamma is 2"):
        rounds_from_requests(live, gamma=2)


@pytest.mark.parametrize("change", [{"mean_accepted": 1.9}, {"histogram":
    (0, 2, 0, 1)}, {"n_bonus": 7}, {"marginal": (0.5, 1.0, 0.5)}, {"n_drafted": 70}])
def test_figures_that_contradict_each_other_are_refused(change):
    figures = Acceptance.of(
        rounds_from_lists([[True, True, False, True, True, True, False, True]], gamma=3))
    with pytest.raises(MetricError, match="contradict each other"):
        dataclasses.replace(figures, **change)


def test_impossible_rounds_are_refused():
    one = np.array([1])
    with pytest.raises(MetricError, match="accepted 1 of 0 drafted tokens"):
        Acceptance.of(Rounds(one, one * 0, one, one * 0, 1, 5))
    with pytest.raises(MetricError, match="gamma must be at least 1"):
        rounds_from_lists([[True]], gamma=0)
    with pytest.raises(MetricError, match="have no real position"):
        rounds_from_lists([[True], []], gamma=2)
    with pytest.raises(MetricError, match="no round was recorded"):
        rounds_from_requests([[]], gamma=2)
