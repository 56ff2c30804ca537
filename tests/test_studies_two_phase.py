"""Two-phase evaluation against a plain loop."""

import numpy as np
import pandas as pd
import pytest

from studies.gap.comparison import every_pair, phases
from xsd.core import MetricError
from xsd.evaluate import rounds
from xsd.evaluate.speedup import Timing


def test_every_combination_has_its_rows():
    rng = np.random.default_rng(0)
    good, bad = rng.random((6, 8)) < 0.9, rng.random((6, 8)) < 0.2
    names, lengths = ["a", "a", "b", "b", "c", "c"], [8] * 6
    first = {name: rounds.runs_of(hit, 4)[:, 0] for name, hit in (("L4", good), ("L1", bad))}
    second = {"L5F": rounds.runs_of(good, 2), "none": rounds.runs_of(bad & False, 2)}
    rows = every_pair(first, second, lengths, names, n_first=4, gamma=2, n_resamples=50)
    tokens = rows[rows["metric"] == "tokens_per_verification"]
    value = tokens.set_index(["phase1", "phase2"])["value"]
    assert len(rows) == 8 and value["L4", "L5F"] > value["L1", "L5F"] > value["L1", "none"]
    with pytest.raises(MetricError, match="at least one adapter for each phase"):
        every_pair({}, second, lengths, names, n_first=4, gamma=2)


def test_every_pair_has_its_predicted_speedup_where_phase_2_is_timed():
    """Two answers of 8: phase 1 accepts 3 of 4 (bonus at 4), then a round of 2 and its bonus, then
    one of 1; times of 10 ms a token, 30 ms of prefill, 20 ms for phase 1's check, rounds of 15."""
    timing = Timing(prefill_verifier_ms=30, decode_ms=100, n_tokens=10, verify_ms=20, overhead=0.5)
    runs = {"L5F": [[0, 0, 0, 0, 2, 1, 0, 1]] * 2, "untimed": [[0] * 8] * 2}
    rows = every_pair({"L4": np.array([3, 3])}, runs, [8, 8], ["a", "b"], n_first=4, gamma=2,
                      timings={"L5F": timing}, n_resamples=50)
    found = rows[rows["metric"] == "speedup"].set_index("phase2")["value"]
    assert found.to_dict() == {"L5F": pytest.approx((30 + 80) / (30 + 20 + 2 * 15))}


def test_a_round_accepts_what_its_own_start_gives_not_what_one_step_says():
    """Answer of 8, as drawn in the module: phase 1 accepts 3 of 5, then runs of 2 (from position 4)
    and 0 (from position 7)."""
    walked = rounds.walk([[0, 0, 0, 0, 2, 5, 5, 0]], [8], 5, first=[3], n_first=5)
    assert list(zip(walked.accepted, walked.drafted, walked.bonus, strict=True)) == [
        (3, 5, 1), (2, 4, 1), (0, 1, 1)
    ]


def test_phases_are_read_from_the_token_table():
    """Answers of 3, 1 and 2 tokens: the single token is drafted by none and left out; a level that
    does not predict the first token is no phase 1, and its runs begin one position later."""
    whole = pd.DataFrame({
        "level": "L4", "sample": list("aaabcc"), "sequence": list("xxxxyy"),
        "position": [-1, 0, 1, -1, -1, 0], "match": [True, True, False, True, False, True],
        "accepted": [2, 1, 0, 1, 0, 1],
    })
    later = whole[whole["position"] >= 0].assign(level="B1")
    first, second, lengths, clusters = phases(pd.concat([whole, later]), n_first=1)
    assert {name: runs.tolist() for name, runs in first.items()} == {"L4": [1, 0]}
    assert second["L4"].tolist() == [[2, 1, 0], [0, 1, 0]]
    assert second["B1"].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert lengths.tolist() == [3, 2] and clusters == ["x", "y"]


@pytest.mark.parametrize(("first", "runs", "lengths", "n_first", "message"), [
    ([3], [[0] * 8], [8], 0, "at least 1 token"),
    ([3], [[0] * 8], [8, 8], 5, "do not fit"),
    ([0], [[0] * 8], [0], 5, "no answer has a position"),
    ([6], [[0] * 8], [8], 5, "longer than its draft"),
    ([3], [[3] * 8], [8], 5, "longer than its draft"),
    ([3], [[0] * 4], [8], 5, "do not fit"),
])
def test_runs_that_cannot_be_are_refused(first, runs, lengths, n_first, message):
    with pytest.raises(MetricError, match=message):
        rounds.walk(runs, lengths, 2, first=first, n_first=n_first)
