"""Cosines and the LM head in pieces against plain computations; what may not enter."""

import math

import pytest
import torch
from evaluate_examples import random_states
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.evaluate.kernels import cosines, head_tokens


def test_bf16_states_are_accumulated_in_float32():
    aligned, target, mask, _ = random_states(3, d=4096, dtype=torch.bfloat16)
    exact = torch.nn.functional.cosine_similarity(aligned.double(), target.double(), dim=-1)
    off = (cosines(aligned, target, mask) - exact)[mask].abs().max()
    assert off < 1e-5  # bf16 accumulation would be off by 1e-2


def test_padding_may_hold_anything():
    aligned, target, mask, _ = random_states(5)
    clean = cosines(aligned, target, mask)
    aligned[~mask], target[~mask] = math.nan, 0.0
    assert torch.equal(cosines(aligned, target, mask)[mask], clean[mask])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(7)))
def test_how_a_set_is_cut_into_batches_does_not_change_a_bit(seed, order):
    aligned, target, mask, _ = random_states(seed, dtype=torch.bfloat16, d=33)
    whole = cosines(aligned, target, mask)
    for i in order:
        n = int(mask[i].sum())
        alone = cosines(aligned[i:i + 1, :n], target[i:i + 1, :n], mask[i:i + 1, :n])
        assert torch.equal(alone[0], whole[i, :n])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(lambda a, t, m: (a[:, :-1], t, m), "aligned states has shape .* but the target states has"),
     (lambda a, t, m: (a, t, m[:, :-1]), "the mask has shape"),
     (lambda a, t, m: (a, t, m.float()), "must be bool"),
     (lambda a, t, m: (a, t, m & False), r"rows \[0, 1, 2, 3, 4\] have no real position"),
     (lambda a, t, m: (a, t, torch.ones_like(m) ^ (torch.arange(6) == 0)),
      "padding before a real position"),
     (lambda a, t, m: (a.index_fill(1, torch.tensor([0]), math.nan), t, m),
      "the aligned state at sample 0, position 0 .* NaN"),
     (lambda a, t, m: (a, t.index_fill(1, torch.tensor([0]), 0.0), m),
      "the target state at sample 0, position 0 .* zero vector"),
     (lambda a, t, m: (a[0], t, m), r"must be \[B, S, D\]")])
def test_bad_states_are_named(break_it, message):
    with pytest.raises(MetricError, match=message):
        cosines(*break_it(*random_states(1)[:3]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 60), k=st.integers(1, 7),
       rows=st.integers(1, 12))
def test_head_in_pieces_equals_the_whole_head(seed, chunk, k, rows):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(9, 16, generator=g), torch.randn(50, 16, generator=g)
    targets = torch.randint(0, 50, (9,), generator=g)
    logits = hidden @ weight.T
    out = head_tokens(hidden, weight, top_k=k, targets=targets, chunk=chunk, rows=rows)
    values, ids = logits.topk(k, dim=1)
    assert torch.equal(out.top_ids, ids)
    torch.testing.assert_close(out.top_logits, values)
    torch.testing.assert_close(out.logsumexp, logits.logsumexp(1))
    torch.testing.assert_close(out.cross_entropy,
                               torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_a_tie_goes_to_the_lower_id_and_ids_beyond_the_vocabulary_are_never_drafted():
    weight = torch.ones(10, 4)
    weight[9] = 5.0
    out = head_tokens(torch.ones(2, 4), weight, chunk=3, vocabulary=9)
    assert out.top_ids.flatten().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"hidden": torch.ones(2, 5), "weight": torch.ones(8, 4)},
      r"the LM head is \[8, 4\] .* widths must agree"),
     ({"hidden": torch.full((2, 4), float("nan")), "weight": torch.ones(8, 4)}, "NaN"),
     ({"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "top_k": 9},
      "top_k must be between 1 and the vocabulary's 8"),
     ({"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "targets": torch.tensor([1, 8])},
      "outside the head's 8 tokens"),
     ({"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "targets": torch.tensor([1, -1])},
      "outside the head's 8 tokens"),
     ({"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "targets": torch.tensor([1])},
      "one token id for each state")])
def test_wrong_heads_are_named(arguments, message):
    with pytest.raises(MetricError, match=message):
        head_tokens(**arguments)
