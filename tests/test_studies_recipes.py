"""The study on a random-weight pair of the real classes: it resumes, judges all rows on the same
positions, its intervals are paired."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
import train_examples
from tiny_pair import make_tiny_pair

from studies import figures
from studies.parameters import StudyParameters
from studies.recipes import grid as study_recipes
from studies.recipes import measure as study_measure
from studies.recipes import study
from studies.recipes.grid import Job
from xsd.adapters import linear
from xsd.core import Batch, MetricError, ParameterError
from xsd.evaluate import rounds
from xsd.evaluate import table as token_table
from xsd.runs import folder, parameters, typed
from xsd.steps import extraction, training
from xsd.train import source

LONGER = {"profile": "converged", "epochs": 300, "patience": 50}
OPTIONS = {"n_resamples": 100, "seed": 0}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    pair = make_tiny_pair(place / "pair", seed=4)
    run = str(place / "run")
    sizes = {
        "n_train_sequences": 4, "n_test_sequences": 2, "questions_per_sequence": 4,
        "max_new_tokens": 8, "workers": 1
    }
    modes = {"test_data": ["simulated"], "test_modes": ["teacher_forced"]}
    extraction.run(
        parameters.ExtractParameters.checked({"run_dir": run, "pair": str(pair), **sizes, **modes}))
    return StudyParameters.checked(
        {"run_dir": run, "levels": ["L1", "B1"], "max_epochs": 1, "resamples": 50})


@pytest.fixture(scope="module")
def found(given):
    return study.run(given)


def counts(sequences, accepted, rounds):
    return pd.DataFrame({"sequence": sequences, "accepted": accepted, "rounds": rounds})


# --- the whole study
# ------------------------------------------------------------------------------------------------


def test_every_level_recipe_and_floor_has_a_row_judged_on_the_same_positions(given, found):
    rows = {(one["level"], one["recipe"]): one for one in found["rows"]}
    assert {("L1", "reference"), ("L1", "best"), ("B1", "best"), ("ridge", "closed form"),
            ("4-gram", "no adapter")} <= set(rows)
    assert len(rows) == 4 + len(study_recipes.FLOORS) + 2
    assert {one["token_acceptance"]["n"]
            for one in rows.values()} == {rows["L1", "best"]["cosine"]["n"]}
    assert all(
        len(one["accepted_per_round"]["seeds"]) == 1 + (one["recipe"] in study_recipes.RECIPES)
        for one in rows.values())
    assert all(0 <= one["accepted_per_round"]["value"] <= given.gamma for one in rows.values())
    assert rows["B1", "reference"]["steps"] == 1 and rows["B1", "reference"]["epochs"] == 1
    assert [one["sequences"] for one in found["curve"]] == [2, 2, 4, 4]


def test_tables_are_written_and_hold_the_same_figures(given, found):
    tables = folder.resolve(given.run_dir) / "tables"
    stored = pd.read_csv(tables / "study.csv")
    assert stored["accepted_per_round"].tolist() == pytest.approx(
        study.table(found)["accepted_per_round"].tolist())
    assert (tables / "study.md").read_text().startswith("| level | recipe |") and "toprule" in (
        tables / "study.tex").read_text()
    assert list(study.times(found)["level"]) == ["L1", "B1"] and set(
        study.times(found)["best against"]) == {"reference"}
    shown = study.reading(found)
    assert "[" in shown["accepted_per_round"].iloc[0] and set(
        shown[shown["recipe"] == "no adapter"]["parameters"]) == {"–"}
    assert all(value.isdigit() for value in shown[shown["recipe"] == "best"]["parameters"])


def test_a_second_call_does_only_what_is_missing(given, found):
    place = folder.resolve(given.run_dir) / "study"
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    gone = place / Job("L1", "best", 1).place / "results.json"
    wanted = json.loads(gone.read_text())["counts"]
    gone.unlink()
    done = []
    again = study.run(given, progress=lambda job, record: done.append(job))
    assert json.loads(gone.read_text())["counts"] == wanted
    after = {
        path: path.stat().st_mtime_ns for path in place.rglob("*")
        if path.is_file() and path.parent != gone.parent
    }
    assert after == {path: time for path, time in before.items() if path.parent != gone.parent}
    assert study.table(again).drop(columns="seconds").equals(
        study.table(found).drop(columns="seconds")) and len(set(done)) == len(done)


def test_two_workers_find_what_one_finds(given, found, tmp_path):
    for name in ("shards", "results"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(folder.resolve(given.run_dir) / name)
    own = given.model_copy(
        update={
            "run_dir": str(tmp_path / "run"), "workers": 2, "levels": ["L1"], "recipes": ["best"],
            "shares": []
        })
    two = study.table(study.run(own)).set_index(["level", "recipe"])["accepted_per_round"]
    one = study.table(found).set_index(["level", "recipe"])["accepted_per_round"]
    assert two.tolist() == pytest.approx(one[two.index].tolist(), abs=1e-6)


def test_a_study_of_other_data_is_not_mixed_in(given, found):
    stored = folder.resolve(given.run_dir) / "study" / Job("L1", "best", 0).place / "results.json"
    wanted = json.loads(stored.read_text())
    stored.write_text(
        json.dumps({
            **wanted, "identity": {**wanted["identity"], "data": {"train": "other"}}, "counts": {}
        }))
    table = study.table(study.run(given))
    assert json.loads(stored.read_text())["counts"] == wanted["counts"] and len(table) == len(
        study.table(found))


# --- measuring
# ------------------------------------------------------------------------------------------------


def batches(n=20):
    states = source.open_states(train_examples.answers(n))
    return list(states.batches(torch.arange(len(states)), 7))


def counted(adapter, some, gamma):
    tokens = token_table.of_batches({"": adapter}, some, train_examples.head(), gamma=gamma)
    return study_measure.counts(tokens, gamma, 0.9)


@pytest.mark.parametrize("reads", ["drafter", "verifier", "both"])
def test_counts_are_those_of_the_metrics_of_one_step_and_of_the_rollout(reads):
    some = batches()
    adapter, head = linear.fit_linear("ridge", some, reads=reads), train_examples.head()
    table = counted(adapter, some, 3)
    found = token_table.of_batches({"": adapter}, some, head, gamma=3)
    _, (runs,), inside = token_table.answers(token_table.drafted(found), "accepted")
    rolled = rounds.walk(runs, inside.sum(axis=1), 3)
    assert table["accepted"].sum() == rolled.accepted.sum()
    assert table["rounds"].sum() == len(rolled.accepted)
    assert table["positions"].sum() == sum(int(one.mask[:, 1:].sum()) for one in some)
    hits = 0
    for one in some:
        aligned, _, ids, mask = adapter.align(one)
        right = (aligned @ head.T).argmax(-1) == ids
        hits += int((right & mask)[:, 1 - adapter.shift:].sum())
    assert table["matched"].sum() == hits
    assert ((table["cosine"] <= table["positions"] + 1e-6) &
            (table["above"] <= table["positions"])).all()


def test_with_one_drafted_token_a_round_the_rollout_is_the_one_step_acceptance():
    some = batches()
    adapter = linear.fit_linear("ridge", some, reads="drafter")
    table = counted(adapter, some, 1)
    walked = rounds.from_matches([[True, True, False]], 1)
    assert walked.accepted.tolist() == [1, 0]  # a round at gamma 1: a draft, then the bonus token
    assert (table["rounds"] <= table["positions"]).all() and (table["accepted"]
                                                              <= table["matched"]).all()


def test_answers_of_one_token_alone_are_refused():
    one = batches()[0]
    short = Batch(one.drafter[:, :1], one.verifier[:, :1], one.ids_by_drafter[:, :1],
                  one.ids_by_verifier[:, :1], one.mask[:, :1], one.sequence, one.index, one.mode,
                  )
    adapter = linear.fit_linear("ridge", [one])
    with pytest.raises(MetricError, match="no held-out answer has a second token"):
        counted(adapter, [short], 3)


def test_seeds_are_averaged_sample_by_sample_and_their_range_is_kept():
    sequences = ["a", "a", "b", "c"]
    first, second = counts(sequences, [1, 2, 3, 4],
                           [2, 2, 2, 2]), counts(sequences, [3, 4, 5, 6], [2, 2, 2, 2])
    found = study_measure.figures([first, second], **OPTIONS)["accepted_per_round"]
    assert found["value"] == pytest.approx(28 / 16) and found["seeds"] == [10 / 8, 18 / 8]
    assert found["n_clusters"] == 3 and found["low"] <= found["value"] <= found["high"]


def test_the_same_recipe_is_once_itself_and_a_multiple_is_found_without_width():
    sequences = [f"s{i % 5}" for i in range(20)]
    accepted = np.arange(1, 21)
    one, twice = counts(sequences, accepted, np.full(20, 4)), counts(sequences, 2 * accepted,
                                                                     np.full(20, 4))
    same, double = study_measure.times([one], [one], **OPTIONS), study_measure.times([twice], [one],
                                                                                     **OPTIONS)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    assert (double.value, double.low, double.high) == (2, 2, 2)


def test_a_recipe_that_accepts_nothing_gives_no_finite_ratio():
    one, none = counts(["a", "b"], [2, 2], [1, 1]), counts(["a", "b"], [0, 0], [1, 1])
    assert not np.isfinite(study_measure.times([one], [none], **OPTIONS).value)


def test_rows_of_other_samples_are_refused():
    one, other = counts(["a", "b"], [1, 1], [1, 1]), counts(["a", "c"], [1, 1], [1, 1])
    with pytest.raises(
            MetricError,
            match="the seeds of one row were measured on other samples; delete the study's folder"):
        study_measure.averaged([one, other])
    with pytest.raises(MetricError, match="two rows of the study were measured on other samples"):
        study_measure.times([one], [other], **OPTIONS)


# --- recipes
# ------------------------------------------------------------------------------------------------


def test_the_reference_recipe_is_the_references():
    documented, fair, longer = (study_recipes.config_of(name, "L4")
                                for name in ("documented", "reference", "converged"))
    assert (documented.objective, documented.epochs, documented.batch_size,
            documented.learning_rate) == ("mse_cosine", 50, 64, 1e-3)
    assert (documented.patience, documented.clip, documented.weight_decay,
            documented.select_by) == (10, 1.0, 0.01, "loss")
    assert documented.warm_start == "none" and documented == dataclasses.replace(
        fair, batch_size=64)
    assert (longer.epochs, longer.patience) == (300, 50) and longer == dataclasses.replace(
        documented, **LONGER)


def test_the_best_recipe_never_has_more_epochs_or_steps_than_the_references():
    for level in typed.LEVELS:
        best, fair = (study_recipes.config_of(name, level) for name in ("best", "reference"))
        assert best.epochs <= fair.epochs
        assert best.epochs / best.batch_size <= fair.epochs / fair.batch_size


def test_less_data_gets_more_epochs_and_the_limit_holds():
    whole, quarter = (study_recipes.config_of("best", "L1", share=share) for share in (1, 0.25))
    assert (quarter.epochs, quarter.patience) == (4 * whole.epochs, 4 * whole.patience)
    assert study_recipes.config_of("best", "L1", share=0.25, max_epochs=3).epochs == 3


def test_an_unknown_recipe_is_named():
    with pytest.raises(
            ParameterError,
            match="unknown recipe 'better'; choose one of documented, reference, converged, best"):
        study_recipes.config_of("better", "L1")


@pytest.mark.parametrize("level", ["L1", "L4", "L5F", "B1"])
def test_notebook_02_trains_a_level_as_the_best_recipe_of_the_study_does(level):
    given = parameters.TrainParameters.checked({"recipe": "best", "epochs": 10})
    assert training.config_of(given, level) == study_recipes.config_of("best", level)


def test_an_objective_given_by_hand_goes_before_the_best_recipe():
    given = parameters.TrainParameters.checked({"recipe": "best", "objective": "kl"})
    assert training.config_of(given, "L1").objective == "kl"


def test_a_larger_share_holds_the_smaller_one():
    names = [f"s{i:02d}" for i in range(20) for _ in range(3)]
    parts = [set(study_recipes.sequences_of(names, share)) for share in (0.01, 0.1, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [2, 2, 5, 10, 20]
    assert all(small <= large for small, large in itertools.pairwise(parts))


def test_a_point_that_table_and_curve_share_is_trained_once():
    jobs = study_recipes.jobs(["L1", "L4"], ["best"], [0, 1], budget_levels=["L1"],
                              shares=[0.5, 1.0], curve=["ridge", "L1"])
    assert len(jobs) == len(set(jobs)) == 2 * 2 + 2 * 2 + len(study_recipes.FLOORS) + 2 + 1
    assert {job.recipe for job in jobs if job.level == "L4"} == {"best"}
    assert len({job.place for job in jobs}) == len(jobs) and jobs[0].recipe == "converged"


# --- pictures
# ------------------------------------------------------------------------------------------------


def test_the_picture_holds_every_row_at_its_level(found):
    table = study.table(found)
    figure = figures.accepted_by_recipe(table, gamma=5)
    drawn = {(data[0], trace.name): x for trace in figure.data
             for x, data in zip(trace.x, trace.customdata, strict=True)}
    assert drawn == {(one.level, one.recipe): one.accepted_per_round for one in table.itertuples()}
    for trace in figure.data:
        levels = [figure.layout.yaxis.ticktext[round(y)] for y in trace.y]
        assert levels == [data[0] for data in trace.customdata]


def test_the_learning_curve_runs_from_few_drives_to_many(found):
    figure = figures.learning_curve(study.curve(found))
    assert {trace.name
            for trace in figure.data} == {"ridge", "L1"} and figure.layout.xaxis.type == "log"
    assert all(list(trace.x) == [2, 4] for trace in figure.data)
