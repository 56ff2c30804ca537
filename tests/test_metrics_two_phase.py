"""Two-phase evaluation against a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.evaluate.acceptance import Acceptance
from xsd.evaluate.two_phase import every_pair, rounds_from_runs, runs_of, two_phase_rounds


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n_first=st.integers(1, 9), gamma=st.integers(1, 4))
def test_equals_the_plain_loop(seed, n_first, gamma):
    g = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, 5, 8, generator=g) < 0.6
    mask = torch.arange(8) < torch.randint(1, 9, (5, 1), generator=g)
    rounds = two_phase_rounds(first, second, mask, n_first=n_first, gamma=gamma)
    expected = []
    for i in range(5):
        n, at, drafts, hit = int(mask[i].sum()), 0, n_first, first[i]
        while at < n:
            k = 0
            while k < drafts and at + k < n and hit[at + k]:
                k += 1
            expected.append((k, min(drafts, n - at), int(at + k < n), i))
            at, drafts, hit = at + k + 1, gamma, second[i]
    assert list(zip(rounds.accepted, rounds.drafted, rounds.bonus, rounds.request,
                    strict=True)) == expected
    assert Acceptance.of(rounds).n_accepted == sum(row[0] for row in expected)


def test_every_combination_has_its_rows():
    g = torch.Generator().manual_seed(0)
    good, bad = torch.rand(6, 8, generator=g) < 0.9, torch.rand(6, 8, generator=g) < 0.2
    mask, names, lengths = torch.ones(6, 8, dtype=torch.bool), ["a", "a", "b", "b", "c",
                                                                "c"], [8] * 6
    first = {name: runs_of(hit, mask, 4)[:, 0] for name, hit in (("L4", good), ("L1", bad))}
    second = {"L5F": runs_of(good, mask, 2), "none": runs_of(bad & False, mask, 2)}
    rows = every_pair(first, second, lengths, names, n_first=4, gamma=2, n_resamples=50)
    value = {(r["phase1"], r["phase2"]): r["value"] for r in rows
             if r["metric"] == "tokens_per_verification"}
    assert len(rows) == 8 and value["L4", "L5F"] > value["L1", "L5F"] > value["L1", "none"]
    with pytest.raises(MetricError, match="at least one adapter for each phase"):
        every_pair({}, second, lengths, names, n_first=4, gamma=2)


def test_a_round_accepts_what_its_own_start_gives_not_what_one_step_says():
    """Answer of 8, as drawn in the module: phase 1 accepts 3 of 5, then runs of 2 (from position 4)
    and 0 (from position 7)."""
    second = [[0, 0, 0, 0, 2, 5, 5, 0]]
    rounds = rounds_from_runs([3], second, [8], n_first=5, gamma=5)
    assert list(zip(rounds.accepted, rounds.drafted, rounds.bonus, strict=True)) == [(3, 5, 1),
                                                                                     (2, 4, 1),
                                                                                     (0, 1, 1)]


@pytest.mark.parametrize(("arguments", "message"),
                         [(([3], [[0] * 8], [8], 0, 2), "they are 0 and 2"),
                          (([3], [[0] * 8], [8, 8], 5, 2), "do not fit"),
                          (([3], [[0] * 8], [0], 5, 2), "answers of at least one token"),
                          (([6], [[0] * 8], [8], 5, 2), "a run is longer than its draft"),
                          (([3], [[3] * 8], [8], 5, 2), "a run is longer than its draft"),
                          (([3], [[0] * 4], [8], 5, 2), "a run is longer"),],
                         )
def test_runs_that_cannot_be_are_refused(arguments, message):
    first, second, lengths, n_first, gamma = arguments
    with pytest.raises(MetricError, match=message):
        rounds_from_runs(first, second, lengths, n_first=n_first, gamma=gamma)
