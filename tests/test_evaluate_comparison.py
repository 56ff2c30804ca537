"""Floors comparison, gap waterfall, tables and the printed report."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from studies.gap import comparison
from studies.gap.comparison import compare_arms
from xsd.core import MetricError
from xsd.evaluate import drafting, metrics, reliability, report_text, tables
from xsd.evaluate.comparison import compare_with_floors
from xsd.evaluate.speedup import Timing
from xsd.evaluate.statistics import Interval

RNG = np.random.default_rng(0)
CLUSTERS = [f"seq{i // 10}" for i in range(120)]
LENGTH = RNG.integers(10, 30, 120)


def arm(share):
    return np.random.default_rng(7).binomial(LENGTH, share), LENGTH


def test_an_adapter_stands_beside_its_best_floor():
    out = compare_with_floors(arm(0.8), {"position mode": arm(0.3), "4-gram": arm(0.7)}, CLUSTERS,
                              n_resamples=500)
    assert out.best == "4-gram" and out.above_best.excludes(
        0) and out.above_best.value == pytest.approx(0.1, abs=0.02)
    assert list(out.floors) == ["position mode", "4-gram"]
    below = compare_with_floors(arm(0.24), {"4-gram": arm(0.73)}, CLUSTERS, n_resamples=500)
    assert below.above_best.value < 0 and below.above_best.excludes(0)
    same = compare_with_floors(arm(0.7), {"a": arm(0.7), "b": arm(0.5)}, CLUSTERS, n_resamples=500)
    assert same.above_best.value == 0 and not same.above_best.excludes(0)
    with pytest.raises(MetricError, match="without floors means nothing"):
        compare_with_floors(arm(0.5), {}, CLUSTERS)
    with pytest.raises(MetricError, match="arm 'b' covers 1 samples"):
        compare_with_floors(arm(0.5), {"b": ([1], [1])}, CLUSTERS)


def test_counterfactual_arms_are_paired_with_the_reference():
    out = compare_arms({"real events": arm(0.7), "blank events": arm(0.4)}, "real events", CLUSTERS,
                       n_resamples=300)
    assert out[0]["difference"] is None and out[1]["differs"] and out[1][
        "difference"] == pytest.approx(-0.3, abs=0.03)
    assert 0 < out[1]["detectable"] < 0.1
    with pytest.raises(MetricError, match="reference arm 'none' was not measured"):
        compare_arms({"real events": arm(0.7)}, "none", CLUSTERS)


def whole(share=1.0):
    return (LENGTH * share, LENGTH)


def test_waterfall_steps_add_up():
    arms = {"verifier": whole(), "verifier-self": arm(0.95), "teacher-forced drafter": arm(0.8),
            "self-rollout": arm(0.6), "free-running": arm(0.5)}
    steps = comparison.gap(arms, CLUSTERS, n_resamples=200)
    names = [step["name"] for step in steps if step["metric"] == "loss"]
    assert names == ["capacity and objective", "modality", "rollout", "drift"]
    for before, loss, after in zip(steps, steps[1:], steps[2:], strict=False):
        if loss["metric"] == "loss":
            assert before["value"] - loss["value"] == pytest.approx(after["value"])
            assert (loss["start"], loss["end"]) == (before["value"], after["value"])
    assert steps[0]["value"] == 1.0 and steps[-3]["name"] == "teacher-forced drafter"
    short = comparison.gap({"verifier": whole(), "teacher-forced drafter": arm(0.8)}, CLUSTERS,
                              n_resamples=50)
    assert [step["name"] for step in short
            ] == ["verifier", "capacity and modality", "teacher-forced drafter"]
    with pytest.raises(MetricError, match="the gap has no arm 'blank events'"):
        comparison.gap({"verifier": whole(), "blank events": arm(0.8)}, CLUSTERS, n_resamples=50)


def test_acceptance_by_word_kind():
    matches, clusters = [True, False, True, True, True], ["a", "a", "a", "b", "b"]
    groups = ["function", "colour", "function", "colour", "function"]
    counts = comparison.counts_by_group(matches, groups, clusters)
    assert {name: (num.sum(), den.sum())
            for name, (num, den) in counts.items()} == {"colour": (1, 2), "function": (3, 3)}
    with pytest.raises(MetricError, match="5 matches but 4 group"):
        comparison.counts_by_group(matches, groups[1:], clusters)


def test_losses_within_a_kind_of_word_are_paired_differences():
    arms = {"all": [True] * 5, "before": [True, True, True, True, False],
            "after": [True, False, True, False, False]}
    groups = ["function", "colour", "colour", "colour", "function"]
    rows = comparison.loss_by_group(
        arms, [("modality", "before", "after"), ("whole", "all", "after")], groups,
        ["a", "a", "a", "b", "b"], n_resamples=50)
    found = {(row["loss"], row["group"]): (row["value"], row["n"]) for row in rows}
    assert found["modality", "colour"] == (pytest.approx(2 / 3), 3)
    assert found["modality", "function"] == (0.0, 2)
    assert found["whole", "colour"] == (pytest.approx(2 / 3), 3)
    assert found["whole", "function"] == (0.5, 2)


def test_a_waterfall_in_accepted_tokens_begins_at_what_the_verifier_itself_would_accept():
    rounds = np.full(120, 4)
    steps = comparison.gap(
        {"verifier": (rounds * 5, rounds), "teacher-forced drafter": (rounds * 2, rounds)},
        CLUSTERS, n_resamples=50)
    assert [(step["name"], step["value"]) for step in steps] == [
        ("verifier", 5.0), ("capacity and modality", 3.0), ("teacher-forced drafter", 2.0)
    ]


def test_tables_in_three_forms(tmp_path):
    rows = [
        tables.row("accept_at", Interval(0.5, 0.4, 0.6, 100, 5), threshold=0.9),
        tables.row("cosine_std", 0.25, n=100)
    ]
    table = tables.frame([{**r, "arm": "L4_a & b"} for r in rows])
    assert list(table.columns) == [name for name in tables.COLUMNS if name != "position"] + ["arm"]
    assert "| accept_at | 0.9000 |" in tables.markdown(table) and "| – |" in tables.markdown(table)
    assert r"L4\_a \& b" in tables.latex(table) and tables.latex(table).count(r"\\") == 3
    paths = tables.write(table, tmp_path / "acceptance")
    assert [p.suffix for p in paths] == [".csv", ".md", ".tex"]
    assert pd.read_csv(paths[0])["value"].tolist() == [0.5, 0.25]
    with pytest.raises(MetricError, match="unknown table kind 'xlsx'"):
        tables.write(table, tmp_path / "x", kinds=["xlsx"])
    with pytest.raises(MetricError, match="no row"):
        tables.frame([])


def test_printed_report_has_its_eight_sections():
    g = torch.Generator().manual_seed(0)
    target, weight = torch.randn(12, 9, 16, generator=g), torch.randn(30, 16, generator=g)
    aligned = target + 0.3 * torch.randn(12, 9, 16, generator=g)
    batch = SimpleNamespace(index=list(range(12)))
    adapter = SimpleNamespace(shift=0, align=lambda batch: (
        aligned, target, (target @ weight.T).argmax(-1), torch.ones(12, 9, dtype=torch.bool)))
    found = pd.DataFrame(drafting.one_step(adapter, batch, weight, 5)).assign(
        level="L4", sequence=lambda rows: "s" + (rows["index"] % 3).astype(str))
    found = found.rename(columns={"index": "sample"})
    options = {"n_resamples": 50}
    parts = [metrics.state_figures(found, **options), metrics.token_figures(found, **options),
             reliability.figures(found, **options)]
    headline = pd.Series({"best floor": "4-gram", "clusters": 3}
                         | tables.sides("acceptance", Interval(0.9, 0.8, 1.0, 108, 3))
                         | tables.sides("floor", Interval(0.4, 0.3, 0.5, 108, 3))
                         | tables.sides("above floor", Interval(0.5, 0.4, 0.6, 108, 3)))
    floors = pd.DataFrame([tables.row("floor", Interval(0.4, 0.3, 0.5, 108, 3), floor="4-gram")])
    text = report_text.report("L4 on held-out drives", pd.concat(parts), gamma=5, headline=headline,
                              floors=floors)
    assert [f"[{i}]" in text for i in range(1, 9)] == [True] * 8
    assert "12 samples, 108 tokens, 3 sequences" in text and "ESTIMATE" in text
    assert f"token acceptance {100 * found['one_step_match'].mean():.1f} %" in text
    assert "floor 4-gram: 40.0 % [30.0, 50.0]" in text
    assert ("90.0 % [80.0, 100.0] of the tokens is above the best floor (4-gram, 40.0 % "
            "[30.0, 50.0]): difference 50.0 % [40.0, 60.0] over 3 sequences") in text
    for interval, verdict in ((Interval(-0.5, -0.6, -0.4, 108, 3), "is below"),
                              (Interval(0.5, -0.1, 0.6, 108, 3), "cannot be told from")):
        changed = pd.Series({**headline, **tables.sides("above floor", interval)})
        assert verdict in report_text.report("bare", pd.concat(parts), gamma=5, headline=changed)
    assert len(re.findall(r"P\(match \| ", text)) > 1 and "overstates" in text
    assert "not measured" in report_text.report("bare", parts[0], gamma=5)
    assert "1× above 22 %   1.5× above 33 %   2× above 44 %" in text
    assert "21% 1.01×" in text and "relaxed, tokens of an answer" in text and "####" in text
    for clock, verdict in ((None, "no clock of this run says so"), (0.5, "too high"),
                           (9.0, "took 9.00×, so it is")):
        assert verdict in report_text.report("bare", parts[0], gamma=5, measured=clock)
    slow = report_text.report("bare", parts[0], gamma=5, timing=Timing(verify_ms=900, overhead=4.0,
                                                                      kind="own"))
    assert "break-even, γ = 5: 1× above 100 %   1.5× never   2× never" in slow
    assert "the times given" in slow and "slower than plain decoding, if it held" in slow
    alone = pd.concat([metrics.state_figures(found.assign(sequence="road"), **options),
                       metrics.token_figures(found.assign(sequence="road"), **options)])
    changed = pd.Series({**headline, "clusters": 1} | tables.sides(
        "above floor", Interval(0.5, np.nan, np.nan, 108, 1)))
    said = report_text.report("bare", alone, gamma=5, headline=changed)
    assert "108 tokens, no interval: one sequence" in said and "one sequence, which says" in said
    assert not re.search(r"\[[\d.]+, [\d.]+\]", said.split("The adapter's")[0])


def test_text_of_a_table_is_no_markup_in_markdown_or_latex():
    bad = pd.DataFrame({"a|b": ["<img src=x>", "[x](javascript:y)", "\\|", "x\ny", "`$z$"],
                        "^~\\": ["{%}", "#", "_", "\x1b[31m", "&"]})
    lines = tables.markdown(bad).splitlines()
    assert lines[0] == r"| a\|b | ^~\\ |" and len(lines) == 7
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| &lt;img src=x>", r"| [x]\(javascript:y)", r"| \\\|", "| x y", r"| \`\$z\$"]
    text = tables.latex(bad)
    assert r"\textasciicircum{}\textasciitilde{}\textbackslash{}" in text
    assert r"\{\%\}" in text and r"\textbackslash{}u001b[31m" in text and "\x1b" not in text
