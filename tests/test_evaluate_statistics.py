"""Intervals clustered by sequence: coverage, determinism, speed, refusals."""

import numpy as np
import pytest

from xsd.core import MetricError
from xsd.evaluate.statistics import (
    bootstrap_columns,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    check_disjoint,
    cluster_sums,
    minimum_detectable_effect,
    resampled_sums,
    wilson,
)


def test_value_is_the_plain_mean_and_bounds_bracket_it():
    values, clusters = [1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"]
    out = bootstrap_mean(values, clusters, n_resamples=2000)
    assert (out.value, out.n, out.n_clusters) == (3.0, 4, 3)
    assert 1.5 <= out.low <= 3.0 <= out.high <= 6.0
    assert bootstrap_ratio([1, 2, 0], [2, 2, 4], ["a", "b", "c"]).value == 3 / 8


def test_same_values_in_any_order_give_the_same_interval():
    rng = np.random.default_rng(1)
    values, clusters = rng.normal(size=500), rng.integers(0, 20, 500).astype(str)
    order = rng.permutation(500)
    assert bootstrap_mean(values, clusters,
                          n_resamples=300) == bootstrap_mean(values[order], clusters[order],
                                                             n_resamples=300)


def test_clusters_widen_the_interval_and_cover_the_truth():
    rng = np.random.default_rng(0)
    covered, wide, narrow = 0, 0.0, 0.0
    for trial in range(100):
        effect = rng.normal(size=40).repeat(10)  # ten clips share their sequence's level
        values = effect + 0.3 * rng.normal(size=400)
        by_sequence = bootstrap_mean(values, np.arange(400) // 10, n_resamples=400, seed=trial)
        as_if_independent = bootstrap_mean(values, np.arange(400), n_resamples=200, seed=trial)
        covered += by_sequence.low <= 0 <= by_sequence.high
        wide += by_sequence.high - by_sequence.low
        narrow += as_if_independent.high - as_if_independent.low
    assert 86 <= covered <= 100 and wide > 2 * narrow


def test_paired_difference_is_narrower_than_the_arms():
    rng = np.random.default_rng(0)
    level = rng.normal(size=200)
    a, b = level + 0.1 * rng.normal(size=200) + 0.05, level + 0.1 * rng.normal(size=200)
    clusters = np.arange(200) // 5
    difference = bootstrap_difference(a, b, clusters, n_resamples=500)
    assert difference.excludes(0.0) and difference.high - difference.low < 0.1
    ones = np.ones(200)
    assert bootstrap_ratio_difference((a, ones), (b, ones), clusters,
                                      n_resamples=500).value == pytest.approx(difference.value)
    same = bootstrap_difference(a, a, clusters, n_resamples=200)
    assert not same.excludes(0.0)  # an arm measured twice
    assert bootstrap_difference(a, b - 1, clusters, n_resamples=200).excludes(0.0)


def test_columns_share_their_resamples():
    rng = np.random.default_rng(0)
    hits, seen = rng.integers(0, 2, (50, 4)), np.ones((50, 4))
    clusters = np.arange(50) // 5
    together = bootstrap_columns(hits, seen, clusters, n_resamples=300)
    alone = bootstrap_ratio(hits[:, 2], seen[:, 2], clusters, n_resamples=300)
    assert together[2] == alone


def test_one_sequence_gives_no_interval():
    out = bootstrap_mean([1, 2, 3], ["a"] * 3)
    assert out.value == 2 and np.isnan(
        out.low) and not out.excludes(0) and out.text(percent=False) == "2.00 [–]"


@pytest.mark.parametrize("n_columns", [2, 9])
def test_many_clusters_are_drawn_as_few_are(n_columns):
    """Above 256 clusters the draws are counted in place of a multinomial; mean, spread and
    covariance of the resampled sums stay."""
    sums = np.random.default_rng(3).integers(0, 9, (400, n_columns)).astype(float)
    drawn = resampled_sums(sums, n_resamples=4000, seed=1)
    assert drawn.shape == (4000, n_columns)
    np.testing.assert_allclose(drawn.mean(axis=0), sums.sum(axis=0), rtol=0.005)
    np.testing.assert_allclose(drawn.std(axis=0), np.sqrt(400 * sums.var(axis=0)), rtol=0.05)
    np.testing.assert_allclose(
        np.cov(drawn.T)[0, 1], 400 * np.cov(sums.T)[0, 1], atol=0.1 * 400 * sums.var())
    assert np.array_equal(drawn, resampled_sums(sums, n_resamples=4000, seed=1))


def test_denominators_may_stand_for_several_curves():
    rng = np.random.default_rng(5)
    above, below, clusters = rng.integers(0, 4,
                                          (60, 6)), rng.integers(4, 9,
                                                                 (60, 3)), rng.integers(0, 7, 60)
    whole = bootstrap_columns(above, np.tile(below, (1, 2)), clusters, n_resamples=100)
    assert bootstrap_columns(above, below, clusters, n_resamples=100) == whole
    with pytest.raises(MetricError, match="6 columns of numerators cannot share 4 columns"):
        bootstrap_columns(above, np.ones((60, 4)), clusters)


def test_wilson_against_a_published_value():
    out = wilson(8, 10)  # Wilson 1927: 0.490 … 0.943
    assert (round(out.low, 3), round(out.high, 3)) == (0.490, 0.943)
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == 1


def test_minimum_detectable_effect_of_independent_samples():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000)
    assert minimum_detectable_effect(values, np.arange(2000)) == pytest.approx(
        2.8 / np.sqrt(2000), rel=0.05)


def test_leakage_guard():
    check_disjoint(["a", "b"], ["c"])
    with pytest.raises(MetricError, match=r"1 sequences are in training and in test \(b\)"):
        check_disjoint(["a", "b"], ["b", "c"])
    with pytest.raises(MetricError, match="one side is empty"):
        check_disjoint([], ["b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: bootstrap_mean([], []), "no sample to resample"),
     (lambda: bootstrap_mean([1.0, float("nan")], ["a", "b"]), "value . to resample is not finite"),
     (lambda: bootstrap_mean([1.0], ["a", "b"]), "1 values but 2 clusters"),
     (lambda: bootstrap_ratio([1], [0], ["a"]), "nothing below the line"),
     (lambda: bootstrap_difference([1, 2], [1], ["a", "b"]), "hold 2 and 1"),
     (lambda: wilson(3, 2), "0 ≤ successes ≤ n"),
     (lambda: minimum_detectable_effect([1, 2], ["a", "a"]), "at least two sequences"),
     (lambda: cluster_sums([[1.0]], []), "1 values but 0 clusters"),],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(MetricError, match=message):
        call()
