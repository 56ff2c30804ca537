"""Pictures of what the parts of decoding cost, and of predicted beside measured time."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from xsd.views import safe, theme

PARTS = {"prefill": theme.SOFT_INK, "draft": theme.DRAFTER, "verify": theme.VERIFIER}


def verification_curve(frame: pd.DataFrame, *,
                       title: str = "Verifying K tokens in one pass") -> go.Figure:
    """v(K) with its quartiles beside K single steps: the gap is what speculation can win.

    frame: rows (K), ms, low, high (milliseconds), in order of rows.
    """
    figure = theme.figure(title, x="rows of one pass, K (drafts + 1)", y="milliseconds")
    rows, line = frame["rows"].tolist(), theme.VERIFIER
    band = [*frame["high"], *frame["low"].tolist()[::-1]]
    figure.add_trace(go.Scatter(x=[*rows, *rows[::-1]], y=band, fill="toself",
                                fillcolor=theme.rgba(line, 0.2), line={"width": 0},
                                hoverinfo="skip", showlegend=False))
    figure.add_trace(go.Scatter(x=rows, y=frame["ms"].tolist(), mode="lines+markers",
                                name="one pass over K rows", line={"color": line, "width": 2.5},
                                hovertemplate="K = %{x}<br>%{y:.2f} ms<extra></extra>"))
    single = float(frame.loc[frame["rows"].idxmin(), "ms"]) / min(rows)
    figure.add_trace(go.Scatter(x=rows, y=[single * k for k in rows], mode="lines",
                                name="K single steps",
                                line={"color": theme.REJECTED, "dash": "dash", "width": 2},
                                hovertemplate="%{x} steps<br>%{y:.2f} ms<extra></extra>"))
    figure.update_yaxes(rangemode="tozero")
    return figure


def predicted_and_measured(frame: pd.DataFrame, *,
                           title: str = "An answer: predicted from its parts, and measured",
                           ) -> go.Figure:
    """Predicted time split into its parts (hatched, pale) beside the measured one, a pair of bars
    for each arm.

    frame: arm, predicted_ms, measured_ms, residual, and the shares prefill, draft, verify of the
    prediction.
    """
    frame = safe.labels(frame)
    figure = theme.figure(title, x="milliseconds per answer", height=170 + 60 * len(frame))
    hatched = {"shape": "/", "fgcolor": "white", "fillmode": "overlay", "solidity": 0.2}
    for part, colour in PARTS.items():
        figure.add_trace(go.Bar(
            y=(frame["arm"] + " · predicted").tolist(),
            x=(frame[part] * frame["predicted_ms"]).tolist(), orientation="h",
            name=f"predicted: {part}",
            marker={"color": theme.rgba(colour, 0.55), "pattern": hatched},
            hovertemplate=f"{part}<br>%{{x:.0f}} ms<extra>predicted</extra>"))
    figure.add_trace(go.Bar(
        y=(frame["arm"] + " · measured").tolist(), x=frame["measured_ms"].tolist(),
        orientation="h", name="measured", marker={"color": theme.ADAPTER},
        customdata=frame["residual"].tolist(),
        hovertemplate="%{x:.0f} ms, %{customdata:+.0%} of the prediction<extra>measured</extra>"))
    order = [f"{arm} · {word}" for arm in frame["arm"] for word in ("measured", "predicted")]
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], showgrid=False)
    figure.update_layout(barmode="stack", legend_y=-0.3)
    return figure
