"""Token figures against a plain loop."""

import numpy as np
import pandas as pd
import pytest
from evaluate_examples import as_table, pick
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import MetricError
from xsd.evaluate import metrics


def made(seed, n=6, s=7):
    """A table of ranks, and the ranks of each answer."""
    draw = np.random.default_rng(seed)
    rank = draw.choice([0, 1, 3, 255], p=[0.6, 0.2, 0.1, 0.1], size=(n, s)).astype(np.uint8)
    mask = np.arange(s) < draw.integers(1, s + 1, n)[:, None]
    loss = draw.random((n, s))
    table = as_table(mask, [f"seq{i}" for i in draw.integers(0, 3, n)], one_step_rank=rank,
                     cross_entropy=loss)
    return table, [line[real] for line, real in zip(rank, mask, strict=True)], loss[mask]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.integers(1, 6))
def test_equals_the_plain_loop(seed, gamma):
    table, ranks, losses = made(seed)
    found = metrics.token_figures(table, top_k=(1, 2, 5), gamma=gamma, n_resamples=20)
    value = lambda *about: pick(found, *about)["value"]  # noqa: E731
    accepted = rounds = bonus = 0
    runs = []
    for line in ranks:
        hit = (line == 0).tolist()
        runs.append(next((t for t, right in enumerate(hit) if not right), len(hit)))
        at = 0
        while at < len(hit):  # draft, verify, take the bonus
            k = 0
            while k < gamma and at + k < len(hit) and hit[at + k]:
                k += 1
            accepted, rounds, bonus = accepted + k, rounds + 1, bonus + (at + k < len(hit))
            at += k + 1
    flat = np.concatenate(ranks)
    assert value("token_acceptance") == pytest.approx((flat == 0).mean())
    assert value("token_top2") == pytest.approx((flat < 2).mean())
    assert value("token_acceptance") <= value("token_top2") <= value("token_top5")
    assert value("token_unbroken_prefix_mean") == pytest.approx(sum(runs) / len(runs))
    assert value("token_accepted_per_round") == pytest.approx(accepted / rounds)
    with_bonus = pick(found, "token_accepted_per_round_with_bonus")
    assert with_bonus["value"] == pytest.approx((accepted + bonus) / rounds)
    assert with_bonus["n"] == rounds
    assert value("token_cross_entropy") == pytest.approx(losses.mean())
    survival = found[found["metric"] == "token_survival"]
    assert (survival["value"] * survival["n"]).sum() == pytest.approx(sum(runs))


def test_conditional_is_given_that_all_before_were_right():
    table = as_table(np.ones((3, 2), bool), ["a", "b", "b"], cross_entropy=np.zeros((3, 2)),
                     one_step_rank=np.array([[0, 0], [0, 255], [255, 0]]))
    found = metrics.token_figures(table, n_resamples=20)
    assert pick(found, "token_conditional", position=1)["value"] == 1 / 2
    assert pick(found, "token_acceptance", position=1)["value"] == pytest.approx(2 / 3)
    never = metrics.token_figures(table.assign(one_step_rank=255), n_resamples=20)
    positions = never.loc[never["metric"] == "token_conditional", "position"]
    assert positions.tolist() == [0]  # nobody came to the second position


def test_partial_tables_in_any_order_give_the_same_figures_and_no_loss_is_no_figure():
    table, _, _ = made(3)
    again = table.sample(frac=1, random_state=0)
    options = {"n_resamples": 50}
    pd.testing.assert_frame_equal(metrics.token_figures(again, **options),
                                  metrics.token_figures(table, **options))
    unknown = metrics.token_figures(table.assign(cross_entropy=np.nan), **options)
    assert "token_cross_entropy" not in set(unknown["metric"])


@pytest.mark.parametrize("options", [{"top_k": (0,)}, {"top_k": (1, 255)}, {"gamma": 0},
                                     {"max_positions": 0}])
def test_settings_without_a_meaning_are_refused(options):
    with pytest.raises(MetricError, match="top_k must lie in 1 … 254"):
        metrics.token_figures(made(0)[0], **options)
