"""Colours, marks and the plotly template of every picture: drafter orange, verifier blue, adapter
green, rejected grey. The hues are those of Okabe and Ito ("Color universal design", 2008), apart
under the common kinds of colour blindness; levels also differ in dash and marker."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from xsd.views import safe

DRAFTER = "#E07B00"
VERIFIER = "#0072B2"
ADAPTER = "#009E73"
REJECTED = "#9AA0A6"
INK = "#202124"
SOFT_INK = "#5F6368"
GRID = "#E6E8EB"
DASHED = {"dash": "dash", "color": SOFT_INK, "width": 1.5}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

LANES = {"drafter": DRAFTER, "adapter": ADAPTER, "verifier": VERIFIER}
KINDS = {"adapter": ADAPTER, "floor": SOFT_INK, "drafter": DRAFTER, "ceiling": VERIFIER}
"""Colour by what a row of an acceptance table is: an adapter must beat a floor and may not exceed a
ceiling."""


@dataclass(frozen=True)
class Mark:
    """How one level is drawn."""
    colour: str
    dash: str = "solid"
    symbol: str = "circle"

    @property
    def line(self) -> dict[str, Any]:
        """plotly's line."""
        return {"color": self.colour, "dash": self.dash, "width": 2}

    def marker(self, size: Any) -> dict[str, Any]:
        """plotly's marker. size: pixels, one or a list."""
        return {"color": self.colour, "symbol": self.symbol, "size": size}


LEVELS = {
    "L1": Mark("#8BC34A"),
    "L2": Mark("#4CAF7A", "dash", "square"),
    "L3": Mark("#009E73", "dot", "diamond"),
    "L4": Mark("#00796B", "dashdot", "triangle-up"),
    "L5": Mark("#003D33", "solid", "x"),
    "L5F": Mark("#9C5FB5", "solid", "star"),
    "X1": Mark("#6A3D9A", "dash", "star-diamond"),
    "B1": Mark(VERIFIER, "longdash", "hexagon"),
    "D1": Mark(VERIFIER, "solid", "diamond-tall"),
    "D2": Mark("#004D1A", "longdash", "pentagon"),
    "D5F": Mark("#4A148C", "longdashdot", "star-square"),
    "drafter_tokens": Mark(DRAFTER, "dot", "triangle-down"),
}
"""Greens read the drafter, purple reads both, blue reads the verifier (an upper bound)."""

_OTHERS = (Mark("#CC79A7", "dash", "cross"), Mark("#7F6A00", "dot", "pentagon"),
           Mark("#56B4E9", "dashdot", "bowtie"), Mark("#5F6368", "longdash", "hourglass"))


def mark(level: str, index: int = 0) -> Mark:
    """The mark of a level; names outside the table get one by ``index``."""
    return LEVELS.get(level.split(" ")[0], _OTHERS[index % len(_OTHERS)])


def by_level(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, Mark]]:
    """Name, rows and mark of each level, in the order of the table; texts as labels."""
    groups = safe.labels(frame).groupby("level", sort=False, observed=True)
    for index, (level, part) in enumerate(groups):
        yield str(level), part, mark(str(level), index)


def interval(part: pd.DataFrame, value: str = "value", **look: Any) -> dict[str, Any]:
    """plotly's error bar from the columns ``value``, low, high; look: thickness, color …"""
    return {"type": "data", "symmetric": False, "array": (part["high"] - part[value]).tolist(),
            "arrayminus": (part[value] - part["low"]).tolist(), **look}


def upright(drawn: go.Figure, x: float, text: str) -> None:
    """A dashed line at x, with what it is on top."""
    drawn.add_vline(x=x, line=DASHED)
    drawn.add_annotation(x=x, y=1, yref="paper", yanchor="bottom", showarrow=False, text=text,
                         font={"size": 12, "color": SOFT_INK})


def rgba(colour: str, alpha: float) -> str:
    """``#RRGGBB`` with an opacity between 0 and 1, as plotly and CSS write it."""
    red, green, blue = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def template() -> go.layout.Template:
    """The shared look: small on purpose, as it is stored with each figure."""
    axis = {"gridcolor": GRID, "linecolor": SOFT_INK, "zeroline": False, "ticks": "outside",
            "tickcolor": GRID, "automargin": True, "title": {"standoff": 10, "font": {"size": 13}}}
    legend = {"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0, "xanchor": "left",
              "font": {"size": 13}}
    return go.layout.Template(layout={
        "font": {"family": FONT, "size": 14, "color": INK},
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 17}},
        "paper_bgcolor": "white", "plot_bgcolor": "white",
        "colorway": [ADAPTER, VERIFIER, DRAFTER, "#CC79A7", "#7F6A00", "#56B4E9", SOFT_INK],
        "xaxis": axis, "yaxis": axis, "legend": legend,
        "margin": {"l": 60, "r": 20, "t": 60, "b": 50},
        "hoverlabel": {"font": {"family": FONT, "size": 13}},
        "modebar": {"remove": ["sendChartToCloud"]},  # nothing is sent anywhere
    })


def register() -> None:
    """Make the template plotly's ``xsd`` and its default: a notebook's set-up cell does."""
    pio.templates["xsd"] = template()
    pio.templates.default = "xsd"


def figure(title: str, *, note: str = "", x: str = "", y: str = "", height: int = 400) -> go.Figure:
    """An empty figure in the shared look; height in pixels, note: a second line of the title."""
    title = "<br>".join(safe.label(line) for line in (title, note) if line)
    drawn = go.Figure(layout={"template": template(), "title": {"text": title}, "height": height})
    drawn.update_xaxes(title_text=safe.label(x))
    drawn.update_yaxes(title_text=safe.label(y))
    return drawn
