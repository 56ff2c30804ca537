"""A ratio of speeds is measured in turns and says what it compared."""

import json

import pytest

from benchmarks import ratios
from xsd.core import ParameterError


def test_contenders_take_turns_and_start_in_another_order_each_round():
    order = []
    seconds = ratios.interleave(
        {"ours": lambda: order.append("o"), "theirs": lambda: order.append("t")}, repeats=3,
        warmup=1)
    assert "".join(order) == "toottoot"
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 3, "theirs": 3}


def test_the_ratio_is_the_median_of_the_rounds_and_counts_unequal_work():
    seconds = {"ours": [1.0, 2.0, 1.0], "theirs": [2.0, 2.0, 6.0]}
    assert ratios.ratio("x", seconds, "ours", "theirs").value == 2.0
    found = ratios.ratio("x", seconds, "ours", "theirs", ours_work=10, alternative_work=5, target=5)
    assert (found.low, found.value, found.high) == pytest.approx(
        (2.0, 4.0, 12.0)) and found.met is False


def test_the_table_and_the_file_carry_aim_and_provenance(tmp_path):
    found = ratios.ratio("reading", {"a": [1.0], "b": [2.0]}, "a", "b", target=1.5)
    assert "reading" in ratios.table([found]) and "yes" in ratios.table([found])
    saved = json.loads(ratios.save(tmp_path, [found], facts={"bytes": 3}).read_text())
    assert saved["ratios"][0]["met"] is True and saved["facts"] == {
        "bytes": 3
    } and "git_revision" in saved["provenance"]


def test_a_single_contender_is_refused():
    with pytest.raises(ParameterError, match="two contenders"):
        ratios.interleave({"ours": print})
