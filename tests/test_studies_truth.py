"""Step 13 on a random-weight pair of the real classes: what is asked, of whom, and what is
refused."""

import json
import shutil
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from tiny_pair import make_samples, make_tiny_pair

from studies.gap import counterfactual, full_report, truth, truth_figures
from studies.parameters import TruthParameters
from xsd.core import MetricError, ParameterError
from xsd.models import loading
from xsd.runs import doctor, exports, folder, notebooks, parameters
from xsd.steps import evaluation, extraction, judge, training

NOTEBOOK = notebooks.NOTEBOOK_FOLDER / "13_truth.ipynb"
LEVELS = ["L1", "L5F", "B1"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp("truth")
    pair, run = make_tiny_pair(place / "pair", seed=4), str(place / "run")
    sizes = {
        "n_train_sequences": 2, "n_test_sequences": 3, "questions_per_sequence": 3,
        "max_new_tokens": 10, "workers": 1
    }
    extraction.run(
        parameters.ExtractParameters.checked(
            {"run_dir": run, "pair": str(pair), "test_data": ["simulated"], **sizes}))
    training.run(parameters.TrainParameters.checked({"run_dir": run, "levels": LEVELS,
                                                     "epochs": 1}))
    return run


def run_notebook(run_dir, **values):
    """What the notebook's cells leave behind, run here with these parameters."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    names = {"__name__": "notebook_13"}
    exec(cells[0].source, names)
    names |= {"run_dir": run_dir, "levels": LEVELS, "waterfall": "L1", "resamples": 50, **values}
    for cell in cells[1:]:
        exec(cell.source, names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def run(run_dir):
    return run_notebook(run_dir)


@pytest.fixture(scope="module")
def found(run):
    return run.first


def test_every_arm_is_asked_about_the_same_tokens(found, run):
    n = sum(len(ids) - 1 for ids in run.pairs.answers)
    gap, arms = found["gap"], found["arms"]
    assert set(gap[gap["unit"] == "token_acceptance"]["n"]) == {n}
    assert set(arms[arms["unit"] == "token_acceptance"]["n"]) == {n}
    assert set(arms[arms["level"] == "L1"]["arm"]) == {
        "real events", "real events again", "blank events", "other scene", "text only"
    }
    assert set(arms[arms["level"] == "B1"]["arm"]) == {"real events"}  # it reads no drafter
    assert found["kinds"].groupby("loss")["n"].sum().eq(n).all()


def test_the_losses_lead_from_the_verifier_to_what_is_left(found):
    gap = found["gap"]
    own = gap[(gap["level"] == "L1") & (gap["unit"] == "token_acceptance")]
    names = own[own["metric"] == "loss"]["name"].tolist()
    assert names == ["capacity and objective", "modality", "rollout", "drift"]
    value = own.set_index("name")["value"]
    left = 1 - value["capacity and objective"] - value["modality"] - value["rollout"]
    assert left == pytest.approx(value["self-rollout"])
    # L1 conditions on tokens alone; only a tie may round the other way
    assert value["rollout"] == pytest.approx(0, abs=0.02)
    branch = gap[(gap["level"] == "L5F") & (gap["metric"] == "loss")]["name"].tolist()
    # it reads verifier states, which a free-running pair does not give it
    assert "drift" not in branch
    lengths = gap[(gap["level"] == "L1") & (gap["unit"] == "accepted_per_round") &
                  (gap["name"] == "verifier")]["value"].iloc[0]
    assert 1 < lengths <= 5


def test_a_free_running_answer_that_ended_early_drafts_nothing_there(found, run):
    free = run.arms["free-running"]
    rows = run.matches[run.names[0]].query("level == 'L1'")
    there = free[free["level"] == "L1"].set_index(["sample", "position"])["one_step_match"]
    keys = list(zip(rows["sample"].astype(str), rows["position"], strict=True))
    expected = [bool(there.get(key, False)) for key in keys]
    assert rows["free-running"].tolist() == expected
    assert run.matches[run.names[0]].query("level == 'L5F'")["free-running"].isna().all()


def test_the_same_arm_again_agrees_with_the_stored_states(found):
    again = found["arms"][found["arms"]["arm"] == "real events again"]
    assert again["difference"].abs().max() < 0.05  # stored in half precision
    checks = found["checks"].set_index("check")
    assert bool(checks["passed"].iloc[0]) and bool(checks["passed"].iloc[-1])
    assert checks.index[-1].startswith("A/A: L1")


def test_a_check_of_sequences_that_nobody_names_is_not_passed(run):
    unnamed = truth.checks(run.counts["simulated"], "L1", run.pairs, run.answers,
                           {"training": 0, "held_out": 3}, n_resamples=50, seed=0)
    assert unnamed["check"].iloc[0] == "held-out sequences that were trained on"
    assert unnamed[["value", "passed"]].iloc[0].isna().all()


def test_the_drafter_alone_is_the_loop_of_its_own_tokens_in_every_arm(found, run):
    blank = next(iter(run.shown["blank events"].batches(99)))
    real = next(iter(run.pairs.batches(99)))
    assert torch.equal(blank.ids_by_verifier, real.ids_by_verifier)
    assert torch.equal(blank.mask, real.mask) and not torch.equal(blank.drafter, real.drafter)
    assert float(blank.drafter[~blank.mask].abs().sum()) == 0
    row = found["arms"].query("level == 'drafter_tokens' and arm == 'blank events' and "
                              "unit == 'token_acceptance'")
    later = blank.mask.clone()
    later[:, 0] = False
    assert row["value"].iloc[0] == pytest.approx(
        float((blank.ids_by_drafter == blank.ids_by_verifier)[later].float().mean()))


def test_text_only_leaves_the_visual_tokens_out_and_the_model_as_it_was(tmp_path):
    pair = loading.load_pair(make_tiny_pair(tmp_path / "pair"))
    sample = make_samples(1)[0]
    blind, whole = counterfactual.without_pictures(
        pair.drafter), pair.drafter.prompt_embeddings(sample)
    before, after = pair.drafter.prompt_ids(sample.question)
    assert len(blind.prompt_embeddings(sample)) == len(before) + len(after) < len(whole)
    assert torch.equal(pair.drafter.prompt_embeddings(sample), whole)


def test_another_scene_is_never_the_own_one():
    clusters = ["a", "a", "b", "c", "c", "c"]
    chosen = counterfactual.donors(clusters)
    assert chosen == [2, 2, 3, 0, 1, 0] and all(clusters[i] != clusters[j]
                                                for i, j in enumerate(chosen))
    with pytest.raises(ParameterError, match="is of 'a' alone"):
        counterfactual.donors(["a", "a"])


def test_every_combination_of_phases_is_there_in_self_rollout(found):
    grid, plain = found["two_phase"], {"drafter tokens", "4-gram", "prompt lookup"}
    # L5F and B1 need states that are not there yet
    assert set(grid["phase1"]) == {"L1", *plain}
    assert set(grid["phase2"]) == {*LEVELS, *plain}
    # tokens per verification, the first phase's accepted drafts and the predicted speed-up
    assert len(grid) == 3 * 4 * 6 and grid["value"].ge(0).all()


def test_the_headline_stands_beside_what_could_have_been_detected(found):
    headline = found["headline"]
    assert len(headline) == 2 * len(LEVELS) and headline["detectable"].ge(0).all()
    apart = headline["acceptance"] - headline["floor"] - headline["above floor"]
    assert apart.abs().max() < 1e-9
    assert len(found["floors"]) == 2 * 4


def test_a_sequence_in_training_and_in_the_test_is_refused_from_the_manifests(run_dir, tmp_path):
    copied = tmp_path / "leaking"
    shutil.copytree(run_dir, copied)
    shutil.copytree(copied / "shards" / "test_simulated" / "teacher_forced",
                    copied / "shards" / "train_mixed" / "teacher_forced")
    with pytest.raises(MetricError, match="3 sequences are in training and in test"):
        evaluation.held_out_sets(copied, ["simulated"], "teacher_forced")
    for place in (copied / "shards").glob("train_*"):
        shutil.rmtree(place)
    with pytest.raises(MetricError, match="one side is empty"):
        evaluation.check_leakage(copied,
                                 [evaluation.held_out(copied, "simulated", "teacher_forced")])


def test_another_drafter_than_the_runs_own_is_refused(run_dir, tmp_path):
    copied = tmp_path / "other"
    shutil.copytree(run_dir, copied)
    results = folder.load_results(copied)["extract"]
    results["weights"]["drafter"] = "0" * 64
    folder.save_results(copied, "extract", results)
    pairs = evaluation.held_out(copied, "simulated")
    with pytest.raises(ParameterError, match="extracted with another drafter"):
        counterfactual.arms(copied, pairs, ["blank events"])
    assert list(counterfactual.arms(copied, pairs, [])) == ["real events"]


def test_a_run_that_shows_the_drafter_nothing_else_is_measured_and_reported(run_dir, tmp_path):
    copied = shutil.copytree(run_dir, tmp_path / "alone")
    alone = run_notebook(str(copied), drafter_sees=[])
    assert set(alone.first["arms"]["arm"]) == {"real events"}
    assert alone.first["arms"]["difference"].isna().all()
    assert not (set(alone.first["checks"]["check"].str[:3]) & {"A/A"})


def test_speed_ups_are_predicted_from_measured_costs_where_the_run_has_them(run, tmp_path):
    def timed(run_dir, **values):
        given = TruthParameters.checked(
            {"run_dir": str(run_dir), "levels": LEVELS, "waterfall": "L1", **values})
        return judge.timings(given.timing, run.adapters, run.pairs, run_dir=run_dir, gamma=5,
                                   gamma_prefill=10)

    folder.save_results(tmp_path, "train", {})
    with pytest.raises(ParameterError, match="holds no measured costs; run notebook 05"):
        timed(tmp_path, timing="measured")
    ms = {"verifier_prefill": 30.0, "drafter_prefill": 10.0, "drafter_step": 2.0, "adapter L1": 1.0,
          "adapter B1": 1.0, **{f"verify {n}": 9.0 + n for n in (1, 6, 10)}}
    costs = {name: {"ms": one} for name, one in ms.items()}
    folder.save_results(tmp_path, "live", {"costs": costs})
    found = timed(tmp_path, timing="measured")
    assert "L5F" not in found and {one.kind for one in found.values()} == {"measured"}
    assert found["L1"].overhead == pytest.approx((5 * 3 + 15) / 10 - 1)
    assert found["4-gram"].overhead == pytest.approx(15 / 10 - 1)
    own = timed(tmp_path, timing={"verify_ms": 5})
    tables = judge.speedups(run.loops["simulated"], own)
    assert set(tables["break_even"]["level"]) == {"any"} and len(tables["wall_clock"]) == 4
    assert set(tables["expected_speedup"]["level"]) == {*LEVELS, *own}


def test_the_waterfall_is_drawn_for_a_level_that_is_evaluated():
    for level, levels in (("B1", ["L1", "B1"]), ("L4", ["L1"])):
        with pytest.raises(ParameterError, match=r"one of the levels L1.* but B1"):
            TruthParameters.checked({"waterfall": level, "levels": levels})


def test_the_report_holds_sections_tables_and_figures(run, found, run_dir):
    place = folder.resolve(run_dir) / "report"
    text = (place / "report.txt").read_text()
    assert text.count("[8] Tokens") == len(LEVELS) and text.count("[1] Cosine") == len(LEVELS)
    assert "best floor" in text and "ESTIMATE" in text
    numbers = json.loads((place / "metrics.json").read_text())["test"]["simulated"]
    assert set(numbers["levels"]) == set(LEVELS) and numbers["gap"]
    assert numbers["above_floor"]["L1"]["n"] > 0
    stems = {path.stem for path in (place / "tables").glob("*.csv")}
    assert {f"{name}_simulated" for name in (
        "gap", "arms", "metrics", "two_phase", "expected_speedup", "wall_clock", "break_even",
    )} <= stems
    assert run.written["tables"] == 3 * len(stems) == len(list((place / "tables").glob("*_*.*")))
    gap = pd.read_csv(place / "tables" / "gap_simulated.csv")
    assert len(gap) == len(found["gap"])
    pages = {path.stem for path in (place / "figures").glob("*.html")}
    kinds = {
        "histogram", "by_position", "by_threshold", "survival", "reliability", "waterfall",
        "metrics_summary", "training_loss", "arms", "two_phase", "two_phase_speedup"
    }
    assert {f"{kind}_simulated" for kind in kinds} <= pages
    assert run.written["figures"] == len(pages)
    page = (place / "figures" / "waterfall_simulated.html").read_text()
    assert "Content-Security-Policy" in page and 'src="' not in page
    assert run.written["pictures"].startswith("not asked for")


def test_the_measured_block_of_a_page_is_written_between_its_marks(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{full_report.MARKS[0]}\nold\n{full_report.MARKS[1]}\nbelow\n")
    block = full_report.measured_block(run.P, run.results, run.found)
    full_report.update_page(page, block)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| L1 |" in text and "3 drives" in text and "| teacher-forced drafter |" in text
    full_report.update_page(page, block)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ParameterError, match=r"page\.md has no place for measured figures"):
        full_report.update_page(page, block)


def test_pictures_are_drawn_where_there_is_a_browser_and_named_where_there_is_none(
        tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "browser_path", lambda: None)
    assert exports.save_pictures({"a": go.Figure()}, tmp_path).startswith("none: no Chromium")
    monkeypatch.setattr(doctor, "browser_path", lambda: "chromium")

    def broken(*arguments, **options):
        raise RuntimeError("no display")

    monkeypatch.setattr(exports.pio, "write_images", broken)
    assert "RuntimeError: no display" in exports.save_pictures({"a": go.Figure()}, tmp_path)


def gap_rows(*values):
    names = [("level", "verifier"), ("loss", "modality"), ("level", "teacher-forced drafter"),
             ("level", "teacher-forced drafter"), ("loss", "drift"),
             ("level", "free-running")]
    rows = [{"metric": kind, "name": name, "value": v, "low": v - 0.02, "high": v + 0.02}
            for (kind, name), v in zip(names, values, strict=True)]
    ends = {0: 1.0, 1: 0.8, 2: 0.8, 3: 0.8, 4: 0.3, 5: 0.3}
    starts = {1: 1.0, 4: 0.8}
    return pd.DataFrame(
        [{**row, "start": starts.get(i, 0.0), "end": ends[i], "unit": "token_acceptance"}
         for i, row in enumerate(rows)])


def test_the_waterfalls_bars_float_between_levels_and_carry_intervals():
    figure = truth_figures.gap_waterfall(gap_rows(1.0, 0.2, 0.8, 0.8, 0.5, 0.3))
    levels, losses = figure.data
    assert list(levels.y) == [1.0, 0.8, 0.8, 0.3] and list(levels.base) == [0.0] * 4
    np.testing.assert_allclose(losses.y, [-0.2, -0.5])
    assert list(losses.base) == [1.0, 0.8] and list(losses.error_y.array) == pytest.approx(
        [0.02, 0.02])
    assert levels.x[2] - levels.x[1] == pytest.approx(1.7)  # the branch stands apart
    assert [note.text for note in figure.layout.annotations][-1] == "<b>−50.0%</b>"
    with pytest.raises(MetricError, match="no step to draw"):
        truth_figures.gap_waterfall(pd.DataFrame())


def test_arms_kinds_and_phases_are_drawn_from_their_tables(found):
    arms = found["arms"]
    figure = truth_figures.arms(arms[arms["unit"] == "token_acceptance"], floor=0.5)
    assert [trace.name for trace in figure.data
            ] == ["real events", "blank events", "other scene", "text only"]
    grid = truth_figures.two_phase(found["two_phase"])
    assert np.array(grid.data[0].z).max() == pytest.approx(
        found["two_phase"].query("metric == 'tokens_per_verification'")["value"].max())
    kinds = pd.DataFrame(
        [{"loss": loss, "group": group, "value": 0.1, "low": low, "high": 0.2, "n": 9}
         for loss, low in (("modality", 0.05), ("drift", -0.1))
         for group in ("colour", "motion")])
    cells = truth_figures.losses_by_kind(kinds).data[0].text
    assert [list(line)
            for line in cells] == [["<b>10.0</b>", "10.0"]] * 2  # bold: the interval excludes zero
    with pytest.raises(MetricError, match="no kind of word has 10 tokens"):
        truth_figures.losses_by_kind(kinds, least=10)
