"""A few rows at a time: the arranged weights compute what transformers' own decoder computes, on a
cache that grows and shrinks."""

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from transformers import DynamicCache

from xsd.models import small_steps

SAMPLE = make_samples(1, seed=3)[0]


@pytest.mark.parametrize("role", ["drafter", "verifier"])
@torch.no_grad()
def test_states_equal_transformers_decoder_through_growth_and_rollback(role):
    handle = getattr(tiny_pair(), role)
    state, plain = handle.prefill(SAMPLE), DynamicCache(config=handle.decoder.config)
    assert isinstance(state.cache, small_steps.GrowingCache)
    prompt = handle.prompt_embeddings(SAMPLE)[None]
    handle.decoder(inputs_embeds=prompt, past_key_values=plain, use_cache=True)
    generator = torch.Generator().manual_seed(0)
    for rows, keep in ((1, 1), (6, 2), (90, 90), (3, 0), (1, 1)):  # 90 rows outgrow the buffer
        ids = torch.randint(3, 300, (rows,), generator=generator)
        own = handle.extend(state, ids)[0]
        theirs = handle.decoder(inputs_embeds=handle._lookup(ids)[None], past_key_values=plain,
                                use_cache=True).last_hidden_state[0]
        torch.testing.assert_close(own, theirs, atol=2e-5, rtol=0)
        handle.rollback(state, state.length - rows + keep)
        if keep < rows:
            plain.crop(keep - rows)
        assert state.cache.get_seq_length() == plain.get_seq_length() == state.length


def test_only_plain_float32_llamas_are_taken():
    decoder = tiny_pair().verifier.decoder
    assert small_steps.fits(decoder)
    assert not small_steps.fits(torch.nn.Linear(2, 2))
    decoder.config.hidden_act, before = "gelu", decoder.config.hidden_act
    try:
        assert not small_steps.fits(decoder)
    finally:
        decoder.config.hidden_act = before


def test_a_changed_weight_is_noticed():
    handle = tiny_pair().drafter
    weight = handle.decoder.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    token = torch.tensor([5])
    state = handle.prefill(SAMPLE)
    before = handle.extend(state, token)[0].clone()
    try:
        with torch.no_grad():
            weight.mul_(0.5)
        assert not torch.allclose(
            handle.extend(handle.prefill(SAMPLE), token)[0], before, atol=1e-3)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
