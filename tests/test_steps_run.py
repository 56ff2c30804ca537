"""The steps of the main job, one after the other, on a random-weight pair of the real classes."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
from tiny_pair import make_tiny_pair

from xsd.core import ParameterError
from xsd.evaluate import curves, metrics, table, tables
from xsd.models import loading
from xsd.runs import demo_page, folder, parameters, report
from xsd.steps import evaluation, extraction, ready, training
from xsd.views import figures

LEVELS = ["L1", "L4", "L5F", "B1"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp("steps")
    pair = make_tiny_pair(place / "pair", seed=4)
    sizes = {
        "n_train_sequences": 3, "n_test_sequences": 2, "questions_per_sequence": 6,
        "max_new_tokens": 12, "workers": 1
    }
    run = str(place / "run")
    extraction.run(
        parameters.ExtractParameters.checked({"run_dir": run, "pair": str(pair), **sizes}))
    training.run(parameters.TrainParameters.checked({"run_dir": run, "levels": LEVELS,
                                                     "epochs": 2}))
    return run


@dataclasses.dataclass
class Found:
    """What notebooks 03 and 04 hold of the run."""

    adapters: dict
    pairs: dict
    states: dict
    hidden: dict
    tokens: dict


@pytest.fixture(scope="module")
def found(run_dir):
    given = parameters.HiddenParameters.checked({"run_dir": run_dir, "levels": LEVELS})
    adapters = training.load(run_dir, LEVELS)
    pairs = evaluation.held_out_sets(run_dir, given.test_data, given.mode)
    states = {name: table.measure(adapters, one, gamma=None) for name, one in pairs.items()}
    figures_of = {name: metrics.state_figures(one, thresholds=given.thresholds, n_resamples=50)
                  for name, one in states.items()}
    results = evaluation.hidden(figures_of, adapters, pairs, threshold=0.9)
    evaluation.save(run_dir, "hidden", results, pairs, given.model_dump(), figures_of)
    tokens = ready.token_table(
        parameters.TokenParameters.checked({"run_dir": run_dir, "levels": LEVELS, "resamples": 50}))
    return Found(adapters, pairs, states, results, tokens)


def test_the_results_say_what_was_extracted(run_dir):
    results = folder.load_results(run_dir)["extract"]
    assert results["train"]["pairs"] == 18 and results["train"]["sequences"] == 3
    assert results["test"]["simulated"]["pairs"] == 12 and results["test"]["davis_road"][
        "pairs"] == 18
    assert 0 <= results["duplicate_rate"] <= 1 and len(results["data_hash"]) == 64
    about = extraction.pair_file(run_dir)
    assert len(about["prompt_ids"]) == 10 and about["token_texts"][2] == "</s>"


def test_a_finished_run_is_found_again(run_dir):
    place = extraction.shard_folder(run_dir, "train", "simulated", "teacher_forced")
    before = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    given = json.loads(
        json.dumps(folder.load_results(run_dir)["extract"]["provenance"]["parameters"]))
    own = {"run_dir": str(run_dir), "pair": extraction.pair_file(run_dir)
                                            ["pair"]}  # records name folders without their place
    extraction.run(parameters.ExtractParameters.checked({**given, **own}))
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == before
    again = training.run(
        parameters.TrainParameters.checked({"run_dir": run_dir, "levels": LEVELS, "epochs": 2}))
    assert [one["epochs"] for one in again["levels"].values()] == [2, 2, 2, 2]


def test_token_ids_are_read_without_states(found, monkeypatch):
    own = evaluation.held_out(found.pairs["simulated"].dataset.folder.parents[2], "simulated")
    monkeypatch.setattr(type(own.dataset), "batches",
                        lambda *_, **__: pytest.fail("a state was read"))
    monkeypatch.setattr(type(own.dataset), "__getitem__",
                        lambda *_: pytest.fail("a state was read"))
    assert [len(ids) for ids in own.answers] == own.samples["n_tokens_verifier"].tolist()
    assert [len(ids) for ids in own.ids_by_drafter] == own.samples["n_tokens_drafter"].tolist()
    assert len(own.prompts) == len(own) == 12
    assert own.reference(0, 1) == tuple(own.answers[0][:1])
    whole = own.answers[0][-1] in own.eos
    assert (own.reference(0, 10_000) is None) != whole


def test_answers_of_a_single_token_have_no_draft(found):
    class Short:
        name, answers, clusters, prompts = "simulated", [[5]] * 3, ["a", "b", "c"], [[1]] * 3

    with pytest.raises(ParameterError,
                       match="every answer held out of simulated is a single token"):
        evaluation.floor_rows(Short(), [[5]], 5)


def lengths_of(tokens):
    """Mean number of characters of a draft's text: a user's metric column."""
    return tokens["draft_token"].astype(str).str.len()


def test_a_users_own_column_joins_the_table(found):
    own = {"columns": ["test_steps_run:lengths_of", twice_the_position]}
    tokens = table.measure({"L1": found.adapters["L1"]}, found.pairs["simulated"], gamma=5, **own)
    assert tokens["lengths_of"].tolist() == [len(text) for text in tokens["draft_token"]]
    assert tokens["twice_the_position"].equals(tokens["position"] * 2)


def twice_the_position(tokens):
    return tokens["position"] * 2


def test_every_row_of_the_token_results_is_measured_on_the_same_tokens(found):
    for here in found.tokens["test"].values():
        rows = here["rows"]
        assert set(rows) == {*LEVELS, "drafter_tokens", "position_mode", "ngram", "prompt_lookup"}
        assert len({row["token_acceptance"]["n"] for row in rows.values()}) == 1
        assert rows["B1"]["kind"] == "ceiling" and rows["L4"]["kind"] == "adapter" and rows[
            "drafter_tokens"]["kind"] == "drafter"
        best = rows[here["best_floor"]]
        assert best["above_floor"]["value"] == 0 and best["kind"] in ("floor", "drafter")
        for row in rows.values():
            expected = row["accepted_per_round"]["value"] - best["accepted_per_round"]["value"]
            assert row["above_floor"]["value"] == pytest.approx(expected)
        assert here["best_adapter"] in ("L1", "L4", "L5F")


def bounds_of(node):
    """Every bound in nested results, lists of bounds included."""
    if not isinstance(node, dict):
        return set()
    own = {one for name in node if name in ("low", "high") or name.endswith(("_low", "_high"))
           if not name.startswith("cosine_")
           for one in (node[name] if isinstance(node[name], list) else [node[name]])}
    return own.union(*map(bounds_of, node.values()))


def test_a_set_of_one_sequence_has_values_but_no_interval(found, run_dir):
    stored = folder.load_results(run_dir)
    for name in ("hidden", "tokens"):
        here = stored[name]["test"]
        assert (here["davis_road"]["n_clusters"], here["simulated"]["n_clusters"]) == (1, 2)
        assert bounds_of(here["davis_road"]) == {None}
        assert None not in bounds_of(here["simulated"])
    shown = tables.with_intervals(evaluation.acceptance_table(found.tokens["test"]["davis_road"]))
    assert shown["token_acceptance"].str.fullmatch(r"0\.\d\d \[–\]").all()


def test_the_token_table_is_one_that_the_views_read(found, run_dir):
    tokens = table.check(folder.load_tokens(run_dir), "cosine", "match", "draft_token", "kind")
    assert set(tokens["level"]) == {*LEVELS, "drafter_tokens"}
    assert set(tokens["data"]) == {"simulated", "davis_road"}
    l4 = tokens[(tokens["level"] == "L4") & (tokens["data"] == "simulated")]
    here = found.tokens["test"]["simulated"]["rows"]["L4"]["token_acceptance"]
    assert l4["match"].mean() == pytest.approx(here["value"]) and len(l4) == here["n"]
    assert l4.groupby("sample")["position"].apply(lambda at: list(at) == list(range(len(at)))).all()


def test_the_table_names_each_sample_and_token_as_they_are_stored(found):
    own = found.pairs["simulated"]
    tokens = table.measure({"L1": found.adapters["L1"]}, own, gamma=5, batch_size=5, drafter=False,
                           kinds=evaluation.token_kinds)
    assert tokens["sample"].drop_duplicates().tolist() == own.keys
    parts = tokens.groupby("sample", sort=False)
    assert parts["verifier_id"].agg(list).tolist() == own.answers
    said = [[own.texts[token] for token in ids] for ids in own.answers]
    assert parts["verifier_token"].agg(list).tolist() == said
    assert parts["kind"].agg(list).tolist() == [evaluation.token_kinds(texts) for texts in said]
    assert parts["question"].first().tolist() == own.samples["question"].tolist()


def test_hidden_results_hold_every_level_with_its_interval(found, run_dir):
    levels = found.hidden["test"]["simulated"]["levels"]
    assert list(levels) == LEVELS
    assert all(one["cosine"]["low"] <= one["cosine"]["value"] <= one["cosine"]["high"]
               for one in levels.values())
    states = found.states["simulated"]
    curve = curves.by_position(states, 0.9, cosine="one_step_cosine", max_positions=5, resamples=50)
    first = {"L1": -1, "L4": -1, "L5F": 0, "B1": 0}
    assert curve.groupby("level")["position"].min().to_dict() == first
    histogram = curves.cosine_histogram(states, "one_step_cosine", bins=10)
    assert histogram.groupby("level")["share"].sum().round(6).eq(1).all()
    shown = evaluation.hidden_table(found.hidden["test"]["simulated"])
    assert shown["level"].tolist() == LEVELS and shown["accept"].between(0, 1).all()
    written = pd.read_csv(folder.resolve(run_dir) / "tables" / "hidden_simulated.csv")
    assert written["value"].notna().all() and set(written["level"]) == set(LEVELS)


def test_the_demo_page_reads_these_results(found, run_dir):
    results = folder.load_results(run_dir)
    page = report.render(demo_page.template(), results, **demo_page.parts(run_dir, results))
    assert "best floor" in page[:page.index("<nav>")]
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:3] == ["Words on this page", "What was done",
                          "How many draft tokens are accepted"]


def test_what_a_run_does_not_hold_is_named_with_what_it_holds(run_dir, tmp_path):
    with pytest.raises(ParameterError, match=r"holds no adapter L2 \(trained: L1, L4, B1, L5F\)"):
        training.load(run_dir, ["L2"])
    with pytest.raises(
            ParameterError, match=
            r"no free_running pairs of train simulated \(it holds: .*train_simulated/teacher_forced"
    ):
        extraction.open_pairs(run_dir, "train", "simulated", "free_running")
    with pytest.raises(ParameterError, match="holds no extraction; run notebook 01"):
        extraction.pair_file(tmp_path)


def test_a_token_has_the_kind_of_the_word_it_belongs_to():
    pieces = [
        " A", " red", " v", "an", " is", " coming", " towards", " us", ",", " and", " we", " are",
        " turning", " left", ".", "</s>"
    ]
    kinds = evaluation.token_kinds(pieces)
    assert kinds[1:4] == ["colour", "object", "object"] and kinds[5:8] == ["motion"] * 3
    assert kinds[10:14] == ["ego motion"
                            ] * 4 and kinds[-1] == "end" and kinds[0] == kinds[8] == "function"


def test_kinds_of_words_are_drawn_with_their_intervals(found, run_dir):
    tokens = folder.load_tokens(run_dir)
    by_kind = curves.by_kind(tokens[tokens["data"] == "simulated"], n_resamples=50)
    figure = figures.acceptance_by_kind(by_kind)
    assert [trace.name for trace in figure.data] == sorted([*LEVELS, "drafter_tokens"])
    assert by_kind.groupby("level")["n"].sum().nunique() == 1
    kept = found.tokens["words"]["simulated"]["L4"]
    own = by_kind[by_kind["level"] == "L4"].set_index("kind")
    assert {kind: one["value"] for kind, one in kept.items()} == own["value"].to_dict()


def test_intervals_are_written_beside_their_value():
    frame = pd.DataFrame(
        {"a": [0.5, 0.25], "a low": [0.4, np.nan], "a high": [0.6, np.nan], "n": [3, 4]})
    assert tables.with_intervals(
        frame, percent=("a",))["a"].tolist() == ["50.0 % [40.0, 60.0]", "25.0 % [–]"]
    assert tables.with_intervals(frame)["a"].tolist() == ["0.50 [0.40, 0.60]", "0.25 [–]"]


def test_a_late_notebook_makes_what_an_empty_run_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "EMBEDDED", make_tiny_pair(tmp_path / "pair", seed=4))
    run = str(tmp_path / "empty")
    given = {"run_dir": run, "levels": ["L1"], "test_data": ["davis_road"], "resamples": 50}
    found = ready.token_table(parameters.TokenParameters.checked(given))
    assert list(found["test"]) == ["davis_road"]
    assert set(folder.load_results(run)) == {"extract", "train", "tokens"}
    with pytest.raises(ParameterError, match=r"no teacher_forced pairs of test simulated"):
        evaluation.held_out_sets(run, ["simulated"], "teacher_forced")
