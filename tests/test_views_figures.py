"""Pictures are compared by their data."""

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
from views_examples import history, lengths_table, live_runs, speedups, token_table

from studies.gap import truth_figures
from xsd.core import Generation, MetricError
from xsd.evaluate import curves, reliability
from xsd.views import figures, theme, timeline


@pytest.fixture(scope="module")
def table():
    return token_table()


def test_each_level_has_a_band_and_a_line_with_its_numbers(table):
    frame = curves.by_position(table)
    figure = figures.acceptance_by_position(frame, curve="survival")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in lines] == list(dict.fromkeys(table["level"]))
    assert list(lines[0].y) == frame[frame["level"] == "L1"]["survival"].tolist()
    assert lines[0].customdata[0][0] == 24 and "n = " in lines[0].hovertemplate
    assert len(figure.data) == 2 * len(lines)


def test_an_unknown_curve_is_refused(table):
    with pytest.raises(MetricError, match="no acceptance curve named 'mean'"):
        figures.acceptance_by_position(curves.by_position(table), curve="mean")


def test_dots_are_coloured_by_kind_and_the_line_stands_at_the_best_floor():
    figure = figures.accepted_per_round_dots(lengths_table())
    colours = {trace.name: trace.marker.color for trace in figure.data}
    assert colours == {
        figures.YARDSTICK: theme.VERIFIER, "adapter": theme.ADAPTER, "drafter": theme.DRAFTER,
        "floor": theme.KINDS["floor"]
    }
    assert figure.layout.shapes[0].x0 == 1.5  # the 4-gram table
    assert figure.layout.yaxis.categoryarray[-1].startswith("B1")


def test_measured_predicted_and_quoted_bars_look_different():
    figure = figures.speedup_bars(speedups())
    looks = {trace.name: (trace.marker.opacity, trace.marker.pattern.shape)
             for trace in figure.data}
    assert len(set(looks.values())) == 3 and set(looks) == {"measured", "predicted", "quoted"}
    with pytest.raises(MetricError, match="measured, predicted or quoted, not 'guess'"):
        figures.speedup_bars(speedups().assign(kind="guess"))


def test_lines_that_lie_on_each_other_become_small_multiples():
    table = token_table(levels=("L1", "L4"))
    few = figures.acceptance_by_position(curves.by_position(table, resamples=20))
    assert figures.panels(few) is few
    table = token_table(levels=("L1", "L4", "L5F", "B1", "drafter_tokens"))
    many = figures.acceptance_by_position(curves.by_position(table, resamples=20))
    made = figures.panels(many)
    assert len(made.data) == 5 * (2 + 4)  # its band and line, and four in grey
    shown = [trace for trace in made.data if trace.line.color == theme.LEVELS["L4"].colour]
    assert [list(trace.y) for trace in shown] == [
        list(trace.y) for trace in many.data if trace.name == "L4"]
    assert made.layout.yaxis.range == many.layout.yaxis.range


def test_the_star_stands_at_the_epoch_that_was_kept():
    kept = history().assign(kept=lambda table: table["epoch"] == 7)
    stars = [trace for trace in figures.training_curves(kept).data if trace.mode == "markers"]
    assert [star.x[0] for star in stars] == [7, 7]


def test_no_figure_offers_to_share_itself():
    assert theme.figure("a").layout.template.layout.modebar.remove[0] == "sendChartToCloud"


def test_the_star_stands_at_the_best_validation_epoch():
    stars = [trace for trace in figures.training_curves(history()).data if trace.mode == "markers"]
    assert [(star.name, star.x[0]) for star in stars] == [("L1 best", 20), ("L4 best", 12)]


def test_four_panels_share_one_legend(table):
    adapters = table[table["level"] != "drafter_tokens"]
    figure = truth_figures.four_panels(
        cosines=curves.cosine_histogram(adapters), positions=curves.by_position(table),
        lengths=curves.unbroken_prefix_histogram(table), speedups=speedups())
    shown = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert shown == list(dict.fromkeys(table["level"]))


def test_every_figure_is_the_same_json_twice_and_keeps_the_template_off_globals(table):
    before = pio.templates.default
    draw = [
        lambda: figures.reliability_curve(reliability.curve(table)),
        lambda: figures.cosine_histogram(curves.cosine_histogram(table)),
        lambda: timeline.scrubber(live_runs(), lambda ids: " ".join(map(str, ids))),
    ]
    for one in draw:
        assert one().to_json() == one().to_json()
    assert pio.templates.default == before


def test_shares_of_the_work_add_up_for_each_arm():
    runs = live_runs()
    stages, figure = timeline.stages(runs), timeline.shares(runs)
    assert (stages.groupby("arm")["share"].sum() - 1 < 1e-9).all()
    assert stages["ms"].sum() == pytest.approx(
        (timeline.spans(runs).eval("end_ms - start_ms")).sum())
    assert [sum(ring.values) for ring in figure.data] == pytest.approx(
        stages.groupby("arm", sort=False)["ms"].sum().tolist())
    assert all(len(set(ring.marker.colors)) == len(ring.labels) for ring in figure.data)


def test_a_trace_viewer_gets_every_span_in_microseconds():
    runs = live_runs()
    events, frame = timeline.trace_events(runs)["traceEvents"], timeline.spans(runs)
    names = {(e["pid"], e["name"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert [names[pid, "process_name"] for pid in (1, 2)] == list(runs)
    bars = pd.DataFrame([e for e in events if e["ph"] == "X"])
    assert sorted(bars["name"]) == sorted(frame["what"]) and set(bars["cat"]) == set(frame["lane"])
    assert np.allclose(sorted(bars["ts"]), sorted(1e3 * frame["start_ms"]))
    assert bars["dur"].sum() == pytest.approx(1e3 * frame.eval("end_ms - start_ms").sum())


def test_timeline_bars_are_the_spans_in_milliseconds():
    runs = live_runs()
    figure, frame = timeline.timeline(runs), timeline.spans(runs)
    verifier = next(trace for trace in figure.data if trace.name == "verifier")
    assert verifier.marker.color == theme.VERIFIER
    assert sum(verifier.x) == pytest.approx(
        frame[frame["lane"] == "verifier"].eval("end_ms - start_ms").sum())
    assert list(figure.layout.yaxis.categoryarray)[-1] == "speculative · drafter"


def test_the_scrubber_shows_the_text_that_each_arm_has_at_each_stop():
    runs = live_runs()
    figure = timeline.scrubber(runs, lambda ids: "-".join(map(str, ids)))
    assert len(figure.frames) == len(figure.layout.sliders[0].steps)
    last = figure.frames[-1].layout.annotations[-1].text
    assert last.count("12 tokens: 0-1-2-3-4-5-6-7-8-9-10-11") == 2
    counts = timeline.progress(runs)
    assert counts[counts["arm"] == "speculative"]["n_tokens"].tolist() == [5, 10, 12]


def test_a_run_without_times_is_named():
    with pytest.raises(MetricError, match="no time was recorded"):
        timeline.timeline({"baseline": Generation((1,), "eos")})
