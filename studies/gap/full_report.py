"""The paper copy of notebook 13: the printed report, ``metrics.json``, every table in three forms
and every figure, into ``<run_dir>/report/`` (docs/metrics.md, section 9)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from studies.gap import truth_figures
from studies.gap.counterfactual import REAL
from studies.parameters import TruthParameters
from xsd.core import ParameterError
from xsd.evaluate import curves, reliability, speedup, table, tables
from xsd.evaluate.speedup import Timing
from xsd.files import atomic_write, is_path, write_json
from xsd.runs import exports, folder, numbers, report
from xsd.steps import evaluation, judge, training
from xsd.views import figures

MARKS = ("<!-- measured -->", "<!-- /measured -->")
Tables = Mapping[str, pd.DataFrame]


def write(P: TruthParameters, results: Mapping[str, Any],
          tokens: Mapping[str, pd.DataFrame], found: Mapping[str, Tables],
          timed: Mapping[str, Mapping[str, Timing]] | None = None) -> dict[str, Any]:
    """Write everything and return what was written: folder, tables, figures (numbers of files),
    pictures (a sentence). results: as truth.save returned them. tokens, found: the token table of
    the real events, and truth's tables, of every held-out set; timed: judge.timings of it."""
    target = folder.resolve(P.run_dir) / "report"
    live = folder.load_results(P.run_dir).get("live", {})
    texts, numbers_of, written, drawn = [], {}, 0, {}
    for name, each in found.items():
        by_level = dict(list(each["metrics"].groupby("level", sort=False, observed=True)))
        timings, clocks = (timed or {}).get(name, {}), live.get("test", {}).get(name, live)
        texts += [judge.text_of(name, str(level), each, P.gamma, timings.get(level), clocks)
                  for level in by_level]
        rows = {level: part.to_dict("records") for level, part in by_level.items()}
        numbers_of[name] = results["test"][name] | {"levels": rows}
        written += sum(len(tables.write(frame, target / "tables" / f"{key}_{name}"))
                       for key, frame in each.items())
        own = tokens[name][tokens[name]["level"] != table.DRAFTER]
        drawn |= {f"{key}_{name}": figure
                  for key, figure in figures_of(P, name, own, each, live).items()}
    trained = [level for level in P.levels if not is_path(level)]  # of those by path nobody knows
    if trained:
        drawn[f"training_loss_{next(iter(found))}"] = figures.training_curves(
            training.history(P.run_dir, trained), title="Training loss")
    atomic_write(target / "report.txt", "\n".join(texts))
    write_json(target / "metrics.json",
               numbers.plain({"test": numbers_of, "provenance": results["provenance"]}))
    for key, figure in drawn.items():
        save_html(figure, target / "figures" / f"{key}.html")
    if P.page:
        update_page(folder.resolve(P.page), measured_block(P, results, found))
    said = exports.save_pictures(drawn, target / "figures") if P.pictures else (
        "not asked for (pictures=true)")
    return {"folder": target, "tables": written, "figures": len(drawn), "pictures": said}


def figures_of(P: TruthParameters, name: str, own: pd.DataFrame, found: Tables,
               live: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Name → figure of one held-out set. own: the token table of the adapters' levels."""
    drafted = table.drafted(own)
    positions = curves.by_position(drafted, max_positions=evaluation.POSITIONS,
                                   resamples=P.resamples, seed=P.seed)
    histogram, taus = curves.cosine_histogram(drafted), tuple(P.thresholds)
    gap = found["gap"].query("level == @P.waterfall and unit == 'token_acceptance'")
    out = {
        "histogram": figures.cosine_histogram(
            histogram, thresholds=taus, title=f"Cosine to the verifier's state, {name}"),
        "by_position": figures.acceptance_by_position(
            positions, title=f"Acceptance by position, {name}"),
        "survival": figures.acceptance_by_position(
            positions, curve="survival", title=f"Accepted up to here without a break, {name}"),
        "reliability": figures.reliability_curve(
            reliability.curve(drafted, n_resamples=P.resamples, seed=P.seed),
            title=f"Does a high cosine mean the same token? {name}"),
        "waterfall": truth_figures.gap_waterfall(
            gap, title=f"Where {P.waterfall} loses acceptance, {name}"),
        "metrics_summary": truth_figures.four_panels(
            cosines=histogram, positions=positions, title=f"Summary, {name}",
            lengths=curves.unbroken_prefix_histogram(drafted),
            speedups=speedups(own, live, P.gamma)),
        "two_phase": truth_figures.two_phase(found["two_phase"]),
        "by_threshold": figures.acceptance_by_position(
            by_threshold(drafted[drafted["level"] == P.waterfall], taus),
            title=f"{P.waterfall} by position at every τ, {name}"),
    }
    if "speedup" in set(found["two_phase"]["metric"]):
        out["two_phase_speedup"] = truth_figures.two_phase(found["two_phase"], "speedup")
    if found["kinds"]["n"].max() >= 5:
        out["kinds"] = truth_figures.losses_by_kind(
            found["kinds"], title=f"What {P.waterfall} loses in which words, {name}")
    if set(found["arms"]["arm"]) != {REAL}:
        out["arms"] = arms_figure(found, name)
    return out


def by_threshold(drafted: pd.DataFrame, taus: Sequence[float]) -> pd.DataFrame:
    """curves.by_position of one level at every τ, and of the tokens themselves, as levels."""
    named = {"same token": None} | {f"cos > {tau:.2f}": tau for tau in taus}
    return pd.concat([curves.by_position(drafted, tau, max_positions=evaluation.POSITIONS)
                      .assign(level=name) for name, tau in named.items()])


def arms_figure(found: Tables, name: str) -> go.Figure:
    """The counterfactual arms of a set, with the best floor that looks at nothing (the drafter's
    own tokens are a row)."""
    return truth_figures.sensor_of(found, "", name)


def speedups(own: pd.DataFrame, live: Mapping[str, Any], gamma: int) -> pd.DataFrame:
    """What the summary's last panel draws: the live run's arms where there is one, else what the
    reference's formula would predict."""
    rows = [{"name": row["label"], "kind": row["kind"], **row["speedup"]}
            for row in live.get("arms", {}).values()]
    if not rows:
        each = table.counts(own, gamma).groupby("level", sort=False, observed=True)
        sums = each[["accepted", "drafted"]].sum()
        rows = [{"name": level, "kind": "predicted", "low": None, "high": None,
                 "value": speedup.reference_wall_clock(accepted / drafted)}
                for level, accepted, drafted in sums.itertuples()]
    return pd.DataFrame(rows).astype({"low": float, "high": float})


def measured_block(P: TruthParameters, results: Mapping[str, Any],
                   found: Mapping[str, Tables]) -> str:
    """The acceptances of the first held-out set side by side, as Markdown with what they were
    counted on."""
    name, first = next(iter(found.items()))
    head, about = first["headline"].iloc[0], results["provenance"]
    n_answers = first["checks"]["n"].iloc[1]
    lines = [f"Held-out set *{name}*: {head['n']} tokens of {n_answers} answers, "
             f"{head['clusters']} drives, γ = {P.gamma}, seed {about['seed']}, revision "
             f"`{str(about['git_revision'])[:10]}`."]
    for unit, own in first["acceptances"].groupby("unit", sort=False):
        label, own = truth_figures.UNITS[unit][0], own.drop(columns="unit")
        lines += ["", f"{label[0].upper()}{label[1:]}:", "", tables.markdown(own).rstrip()]
    return "\n".join(lines)


def update_page(page: Path, block: str) -> None:
    """Write a block between the page's marks. Raises: ParameterError when the page has no such
    marks."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    (before, *more), (*less, after) = (text.split(mark) for mark in MARKS)
    if len(more) != 1 or len(less) != 1:
        raise ParameterError(f"{page.name} has no place for measured figures; give a page that "
                             f"holds {MARKS[0]} and {MARKS[1]} once each")
    atomic_write(page, f"{before}{MARKS[0]}\n{block}\n{MARKS[1]}{after}")


def save_html(figure: go.Figure, path: Path) -> None:
    """One page for a figure; plotly.js stands once beside them, so that they open without a
    network. The same figure gives the same bytes."""
    script = path.parent / "plotly.min.js"
    if not script.is_file():
        from plotly.offline import get_plotlyjs

        atomic_write(script, get_plotlyjs())
    atomic_write(path, report.figure_page(figure))
