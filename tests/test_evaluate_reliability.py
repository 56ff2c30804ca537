"""P(token match | cosine) and the misstatement of Accept@τ."""

import numpy as np
import pandas as pd
import pytest

from studies.gap import truth
from xsd.core import MetricError
from xsd.evaluate import reliability, statistics

COSINES = [0.96, 0.92, 0.91, 0.3, 0.95, 0.86, 0.2]
MATCHES = [True, True, False, False, True, False, False]


def table_of(cosines, matches, samples, level="L4"):
    frame = pd.DataFrame({
        "level": level, "sample": samples, "sequence": samples,
        "one_step_cosine": np.asarray(cosines, np.float32).astype(float), "one_step_match": matches
    })
    return frame.assign(position=frame.groupby("sample").cumcount() - 1)


TOKENS = table_of(COSINES, MATCHES, list("aaaabbb"))


def test_bands_count_matches_and_open_below_so_that_they_add_up_to_thresholds():
    found = reliability.bands(TOKENS, n_resamples=50)
    assert found[["cosine_low", "cosine_high", "n", "n_match"]].to_numpy().tolist() == [
        [-1, 0.5, 2, 0], [0.85, 0.9, 1, 0], [0.9, 0.95, 3, 2], [0.95, 1.0, 1, 1]
    ]
    middle = found.iloc[2]
    assert middle["wilson_low"] < 2 / 3 < middle["wilson_high"]
    assert middle["cosine"] == pytest.approx((0.92 + 0.91 + 0.95) / 3)


def test_accept_at_a_threshold_stands_beside_the_truth():
    found = reliability.figures(TOKENS, thresholds=[0.9], n_resamples=50)
    row = truth.misstatement(TOKENS, found).iloc[0]
    assert row["match above τ"] == 3 / 4 and row["match below τ"] == 0
    assert row["overstates"] == pytest.approx(4 / 7 - 3 / 7)  # the cosine overstates
    assert (row["accept"], row["token acceptance"], row["n"]) == (4 / 7, 3 / 7, 7)
    by_position = found[found["position"].notna()]
    assert by_position[["position", "n", "value"]].to_numpy().tolist() == [
        [0, 2, 1.0], [1, 1, 1.0], [2, 1, 0.0]
    ]
    nowhere = reliability.figures(TOKENS, thresholds=[0.99], n_resamples=50)
    assert "match_above" not in set(nowhere["metric"])
    assert truth.misstatement(TOKENS, nowhere)["match above τ"].isna().all()


def test_intervals_are_the_clustered_bootstraps():
    rng = np.random.default_rng(0)
    cosine, names = rng.random(200), rng.choice(list("abcd"), 200)
    match = rng.random(200) < cosine
    found = reliability.figures(table_of(cosine, match, names), thresholds=[0.8], n_resamples=50)
    above = np.float32(cosine) > np.float32(0.8)
    expected = statistics.bootstrap_ratio(match & above, above, names, n_resamples=50)
    row = found[(found["metric"] == "match_above") & found["position"].isna()].iloc[0]
    assert tuple(row[["value", "low", "high", "n"]]) == (
        expected.value, expected.low, expected.high, expected.n)


def test_needed_threshold_is_the_lowest_that_keeps_the_promise():
    rng = np.random.default_rng(0)
    cosine = rng.random(300).round(2).astype(np.float32).astype(float)
    match = rng.random(300) < cosine
    shares = (0.6, 0.8, 0.95)
    found = truth.needed(table_of(cosine, match, "a"), shares)
    for share, out in zip(shares, found.to_dict("records"), strict=True):
        kept = [tau for tau in sorted({-1.0, *cosine})
                if (cosine > tau).any() and match[cosine > tau].mean() >= share]
        assert out["threshold"] == (min(kept) if kept else None)
        if kept:
            assert out["tokens above"] == (cosine > out["threshold"]).mean()
    never = truth.needed(table_of(cosine, np.zeros(300, dtype=bool), "a"), [0.5])
    assert never["threshold"].isna().all() and never["tokens above"].eq(0).all()


def test_levels_without_a_cosine_are_left_out():
    plain = table_of([np.nan] * 3, [True] * 3, list("aab"), level="drafter_tokens")
    both = pd.concat([TOKENS, plain])
    assert set(reliability.bands(both, n_resamples=50)["level"]) == {"L4"}


def test_bad_input_is_named():
    with pytest.raises(MetricError, match="outside"):
        reliability.bands(TOKENS.assign(one_step_cosine=1.5))
    with pytest.raises(MetricError, match="ascending edges"):
        reliability.bands(TOKENS, edges=(0.5, 0.2))
