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
                       match="quantisation '3bit' is unknown; choose '4bit', '8bit' or none"):
        loading.load_drafter(REFERENCE, vision_tower=CLIP, quant="3bit")


def test_peak_memory_is_of_this_process():
    assert quantization.peak_memory_bytes("cpu") > 50_000_000
