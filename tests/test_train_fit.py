"""The trainer: it learns, it is deterministic, it resumes to the same weights, it refuses the test
split, it stops on NaN."""

import copy
import dataclasses
import json

import my_levels
import pytest
import torch
import train_examples as examples

from xsd import files
from xsd.adapters import registry
from xsd.core import ParameterError, TrainingError
from xsd.shards.store import ShardDataset
from xsd.shards.writer import ShardWriter
from xsd.train import fit, source

SHORT = {"epochs": 2, "batch_size": 16, "validation_share": 0.2}


def weights(path):
    return registry.load_any_adapter(path).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_levels_of_ones_own_train_resume_and_keep_their_name(tmp_path):
    given = {"config": fit.FitConfig(profile="tokens", **SHORT), "head": examples.head()}
    for spec in ("my_levels:Mine", my_levels.Next,
                 my_levels.Mine(hidden_size=examples.WIDTH, drafter_size=examples.WIDTH)):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        before = None if isinstance(spec, (str, type)) else copy.deepcopy(spec.state_dict())
        result = fit.fit_adapter(spec, examples.answers(), folder=place, **given)
        assert result.history[1]["train_total"] < result.history[0]["train_total"]
        again = fit.fit_adapter(spec, examples.answers(), folder=place, **given)
        assert again.history == result.history
        assert registry.load_any_adapter(place, level=spec).level == files.name_of(spec)
        if before is not None:  # a copy was trained
            assert all(torch.equal(before[name], value)
                       for name, value in spec.state_dict().items())
            with torch.no_grad():
                spec.leave.bias.add_(1)
            with pytest.raises(TrainingError, match="holds another training"):
                fit.fit_adapter(spec, examples.answers(), folder=place, **given)
    with pytest.raises(ParameterError, match="changes with states that come later"):
        fit.fit_adapter("my_levels:Peeks", examples.answers(), folder=tmp_path / "x", **given)


@pytest.mark.parametrize("profile", ["reference", "tokens", "rollout"])
@pytest.mark.parametrize("level", registry.LEVELS)
def test_every_level_trains_with_both_recipes_and_writes_its_run_folder(level, profile, tmp_path):
    config = fit.FitConfig(profile=profile, **SHORT)
    result = fit.fit_adapter(level, examples.answers(drafter_size=12), folder=tmp_path,
                             config=config, head=examples.head())
    assert result.history[-1]["train_total"] < result.history[0]["train_total"]
    assert {"cosine_similarity", "accept_0.90", "token_acceptance", "validation_total",
            "seconds"} <= result.history[0].keys()
    for name in ("best.safetensors", "final.safetensors", "config.json", "history.json",
                 "provenance.json"):
        assert (tmp_path / name).exists()
    assert json.loads((tmp_path / "config.json").read_text())["config"]["profile"] == profile
    adapter = registry.load_any_adapter(result.best_path)
    assert adapter.level == level and registry.count_parameters(adapter) == result.parameters
    assert not torch.cat([p.flatten() for p in adapter.parameters()]).isnan().any()


def test_tokens_are_learned_on_held_out_sequences(tmp_path):
    config = fit.FitConfig(profile="tokens", epochs=12, batch_size=8, rollout_steps=2)
    for level, n in (("L1", 40), ("L5F", 80), ("B1", 400)):
        result = fit.fit_adapter(level, examples.answers(n), folder=tmp_path / level, config=config,
                                 head=examples.head())
        assert max(row["token_acceptance"] for row in result.history) > 0.9


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    states = source.PackedStates(examples.answers())
    paths = [
        fit.fit_adapter("L4", states, folder=tmp_path / name, config=fit.FitConfig(**SHORT),
                        seed=seed).folder / "final.safetensors"
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_training_leaves_the_callers_random_stream_alone(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    fit.fit_adapter("L1", examples.answers(), folder=tmp_path, config=fit.FitConfig(**SHORT))
    assert torch.equal(torch.rand(3), want)


class Interrupted(Exception):
    """What the tests raise in place of a kill."""


@pytest.mark.parametrize(("level", "profile"), [("L2", "reference"), ("L5F", "rollout")])
def test_resume_reaches_the_same_weights_bit_for_bit(level, profile, tmp_path):
    config = fit.FitConfig(profile=profile, epochs=4, batch_size=16, validation_share=0.2,
                           noise=0.1)
    arguments = {"config": config, "head": examples.head(), "seed": 1}
    whole = fit.fit_adapter(level, examples.answers(), folder=tmp_path / "whole", **arguments)

    def stop(row):
        if row["epoch"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit.fit_adapter(level, examples.answers(), folder=tmp_path / "cut", progress=stop,
                        **arguments)
    again = fit.fit_adapter(level, examples.answers(), folder=tmp_path / "cut", **arguments)
    for name in ("best.safetensors", "final.safetensors"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name))
    plain = [[{k: v for k, v in row.items() if not k.endswith("seconds")} for row in result.history]
             for result in (whole, again)]
    assert plain[0] == plain[1]


def test_finished_run_is_returned_at_once_and_another_training_is_refused(tmp_path):
    first = fit.fit_adapter("L1", examples.answers(), folder=tmp_path,
                            config=fit.FitConfig(**SHORT))
    rows = []
    again = fit.fit_adapter("L1", examples.answers(), folder=tmp_path,
                            config=fit.FitConfig(**SHORT), progress=rows.append)
    assert rows == [] and again == first
    with pytest.raises(TrainingError, match="holds another training"):
        fit.fit_adapter("L1", examples.answers(seed=1), folder=tmp_path,
                        config=fit.FitConfig(**SHORT))


def test_test_split_is_refused(tmp_path):
    mixed = [*examples.answers(6), *examples.answers(3, split="test")]
    with pytest.raises(TrainingError, match="3 of 9 samples are of the test split"):
        fit.fit_adapter("L1", mixed, folder=tmp_path)
    with pytest.raises(TrainingError, match="of the test split"):
        fit.fit_adapter("L1", examples.answers(6), folder=tmp_path,
                        validation=examples.answers(3, split="test"))


def test_validation_holds_out_whole_sequences():
    names = [f"s{i % 7}" for i in range(50)]
    train, held = source.split_by_sequence(names, 0.1, seed=0)
    assert {names[i] for i in train} & {names[i] for i in held} == set()
    assert len(train) + len(held) == 50 and 0.1 <= len(held) / 50 < 0.3
    with pytest.raises(TrainingError, match=r"all samples come from one sequence \(s0\)"):
        source.split_by_sequence(["s0", "s0"], 0.1, seed=0)


def test_pairs_that_name_no_sequence_are_cut_once():
    with pytest.warns(UserWarning, match="do not name their sequences, so their last 2 validate"):
        train, held = source.split_by_sequence(["unknown"] * 10, 0.2, seed=0)
    assert train.tolist() == list(range(8)) and held.tolist() == [8, 9]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_split_covers_every_sample_and_repeats_with_its_seed(seed, share):
    names = [f"s{i % 3}" for i in range(10)]
    train, held = source.split_by_sequence(names, share, seed)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(10)) and len(train) and len(held)
    assert not {names[i] for i in train} & {names[i] for i in held}
    again = source.split_by_sequence(names, share, seed)
    assert torch.equal(train, again[0]) and torch.equal(held, again[1])


def test_unnamed_validation_data_is_compared_by_its_answers(tmp_path):
    unnamed = [dataclasses.replace(one, sequence="unknown") for one in examples.answers(12)]
    config = fit.FitConfig(epochs=1)
    result = fit.fit_adapter("L1", unnamed[:8], folder=tmp_path / "a", config=config,
                             validation=unnamed[8:])
    assert len(result.history) == 1
    with pytest.raises(TrainingError, match="held-out ones under other names"):
        fit.fit_adapter("L1", unnamed[:8], folder=tmp_path / "b", config=config,
                        validation=unnamed[8:], held_out=[unnamed[:1]])


def test_validation_data_may_not_share_a_sequence(tmp_path):
    with pytest.raises(TrainingError, match="sequence s0 is in both"):
        fit.fit_adapter("L1", examples.answers(6), folder=tmp_path, validation=examples.answers(3))


def test_nan_stops_with_a_sentence_and_keeps_the_last_good_checkpoint(tmp_path):
    answers = examples.answers()
    broken = dataclasses.replace(answers[0],
                                 hidden_by_drafter=answers[0].hidden_by_drafter * float("nan"))
    with pytest.raises(
            TrainingError, match=
            r"stopped at epoch 1, step .*not a number; no epoch was finished; lower learning_rate"):
        fit.fit_adapter("L1", [broken, *answers[1:]], folder=tmp_path / "a",
                        config=fit.FitConfig(**SHORT), validation=_others(answers))
    states = source.PackedStates(answers)

    def poison(row):
        states.drafter[:] = float("nan")

    config = fit.FitConfig(**{**SHORT, "epochs": 3})
    with pytest.raises(
            TrainingError, match=
            r"stopped at epoch 2, step 1.*last good checkpoint is .*best.safetensors \(epoch 1\)"):
        fit.fit_adapter("L1", states, folder=tmp_path / "b", config=config, progress=poison)
    assert not any(tensor.isnan().any() for tensor in weights(tmp_path / "b").values())


def _others(answers):
    return [dataclasses.replace(answer, sequence="other") for answer in answers[1:5]]


def test_out_of_memory_says_what_to_lower(tmp_path):
    def head(hidden):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(TrainingError, match=r"lower batch_size \(now 16\)"):
        fit.fit_adapter("L1", examples.answers(), folder=tmp_path, profile="tokens", head=head)


def test_shards_packed_states_and_batches_train_alike(tmp_path):
    answers = examples.answers()
    with ShardWriter(tmp_path / "shards", mode="teacher_forced", tap="post_norm", dtype="fp32",
                     config={}, samples_per_shard=16) as writer:
        for answer in answers:
            writer.write(answer)
    dataset = ShardDataset(tmp_path / "shards")
    packed = source.open_states(dataset)
    batches = list(packed.batches(torch.arange(len(packed)), 16))
    runs = [
        fit.fit_adapter("L3", data, folder=tmp_path / str(i), config=fit.FitConfig(**SHORT)).folder
        / "final.safetensors" for i, data in enumerate((dataset, answers, packed, batches))
    ]
    assert all(same(weights(runs[0]), weights(path)) for path in runs[1:])
    streamed = source.open_states(dataset, memory_limit_gb=0)
    assert isinstance(streamed, source.StreamedStates)
    result = fit.fit_adapter("L3", streamed, folder=tmp_path / "streamed",
                             config=fit.FitConfig(**SHORT))
    assert result.history[-1]["train_total"] < result.history[0]["train_total"]


def test_accumulation_and_bfloat16_train(tmp_path):
    config = fit.FitConfig(epochs=2, batch_size=4, accumulation=4, dtype="bfloat16",
                           validation_share=0.2)
    result = fit.fit_adapter("L5", examples.answers(), folder=tmp_path, config=config)
    assert result.history[-1]["train_total"] < result.history[0]["train_total"]


def test_fused_tokens_train_with_the_heads_table(tmp_path):
    config = fit.FitConfig(profile="tokens", **SHORT,
                           adapter_options={"vocab_size": examples.VOCABULARY})
    result = fit.fit_adapter("B1", examples.answers(), folder=tmp_path, config=config,
                             head=examples.head())
    table = registry.load_any_adapter(result.best_path).token_embedding
    torch.testing.assert_close(torch.nn.functional.normalize(table),
                               torch.nn.functional.normalize(examples.head()))


def test_early_stopping_waits_for_patience(tmp_path):
    answers = examples.answers()
    opposite = [
        dataclasses.replace(a, hidden_by_verifier=-a.hidden_by_verifier, sequence="other")
        for a in answers[:8]
    ]
    config = fit.FitConfig(epochs=50, patience=2, batch_size=16)
    result = fit.fit_adapter("L3", answers, folder=tmp_path, config=config, validation=opposite)
    assert (result.best_epoch, len(result.history)) == (1, 3)


def test_what_cannot_be_trained_is_explained(tmp_path):
    with pytest.raises(ParameterError, match="unknown training profile 'fast'"):
        fit.FitConfig(profile="fast")
    with pytest.raises(ParameterError, match="epochs must be positive"):
        fit.FitConfig(epochs=0)
    with pytest.raises(ParameterError, match="level 'ridge' is not trained here"):
        fit.fit_adapter("ridge", examples.answers(), folder=tmp_path)
    with pytest.raises(TrainingError,
                       match="selects by token acceptance and needs the verifier's LM head"):
        fit.fit_adapter("L1", examples.answers(), folder=tmp_path, profile="tokens")
    with pytest.raises(TrainingError, match="the dataset is empty"):
        fit.fit_adapter("L1", [], folder=tmp_path)
    without = [
        dataclasses.replace(a, ids_by_verifier=torch.full_like(a.ids_by_verifier, -1))
        for a in examples.answers()
    ]
    with pytest.raises(TrainingError, match="needs token ids and this dataset has none"):
        fit.fit_adapter("L1", without, folder=tmp_path, profile="tokens", head=examples.head())


def test_the_rate_falls_with_every_step_where_asked(tmp_path, monkeypatch):
    seen = []
    step = fit.Training.step
    monkeypatch.setattr(fit.Training, "step", lambda self, *given: (
        seen.append(self.optimiser.param_groups[0]["lr"]), step(self, *given))[1])
    for schedule in (None, "step"):
        config = fit.FitConfig(schedule=schedule, **SHORT)
        fit.fit_adapter("L1", examples.answers(), folder=tmp_path / str(schedule), config=config)
    by_epoch, by_step = seen[:len(seen) // 2], seen[len(seen) // 2:]
    assert len(set(by_epoch)) == config.epochs
    assert by_step == sorted(set(by_step), reverse=True) and by_step[0] == by_epoch[0]
