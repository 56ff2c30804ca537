"""What if: one cost model over numbers that a slider moves."""

import dataclasses

import pytest
from test_metrics_speedup import COSTS

from xsd.core import MetricError, ParameterError
from xsd.evaluate import speedup, what_if
from xsd.views import sliders

GIVEN = what_if.given(COSTS, acceptance=0.8, gamma=5, n_tokens=30)


def test_what_was_measured_gives_the_cost_models_prediction():
    curve = [0.8**k for k in range(1, 6)]
    same = speedup.predict(COSTS, curve, n_tokens=30, gamma=5)
    found = what_if.what_if(GIVEN)
    assert found["speedup"] == pytest.approx(same.speedup)
    assert found["n_free"] == same.n_free == 22
    assert dict(found["by_gamma"])[5] == dict(found["by_acceptance"])[0.8] == found["speedup"]
    assert max(ratio
               for _, ratio in found["by_gamma"]) == dict(found["by_gamma"])[found["best_gamma"]]
    assert len(found["by_gamma"]) == 21  # v(22) is the widest pass that was measured


def test_break_even_is_where_the_prediction_crosses():
    alpha = what_if.break_even(GIVEN | {"hidden_acceptance": 0.0})
    found = what_if.predict(GIVEN, hidden_acceptance=0.0, acceptance=alpha)
    assert found.speedup == pytest.approx(1.0, abs=1e-6)
    assert what_if.break_even(GIVEN, target=50) is None
    assert what_if.break_even(GIVEN, target=0.1) == 0.0


def test_each_price_moves_the_speed_up_its_way():
    rows = {row["input"]: row for row in what_if.what_if(GIVEN)["sensitivity"]}
    assert rows["acceptance"]["less"] < rows["acceptance"]["more"]
    assert rows["width"]["less"] > rows["width"]["more"]
    assert rows["draft_ms"]["less"] > rows["draft_ms"]["more"]
    assert set(rows) == set(what_if.INPUTS) - {"gamma"}
    flat = what_if.predict(GIVEN, width=0.0)
    assert flat.parts_ms["verify"] == pytest.approx(flat.n_rounds * 14)


def test_the_references_table_is_a_preset():
    rows = what_if.reference_table()
    assert [row["formula"] for row in rows] == pytest.approx([1.01, 1.14, 1.25, 1.47], abs=0.01)
    given = what_if.reference()
    assert what_if.predict(given).n_free == 21 and given["gamma"] == 0
    token = speedup.Timing().token_ms  # the first one, which comes out of the prefill
    assert [row["model"] * 736 / (736 - token)
            for row in rows] == pytest.approx([row["formula"] for row in rows])


def test_the_points_of_a_run_are_its_arms_at_their_own_prices():
    ms = {"verifier_prefill": 120.0, "verify 1": 6.0, "verify 6": 10.0, "verify 10": 12.0}
    arm = {
        "label": "L1", "accepted_per_round": {"value": 2.5}, "tokens": 60,
        "total_ms": {"value": 200.0}, "hidden_accepted": {"value": 3.0},
        "hidden_accepted_drafted": 10.0
    }
    live = {
        "arms": {"ar": {"label": "own greedy loop", "total_ms": {"value": 300.0}},
                 "L1": arm}, "costs": {name: {"ms": value} for name, value in ms.items()},
        "n_timed": 2, "hidden_share": 0.9, "predicted": {
            "L1": {"drafter_prefill_ms": 40.0, "draft_ms": 3.0, "round_ms": 0.0, "gamma": 5}
        }
    }
    found = what_if.points(live)["L1"]
    assert found["measured"] == 1.5 and found["given"]["n_tokens"] == 30
    alpha = found["given"]["acceptance"]
    assert sum(alpha**k for k in range(1, 6)) == pytest.approx(2.5)
    assert what_if.predict(found["given"]).tokens_per_round == pytest.approx(3.5)
    assert what_if.predict(found["given"]).n_free == 10
    del live["predicted"]["L1"]["draft_ms"]  # as runs before kept it
    assert what_if.points(live) == {} == what_if.points({})


@pytest.mark.parametrize(("other", "message"), [({"speed": 1}, "missing or unknown: speed"),
                                                ({"acceptance": 80}, "between 0 and 1 but is 80"),
                                                ({"draft_ms": -1}, "finite times"),
                                                ({"overlap": 2}, "overlap in"),
                                                ({"verify": {}}, "v\\(1\\)"),
                                                ({"gamma": 40}, r"v\(41\) was not measured"),
                                                ({"n_tokens": 0}, "at least 1"),])
def test_what_is_no_price_is_named(other, message):
    with pytest.raises((MetricError, ParameterError), match=message):
        what_if.what_if({**GIVEN, **other})


def test_ones_own_times_are_prices():
    own = dataclasses.replace(COSTS, draft_s=0.001)
    assert what_if.predict(what_if.given(own, acceptance=0.8, gamma=5,
                                         n_tokens=30)).speedup > what_if.predict(GIVEN).speedup


def test_a_slider_moves_the_figure_and_says_what_cannot_be():
    presets = {"mine": {"given": GIVEN, "measured": 1.3},
               "the reference": {"given": what_if.reference()}}
    drawn = sliders.figure(GIVEN, presets)
    assert drawn.data[1].y[0] == what_if.what_if(GIVEN)["speedup"] and drawn.data[6].y == (1.3, )
    box = sliders.widget(presets)
    start, *made, said, live = box.children
    assert len(made) == len(what_if.INPUTS) and "best γ" in said.value
    before = list(live.data[0].y)
    made[list(what_if.INPUTS).index("draft_ms")].value = 1.0
    assert list(live.data[0].y) != before
    assert live.data[1].y[0] == what_if.what_if({**GIVEN, "draft_ms": 1.0})["speedup"]
    start.value = "the reference"
    assert "730 ms in place of 722" in said.value
    made[list(what_if.INPUTS).index("gamma")].value = 21
    assert "v(22) was not measured" in said.value
    with pytest.raises(MetricError, match="nothing to start from"):
        sliders.widget({})
