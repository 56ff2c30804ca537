"""Hidden-state figures against a loop written for reading, and partial tables joined."""

import statistics

import pandas as pd
import pytest
import torch
from evaluate_examples import as_table, pick, random_states
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.evaluate import metrics
from xsd.evaluate.kernels import cosines

TAUS = (0.0, 0.5, 0.9)


def measured(seed, **options):
    aligned, target, mask, clusters = random_states(seed, **options)
    tokens = as_table(mask, clusters, one_step_cosine=cosines(aligned, target, mask))
    return tokens, (aligned, target, mask)


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
    table, (aligned, target, mask) = measured(seed)
    found = metrics.state_figures(table, thresholds=TAUS, gamma=gamma, n_resamples=20)
    value = lambda *about: pick(found, *about)["value"]  # noqa: E731
    tokens, accepted, runs, prefill, decode = plain(aligned, target, mask, gamma)
    assert pick(found, "cosine_mean")["n"] == len(tokens) == int(mask.sum())
    for name, of in (("mean", statistics.fmean), ("std", statistics.pstdev),
                     ("median", statistics.median), ("min", min), ("max", max)):
        assert value(f"cosine_{name}") == pytest.approx(of(tokens), abs=1e-6)
    assert value("length_mean") == pytest.approx(float(mask.sum(1).float().mean()))
    for tau in TAUS:
        assert value("accept_at", tau) == pytest.approx(accepted[tau] / len(tokens))
        assert value("unbroken_prefix_mean", tau) == pytest.approx(statistics.fmean(runs[tau]))
        assert value("unbroken_prefix_median", tau) == statistics.median(runs[tau])
        assert value("unbroken_prefix_max", tau) == max(runs[tau])
        assert value("draft_acceptance_prefill",
                     tau) == pytest.approx(statistics.fmean(prefill[tau]))
        assert value("draft_acceptance_decode", tau) == pytest.approx(statistics.fmean(decode[tau]))
        first = pytest.approx(sum(r > 0 for r in runs[tau]) / len(runs[tau]))
        assert value("accept_at", tau, 0) == value("survival_at", tau, 0) == first
        survival = found[(found["metric"] == "survival_at") & (found["threshold"] == tau)]
        assert (survival["value"] * survival["n"]).sum() == pytest.approx(sum(runs[tau]))
        marginal = found[(found["metric"] == "accept_at") & (found["threshold"] == tau)].iloc[1:]
        assert (survival["value"].to_numpy() <= marginal["value"].to_numpy() + 1e-12).all()
    rates = [value("accept_at", tau) for tau in TAUS]
    assert rates == sorted(rates, reverse=True)  # a higher threshold accepts no more
    positions = found[(found["metric"] == "cosine_mean") & found["position"].notna()]
    assert positions["n"].tolist() == mask.sum(0)[mask.any(0)].tolist()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(7)), cut=st.integers(1, 6))
def test_partial_tables_in_any_order_give_the_same_figures_to_the_last_bit(seed, order, cut):
    table, _ = measured(seed, dtype=torch.bfloat16, d=33)
    parts = [table[table["sample"].isin(order[:cut])], table[table["sample"].isin(order[cut:])]]
    again = pd.concat(parts).sample(frac=1, random_state=seed)
    options = {"n_resamples": 50}
    pd.testing.assert_frame_equal(metrics.state_figures(again, **options),
                                  metrics.state_figures(table, **options), check_exact=True)


def test_settings_without_a_meaning_are_refused():
    table, _ = measured(0)
    with pytest.raises(MetricError, match="thresholds must be cosines"):
        metrics.state_figures(table, thresholds=(1.2,))
    with pytest.raises(MetricError, match="at least 1 but are 0 and 64"):
        metrics.state_figures(table, gamma=0)
    with pytest.raises(MetricError, match="no row"):
        metrics.state_figures(table.head(0))


def test_figures_carry_interval_and_count_and_the_level():
    table, (_, _, mask) = measured(2)
    both = pd.concat([table, table.assign(level="L4")])
    found = metrics.state_figures(both, thresholds=TAUS, n_resamples=50)
    assert list(dict.fromkeys(found["level"])) == ["L1", "L4"]
    overall = pick(found[found["level"] == "L4"], "accept_at", 0.5)
    assert overall["low"] <= overall["value"] <= overall["high"]
    assert overall["n"] == int(mask.sum())
