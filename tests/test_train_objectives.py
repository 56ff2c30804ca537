"""Objectives against plain loops, their gradients, the mask, and the memory bound of the head."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.adapters import heads
from xsd.core import ParameterError, TrainingError
from xsd.train import objectives


def by_hand(name, a, v, token, head):
    """One position, plain arithmetic."""
    if name == "mse":
        return sum((x - y)**2 for x, y in zip(a.tolist(), v.tolist(), strict=True)) / len(a)
    if name == "cosine":
        return 1 - float(a @ v / (a.norm() * v.norm()))
    if name == "smooth_l1":
        return sum(0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in (a - v).tolist()) / len(a)
    p, q = (head @ v).softmax(0).tolist(), (head @ a).softmax(0).tolist()
    if name == "cross_entropy":
        return -float(torch.tensor(q[token]).log())
    if name == "kl":
        return sum(x * float(torch.tensor(x / y).log()) for x, y in zip(p, q, strict=True))
    accepted = sum(min(x, y) for x, y in zip(p, q, strict=True))
    return 1 - accepted if name == "total_variation" else -float(torch.tensor(accepted).log())


@pytest.mark.parametrize("name", objectives.TERMS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
       weighted=st.booleans())
def test_every_term_equals_a_plain_loop(name, seed, lengths, weighted):
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 1)
    aligned, target = torch.randn(*shape, 6, generator=g), torch.randn(*shape, 6, generator=g)
    ids, head = torch.randint(9, shape, generator=g), torch.randn(9, 6, generator=g)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    weights = torch.rand(*shape, generator=g) + 0.1 if weighted else None
    noisy = aligned.masked_fill(~mask[..., None], 1e6)  # padding has no effect
    got = objectives.Objective({name: 1.0})(noisy, target, ids, mask, head, weights)["total"]
    total = norm = 0.0
    for b, t in mask.nonzero().tolist():
        w = float(weights[b, t]) if weighted else 1.0
        total, norm = total + w * by_hand(name, aligned[b, t], target[b, t], int(ids[b, t]),
                                          head), norm + w
    assert float(got) == pytest.approx(total / norm, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", sorted(objectives.ROWS))
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_gradient_equals_autograd_over_everything(name, chunk):
    torch.manual_seed(0)
    rows = objectives.ROWS[name]
    aligned, target = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    head, ids = torch.randn(11, 5), torch.randint(11, (7,))
    weights = torch.rand(7)
    (want,) = torch.autograd.grad(
        3 * (rows(head, aligned, target, ids) * weights).sum() / weights.sum(), aligned)
    (got,) = torch.autograd.grad(
        3 * objectives.TERMS[name](aligned, target, ids, head, weights, chunk=chunk), aligned)
    torch.testing.assert_close(got, want)


def test_no_more_rows_than_a_chunk_pass_the_head():
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return hidden @ torch.ones(4, 9)

    objectives.TERMS["cross_entropy"](torch.randn(10, 4), torch.randn(10, 4),
                             torch.zeros(10, dtype=torch.long), head, chunk=4)
    heads.top_tokens(head, torch.randn(2, 5, 4), chunk=4)
    assert max(seen) == 4 and sum(seen) == 20


def test_objectives_are_composed_by_name():
    objective = objectives.parse("mse_cosine")
    assert objective.weights == {
        "mse": 1.0, "cosine": 0.5
    } and str(objective) == "mse + 0.5*cosine" and not objective.needs_head
    assert objectives.parse("0.1*smooth_l1 + 2 * kl").weights == {"smooth_l1": 0.1, "kl": 2.0}
    assert objectives.parse("tokens").needs_head


def test_unknown_terms_missing_heads_and_empty_batches_are_explained():
    with pytest.raises(
            ParameterError,
            match=r"'huber' is no term; write e.g. 'mse \+ 0.5\*cosine' with mse, cosine"):
        objectives.parse("mse + huber")
    states, ids = torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(TrainingError, match="'kl' needs the verifier's LM head"):
        objectives.parse("kl")(states, states, ids, ids == 0)
    with pytest.raises(TrainingError, match="without a real position"):
        objectives.parse("mse")(states, states, ids, ids != 0)


def test_a_term_of_ones_own_stands_beside_ours():
    objective = objectives.parse("mse + 0.5*my_terms:apart")
    assert str(objective) == "mse + 0.5*my_terms:apart" and not objective.needs_head
    aligned, target, ids = torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.zeros(1, 3).long()
    found = objective(aligned, target, ids, torch.tensor([[True, True, False]]))
    assert found["my_terms:apart"] == (aligned - target)[0, :2].abs().mean()
    assert found["total"] == found["mse"] + 0.5 * found["my_terms:apart"]
    with pytest.raises(ParameterError, match="my_terms holds no other"):
        objectives.parse("my_terms:other")
