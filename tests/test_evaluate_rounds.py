"""The acceptance schema: identities, replayed rounds, conventions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError, Round
from xsd.evaluate.rounds import Rounds, from_matches, from_requests, runs_of, walk


@settings(max_examples=60, deadline=None)
@given(matches=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6),
       gamma=st.integers(1, 6))
def test_replayed_rounds_equal_the_plain_loop_and_cover_the_answer(matches, gamma):
    rounds = from_matches(matches, gamma)
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
    n, histogram = len(rounds.accepted), rounds.histogram
    assert sum(histogram) == n
    assert sum(k * count for k, count in enumerate(histogram)) == rounds.accepted.sum()
    assert rounds.mean_accepted == pytest.approx(sum(rounds.marginal))
    assert list(rounds.marginal) == sorted(rounds.marginal, reverse=True)
    assert rounds.mean_accepted_with_bonus == pytest.approx(sum(map(len, matches)) / n)
    assert rounds.acceptance_rate == pytest.approx(rounds.accepted.sum() / rounds.drafted.sum())
    reached = [int(((rounds.accepted >= i) & (rounds.drafted > i)).sum()) for i in range(gamma)]
    assert [(share or 0) * at for share, at in zip(rounds.conditional, reached, strict=True)
            ] == pytest.approx([share * n for share in rounds.marginal])


def test_a_worked_example():
    # a b x · · then bonus c; d e f accepted at gamma 3, bonus g; h accepted, answer over
    match = [[True, True, False, True, True, True, False, True]]
    figures = from_matches(match, gamma=3)
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
    figures = from_matches([[True] * 5, [False] * 4], gamma=5)
    # one round of 5 accepted; four rounds of none
    each = figures.by_request()
    assert (figures.mean_accepted, each["mean_accepted"].mean()) == (1.0, 2.5)
    assert each["mean_accepted_with_bonus"].tolist() == [5.0, 1.0]
    assert each["acceptance_rate"].tolist() == [1.0, 0.0]


def test_live_rounds_enter_the_same_schema():
    times = {"draft_start_s": 0.0, "draft_end_s": 0.1, "verify_start_s": 0.1, "verify_end_s": 0.2}
    live = [[
        Round((4, 5, 6), n_accepted=2, bonus=9, **times),
        Round((7,), n_accepted=1, bonus=None, **times)
    ], []]
    figures = from_requests(live, gamma=3)
    counted = [figures.accepted.tolist(), figures.bonus.tolist(), figures.drafted.tolist()]
    assert counted == [[2, 1], [1, 0], [3, 1]] and len(figures.by_request()["mean_accepted"]) == 1
    live[0].insert(0, Round(tuple(range(9)), n_accepted=4, bonus=1, phase="prefill_hiding",
                            **times))
    assert from_requests(live).gamma == 9
    decode = from_requests(live, gamma=3, phase="decode")
    assert [decode.accepted.tolist(), decode.bonus.tolist(), decode.drafted.tolist()] == counted
    with pytest.raises(MetricError, match="drafted 9 tokens but gamma is 2"):
        from_requests(live, gamma=2)


def test_rounds_without_drafts_count_in_no_figure():
    """A first token nobody drafted, a full round, a step without room for a draft."""
    times = {"draft_start_s": 0.0, "draft_end_s": 0.1, "verify_start_s": 0.1, "verify_end_s": 0.2}
    rounds = [Round((), 0, 15, phase="prefill_hiding", **times), Round((4, 7, 9), 3, 13, **times),
              Round((), 0, 21, **times)]
    figures = from_requests([rounds])
    assert (figures.histogram, figures.mean_accepted) == ((0, 0, 0, 1), 3.0)
    assert figures.marginal == (1.0, 1.0, 1.0)
    assert figures.convention("vllm")["mean_acceptance_length"] == 4.0
    assert figures.by_request()["mean_accepted"].tolist() == [3.0] and figures.bonus.sum() == 1
    with pytest.raises(MetricError, match="no round was recorded"):
        from_requests([rounds], phase="prefill_hiding")


def test_impossible_rounds_are_refused():
    one = np.array([1])
    with pytest.raises(MetricError, match="accepted 1 of 0 drafted tokens"):
        Rounds(one, one * 0, one, one * 0, 1, 5)
    with pytest.raises(MetricError, match="at least 1 token, but gamma is 0"):
        from_matches([[True]], gamma=0)
    for nothing in ([], [[], []]):
        with pytest.raises(MetricError, match="no answer has a position to draft"):
            from_matches(nothing, gamma=2)
    with pytest.raises(MetricError, match="no round was recorded"):
        from_requests([[]], gamma=2)


def test_an_answer_without_a_position_has_no_round():
    rounds = from_matches([[True], [], [False]], gamma=2)
    assert rounds.request.tolist() == [0, 2] and rounds.n_requests == 3
    assert rounds.per_request()["rounds"].tolist() == [1, 0, 1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n_first=st.integers(1, 9), gamma=st.integers(1, 4))
def test_a_walk_that_another_drafter_opens_equals_the_plain_loop(seed, n_first, gamma):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 9, 5)
    inside = np.arange(8) < lengths[:, None]
    first, second = (draw.random((2, 5, 8)) < 0.6) & inside
    rounds = walk(runs_of(second, gamma), lengths, gamma, first=runs_of(first, n_first)[:, 0],
                  n_first=n_first)
    expected = []
    for i, n in enumerate(lengths):
        at, drafts, hit = 0, n_first, first[i]
        while at < n:
            k = 0
            while k < drafts and at + k < n and hit[at + k]:
                k += 1
            expected.append((k, min(drafts, n - at), int(at + k < n), i))
            at, drafts, hit = at + k + 1, gamma, second[i]
    assert list(zip(rounds.accepted, rounds.drafted, rounds.bonus, rounds.request,
                    strict=True)) == expected
    assert rounds.gamma == max(gamma, n_first)


def test_a_round_accepts_what_its_own_start_gives_not_what_one_step_says():
    """Answer of 8: the first round accepts 3 of 5, then runs of 2 (from position 4) and 0 (from
    position 7)."""
    rounds = walk([[0, 0, 0, 0, 2, 5, 5, 0]], [8], 5, first=[3], n_first=5)
    assert list(zip(rounds.accepted, rounds.drafted, rounds.bonus,
                    strict=True)) == [(3, 5, 1), (2, 4, 1), (0, 1, 1)]


@pytest.mark.parametrize(("first", "runs", "lengths", "n_first", "gamma", "message"), [
    ([3], [[0] * 8], [8], 0, 2, "the first round's is 0"),
    ([3], [[0] * 8], [8], 5, 0, "gamma is 0"),
    ([3], [[0] * 8], [8, 8], 5, 2, "do not fit"),
    ([3], [[0] * 4], [8], 5, 2, "do not fit"),
    ([3], [[0] * 8], [0], 5, 2, "no answer has a position"),
    ([6], [[0] * 8], [8], 5, 2, "a run is longer than its draft"),
    ([3], [[3] * 8], [8], 5, 2, "a run is longer than its draft"),
])
def test_runs_that_cannot_be_are_refused(first, runs, lengths, n_first, gamma, message):
    with pytest.raises(MetricError, match=message):
        walk(runs, lengths, gamma, first=first, n_first=n_first)
