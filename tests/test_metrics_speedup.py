"""Speed-up models: the reference's published table and row; ours against a plain simulation."""

import dataclasses

import pytest

from xsd.core import MetricError, ParameterError
from xsd.decode.prices import Prices
from xsd.evaluate.speedup import (
    Timing,
    accepted_within,
    break_even_table,
    expected_table,
    expected_tokens,
    predict,
    reference_wall_clock,
    relaxed_speedup,
    round_speedup,
    wall_clock_table,
)

COSTS = Prices(verifier_prefill_s=0.310, drafter_prefill_s=0.130, draft_s=0.008, round_s=0.001,
               verify={1: 0.014, 2: 0.015, 6: 0.020, 22: 0.070})


def test_reproduces_the_published_break_even_table():
    table = {(line["gamma"], line["target"]): line["alpha_percent"] for line in break_even_table()}
    assert [table[5, t] for t in (1.0, 1.5, 2.0)] == [22, 33, 44]
    assert [table[8, t] for t in (1.0, 1.5, 2.0)] == [14, 21, 28]
    assert [table[10, t] for t in (1.0, 1.5, 2.0)] == [11, 17, 22]
    assert relaxed_speedup(0.44, 5) == pytest.approx(2.0)


def test_reproduces_the_published_speedup_row():
    for acceptance, published in ((0.21, 1.01), (0.5, 1.14), (0.7, 1.25), (1.0, 1.47)):
        assert reference_wall_clock(acceptance) == pytest.approx(published, abs=0.01)


def test_expected_tokens_is_the_sum_of_survival_and_bonus():
    assert expected_tokens(0.8, 5) == pytest.approx(1 + sum(0.8**i for i in range(1, 6)))
    assert (expected_tokens(1, 5), expected_tokens(0, 5)) == (6, 1)
    assert round_speedup(1, 5, overhead=0.5) == 4


def test_prediction_by_hand():
    out = predict(COSTS, [1.0, 0.5], n_tokens=30, gamma=2)
    # window 180 ms holds 22 drafts; survival 1, .5, .25, … → 2 accepted + 1; rounds of 1.5 accepted
    # + 1
    assert (out.n_free, out.tokens_per_round) == (22, 2.5)
    assert out.n_rounds == pytest.approx(27 / 2.5, abs=1e-5)
    assert out.parts_ms["hidden_drafts"] == pytest.approx(71) and out.parts_ms["prefill"] == 310
    assert out.parts_ms["verify"] == pytest.approx(out.n_rounds *
                                                   16.25)  # v(3) between v(2) = 15 and v(6) = 20
    assert out.baseline_ms == pytest.approx(310 + 29 * 14)
    assert out.speedup == pytest.approx(out.baseline_ms / sum(out.parts_ms.values()))
    assert out.residual_ms(out.total_ms + 7) == pytest.approx(7)


def test_without_overlap_the_drafters_prefill_is_paid_for():
    serial = predict(dataclasses.replace(COSTS, overlap=0.0), [0.9] * 2, n_tokens=30, gamma=2)
    assert serial.n_free == 0 and serial.parts_ms["exposed_drafter_prefill"] == 130
    contended = predict(dataclasses.replace(COSTS, contention=1.5), [0.9] * 2, n_tokens=30, gamma=2)
    assert contended.parts_ms["prefill"] == pytest.approx(465)


def test_a_drafter_that_is_never_right_slows_down_and_a_free_perfect_one_speeds_up():
    assert predict(COSTS, [0.0], n_tokens=30, gamma=5).speedup < 1
    assert predict(COSTS, [1.0], n_tokens=30, gamma=5).speedup > 1.4


def test_a_curve_goes_on_at_its_last_ratio():
    assert accepted_within([0.8, 0.4], 4) == pytest.approx(0.8 + 0.4 + 0.2 + 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: predict(COSTS, [0.5, 0.6], n_tokens=30, gamma=5), "never rise"),
     (lambda: predict(COSTS, [0.5], n_tokens=30, gamma=40),
      r"v\(41\) was not measured \(K = 1 … 22\)"),
     (lambda: predict(COSTS, [0.5], n_tokens=0, gamma=4), "they are 0 and 4"),
     (lambda: reference_wall_clock(21), "divided by 100"),],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((MetricError, ParameterError), match=message):
        call()


def test_a_timing_is_the_references_ones_own_or_what_was_measured(tmp_path):
    assert Timing.read("reference") == Timing() and Timing().kind == "quoted"
    own = Timing.read({"decode_ms": 300, "overhead": 0.3})
    assert (own.token_ms, own.kind, own.prefill_verifier_ms) == (10.0, "own", 317.0)
    (tmp_path / "t.json").write_text('{"decode_ms": 300, "overhead": 0.3}')
    assert Timing.read(str(tmp_path / "t.json")) == own
    for wrong in ("fast", {"decode": 3}, {"decode_ms": -1}, {"n_tokens": 0}, [1]):
        with pytest.raises(ParameterError, match="is no timing; give reference, measured"):
            Timing.read(wrong)
    measured = Timing.of(COSTS, n_tokens=20, gamma=5, most=22)
    assert (measured.kind, measured.n_drafted) == ("measured", 22)  # 180 ms hold 22 drafts of 8
    assert (measured.token_ms, measured.verify_ms) == pytest.approx((14.0, 70.0))
    assert measured.gammas == (5,)  # what a round of other lengths costs was not asked
    assert measured.overhead == pytest.approx((5 * 8 + 1 + 20) / 14 - 1)  # one round of five drafts
    free = dataclasses.replace(COSTS, overlap=0.0)
    assert Timing.of(free, n_tokens=20, gamma=5, most=22).n_drafted == 0


def test_tables_of_predictions_hold_the_references_rows():
    assert [row["speedup"] for row in wall_clock_table(Timing())] == pytest.approx(
        [1.01, 1.14, 1.25, 1.47], abs=0.01)
    rows = expected_table(0.8, Timing())
    assert [row["gamma"] for row in rows] == [5, 8, 10]
    assert rows[0]["tokens"] == expected_tokens(0.8, 5)
    assert rows[0]["relaxed"] == pytest.approx(0.8 * 5 / 1.1)
