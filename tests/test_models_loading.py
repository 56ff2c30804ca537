"""Checkpoints load whole or say in one sentence what is wrong."""

import json
import pickle
import shutil

import pytest
import torch
from models_fixtures import CLIP, REFERENCE, pair_folder, reference_drafter, tiny_pair
from safetensors.torch import load_file, save_file
from tiny_pair import VISION, make_samples, make_tiny_pair, tiny_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from xsd.core import CheckpointError, PairError
from xsd.models import checkpoints, loading
from xsd.models.pixels import PixelSpec

WEIGHTS = load_file(REFERENCE / "model.safetensors")


def copy_of_reference(tmp_path):
    return shutil.copytree(REFERENCE, tmp_path / "checkpoint")


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def rewrite(folder, weights):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def same_weights(model, expected=None):
    expected = expected or reference_drafter().model.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def without_tower():
    return {name: tensor for name, tensor in WEIGHTS.items()
            if not name.startswith(checkpoints.TOWER)}


# --- what loads
# ------------------------------------------------------------------------------------------------


def test_a_pair_folder_loads():
    pair = tiny_pair()
    assert (pair.name, pair.n_event_frames, pair.event_canvas,
            pair.draft_vocab_size) == ("tiny", 5, "sensor", 400)
    assert pair.drafter.role == "drafter" and pair.verifier.role == "verifier"


def test_the_same_seed_writes_the_same_pair(tmp_path):
    again = loading.load_pair(make_tiny_pair(tmp_path))
    assert again.drafter.weights_hash() == tiny_pair().drafter.weights_hash()
    assert again.verifier.weights_hash() == tiny_pair().verifier.weights_hash()


def test_a_bin_file_loads_as_safetensors_do(tmp_path):
    folder = copy_of_reference(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    assert same_weights(loading.load_drafter(folder, vision_tower=CLIP).model)


def test_old_buffers_are_ignored_and_shards_are_joined(tmp_path):
    folder = copy_of_reference(tmp_path)
    (folder / "model.safetensors").unlink()
    names = sorted(WEIGHTS)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        checkpoints.TOWER + "embeddings.position_ids": torch.arange(5)[None]
    }
    parts = {
        "model-00001-of-00002.safetensors": names[:40],
        "model-00002-of-00002.safetensors": names[40:]
    }
    for part, chosen in parts.items():
        save_file({name: WEIGHTS[name] for name in chosen} | (extra if "00001" in part else {}),
                  folder / part, metadata={"format": "pt"})
    index = {name: part for part, chosen in parts.items()
             for name in chosen} | {name: next(iter(parts)) for name in extra}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}))
    assert same_weights(loading.load_drafter(folder, vision_tower=CLIP).model)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError,
                       match=r"lacks 1 of 2 weight shards \(model-00002-of-00002.safetensors\)"):
        loading.load_drafter(folder, vision_tower=CLIP)


def test_missing_tower_weights_come_from_the_clip_folder(tmp_path):
    folder = copy_of_reference(tmp_path)
    rewrite(folder, without_tower())
    clip = load_file(CLIP / "model.safetensors")
    model = loading.load_drafter(folder, vision_tower=CLIP).model
    for name, tensor in clip.items():
        assert torch.equal(model.state_dict()[f"{checkpoints.TOWER}visual_tower.{name}"], tensor)


def test_a_tower_named_beside_the_checkpoint_is_found(tmp_path):
    folder = copy_of_reference(tmp_path)
    rewrite(folder, without_tower())
    change_config(folder, mm_visual_tower="tiny_clip")
    assert loading.load_drafter(folder).pixels.crop == 28


def test_a_tower_is_read_off_its_tensors_where_nothing_describes_it(tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
    prefix = f"{checkpoints.TOWER}visual_tower.vision_model.embeddings."
    shapes |= {
        prefix + "patch_embedding.weight": (128, 3, 14, 14),
        prefix + "position_embedding.weight": (577, 128)
    }
    found = checkpoints.describe_tower(tmp_path, None, shapes)
    assert (found["num_attention_heads"], found["image_size"],
            found["num_hidden_layers"]) == (2, 336, 3)


def test_a_saved_drafter_needs_no_clip_folder(tmp_path):
    handle = reference_drafter()
    loading.save_checkpoint(tmp_path, handle.model, handle.tokenizer, handle.pixels)
    again = loading.load_drafter(tmp_path)
    assert again.weights_hash() == handle.weights_hash()
    assert again.prompt_ids("Describe the scene.") == handle.prompt_ids("Describe the scene.")
    assert again.draft_vocab_size == 400 and again.vocab_size == 401  # <ev_patch> is never drafted


def test_one_dtype_everywhere():
    model = loading.load_drafter(REFERENCE, vision_tower=CLIP, dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model.event_tokens(torch.zeros(5, 3, 28, 28)).float()).all()


def test_an_absent_image_tower_is_filled_from_the_video_tower(tmp_path):
    folder = shutil.copytree(pair_folder() / "verifier", tmp_path / "verifier")
    weights = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items()
        if "image_tower" not in name
    }
    rewrite(folder, weights)
    model = loading.load_verifier(folder).model.model
    assert same_weights(model.image_tower, model.video_tower.state_dict())


@pytest.mark.parametrize("text_config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_llava_next_video_works_as_a_verifier(tmp_path, text_config):
    folder = shutil.copytree(pair_folder(), tmp_path / "pair")
    shutil.rmtree(folder / "verifier")
    torch.manual_seed(0)
    vision = {**VISION, "image_size": 56}
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=text_config(vocab_size=464, hidden_size=32, intermediate_size=64,
                                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                head_dim=8, sliding_window=None, max_position_embeddings=512),
        image_token_index=401, video_token_index=400, image_grid_pinpoints=[[56, 56]],
    )
    model = LlavaNextVideoForConditionalGeneration(config)
    loading.save_checkpoint(folder / "verifier", model,
                            tiny_tokenizer("<video>", "<image>", "<pad>"), PixelSpec(56, 56))
    pair = loading.load_pair(folder)
    sample = make_samples(1)[0]
    before, after = pair.verifier.prompt_ids(sample.question)
    n_video = 8 * 4  # 16 patches a frame, pooled 2 × 2, without CLS
    ids = torch.tensor([[*before, *[400] * n_video, *after]])
    pixels = pair.verifier.pixels(sample.video)[None]
    expected = pair.verifier.model.generate(ids, pixel_values_videos=pixels, max_new_tokens=6,
                                            do_sample=False, pad_token_id=0)
    state = pair.verifier.prefill(sample)
    assert state.length == ids.shape[1]
    said = expected[0, ids.shape[1]:]
    assert pair.verifier.generate([sample], 6)[0].ids.tolist() == said.tolist()
    pair.verifier.extend(state, torch.tensor([5, 6, 7]))
    pair.verifier.rollback(state, ids.shape[1])  # rolled back and grown as if nothing had been
    assert pair.verifier.extend(state, said[:3])[1].argmax(-1).tolist() == said[1:4].tolist()


# --- what is refused, and with which words
# ----------------------------------------------------------------------------------------


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_bin(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 half a file")


class RunsCode:
    def __reduce__(self):
        return (print, ("code ran",))


def pickle_with_code(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"lm_head.weight": RunsCode()}, protocol=2))


def not_a_number(folder):
    rewrite(folder, WEIGHTS | {"model.visual_projector.0.bias": torch.full((64,), float("nan"))})


def one_missing(folder):
    rewrite(
        folder,
        {name: tensor for name, tensor in WEIGHTS.items() if name != "model.feature_adaptor.bias"})


def one_too_many(folder):
    rewrite(folder, WEIGHTS | {"model.second_adaptor.weight": torch.zeros(2)})


def one_of_another_shape(folder):
    rewrite(folder, WEIGHTS | {"model.visual_projector.0.weight": torch.zeros(64, 48)})


def no_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


def marks_without_tokens(folder):
    change_config(folder, mm_use_im_start_end=True)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(no_weights, "no weights in .*expected model.safetensors, pytorch_model.bin or a shard index"),
     (truncate, r"is truncated or no safetensors file \(764672 bytes; .*\); download it again"),
     (cut_header, r"is truncated or no safetensors file \(100 bytes; .*\); download it again"),
     (broken_bin, "pytorch_model.bin is truncated or damaged"),
     (pickle_with_code,
      "holds more than tensors and was not unpickled, because that could run code"),
     (not_a_number, "model.visual_projector.0.bias holds NaN or infinity after loading"),
     (one_missing, r"1 missing \(model.feature_adaptor.bias\)"),
     (one_too_many, r"1 unexpected \(model.second_adaptor.weight\)"),
     (one_of_another_shape, r"model.visual_projector.0.weight is \[64, 48\], expected \[64, 32\]"),
     (no_tokenizer, "holds no tokenizer.json or tokenizer.model"),
     (marks_without_tokens, "have no <ev_start> and <ev_end>"),
     (lambda folder: change_config(folder, model_type="llama"),
      "of model type 'llama' but the drafter must be 'EventChat_llama'"),
     (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
     (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),],
)
def test_a_damaged_drafter_is_refused(tmp_path, capsys, damage, sentence):
    folder = copy_of_reference(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence):
        loading.load_drafter(folder, vision_tower=CLIP)
    assert capsys.readouterr().out == ""


def test_a_tower_path_of_another_machine_is_explained(tmp_path):
    folder = copy_of_reference(tmp_path)
    rewrite(folder, without_tower())
    with pytest.raises(
            CheckpointError, match=
            r"'./checkpoints/clip-vit-large-patch14-336', is not on this machine .* pass "
            r"vision_tower="
    ):
        loading.load_drafter(folder)
    with pytest.raises(CheckpointError, match="is no folder; give the folder of the CLIP model"):
        loading.load_drafter(folder, vision_tower=tmp_path / "nowhere")


def test_a_tower_that_nothing_describes_is_explained():
    with pytest.raises(CheckpointError,
                       match=r"does not say how its vision tower is built .*pass vision_tower"):
        loading.load_drafter(REFERENCE)


def test_a_clip_of_another_width_is_refused(tmp_path):
    folder = copy_of_reference(tmp_path)
    rewrite(folder, without_tower())
    clip = folder / "tiny_clip"
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(CheckpointError,
                       match=r"visual_projector.0.weight is \[64, 32\], expected \[64, 48\]"):
        loading.load_drafter(folder, vision_tower=clip)
    (clip / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError,
                       match=r"the CLIP in .* does not fit this checkpoint: 16 missing"):
        loading.load_drafter(folder, vision_tower=clip)


def test_a_verifier_that_is_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is an EventGPT checkpoint, the drafter"):
        loading.load_verifier(REFERENCE)
    folder = shutil.copytree(pair_folder() / "verifier", tmp_path / "verifier")
    change_config(folder, model_type="llama")
    with pytest.raises(
            CheckpointError,
            match="of model type 'llama', which transformers does not know as an image-text model"):
        loading.load_verifier(folder)
    change_config(folder, model_type="qwen2_vl")
    with pytest.raises(CheckpointError,
                       match=r"does not read a video as plain frames|does not know"):
        loading.load_verifier(folder)


def test_a_verifier_with_a_missing_or_misshapen_tensor_is_refused(tmp_path):
    folder = shutil.copytree(pair_folder() / "verifier", tmp_path / "verifier")
    weights = load_file(folder / "model.safetensors")
    norm = next(
        name for name in weights
        if "language_model" in name and name.endswith("norm.weight") and "layers" not in name)
    rewrite(folder, {name: tensor for name, tensor in weights.items() if name != norm})
    with pytest.raises(
            CheckpointError, match=
            r"does not fit VideoLlavaForConditionalGeneration: 1 missing "
            r"\(model.language_model.norm.weight\)"
    ):
        loading.load_verifier(folder)
    rewrite(folder, weights | {norm: torch.ones(16)})
    with pytest.raises(CheckpointError,
                       match=r"model.language_model.norm.weight is \[16\], expected \[32\]"):
        loading.load_verifier(folder)


def test_a_pair_whose_tokenizers_disagree_is_refused(tmp_path):
    folder = shutil.copytree(pair_folder(), tmp_path / "pair")
    path = folder / "verifier" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = (next(token for token, i in vocabulary.items() if i == wanted)
                  for wanted in (260, 261))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(
            PairError,
            match=r"the tokenizers disagree: id 260 is .* to the drafter and .* to the verifier"):
        loading.load_pair(folder)


def test_a_pair_whose_answers_end_differently_is_refused(tmp_path):
    folder = shutil.copytree(pair_folder(), tmp_path / "pair")
    path = folder / "verifier" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 7}))
    with pytest.raises(
            PairError,
            match=r"the end-of-answer ids differ: \[2\] for the drafter, \[7\] for the verifier"):
        loading.load_pair(folder)


def test_a_folder_that_is_no_pair_is_explained(tmp_path):
    with pytest.raises(
            CheckpointError,
            match=r"no pair at .*give 'embedded', 'smollm2' or a folder with drafter/"):
        loading.load_pair(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint folder at .*drafter"):
        loading.load_pair(tmp_path)
