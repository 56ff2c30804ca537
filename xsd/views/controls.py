"""The widgets of the explorers: what they choose, and what a choice draws anew."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import Generation, Sample, printable
from xsd.views import explorers, figures, images, theme, tokens
from xsd.views.safe import Html


class AcceptanceExplorer:
    """Run, levels, rule and threshold left; the curve right; click a position (or move its slider)
    for its samples, which can be searched and paged; strips, reasons and pictures below. ``widget``
    is shown in a notebook; ``selection`` is the present one. Only what a control changes is drawn
    anew. Raises: MetricError if there is nothing to show."""

    def __init__(self, data: explorers.ExplorerData, *, levels: Sequence[str] | None = None,
                 tau: float = 0.9):
        # here so that reading a selection needs no widget packages
        import ipywidgets as widgets
        import plotly.graph_objects as go

        self.data = data
        run = data.runs[0]
        chosen = tuple(levels or data.levels(run)[:2])
        self.selection = explorers.Selection(run, chosen, listed=chosen[0])
        late, wide = {"continuous_update": False}, widgets.Layout(width="98%")
        self.run = widgets.Dropdown(options=data.runs, value=run, description="run")
        self.levels = widgets.SelectMultiple(options=data.levels(run), value=chosen,
                                             description="levels", rows=6)
        self.rule = widgets.ToggleButtons(
            options=[("same token", "token"), ("cosine > τ", "cosine")], description="accepted")
        self.tau = widgets.FloatSlider(value=tau, min=0.5, max=0.99, step=0.01, description="τ",
                                       disabled=True, **late)
        self.curve = widgets.ToggleButtons(options=list(figures.CURVES), description="curve")
        self.position = widgets.IntSlider(min=0, max=self._last_position(), description="position",
                                          **late)
        self.listed = widgets.Dropdown(options=chosen, description="samples of")
        self.search = widgets.Text(placeholder="question, clip, token …", description="search",
                                   **late)
        held = data.tokens["kind"].cat.categories if "kind" in data.tokens else []
        self.kind = widgets.Dropdown(options=[("any word", ""), *((one, one) for one in held)],
                                     description="kind")
        self.rejected = widgets.Checkbox(description="rejected here", indent=False)
        self.page = widgets.BoundedIntText(value=1, min=1, max=1, description="page")
        self.samples = widgets.Select(options=[], rows=9, description="samples", layout=wide)
        self.found, self.title, self.strips, self.reasons, self.pictures = (
            widgets.HTML() for _ in range(5))
        empty = figures.acceptance_by_position(pd.DataFrame({"level": []}))
        empty.update_layout(autosize=True, height=400)
        empty.add_vline(x=0, line={"color": theme.REJECTED, "width": 6}, opacity=0.35,
                        layer="below")
        self.figure = go.FigureWidget(empty)
        self._quiet = False
        controls = [self.run, self.levels, self.rule, self.tau, self.curve, self.position]
        filters = [self.listed, self.search, self.kind, self.rejected, self.page]
        for control in (*controls, *filters, self.samples):
            control.observe(self._changed, names="value")
        self._show(set(vars(self.selection)))
        left = widgets.VBox(controls, layout=widgets.Layout(width="36%", min_width="320px"))
        right = widgets.Box([self.figure], layout=widgets.Layout(width="64%"))
        asked = widgets.HBox([*filters, self.found], layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([self.title, widgets.HBox([left, right]), asked, self.samples,
                                    self.strips, self.reasons, self.pictures])

    def _last_position(self) -> int:
        chosen = explorers.grids(self.data, self.selection)
        return max(one.first + one.inside.shape[1] - 1 for one in chosen)

    def click(self, position: int) -> None:
        """What a click on a point of the curve does: go to that position."""
        self.position.value = min(max(int(position), 0), self.position.max)

    def _changed(self, change: dict) -> None:
        if self._quiet:
            return
        owner, before = change["owner"], self.selection
        if owner is self.run:
            self._set(self.levels, options=self.data.levels(self.run.value))
            kept = tuple(level for level in before.levels if level in self.levels.options)
            self._set(self.levels, value=kept or self.levels.options[:1])
        if not self.levels.value:  # nothing chosen: keep what was shown
            return
        if owner in (self.run, self.levels):
            kept = self.listed.value
            self._set(self.listed, options=self.levels.value)
            self._set(self.listed, value=kept if kept in self.levels.value else
                      self.levels.value[0])
        self.tau.disabled = self.rule.value == "token"
        self.selection = explorers.Selection(
            run=self.run.value, levels=tuple(self.levels.value),
            tau=None if self.rule.value == "token" else round(self.tau.value, 4),
            curve=self.curve.value, position=self.position.value, listed=self.listed.value,
            sample=self.samples.value if owner is self.samples else before.sample,
            search=self.search.value, kind=self.kind.value, rejected=self.rejected.value,
            page=self.page.value - 1)
        if owner in (self.run, self.levels):
            self._set(self.position, max=self._last_position())
            self.selection = replace(self.selection, position=self.position.value)
        self._show({name for name, value in vars(self.selection).items()
                    if value != getattr(before, name)})

    def _set(self, control: Any, **values: object) -> None:
        """Change a control without hearing it ourselves."""
        self._quiet = True
        try:
            for name, value in values.items():
                setattr(control, name, value)
        finally:
            self._quiet = False

    def _show(self, changed: set[str]) -> None:
        """Draw anew what depends on these fields of the selection, the quickest first."""
        of_curve = {"run", "levels", "tau"}
        if "position" in changed:
            here = {"x0": self.selection.position, "x1": self.selection.position}
            self.figure.update_shapes(here)
        if changed & of_curve:
            line = explorers.headline(self.data, self.selection)
            self.title.value = Html('<div style="font:15px {}">{}</div>').format(theme.FONT, line)
        if changed & {*of_curve, "curve"}:
            self._draw()
        if changed - {"curve", "sample"}:
            before = self.selection.sample
            self._list(changed)
            changed = changed | ({"sample"} if self.selection.sample != before else set())
        if changed & {*of_curve, "position", "sample"}:
            self.strips.value = explorers.strips(self.data, self.selection)
            self.reasons.value = explorers.reasons(self.data, self.selection)
        if "sample" in changed:
            self.pictures.value = explorers.pictures(self.data, self.selection)

    def _list(self, changed: set[str]) -> None:
        """The page of samples; where other samples are asked for, the page of the one shown.
        Another position shows its first, worst sample."""
        listed = explorers.samples_at(self.data, self.selection)
        place = np.flatnonzero(listed["sample"] == self.selection.sample)
        if changed != {"page"}:
            kept = len(place) and "position" not in changed
            if not kept and (len(listed) or changed & {"run", "position"}):
                first = listed["sample"].iloc[0] if len(listed) else None
                self.selection, place = replace(self.selection, sample=first), np.arange(1)
            page = place[0] // explorers.PAGE if len(place) else 0
            self.selection = replace(self.selection, page=int(page))
        last = max(1, -(-len(listed) // explorers.PAGE))
        self._set(self.page, max=max(last, self.page.value))
        self._set(self.page, value=self.selection.page + 1)
        self._set(self.page, max=last)
        shown = listed.iloc[self.selection.page * explorers.PAGE:][:explorers.PAGE]
        options = [(explorers.line_of(row), row["sample"]) for row in shown.to_dict("records")]
        here = self.selection.sample if (shown["sample"] == self.selection.sample).any() else None
        self._set(self.samples, options=options)
        self._set(self.samples, value=here)
        lost = int((~listed["accepted"]).sum())
        self.found.value = tokens.caption(
            f"of {last} · {len(listed)} samples, {lost} rejected here")

    def _draw(self) -> None:
        frame = explorers.curve(self.data, self.selection)
        traces = figures.curve_traces(frame, self.selection.curve)
        with self.figure.batch_update():
            if [one.name for one in self.figure.data] != [one.name for one in traces]:
                self.figure.data = ()
                self.figure.add_traces(traces)
                for trace in self.figure.data[1::2]:
                    trace.on_click(lambda trace, points, state: self.click(points.xs[0])
                                   if points.xs else None)
            else:
                for old, new in zip(self.figure.data, traces, strict=True):
                    old.x, old.y, old.customdata = new.x, new.y, new.customdata
            self.figure.layout.title.text = f"Acceptance by position · {self.selection.curve}"
            self.figure.layout.annotations[0].text = figures.CURVES[self.selection.curve]


class LiveExplorer:
    """One live answer round by round: choose sample, arm and round (arrow keys step the slider).
    samples: key → what the list says of it. trace: sample key and arm → the Generation, asked for
    when both are chosen. token_text: of an id. sample: as in explorers.ExplorerData. why: arm,
    sample key and position → the row of drafting.alternatives, with texts."""

    def __init__(self, samples: Mapping[str, str], arms: Sequence[str],
                 trace: Callable[[str, str], Generation], token_text: Callable[[int], str], *,
                 sample: Callable[[str], Sample | None] = lambda key: None,
                 why: Callable[[str, str, int], dict | None] = lambda arm, key, position: None):
        import ipywidgets as widgets

        self._trace, self._text, self._sample, self._why = cache(trace), token_text, sample, why
        options = [(printable(said), key) for key, said in samples.items()]
        self.sample = widgets.Dropdown(options=options, description="sample",
                                       layout=widgets.Layout(width="70%"))
        self.arm = widgets.Dropdown(options=list(arms), description="arm")
        self.round = widgets.IntSlider(description="round", continuous_update=False)
        self.shown, self.pictures = widgets.HTML(), widgets.HTML()
        for control in (self.sample, self.arm, self.round):
            control.observe(self._show, names="value")
        self._show({"owner": self.sample})
        self.widget = widgets.VBox([self.sample, widgets.HBox([self.arm, self.round]), self.shown,
                                    self.pictures])

    def _show(self, change: dict) -> None:
        key, arm = self.sample.value, self.arm.value
        found = self._trace(key, arm)
        last = max(0, len(found.rounds) - 1)
        if change["owner"] is not self.round and (self.round.value, self.round.max) != (0, last):
            with self.round.hold_trait_notifications():
                self.round.unobserve(self._show, "value")
                self.round.value, self.round.max = 0, last
            self.round.observe(self._show, "value")
        page = tokens.step(found, self.round.value, self._text)
        if found.rounds:
            one, at = found.rounds[self.round.value], tokens.verified(found, self.round.value)
            lost = at + one.n_accepted - 1
            if one.n_accepted < len(one.drafted) and one.bonus is not None:
                row = {"position": lost, "match": False, "verifier_token": self._text(one.bonus),
                       "draft_token": self._text(one.drafted[one.n_accepted])}
                page += tokens.reason(arm, row, self._why(arm, key, lost))
        self.shown.value = page
        if change["owner"] is self.sample:
            seen = self._sample(key)
            self.pictures.value = images.sensors(seen, side=112, large=480) if seen else ""
