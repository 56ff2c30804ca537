"""What stored bytes buy, as a picture: acceptance against bytes per token, and its paired
difference to float32."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from xsd.views import theme

_APART = 1.06
"""Points that share their bytes stand this factor apart: levels side by side, bf16 and fp16 one
after the other as the tick names them."""


def acceptance_by_bytes(frame: pd.DataFrame, *, title: str = "What a stored byte buys",
                        label: str = "token acceptance", percent: bool = True) -> go.Figure:
    """Left: the figure of each level and dtype with its interval, over bytes per token
    (logarithmic). Right: minus that of fp32, paired.

    frame: level, dtype, bytes_per_token, value, difference, each of the last two with ``low`` and
    ``high``; dtypes in the order drawn.
    """
    figure = make_subplots(
        1, 2, horizontal_spacing=0.11,
        subplot_titles=(f"{label}, held out",
                        "minus the adapter trained on fp32 states, same answers"))
    figure.update_layout(template=theme.template(), title={"text": title}, height=440,
                         margin={"t": 90})
    dtypes, number = list(dict.fromkeys(frame["dtype"])), ".1%" if percent else ".2f"
    sizes = {
        dtype: float(frame.loc[frame["dtype"] == dtype, "bytes_per_token"].iloc[0])
        for dtype in dtypes
    }
    levels = list(dict.fromkeys(frame["level"]))
    shift = {(level, dtype): (place - (len(levels) - 1) / 2) + (len(levels) + 0.7) *
                             (peers.index(dtype) - (len(peers) - 1) / 2)
             for place, level in enumerate(levels) for dtype in dtypes
             for peers in [[other for other in dtypes if sizes[other] == sizes[dtype]]]}
    for index, level in enumerate(levels):
        mark, part = theme.mark(str(level), index), frame[frame["level"] == level]
        x = [
            size * _APART**shift[level, dtype]
            for size, dtype in zip(part["bytes_per_token"], part["dtype"], strict=True)
        ]
        for column, name in ((1, "value"), (2, "difference")):
            low, high = part[f"{name} low"], part[f"{name} high"]
            figure.add_trace(
                go.Scatter(
                    x=x, y=part[name].tolist(), mode="markers", name=str(level),
                    legendgroup=str(level), showlegend=column == 1,
                    marker={"symbol": mark.symbol, "size": 10, "color": mark.colour}, error_y={
                        "type": "data", "symmetric": False,
                        "array": (high - part[name]).fillna(0).tolist(), "arrayminus":
                            (part[name] - low).fillna(0).tolist(), "thickness": 2, "width": 4,
                        "color": mark.colour,
                    }, customdata=pd.concat([part["dtype"], part["bytes_per_token"], low, high],
                                            axis=1).to_numpy().tolist(), hovertemplate=
                    f"<b>{level}</b> trained on %{{customdata[0]}}, %{{customdata[1]}} bytes a "
                    "token<br>"
                    f"%{{y:{number}}} [%{{customdata[2]:{number}}}, "
                    f"%{{customdata[3]:{number}}}]<extra></extra>",
                ), 1, column,
            )
    ticks = {
        size: " · ".join(dtype for dtype in dtypes if sizes[dtype] == size)
        for size in sorted(set(sizes.values()))
    }
    figure.update_xaxes(type="log", tickvals=list(ticks),
                        ticktext=[f"{size:g}<br>{names}" for size, names in ticks.items()],
                        title_text="bytes a token, both models",
                        minor={"showgrid": False, "ticks": ""},
                        )
    figure.update_yaxes(tickformat=number)
    figure.update_yaxes(tickformat=f"+{number}", col=2)
    figure.add_hline(y=0, line={"color": theme.SOFT_INK, "width": 1, "dash": "dash"}, col=2, row=1)
    figure.update_annotations(font={"size": 13, "color": theme.SOFT_INK})
    figure.update_layout(legend_y=-0.32)
    return figure
