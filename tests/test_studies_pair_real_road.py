"""The pair on the real road: what an answer states, and how it is counted against what a person
sees."""

import pytest
from tiny_pair import make_tiny_pair

from studies.embedded_pair import card, real_road
from xsd.models import loading


@pytest.mark.parametrize(
    ("text", "stated"),
    [("A red van is parked on the left side while we are standing.", [("vehicle", "van"),
                                                                      ("ego", "stopped")]),
     ("It is day under a clear sky, with green trees on both sides.", [("time", "day"),
                                                                       ("scenery", "trees")]),
     ("One can make out a pedestrian in front; a static background.", []),],
)
def test_only_what_can_be_told_by_eye_is_judged(text, stated):
    assert real_road.stated(text) == stated


def test_every_model_and_fact_has_a_row_beside_what_chance_would_give(tmp_path):
    pair = loading.load_pair(str(make_tiny_pair(tmp_path / "pair", seed=4)))
    rows = card.held_out(1, seed=2003)
    table = real_road.judge(pair, rows, max_new_tokens=4).set_index(["role", "fact"])
    assert len(table) == 2 * len(real_road.SEEN) and (table["right"] <= table["stated"]).all()
    assert table.loc[("verifier", "ego"), "by_chance"] in (0.0, 1.0)  # one drive has one ego motion
    assert table.loc[("drafter", "time"),
                     "by_chance"] != table.loc[("drafter", "time"),
                                               "by_chance"]  # never stated by its dialect
