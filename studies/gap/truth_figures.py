"""Pictures of the tables of truth.py: where acceptance is lost, what the drafter saw."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from xsd.core import MetricError
from xsd.views import figures, safe, theme

ARMS = {
    "real events": (theme.ADAPTER, "circle"), "blank events": (theme.REJECTED, "square"),
    "other scene": (theme.DRAFTER, "diamond"), "text only": (theme.SOFT_INK, "x"),
}
"""Colour and mark of what the drafter saw."""
LOSS = "#C0504D"
WHISKERS = {"thickness": 1.3, "width": 4}
UNITS = {
    "token_acceptance": ("share of tokens that are the verifier's", ".0%"),
    "accepted_per_round": ("accepted drafts per round", ".1f"),
}
"""Axis title and number format of a unit."""


def gap_waterfall(frame: pd.DataFrame, *, title: str = "Where acceptance is lost") -> go.Figure:
    """Levels as bars from zero, the losses between them as floating bars, all with their clustered
    intervals.

    frame: the rows of ``comparison.gap`` of one level and unit. The branch of the drift, which
    begins again at a level already drawn, stands apart on the right."""
    label, form = _unit(frame, "there is no step to draw; measure the gap first")
    figure = theme.figure(title, y=label, height=460)
    frame = safe.labels(frame)
    steps = frame.astype({"low": float, "high": float}).assign(x=_places(frame["metric"].tolist()))
    top = float(frame[["start", "end"]].max(axis=None))
    for kind, own in steps.groupby("metric", sort=False):
        whiskers = theme.interval(own, color=theme.INK, **WHISKERS)
        if kind == "loss":  # a larger loss ends lower
            whiskers |= {"array": whiskers["arrayminus"], "arrayminus": whiskers["array"]}
        colours = [_colour(row) for row in own.to_dict("records")]
        figure.add_bar(
            x=own["x"].tolist(), y=(own["end"] - own["start"]).tolist(), width=0.62,
            base=own["start"].tolist(), name={"level": "accepted", "loss": "lost"}[kind],
            marker={"color": colours, "opacity": 0.9 if kind == "level" else 0.75},
            error_y=whiskers, showlegend=False,
            customdata=own[["name", "value", "low", "high"]].to_numpy().tolist(),
            hovertemplate=f"<b>%{{customdata[0]}}</b><br>%{{customdata[1]:{form}}} "
            f"[%{{customdata[2]:{form}}}, %{{customdata[3]:{form}}}]<extra>%{{fullData.name}}"
            "</extra>")
        for row in own.to_dict("records"):
            _write_beside(figure, row, top, form)
    places = steps["x"].tolist()
    names = [name.replace("-", "-<br>").replace(" ", "<br>") for name in frame["name"]]
    figure.update_xaxes(tickvals=places, ticktext=names, tickfont={"size": 12}, showgrid=False,
                        tickangle=0, range=[min(places) - 0.6, max(places) + 0.6])
    figure.update_yaxes(tickformat=form, range=[0, 1.14 * top])
    figure.update_layout(bargap=0.2, margin={"b": 80})
    return figure


def _places(kinds: Sequence[str]) -> list[float]:
    """x of every step; a level that follows a level begins the branch, one place further on."""
    steps = [1.7 if before == here == "level" else 1.0 for before, here in pairwise(kinds)]
    return list(accumulate(steps, initial=0.0))


def _colour(row: dict[str, Any]) -> str:
    if row["metric"] == "loss":
        return LOSS if row["value"] >= 0 else theme.ADAPTER
    named = {"verifier": theme.VERIFIER, "free": theme.DRAFTER}
    return named.get(row["name"].split("-")[0], theme.ADAPTER)


def _write_beside(figure: go.Figure, row: dict[str, Any], top: float, form: str) -> None:
    """The number of a bar: inside a loss that is tall enough, else on top (of its whisker)."""
    value, rise = row["value"], row["end"] - row["start"]
    sign = "" if row["metric"] == "level" else "−" if value > 0 else "+" if value < 0 else "±"
    number = f"{abs(value):.1%}" if form.endswith("%") else f"{abs(value):.2f}"
    inside = row["metric"] == "loss" and abs(rise) > 0.12 * top
    y = row["start"] + rise / 2 if inside else max(row["start"], row["end"])
    if row["metric"] == "level" and not pd.isna(row["high"]):
        y = max(y, row["high"])
    figure.add_annotation(x=row["x"], y=y, text=f"<b>{sign}{number}</b>", showarrow=False,
                          font={"size": 12}, yanchor="middle" if inside else "bottom",
                          yshift=0 if inside else 3)


def arms(frame: pd.DataFrame, *, floor: float | None = None,
         title: str = "Acceptance by what the drafter saw") -> go.Figure:
    """One row per level, a dot with its interval for each arm; a dashed line at the best floor.
    frame: the rows of truth's table arms in one unit."""
    label, form = _unit(frame, "there is no arm to draw; measure the counterfactual arms first")
    frame = safe.labels(frame.astype({"low": float, "high": float}))
    levels = list(dict.fromkeys(frame["level"]))[::-1]
    names = [name for name in dict.fromkeys(frame["arm"]) if name != "real events again"]
    figure = theme.figure(title, x=label, height=190 + 52 * len(levels))
    for index, name in enumerate(names):
        part = frame[frame["arm"] == name]
        shift = ((len(names) - 1) / 2 - index) * 0.62 / max(len(names), 1)
        colour, symbol = ARMS.get(name, (theme.SOFT_INK, "circle"))
        figure.add_scatter(
            x=part["value"].tolist(), y=[levels.index(level) + shift for level in part["level"]],
            mode="markers", name=name, marker={"color": colour, "symbol": symbol, "size": 10},
            error_x=theme.interval(part, color=theme.rgba(colour, 0.6), **WHISKERS),
            customdata=part[["level", "low", "high", "n"]].to_numpy().tolist(),
            hovertemplate=f"<b>%{{customdata[0]}}</b>, {name}<br>%{{x:{form}}} "
            f"[%{{customdata[1]:{form}}}, %{{customdata[2]:{form}}}]<br>n = %{{customdata[3]:.0f}}"
            "<extra></extra>")
    if floor is not None:
        theme.upright(figure, floor, "best floor that looks at nothing")
    figure.update_yaxes(tickvals=list(range(len(levels))), range=[-0.6, len(levels) - 0.4],
                        ticktext=[level.replace("_", " ") for level in levels])
    figure.update_xaxes(tickformat=form, rangemode="tozero")
    figure.update_layout(legend_y=-60 / (52 * len(levels) + 60))
    return figure


def _unit(frame: pd.DataFrame, lacking: str) -> tuple[str, str]:
    if frame.empty:
        raise MetricError(lacking)
    return UNITS[str(frame["unit"].iloc[0])]


def losses_by_kind(frame: pd.DataFrame, *, least: int = 5,
                   title: str = "What is lost in which words") -> go.Figure:
    """A grid of kinds of words and losses; each cell says how much acceptance is lost, in points,
    bold where the interval excludes zero. frame: table kinds. least: kinds with fewer tokens are
    left out. Raises: MetricError when none has as many."""
    frame = safe.labels(frame[frame.groupby("group")["n"].transform("max") >= least])
    if frame.empty:
        raise MetricError(
            f"no kind of word has {least} tokens or more; lower ``least`` or evaluate more samples")
    losses, kinds = list(dict.fromkeys(frame["loss"])), list(dict.fromkeys(frame["group"]))
    cells = {(row["group"], row["loss"]): row for row in frame.to_dict("records")}
    grid = [[cells[kind, loss] for loss in losses] for kind in kinds]
    values = [[100 * cell["value"] for cell in line] for line in grid]
    largest = max(10.0, max(abs(value) for line in values for value in line))
    figure = theme.figure(title, height=190 + 34 * len(kinds))
    _grid(figure, values, losses,
          [f"{kind}  (n = {line[0]['n']:.0f})" for kind, line in zip(kinds, grid, strict=True)],
          text=[[_points(cell) for cell in line] for line in grid], texttemplate="%{text}",
          customdata=[[[cell[key] for key in ("low", "high", "n")] for cell in line]
                      for line in grid], textfont={"size": 12}, zmin=-largest, zmax=largest,
          colorscale=[[0, theme.rgba(theme.ADAPTER, 0.75)], [0.5, "white"], [1, LOSS]],
          colorbar={"title": {"text": "points lost"}, "thickness": 12},
          hovertemplate="<b>%{y}</b>, %{x}<br>%{z:.1f} points [%{customdata[0]:.1%}, "
          "%{customdata[1]:.1%}]<extra></extra>")
    figure.update_xaxes(side="top")
    figure.update_layout(margin={"t": 130})
    return figure


def _grid(figure: go.Figure, values: Any, columns: Sequence[str], rows: Sequence[str],
          **look: Any) -> None:
    """A heat map that is read as a table: the first row on top."""
    figure.add_heatmap(z=values, x=[name.replace(" ", "<br>") for name in columns], y=list(rows),
                       xgap=2, ygap=2, **look)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False, ticks="", tickangle=0)


def _points(row: dict[str, Any]) -> str:
    text = f"{100 * row['value']:.1f}".replace("-", "−")
    known = not pd.isna(row["low"])
    return f"<b>{text}</b>" if known and (row["low"] > 0 or row["high"] < 0) else text


PHASES = {
    "tokens_per_verification": ("Tokens a verification", "tokens a verification"),
    "speedup": ("Predicted speed-up", "× plain decoding, predicted")
}


def two_phase(frame: pd.DataFrame, metric: str = "tokens_per_verification", *,
              title: str = "") -> go.Figure:
    """A grid: phase 1 down, phase 2 across, the best cell framed. frame: phase1, phase2, metric (of
    PHASES), value, low, high."""
    part, (said, unit) = safe.labels(frame[frame["metric"] == metric]), PHASES[metric]
    if part.empty:
        raise MetricError("there is no combination to draw; run the two-phase evaluation first")
    rows, columns = list(dict.fromkeys(part["phase1"])), list(dict.fromkeys(part["phase2"]))
    grid = part.pivot(index="phase1", columns="phase2", values="value").loc[rows, columns]
    title = title or f"{said}: who drafts behind the prefill, who after it"
    figure = theme.figure(title, x="phase 2", y="phase 1", height=210 + 38 * len(rows))
    _grid(figure, grid.to_numpy().tolist(), columns, rows, texttemplate="%{z:.2f}",
          colorscale=[[0, "white"], [1, theme.ADAPTER]], colorbar={"thickness": 12},
          hovertemplate=f"%{{y}} behind the prefill, then %{{x}}<br>%{{z:.2f}} {unit}"
          "<extra></extra>")
    best = part.loc[part["value"].idxmax()]
    x, y = columns.index(best["phase2"]), rows.index(best["phase1"])
    figure.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5,
                     line={"color": theme.INK, "width": 2})
    return figure


def four_panels(*, cosines: pd.DataFrame, positions: pd.DataFrame, lengths: pd.DataFrame,
                speedups: pd.DataFrame, title: str = "Summary") -> go.Figure:
    """What figures.cosine_histogram, acceptance_by_position and speedup_bars draw, and unbroken
    prefixes (lengths: level, length, share), in one picture."""
    bars, speedups = figures.speedup_bars(speedups), safe.labels(speedups)
    busy = any(speedups.get("busy", ()))
    names = ("cosine of the states", "acceptance by position (token truth)",
             "unbroken prefix: tokens before the first wrong one",
             "busy or unsteady machine: no speed-up is claimed" if busy else
             bars.layout.xaxis.title.text)
    figure = make_subplots(2, 2, subplot_titles=names, horizontal_spacing=0.1,
                           vertical_spacing=0.16)
    figure.update_layout(template=theme.template(), title={"text": safe.label(title)}, height=760,
                         margin={"t": 90}, legend={"y": -0.08}, barmode="group")
    for trace in figures.cosine_histogram(cosines, thresholds=()).data:
        figure.add_trace(trace.update(showlegend=False, legendgroup=trace.name), row=1, col=1)
    figure.add_traces(figures.curve_traces(positions, "marginal"), rows=1, cols=2)
    for level, part, mark in theme.by_level(lengths):
        figure.add_bar(x=part["length"].tolist(), y=part["share"].tolist(), name=level,
                       legendgroup=level, showlegend=False, marker={"color": mark.colour},
                       hovertemplate=f"<b>{level}</b> %{{x}} tokens: %{{y:.1%}}<extra></extra>",
                       row=2, col=1)
    for trace in bars.data:
        labels = [f"{name} · {text}".removesuffix(" · ")
                  for name, text in zip(trace.y, trace.text, strict=True)]
        figure.add_trace(trace.update(showlegend=False, text=labels), row=2, col=2)
    figure.update_yaxes(categoryorder="array", categoryarray=speedups["name"].tolist()[::-1],
                        showticklabels=False, showgrid=False, row=2, col=2)
    figure.add_vline(x=1, line=theme.DASHED, row=2, col=2)
    for row, column in ((1, 1), (1, 2), (2, 1)):
        figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=row, col=column)
    return figure


def waterfall_of(found: Mapping[str, Any], level: str, data: str) -> go.Figure:
    """:func:`gap_waterfall` of one set of ``results/truth.json``, for the report's page."""
    rows = pd.DataFrame(found["gap"]).query("level == @level and unit == 'token_acceptance'")
    return gap_waterfall(rows, title=f"Where {level} loses acceptance, {data}")


def sensor_of(found: Mapping[str, Any], level: str, data: str) -> go.Figure:
    """:func:`arms` of the same, with the best floor that looks at nothing (the drafter's own tokens
    are a row)."""
    unit = "unit == 'token_acceptance'"
    floors = pd.DataFrame(found["floors"]).query(unit + " and floor != 'drafter tokens'")
    return arms(pd.DataFrame(found["arms"]).query(unit), floor=floors["value"].max(),
                title=f"Is it the sensor? {data}")
