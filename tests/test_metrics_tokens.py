"""Token metrics and the chunked LM head against plain computations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.evaluate.tokens import TokenMetrics, head_tokens


def make(seed, n=6, s=7, vocabulary=5):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (n, s), generator=g)
    predicted = torch.where(
        torch.rand(n, s, generator=g) < 0.6, ids, torch.randint(0, vocabulary, (n, s), generator=g))
    mask = torch.arange(s) < torch.randint(1, s + 1, (n,), generator=g)[:, None]
    clusters = [f"seq{int(i)}" for i in torch.randint(0, 3, (n,), generator=g)]
    return predicted, ids, mask, clusters


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
    [({"hidden": torch.ones(2, 5), "weight": torch.ones(8, 4)
       }, r"the LM head is \[8, 4\] .* widths must agree"),
     ({"hidden": torch.full((2, 4), float("nan")), "weight": torch.ones(8, 4)}, "NaN"),
     ({"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "top_k": 9
       }, "top_k must be between 1 and the vocabulary's 8"),
     ({"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "targets": torch.tensor([1, 8])
       }, "outside the head's 8 tokens"),
     ({"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "targets": torch.tensor([1])
       }, "one token id a state"),],
)
def test_wrong_heads_are_named(arguments, message):
    with pytest.raises(MetricError, match=message):
        head_tokens(**arguments)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.integers(1, 6))
def test_equals_the_plain_loop(seed, gamma):
    predicted, ids, mask, clusters = make(seed)
    metrics = TokenMetrics(gamma=gamma)
    metrics.update(predicted, ids, mask, clusters)
    result = metrics.result(n_resamples=20)
    matched = total = accepted = rounds = 0
    runs = []
    for p, v, m in zip(predicted.tolist(), ids.tolist(), mask.tolist(), strict=True):
        n = sum(m)
        hit = [p[t] == v[t] for t in range(n)]
        matched, total = matched + sum(hit), total + n
        runs.append(next((t for t in range(n) if not hit[t]), n))
        at = 0
        while at < n:  # draft, verify, take the bonus
            k = 0
            while k < gamma and at + k < n and hit[at + k]:
                k += 1
            accepted, rounds, at = accepted + k, rounds + 1, at + k + 1
    assert result.acceptance.value == pytest.approx(matched / total)
    assert result.unbroken_prefix.mean == pytest.approx(sum(runs) / len(runs))
    assert result.accepted_per_round.value == pytest.approx(accepted / rounds) == pytest.approx(
        result.rounds.mean_accepted)
    assert sum(at.survival.value * at.n for at in result.positions) == pytest.approx(sum(runs))
    assert metrics.table()["unbroken_prefix"].tolist() == runs


def test_states_through_the_head_equal_ids_given_directly_in_any_split():
    g = torch.Generator().manual_seed(0)
    aligned, weight = torch.randn(6, 7, 16, generator=g), torch.randn(40, 16, generator=g)
    _, _, mask, clusters = make(1)
    ids = (aligned + 0.8 * torch.randn(6, 7, 16, generator=g)) @ weight.T
    ids = ids.argmax(-1)
    whole, parts, other = TokenMetrics(), TokenMetrics(), TokenMetrics()
    whole.update_states(aligned, ids, mask, clusters, weight, chunk=7)
    for at in (slice(3, 6), slice(0, 1)):
        parts.update_states(aligned[at], ids[at], mask[at], clusters[at], weight, chunk=7)
    other.update_states(aligned[1:3], ids[1:3], mask[1:3], clusters[1:3], weight, chunk=7)
    result, merged = whole.result(n_resamples=50), other.merge(parts).result(n_resamples=50)
    assert result.acceptance == merged.acceptance and result.positions == merged.positions and result.top_k == merged.top_k
    assert result.cross_entropy.value == pytest.approx(
        merged.cross_entropy.value, abs=1e-5)  # the product's rounding depends on its row count
    direct = TokenMetrics(top_k=(1,))
    direct.update((aligned @ weight.T).argmax(-1), ids, mask, clusters)
    assert direct.result(n_resamples=50).acceptance == result.acceptance
    assert result.top_k[5].value >= result.acceptance.value


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(lambda p, v, m, c: (p[:, :-1], v, m, c), "predicted must be integer ids"),
     (lambda p, v, m, c: (p.float(), v, m, c), "logits go through head_tokens"),
     (lambda p, v, m, c: (p, v[:, :-1], m, c), "the verifier's ids has shape"),
     (lambda p, v, m, c: (p, v.float(), m, c), "must be integer token ids"),
     (lambda p, v, m, c: (p, v - 9, m, c), "negative token id"),
     (lambda p, v, m, c: (p, v, m & False, c), "have no real position"),
     (lambda p, v, m, c: (p, v, m, "seq"), "clusters must name"),],
)
def test_bad_input_is_named(break_it, message):
    metrics = TokenMetrics()
    with pytest.raises(MetricError, match=message):
        metrics.update(*break_it(*make(1)))
    with pytest.raises(MetricError, match="no sample has been measured"):
        metrics.result()
