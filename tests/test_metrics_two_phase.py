"""Two-phase evaluation against a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.metrics.acceptance import Acceptance
from xsd.metrics.two_phase import every_pair, two_phase_rounds


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
    assert list(zip(rounds.accepted, rounds.drafted, rounds.bonus, rounds.request, strict=True)) == expected
    assert Acceptance.of(rounds).n_accepted == sum(row[0] for row in expected)


def test_every_combination_has_its_rows():
    g = torch.Generator().manual_seed(0)
    good, bad = torch.rand(6, 8, generator=g) < 0.9, torch.rand(6, 8, generator=g) < 0.2
    mask, names = torch.ones(6, 8, dtype=torch.bool), ["a", "a", "b", "b", "c", "c"]
    rows = every_pair({"L4": good, "L1": bad}, {"L5F": good, "none": bad & False}, mask, names, n_first=4, gamma=2, n_resamples=50)
    value = {(r["phase1"], r["phase2"]): r["value"] for r in rows if r["metric"] == "tokens_per_verification"}
    assert len(rows) == 8 and value["L4", "L5F"] > value["L1", "L5F"] > value["L1", "none"]
    with pytest.raises(MetricError, match="at least one adapter for each phase"):
        every_pair({}, {"x": good}, mask, names, n_first=4, gamma=2)
    with pytest.raises(MetricError, match="n_first is 0"):
        two_phase_rounds(good, bad, mask, n_first=0, gamma=2)
