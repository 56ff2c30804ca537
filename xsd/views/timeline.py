"""Who worked when: horizontal bars of a request's spans, the baseline beside it, and a slider that
walks through the rounds without a kernel; what the parts of decoding cost, and predicted beside
measured time."""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from xsd.core import Generation, MetricError
from xsd.views import safe, theme

LANE_ORDER = ("drafter", "adapter", "verifier")
STOPS = 40
"""At most so many places of the slider."""


def spans(generations: Mapping[str, Generation]) -> pd.DataFrame:
    """One row per span: arm, lane, what, start_ms, end_ms, milliseconds since the request began;
    row: where it is drawn. Arms and lanes in drawing order.

    Raises: MetricError when no generation holds a span."""
    rows = [(arm, lane, span.what, 1e3 * span.start_s, 1e3 * span.end_s, f"{arm} · {lane}")
            for arm, generation in generations.items() for lane in LANE_ORDER
            for span in generation.spans if span.lane == lane]
    if not rows:
        raise MetricError("no time was recorded in these runs, so there is no timeline to draw; "
                          "generate with spans (the live decoders record them)")
    return pd.DataFrame(rows, columns=["arm", "lane", "what", "start_ms", "end_ms", "row"])


def trace_events(generations: Mapping[str, Generation]) -> dict[str, Any]:
    """The same spans for a trace viewer (Perfetto, chrome://tracing): a process per arm, a thread
    per lane, microseconds, in the Trace Event Format. Raises: as :func:`spans`."""
    frame, events = spans(generations), []
    for process, (arm, part) in enumerate(frame.groupby("arm", sort=False), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": arm}})
        for thread, (lane, bars) in enumerate(part.groupby("lane", sort=False), start=1):
            place = {"pid": process, "tid": thread}
            events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": lane}})
            events += [{"ph": "X", "name": bar.what, "cat": lane, **place,
                        "ts": 1e3 * bar.start_ms, "dur": 1e3 * (bar.end_ms - bar.start_ms)}
                       for bar in bars.itertuples()]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def timeline(generations: Mapping[str, Generation], *,
             title: str = "Where the time goes") -> go.Figure:
    """Bars by arm and lane. generations: arm name → Generation, the baseline among them; the first
    arm is drawn on top."""
    frame, generations = safe.labels(spans(generations)), safe.keys(generations)
    rows = frame["row"].unique().tolist()
    figure = theme.figure(title, x="milliseconds since the request began (hatched: prefill)",
                          height=150 + 46 * len(rows))
    for lane, part in frame.groupby("lane", sort=False):
        hatched = np.where(part["what"].str.startswith("prefill"), "/", "").tolist()
        figure.add_trace(go.Bar(
            y=part["row"].tolist(), x=(part["end_ms"] - part["start_ms"]).tolist(),
            base=part["start_ms"].tolist(), orientation="h", name=lane,
            customdata=part[["what", "end_ms"]].to_numpy().tolist(),
            marker={"color": theme.LANES[lane], "line": {"width": 1, "color": "white"},
                    "pattern": {"shape": hatched, "fgcolor": "white", "fillmode": "overlay",
                                "solidity": 0.2}},
            hovertemplate="<b>%{customdata[0]}</b> (%{y})<br>%{base:.1f} to %{customdata[1]:.1f} "
            "ms, %{x:.1f} ms long<extra></extra>"))
    for arm, row in frame.groupby("arm", sort=False)["row"].last().items():
        if total := 1e3 * generations[arm].total_s:
            figure.add_annotation(x=total, y=row, text=f"{total:.0f} ms", showarrow=False,
                                  xanchor="left", xshift=4)
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], showgrid=False)
    figure.update_xaxes(range=[0, 1.12 * float(frame["end_ms"].max())])
    figure.update_layout(barmode="overlay", bargap=0.35, legend_y=-0.3)
    return figure


def stages(generations: Mapping[str, Generation]) -> pd.DataFrame:
    """What each lane did, one row per arm and stage: arm, lane, stage, times, ms in all, ms each,
    share of the arm's work (lanes work at once, so that it may exceed the answer's time)."""
    frame = spans(generations)
    frame = frame.assign(ms=frame["end_ms"] - frame["start_ms"], stage=[
        lane if what == lane else f"{lane}: {what}"
        for lane, what in zip(frame["lane"], frame["what"], strict=True)])
    found = frame.groupby(["arm", "lane", "stage"], sort=False)["ms"].agg(["count", "sum", "mean"])
    found = found.reset_index().set_axis(["arm", "lane", "stage", "times", "ms", "ms each"], axis=1)
    return found.assign(share=found["ms"] / found.groupby("arm")["ms"].transform("sum"))


def shares(generations: Mapping[str, Generation], *,
           title: str = "What the lanes did: share of their work") -> go.Figure:
    """A ring for each arm of :func:`stages`, the answer's milliseconds inside."""
    frame, generations = safe.labels(stages(generations)), safe.keys(generations)
    arms = list(generations)
    figure = theme.figure(title, height=420)
    for place, (arm, part) in enumerate(frame.groupby("arm", sort=False)):
        pale = {lane: iter((1.0, 0.55, 0.3)) for lane in LANE_ORDER}
        left, right = place / len(arms), (place + 0.9) / len(arms)
        figure.add_trace(go.Pie(
            labels=part["stage"].tolist(), values=part["ms"].tolist(), hole=0.5, sort=False,
            domain={"x": [left, right]}, textinfo="percent",
            marker={"colors": [theme.rgba(theme.LANES[lane], next(pale[lane], 0.3))
                               for lane in part["lane"]]},
            hovertemplate=f"{arm}<br>%{{label}}: %{{value:.1f}} ms<extra></extra>"))
        figure.add_annotation(x=(left + right) / 2, y=0.5, xref="paper", yref="paper",
                              showarrow=False, xanchor="center",
                              text=f"{arm}<br>{1e3 * generations[arm].total_s:.0f} ms")
    return figure


def progress(generations: Mapping[str, Generation]) -> pd.DataFrame:
    """Tokens finished over time: arm, time_ms, n_tokens. A round counts when its verification ends;
    without rounds, verifier spans count one each."""
    rows = []
    for arm, generation in generations.items():
        steps = [(one.verify_end_s, one.n_accepted + (one.bonus is not None))
                 for one in generation.rounds]
        if not steps:
            ends = sorted(span.end_s for span in generation.spans if span.lane == "verifier")
            steps = [(end, 1) for end in ends]
        done = 0
        for end, n in steps:
            done = min(done + n, len(generation.ids))
            rows.append((arm, 1e3 * end, done))
    return pd.DataFrame(rows, columns=["arm", "time_ms", "n_tokens"])


def scrubber(generations: Mapping[str, Generation], token_text: Callable[[tuple[int, ...]], str], *,
             title: str = "Step through the run") -> go.Figure:
    """The timeline with a slider (plotly frames, no kernel): a cursor at each finished round and,
    below the bars, the text each arm has by then.

    token_text: text of a tuple of token ids. At most 40 stops, spread over the run."""
    figure, steps = timeline(generations, title=title), progress(generations)
    if steps.empty:
        raise MetricError(
            "no round and no verifier span was recorded, so there is nothing to step through")
    stops = sorted(set(steps["time_ms"]))
    if len(stops) > STOPS:
        stops = [stops[round(i * (len(stops) - 1) / (STOPS - 1))] for i in range(STOPS)]
    rows, cursor = figure.layout.yaxis.categoryarray, len(figure.data)
    figure.add_trace(go.Scatter(x=[stops[0]] * 2, y=[rows[0], rows[-1]], mode="lines",
                                line={"color": theme.INK, "width": 2}, showlegend=False,
                                hoverinfo="skip"))
    marks = [annotation.to_plotly_json() for annotation in figure.layout.annotations]

    def annotations(time_ms: float) -> list[dict[str, Any]]:
        return [*marks, _said(generations, steps[steps["time_ms"] <= time_ms + 1e-9], token_text)]

    figure.frames = [go.Frame(name=f"{stop:.0f}", data=[{"x": [stop, stop]}], traces=[cursor],
                              layout={"annotations": annotations(stop)}) for stop in stops]
    options = {"mode": "immediate", "frame": {"duration": 0, "redraw": True},
               "transition": {"duration": 0}}
    slider = {"active": 0, "pad": {"t": 18}, "y": -0.62,
              "currentvalue": {"prefix": "at ", "suffix": " ms"},
              "steps": [{"label": frame.name, "method": "animate", "args": [[frame.name], options]}
                        for frame in figure.frames]}
    figure.update_layout(annotations=annotations(stops[0]), sliders=[slider],
                         height=figure.layout.height + 240, margin={"b": 260}, showlegend=False,
                         legend_y=1.1)
    return figure


def _said(generations: Mapping[str, Generation], seen: pd.DataFrame,
          token_text: Callable[[tuple[int, ...]], str]) -> dict[str, Any]:
    """The annotation below the bars: what each arm has said by then."""
    lines = []
    for arm, generation in generations.items():
        n = int(seen.loc[seen["arm"] == arm, "n_tokens"].max() if arm in set(seen["arm"]) else 0)
        text = token_text(generation.ids[:n]).strip() if n else "…"
        wrapped = textwrap.wrap(text, 95, break_long_words=False, break_on_hyphens=False)
        said = "<br>".join(map(safe.label, wrapped))
        lines.append(f"<b>{safe.label(arm)}</b> · {n} tokens: {said}")
    return {"x": 0, "y": -0.32, "xref": "paper", "yref": "paper", "xanchor": "left",
            "yanchor": "top", "align": "left", "showarrow": False, "text": "<br>".join(lines),
            "font": {"size": 13}}


PARTS = {"prefill": theme.SOFT_INK, "draft": theme.DRAFTER, "verify": theme.VERIFIER}


def verification_curve(frame: pd.DataFrame, *,
                       title: str = "Verifying K tokens in one pass") -> go.Figure:
    """v(K) with its quartiles beside K single steps: the gap is what speculation can win.

    frame: rows (K), ms, low, high (milliseconds), in order of rows."""
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
    prediction."""
    frame = safe.labels(frame)
    figure = theme.figure(title, x="milliseconds per answer", height=170 + 60 * len(frame))
    hatched = {"shape": "/", "fgcolor": "white", "fillmode": "overlay", "solidity": 0.2}
    for part, colour in PARTS.items():
        figure.add_trace(go.Bar(y=(frame["arm"] + " · predicted").tolist(),
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
