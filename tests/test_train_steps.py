"""Step 02 with L6 and the further options, on a random-weight pair of the real
classes."""

import json

import my_levels
import pytest
import torch
from tiny_pair import make_tiny_pair

from xsd import cli
from xsd.adapters import registry
from xsd.core import CheckpointError, ParameterError, TrainingError
from xsd.models import loading
from xsd.runs import folder, parameters
from xsd.steps import drafter_tuning, extraction, training
from xsd.train import fit


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp("train_steps")
    pair = make_tiny_pair(place / "pair", seed=4)
    sizes = {
        "n_train_sequences": 3, "n_test_sequences": 2, "questions_per_sequence": 3,
        "max_new_tokens": 7, "workers": 1
    }
    run = str(place / "run")
    extraction.run(
        parameters.ExtractParameters.checked(
            {"run_dir": run, "pair": str(pair), "test_data": ["simulated"], **sizes}))
    return run


def given(run_dir, **values):
    return parameters.TrainParameters.checked(
        {"run_dir": run_dir, "epochs": 2, "batch_size": 4, "lora_learning_rate": 1e-2, **values})


def test_l6_trains_merges_is_judged_on_held_out_tokens_and_is_found_again(run_dir):
    rows = []
    results = training.run(given(run_dir, levels=["L1", "L6"]),
                           progress=lambda level, row: rows.append((level, row["epoch"])))
    assert rows == [("L1", 1), ("L1", 2), ("L6", 1), ("L6", 2)]
    line = results["levels"]["L6"]
    assert line["parameters"] == 2 * 4 * 16 * (
        32 + 32) and line["reads"] == "drafter" and 1 <= line["best_epoch"] <= 2
    judged = line["held_out"]["simulated"]
    for arm in ("before", "after"):
        assert 0 <= judged[arm]["token_acceptance"] <= 1 and 0 <= judged[arm][
            "accepted_per_round"] <= drafter_tuning.GAMMA
    place = training.adapter_folder(run_dir, "L6")
    merged, plain = (loading.load_drafter(path).model.state_dict()
                     for path in (place / "drafter", place.parents[2] / "pair" / "drafter"))
    changed = {name for name in merged if not torch.equal(merged[name], plain[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert registry.load_any_adapter(place / "map").level == "ridge"
    again = training.run(given(run_dir, levels=["L6"]),
                         progress=lambda level, row: rows.append(level))
    # as texts, for an unknown end of an interval is NaN, which equals nothing
    assert json.dumps(again["levels"]["L6"]) == json.dumps(line) and len(rows) == 4
    table = training.table(results["levels"]).set_index("level")
    assert table.loc["L6", "parameters at 4096"] == 16_777_216 and table.loc[
        "L1", "parameters at 4096"] == 2_113_537
    assert json.loads((folder.resolve(run_dir) / "results" /
                       "train.json").read_text())["levels"].keys() == {"L6"}


def test_curves_hold_every_term(run_dir):
    training.run(given(run_dir, levels=["L1", "L4", "L6"]))
    epochs = training.history(run_dir, ["L1", "L4", "L6"])
    assert {
        "loss", "mse loss", "cosine loss", "cross_entropy loss", "token_acceptance", "accept_0.90"
    } <= set(epochs.columns)
    assert training.most_terms(epochs) == "L4" and set(training.terms(
        epochs, "L1")["level"]) == {"cross_entropy"}
    terms = training.terms(epochs, "L4")
    assert set(terms["level"]) == {"mse", "cosine", "cross_entropy"} and set(
        terms["split"]) == {"train", "validation"}
    assert (terms[terms["epoch"] == 1]["loss against the first epoch"] == 1).all()
    losses = epochs[epochs["split"] == "train"].groupby("level")["loss"]
    assert (losses.min() < losses.first()).all(), "every training loss fell"


def test_a_level_of_ones_own_is_trained_found_and_loaded_beside_ours(run_dir):
    mine = my_levels.Next(hidden_size=32, drafter_size=32)
    mine.level = "next"
    levels = ["L1", "my_levels:Mine", mine]
    results = training.run(given(run_dir, levels=levels))
    assert [line["reads"] for line in results["levels"].values()] == ["drafter", "drafter", "both"]
    assert all(1 <= line["best_epoch"] <= line["epochs"] <= 2
               for line in results["levels"].values()), "epochs kept lie inside the training"
    assert results["provenance"]["parameters"]["levels"] == ["L1", "my_levels:Mine", "next"]
    assert set(training.trained(run_dir)) >= {"L1", "my_levels:Mine", "next"}
    loaded = training.load(run_dir, levels)
    assert list(loaded) == ["L1", "my_levels:Mine", "next"]
    table = training.table(results["levels"]).set_index("level")
    assert table.loc["my_levels:Mine", "parameters at 4096"] == 4096 * 4097 + 2 * 8 * 4096 + 4104
    assert table["parameters at 4096"].isna().tolist() == [False, False, True]
    epochs = training.history(run_dir, levels)
    assert set(epochs["level"]) == {"L1", "my_levels:Mine", "next"}
    with pytest.raises(CheckpointError, match="a class of your own: name it with level='next'"):
        registry.load_any_adapter(training.adapter_folder(run_dir, "next"))


def test_an_adapter_of_another_run_is_loaded_by_its_path(run_dir, tmp_path):
    training.run(given(run_dir, levels=["L1"]))
    place = training.adapter_folder(run_dir, "L1")
    loaded = training.load(run_dir, ["L1", str(place)])
    assert list(loaded) == ["L1", "L1 of run"]
    for one, other in zip(*(adapter.state_dict().values() for adapter in loaded.values()),
                          strict=True):
        assert torch.equal(one, other)
    alone = registry.save_adapter(loaded["L1"], tmp_path / "alone.safetensors")
    curves = training.history(run_dir, ["L1", str(place / "best.safetensors"), str(alone)])
    assert set(curves["level"]) == {"L1", "L1 of run"}
    assert training.history(run_dir, [str(alone)]).empty
    with pytest.raises(ParameterError, match="two of the levels are called 'L1 of run'"):
        training.load(run_dir, [str(place), str(place / "best.safetensors")])


@pytest.mark.parametrize(("recipe", "level", "epochs", "batch", "rate", "patience"), [
    ("reference", "L4", 50, 64, 1e-3, 10), ("converged", "L1", 300, 64, 1e-3, 50),
    ("tokens", "B1", 50, 16, 2e-3, 10), ("smoke", "L5F", 8, 16, 2e-3, 10),
    ("reference", "L6", 20, 1, 1e-4, 5), ("smoke", "L6", 8, 4, 1e-3, 5)])
def test_unset_parameters_leave_the_recipes_value(recipe, level, epochs, batch, rate, patience):
    plain = parameters.TrainParameters.checked({"recipe": recipe})
    made = training.config_of(plain, level)
    assert (made.epochs, made.batch_size, made.learning_rate, made.patience) == (epochs, batch,
                                                                               rate, patience)
    set_ = {"recipe": recipe, "epochs": 3, "validation_share": 0.3}
    made = training.config_of(parameters.TrainParameters.checked(set_), level)
    assert (made.epochs, made.learning_rate, made.validation_share) == (3, rate, 0.3)


def test_options_of_adapters_are_for_all_or_by_level_and_travel_with_the_file(run_dir):
    own = {"dropout": 0.2, "L2": {"bottleneck": 5, "n_blocks": 2}}
    run = given(run_dir, levels=["L2", "L3"], epochs=1, options=own)
    results = training.run(run)
    assert results["recipes"]["L2"]["adapter_options"] == {"dropout": 0.2, "bottleneck": 5,
                                                           "n_blocks": 2}
    loaded = training.load(run_dir, ["L2", "L3"])
    assert len(loaded["L2"].blocks) == 2 and loaded["L2"].blocks[0].down.out_features == 5
    assert loaded["L3"].options["dropout"] == 0.2
    with pytest.raises(ParameterError, match=r"L3 cannot be made .* 'heads'"):
        training.run(given(run_dir, levels=["L3"], options={"L3": {"heads": 2}}))


def test_a_training_before_is_kept_and_the_best_of_a_level_has_a_star(run_dir):
    for rate in (1e-6, 1e-2):
        training.run(given(run_dir, levels=["L3"], learning_rate=rate, epochs=1))
    found = training.trainings(run_dir).query("level == 'L3'")
    assert sorted(found["training"].str[:6]) == ["L3_202", "curren"] or len(found) > 2
    assert (found["best"] == "★").any() and found.loc[
        found["best"] == "★", "token_acceptance"].min() == found["token_acceptance"].max()
    earlier = next((training.adapter_folder(run_dir, "L3") / "earlier").iterdir())
    assert list(training.load(run_dir, [str(earlier)])) == [earlier.name]
    assert training.trained(run_dir).count("L3") == 1


def test_other_pairs_may_choose_the_best_epoch(run_dir):
    pairs = extraction.open_pairs(run_dir, "train", "simulated", "teacher_forced")
    names = sorted(set(pairs.table()["sequence"]))
    rest, first = pairs.subset(sequences=names[1:]), pairs.subset(sequences=names[:1])
    config = training.config_of(given(run_dir, epochs=1), "L5")
    places = {"run_dir": run_dir, "validation": first}
    found = training.train(rest, {"L5": config}, **places)
    assert found["pairs"] == len(rest) and found["levels"]["L5"]["epochs"] == 1
    with pytest.raises(TrainingError, match="is in both training and validation"):
        training.train(pairs, {"L5": config}, **places)


def test_l6_takes_its_own_options_and_keeps_the_final_weights_too(run_dir):
    options = {"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.0, "lora_patience": 1,
               "lora_accumulation": 3, "lora_checkpointing": True}
    config = training.config_of(given(run_dir, **options), "L6")
    assert (config.rank, config.alpha, config.dropout, config.patience, config.accumulation,
            config.gradient_checkpointing) == (2, 4.0, 0.0, 1, 3, True)
    line = training.run(given(run_dir, levels=["L6"], **options))["levels"]["L6"]
    assert line["parameters"] == 2 * 4 * 2 * (32 + 32)
    place = training.adapter_folder(run_dir, "L6")
    assert all((place / name / "adapter_model.safetensors").is_file() for name in ("best", "final"))
    rows = training.history(run_dir, ["L6"]).query("split == 'validation'")
    assert rows[["accept_0.80", "accept_0.95"]].notna().all(axis=None)


def test_the_verbs_train_by_path_and_look_at_adapters(run_dir, tmp_path, capsys):
    out = str(tmp_path / "own")
    asked = ["train", f"{run_dir}/shards/train_simulated", "-o", out, "-l", "L1", "-l", "X1"]
    assert cli.main([*asked, "--options", "X1: {layers: 2}", "-p", "epochs=1"]) == 0
    said = capsys.readouterr().out
    assert "X1 epoch 1: loss" in said and "★" in said
    loaded = training.load(out, ["L1", "X1"])
    assert loaded["X1"].options["layers"] == 2 and loaded["X1"].reads == "both"
    assert cli.main(["self-test", f"{out}/adapters/X1", "-l", "L2", "--width", "16"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split()[:3] == ["X1", "of", "own"] and rows[2].split()[:3] == ["L2", "drafter",
                                                                                  "16"]


def test_the_runs_own_held_out_sets_are_guarded(run_dir, monkeypatch):
    test = extraction.open_pairs(run_dir, "test", "simulated", "teacher_forced")
    monkeypatch.setattr(extraction, "open_pairs", lambda *names: test)
    with pytest.raises(TrainingError, match="of the test split, which may not train"):
        training.run(given(run_dir, levels=["L2"]))


def test_options_of_the_notebook_reach_the_recipe(run_dir):
    options = {
        "objective": "mse + kl", "position_decay": 0.9, "noise": 0.1, "token_fusion": True,
        "draft_vocabulary": 12
    }
    made = training.config_of(given(run_dir, **options), "L5F")
    assert (made.objective, made.position_decay, made.noise, made.token_fusion,
            made.draft_vocabulary) == ("mse + kl", 0.9, 0.1, True, 12)
    plain = training.config_of(given(run_dir), "L5F")
    assert (plain.objective, plain.draft_vocabulary) == (fit.FitConfig(profile="tokens").objective,
                                                         None)
    assert not training.config_of(given(run_dir, token_fusion=True), "L1").token_fusion
