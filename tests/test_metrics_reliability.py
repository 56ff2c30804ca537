"""P(token match | cosine) and the misstatement of Accept@τ."""

import numpy as np
import pytest
import torch

from xsd.core import MetricError
from xsd.evaluate.reliability import Reliability, needed_threshold

COS = torch.tensor([[0.96, 0.92, 0.91, 0.3], [0.95, 0.86, 0.2, 0.1]])
MATCH = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)


def test_bands_count_matches_and_open_below_so_that_they_add_up_to_thresholds():
    counts = Reliability()
    counts.update(COS, MATCH, MASK, ["a", "b"])
    result = counts.result(n_resamples=50)
    assert [(b.low, b.high, b.n, b.n_match) for b in result.bands] == [(-1, 0.5, 2, 0),
                                                                       (0.85, 0.9, 1, 0),
                                                                       (0.9, 0.95, 3, 2),
                                                                       (0.95, 1.0, 1, 1),]
    at = result.thresholds[0.9]
    assert at.match_above.value == 3 / 4 and at.match_below.value == 0
    assert at.difference.value == pytest.approx(4 / 7 - 3 / 7)  # the cosine overstates
    assert [(t, share.n, share.value) for t, share in result.positions[0.9]] == [(0, 2, 1.0),
                                                                                 (1, 1, 1.0),
                                                                                 (2, 1, 0.0)]
    assert result.correlation > 0
    assert result.bands[2].wilson.low < 2 / 3 < result.bands[2].wilson.high


def test_order_and_split_do_not_matter():
    g = torch.Generator().manual_seed(0)
    cosine, match = torch.rand(12, 9, generator=g), torch.rand(12, 9, generator=g) < 0.5
    mask, names = torch.ones(12, 9, dtype=torch.bool), [f"s{i % 4}" for i in range(12)]
    whole, first, second = Reliability(), Reliability(), Reliability()
    whole.update(cosine, match, mask, names)
    first.update(cosine[:5], match[:5], mask[:5], names[:5])
    second.update(cosine[5:], match[5:], mask[5:], names[5:])
    assert second.merge(first).result(n_resamples=50) == whole.result(n_resamples=50)


def test_needed_threshold_is_the_lowest_that_keeps_the_promise():
    rng = np.random.default_rng(0)
    cosine = rng.random(300).round(2)
    match = rng.random(300) < cosine
    for share in (0.6, 0.8, 0.95):
        out = needed_threshold(cosine, match, share)
        kept = [
            tau for tau in sorted({-1.0, *cosine})
            if (cosine > tau).any() and match[cosine > tau].mean() >= share
        ]
        assert out.threshold == (min(kept) if kept else None)
        if kept:
            assert out.n_above == (
                cosine
                > out.threshold).sum() and out.match_above == match[cosine > out.threshold].mean()
    assert needed_threshold(cosine, np.zeros(300, dtype=bool), 0.5).threshold is None


def test_bad_input_is_named():
    counts = Reliability()
    with pytest.raises(MetricError, match="NaN or outside"):
        counts.update(COS * float("nan"), MATCH, MASK, ["a", "b"])
    with pytest.raises(MetricError, match="match has shape"):
        counts.update(COS, MATCH[:, :3], MASK, ["a", "b"])
    with pytest.raises(MetricError, match="no token has been counted"):
        counts.result()
    with pytest.raises(MetricError, match="ascending edges"):
        Reliability(bands=(0.5, 0.2))
    with pytest.raises(MetricError, match="cannot merge"):
        counts.merge(Reliability(shares=(0.5,)))
