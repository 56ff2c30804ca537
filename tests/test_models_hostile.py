"""A checkpoint that somebody sends may fail, in one sentence; it may not run anything, read outside
its folder, take the machine down, or load as something else than its files say."""

import json
import os
import resource
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from models_fixtures import pair_folder, tiny_pair
from safetensors.torch import load_file, save_file
from tiny_pair import make_samples

from xsd import core
from xsd.models import checkpoint_files, full_size, loading, settings

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n"
PAGE = "<!DOCTYPE html>\n<html>Access denied</html>\n"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(pair_folder() / "drafter", tmp_path / "drafter")


@pytest.fixture
def pair(tmp_path):
    return shutil.copytree(pair_folder(), tmp_path / "pair")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def config(**fields):
    return lambda folder: change(folder / "config.json", **fields)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(change):
    def done(folder):
        changed = change(weights_of(folder))
        (folder / "model.safetensors").unlink()
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return done


def split(folder, *, twice=False, rename=str):
    """The weights as two shards and an index."""
    found = weights_of(folder)
    names = sorted(found)
    parts = {"model-00001-of-00002.safetensors": names[:9],
             "model-00002-of-00002.safetensors": names[9:]}
    for part, some in parts.items():
        extra = {names[0]: found[names[0]] + 1} if twice and "2-of" in part else {}
        save_file({name: found[name] for name in some} | extra, folder / part, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {name: rename(part) for part, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return found


def stale_single_file(folder):
    found = split(folder)
    save_file({name: found[name] for name in sorted(found)[:9]}, folder / "model.safetensors")


def as_bin(value):
    def done(folder):
        torch.save(value(weights_of(folder)), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return done


def bin_beside(folder):
    torch.save(weights_of(folder), folder / "pytorch_model.bin")


def compressed_bin(folder):
    as_bin(dict)(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin") as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as small:
        for name, data in entries.items():
            small.writestr(name, data)


def splitting(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replacing(pattern, content):
    kind = "String" if pattern.isalnum() else "Regex"
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def adapter_left_over(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def adapter_alone(folder):
    adapter_left_over(folder)
    (folder / "model.safetensors").unlink()


def link_to_outside(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    os.symlink(folder.parent / "elsewhere.safetensors", folder / "model.safetensors")


def pipe_as_config(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def template_elsewhere(folder):
    (folder / "additional_chat_templates").mkdir()
    os.symlink("/etc/hostname", folder / "additional_chat_templates" / "tool.jinja")


def link_to_itself(folder):
    (folder / "config.json").unlink()
    os.symlink("config.json", folder / "config.json")


def header_that_lies(folder):
    path = folder / "model.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + path.read_bytes()[8:])


@pytest.mark.parametrize(("damage", "sentence"), [
    # which weights are meant
    (stale_single_file, r"holds its weights more than once \(model.safetensors, model.safetensors"),
    (bin_beside, r"more than once \(model.safetensors, pytorch_model.bin\); move away what is out"),
    (lambda folder: split(folder, twice=True), "which another shard holds, too"),
    (lambda folder: split(folder, rename=lambda part: f"../{part}"), "its own folder alone"),
    (lambda folder: split(folder, rename=lambda part: str(folder / part)), "its own folder alone"),
    (lambda folder: split(folder, rename=lambda part: 5), "is not a shard index"),
    (link_to_outside, "is a link to .*elsewhere.safetensors, outside its folder"),
    (template_elsewhere, "is a link to /etc/hostname, outside its folder"),
    (pipe_as_config, "is no regular file"),
    (link_to_itself, "is no regular file"),
    # what was saved there
    (adapter_left_over, "holds adapter_config.json beside its weights"),
    (adapter_alone, r"holds a LoRA adapter \(adapter_config.json\), not a whole model"),
    (rewrite(lambda found: {f"base_model.model.{name}": found[name] for name in found}),
     r"names of PEFT or of a training wrapper; merge adapters \(merge_and_unload\)"),
    (rewrite(lambda found: {f"module.{name}": found[name] for name in found}), "unwrap the model"),
    (rewrite(lambda found: found | {"lm_head.weight": found["lm_head.weight"].long()}),
     "stores lm_head.weight as I64; weights in float16"),
    (as_bin(lambda found: {"state_dict": found}), r"no state dict .*\(it holds state_dict\)"),
    (as_bin(lambda found: found | {"epoch": 3}), "is no state dict of names and tensors"),
    (as_bin(lambda found: [1]), r"it holds list\)"),
    (compressed_bin, "is compressed, which torch never does"),
    (header_that_lies, "is truncated or no safetensors file"),
    (config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
     "asks for 4-bit weights .*pass --quant 4bit or 8bit, or delete quantization_config"),
    (config(quantization_config={"quant_method": "gptq"}), "quantised .*method 'gptq'.*not read"),
    (config(vision_config={"quantization_config": {"quant_method": "fp8"}}), "method 'fp8'"),
    *((write(name, POINTER), f"{name} is a git-lfs pointer .*run git lfs pull")
      for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                   "generation_config.json", "preprocessor_config.json")),
    *((write(name, PAGE), f"{name} is a web page") for name in ("model.safetensors",
                                                               "tokenizer.json")),
    # sizes
    (config(num_hidden_layers=10**7), "num_hidden_layers is 10000000; a whole number from 1 to"),
    (config(hidden_size=10**9), "hidden_size is 1000000000"),
    (config(hidden_size=32.5), "hidden_size is 32.5; a whole number"),
    (config(num_attention_heads=0), "num_attention_heads is 0"),
    (config(vocab_size=10**8), r"a model of 6.4e\+09 numbers, but the weights hold"),
    (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan, which no model computes with"),
    (config(vision_config={"image_size": 10**6}), "image_size is 1000000"),
    (config(hidden_act="os.system"), "config.json could not be loaded"),
    (write("config.json", "[" * 200_000), "nested too deep"),
    (config(x=[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]), "is nested too deep"),
    (write("config.json", "[1]"), "is no JSON object but a list"),
    (write("tokenizer.json", "{}"), "tokenizer.json could not be loaded"),
    (lambda folder: change(folder / "tokenizer.json", pre_tokenizer=splitting("(a+)+$")),
     r"splits by the pattern '\(a\+\)\+\$', which some texts could keep busy for ever"),
    (write("tokenizer_config.json", json.dumps({"added_tokens_decoder": dict.fromkeys(
        map(str, range(30_000)))})), "adds tokens without a bound; up to 20000"),
    *((write("tokenizer_config.json", json.dumps({key: ["../tokenizer.4.0.0.json"]})),
       "names files of its own choice") for key in ("init_inputs", "fast_tokenizer_files")),
    (write("preprocessor_config.json", '{"size": 28, "image_std": [1, 1, 0]}'), "sets image_mean"),
    (write("preprocessor_config.json", '{"size": 28, "rescale_factor": 1}'), "rescale_factor=1;"),
    (write("preprocessor_config.json", '{"size": 1000000, "crop_size": 28}'), "size=1000000"),
    # what the engine cannot do
    (config(sliding_window=16), "sets sliding_window=16: layers that see a window of the text"),
    (config(attention_chunk_size=16), "sets attention_chunk_size=16"),
    (config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
     "sets rope_type='dynamic', rope_theta=10000.0, .* whole rotations of default, linear, llama3"),
    (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta=0"),
    *((config(**old, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), sentence)
      for old, sentence in (({"rope_theta": 5.0}, "says rope_theta=5.0 beside another rope_param"),
                            ({"rope_scaling": {"type": "linear", "factor": 2.0}},
                             "says type='linear' beside another rope_parameters; of the two"))),
    (config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5; whole rotations"),
    *((lambda folder, end=end: change(folder / "generation_config.json", eos_token_id=end),
       f"the end of an answer is {end!r}, but an id from 0 to 399")
      for end in ("</s>", -1, 10**9, True)),
])
def test_what_a_folder_may_not_be(folder, damage, sentence):
    damage(folder)
    with pytest.raises(core.CheckpointError, match=sentence):
        loading.load_drafter(folder)


def test_a_config_bomb_takes_neither_memory_nor_time(pair):
    config(num_hidden_layers=64, hidden_size=10**6, intermediate_size=10**7,
           num_attention_heads=1, num_key_value_heads=1, head_dim=64)(pair / "drafter")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(core.CheckpointError, match=r"a model of 1.92e\+15 numbers"):
        loading.load_pair(pair)
    assert full_size.sizes(pair)[0].total > 10**15  # a plan counts it
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB


@pytest.mark.parametrize("name", ["transformers_weights", "attn_implementation", "auto_map",
                                  "return_dict", "torchscript", "dtype", "num_labels"])
def test_settings_of_code_files_and_passes_are_not_read(folder, name):
    """Whatever config.json says about which code to run or which file to read, the files that
    were checked are loaded and computed with as ever."""
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "other.safetensors")
    value = {"transformers_weights": "other.safetensors", "auto_map": {"AutoConfig": "evil.C"},
             "attn_implementation": "someone/kernels", "dtype": "nonsense",
             "num_labels": 10**9}.get(name, name == "torchscript")
    config(**{name: value})(folder)
    handle = loading.load_drafter(folder)
    assert handle.weights_hash() == tiny_pair().drafter.weights_hash()
    sample = make_samples(1)[0]
    assert torch.equal(handle.generate([sample], 4)[0].ids,
                       tiny_pair().drafter.generate([sample], 4)[0].ids)


def test_a_tokenizers_own_code_does_not_run_and_nobody_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass T: pass\n")
    change(folder / "tokenizer_config.json", tokenizer_class="T",
           auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    with pytest.raises(core.CheckpointError, match=r"tokenizer.json could not be loaded"):
        loading.load_drafter(folder)
    assert not (folder / "ran").exists()


def test_a_hub_cache_of_links_loads(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.move(path, blobs / f"{path.name}0")
        os.symlink(f"../../blobs/{path.name}0", snapshot / path.name)
    assert loading.load_drafter(snapshot).weights_hash() == tiny_pair().drafter.weights_hash()


def test_an_index_of_the_one_file_beside_it_loads(folder):
    names = dict.fromkeys(weights_of(folder), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert loading.load_drafter(folder).weights_hash() == tiny_pair().drafter.weights_hash()


def test_a_quantisation_left_in_the_file_gives_way_to_the_one_asked_for(folder):
    config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(folder)
    found = checkpoint_files.read_config(folder, "8bit")
    assert found["quantization_config"] is None


@pytest.mark.parametrize(("said", "sentence"), [
    ([1], "is no JSON object but a list"), ({"drafter": 5}, "drafter is '5'"),
    ({"n_event_frames": 10**9}, "n_event_frames is '1000000000'"),
    ({"n_event_frames": True}, "n_event_frames 1 … 64"), ({"event_canvas": "x"}, "slice or sensor"),
    ({"name": {"a": 1}}, "name is"), ({"vision_tower": "gone"}, "gone is no folder")])
def test_a_pair_json_that_cannot_be_is_refused(pair, said, sentence):
    (pair / "pair.json").write_text(json.dumps(said))
    with pytest.raises(core.CheckpointError, match=sentence):
        loading.load_pair(pair)


def test_a_tower_is_sought_from_the_pairs_folder_on(pair, tmp_path, monkeypatch):
    found = weights_of(pair / "drafter")
    tower = "model.visual_tower.visual_tower."
    rewrite(lambda found: {name: found[name] for name in found if not name.startswith(tower)})(
        pair / "drafter")
    described = json.loads((pair / "drafter" / "config.json").read_text())
    (pair / "clip").mkdir()
    (pair / "clip" / "config.json").write_text(json.dumps(described["vision_config"]))
    save_file({name.removeprefix(tower): found[name] for name in found if name.startswith(tower)},
              pair / "clip" / "model.safetensors")
    config(vision_config=None, mm_visual_tower="openai/clip")(pair / "drafter")
    change(pair / "pair.json", vision_tower="clip")
    monkeypatch.chdir(tmp_path)
    assert loading.load_pair(pair).drafter.weights_hash() == tiny_pair().drafter.weights_hash()
    change(pair / "pair.json", vision_tower="../pair/clip")
    assert loading.load_pair(pair).name == "tiny"


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"video_token_index": 7}, "<video> is id 7 to config.json and 401 to the tokenizer"),
    ({"vision_feature_layer": 99}, "reads vision_feature_layer 99 of a tower with 3 layers"),
    ({"text_config": {"model_type": "mpt"}}, "decoder of type 'mpt'; caches are rolled back"),
    ({"text_config": {"model_type": "mamba"}}, "decoder of type 'mamba'"),
    ({"text_config": {"model_type": "nobody"}}, "config.json could not be loaded"),
    ({"text_config": 5}, "config.json could not be loaded")])
def test_a_verifier_that_the_engine_cannot_run_is_refused(pair, fields, sentence):
    change(pair / "verifier" / "config.json", **fields)
    with pytest.raises(core.CheckpointError, match=sentence):
        loading.load_verifier(pair / "verifier")
    with pytest.raises(core.CheckpointError):
        loading.load_pair(pair)
    if "text_config" in fields:
        with pytest.raises(core.CheckpointError, match=sentence):
            full_size.sizes(pair)


def test_a_tensor_under_an_old_and_a_new_name_is_refused(pair):
    rewrite(lambda found: found | {"lm_head.weight": found["language_model.lm_head.weight"] + 1})(
        pair / "verifier")
    with pytest.raises(core.CheckpointError, match="one stands there under two names"):
        loading.load_verifier(pair / "verifier")


def test_no_end_of_answer_anywhere_is_refused(folder):
    config(eos_token_id=None)(folder)
    change(folder / "generation_config.json", eos_token_id=[])
    change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(core.CheckpointError, match="the end of an answer is None"):
        loading.load_drafter(folder)


def test_generation_settings_are_said_and_not_used(pair):
    change(pair / "verifier" / "generation_config.json", repetition_penalty=2.0, min_new_tokens=40,
           no_repeat_ngram_size=2, num_beams=4, do_sample=True, use_cache=False, top_p=1.0,
           return_dict_in_generate=True, custom_generate="./")
    with pytest.warns(UserWarning, match=r"generation_config.json sets repetition_penalty=2.0, .*"
                                         r"do_sample=True.*: not used"):
        handle = loading.load_verifier(pair / "verifier")
    assert "top_p" not in handle.unused_settings and "use_cache" not in handle.unused_settings
    settings = handle.model.generation_config
    assert settings.repetition_penalty is settings.num_beams is settings.do_sample is None
    with warnings.catch_warnings(action="error"):
        loading.load_verifier(pair_folder() / "verifier")


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("pre_tokenizer", splitting("a?a?a?a?aaaa"), "splits by the pattern"),
    ("pre_tokenizer", splitting("[a]+[ab]+c"), "splits by the pattern"),
    ("normalizer", {"type": "Sequence", "normalizers": [replacing("(?=x)", "")]}, "by the pattern"),
    ("decoder", replacing("x{1,9}", ""), "splits by the pattern"),
    ("normalizer", {"type": "Sequence", "normalizers": [replacing("a", "aaa")] * 40},
     "may make a text .* times as long"),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}, "kind 'Precompiled'"),
    ("normalizer", {"type": "Prepend", "prepend": "a" * 20_000}, "has rules of 20... characters"),
    ("model", {"type": "BPE", "vocab": {"a" * 1001: 0}}, "has a token of 1001 characters"),
    ("model", {"type": "BPE", "vocab": {}, "dropout": 0.5}, "draws its tokens at random"),
])
def test_rules_of_a_tokenizer_are_bounded_before_they_are_compiled(name, value, sentence):
    with pytest.raises(core.CheckpointError, match=f"t.json .*{sentence}"):
        settings.check_rules({name: value}, Path("t.json"))


@pytest.mark.parametrize("pattern", [
    "\n", r"\s?\p{L}+", "[\r\n]", "[一-龥ࠀ-一]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"])
def test_the_rules_of_known_tokenizers_are_read(pattern):
    llama = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                 replacing(" ", "▁")]}
    decoder = {"type": "Sequence", "decoders": [replacing("▁", " "), {"type": "Fuse"}, {
        "type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    settings.check_rules({"normalizer": llama, "decoder": decoder,
                          "pre_tokenizer": splitting(pattern)}, Path("t.json"))


def test_an_added_token_beyond_the_embedding_is_answered_when_it_is_said(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({
        "id": 5000, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True})
    path.write_text(json.dumps(tokenizer))
    handle = loading.load_drafter(folder)
    handle.prompt_ids("What is near?")
    with pytest.raises(core.CheckpointError, match="tokenizer says id 400, but the model has 400"):
        handle.prompt_ids("What is <far> away?")
