"""What the explorer shows for a selection, and that its controls reach it without a browser."""

import pandas as pd
import pytest
from views_examples import sample, token_table

from xsd.core import MetricError
from xsd.evaluate import curves
from xsd.views import explorers, theme


@pytest.fixture(scope="module")
def data():
    tokens = pd.concat([token_table(), token_table(3, run="other", levels=("L1", "L4"))])
    return explorers.ExplorerData(tokens, {"s0/0": sample()}.get)


def test_a_selection_shows_the_curve_of_its_rows(data):
    chosen = explorers.Selection("demo", ("L4", "L1"), 0.9)
    frame = explorers.curve(data, chosen)
    assert list(dict.fromkeys(frame["level"])) == ["L4", "L1"]
    own = data.tokens[(data.tokens["run"] == "demo") & (data.tokens["level"] == "L1")]
    assert frame[frame["level"] == "L1"]["marginal"].tolist() == curves.by_position(
        own, 0.9)["marginal"].tolist()


def test_samples_at_a_position_list_the_rejected_first(data):
    listed = explorers.samples_at(data, explorers.Selection("demo", ("L1",), None, position=3))
    assert len(listed) == 24
    assert listed["accepted"].is_monotonic_increasing


def test_unknown_run_and_level_are_named(data):
    with pytest.raises(MetricError, match="no run named 'x' here; choose from demo, other"):
        explorers.rows(data, explorers.Selection("x", ("L1",)))
    with pytest.raises(MetricError, match="has no level B1; choose from L1, L4"):
        explorers.rows(data, explorers.Selection("other", ("B1",)))
    with pytest.raises(MetricError, match="lacks the column"):
        explorers.ExplorerData(data.tokens.drop(columns="draft_token"))


def test_moving_the_threshold_changes_the_picture_and_the_headline(data):
    explorer = explorers.AcceptanceExplorer(data)
    before, words = list(explorer.figure.data[1].y), explorer.title.value
    explorer.rule.value = "cosine"
    explorer.tau.value = 0.8
    assert list(explorer.figure.data[1].y) != before
    assert "cosine &gt; 0.80" in explorer.title.value and explorer.title.value != words
    expected = explorers.curve(data, explorer.selection)
    assert list(
        explorer.figure.data[1].y) == expected[expected["level"] == "L1"]["marginal"].tolist()
    explorer.rule.value = "token"
    assert list(explorer.figure.data[1].y) == before


def test_a_click_on_a_position_lists_its_samples_and_shows_their_strips(data):
    explorer = explorers.AcceptanceExplorer(data)
    explorer.click(5)
    assert explorer.selection.position == 5 == explorer.position.value
    assert explorer.figure.layout.shapes[0].x0 == 5
    names = [name for _, name in explorer.samples.options]
    assert explorer.selection.sample == names[
        0] and f"3px solid {theme.INK}" in explorer.strips.value
    assert names == explorers.samples_at(data, explorer.selection)["sample"].tolist()
    explorer.samples.value = names[-1]
    assert explorer.selection.sample == names[-1]
    assert explorer.strips.value.count("token-pairs") == 2  # both levels
    explorer.click(999)
    assert explorer.position.value == explorer.position.max


def test_pictures_stand_beside_the_strips_where_the_clip_is_at_hand(data):
    explorer = explorers.AcceptanceExplorer(data)
    explorer.samples.value = "s0/0"
    assert explorer.pictures.value.count("<img") == 13
    explorer.samples.value = "s0/1"
    assert "not at hand" in explorer.pictures.value


def test_another_run_keeps_the_levels_it_has(data):
    explorer = explorers.AcceptanceExplorer(data, levels=("L4", "L5F"))
    explorer.run.value = "other"
    assert explorer.selection.levels == ("L4",)
    assert len(explorer.figure.data) == 2
    explorer.levels.value = ()
    assert explorer.selection.levels == ("L4",)  # an empty choice keeps what was shown


def test_survival_is_drawn_on_request(data):
    explorer = explorers.AcceptanceExplorer(data)
    explorer.curve.value = "survival"
    assert "survival" in explorer.figure.layout.title.text
    drawn = list(explorer.figure.data[1].y)
    assert drawn == explorers.curve(data,
                                    explorer.selection).query("level == 'L1'")["survival"].tolist()


def test_a_lower_threshold_never_lowers_a_curve(data):
    explorer = explorers.AcceptanceExplorer(data)
    explorer.rule.value = "cosine"
    before = [y for trace in explorer.figure.data[1::2] for y in trace.y]
    explorer.tau.value = 0.5
    after = [y for trace in explorer.figure.data[1::2] for y in trace.y]
    assert before != after
    assert all(new >= old for new, old in zip(after, before, strict=True))
