"""What the studies of notebooks 00, 10 and 12 found, as pictures: pure functions from a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from xsd.views import safe, theme
from xsd.views.safe import Html

RECIPES = {
    "best": theme.Mark(theme.ADAPTER, symbol="circle"),
    "converged": theme.Mark("#7F6A00", symbol="square"),
    "reference": theme.Mark(theme.DRAFTER, symbol="diamond"),
    "documented": theme.Mark("#CC79A7", symbol="triangle-up"),
    "closed form": theme.Mark(theme.SOFT_INK, symbol="x"),
    "no adapter": theme.Mark(theme.REJECTED, symbol="line-ns-open"),
}
"""How a recipe is drawn: hue and shape both differ, so that neither is needed alone."""
_STRUCK = Html('<span style="color:{};text-decoration:line-through">{}</span>')
_BESIDE = 0.2
"""Distance between the recipes of one level, in rows."""
_APART = 1.06
"""Points that share their bytes stand this factor apart: levels side by side, bf16 and fp16 one
after the other as the tick names them."""


def _points(part: pd.DataFrame, value: str, axis: str, mark: theme.Mark, hover: Sequence[str],
            **look: Any) -> go.Scatter:
    """Points with their intervals: the columns ``value``, ``value low`` and ``value high`` (no bar
    where they are not known) along the axis "x" or "y". hover: the columns of customdata."""
    bounds = part[[value, f"{value} low", f"{value} high"]]
    bounds = bounds.set_axis(["value", "low", "high"], axis=1).bfill(axis=1).ffill(axis=1)
    bar = theme.interval(bounds, thickness=2, width=4, color=mark.colour)
    marker = {"size": 10, "symbol": mark.symbol, "color": mark.colour,
              "line": {"width": 2, "color": mark.colour}}
    return go.Scatter({axis: part[value].tolist(), f"error_{axis}": bar, "mode": "markers",
                       "marker": marker, "customdata": part[[*hover]].to_numpy().tolist(), **look})


def acceptance_by_bytes(frame: pd.DataFrame, *, title: str = "What a stored byte buys",
                        label: str = "token acceptance", percent: bool = True) -> go.Figure:
    """Left: the figure of each level and dtype with its interval, over bytes per token
    (logarithmic). Right: minus that of fp32, paired.

    frame: of ``storage.acceptance``; dtypes in the order drawn.
    """
    frame = safe.labels(frame)
    titles = (f"{label}, held out", "minus the adapter trained on fp32 states, same answers")
    figure = make_subplots(1, 2, horizontal_spacing=0.11, subplot_titles=titles)
    figure.update_layout(template=theme.template(), title={"text": safe.label(title)}, height=440,
                         margin={"t": 90}, legend_y=-0.32)
    number = ".1%" if percent else ".2f"
    sizes = dict(zip(frame["dtype"], frame["bytes_per_token"], strict=True))
    names = {size: [dtype for dtype in sizes if sizes[dtype] == size] for size in sizes.values()}
    n_levels = frame["level"].nunique()
    for place, (level, part, mark) in enumerate(theme.by_level(frame)):
        x = []
        for dtype in part["dtype"]:
            peers = names[sizes[dtype]]
            shift = peers.index(dtype) - (len(peers) - 1) / 2
            steps = place - (n_levels - 1) / 2 + (n_levels + 0.7) * shift
            x.append(sizes[dtype] * _APART**steps)
        for column, name in ((1, "value"), (2, "difference")):
            bounds = [f"{name} low", f"{name} high"]
            hover = (f"<b>{level}</b> trained on %{{customdata[0]}}, %{{customdata[1]}} bytes per "
                     f"token<br>%{{y:{number}}} [%{{customdata[2]:{number}}}, "
                     f"%{{customdata[3]:{number}}}]<extra></extra>")
            trace = _points(part, name, "y", mark, ["dtype", "bytes_per_token", *bounds], x=x,
                            name=level, legendgroup=level, showlegend=column == 1,
                            hovertemplate=hover)
            figure.add_trace(trace, 1, column)
    ticks = [f"{size:g}<br>{' · '.join(names[size])}" for size in sorted(names)]
    figure.update_xaxes(type="log", tickvals=sorted(names), ticktext=ticks,
                        title_text="bytes per token, both models",
                        minor={"showgrid": False, "ticks": ""})
    figure.update_yaxes(tickformat=number)
    figure.update_yaxes(tickformat=f"+{number}", col=2)
    figure.add_hline(y=0, line={"color": theme.SOFT_INK, "width": 1, "dash": "dash"}, col=2, row=1)
    figure.update_annotations(font={"size": 13, "color": theme.SOFT_INK})
    return figure


def accepted_by_recipe(
        frame: pd.DataFrame, *, gamma: int,
        title: str = "Accepted drafts per round, by level and recipe") -> go.Figure:
    """A dot and its interval for each level and recipe, the recipes of a level one below the other;
    a line at the best row without an adapter.

    frame: of ``study.table``; levels stand from top to bottom as they come. gamma: where the axis
    ends, since no round accepts more.
    """
    frame = safe.labels(frame)
    levels = list(dict.fromkeys(frame["level"]))
    figure = theme.figure(title, height=180 + 44 * len(levels),
                          x="accepted drafts per round in self-rollout, mean and 95 % interval")
    present = {
        level: [name for name in RECIPES if name in set(part["recipe"])]
        for level, part in frame.groupby("level", sort=False)
    }
    value = "accepted_per_round"
    hover = ["level", f"{value} low", f"{value} high", "lowest seed", "highest seed", "n"]
    for recipe, mark in RECIPES.items():
        part = frame[frame["recipe"] == recipe]
        if part.empty:
            continue
        rows = []
        for level in part["level"]:
            place = present[level].index(recipe) - (len(present[level]) - 1) / 2
            rows.append(levels.index(level) + _BESIDE * place)
        figure.add_trace(_points(
            part, value, "x", mark, hover, y=rows, name=recipe,
            hovertemplate=f"<b>%{{customdata[0]}}</b>, {recipe}<br>%{{x:.2f}} "
            "[%{customdata[1]:.2f}, %{customdata[2]:.2f}]<br>seeds %{customdata[3]:.2f} … "
            "%{customdata[4]:.2f}<br>n = %{customdata[5]} rounds<extra></extra>"))
    floors = frame.loc[frame["recipe"] == "no adapter", value]
    if len(floors):
        best, line = float(floors.max()), {"dash": "dash", "color": theme.SOFT_INK, "width": 1.5}
        figure.add_vline(x=best, line=line, layer="below")
        figure.add_annotation(x=best, y=0, yref="paper", yanchor="bottom", xanchor="left",
                              text=" best without an adapter", showarrow=False)
    figure.update_yaxes(tickvals=list(range(len(levels))), ticktext=levels,
                        range=[len(levels) - 0.4, -0.6], showgrid=False)
    figure.update_xaxes(range=[0, gamma])
    figure.update_layout(legend={"yanchor": "bottom", "y": 1.0, "x": 0}, margin={"t": 90},
                         title={"y": 0.97})
    return figure


def learning_curve(frame: pd.DataFrame, *,
                   title: str = "Accepted drafts per round, by number of drives") -> go.Figure:
    """A line with its intervals for each level over the training drives, on a logarithmic axis.

    frame: of ``study.curve``.
    """
    figure = theme.figure(title, x="training drives (logarithmic)", height=380,
                          y="accepted drafts per round")
    value, frame = "accepted_per_round", safe.labels(frame)
    for index, (level, part) in enumerate(frame.groupby("level", sort=False)):
        mark = theme.mark(str(level).replace(",", " of"), index)
        part = part.sort_values("sequences")
        figure.add_trace(_points(
            part, value, "y", mark, [f"{value} low", f"{value} high", "pairs"], name=str(level),
            x=part["sequences"].tolist(), mode="lines+markers",
            line={"color": mark.colour, "dash": mark.dash, "width": 2},
            hovertemplate=f"<b>{level}</b> · %{{x}} drives<br>%{{y:.2f}} [%{{customdata[0]:.2f}}, "
            "%{customdata[1]:.2f}]<br>%{customdata[2]} answers<extra></extra>"))
    drives = sorted(set(frame["sequences"].tolist()))
    figure.update_xaxes(type="log", tickvals=drives, ticktext=[str(one) for one in drives])
    return figure


def facts_right(frame: pd.DataFrame, *, by: str = "kind",
                title: str = "Facts stated rightly on held-out drives") -> go.Figure:
    """One dot with its interval per model and category.

    frame: role ("drafter" | "verifier"), ``by`` (the category), right, low, high (shares), facts
    (how many were counted).
    """
    figure = theme.figure(title, x="share of facts right, with 95 % interval over drives",
                          height=160 + 30 * frame[by].nunique())
    for role, part in safe.labels(frame).groupby("role", sort=True):
        colour = theme.LANES[str(role)]
        symbol = "circle" if role == "verifier" else "diamond"
        figure.add_scatter(
            x=part["right"].tolist(), y=part[by].str.replace("_", " ").tolist(), mode="markers",
            name=f"{role} (of what its sensor can know)",
            marker={"size": 11, "color": colour, "symbol": symbol},
            error_x=theme.interval(part, "right", color=colour), customdata=part["facts"].tolist(),
            hovertemplate="%{y}: %{x:.1%} of %{customdata} facts<extra></extra>")
    figure.update_xaxes(range=[0, 1.02], tickformat=".0%")
    return figure


def transcript(rows: Iterable[tuple[str, str, str, Sequence[tuple[str, bool]]]]) -> Html:
    """Questions and answers: rows (question, role, what it is, [(word, right?)]); wrong words are
    struck in grey."""
    parts, last = [], None
    for question, role, note, words in rows:
        if question != last:
            parts.append(Html('<div style="margin-top:.6em"><b>{}</b></div>').format(question))
            last = question
        said = [word if right else _STRUCK.format(theme.REJECTED, word) for word, right in words]
        parts.append(Html('<div><span style="color:{};font-weight:600">{}</span> <small>{}</small> '
                          "{}</div>").format(theme.LANES.get(role, theme.INK), role, note,
                                             Html(" ").join(said)))
    return Html('<div style="font-family:sans-serif;line-height:1.6">{}</div>').format(
        Html().join(parts))
