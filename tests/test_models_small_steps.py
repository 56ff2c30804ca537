"""A few rows at a time: the arranged weights compute what transformers' own decoder computes, on a
cache that grows and shrinks."""

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from transformers import DynamicCache, LlamaConfig, LlamaModel

from xsd.models import batched, small_steps

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


def grouped(dtype=torch.float32):
    """A decoder whose four query heads share two heads of keys."""
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return LlamaModel(config).to(dtype).eval()


def through(decoder, ids, *, own, fed=(), parents=None):
    """States [n, D] of a draft behind a prompt, by our steps or by transformers' own, and what
    enters layer 1."""
    cache, record = DynamicCache(config=decoder.config), {1: None}
    decoder(input_ids=torch.arange(9)[None], past_key_values=cache, use_cache=True)
    embeds = decoder.embed_tokens(ids)
    if not own:
        given = {} if parents is None else tree_inputs(parents, 9, embeds.dtype)
        with batched.recorded(decoder, [1]) as entered:
            states = decoder(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True,
                             **given).last_hidden_state
        return states[0], entered[0][0], cache.get_seq_length()
    steps = small_steps.Steps(decoder)
    steps._fed = dict(fed)
    prompt = decoder.embed_tokens(torch.arange(9))
    _, taken = steps.prefill(prompt)
    return steps(embeds, taken, parents, record), record[1], taken.get_seq_length()


def tree_inputs(parents, start, dtype):
    places, seen = small_steps.tree_rows(parents, start)
    hide = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"position_ids": places[None], "attention_mask": hide[None, None]}


@pytest.mark.parametrize("parents", [None, [-1, 0, 0, 1, 1]])
@pytest.mark.parametrize("fed", [{}, {5: 8}])
@torch.no_grad()
def test_shared_keys_padded_rows_and_trees_give_transformers_states(parents, fed):
    decoder, ids = grouped(), torch.tensor([7, 20, 33, 4, 8])
    own, theirs = (through(decoder, ids, own=which, fed=fed, parents=parents)
                   for which in (True, False))
    for ours, expected in zip(own[:2], theirs[:2], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert own[2] == theirs[2] == 14  # what was fed too many is not remembered


@pytest.mark.parametrize("n", [1, 2, 40])
@torch.no_grad()
def test_a_prompt_leaves_what_transformers_prefill_leaves(n):
    for decoder in (grouped(), tiny_pair().verifier.decoder):
        prompt = decoder.embed_tokens(torch.arange(n) + 5)
        cache = DynamicCache(config=decoder.config)
        with batched.recorded(decoder, [0, 2]) as entered:
            states = decoder(inputs_embeds=prompt[None], past_key_values=cache,
                             use_cache=True).last_hidden_state[0]
        near = {"atol": 1e-4, "rtol": 1e-4}
        record = {0: prompt, 2: prompt}
        last, own = small_steps.Steps(decoder).prefill(prompt, record)
        torch.testing.assert_close(last, states[-1], **near)
        for ours, theirs in zip((record[0], record[2]), entered, strict=True):
            torch.testing.assert_close(ours, theirs[0], **near)
        for number, layer in enumerate(cache.layers):
            torch.testing.assert_close(own.keys[number][:, :n], layer.keys[0], **near)
            torch.testing.assert_close(own.values[number][:, :n], layer.values[0], **near)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_transformers_own():
    ids = torch.randint(3, 290, (6,), generator=torch.Generator().manual_seed(0))
    rounded = grouped(torch.bfloat16)
    assert small_steps.fits(rounded)
    exact = through(rounded.float(), ids, own=False)[0]
    rounded = rounded.to(torch.bfloat16)
    ours, theirs = (through(rounded, ids, own=which)[0].float() for which in (True, False))
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


@torch.no_grad()
def test_packed_weights_give_the_same_states():
    steps = small_steps.Steps(grouped())
    prompt, embeds = torch.randn(9, 64), torch.randn(6, 64)
    expected = steps(embeds, steps.prefill(prompt)[1])
    steps._packed = steps._pack()
    if not steps._packed:
        pytest.skip("this build of torch packs no weights")
    steps._wide = set(small_steps._WIDTHS)
    torch.testing.assert_close(steps(embeds, steps.prefill(prompt)[1]), expected, atol=1e-5, rtol=0)
    assert steps._timed().keys() == set(small_steps._WIDTHS)


def test_a_wider_pass_is_fed_only_where_it_is_cheaper_by_more_than_noise():
    assert small_steps._cheapest({1: 1.0, 2: 2.1, 4: 1.7, 8: 1.8}) == {2: 4}
    assert small_steps._cheapest({1: 1.0, 2: 1.8, 4: 1.7}) == {}


def test_only_small_llamas_are_taken():
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
