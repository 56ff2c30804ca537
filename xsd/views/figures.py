"""Acceptance as pictures: pure functions from a tidy table (xsd/views/frames.py) to a plotly
figure. Nothing is displayed here."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from xsd.core import MetricError
from xsd.views import theme

CURVES = {
    "marginal": "share of tokens accepted at this position",
    "survival": "share of answers accepted up to here without a break",
}
SOURCES = {
    "measured": {"opacity": 1.0}, "predicted": {
        "opacity": 0.75, "pattern": {"shape": "/", "fgcolor": "white", "fillmode": "overlay"}
    }, "quoted": {
        "opacity": 0.5, "pattern": {"shape": "x", "fgcolor": "white", "fillmode": "overlay"}
    },
}
"""How a bar shows where its number comes from: plain if measured here, hatched if a model predicts
it, pale if another work says so."""


def curve_traces(frame: pd.DataFrame, curve: str = "marginal") -> list[go.Scatter]:
    """Two traces a level, band then line, for one of ``CURVES``. The line carries (n, low, high) as
    customdata for the hover."""
    if curve not in CURVES:
        raise MetricError(
            f"there is no acceptance curve named {curve!r}; choose from {', '.join(CURVES)}")
    traces = []
    for index, (level, part) in enumerate(frame.groupby("level", sort=False, observed=True)):
        mark, x = theme.mark(str(level), index), part["position"].tolist()
        low, high = part[f"{curve}_low"], part[f"{curve}_high"]
        band_x, band_y = ([*x, *x[::-1]],
                          [*high.tolist(), *low.tolist()[::-1]]) if low.notna().all() else ([], [])
        traces.append(
            go.Scatter(x=band_x, y=band_y, fill="toself", fillcolor=theme.rgba(mark.colour, 0.13),
                       line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False,
                       legendgroup=str(level), name=f"{level} interval",
                       ))
        traces.append(
            go.Scatter(
                x=x, y=part[curve].tolist(), mode="lines+markers", name=str(level),
                legendgroup=str(level), line={"color": mark.colour, "dash": mark.dash, "width": 2},
                marker={"symbol": mark.symbol, "size": 8, "color": mark.colour},
                customdata=pd.concat([part["n"], low, high],
                                     axis=1).to_numpy().tolist(), hovertemplate=
                f"<b>{level}</b> · position %{{x}}<br>%{{y:.1%}} [%{{customdata[1]:.1%}}, "
                f"%{{customdata[2]:.1%}}]"
                "<br>n = %{customdata[0]:.0f}<extra></extra>",
            ))
    return traces


def acceptance_by_position(frame: pd.DataFrame, *, curve: str = "marginal",
                           title: str = "") -> go.Figure:
    """Acceptance at each position, a line and a 95 % band a level.

    frame: ``frames.by_position`` (level, position, n, <curve>, <curve>_low, <curve>_high). curve:
    marginal or survival.
    """
    figure = theme.figure(title or f"Acceptance by position · {curve}",
                          x="position in the answer (0 is the first drafted token)", y="",
                          height=420)
    figure.add_traces(curve_traces(frame, curve))
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    figure.add_annotation(text=CURVES.get(curve, curve), xref="paper", yref="paper", x=0, y=1.07,
                          showarrow=False, xanchor="left",
                          font={"size": 13, "color": theme.SOFT_INK},
                          )
    return figure


def accepted_per_round_dots(
    frame: pd.DataFrame, *,
    title: str = "Mean accepted length: what counts is the distance above the best floor"
) -> go.Figure:
    """The headline: one dot with its interval for each level, floor and ceiling; a line at the best
    floor.

    frame: name, kind ("adapter" | "floor" | "drafter" | "ceiling"), value, low, high (tokens), n
    (samples).
    Rows are drawn in groups (ceiling, adapters, drafter, floors), the largest on top.
    """
    rank = {"ceiling": 0, "adapter": 1, "drafter": 2, "floor": 3}
    ordered = frame.assign(_rank=frame["kind"].map(rank)).sort_values(["_rank", "value"],
                                                                      ascending=[True, False],
                                                                      kind="stable")
    figure = theme.figure(title,
                          x="tokens accepted before the first rejection, mean and 95 % interval",
                          height=150 + 34 * len(frame))
    for kind, part in ordered.groupby("kind", sort=False, observed=True):
        colour = theme.KINDS[str(kind)]
        figure.add_trace(
            go.Scatter(
                x=part["value"].tolist(), y=part["name"].tolist(), mode="markers", name=str(kind),
                marker={
                    "size": 12, "color": colour,
                    "symbol": "diamond" if kind == "floor" else "circle"
                }, error_x={
                    "type": "data", "symmetric": False,
                    "array": (part["high"] - part["value"]).tolist(), "arrayminus":
                        (part["value"] - part["low"]).tolist(), "thickness": 2, "width": 5,
                    "color": colour,
                }, customdata=part[["low", "high", "n"]].to_numpy().tolist(), hovertemplate=
                "<b>%{y}</b><br>%{x:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<br>n = "
                "%{customdata[2]}<extra></extra>",
            ))
    floors = ordered.loc[ordered["kind"].isin(["floor", "drafter"]), "value"]
    if len(floors):
        best = float(floors.max())
        figure.add_vline(x=best, line={"dash": "dash", "color": theme.SOFT_INK, "width": 1.5})
        figure.add_annotation(x=best, y=1, yref="paper", yanchor="bottom", text="best floor",
                              showarrow=False, font={"size": 12, "color": theme.SOFT_INK})
    figure.update_yaxes(categoryorder="array", categoryarray=ordered["name"].tolist()[::-1],
                        showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_layout(legend_y=-0.28)
    return figure


def cosine_histogram(frame: pd.DataFrame, *, thresholds: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95),
                     title: str = "") -> go.Figure:
    """Cosine of aligned and verifier states, a step line a level; dotted lines at the thresholds.

    frame: ``frames.cosine_histogram`` (level, cosine_low, cosine_high, n, share).
    """
    figure = theme.figure(title or "How close the aligned states come",
                          x="cosine to the verifier's state", y="share of tokens")
    for index, (level, part) in enumerate(frame.groupby("level", sort=False, observed=True)):
        mark = theme.mark(str(level), index)
        figure.add_trace(
            go.Scatter(
                x=((part["cosine_low"] + part["cosine_high"]) / 2).tolist(),
                y=part["share"].tolist(), name=str(level), mode="lines",
                line={"shape": "hvh", "color": mark.colour, "dash": mark.dash,
                      "width": 2}, hovertemplate=
                f"<b>{level}</b> · cosine %{{x:.3f}}<br>%{{y:.1%}} of tokens<extra></extra>",
            ))
    for tau in thresholds:
        figure.add_vline(x=tau, line={"dash": "dot", "color": theme.REJECTED, "width": 1})
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def reliability_curve(frame: pd.DataFrame, *, title: str = "") -> go.Figure:
    """P(same token) against cosine, with intervals: how far a cosine may be trusted.

    frame: ``frames.reliability`` (level, cosine, cosine_low, cosine_high, n, rate, low, high).
    Marker area grows with n.
    """
    figure = theme.figure(title or "Does a high cosine mean the same token?",
                          x="cosine to the verifier's state", y="P(same token)")
    largest = max(int(frame["n"].max()), 1)
    for index, (level, part) in enumerate(frame.groupby("level", sort=False, observed=True)):
        mark = theme.mark(str(level), index)
        figure.add_trace(
            go.Scatter(
                x=part["cosine"].tolist(), y=part["rate"].tolist(), mode="lines+markers",
                name=str(level), line={"color": mark.colour, "dash": mark.dash, "width": 2},
                marker={
                    "color": mark.colour, "symbol": mark.symbol,
                    "size": [5 + 11 * math.sqrt(n / largest) for n in part["n"]]
                }, error_y={
                    "type": "data", "symmetric": False,
                    "array": (part["high"] - part["rate"]).tolist(),
                    "arrayminus": (part["rate"] - part["low"]).tolist(), "thickness": 1, "width": 3,
                    "color": theme.rgba(mark.colour, 0.6),
                }, customdata=part[["cosine_low", "cosine_high",
                                    "n"]].to_numpy().tolist(), hovertemplate=
                f"<b>{level}</b> · cosine %{{customdata[0]:.2f}} to "
                f"%{{customdata[1]:.2f}}<br>%{{y:.1%}} the same token"
                "<br>n = %{customdata[2]:.0f}<extra></extra>",
            ))
    figure.update_yaxes(range=[-0.02, 1.03], tickformat=".0%")
    return figure


def speedup_bars(
        frame: pd.DataFrame, *,
        title: str = "Speed-up against the verifier's own decoding, same run") -> go.Figure:
    """Horizontal bars around 1×.

    frame: name, value, low, high (ratio; low and high may be NaN), kind ("measured" | "predicted" |
    "quoted"), optional n. First
    row on top.
    """
    figure = theme.figure(title, x="times as fast as the baseline", height=150 + 40 * len(frame))
    for kind, part in frame.groupby("kind", sort=False, observed=True):
        if kind not in SOURCES:
            raise MetricError(f"a speed-up is measured, predicted or quoted, not {kind!r}")
        figure.add_trace(
            go.Bar(
                x=part["value"].tolist(), y=part["name"].tolist(), orientation="h", name=str(kind),
                marker={
                    "color": theme.VERIFIER if kind == "measured" else theme.REJECTED,
                    **SOURCES[str(kind)]
                }, error_x={
                    "type": "data", "symmetric": False,
                    "array": (part["high"] - part["value"]).tolist(), "arrayminus":
                        (part["value"] - part["low"]).tolist(), "thickness": 1.5, "width": 5,
                    "color": theme.INK,
                }, text=[f"{value:.2f}×" for value in part["value"]], textposition="inside",
                insidetextanchor="start",
                hovertemplate="<b>%{y}</b><br>%{x:.3f}×<extra>" + str(kind) + "</extra>",
            ))
    figure.add_vline(x=1, line={"dash": "dash", "color": theme.SOFT_INK, "width": 1.5})
    figure.update_yaxes(categoryorder="array", categoryarray=frame["name"].tolist()[::-1],
                        showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_layout(legend_y=-0.3, barmode="overlay")
    return figure


def training_curves(history: pd.DataFrame, *, value: str = "loss", title: str = "") -> go.Figure:
    """One line a level and split over epochs; validation solid, training pale; a star at the best
    validation epoch.

    history: level, epoch, split ("train" | "validation"), and the column named by ``value``; lower
    is better if the name holds "loss".
    """
    figure = theme.figure(title or f"Training · {value.replace('_', ' ')}", x="epoch",
                          y=value.replace("_", " "))
    for index, ((level, split),
                part) in enumerate(history.groupby(["level", "split"], sort=False, observed=True)):
        mark = theme.mark(str(level), index)
        figure.add_trace(
            go.Scatter(
                x=part["epoch"].tolist(), y=part[value].tolist(), mode="lines",
                name=f"{level} {split}", legendgroup=str(level), line={
                    "color": mark.colour if split == "validation" else theme.rgba(mark.colour, 0.4),
                    "dash": mark.dash, "width": 2
                },
                hovertemplate=f"<b>{level}</b> {split} · epoch %{{x}}<br>%{{y:.4g}}<extra></extra>",
            ))
        if split == "validation" and part[value].notna().any():
            best = part.loc[part[value].idxmin() if "loss" in value else part[value].idxmax()]
            figure.add_trace(
                go.Scatter(x=[best["epoch"]], y=[best[value]], mode="markers",
                           legendgroup=str(level), showlegend=False, name=f"{level} best",
                           marker={"symbol": "star", "size": 13, "color": mark.colour},
                           hovertemplate=f"<b>{level}</b> best · epoch %{{x}}<extra></extra>",
                           ))
    return figure


def four_panels(*, cosines: pd.DataFrame, positions: pd.DataFrame, lengths: pd.DataFrame,
                speedups: pd.DataFrame, title: str = "Summary") -> go.Figure:
    """Histogram of cosines, acceptance by position, accepted lengths and speed-up in one picture.

    cosines: ``frames.cosine_histogram``. positions: ``frames.by_position``. lengths:
    ``frames.unbroken_prefix_histogram``.
    speedups: name, value, low, high, kind as in :func:`speedup_bars`.
    """
    names = ("cosine of the states", "acceptance by position (token truth)",
             "tokens accepted before the first rejection", "speed-up")
    figure = make_subplots(rows=2, cols=2, subplot_titles=names, horizontal_spacing=0.1,
                           vertical_spacing=0.16)
    figure.update_layout(template=theme.template(), title={"text": title}, height=760,
                         margin={"t": 90}, legend={"y": -0.08}, barmode="group")
    histogram = cosine_histogram(cosines, thresholds=())
    for trace in histogram.data:
        figure.add_trace(trace.update(showlegend=False, legendgroup=trace.name), row=1, col=1)
    figure.add_traces(curve_traces(positions, "marginal"), rows=1, cols=2)
    for index, (level, part) in enumerate(lengths.groupby("level", sort=False, observed=True)):
        bar = go.Bar(x=part["length"].tolist(), y=part["share"].tolist(), name=str(level),
                     legendgroup=str(level), showlegend=False,
                     marker={"color": theme.mark(str(level), index).colour},
                     hovertemplate=f"<b>{level}</b> %{{x}} tokens: %{{y:.1%}}<extra></extra>",
                     )
        figure.add_trace(bar, row=2, col=1)
    for trace in speedup_bars(speedups).data:
        labels = [f"{name} · {value:.2f}×" for name, value in zip(trace.y, trace.x, strict=True)]
        figure.add_trace(trace.update(showlegend=False, text=labels), row=2, col=2)
    figure.update_yaxes(categoryorder="array", categoryarray=speedups["name"].tolist()[::-1],
                        showticklabels=False, showgrid=False, row=2, col=2)
    figure.add_vline(x=1, line={"dash": "dash", "color": theme.SOFT_INK, "width": 1.5}, row=2,
                     col=2)
    for row, column in ((1, 1), (1, 2), (2, 1)):
        figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=row, col=column)
    return figure


def waterfall(frame: pd.DataFrame, *, title: str = "Where acceptance is lost") -> go.Figure:
    """From the ceiling down to what a rollout accepts, step by step.

    frame: name, value (change in acceptance, a share; the first row is the starting level), low,
    high.
    """
    measures = ["absolute", *["relative"] * (len(frame) - 1), "total"]
    figure = theme.figure(title, y="acceptance")
    figure.add_trace(
        go.Waterfall(
            x=[*frame["name"], "what remains"], y=[*frame["value"], 0], measure=measures, text=[
                f"{frame['value'].iloc[0]:.1%}", *(f"{v:+.1%}" for v in frame["value"].iloc[1:]),
                f"{frame['value'].sum():.1%}"
            ], customdata=[*frame[["low", "high"]].to_numpy().tolist(),
                           [math.nan, math.nan]], decreasing={"marker": {"color": theme.REJECTED}},
            increasing={"marker": {"color": theme.ADAPTER}},
            totals={"marker": {"color": theme.VERIFIER}}, connector={"line": {"color": theme.GRID}},
            hovertemplate=
            "<b>%{x}</b><br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>",
        ))
    figure.update_yaxes(tickformat=".0%")
    return figure


def data_of(figure: go.Figure) -> list[Mapping[str, object]]:
    """Name, x and y of every trace, as plain lists: what a golden cell or a test compares instead
    of a picture."""
    return [{"name": trace.name, "x": list(trace.x or ()), "y": list(trace.y or ())}
            for trace in figure.data]
