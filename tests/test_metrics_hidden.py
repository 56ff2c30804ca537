"""Hidden-state metrics against a loop written for reading, mergeability, refusals."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.evaluate.hidden import HiddenStateMetrics, cosines, unbroken_prefix

TAUS = (0.0, 0.5, 0.9)


def make(seed, n=7, s=6, d=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(n, s, d, generator=g)
    noise = torch.rand(n, s, 1, generator=g) * 1.5
    aligned = target + noise * torch.randn(n, s, d, generator=g)
    lengths = torch.randint(1, s + 1, (n,), generator=g)
    mask = torch.arange(s) < lengths[:, None]
    clusters = [f"seq{int(i)}" for i in torch.randint(0, 3, (n,), generator=g)]
    return aligned.to(dtype), target.to(dtype), mask, clusters


def plain(aligned, target, mask, gamma):
    """The same figures, one position after the other."""
    tokens, runs = [], {tau: [] for tau in TAUS}
    accepted = {tau: 0 for tau in TAUS}
    decode = {tau: [] for tau in TAUS}
    prefill = {tau: [] for tau in TAUS}
    for a, v, m in zip(aligned.double(), target.double(), mask, strict=True):
        n = int(m.sum())
        cos = [float(a[t] @ v[t] / (a[t].norm() * v[t].norm())) for t in range(n)]
        tokens += cos
        for tau in TAUS:
            accepted[tau] += sum(c > tau for c in cos)
            run = 0
            for c in cos:
                if c <= tau:
                    break
                run += 1
            runs[tau].append(run)
            prefill[tau].append(run / n)
            decode[tau].append(min(run, gamma) / gamma)
    return tokens, accepted, runs, prefill, decode


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.integers(1, 5))
def test_equals_the_plain_loop(seed, gamma):
    aligned, target, mask, clusters = make(seed)
    metrics = HiddenStateMetrics(TAUS, gamma=gamma)
    metrics.update(aligned, target, mask, clusters)
    result = metrics.result(n_resamples=20)
    tokens, accepted, runs, prefill, decode = plain(aligned, target, mask, gamma)
    assert result.cosine.n == len(tokens) == int(mask.sum())
    assert result.cosine.mean == pytest.approx(statistics.fmean(tokens), abs=1e-6)
    assert result.cosine.std == pytest.approx(statistics.pstdev(tokens), abs=1e-6)
    assert result.cosine.median == pytest.approx(statistics.median(tokens), abs=1e-6)
    assert (result.cosine.min, result.cosine.max) == (pytest.approx(min(tokens), abs=1e-6),
                                                      pytest.approx(max(tokens), abs=1e-6))
    for tau in TAUS:
        assert result.acceptance[tau].value == pytest.approx(accepted[tau] / len(tokens))
        assert result.unbroken_prefix[tau].mean == pytest.approx(statistics.fmean(runs[tau]))
        assert result.unbroken_prefix[tau].median == statistics.median(runs[tau])
        assert result.unbroken_prefix[tau].max == max(runs[tau])
        assert result.draft_acceptance[tau].prefill.value == pytest.approx(
            statistics.fmean(prefill[tau]))
        assert result.draft_acceptance[tau].decode.value == pytest.approx(
            statistics.fmean(decode[tau]))
        at0 = result.positions[0]
        assert at0.acceptance[tau].value == at0.survival[tau].value == pytest.approx(
            sum(r > 0 for r in runs[tau]) / len(runs[tau]))
        assert sum(p.survival[tau].value * p.n
                   for p in result.positions) == pytest.approx(sum(runs[tau]))
    assert [p.n for p in result.positions] == mask.sum(0)[mask.any(0)].tolist()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(7)), cut=st.integers(1, 6))
def test_any_order_and_any_split_give_the_same_result_to_the_last_bit(seed, order, cut):
    aligned, target, mask, clusters = make(seed, dtype=torch.bfloat16, d=33)
    whole = HiddenStateMetrics()
    whole.update(aligned, target, mask, clusters)
    first, second = HiddenStateMetrics(), HiddenStateMetrics()
    for i in order[:cut]:  # one sample at a time, padding cut to the sample
        n = int(mask[i].sum())
        first.update(aligned[i:i + 1, :n], target[i:i + 1, :n], mask[i:i + 1, :n], [clusters[i]])
    rest = list(order[cut:])
    second.update(aligned[rest], target[rest], mask[rest], [clusters[i] for i in rest])
    assert second.merge(first).result(n_resamples=50) == whole.result(n_resamples=50)


def test_bf16_states_are_accumulated_in_float32():
    aligned, target, mask, _ = make(3, d=4096, dtype=torch.bfloat16)
    exact = torch.nn.functional.cosine_similarity(aligned.double(), target.double(), dim=-1)
    assert (cosines(aligned, target, mask) -
            exact)[mask].abs().max() < 1e-5  # bf16 accumulation would be off by 1e-2


def test_padding_may_hold_anything():
    aligned, target, mask, _ = make(5)
    clean = cosines(aligned, target, mask)
    aligned[~mask], target[~mask] = math.nan, 0.0
    assert torch.equal(cosines(aligned, target, mask)[mask], clean[mask])


def test_unbroken_prefix_stops_at_the_first_rejection():
    ones = torch.ones(3, 4, dtype=torch.bool)
    accepted = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert unbroken_prefix(accepted, ones).tolist() == [2, 0, 4]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(lambda a, t, m, c:
      (a[:, :-1], t, m, c), "aligned states has shape .* but the target states has"),
     (lambda a, t, m, c: (a, t, m[:, :-1], c), "the mask has shape"),
     (lambda a, t, m, c: (a, t, m.float(), c), "must be bool"),
     (lambda a, t, m, c: (a, t, m & False, c), r"rows \[0, 1, 2, 3, 4\] have no real position"),
     (lambda a, t, m, c:
      (a, t, torch.ones_like(m) ^ (torch.arange(6) == 0), c), "padding before a real position"),
     (lambda a, t, m, c: (a.index_fill(1, torch.tensor([0]), math.nan), t, m, c),
      "the aligned state at sample 0, position 0 .* NaN"),
     (lambda a, t, m, c: (a, t.index_fill(1, torch.tensor([0]), 0.0), m, c),
      "the target state at sample 0, position 0 .* zero vector"),
     (lambda a, t, m, c:
      (a, t, m, c[:-1]), "clusters must name the sequence of each of the 7 samples"),
     (lambda a, t, m, c: (a[0], t, m, c), r"must be \[B, S, D\]"),],
)
def test_bad_input_is_named_and_nothing_is_kept(break_it, message):
    metrics = HiddenStateMetrics()
    with pytest.raises(MetricError, match=message):
        metrics.update(*break_it(*make(1)))
    with pytest.raises(MetricError, match="no sample has been measured"):
        metrics.result()


def test_other_settings_do_not_merge():
    with pytest.raises(MetricError, match="cannot merge"):
        HiddenStateMetrics(gamma=5).merge(HiddenStateMetrics(gamma=4))
    with pytest.raises(MetricError, match="thresholds must be cosines"):
        HiddenStateMetrics(thresholds=(1.2,))


def test_rows_carry_interval_and_count():
    metrics = HiddenStateMetrics(TAUS)
    metrics.update(*make(2))
    rows = metrics.result(n_resamples=50).rows()
    overall = next(
        r for r in rows
        if r["metric"] == "accept_at" and r["threshold"] == 0.5 and r["position"] is None)
    assert overall["low"] <= overall["value"] <= overall["high"] and overall["n"] == int(
        make(2)[2].sum())
    assert metrics.table()["length"].sum() == overall["n"]
