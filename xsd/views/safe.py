"""The one door from data to a page: text is escaped where it enters HTML or a figure, so that a
question, a name or a token is read and never runs. Notebooks show tables through ``table``, and
HTML is an ``Html``, which escapes whatever is formatted into it."""

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, Self, TypeVar

import markupsafe
import pandas as pd

from xsd.core import printable

T = TypeVar("T")
MOST_ROWS = 60
"""Longer tables show their first and last rows, as pandas does."""


class Html(markupsafe.Markup):
    """HTML that shows itself in a notebook. ``Html("<b>{}</b>").format(name)`` escapes the name, as
    do ``+`` and ``join``; what is Html already stays. plain: what a terminal shows in its place."""

    plain = ""

    @classmethod
    def escape(cls, text: Any) -> Self:
        """Text as HTML that shows just this text."""
        return cls(markupsafe.escape(printable(text) if type(text) is str else text))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # JupyterLab typesets $…$ in HTML, links included
        shown = f'<div class="tex2jax_ignore mathjax_ignore">{self}</div>'
        return {"text/html": shown, "text/plain": self.plain or f"<HTML of {len(self)} signs>"}


def table(frame: pd.DataFrame, *, precision: int | None = None, percent: Collection[str] = (),
          thousands: str = "", index: bool = True) -> Html:
    """A DataFrame as an HTML table, every cell and label escaped.

    precision: digits of floats, those in ``percent`` as whole per cents and what is not known as a
    dash; None: as pandas prints them. thousands: what stands between the thousands."""
    shown = frame.copy()
    if precision is not None:
        for place, name in enumerate(frame):
            form = ".0%" if name in percent else f",.{precision}f"
            cells = [_number(cell, form, thousands) for cell in frame.iloc[:, place]]
            shown.isetitem(place, pd.Series(cells, frame.index, dtype=object))
    with pd.option_context("display.max_colwidth", None):
        html = shown.to_html(escape=True, index=index, max_rows=MOST_ROWS)
    made = Html(printable(html))
    made.plain = printable(repr(frame))
    return made


def _number(cell: Any, form: str, thousands: str) -> Any:
    if isinstance(cell, numbers.Integral) and not isinstance(cell, bool):
        return f"{cell:,}".replace(",", thousands)
    if cell is None or (isinstance(cell, numbers.Real) and math.isnan(cell)):
        return "–"
    if isinstance(cell, numbers.Real) and not isinstance(cell, numbers.Integral):
        return f"{cell:{form}}".replace(",", thousands)
    return cell


def label(text: Any) -> str:
    """Text for a title, a name, a tick or a hover of plotly, which reads tags, entities, TeX and
    ``%{…}``: it shows just this text."""
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("%{", "&#37;{"),
                         ("$", "&#36;")):
        text = str(text).replace(sign, entity)
    return printable(text)


def labels(frame: pd.DataFrame) -> pd.DataFrame:
    """A figure's table with every text as a :func:`label`."""
    shown = frame.copy()
    for name in frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]:
        shown[name] = frame[name].map(lambda cell: label(cell) if isinstance(cell, str) else cell)
    return shown


def keys(named: Mapping[str, T]) -> dict[str, T]:
    """The same values, their names as labels."""
    return {label(name): value for name, value in named.items()}
