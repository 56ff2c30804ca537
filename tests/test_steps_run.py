"""The steps of the main job, one after the other, on a random-weight pair of the real classes."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_pair import make_tiny_pair

from xsd.core import ParameterError
from xsd.evaluate import table as token_table
from xsd.evaluate.acceptance import rounds_from_lists
from xsd.models import loading
from xsd.runs import demo_page, folder, parameters, report
from xsd.steps import acceptance, drafts, evaluation, extraction, training, words
from xsd.train import rollout
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


@pytest.fixture(scope="module")
def found(run_dir):
    hidden = evaluation.hidden(
        parameters.HiddenParameters.checked({"run_dir": run_dir, "levels": LEVELS,
                                             "resamples": 50}))
    tokens = acceptance.tokens(
        parameters.TokenParameters.checked({"run_dir": run_dir, "levels": LEVELS, "resamples": 50}))
    return hidden, tokens


def held_out_and_adapters(run_dir):
    return evaluation.held_out(run_dir, "simulated",
                               "teacher_forced"), training.load(run_dir, LEVELS)


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


def test_a_loop_of_the_levels_that_feed_on_themselves_is_their_self_rollout(run_dir):
    held_out, adapters = held_out_and_adapters(run_dir)
    for level in ("L5F", "B1"):
        for gamma in (1, 3, 5):
            own = drafts.drafts_of(adapters[level], held_out, gamma=gamma, batch_size=5)
            rolled = rollout.self_rollout(adapters[level], held_out.batches(5), held_out.head,
                                          gamma=gamma).rounds()
            for match, accepted in zip(own.match, rolled, strict=True):
                assert (rounds_from_lists([match], gamma).accepted.tolist()
                        if len(match) else []) == accepted


def test_a_missing_training_is_made_on_the_data_of_the_run(run_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(extraction, "ensure",
                        lambda run_dir, seed, **options: asked.append(options.get("data")))
    monkeypatch.setattr(training, "ensure",
                        lambda run_dir, seed, levels, **options: asked.append(options.get("data")))
    evaluation.pairs_and_adapters(
        parameters.TokenParameters.checked(
            {"run_dir": run_dir, "levels": LEVELS, "data": "own/drives"}))
    evaluation.pairs_and_adapters(
        parameters.HiddenParameters.checked({"run_dir": run_dir, "levels": LEVELS}))
    assert asked == ["own/drives", "own/drives", None, "simulated"]


def test_answers_of_a_single_token_have_no_draft(run_dir, monkeypatch):
    held_out, adapters = held_out_and_adapters(run_dir)
    whole = next(iter(held_out.batches(4)))
    cut = {
        name: getattr(whole, name)[:, :1]
        for name in ("drafter", "verifier", "ids_by_drafter", "ids_by_verifier", "mask")
    }
    batch = dataclasses.replace(whole, **cut)
    for adapter in adapters.values():
        assert drafts.loop_states(adapter, batch, held_out.head, 5).shape == batch.verifier.shape
        found = drafts.Drafts([], [], [], [])
        with torch.no_grad():
            drafts._collect(found, drafts.loop_states(adapter, batch, held_out.head, 5), batch,
                            held_out.head)
        assert [len(one) for one in found.match] == [0] * 4
    monkeypatch.setattr(extraction, "answers", lambda dataset: [[5]] * len(dataset))
    with pytest.raises(ParameterError,
                       match="every answer held out of simulated is a single token"):
        acceptance.tokens(
            parameters.TokenParameters.checked(
                {"run_dir": run_dir, "levels": LEVELS, "resamples": 50}))


def test_a_loop_of_the_others_is_one_step_after_the_verified_prefix(run_dir):
    held_out, adapters = held_out_and_adapters(run_dir)
    own = drafts.drafts_of(adapters["L4"], held_out, gamma=5, batch_size=64)
    batch = next(held_out.batches(64))
    with torch.no_grad():
        said = (adapters["L4"].align(batch).aligned @ held_out.head.T).argmax(-1)
    for row, ids in enumerate(own.ids):
        np.testing.assert_array_equal(ids, said[row][batch.mask[row]][1:])
        assert np.all((own.probability[row] > 0) & (own.probability[row] <= 1))


def test_every_row_of_the_token_results_is_measured_on_the_same_tokens(found):
    for here in found[1].results["test"].values():
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


def test_the_recordings_intervals_draw_clips(found):
    here = found[1].results["test"]
    assert (here["davis_road"]["cluster"], here["davis_road"]["n_clusters"]) == ("clip", 3)
    assert (here["simulated"]["cluster"], here["simulated"]["n_clusters"]) == ("sequence", 2)


def test_the_token_table_is_one_that_the_views_read(found, run_dir):
    table = folder.load_tokens(run_dir)
    token_table.check(table)
    assert set(table["level"]) == {*LEVELS, "drafter_tokens"} and set(
        table["data"]) == {"simulated", "davis_road"}
    l4 = table[(table["level"] == "L4") & (table["data"] == "simulated")]
    here = found[1].results["test"]["simulated"]["rows"]["L4"]["token_acceptance"]
    assert l4["match"].mean() == pytest.approx(here["value"]) and len(l4) == here["n"]
    assert l4.groupby("sample")["position"].apply(lambda at: list(at) == list(range(len(at)))).all()


def test_hidden_results_hold_every_level_with_its_interval(found):
    hidden = found[0]
    levels = hidden.results["test"]["simulated"]["levels"]
    assert list(levels) == LEVELS
    assert all(one["cosine"]["low"] <= one["cosine"]["value"] <= one["cosine"]["high"]
               for one in levels.values())
    curve = hidden.by_position("simulated", 0.9, 5, 50)
    assert curve.groupby("level")["position"].min().to_dict() == {
        "L1": 0, "L4": 0, "L5F": 1, "B1": 1
    }
    histogram = hidden.cosine_histogram("simulated", bins=10)
    assert histogram.groupby("level")["share"].sum().round(6).eq(1).all()


def test_the_demo_page_reads_these_results(found, run_dir):
    results = folder.load_results(run_dir)
    page = report.render(demo_page.template(), results, **demo_page.parts(run_dir, results))
    assert "best floor" in page[:page.index("<nav>")]
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:2] == ["What was done", "How many draft tokens are accepted"]


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
    kinds = words.token_kinds(pieces)
    assert kinds[1:4] == ["colour", "object", "object"] and kinds[5:8] == ["motion"] * 3
    assert kinds[10:14] == ["ego motion"
                            ] * 4 and kinds[-1] == "end" and kinds[0] == kinds[8] == "function"


def test_kinds_of_words_are_drawn_with_their_intervals(found):
    by_kind = found[1].by_kind
    figure = figures.acceptance_by_kind(by_kind[by_kind["data"] == "simulated"])
    assert [trace.name for trace in figure.data] == sorted([*LEVELS, "drafter_tokens"])
    assert by_kind.groupby(["data", "level"])["n"].sum().groupby("data").nunique().eq(1).all()


def test_intervals_are_written_beside_their_value():
    frame = pd.DataFrame(
        {"a": [0.5, 0.25], "a low": [0.4, np.nan], "a high": [0.6, np.nan], "n": [3, 4]})
    assert evaluation.with_intervals(
        frame, percent=("a",))["a"].tolist() == ["50.0 % [40.0, 60.0]", "25.0 % [–]"]
    assert evaluation.with_intervals(frame)["a"].tolist() == ["0.50 [0.40, 0.60]", "0.25 [–]"]


def test_a_late_notebook_makes_what_an_empty_run_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "EMBEDDED", make_tiny_pair(tmp_path / "pair", seed=4))
    run = str(tmp_path / "empty")
    given = {"run_dir": run, "levels": ["L1"], "test_data": ["davis_road"], "resamples": 50}
    found = acceptance.tokens(parameters.TokenParameters.checked(given))
    assert list(found.results["test"]) == ["davis_road"] and set(
        folder.load_results(run)) == {"extract", "train", "tokens"}
    with pytest.raises(ParameterError, match=r"no teacher_forced pairs of test simulated"):
        evaluation.hidden(
            parameters.HiddenParameters.checked(
                {"run_dir": run, "levels": ["L1"], "test_data": ["simulated"]}))
