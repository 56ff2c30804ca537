"""What if a price or the acceptance were another: a figure of evaluate.what_if, and its sliders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from xsd.core import MetricError, ParameterError
from xsd.evaluate import what_if
from xsd.views import safe, theme

if TYPE_CHECKING:
    import ipywidgets

TITLES = ("by acceptance", "by drafts a round", "inputs ± 10 %")
DOMAINS = ((0, 0.32), (0.4, 0.6), (0.82, 1))
"""Of the three panels; room between the last two for the inputs' names."""
Points = Mapping[str, Mapping[str, Any]]


def sentence(given: Mapping[str, Any]) -> str:
    """What the model says of these numbers."""
    found = what_if.what_if(given)
    even, best = found["break_even"], found["best_gamma"]
    needs = "no acceptance reaches the baseline" if even is None else (
        f"break-even at α = {even:.0%}")
    if best is not None:
        needs += f"; best γ {best} at {dict(found['by_gamma'])[best]:.2f}×"
    parts = ", ".join(f"{name.replace('_', ' ')} {ms:.0f}"
                      for name, ms in found["parts_ms"].items() if ms >= 0.5)
    return (f"{found['speedup']:.2f}× plain decoding: {found['total_ms']:.0f} ms in place of "
            f"{found['baseline_ms']:.0f} ({parts}); {found['tokens_per_round']:.2f} tokens a "
            f"round; {needs}")


def figure(given: Mapping[str, Any], points: Points | None = None) -> go.Figure:
    """Speed-up over α, with the measured arms of ``points`` as dots; over γ; and its sensitivity.
    given, points: as in evaluate.what_if."""
    drawn = make_subplots(1, 3, subplot_titles=TITLES)
    for axis, title, domain in zip(("xaxis", "xaxis2", "xaxis3"), drawn.layout.annotations, DOMAINS,
                                   strict=True):
        drawn.layout[axis].domain, title.x = domain, sum(domain) / 2
    drawn.update_layout(template=theme.template(), height=380, showlegend=False)
    for column in (1, 2):
        drawn.add_scatter(mode="lines", line={"color": theme.VERIFIER, "width": 2.5},
                          hovertemplate="%{x:.2~f}: %{y:.2f}×<extra>predicted</extra>", row=1,
                          col=column)
        drawn.add_scatter(mode="markers", marker={"color": theme.DRAFTER, "size": 11,
                                                  "symbol": "diamond"}, row=1, col=column,
                          hovertemplate="%{x:.2~f}: %{y:.2f}×<extra>here</extra>")
    for name, colour in (("less", theme.REJECTED), ("more", theme.ADAPTER)):
        drawn.add_bar(orientation="h", name=name, marker={"color": colour}, row=1, col=3,
                      hovertemplate=f"%{{y}} 10 % {name}: %{{x:+.3f}}×<extra></extra>")
    known = {name: one for name, one in (points or {}).items() if "measured" in one}
    drawn.add_scatter(
        x=[one["given"]["acceptance"] for one in known.values()],
        y=[one["measured"] for one in known.values()], mode="markers+text", row=1, col=1,
        text=[safe.label(name.partition(",")[0]) for name in known], textposition="top center",
        cliponaxis=False, textfont={"size": 11},
        marker={"color": theme.INK, "size": 8, "symbol": "circle-open"},
        hovertemplate="%{text}<br>α %{x:.2f}, %{y:.2f}×<extra>measured</extra>")
    drawn.update_xaxes(title_text="α", range=[0, 1.04], tickformat=".0%", row=1, col=1)
    drawn.update_xaxes(title_text="drafts", rangemode="tozero", row=1, col=2)
    drawn.update_xaxes(title_text="change of the speed-up, ×", row=1, col=3)
    drawn.update_yaxes(title_text="times as fast as plain decoding", rangemode="tozero", row=1,
                       col=1)
    drawn.update_yaxes(title_text="", ticklabelstandoff=4, row=1, col=3)
    drawn.update_layout(barmode="overlay", margin={"l": 60})
    for column in (1, 2):
        drawn.add_hline(y=1, line=theme.DASHED, row=1, col=column)
    _draw(drawn, given)
    return drawn


def _draw(drawn: Any, given: Mapping[str, Any]) -> None:
    """The numbers of one ``given`` into the five traces of :func:`figure` that hang on it."""
    found = what_if.what_if(given)
    rows, here = found["sensitivity"][::-1], found["speedup"]
    names = [what_if.INPUTS[row["input"]][0] for row in rows]
    curves = (found["by_acceptance"], [[given["acceptance"], here]], found["by_gamma"],
              [[given["gamma"], here]])
    for trace, curve in zip(drawn.data[:4], curves, strict=True):
        trace.x, trace.y = [list(axis) for axis in zip(*curve, strict=True)] or ([], [])
    for trace, side in zip(drawn.data[4:6], ("less", "more"), strict=True):
        trace.x, trace.y = [row[side] - here for row in rows], names


def widget(presets: Points) -> ipywidgets.Widget:
    """A slider for each input of evaluate.what_if over :func:`figure`. presets: name → its
    ``given`` and what was ``measured``, such as what_if.points of a run, what_if.reference, or
    one's own times. Raises: MetricError without any."""
    import ipywidgets

    if not presets:
        raise MetricError("there is nothing to start from; give what_if.points of a run whose "
                          "notebook 05 measured its parts, or {'mine': {'given': …}}")
    ends = what_if.ranges(one["given"] for one in presets.values())
    first = next(iter(presets))
    drawn, said = go.FigureWidget(figure(presets[first]["given"], presets)), ipywidgets.HTML()
    start = ipywidgets.Dropdown(options=list(presets), description="start from")
    wide = {"style": {"description_width": "430px"}, "layout": {"width": "800px"}}
    made = {name: ipywidgets.FloatSlider(
        min=low, max=high, step=1 if name in ("gamma", "n_tokens") else (high - low) / 200,
        description=" · ".join(filter(None, what_if.INPUTS[name])),
        readout_format=".0f" if name in ("gamma", "n_tokens") else ".2f", **wide)
        for name, (low, high) in ends.items()}

    def now() -> dict[str, Any]:
        own = {name: slider.value for name, slider in made.items()}
        verify = presets[start.value]["given"]["verify"]
        return own | {"gamma": round(own["gamma"]), "verify": verify}

    def show(_: Any = None) -> None:
        try:
            with drawn.batch_update():
                _draw(drawn, now())
            said.value = safe.Html("<p>{}</p>").format(sentence(now()))
        except (MetricError, ParameterError) as error:
            said.value = safe.Html("<p><b>{}</b></p>").format(error)

    def restart(_: Any = None) -> None:
        for name, slider in made.items():
            slider.unobserve(show, "value")
            slider.value = presets[start.value]["given"][name]
            slider.observe(show, "value")
        show()

    start.observe(restart, "value")
    restart()
    return ipywidgets.VBox([start, *made.values(), said, drawn])
