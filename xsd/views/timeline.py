"""Who worked when: horizontal bars of a request's spans, the baseline beside it, and a slider that
walks through the rounds without a kernel."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping

import pandas as pd
import plotly.graph_objects as go

from xsd.core import Generation, MetricError
from xsd.views import theme

LANE_ORDER = ("drafter", "adapter", "verifier")


def spans(generations: Mapping[str, Generation]) -> pd.DataFrame:
    """One row a span: arm, lane, what, start_ms, end_ms, milliseconds since the request began. Arms
    and lanes in drawing order.

    Raises: MetricError when no generation holds a span.
    """
    rows = [{
        "arm": arm, "lane": span.lane, "what": span.what, "start_ms": 1e3 * span.start_s,
        "end_ms": 1e3 * span.end_s
    } for arm, generation in generations.items() for lane in LANE_ORDER for span in generation.spans
            if span.lane == lane]
    if not rows:
        raise MetricError(
            "no time was recorded in these runs, so there is no timeline to draw; generate with "
            "spans (the live decoders record them)"
        )
    return pd.DataFrame(rows)


def _row(arm: str, lane: str) -> str:
    return f"{arm} · {lane}"


def timeline(generations: Mapping[str, Generation], *,
             title: str = "Where the time goes") -> go.Figure:
    """Bars by arm and lane. generations: arm name → Generation, the baseline among them; the first
    arm is drawn on top."""
    frame = spans(generations)
    rows = list(
        dict.fromkeys(
            _row(arm, lane) for arm, lane in zip(frame["arm"], frame["lane"], strict=True)))
    figure = theme.figure(title, x="milliseconds since the request began (hatched: prefill)",
                          height=150 + 46 * len(rows))
    for lane, part in frame.groupby("lane", sort=False, observed=True):
        prefill = [str(what).startswith("prefill") for what in part["what"]]
        figure.add_trace(
            go.Bar(
                y=[_row(arm, lane)
                   for arm in part["arm"]], x=(part["end_ms"] - part["start_ms"]).tolist(),
                base=part["start_ms"].tolist(), orientation="h", name=str(lane),
                customdata=part[["what", "end_ms"]].to_numpy().tolist(), marker={
                    "color": theme.LANES[str(lane)], "line": {"width": 1, "color": "white"},
                    "pattern": {
                        "shape": ["/" if one else "" for one in prefill], "fgcolor": "white",
                        "fillmode": "overlay", "solidity": 0.2,
                    },
                }, hovertemplate=
                "<b>%{customdata[0]}</b> (%{y})<br>%{base:.1f} to %{customdata[1]:.1f} ms, "
                "%{x:.1f} ms long<extra></extra>",
            ))
    for arm, generation in generations.items():
        lanes = [row for row in rows if row.startswith(f"{arm} · ")]
        if lanes and generation.total_s:
            figure.add_annotation(x=1e3 * generation.total_s, y=lanes[-1],
                                  text=f"{1e3 * generation.total_s:.0f} ms", showarrow=False,
                                  xanchor="left", xshift=4,
                                  )
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], showgrid=False)
    figure.update_xaxes(range=[0, 1.12 * float(frame["end_ms"].max())])
    figure.update_layout(barmode="overlay", bargap=0.35, legend_y=-0.3)
    return figure


def progress(generations: Mapping[str, Generation]) -> pd.DataFrame:
    """Tokens finished over time: arm, time_ms, n_tokens. A round counts when its verification ends;
    without rounds, verifier spans count one each."""
    rows = []
    for arm, generation in generations.items():
        done = 0
        if generation.rounds:
            for one in generation.rounds:
                done = min(done + one.n_accepted + (one.bonus is not None), len(generation.ids))
                rows.append({"arm": arm, "time_ms": 1e3 * one.verify_end_s, "n_tokens": done})
        else:
            ends = sorted(span.end_s for span in generation.spans if span.lane == "verifier")
            rows += [{
                "arm": arm, "time_ms": 1e3 * end, "n_tokens": min(i + 1, len(generation.ids))
            } for i, end in enumerate(ends)]
    return pd.DataFrame(rows, columns=["arm", "time_ms", "n_tokens"])


def scrubber(generations: Mapping[str, Generation], token_text: Callable[[tuple[int, ...]], str], *,
             title: str = "Step through the run") -> go.Figure:
    """The timeline with a slider (plotly frames, no kernel): a cursor at each finished round and,
    below the bars, the text each arm has by then.

    token_text: text of a tuple of token ids. At most 40 stops, spread over the run.
    """
    figure, steps = timeline(generations, title=title), progress(generations)
    if steps.empty:
        raise MetricError(
            "no round and no verifier span was recorded, so there is nothing to step through")
    stops = sorted(set(steps["time_ms"]))
    stops = [stops[round(i * (len(stops) - 1) / 39)]
             for i in range(40)] if len(stops) > 40 else stops
    cursor = len(figure.data)
    rows = list(figure.layout.yaxis.categoryarray)
    figure.add_trace(
        go.Scatter(x=[0, 0], y=[rows[0], rows[-1]], mode="lines",
                   line={"color": theme.INK, "width": 2}, showlegend=False, hoverinfo="skip"))
    marks = [annotation.to_plotly_json() for annotation in figure.layout.annotations]

    def said(time_ms: float) -> list[dict]:
        lines = []
        for arm, generation in generations.items():
            seen = steps[(steps["arm"] == arm) & (steps["time_ms"] <= time_ms + 1e-9)]
            n = int(seen["n_tokens"].max()) if len(seen) else 0
            text = token_text(generation.ids[:n]) if n else "…"
            text = "<br>".join(_wrapped(html.escape(text.replace("\n", " ")), 95))
            lines.append(f"<b>{html.escape(arm)}</b> · {n} tokens: {text}")
        note = {
            "x": 0, "y": -0.32, "xref": "paper", "yref": "paper", "xanchor": "left",
            "yanchor": "top", "align": "left", "showarrow": False,
        }
        return [*marks, {**note, "text": "<br>".join(lines), "font": {"size": 13}}]

    figure.frames = [
        go.Frame(name=f"{stop:.0f}", data=[{"x": [stop, stop]}], traces=[cursor],
                 layout={"annotations": said(stop)}) for stop in stops
    ]
    options = {
        "mode": "immediate", "frame": {"duration": 0, "redraw": True},
        "transition": {"duration": 0}
    }
    slider = {
        "active": 0, "pad": {"t": 18}, "y": -0.62,
        "currentvalue": {"prefix": "at ", "suffix": " ms"},
        "steps": [{"label": frame.name, "method": "animate", "args": [[frame.name], options]}
                  for frame in figure.frames],
    }
    figure.update_layout(annotations=said(stops[0]), sliders=[slider],
                         height=figure.layout.height + 240, margin={"b": 260}, showlegend=False,
                         legend_y=1.1)
    figure.data[cursor].x = [stops[0], stops[0]]
    return figure


def _wrapped(text: str, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]
