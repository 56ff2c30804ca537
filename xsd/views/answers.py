"""What the two models say about a clip, and how often it is right: the pictures of notebook 00."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from xsd.views import theme

_COLOURS = {"drafter": theme.DRAFTER, "verifier": theme.VERIFIER}


def facts_right(frame: pd.DataFrame, *, by: str = "kind",
                title: str = "Facts stated rightly on held-out drives") -> go.Figure:
    """One dot with its interval per model and question kind.

    frame: role ("drafter" | "verifier"), ``by`` (category), right, low, high (shares 0…1), facts
    (count).
    """
    figure = theme.figure(title, x="share of facts right, with 95 % interval over drives",
                          height=160 + 30 * frame[by].nunique())
    for role, part in frame.groupby("role", sort=True):
        figure.add_trace(
            go.Scatter(
                x=part["right"].tolist(), y=part[by].str.replace("_", " ").tolist(), mode="markers",
                name=f"{role} (of what its sensor can know)", marker={
                    "size": 11, "color": _COLOURS[str(role)],
                    "symbol": "circle" if role == "verifier" else "diamond"
                }, error_x={
                    "type": "data", "symmetric": False,
                    "array": (part["high"] - part["right"]).tolist(), "arrayminus":
                        (part["right"] - part["low"]).tolist(), "color": _COLOURS[str(role)],
                }, customdata=part["facts"].tolist(),
                hovertemplate="%{y}: %{x:.1%} of %{customdata} facts<extra></extra>",
            ))
    figure.update_xaxes(range=[0, 1.02], tickformat=".0%")
    return figure


def transcript(rows: Sequence[tuple[str, str, str, Sequence[tuple[str, bool]]]]) -> str:
    """Questions and answers as HTML: (question, role, what it is, [(word, right?)]) rows; wrong
    words are struck in grey."""
    parts = ['<div style="font-family:sans-serif;line-height:1.6">']
    last = None
    for question, role, note, words in rows:
        if question != last:
            parts.append(f'<div style="margin-top:.6em"><b>{html.escape(question)}</b></div>')
            last = question
        said = " ".join(
            html.escape(word) if right else
            '<span '
            f'style="color:{theme.REJECTED};text-decoration:line-through">{html.escape(word)}</span>'
            for word, right in words)
        colour = _COLOURS.get(role, theme.INK)
        parts.append(
            f'<div><span style="color:{colour};font-weight:600">{html.escape(role)}</span> '
            f'<small>{html.escape(note)}</small> {said}</div>'
        )
    return "".join(parts) + "</div>"
