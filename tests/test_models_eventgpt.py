"""EventGPT computes what the official code computes, and keeps its names on disk."""

import json

import pytest
import torch
from models_fixtures import CLIP, REFERENCE, reference_drafter
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from xsd.models import handle as handles
from xsd.models.eventgpt import EVENT_TOKEN_ID, EventGPTConfig, EventGPTForCausalLM

OFFICIAL = load_file(REFERENCE / "reference.safetensors")


def frames(suffix: str) -> torch.Tensor:
    return OFFICIAL["event_tensors"][:1 if suffix else 5]


@pytest.mark.parametrize("suffix", ["", "_1f"])
@torch.no_grad()
def test_logits_and_states_equal_the_official_code(suffix):
    model = reference_drafter().model
    embeds = model.embed_prompt(OFFICIAL["input_ids"][0], model.event_tokens(frames(suffix)))
    torch.testing.assert_close(embeds, OFFICIAL["inputs_embeds" + suffix][0], atol=1e-5, rtol=0)
    output = model(OFFICIAL["input_ids"], event_pixels=frames(suffix)[None],
                   output_hidden_states=True)
    torch.testing.assert_close(output.logits, OFFICIAL["logits" + suffix], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.hidden_states[-1], OFFICIAL["last_hidden" + suffix],
                               atol=1e-5, rtol=0)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("suffix", ["", "_1f"])
def test_sixteen_of_sixteen_greedy_tokens_equal_the_official_code(suffix):
    official = OFFICIAL["greedy_ids" + suffix][:, 1:]  # its first id is BOS
    ids = reference_drafter().model.generate(OFFICIAL["input_ids"],
                                             event_pixels=frames(suffix)[None], max_new_tokens=16,
                                             do_sample=False)
    assert torch.equal(ids, official)


@torch.no_grad()
def test_event_tokens_are_frame_means_then_position_means():
    model = reference_drafter().model
    states = model.model.visual_tower(frames(""))
    torch.testing.assert_close(states, OFFICIAL["clip_last_hidden"], atol=1e-5, rtol=0)
    features = model.model.event_features(frames(""))
    torch.testing.assert_close(features, OFFICIAL["frame_features"], atol=1e-5, rtol=0)
    tokens = model.event_tokens(frames(""))
    torch.testing.assert_close(tokens, OFFICIAL["event_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:5], features.mean(dim=1))
    torch.testing.assert_close(tokens[5:], features.mean(dim=0))


def test_prompt_ids_equal_the_official_tokenisation():
    before, after = handles.prompt_ids("drafter", reference_drafter().tokenizer,
                                       "Describe in detail what happened in the scene.")
    assert [*before, EVENT_TOKEN_ID, *after] == OFFICIAL["input_ids"][0].tolist()


def test_greedy_answer_of_a_handle_equals_the_official_states():
    handle = reference_drafter()
    model = handle.model
    embeds = model.embed_prompt(OFFICIAL["input_ids"][0], model.event_tokens(frames(""))).detach()
    cache = DynamicCache(config=handle.decoder.config)
    answer = handle._generate_batch([embeds], 16, cache)[0]
    assert answer.ids.tolist() == OFFICIAL["greedy_ids"][0, 1:].tolist()
    torch.testing.assert_close(answer.hidden, OFFICIAL["greedy_hidden"], atol=1e-5, rtol=0)


def test_save_and_load_keep_weights_names_and_architecture(tmp_path):
    model = reference_drafter().model
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == load_file(REFERENCE / "model.safetensors").keys()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["EventChatModel"]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EventGPTConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, EventGPTForCausalLM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_new_model_has_the_official_names_too(tmp_path):
    vision = json.loads((CLIP / "config.json").read_text())
    config = EventGPTConfig(vocab_size=401, hidden_size=64, intermediate_size=128,
                            num_hidden_layers=2, num_attention_heads=4, vision_config=vision)
    EventGPTForCausalLM(config).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(
        REFERENCE / "model.safetensors").keys()


def test_full_size_has_the_published_tensors_and_parameters():
    with torch.device("meta"):
        model = EventGPTForCausalLM(EventGPTConfig(vocab_size=32000))
    assert len(model.state_dict()) == 688
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_079_684_096
    assert model.config.n_frame_tokens == 577


@torch.no_grad()
def test_labels_and_mask_widen_with_the_event_tokens():
    model = reference_drafter().model
    ids = OFFICIAL["input_ids"].repeat(2, 1)
    pixels = torch.stack([frames(""), frames("").flip(0)])
    output = model(ids, event_pixels=pixels, attention_mask=torch.ones_like(ids),
                   labels=ids.masked_fill(ids == EVENT_TOKEN_ID, -100))
    assert output.logits.shape == (2, 111, 401)
    torch.testing.assert_close(output.logits[:1], OFFICIAL["logits"], atol=1e-5, rtol=0)
    logits = torch.cat([output.logits[:, :71], output.logits[:, 80:]],
                       dim=1)  # the text positions and the last event position
    shifted = ids[:, [*range(1, 71), *range(72, 102)]]
    rows = torch.cat([logits[:, :70], logits[:, 71:101]], dim=1)
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(rows.flatten(0, 1), shifted.flatten()))


def test_the_prompt_is_cut_at_the_tokenizers_maximum():
    model = reference_drafter().model
    model.config.tokenizer_model_max_length = 90
    try:
        embeds = model.embed_prompt(OFFICIAL["input_ids"][0], OFFICIAL["event_features"])
    finally:
        model.config.tokenizer_model_max_length = 2048
    assert len(embeds) == 90
    torch.testing.assert_close(embeds, OFFICIAL["inputs_embeds"][0, :90], atol=1e-5, rtol=0)


def test_a_prompt_without_placeholder_is_refused():
    with pytest.raises(ValueError, match="holds 0 event placeholders"):
        reference_drafter().model.embed_prompt(torch.tensor([1, 2, 3]), torch.zeros(2, 64))
