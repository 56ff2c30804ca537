"""The acceptance explorer of notebook 07: plain functions of what a selection shows, and the
widgets that choose it (``AcceptanceExplorer``)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from xsd.core import MetricError, Sample, printable
from xsd.evaluate import curves
from xsd.evaluate import table as token_table
from xsd.evaluate.statistics import Interval
from xsd.views import figures, images, theme, tokens
from xsd.views.safe import Html


@dataclass(frozen=True)
class ExplorerData:
    """What there is to explore: the token table with ``run``, ``draft_token`` and
    ``verifier_token``, and what loads the clip behind a sample key (None: not at hand)."""

    tokens: pd.DataFrame
    sample: Callable[[str], Sample | None] = lambda key: None

    def __post_init__(self) -> None:
        token_table.check(self.tokens, "cosine", "match")
        missing = {"run", "draft_token", "verifier_token"} - set(self.tokens.columns)
        if missing:
            raise MetricError(
                f"the explorer's token table lacks the column(s) {', '.join(sorted(missing))}; "
                "write them when evaluating (notebook 04 does)")

    @property
    def runs(self) -> list[str]:
        """Names of the runs, as they come."""
        return list(dict.fromkeys(self.tokens["run"]))

    def levels(self, run: str) -> list[str]:
        """Levels evaluated in a run, as they come."""
        return list(dict.fromkeys(self.tokens.loc[self.tokens["run"] == run, "level"]))


@dataclass(frozen=True)
class Selection:
    """What is being looked at. tau: None for the token truth, else a cosine threshold."""

    run: str
    levels: tuple[str, ...]
    tau: float | None = None
    curve: str = "marginal"
    position: int = 0
    sample: str | None = None


def rows(data: ExplorerData, selection: Selection) -> pd.DataFrame:
    """The token rows of the chosen run and levels. Raises: MetricError when one is not there."""
    if selection.run not in data.runs:
        raise MetricError(
            f"there is no run named {selection.run!r} here; choose from {', '.join(data.runs)}")
    known = data.levels(selection.run)
    unknown = [level for level in selection.levels if level not in known]
    if unknown or not selection.levels:
        raise MetricError(
            f"run {selection.run!r} has no level {', '.join(unknown) or '(none chosen)'}; choose "
            f"from {', '.join(known)}")
    own = data.tokens["run"] == selection.run
    return data.tokens[own & data.tokens["level"].isin(selection.levels)]


def curve(data: ExplorerData, selection: Selection) -> pd.DataFrame:
    """Acceptance by position (``curves.by_position``), levels in the order chosen."""
    chosen = rows(data, selection)
    levels = chosen["level"].astype(str)
    order = pd.Categorical(levels, categories=list(selection.levels), ordered=True)
    return curves.by_position(chosen.iloc[order.argsort()], selection.tau)


def headline(data: ExplorerData, selection: Selection) -> str:
    """One line: the rule, and the unbroken prefix of each level with its interval."""
    table = curves.unbroken_prefix(rows(data, selection), selection.tau).set_index("level")
    rule = "same token" if selection.tau is None else f"cosine > {selection.tau:.2f}"
    found = table.loc[list(selection.levels), ["value", "low", "high"]]
    parts = ", ".join(f"{level} {Interval(*row, 0, 0).text(percent=False)}"
                      for level, *row in found.itertuples())
    return f"{rule} · unbroken prefix: {parts} · n = {int(table['n'].max())}"


def samples_at(data: ExplorerData, selection: Selection) -> pd.DataFrame:
    """Samples of the first chosen level that have the chosen position, with their texts there; the
    rejected first, then by cosine."""
    first = rows(data, replace(selection, levels=selection.levels[:1]))
    here = first[first["position"] == selection.position]
    here = here.assign(accepted=curves.right(here, selection.tau))
    columns = ("sample", "question", "draft_token", "verifier_token", "cosine", "accepted")
    ordered = here.sort_values(["accepted", "cosine", "sample"], kind="stable")
    return ordered[[name for name in columns if name in here]].reset_index(drop=True)


def strips(data: ExplorerData, selection: Selection) -> Html:
    """Draft over verifier of the chosen sample, one strip per chosen level."""
    own = rows(data, selection)
    own = own[own["sample"] == selection.sample]
    parts = [tokens.pairs(own[own["level"] == level], selection.tau, here=selection.position,
                          label=f"{level}: draft above, verifier below")
             for level in selection.levels if (own["level"] == level).any()]
    if not parts:
        return tokens.caption(f"No sample has position {selection.position} here.")
    return Html().join(parts) + tokens.legend(("accepted", "rejected", "unused", "verifier"))


def pictures(data: ExplorerData, selection: Selection) -> Html:
    """Event frames and video frames of the chosen sample, or why not."""
    sample = data.sample(selection.sample) if selection.sample else None
    if sample is None:
        return tokens.caption(f"The pictures of {selection.sample} are not at hand.")
    return images.sensors(sample, side=112)


class AcceptanceExplorer:
    """Run, levels, rule and threshold left; the curve right; click a position (or move its slider)
    for its samples; strips and pictures below. ``widget`` is shown in a notebook; ``selection`` is
    the current :class:`Selection`. Raises: MetricError if there is nothing to show."""

    def __init__(self, data: ExplorerData, *, levels: Sequence[str] | None = None,
                 tau: float = 0.9):
        # here so that reading a selection needs no widget packages
        import ipywidgets as widgets
        import plotly.graph_objects as go

        self.data = data
        run = data.runs[0]
        chosen = tuple(levels or data.levels(run)[:2])
        self.selection = Selection(run, chosen)
        self.run = widgets.Dropdown(options=data.runs, value=run, description="run")
        self.levels = widgets.SelectMultiple(options=data.levels(run), value=chosen,
                                             description="levels", rows=6)
        self.rule = widgets.ToggleButtons(
            options=[("same token", "token"), ("cosine > τ", "cosine")], description="accepted")
        self.tau = widgets.FloatSlider(value=tau, min=0.5, max=0.99, step=0.01, description="τ",
                                       disabled=True, continuous_update=False)
        self.curve = widgets.ToggleButtons(options=list(figures.CURVES), description="curve")
        self.position = widgets.IntSlider(min=0, max=self._last_position(), description="position",
                                          continuous_update=False)
        self.samples = widgets.Select(options=[], rows=9, description="samples",
                                      layout=widgets.Layout(width="98%"))
        self.title, self.strips, self.pictures = widgets.HTML(), widgets.HTML(), widgets.HTML()
        empty = figures.acceptance_by_position(curve(data, self.selection))
        empty.update_layout(autosize=True, height=400)
        empty.add_vline(x=0, line={"color": theme.REJECTED, "width": 6}, opacity=0.35,
                        layer="below")
        self.figure = go.FigureWidget(empty)
        self._quiet = False
        controls = [self.run, self.levels, self.rule, self.tau, self.curve, self.position]
        for control in (*controls, self.samples):
            control.observe(self._changed, names="value")
        self._show()
        left = widgets.VBox(controls, layout=widgets.Layout(width="36%", min_width="320px"))
        right = widgets.Box([self.figure], layout=widgets.Layout(width="64%"))
        self.widget = widgets.VBox([self.title, widgets.HBox([left, right]), self.samples,
                                    self.strips, self.pictures])

    def _last_position(self) -> int:
        return int(rows(self.data, self.selection)["position"].max())

    def click(self, position: int) -> None:
        """What a click on a point of the curve does: go to that position."""
        self.position.value = min(max(int(position), 0), self.position.max)

    def _changed(self, change: dict) -> None:
        if self._quiet:
            return
        owner = change["owner"]
        if owner is self.run:
            self._set(self.levels, options=self.data.levels(self.run.value))
            kept = tuple(level for level in self.selection.levels if level in self.levels.options)
            self._set(self.levels, value=kept or self.levels.options[:1])
        if not self.levels.value:  # nothing chosen: keep what was shown
            return
        self.tau.disabled = self.rule.value == "token"
        self.selection = Selection(
            run=self.run.value, levels=tuple(self.levels.value),
            tau=None if self.rule.value == "token" else round(self.tau.value, 4),
            curve=self.curve.value, position=self.position.value,
            sample=self.samples.value if owner is self.samples else self.selection.sample)
        self._set(self.position, max=self._last_position())
        self.selection = replace(self.selection, position=self.position.value)
        self._show(owner)

    def _set(self, control: object, **values: object) -> None:
        """Change a control without hearing it ourselves."""
        self._quiet = True
        try:
            for name, value in values.items():
                setattr(control, name, value)
        finally:
            self._quiet = False

    def _show(self, owner: object = None) -> None:
        if owner is not self.samples:
            listed = samples_at(self.data, self.selection)
            names = listed["sample"].tolist()
            labels = [_line(row) for row in listed.to_dict("records")]
            # another position shows its first, worst sample
            kept = self.selection.sample in names and owner is not self.position
            sample = self.selection.sample if kept else next(iter(names), None)
            self._set(self.samples, options=list(zip(labels, names, strict=True)), value=sample)
            self.selection = replace(self.selection, sample=sample)
        if owner not in (self.position, self.samples):
            self._draw()
        self.figure.update_shapes({"x0": self.selection.position, "x1": self.selection.position})
        line = headline(self.data, self.selection)
        self.title.value = Html('<div style="font:15px {}">{}</div>').format(theme.FONT, line)
        self.strips.value = strips(self.data, self.selection)
        self.pictures.value = pictures(self.data, self.selection)

    def _draw(self) -> None:
        traces = figures.curve_traces(curve(self.data, self.selection), self.selection.curve)
        with self.figure.batch_update():
            if len(self.figure.data) != len(traces):
                self.figure.data = ()
                self.figure.add_traces(traces)
            else:
                for old, new in zip(self.figure.data, traces, strict=True):
                    old.update(new.to_plotly_json(), overwrite=False)
            self.figure.layout.title.text = f"Acceptance by position · {self.selection.curve}"
            self.figure.layout.annotations[0].text = figures.CURVES[self.selection.curve]
        for trace in self.figure.data[1::2]:
            trace.on_click(lambda trace, points, state: self.click(points.xs[0])
                           if points.xs else None)


def _line(row: dict) -> str:
    sign = "✓" if row["accepted"] else "✗"
    question = f" · {row['question']}" if "question" in row else ""
    said = (f"{tokens.visible(str(row['draft_token']))} → "
            f"{tokens.visible(str(row['verifier_token']))}")
    return printable(f"{sign} {row['cosine']:.3f}  {said}  · {row['sample']}{question}")
