"""Which kinds of words are accepted: a pure function from a tidy table to a figure."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from xsd.core import MetricError
from xsd.views import theme


def acceptance_by_kind(frame: pd.DataFrame, *, title: str = "Which words are accepted",
                       least: int = 1) -> go.Figure:
    """A dot with its interval for each level in each kind of word; kinds with the highest best
    acceptance on top.

    frame: level, kind, value, low, high, n (tokens). least: kinds with fewer tokens are left out.
    Raises: MetricError when no kind has that many tokens.
    """
    frame = frame[frame.groupby("kind")["n"].transform("max") >= least]
    if frame.empty:
        raise MetricError(
            f"no kind of word has {least} tokens or more; lower ``least`` or evaluate more samples")
    order = frame.groupby("kind")["value"].max().sort_values(kind="stable").index.tolist()
    levels = list(dict.fromkeys(frame["level"]))
    figure = theme.figure(title, x="share of tokens whose draft is the verifier's own",
                          height=170 + 46 * len(order))
    for index, level in enumerate(levels):
        part, mark = frame[frame["level"] == level], theme.mark(str(level), index)
        offset = (index - (len(levels) - 1) / 2) * 0.6 / max(len(levels), 1)
        figure.add_trace(
            go.Scatter(
                x=part["value"].tolist(), y=[order.index(kind) - offset for kind in part["kind"]],
                mode="markers", name=str(level),
                marker={"color": mark.colour, "symbol": mark.symbol, "size": 9}, error_x={
                    "type": "data", "symmetric": False,
                    "array": (part["high"] - part["value"]).tolist(), "arrayminus":
                        (part["value"] - part["low"]).tolist(), "thickness": 1, "width": 0,
                    "color": theme.rgba(mark.colour, 0.5),
                }, customdata=part[["kind", "low", "high", "n"]].to_numpy().tolist(), hovertemplate=
                f"<b>{level}</b> · %{{customdata[0]}}<br>%{{x:.1%}} [%{{customdata[1]:.1%}}, "
                f"%{{customdata[2]:.1%}}]"
                "<br>n = %{customdata[3]}<extra></extra>",
            ))
    figure.update_yaxes(tickvals=list(range(len(order))), ticktext=order,
                        range=[-0.6, len(order) - 0.4])
    figure.update_xaxes(range=[-0.02, 1.03], tickformat=".0%")
    return figure
