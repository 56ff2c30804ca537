"""The levels: exact sizes, initialisation, no leak from the future, padding without effect,
drafting position by position."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xsd import core
from xsd.adapters import attention, base, registry
from xsd.core import MetricError, ParameterError

WIDTH = 16
REFERENCE_COUNTS = {
    "L1": 2_113_537, "L2": 6_324_227, "L3": 16_797_698, "L4": 100_714_497, "L5": 102_819_841,
    "B1": 102_819_841, "L5F": 169_936_897, "X1": 102_828_033,
}
ALL = [
    *registry.LEVELS, "B1 map", "L5F map", "L4 bidirectional", "L5 tokens", "B1 tokens",
    "L5F tokens", "L5F lead 0", "L5F verified", "L4 layers", "L5 layers", "L5F layers", "X1 layers"
]
VOCABULARY = 11


def make(name: str, *, drafter_size: int | None = None, seed: int = 0) -> base.Adapter:
    """An adapter whose every weight is random, so that nothing hides behind an initial zero."""
    level, _, variant = name.partition(" ")
    options = {
        "bidirectional": {"causal": False}, "tokens": {"vocab_size": VOCABULARY},
        "lead 0": {"drafter_lead": 0}, "verified": {"verified_only": True},
        "layers": {"layers": 2}, "map": {"residual_map": True},
    }.get(variant, {})
    torch.manual_seed(seed)
    adapter = registry.create_adapter(level, WIDTH, drafter_size=drafter_size, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if adapter.fuses_tokens:
        adapter.set_token_embedding(torch.randn(VOCABULARY, WIDTH))
    return adapter.eval()


def make_batch(lengths: list[int], *, drafter_size: int = WIDTH, seed: int = 0) -> core.Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return core.Batch(torch.randn(*shape, drafter_size, generator=generator),
                      torch.randn(*shape, WIDTH, generator=generator),
                      torch.randint(VOCABULARY, shape, generator=generator),
                      torch.randint(VOCABULARY, shape, generator=generator), mask,
                      [f"s{i}" for i in range(shape[0])], list(range(shape[0])), "teacher_forced",
                      )


@pytest.mark.parametrize("level", REFERENCE_COUNTS)
def test_parameter_counts_at_4096_are_the_references(level):
    with torch.device("meta"):
        assert registry.count_parameters(registry.create_adapter(level)) == REFERENCE_COUNTS[level]


def test_causal_l4_has_the_parameters_of_the_bidirectional_one():
    with torch.device("meta"):
        assert registry.count_parameters(registry.create_adapter(
            "L4", causal=False)) == REFERENCE_COUNTS["L4"]


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_bottleneck_blocks_start_as_the_identity(level):
    adapter, x = registry.create_adapter(level, WIDTH).eval(), torch.randn(2, 5, WIDTH)
    for block in adapter.blocks:
        assert torch.equal(block(x), x)
    torch.testing.assert_close(adapter(x), nn.functional.layer_norm(x, (WIDTH,)))


def test_wide_blocks_start_as_the_identity():
    adapter, x = registry.create_adapter("L3", WIDTH).eval(), torch.randn(2, 5, WIDTH)
    normed = nn.functional.layer_norm(x, (WIDTH,))
    torch.testing.assert_close(adapter(x), nn.functional.layer_norm(normed, (WIDTH,)))


def test_projections_start_as_the_identity_with_alpha_a_tenth():
    for level in ("L4", "L5", "B1", "L5F"):
        adapter = registry.create_adapter(level, WIDTH)
        assert torch.equal(adapter.projection.weight, torch.eye(WIDTH))
        assert adapter.alpha.item() == pytest.approx(0.1)


@pytest.mark.parametrize("level", [level for level in registry.LEVELS if level != "B1"])
def test_other_drafter_width_goes_through_a_linear_map(level):
    adapter = make(level, drafter_size=10)
    aligned, target, ids, mask = adapter.align(make_batch([4, 6], drafter_size=10))
    assert aligned.shape == target.shape == (2, 6 - adapter.shift, WIDTH)
    assert ids.shape == mask.shape == (2, 6 - adapter.shift)


def test_input_map_of_equal_widths_starts_as_the_identity():
    x = torch.randn(1, 3, WIDTH)
    torch.testing.assert_close(registry.create_adapter("L1", WIDTH, input_map=True).input_map(x), x)


def test_layer_equals_torchs_own_encoder_layer():
    ours = attention.TransformerLayer(WIDTH, n_heads=4, ffn=24, dropout=0.1).eval()
    theirs = nn.TransformerEncoderLayer(WIDTH, 4, 24, 0.1, "gelu", batch_first=True,
                                        norm_first=True).eval()
    pairs = [("attention_norm", theirs.norm1), ("attention_out", theirs.self_attn.out_proj),
             ("ffn_norm", theirs.norm2), ("ffn_up", theirs.linear1), ("ffn_down", theirs.linear2),
             ]
    for name, module in pairs:
        getattr(ours, name).load_state_dict(module.state_dict())
    ours.query_key_value.load_state_dict(
        {"weight": theirs.self_attn.in_proj_weight, "bias": theirs.self_attn.in_proj_bias})
    x, allowed = torch.randn(3, 7, WIDTH), base.causal_mask(7)
    torch.testing.assert_close(ours(x, allowed), theirs(x, src_mask=~allowed))


def test_the_references_loss_is_mse_plus_half_of_one_minus_cosine():
    aligned, target = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    losses = base.alignment_loss(aligned, target, mask)
    rows = [(aligned[b, t], target[b, t]) for b in range(2) for t in range(3) if mask[b, t]]
    mse = torch.stack([((a - b)**2).mean() for a, b in rows]).mean()
    cosine = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in rows]).mean()
    torch.testing.assert_close(losses["total_loss"], mse + 0.5 * (1 - cosine))
    torch.testing.assert_close(losses["cos_sim"], cosine)


def test_loss_of_nothing_is_refused():
    with pytest.raises(MetricError, match="the mask leaves none"):
        base.alignment_loss(torch.ones(1, 2, 4), torch.ones(1, 2, 4),
                            torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(MetricError, match="must have one shape"):
        base.alignment_loss(torch.ones(1, 2, 4), torch.ones(1, 3, 4))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), position=st.integers(0, 6))
def test_the_future_has_no_effect(name, seed, position):
    """Everything that does not exist when position t is drafted is replaced by noise; the
    prediction of t stays the same."""
    adapter, batch = make(name), make_batch([8, 8], seed=seed)
    other = make_batch([8, 8], seed=seed + 1)
    t = position + adapter.shift  # the verifier position that row `position` predicts
    drafter, verifier, ids = batch.drafter.clone(), batch.verifier.clone(
    ), batch.ids_by_verifier.clone()
    drafter[:, t + 1:] = other.drafter[:,
                                       t + 1:]  # drafter[t] has read tokens 0…t-1, which are known
    verifier[:, t:] = other.verifier[:, t:]
    ids[:, t:] = other.ids_by_verifier[:, t:]
    changed = core.Batch(drafter, verifier, batch.ids_by_drafter, ids, batch.mask, batch.sequence,
                         batch.index, batch.mode)
    with torch.no_grad():
        torch.testing.assert_close(
            adapter.align(changed).aligned[:, position],
            adapter.align(batch).aligned[:, position])


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
       extra=st.integers(0, 3))
def test_padding_has_no_effect(name, seed, lengths, extra):
    adapter = make(name)
    batch = make_batch([max(lengths) + extra] * len(lengths), seed=seed)
    mask = torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]
    noisy = core.Batch(batch.drafter.masked_fill(~mask[..., None], 1e3),
                       batch.verifier.masked_fill(~mask[..., None], -1e3), batch.ids_by_drafter,
                       batch.ids_by_verifier, mask, batch.sequence, batch.index, batch.mode,
                       )
    for training in (
            False,
            True):  # train mode shows the bidirectional L4 as it is trained; dropout is silenced
        adapter.train(training)
        for module in adapter.modules():
            if hasattr(module, "dropout"):
                module.dropout = nn.Dropout(0.0) if isinstance(module.dropout, nn.Module) else 0.0
        with torch.no_grad():
            result = adapter.align(noisy)
            for row, length in enumerate(lengths):
                alone = core.Batch(*(x[row:row + 1, :length]
                                     for x in (batch.drafter, batch.verifier, batch.ids_by_drafter,
                                               batch.ids_by_verifier)),
                                   torch.ones(1, length, dtype=torch.bool), ["s"], [0], batch.mode,
                                   )
                want = adapter.align(alone)
                torch.testing.assert_close(result.aligned[row][result.mask[row]], want.aligned[0],
                                           atol=1e-4, rtol=1e-4)
                assert torch.equal(result.target[row][result.mask[row]], want.target[0])


@pytest.mark.parametrize("name", ALL)
def test_step_by_step_equals_the_whole_answer_at_once(name):
    adapter, batch = make(name), make_batch([6])
    with torch.no_grad():
        aligned = adapter.align(batch).aligned[0]
    for row in range(aligned.shape[0]):
        t = row + adapter.shift
        n_drafter = t + 1 if adapter.shift == 0 or adapter.drafter_lead else t
        got = adapter.step(batch.drafter[0, :n_drafter], batch.verifier[0, :t],
                           batch.ids_by_verifier[0, :t])
        torch.testing.assert_close(got, aligned[row])


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from([name for name in ALL if hasattr(make(name), "keep")]),
       turns=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=6))
def test_steps_on_kept_keys_and_values_equal_those_on_the_whole_answer(name, turns):
    """A turn takes back to a position, and reads a few others from there on."""
    adapter, kept = make(name), make(name).keep()
    states = torch.randn(2, 0, WIDTH)
    for seed, (back, n) in enumerate(turns):
        back = min(back, states.shape[1])
        new = torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(seed))
        states = torch.cat([states[:, :back], new], dim=1)
        kept.forget(back)
        size = states.shape[1]
        tokens = torch.arange(size) % VOCABULARY
        if adapter.reads != "both":
            given_states = states[0], states[0]
        else:
            ahead = torch.cat([states[0][:1]] * adapter.drafter_lead + [states[0]])
            given_states = ahead, states[1]
        torch.testing.assert_close(adapter.step(*given_states, tokens, kept),
                                   adapter.step(*given_states, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["B1", "L5F", "L5F lead 0", "L5F map", "L5F verified",
                                  "B1 tokens", "L5F tokens"])
def test_unroll_equals_feeding_predictions_back_one_by_one(name):
    adapter, batch, steps = make(name), make_batch([7, 7]), 4
    with torch.no_grad():
        results = adapter.unroll(batch.drafter, batch.verifier, steps, batch.ids_by_verifier)
    for row in range(2):
        for start in range(6):
            known = batch.verifier[row, :start + 1]
            for k in range(1, min(steps, 6 - start) + 1):
                seen = start + 1 if adapter.verified_only else len(known)
                drafter = batch.drafter[row, :seen + adapter.drafter_lead]
                predicted = adapter.step(drafter, known, batch.ids_by_verifier[row, :len(known)])
                torch.testing.assert_close(results[k - 1][row, start], predicted, atol=1e-4,
                                           rtol=1e-4)
                known = torch.cat([known, predicted[None]])


def test_tokens_of_verifier_states_are_read_off_when_not_given():
    adapter = make("B1 tokens")
    states = torch.randn(4, WIDTH)
    tokens = (states @ adapter.token_embedding.T).argmax(-1)
    assert torch.equal(adapter.step(None, states), adapter.step(None, states, tokens))


def test_what_a_step_lacks_is_named():
    with pytest.raises(ParameterError, match="L5F needs at least 3 drafter"):
        make("L5F").step(torch.randn(2, WIDTH), torch.randn(2, WIDTH))
    with pytest.raises(ParameterError, match="B1 needs at least 1 verifier"):
        make("B1").step(None, None)
    with pytest.raises(ParameterError, match="nothing to unroll"):
        make("L5").unroll(None, torch.randn(1, 2, WIDTH), 2)
    with pytest.raises(ParameterError, match="knows 4 positions"):
        registry.create_adapter("L5", WIDTH, max_positions=4)(torch.randn(1, 5, WIDTH))
    with pytest.raises(ParameterError, match="3 attention heads do not divide"):
        registry.create_adapter("L4", WIDTH, n_heads=3)
    with pytest.raises(ParameterError, match="drafter_lead must be 0"):
        registry.create_adapter("L5F", WIDTH, drafter_lead=2)


@pytest.mark.parametrize(("level", "drafter_size"), [("B1", None), ("L5F", None), ("L5F", 10)])
def test_residual_map_starts_as_the_plain_residual(level, drafter_size):
    torch.manual_seed(0)
    plain = registry.create_adapter(level, WIDTH, drafter_size=drafter_size).eval()
    mapped = registry.create_adapter(level, WIDTH, drafter_size=drafter_size,
                                     residual_map=True).eval()
    mapped.load_state_dict({**mapped.state_dict(), **plain.state_dict()})
    batch = make_batch([5], drafter_size=drafter_size or WIDTH)
    torch.testing.assert_close(mapped.align(batch).aligned, plain.align(batch).aligned)
    with pytest.raises(ParameterError, match="residual_map is for B1 and L5F"):
        registry.create_adapter("L5", WIDTH, residual_map=True)


def test_pairs_of_another_width_are_refused_in_one_sentence():
    for level, size in (("L1", 5), ("X1", 5), ("B1", WIDTH)):
        batch = make_batch([3], drafter_size=size)
        if level == "B1":
            batch = dataclasses.replace(batch, verifier=batch.verifier[..., 1:])
        with pytest.raises(ParameterError, match=f"{level} maps states 16 wide to 16 and these"):
            make(level).align(batch)
