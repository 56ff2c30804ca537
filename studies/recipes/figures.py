"""The study as pictures: accepted length by level and recipe, and the learning curve. Pure
functions from a tidy table to a figure."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from xsd.views import theme

RECIPES = {
    "best": theme.Mark(theme.ADAPTER,
                       symbol="circle"), "converged": theme.Mark("#7F6A00", symbol="square"),
    "reference": theme.Mark(theme.DRAFTER, symbol="diamond"),
    "documented": theme.Mark("#CC79A7", symbol="triangle-up"),
    "closed form": theme.Mark(theme.SOFT_INK,
                              symbol="x"), "no adapter": theme.Mark(theme.REJECTED,
                                                                    symbol="line-ns-open"),
}
"""How a recipe is drawn: hue and shape both differ, so that neither is needed alone."""
_APART = 0.2
"""Distance between the recipes of one level, in rows."""


def accepted_by_recipe(
        frame: pd.DataFrame, *, gamma: int,
        title: str = "Accepted draft tokens a verification, by level and recipe") -> go.Figure:
    """A dot and its interval for each level and recipe, the recipes of a level one below the other;
    a line at the best row without an adapter. The hover says the seeds' range.

    frame: level, recipe, accepted_per_round, ``accepted_per_round low``, ``accepted_per_round high``, lowest
    seed, highest seed, n (rounds). Levels
    stand from top to bottom in the order in which they come. gamma: where the axis ends, since no
    round accepts more.
    """
    levels = list(dict.fromkeys(frame["level"]))
    x = "draft tokens accepted a verification in self-rollout, mean and 95 % interval"
    figure = theme.figure(title, x=x, height=180 + 44 * len(levels))
    present = {
        level: [name for name in RECIPES if name in set(part["recipe"])]
        for level, part in frame.groupby("level", sort=False)
    }
    for recipe, mark in RECIPES.items():
        part = frame[frame["recipe"] == recipe]
        if part.empty:
            continue
        rows = []
        for level in part["level"]:
            place = present[level].index(recipe) - (len(present[level]) - 1) / 2
            rows.append(levels.index(level) + _APART * place)
        known = part["accepted_per_round low"].notna()
        figure.add_trace(
            go.Scatter(
                x=part["accepted_per_round"].tolist(), y=rows, mode="markers", name=recipe, marker={
                    "size": 10, "color": mark.colour, "symbol": mark.symbol,
                    "line": {"width": 2, "color": mark.colour}
                }, error_x={
                    "type": "data", "symmetric": False, "array":
                        (part["accepted_per_round high"] - part["accepted_per_round"]).where(known,
                                                                                       0).tolist(),
                    "arrayminus":
                        (part["accepted_per_round"] - part["accepted_per_round low"]).where(known,
                                                                                      0).tolist(),
                    "thickness": 2, "width": 4, "color": mark.colour,
                }, customdata=part[[
                    "level", "accepted_per_round low", "accepted_per_round high", "lowest seed",
                    "highest seed", "n"
                ]].to_numpy().tolist(), hovertemplate="<b>%{customdata[0]}</b>, " + recipe +
                "<br>%{x:.2f} [%{customdata[1]:.2f}, %{customdata[2]:.2f}]"
                "<br>seeds %{customdata[3]:.2f} … %{customdata[4]:.2f}<br>n = %{customdata[5]} "
                "rounds<extra></extra>",
            ))  # fmt: skip
    floors = frame.loc[frame["recipe"] == "no adapter", "accepted_per_round"]
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


def learning_curve(
        frame: pd.DataFrame, *,
        title: str = "Accepted draft tokens a verification, by number of training drives"
) -> go.Figure:
    """A line with its intervals for each level over the number of drives, on a logarithmic axis.

    frame: level, sequences, pairs, accepted_per_round, ``accepted_per_round low``, ``accepted_per_round
    high``.
    """
    figure = theme.figure(title, x="training drives (logarithmic)", y="accepted a verification",
                          height=380)
    for index, (level, part) in enumerate(frame.groupby("level", sort=False)):
        mark, part = theme.mark(str(level).replace(",", " of"),
                                index), part.sort_values("sequences")
        known = part["accepted_per_round low"].notna()
        figure.add_trace(
            go.Scatter(
                x=part["sequences"].tolist(), y=part["accepted_per_round"].tolist(),
                mode="lines+markers", name=str(level),
                line={"color": mark.colour, "dash": mark.dash, "width": 2},
                marker={"size": 9, "symbol": mark.symbol, "color": mark.colour}, error_y={
                    "type": "data", "symmetric": False, "array":
                        (part["accepted_per_round high"] - part["accepted_per_round"]).where(known,
                                                                                       0).tolist(),
                    "arrayminus":
                        (part["accepted_per_round"] - part["accepted_per_round low"]).where(known,
                                                                                      0).tolist(),
                    "thickness": 1.5, "width": 4, "color": mark.colour,
                }, customdata=part[["accepted_per_round low", "accepted_per_round high",
                                    "pairs"]].to_numpy().tolist(), hovertemplate=
                f"<b>{level}</b> · %{{x}} drives<br>%{{y:.2f}} [%{{customdata[0]:.2f}}, "
                f"%{{customdata[1]:.2f}}]"
                "<br>%{customdata[2]} answers<extra></extra>",
            ))
    drives = sorted(set(frame["sequences"].tolist()))
    figure.update_xaxes(type="log", tickvals=drives, ticktext=[str(one) for one in drives])
    return figure
