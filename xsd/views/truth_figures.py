"""Pictures of where acceptance is lost and of what the drafter saw: pure functions from tidy tables
(xsd/steps/truth.py) to figures."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from xsd.core import MetricError
from xsd.views import theme

ARM_COLOURS = {
    "real events": theme.ADAPTER, "blank events": theme.REJECTED, "other scene": theme.DRAFTER,
    "text only": theme.SOFT_INK
}
ARM_SYMBOLS = {
    "real events": "circle", "blank events": "square", "other scene": "diamond", "text only": "x"
}
LOSS = "#C0504D"
UNITS = {
    "token_acceptance": ("share of tokens that are the verifier's", ".0%"),
    "accepted_per_round": ("accepted draft tokens a round", ".1f"),
}
"""Axis title and number format of a unit."""


def gap_waterfall(frame: pd.DataFrame, *, title: str = "Where acceptance is lost") -> go.Figure:
    """Levels as bars from zero, the losses between them as floating bars, all with their clustered
    intervals.

    frame: decomposition.rows of one level and unit (metric "level" | "loss", name, value, low,
    high, start, end, unit). The branch of the
    drift, which begins again at a level already drawn, stands apart on the right.
    """
    if frame.empty:
        raise MetricError("there is no step to draw; measure the gap first")
    label, form = UNITS[str(frame["unit"].iloc[0])]
    figure, width = theme.figure(title, y=label, height=460), 0.62
    places, names = _places(frame)
    top = float(max(frame["start"].max(), frame["end"].max()))
    for kind, says in (("level", "accepted"), ("loss", "lost")):
        own = [(place, row) for place, row in zip(places, frame.to_dict("records"), strict=True)
               if row["metric"] == kind]
        base = [0.0 if kind == "level" else row["start"] for _, row in own]
        height = [row["end"] - start for start, (_, row) in zip(base, own, strict=True)]
        colours = [
            _level_colour(row["name"])
            if kind == "level" else LOSS if row["value"] >= 0 else theme.ADAPTER for _, row in own
        ]
        errors = [_spread(row) for _, row in own]
        if kind == "loss":  # a larger loss ends lower
            errors = [(below, above) for above, below in errors]
        figure.add_trace(
            go.Bar(
                x=[place for place, _ in own], y=height, base=base, width=width, name=says,
                marker={"color": colours, "opacity": 0.9 if kind == "level" else 0.75}, error_y={
                    "type": "data", "symmetric": False, "array": [up for up, _ in errors],
                    "arrayminus": [down for _, down in errors], "color": theme.INK,
                    "thickness": 1.3, "width": 4,
                }, customdata=[[row["name"], row["value"], row["low"], row["high"]]
                               for _, row in own],
                hovertemplate=f"<b>%{{customdata[0]}}</b><br>%{{customdata[1]:{form}}} "
                f"[%{{customdata[2]:{form}}}, %{{customdata[3]:{form}}}]<extra>{says}</extra>",
                showlegend=False,
            ))  # fmt: skip
        for (place, row), start, rise in zip(own, base, height, strict=True):
            sign = "" if kind == "level" else "−" if row[
                "value"] > 0 else "+" if row["value"] < 0 else "±"
            number = f"{abs(row['value']):.1%}" if form.endswith(
                "%") else f"{abs(row['value']):.2f}"
            inside = kind == "loss" and abs(rise) > 0.12 * top
            y = start + rise / 2 if inside else max(
                start, start + rise) + (_spread(row)[0] if kind == "level" else 0.0)
            figure.add_annotation(x=place, y=y, text=f"<b>{sign}{number}</b>", showarrow=False,
                                  font={"size": 12}, yanchor="middle" if inside else "bottom",
                                  yshift=0 if inside else 3,
                                  )  # fmt: skip
    figure.update_xaxes(tickvals=places, ticktext=names, tickfont={"size": 12}, showgrid=False,
                        tickangle=0, range=[min(places) - 0.6, max(places) + 0.6])
    figure.update_yaxes(tickformat=form, range=[0, 1.14 * top])
    figure.update_layout(bargap=0.2, margin={"b": 80})
    return figure


def _places(frame: pd.DataFrame) -> tuple[list[float], list[str]]:
    """x of every step and its name in lines; a level that follows a level begins the branch, one
    place further on."""
    places: list[float] = []
    kinds = frame["metric"].tolist()
    for i, kind in enumerate(kinds):
        step = 1.0 if i and (kinds[i - 1] != "level" or kind != "level") else 1.7
        places.append(places[-1] + step if places else 0.0)
    return places, [str(name).replace("-", "-<br>").replace(" ", "<br>") for name in frame["name"]]


def _level_colour(name: str) -> str:
    return theme.VERIFIER if name.startswith(
        "verifier") else theme.ADAPTER if name != "free-running" else theme.DRAFTER


def _spread(row: dict[str, Any]) -> tuple[float, float]:
    """(above, below) the value; 0 where the interval is unknown."""
    low, high = (row["value"] if row[side] is None or math.isnan(row[side]) else row[side]
                 for side in ("low", "high"))
    return max(0.0, high - row["value"]), max(0.0, row["value"] - low)


def arms(frame: pd.DataFrame, *, floor: float | None = None,
         title: str = "Acceptance by what the drafter saw") -> go.Figure:
    """A row a level, a dot with its interval for each arm; a dashed line at the best floor.

    frame: level, unit (one of them), arm, value, low, high, n (xsd/steps/truth.py, table arms).
    """
    if frame.empty:
        raise MetricError("there is no arm to draw; measure the counterfactual arms first")
    label, form = UNITS[str(frame["unit"].iloc[0])]
    levels = list(dict.fromkeys(frame["level"]))[::-1]
    names = [name for name in dict.fromkeys(frame["arm"]) if name != "real events again"]
    figure = theme.figure(title, x=label, height=190 + 52 * len(levels))
    for index, name in enumerate(names):
        part = frame[frame["arm"] == name]
        spread = [_spread(row) for row in part.to_dict("records")]
        shift = ((len(names) - 1) / 2 - index) * 0.62 / max(len(names), 1)
        colour = ARM_COLOURS.get(name, theme.SOFT_INK)
        figure.add_trace(
            go.Scatter(
                x=part["value"].tolist(),
                y=[levels.index(level) + shift
                   for level in part["level"]], mode="markers", name=name,
                marker={"color": colour, "symbol": ARM_SYMBOLS.get(name, "circle"),
                        "size": 10}, error_x={
                            "type": "data", "symmetric": False, "array": [up for up, _ in spread],
                            "arrayminus": [down for _, down in spread], "thickness": 1.3,
                            "width": 4, "color": theme.rgba(colour, 0.6),
                        }, customdata=part[["level", "low", "high",
                                            "n"]].to_numpy().tolist(), hovertemplate=
                f"<b>%{{customdata[0]}}</b>, {name}<br>%{{x:{form}}} [%{{customdata[1]:{form}}}, "
                f"%{{customdata[2]:{form}}}]"
                "<br>n = %{customdata[3]:.0f}<extra></extra>",
            ))  # fmt: skip
    if floor is not None:
        figure.add_vline(x=floor, line={"dash": "dash", "color": theme.SOFT_INK, "width": 1.5})
        figure.add_annotation(x=floor, y=1, yref="paper", yanchor="bottom",
                              text="best floor that looks at nothing", showarrow=False,
                              font={"size": 12, "color": theme.SOFT_INK},
                              )
    figure.update_yaxes(tickvals=list(range(len(levels))),
                        ticktext=[level.replace("_", " ") for level in levels],
                        range=[-0.6, len(levels) - 0.4])
    figure.update_xaxes(tickformat=form, rangemode="tozero")
    figure.update_layout(legend_y=-60 / (52 * len(levels) + 60))
    return figure


def losses_by_kind(frame: pd.DataFrame, *, least: int = 5,
                   title: str = "What is lost in which words") -> go.Figure:
    """A grid of kinds of words and losses; each cell says how much acceptance is lost, in points,
    bold where the interval excludes zero.

    frame: loss, group, value, low, high, n (table kinds). least: kinds with fewer tokens are left
    out. Raises: MetricError when none has.
    """
    frame = frame[frame.groupby("group")["n"].transform("max") >= least]
    if frame.empty:
        raise MetricError(
            f"no kind of word has {least} tokens or more; lower ``least`` or evaluate more samples")
    losses, kinds = list(dict.fromkeys(frame["loss"])), list(dict.fromkeys(frame["group"]))
    cells = {(row["group"], row["loss"]): row for row in frame.to_dict("records")}
    values = [[100 * cells[kind, loss]["value"] for loss in losses] for kind in kinds]
    texts = [[_points(cells[kind, loss]) for loss in losses] for kind in kinds]
    about = [[[cells[kind, loss][key] for key in ("low", "high", "n")] for loss in losses]
             for kind in kinds]
    largest = max(10.0, max(abs(value) for line in values for value in line))
    counted = [f"{kind}  (n = {cells[kind, losses[0]]['n']:.0f})" for kind in kinds]
    figure = theme.figure(title, height=190 + 34 * len(kinds))
    figure.add_trace(
        go.Heatmap(
            z=values, x=[loss.replace(" ", "<br>") for loss in losses], y=counted, text=texts,
            texttemplate="%{text}", textfont={"size": 12}, customdata=about,
            zmin=-largest, zmax=largest, colorscale=[[0, theme.rgba(theme.ADAPTER, 0.75)],
                                                     [0.5, "white"], [1, LOSS]],
            colorbar={"title": {"text": "points lost"},
                      "thickness": 12}, xgap=2, ygap=2, hovertemplate=
            "<b>%{y}</b>, %{x}<br>%{z:.1f} points [%{customdata[0]:.1%}, "
            "%{customdata[1]:.1%}]<extra></extra>",
        ))
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(side="top", showgrid=False, ticks="", tickangle=0)
    figure.update_layout(margin={"t": 130})
    return figure


def _points(row: dict[str, Any]) -> str:
    text = f"{100 * row['value']:.1f}".replace("-", "−")
    known = row["low"] is not None and not math.isnan(row["low"])
    return f"<b>{text}</b>" if known and (row["low"] > 0 or row["high"] < 0) else text


def two_phase(
        frame: pd.DataFrame, *,
        title: str = "Tokens a verification: who drafts behind the prefill, who after it"
) -> go.Figure:
    """A grid: phase 1 down, phase 2 across, the best cell framed. frame: phase1, phase2, metric,
    value, low, high."""
    part = frame[frame["metric"] == "tokens_per_verification"]
    if part.empty:
        raise MetricError("there is no combination to draw; run the two-phase evaluation first")
    grid = part.pivot(index="phase1", columns="phase2", values="value")
    rows, columns = list(dict.fromkeys(part["phase1"])), list(dict.fromkeys(part["phase2"]))
    grid = grid.loc[rows, columns]
    best = part.loc[part["value"].idxmax()]
    figure = theme.figure(title, height=210 + 38 * len(rows))
    figure.add_trace(
        go.Heatmap(
            z=grid.to_numpy().tolist(), x=[name.replace(" ", "<br>") for name in columns], y=rows,
            text=[[f"{value:.2f}" for value in line] for line in grid.to_numpy()],
            texttemplate="%{text}", colorscale=[[0, "white"], [1, theme.ADAPTER]],
            colorbar={"thickness": 12}, xgap=2, ygap=2, hovertemplate=
            "%{y} behind the prefill, then %{x}<br>%{z:.2f} tokens a verification<extra></extra>",
        ))
    x, y = columns.index(best["phase2"]), rows.index(best["phase1"])
    figure.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5,
                     line={"color": theme.INK, "width": 2})
    figure.update_yaxes(autorange="reversed", title_text="phase 1", showgrid=False, ticks="")
    figure.update_xaxes(title_text="phase 2", showgrid=False, ticks="", tickangle=0)
    return figure
