"""Curves of the token table."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from views_examples import token_table

from xsd.core import MetricError
from xsd.evaluate import curves, reliability


def _table(matches, cosines=None, level="L1"):
    rows = []
    for sample, answer in enumerate(matches):
        for position, match in enumerate(answer):
            cosine = cosines[sample][position] if cosines else (0.95 if match else 0.5)
            rows.append((level, f"c{sample}", f"s{sample % 2}", position, cosine, bool(match)))
    return pd.DataFrame(rows,
                        columns=["level", "sample", "sequence", "position", "cosine", "match"])


def test_marginal_counts_each_position_and_survival_needs_all_before():
    frame = curves.by_position(_table([[1, 0, 1], [1, 1]]))
    assert frame["n"].tolist() == [2, 2, 1]
    assert frame["marginal"].tolist() == [1.0, 0.5, 1.0]
    assert frame["survival"].tolist() == [1.0, 0.5, 0.0]


def test_the_threshold_is_strict_as_in_the_reference():
    table = _table([[1, 1]], [[0.9, 0.91]])
    (level, ) = curves.levels(table, 0.9)
    assert level.right(0.9).tolist() == [[False, True]]


def test_unbroken_prefix_stops_at_the_first_rejection():
    frame = curves.unbroken_prefix(_table([[1, 0, 1], [1, 1], [0, 1]]))
    assert frame.loc[0, "value"] == pytest.approx((1 + 2 + 0) / 3)
    assert frame.loc[0, "low"] <= frame.loc[0, "value"] <= frame.loc[0, "high"]


def test_one_sequence_gives_no_interval():
    assert np.isnan(curves.by_position(_table([[1, 0]]))["marginal_low"]).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
def test_survival_never_exceeds_marginal_and_sums_to_the_unbroken_prefix(matches):
    table = _table(matches)
    frame = curves.by_position(table, resamples=50)
    assert (frame["survival"] <= frame["marginal"] + 1e-12).all()
    length = curves.unbroken_prefix(table, resamples=50).loc[0, "value"]
    assert (frame["survival"] * frame["n"]).sum() / len(matches) == pytest.approx(length)


def test_row_order_and_repeated_indices_change_nothing():
    table = token_table(levels=("L1", "L4"))
    shuffled = table.sample(
        frac=1, random_state=3).assign(level=lambda t: pd.Categorical(t["level"], ["L1", "L4"]))
    shuffled.index = [0] * len(shuffled)
    first, second = (curves.by_position(one).sort_values(["level", "position"])
                     for one in (table, shuffled))
    np.testing.assert_allclose(first["survival"], second["survival"])
    np.testing.assert_allclose(first["survival_low"], second["survival_low"])


def test_histograms_and_bands_hold_every_token():
    table = token_table(levels=("L1",))
    assert curves.cosine_histogram(table)["n"].sum() == len(table)
    assert reliability.curve(table)["n"].sum() == len(table)
    assert curves.unbroken_prefix_histogram(table)["share"].sum() == pytest.approx(1)


def test_a_table_without_the_columns_is_named():
    with pytest.raises(MetricError, match=r"lacks the column\(s\) match; it needs level"):
        curves.by_position(_table([[1]]).drop(columns=["cosine", "match"]))
    with pytest.raises(MetricError, match="no row"):
        curves.by_position(_table([[1]]).head(0))


def test_acceptance_by_word_kind_counts_what_is_drafted():
    table = _table([[True, False, True], [True, True]])
    kinds = ["function", "colour", "function", "colour", "function"]
    first = table.head(1).assign(position=-1, match=False)  # the answer's first token is no draft
    table = pd.concat([first.assign(kind="colour"), table.assign(kind=kinds)], ignore_index=True)
    found = curves.by_kind(table, n_resamples=50)
    assert found["kind"].tolist() == ["function", "colour"]  # the most frequent first
    assert found["value"].tolist() == [1.0, 0.5] and found["n"].tolist() == [3, 2]
    assert found["n_clusters"].tolist() == [2, 2]
