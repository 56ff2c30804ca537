"""What the explorer shows for a selection, and that its controls reach it without a browser."""

from dataclasses import replace

import pandas as pd
import pytest
from views_examples import WORDS, live_runs, sample, token_table

from xsd.core import MetricError
from xsd.evaluate import curves
from xsd.views import controls, explorers


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
        explorers.grids(data, explorers.Selection("x", ("L1",)))
    with pytest.raises(MetricError, match="has no level B1; choose from L1, L4"):
        explorers.grids(data, explorers.Selection("other", ("B1",)))
    with pytest.raises(MetricError, match="lacks the column"):
        explorers.ExplorerData(data.tokens.drop(columns="draft_token"))


def test_moving_the_threshold_changes_the_picture_and_the_headline(data):
    explorer = controls.AcceptanceExplorer(data)
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
    explorer = controls.AcceptanceExplorer(data)
    explorer.click(5)
    assert explorer.selection.position == 5 == explorer.position.value
    assert explorer.figure.layout.shapes[0].x0 == 5
    names = [name for _, name in explorer.samples.options]
    assert explorer.selection.sample == names[
        0] and "3px solid currentColor" in explorer.strips.value
    assert names == explorers.samples_at(data, explorer.selection)["sample"].tolist()
    explorer.samples.value = names[-1]
    assert explorer.selection.sample == names[-1]
    assert explorer.strips.value.count("token-pairs") == 2  # both levels
    explorer.click(999)
    assert explorer.position.value == explorer.position.max


def test_pictures_stand_beside_the_strips_where_the_clip_is_at_hand(data):
    explorer = controls.AcceptanceExplorer(data)
    explorer.samples.value = "s0/0"
    assert explorer.pictures.value.count("<img") == 13
    explorer.samples.value = "s0/1"
    assert "not at hand" in explorer.pictures.value


def test_another_run_keeps_the_levels_it_has(data):
    explorer = controls.AcceptanceExplorer(data, levels=("L4", "L5F"))
    explorer.run.value = "other"
    assert explorer.selection.levels == ("L4",)
    assert len(explorer.figure.data) == 2
    explorer.levels.value = ()
    assert explorer.selection.levels == ("L4",)  # an empty choice keeps what was shown


def test_survival_is_drawn_on_request(data):
    explorer = controls.AcceptanceExplorer(data)
    explorer.curve.value = "survival"
    assert "survival" in explorer.figure.layout.title.text
    drawn = list(explorer.figure.data[1].y)
    assert drawn == explorers.curve(data,
                                    explorer.selection).query("level == 'L1'")["survival"].tolist()


def test_a_lower_threshold_never_lowers_a_curve(data):
    explorer = controls.AcceptanceExplorer(data)
    explorer.rule.value = "cosine"
    before = [y for trace in explorer.figure.data[1::2] for y in trace.y]
    explorer.tau.value = 0.5
    after = [y for trace in explorer.figure.data[1::2] for y in trace.y]
    assert before != after
    assert all(new >= old for new, old in zip(after, before, strict=True))


def test_the_list_is_searched_filtered_and_paged(data, monkeypatch):
    monkeypatch.setattr(explorers, "PAGE", 10)
    explorer = controls.AcceptanceExplorer(data)
    assert len(explorer.samples.options) == 10 and explorer.page.max == 3
    shown = explorer.selection.sample
    explorer.page.value = 3
    assert len(explorer.samples.options) == 4
    assert explorer.selection.sample == shown and explorer.samples.value is None
    explorer.search.value = "S5/"
    assert {name.split("/")[0] for _, name in explorer.samples.options} == {"s5"}
    assert explorer.page.max == 1 and explorer.selection.sample.startswith("s5/")
    explorer.search.value = "s5/ nowhere"
    assert explorer.samples.options == () and "0 samples" in explorer.found.value
    explorer.search.value = ""
    explorer.rejected.value = True
    assert all(label.startswith("✗") for label, _ in explorer.samples.options)
    explorer.listed.value = "L4"
    names = explorers.samples_at(data, explorer.selection)["sample"]
    own = data.tokens.query("run == 'demo' and level == 'L4' and position == 0 and not match")
    assert set(names) == set(own["sample"])


def test_only_a_kind_of_word_is_listed_where_kinds_are_known(data):
    kinds = ["place" if at % 2 else "colour" for at in data.tokens["position"]]
    known = explorers.ExplorerData(data.tokens.assign(kind=kinds))
    chosen = explorers.Selection("demo", ("L1",), kind="place", position=3)
    assert len(explorers.samples_at(known, chosen)) == 24
    assert explorers.samples_at(known, replace(chosen, position=2)).empty


def test_only_what_changed_is_drawn_again(data, monkeypatch):
    explorer = controls.AcceptanceExplorer(data)
    drawn = []
    for name in ("curve", "strips", "pictures", "samples_at"):
        own = getattr(explorers, name)
        monkeypatch.setattr(explorers, name, lambda *given, own=own, name=name:
                            (drawn.append(name), own(*given))[1])
    explorer.samples.value = explorer.samples.options[3][1]
    assert drawn == ["strips", "pictures"]
    drawn.clear()
    explorer.curve.value = "survival"
    assert drawn == ["curve"]


def test_a_card_says_why_a_draft_was_rejected(data):
    row = data.tokens[~data.tokens["match"]].iloc[0]
    at = pd.DataFrame({"position": [row["position"]], "rank": [2], "margin": [1.25],
                       "certainty": [0.5], "draft_probabilities": [[0.5, 0.3]],
                       "verifier_probabilities": [[0.9, 0.1]], "draft_texts": [["<b>", "x"]],
                       "verifier_texts": [["y", "z"]]})
    known = explorers.ExplorerData(data.tokens, why=lambda run, level, key: at)
    chosen = explorers.Selection("demo", (row["level"],), position=row["position"],
                                 sample=row["sample"])
    page = explorers.reasons(known, chosen)
    assert "choice 3 of the draft, 1.25 nats behind its best" in page and "50.0%" in page
    assert "&lt;b&gt;" in page and "<b>x" not in page
    assert "not at hand" in explorers.reasons(data, chosen)


def test_a_live_answer_is_stepped_round_by_round():
    runs, asked = live_runs(), []
    explorer = controls.LiveExplorer(
        {"a": "a · <i>", "b": "b"}, ["speculative", "baseline"],
        lambda key, arm: (asked.append((key, arm)), runs[arm])[1], lambda token: WORDS[token],
        sample={"a": sample()}.get,
        why=lambda arm, key, position: {
            "position": position, "rank": 1, "margin": 0.5, "certainty": 1.0,
            "draft_texts": ["x"], "draft_probabilities": [0.6], "verifier_texts": ["y"],
            "verifier_probabilities": [0.7]})
    assert explorer.round.max == 2 and "round 0 of 2" in explorer.shown.value
    assert "choice 2 of the draft, 0.50 nats" in explorer.shown.value
    assert explorer.pictures.value.count("<img") == 13
    explorer.round.value = 1
    assert "4 of 5 accepted" in explorer.shown.value and "verify 60.0 ms" in explorer.shown.value
    assert explorer.shown.value.count("token verifier") == 5 + 2  # said already, and the choices
    explorer.arm.value = "baseline"
    assert explorer.round.max == 0 and "drafts nothing" in explorer.shown.value
    explorer.arm.value, explorer.sample.value = "speculative", "b"
    assert asked == [("a", "speculative"), ("a", "baseline"), ("b", "speculative")]
    assert explorer.pictures.value == ""
