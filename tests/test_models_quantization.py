"""Quantisation touches the decoder's linear layers and nothing else."""

import pytest
import torch
from models_fixtures import CLIP, REFERENCE
from tiny_pair import make_samples, make_tiny_pair

from xsd.core import ParameterError
from xsd.models import loading, quantization


@pytest.mark.parametrize("role", ["drafter", "verifier"])
def test_nf4_leaves_towers_projector_and_head_alone(role, tmp_path):
    folder = make_tiny_pair(tmp_path, hidden_size=64) / role  # bitsandbytes' blocks are 64 wide
    load = loading.load_drafter if role == "drafter" else loading.load_verifier
    handle = load(folder, quant="4bit", dtype="float32")
    before = handle.weights_hash()
    for name, formats in quantization.dtype_map(handle.model).items():
        if name in ("model.layers", "model.language_model"):
            assert formats["uint8"] > 0, name
        else:
            assert set(formats) == {"float32"}, name
    whole = load(folder)
    assert quantization.weight_bytes(handle.model) < quantization.weight_bytes(whole.model)
    sample = make_samples(1)[0]
    torch.testing.assert_close(handle.visual_tokens(sample), whole.visual_tokens(sample))
    answer = handle.generate([sample], 4)[0]
    assert torch.equal(handle.lm_head(answer.hidden).argmax(-1), answer.ids)
    assert handle.weights_hash() == before != whole.weights_hash()


def test_eight_bit_configuration_names_the_same_modules():
    config = quantization.quantization_config("8bit", torch.float16)
    assert config.load_in_8bit and set(quantization.KEPT_WHOLE) <= set(config.llm_int8_skip_modules)


def test_unknown_formats_are_refused():
    with pytest.raises(ParameterError, match="dtype 'int4' is unknown; choose one of float32"):
        quantization.dtype_of("int4")
    with pytest.raises(ParameterError,
                       match="quantisation '3bit' is unknown; choose '4bit', '8bit'"):
        loading.load_drafter(REFERENCE, vision_tower=CLIP, quant="3bit")


def test_peak_memory_is_of_this_process():
    assert quantization.peak_memory_bytes("cpu") > 50_000_000


def test_int4_without_torchao_is_one_sentence(monkeypatch):
    monkeypatch.setattr(quantization, "is_torchao_available", lambda: False)
    with pytest.raises(ParameterError, match=r"torchao, which is not installed; pip install "
                                             r"'xsd\[int4\]', or give '4bit'"):
        quantization.quantization_config("int4", torch.bfloat16)


@pytest.mark.skipif(not quantization.is_torchao_available(),
                    reason="int4 needs torchao (pip install 'xsd[int4]'), which is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int4_packs_the_decoders_linear_layers_alone(dtype, tmp_path):
    folder = make_tiny_pair(tmp_path, hidden_size=64) / "verifier"
    handle = loading.load_verifier(folder, quant="int4", dtype=dtype)
    formats = quantization.dtype_map(handle.model)
    assert formats["model.language_model"]["uint8"] > 0 and "uint8" not in {
        one for name, found in formats.items() if name != "model.language_model" for one in found}
    assert handle.steps == "plain"
    whole = loading.load_verifier(folder, dtype=dtype)
    assert quantization.weight_bytes(handle.model) < quantization.weight_bytes(whole.model)
    assert handle.weights_hash() == handle.weights_hash() != whole.weights_hash()
    sample = make_samples(1)[0]
    static = handle.plain("static")
    state, other, ids = handle.prefill(sample), static.prefill(sample), torch.tensor([5, 6, 7])
    torch.testing.assert_close(handle.extend(state, ids)[1], static.extend(other, ids)[1],
                               atol=1e-5 if dtype == "float32" else 0.2, rtol=0)
