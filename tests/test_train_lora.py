"""L6: LoRA goes into the drafter's decoder alone, learns, resumes to the same weights, and is gone
after merging."""

import copy
import dataclasses
import json
from functools import lru_cache

import models_fixtures
import pytest
import tiny_pair
import torch

from xsd.adapters import linear
from xsd.core import CheckpointError, ParameterError, TrainingError
from xsd.extract import pairs
from xsd.models import full_size, loading
from xsd.models.eventgpt import EventGPTForCausalLM
from xsd.train import lora, lora_fit, source

CONFIG = lora.LoraFitConfig(epochs=3, batch_size=4, accumulation=2, learning_rate=1e-2,
                            validation_share=0.25)


@lru_cache(maxsize=1)
def data():
    """(teacher-forced pairs of the train split, prompt of a pair: embeddings [L, D])."""
    pair = models_fixtures.tiny_pair()
    samples = [
        dataclasses.replace(sample, split="train")
        for sample in tiny_pair.make_samples(16, sequences=4)
    ]
    embeddings = {(s.sequence, s.clip, s.question): pair.drafter.prompt_embeddings(s)
                  for s in samples}
    states = pairs.teacher_forced_pairs(pair, samples, max_new_tokens=8)
    return states, lambda one: embeddings[one.sequence, one.clip, one.question]


def drafter():
    return copy.deepcopy(models_fixtures.tiny_pair().drafter.model)


def head():
    return models_fixtures.tiny_pair().verifier.head.weight


def fit(folder, model=None, *, config=CONFIG, states=None, **options):
    stored, prompt = data()
    return lora_fit.fit_lora(model or drafter(), states or stored, prompt, folder=folder,
                             head=head(), config=config, **options)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- where it goes
# ------------------------------------------------------------------------------------------------


def test_seven_billion_parameters_give_16_777_216_trainable_ones():
    with torch.device("meta"):
        model = EventGPTForCausalLM(full_size.drafter_config())
        tuned = lora.attach(model)
    assert trainable(tuned) == 16_777_216 == lora.size_of(4096, 32)
    assert all(".model.layers." in name and ".self_attn." in name
               for name, p in tuned.named_parameters() if p.requires_grad)


def test_the_19_1_million_quoted_elsewhere_include_the_vision_tower():
    with torch.device("meta"):
        clip = EventGPTForCausalLM(full_size.drafter_config()).model.visual_tower
    inside = [
        m for name, m in clip.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
    ]
    assert sum(16 * (m.in_features + m.out_features) for m in inside) == 2_359_296
    assert 16_777_216 + 2_359_296 == 19_136_512


def test_fresh_lora_changes_nothing_and_states_stand_one_before_their_token():
    states, prompt = data()
    model = drafter()
    lora.attach(model)
    model.eval()
    forced = lora.forced_states(model, [prompt(one) for one in states],
                                [one.ids_by_verifier for one in states])
    for row, one in zip(forced, states, strict=True):
        torch.testing.assert_close(row[:len(one.ids_by_verifier)], one.hidden_by_drafter, atol=1e-4,
                                   rtol=1e-4)
    row = max(range(len(states)), key=lambda i: len(states[i].ids_by_verifier))
    changed = states[row].ids_by_verifier.clone()
    changed[3] = (changed[3] + 1) % 300
    again = lora.forced_states(model, [prompt(states[row])], [changed])[0]
    torch.testing.assert_close(again[:4], forced[row][:4], atol=1e-4,
                               rtol=1e-4)  # token 3 is read after the state that predicts it
    assert not torch.allclose(again[4:], forced[row][4:len(again)], atol=1e-2)


# --- training
# ------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_only_lora_in_the_decoder_changes(tmp_path):
    model = drafter()
    before = weights(model)
    result = fit(tmp_path, model, merge=False, config=dataclasses.replace(CONFIG, epochs=6))
    assert result.history[-1]["train_total"] < 0.9 * result.history[0]["train_total"]
    assert {
        "train_mse", "train_cosine", "train_cross_entropy", "validation_total", "cosine_similarity",
        "token_acceptance"
    } <= set(result.history[0])
    assert result.parameters == 2 * 4 * 16 * (32 + 32)
    assert same(before, weights(model)), "merge=False leaves the drafter as it came"
    lora.merge_saved(model, result.best_path)
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in lora.TARGETS
    }
    for name in ("config.json", "history.json", "provenance.json", "best/adapter_model.safetensors",
                 "best/adapter_config.json"):
        assert (tmp_path / name).is_file()
    assert json.loads(
        (tmp_path / "best" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_merged_states_are_the_unmerged_ones_and_need_no_peft_when_loaded_again(tmp_path):
    states, prompt = data()
    model = drafter()
    best = fit(tmp_path / "run", model).best_path
    answers = [one.ids_by_verifier for one in states[:3]], [prompt(one) for one in states[:3]]
    merged = lora.forced_states(model, answers[1], answers[0])
    beside = lora.peft.PeftModel.from_pretrained(drafter(),
                                                 best).eval()  # the folder is peft's own format
    torch.testing.assert_close(merged,
                               lora.forced_states(beside.base_model.model, answers[1], answers[0]),
                               atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged[0, :2], states[0].hidden_by_drafter[:2], atol=1e-3)
    assert weights(model).keys() == weights(
        drafter()).keys() and not trainable(model)
    handle = models_fixtures.tiny_pair().drafter
    loading.save_checkpoint(tmp_path / "drafter", model, handle.tokenizer, handle.pixels)
    loaded = loading.load_drafter(tmp_path / "drafter")
    torch.testing.assert_close(lora.forced_states(loaded.model, answers[1], answers[0]), merged,
                               atol=1e-5, rtol=1e-5)


def test_an_interrupted_training_leaves_the_drafter_as_it_came_and_resumes_bit_for_bit(tmp_path):
    whole, half = drafter(), drafter()
    fit(tmp_path / "whole", whole, seed=3)

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    before = weights(half)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "half", half, seed=3, progress=stop)
    assert same(before, weights(half))
    assert fit(tmp_path / "half", half, seed=3).history[-1]["epoch"] == 3
    assert same(weights(whole), weights(half)) and not same(before, weights(half))
    again = drafter()
    fit(tmp_path / "half", again, seed=3, progress=stop)  # a finished run is merged at once
    assert same(weights(whole), weights(again))


def test_gradient_checkpointing_and_accumulation_give_the_same_weights(tmp_path):
    plain, recomputed, gathered = drafter(), drafter(), drafter()
    config = dataclasses.replace(CONFIG, epochs=1)
    fit(tmp_path / "a", plain, config=config)
    fit(tmp_path / "b", recomputed, config=dataclasses.replace(config, gradient_checkpointing=True))
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(recomputed)[name], value, atol=1e-6, rtol=1e-6)
    assert not recomputed.is_activation_checkpointing
    # three passes and one step are one pass over all 12 answers, though their lengths differ
    config = dataclasses.replace(config, dropout=0.0)
    fit(tmp_path / "c", plain := drafter(),
        config=dataclasses.replace(config, batch_size=4, accumulation=3))
    fit(tmp_path / "d", gathered, config=dataclasses.replace(config, batch_size=12, accumulation=1))
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(gathered)[name], value, atol=2e-4, rtol=1e-3)


def test_another_width_goes_through_a_frozen_adapter(tmp_path):
    states, _ = data()
    wide = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    states = [
        dataclasses.replace(one, hidden_by_verifier=one.hidden_by_verifier @ wide.T)
        for one in states
    ]
    wide_head = torch.randn(464, 48, generator=torch.Generator().manual_seed(1))
    options = {
        "folder": tmp_path, "head": wide_head, "config": dataclasses.replace(CONFIG, epochs=2)
    }
    with pytest.raises(
            TrainingError,
            match="the states to train are 32 wide and the verifier's 48; pass adapter="):
        lora_fit.fit_lora(drafter(), states, data()[1], **options)
    packed = source.PackedStates(states)
    ridge = linear.fit_linear("ridge", packed.batches(torch.arange(len(packed)), 8))
    before = weights(ridge)
    history = lora_fit.fit_lora(drafter(), states, data()[1], adapter=ridge, **options).history
    assert history[-1]["train_total"] < history[0]["train_total"] and same(before, weights(ridge))


@pytest.mark.filterwarnings("error:bitsandbytes")
def test_a_4_bit_drafter_trains_though_it_has_already_run_and_its_lora_merges_into_a_whole_one(
        tmp_path):
    """The filter: where bitsandbytes' inference layout is left on, it warns that gradients stop
    there."""
    pair = loading.load_pair(tiny_pair.make_tiny_pair(tmp_path / "pair", hidden_size=64),
                             quant="4bit")
    model = pair.drafter.model
    samples = [
        dataclasses.replace(sample, split="train")
        for sample in tiny_pair.make_samples(8, sequences=2)
    ]
    states = pairs.teacher_forced_pairs(pair, samples, max_new_tokens=4)
    embeddings = {(s.sequence, s.clip, s.question): pair.drafter.prompt_embeddings(s)
                  for s in samples}

    def prompt(one):
        return embeddings[one.sequence, one.clip, one.question]

    config = dataclasses.replace(CONFIG, validation_share=0.5, epochs=4)
    history = lora_fit.fit_lora(model, states, prompt, folder=tmp_path / "run",
                                head=pair.verifier.head.weight, config=config).history
    assert history[-1]["train_total"] < history[0]["train_total"]
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    answer = [prompt(states[0])], [states[0].ids_by_verifier]
    torch.testing.assert_close(
        lora.forced_states(model, *answer)[0], states[0].hidden_by_drafter, atol=0.2, rtol=0.1)
    with pytest.raises(
            TrainingError,
            match="rounds nearly all of the training away: load the drafter in bfloat16"):
        lora.merge_saved(model, tmp_path / "run" / "best")
    with pytest.raises(
            TrainingError,
            match="a quantised drafter cannot take the weights in; train with merge=None"):
        lora_fit.fit_lora(model, states, prompt, folder=tmp_path / "b",
                          head=pair.verifier.head.weight, merge=True)
    whole = loading.load_pair(tmp_path / "pair").drafter.model
    before = lora.forced_states(whole, *answer)
    lora.merge_saved(whole, tmp_path / "run" / "best")
    assert not torch.allclose(before, lora.forced_states(whole, *answer), atol=1e-2)


# --- what is refused
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [({"split": "test"}, "of the test split, which may not train"),
     ({"mode": "free_running"
       }, "trains on teacher_forced, post_norm pairs with token ids, not on free_running"),
     ({"tap": "pre_norm"}, "not on teacher_forced, pre_norm; extract those"),],
)
def test_data_that_cannot_train_it_is_refused(change, message, tmp_path):
    with pytest.raises(TrainingError, match=message):
        fit(tmp_path, states=[dataclasses.replace(one, **change) for one in data()[0]])


def test_out_of_memory_says_what_to_lower_and_leaves_the_drafter_as_it_came(tmp_path):
    model = drafter()
    before = weights(model)

    def prompt(one):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(
            TrainingError,
            match=r"lower batch_size \(now 4\) and raise accumulation \(now 2\), set gradient"):
        lora_fit.fit_lora(model, data()[0], prompt, folder=tmp_path, head=head(), config=CONFIG)
    assert same(before, weights(model))


def test_held_out_answers_are_refused_by_their_hash(tmp_path):
    held = [
        dataclasses.replace(one, sequence=f"other_{one.sequence}", split="test")
        for one in data()[0][:2]
    ]
    with pytest.raises(TrainingError,
                       match="2 of 16 training answers are held-out ones under other names"):
        fit(tmp_path, held_out=[held])


def test_prompts_of_other_data_are_refused(tmp_path):
    states = [
        dataclasses.replace(one, hidden_by_drafter=one.hidden_by_drafter.roll(1, 0))
        for one in data()[0]
    ]
    with pytest.raises(
            TrainingError, match=
            r"the drafter's states differ from the dataset's \(mean cosine .* must be loaded afresh"
    ):
        fit(tmp_path, states=states)


def test_another_run_in_the_folder_nan_and_foreign_weights_are_named(tmp_path):
    result = fit(tmp_path, config=dataclasses.replace(CONFIG, epochs=1))
    with pytest.raises(TrainingError, match="holds another training"):
        fit(tmp_path, seed=1)
    spoilt = [
        dataclasses.replace(one, hidden_by_verifier=one.hidden_by_verifier * float("nan"))
        for one in data()[0]
    ]
    with pytest.raises(TrainingError,
                       match=r"stopped at epoch 1, .* no epoch was finished; lower learning_rate"):
        fit(tmp_path / "nan", states=spoilt)
    other = loading.load_drafter(
        tiny_pair.make_tiny_pair(tmp_path / "pair", drafter_layers=1) / "drafter").model
    before = weights(other)
    with pytest.raises(CheckpointError, match="are of another model"):
        lora.merge_saved(other, result.best_path)
    assert same(before, weights(other))
    with pytest.raises(CheckpointError, match="holds no readable LoRA weights"):
        lora.merge_saved(other, tmp_path / "nowhere")
    lora.attach(other)
    with pytest.raises(TrainingError, match="already carries LoRA weights"):
        lora.attach(other)
    with pytest.raises(TrainingError, match="Linear has no decoder"):
        lora.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ParameterError, match="rank must be positive"):
        lora.LoraFitConfig(rank=0)
