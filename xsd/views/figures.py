"""Acceptance as pictures: pure functions from a tidy table of xsd/evaluate to a plotly figure."""

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from xsd.core import MetricError
from xsd.views import safe, theme

CURVES = {
    "marginal": "share of tokens accepted at this position",
    "survival": "share of answers accepted up to here without a break",
}
_HATCHED = {"fgcolor": "white", "fillmode": "overlay"}
SOURCES = {
    "measured": {"opacity": 1.0},
    "predicted": {"opacity": 0.75, "pattern": {"shape": "/", **_HATCHED}},
    "quoted": {"opacity": 0.5, "pattern": {"shape": "x", **_HATCHED}},
}
"""How a bar shows where its number comes from: here, a model, another work."""
PALE = "#C9CDD2"
YARDSTICK = "reads the verifier (no event camera)"
"""What rows of the kind ceiling are called: where drafts of the event camera beat them, they are
none."""


def curve_traces(frame: pd.DataFrame, curve: str = "marginal") -> list[go.Scatter]:
    """Two traces per level, its band then its line, for one of ``CURVES``. Raises: MetricError for
    another curve."""
    if curve not in CURVES:
        raise MetricError(
            f"there is no acceptance curve named {curve!r}; choose from {', '.join(CURVES)}")
    traces = []
    for level, part, mark in theme.by_level(frame):
        x, low, high = part["position"].tolist(), part[f"{curve}_low"], part[f"{curve}_high"]
        known = low.notna().all()  # a single sequence has no interval, so no band
        band = go.Scatter(
            x=[*x, *x[::-1]] if known else [], y=[*high, *low[::-1]] if known else [],
            fill="toself", fillcolor=theme.rgba(mark.colour, 0.13), line={"width": 0}, mode="lines",
            hoverinfo="skip", showlegend=False, legendgroup=level, name=f"{level} interval")
        line = go.Scatter(x=x, y=part[curve].tolist(), mode="lines+markers", name=level,
                          legendgroup=level, line=mark.line, marker=mark.marker(8),
                          customdata=pd.concat([part["n"], low, high], axis=1).to_numpy().tolist(),
                          hovertemplate=f"<b>{level}</b> · position %{{x}}<br>%{{y:.1%}} "
                          "[%{customdata[1]:.1%}, %{customdata[2]:.1%}]<br>n = %{customdata[0]:.0f}"
                          "<extra></extra>")
        traces += [band, line]
    return traces


def acceptance_by_position(frame: pd.DataFrame, *, curve: str = "marginal",
                           title: str = "") -> go.Figure:
    """Acceptance at each position: a line and a 95 % band per level. frame: level, position, n,
    <curve>, <curve>_low, <curve>_high; curve: of ``CURVES``."""
    figure = theme.figure(title or f"Acceptance by position · {curve}", height=420,
                          x="position in the answer (0 is the first drafted token)")
    figure.add_traces(curve_traces(frame, curve))
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    figure.add_annotation(text=CURVES[curve], xref="paper", yref="paper", x=0, y=1.07,
                          showarrow=False, xanchor="left",
                          font={"size": 13, "color": theme.SOFT_INK})
    return figure


def accepted_per_round_dots(
        frame: pd.DataFrame, *, x: str = "accepted drafts per round",
        title: str = "What counts is the distance above the best floor") -> go.Figure:
    """The headline: one dot with its interval, where one is known, per level, floor and ceiling; a
    line at the best floor. frame: name, kind ("ceiling" | "adapter" | "drafter" | "floor": drawn in
    this order, the largest value on top), value, low, high, n (what was counted)."""
    frame = safe.labels(frame)
    rank = frame["kind"].map({"ceiling": 0, "adapter": 1, "drafter": 2, "floor": 3})
    ordered = frame.assign(_rank=rank).sort_values(["_rank", "value"], ascending=[True, False],
                                                   kind="stable")
    known = ordered["low"].notna().any()
    x += ", mean and 95 % interval" if known else " (one sequence: no interval)"
    bounds = " [%{customdata[0]:.2f}, %{customdata[1]:.2f}]" if known else ""
    figure = theme.figure(title, x=x, height=150 + 34 * len(frame))
    for kind, part in ordered.groupby("kind", sort=False, observed=True):
        mark = theme.Mark(theme.KINDS[kind], symbol="diamond" if kind == "floor" else "circle")
        figure.add_scatter(
            x=part["value"].tolist(), y=part["name"].tolist(), mode="markers",
            name=YARDSTICK if kind == "ceiling" else kind, marker=mark.marker(12),
            error_x=theme.interval(part, thickness=2, width=5, color=mark.colour),
            customdata=part[["low", "high", "n"]].to_numpy().tolist(),
            hovertemplate=f"<b>%{{y}}</b><br>%{{x:.2f}}{bounds}<br>n = %{{customdata[2]}}"
            "<extra></extra>")
    floors = ordered.loc[ordered["kind"].isin(["floor", "drafter"]), "value"]
    if len(floors):
        theme.upright(figure, float(floors.max()), "best floor")
    figure.update_yaxes(categoryorder="array", categoryarray=ordered["name"].tolist()[::-1],
                        showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_layout(legend_y=-0.28)
    return figure


def acceptance_by_kind(frame: pd.DataFrame, *, title: str = "Which words are accepted",
                       least: int = 1) -> go.Figure:
    """A dot with its interval for each level in each kind of word; the kinds accepted best on top.
    frame: level, kind, value, low, high, n (tokens). least: kinds with fewer tokens are left out.
    Raises: MetricError when no kind has that many tokens."""
    frame = safe.labels(frame[frame.groupby("kind")["n"].transform("max") >= least])
    if frame.empty:
        raise MetricError(
            f"no kind of word has {least} tokens or more; lower ``least`` or evaluate more samples")
    order = frame.groupby("kind")["value"].max().sort_values(kind="stable").index.tolist()
    n_levels = frame["level"].nunique()
    figure = theme.figure(title, x="share of tokens whose draft is the verifier's own",
                          height=170 + 46 * len(order))
    for index, (level, part, mark) in enumerate(theme.by_level(frame)):
        # levels stand above each other within a kind's row
        offset = (index - (n_levels - 1) / 2) * 0.6 / n_levels
        figure.add_scatter(
            x=part["value"].tolist(), y=[order.index(kind) - offset for kind in part["kind"]],
            mode="markers", name=level, marker=mark.marker(9),
            error_x=theme.interval(part, thickness=1, width=0, color=theme.rgba(mark.colour, 0.5)),
            customdata=part[["kind", "low", "high", "n"]].to_numpy().tolist(),
            hovertemplate=f"<b>{level}</b> · %{{customdata[0]}}<br>%{{x:.1%}} "
            "[%{customdata[1]:.1%}, %{customdata[2]:.1%}]<br>n = %{customdata[3]}<extra></extra>")
    figure.update_yaxes(tickvals=list(range(len(order))), ticktext=order,
                        range=[-0.6, len(order) - 0.4])
    figure.update_xaxes(range=[-0.02, 1.03], tickformat=".0%")
    return figure


def cosine_histogram(frame: pd.DataFrame, *, thresholds: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95),
                     title: str = "How close the aligned states come") -> go.Figure:
    """One step line per level, dotted lines at the thresholds. frame: level, cosine_low,
    cosine_high, share."""
    figure = theme.figure(title, x="cosine to the verifier's state", y="share of tokens")
    for level, part, mark in theme.by_level(frame):
        figure.add_scatter(
            x=part[["cosine_low", "cosine_high"]].mean(axis=1).tolist(), y=part["share"].tolist(),
            name=level, mode="lines",
            line={"shape": "hvh", **mark.line}, hovertemplate=f"<b>{level}</b> · cosine "
            "%{x:.3f}<br>%{y:.1%} of tokens<extra></extra>")
    for tau in thresholds:
        figure.add_vline(x=tau, line={"dash": "dot", "color": theme.REJECTED, "width": 1})
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def reliability_curve(frame: pd.DataFrame, *,
                      title: str = "Does a high cosine mean the same token?") -> go.Figure:
    """P(same token) against cosine: how far a cosine may be trusted. frame: level, cosine,
    cosine_low, cosine_high, n (area of the marker), rate, low, high."""
    figure = theme.figure(title, x="cosine to the verifier's state", y="P(same token)")
    largest = max(int(frame["n"].max()), 1)
    for level, part, mark in theme.by_level(frame):
        sizes = [5 + 11 * math.sqrt(n / largest) for n in part["n"]]
        figure.add_scatter(
            x=part["cosine"].tolist(), y=part["rate"].tolist(), mode="lines+markers", name=level,
            line=mark.line, marker=mark.marker(sizes),
            error_y=theme.interval(part, "rate", thickness=1, width=3,
                                   color=theme.rgba(mark.colour, 0.6)),
            customdata=part[["cosine_low", "cosine_high", "n"]].to_numpy().tolist(),
            hovertemplate=f"<b>{level}</b> · cosine %{{customdata[0]:.2f}} to "
            "%{customdata[1]:.2f}<br>%{y:.1%} the same token<br>n = %{customdata[2]:.0f}"
            "<extra></extra>")
    figure.update_yaxes(range=[-0.02, 1.03], tickformat=".0%")
    return figure


def speedup_bars(
        frame: pd.DataFrame, *,
        title: str = "Speed-up against the verifier's own decoding, same run") -> go.Figure:
    """Horizontal bars around 1×, the first row on top. frame: name, value, low, high (ratios; low
    and high may be NaN), kind (of ``SOURCES``); and where known baseline (by name) and busy: then
    bars are pale and claim nothing. Raises: MetricError for another kind."""
    against = " or ".join(dict.fromkeys(frame.get("baseline", ["the baseline"])))
    busy = any(frame.get("busy", ()))
    note = "the machine was busy or unsteady: no speed-up is claimed" if busy else ""
    figure = theme.figure(title, note=note, x=f"times as fast as {against}",
                          height=150 + 40 * len(frame))
    frame = safe.labels(frame)
    for kind, part in frame.groupby("kind", sort=False, observed=True):
        if kind not in SOURCES:
            raise MetricError(f"a speed-up is measured, predicted or quoted, not {kind!r}")
        colour = theme.VERIFIER if kind == "measured" else theme.REJECTED
        figure.add_bar(
            x=part["value"].tolist(), y=part["name"].tolist(), orientation="h", name=kind,
            marker={"color": colour, **SOURCES[kind]}, opacity=0.3 if busy else 1,
            error_x=theme.interval(part, thickness=1.5, width=5, color=theme.INK),
            text=["" if busy else f"{value:.2f}×" for value in part["value"]],
            textposition="inside", insidetextanchor="start",
            hovertemplate=f"<b>%{{y}}</b><br>%{{x:.3f}}×<extra>{kind}</extra>")
    figure.add_vline(x=1, line=theme.DASHED)
    figure.update_yaxes(categoryorder="array", categoryarray=frame["name"].tolist()[::-1],
                        showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_layout(legend_y=-0.3, barmode="overlay")
    return figure


def panels(drawn: go.Figure, *, least: int = 5, columns: int = 4) -> go.Figure:
    """A figure of lines that lie on each other as small multiples with the same axes: each level in
    front of all others in grey. Figures of fewer than ``least`` levels stay as they are."""
    levels = list(dict.fromkeys(trace.legendgroup or trace.name for trace in drawn.data))
    if len(levels) < least:
        return drawn
    rows = -(-len(levels) // columns)
    x, y = (drawn.layout[axis].title.text for axis in ("xaxis", "yaxis"))
    made = make_subplots(rows, columns, subplot_titles=levels, shared_xaxes="all",
                         shared_yaxes="all", horizontal_spacing=0.03, vertical_spacing=0.24 / rows,
                         x_title=x,
                         y_title=y or next((one.text for one in drawn.layout.annotations), ""))
    made.update_annotations(font_size=13)
    made.update_annotations(xshift=-60, selector={"textangle": -90})  # clear of "100%"
    made.update_layout(template=drawn.layout.template, title=drawn.layout.title, showlegend=False,
                       height=130 + 210 * rows, margin={"l": 90, "b": 60})
    for place, level in enumerate(levels):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        for trace in drawn.data:
            if (trace.legendgroup or trace.name) != level and trace.fill is None:
                made.add_trace(go.Scatter(x=trace.x, y=trace.y, mode="lines", hoverinfo="skip",
                                          line={"color": PALE, "width": 1.5},
                                          name=trace.name), **at)
        for trace in drawn.data:
            if (trace.legendgroup or trace.name) == level:
                made.add_trace(trace, **at)
        for line in drawn.layout.shapes:
            made.add_vline(x=line.x0, line=line.line.to_plotly_json(), **at)
    for axis in ("xaxis", "yaxis"):
        given = drawn.layout[axis]
        getattr(made, f"update_{axis[0]}axes")(tickformat=given.tickformat, range=given.range,
                                               rangemode=given.rangemode)
    return made


def training_curves(history: pd.DataFrame, *, value: str = "loss", title: str = "") -> go.Figure:
    """One line per level and split over epochs; validation solid, training pale; a star at the
    epoch that was kept (``kept``; where that is not known, at the best one). history: level, epoch,
    split ("train" | "validation") and the column named by ``value``; lower is better if the name
    holds "loss"."""
    called, history = value.replace("_", " "), safe.labels(history)
    figure = theme.figure(title or f"Training · {called}", x="epoch", y=called)
    groups = history.groupby(["level", "split"], sort=False, observed=True)
    for index, ((level, split), part) in enumerate(groups):
        mark, known = theme.mark(str(level), index), part[value].notna().any()
        colour = mark.colour if split == "validation" else theme.rgba(mark.colour, 0.4)
        figure.add_scatter(
            x=part["epoch"].tolist(), y=part[value].tolist(), mode="lines", name=f"{level} {split}",
            legendgroup=str(level), line={"color": colour, "dash": mark.dash, "width": 2},
            hovertemplate=f"<b>{level}</b> {split} · epoch %{{x}}<br>%{{y:.4g}}<extra></extra>")
        if split == "validation" and known:
            kept = part[part["kept"].eq(True)] if "kept" in part else part[:0]
            best = kept.iloc[0] if len(kept) else part.loc[
                part[value].idxmin() if "loss" in value else part[value].idxmax()]
            figure.add_scatter(x=[best["epoch"]], y=[best[value]], mode="markers",
                               legendgroup=str(level), showlegend=False, name=f"{level} best",
                               marker={"symbol": "star", "size": 13, "color": mark.colour},
                               hovertemplate=f"<b>{level}</b> best · epoch %{{x}}<extra></extra>")
    return figure


def training_panels(history: pd.DataFrame, values: Sequence[str]) -> go.Figure:
    """:func:`training_curves` of several values, three panels a row, with one legend."""
    names = [safe.label(value.replace("_", " ")) for value in values]
    figure = make_subplots(-(-len(values) // 3), 3, subplot_titles=names, vertical_spacing=0.16)
    figure.update_layout(template=theme.template(), height=300 * -(-len(values) // 3))
    for number, value in enumerate(values):
        row, column = number // 3 + 1, number % 3 + 1
        for trace in training_curves(history, value=value).data:
            trace.showlegend = number == 0 and trace.showlegend is not False
            figure.add_trace(trace, row=row, col=column)
        if number + 3 >= len(values):  # below it stands no panel
            figure.update_xaxes(title_text="epoch", row=row, col=column)
        if "loss" not in value and value != "cosine":
            figure.update_yaxes(tickformat=".1~%", row=row, col=column)
    return figure
