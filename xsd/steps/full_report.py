"""Step 13, the paper copy: the printed report, ``metrics.json``, every table in three forms and
every figure, into ``<run_dir>/report/``.

::

    report.txt                      the eight sections for each level (metrics/report_text.py)
    metrics.json                    every figure with its interval and n, by data set and level
    tables/<name>_<data>.{csv,md,tex}
    figures/<name>_<data>.html      with plotly.min.js beside them; .png and .svg too where asked for and a Chromium is installed
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from xsd.core import ParameterError
from xsd.evaluate import curves, hidden, reliability, report_text, speedup, tables, tokens
from xsd.evaluate.reliability_old import ReliabilityResult
from xsd.files import atomic_write, write_json
from xsd.runs import doctor, folder, numbers
from xsd.steps import acceptance, counterfactual, training
from xsd.steps.truth import Measured, Truth
from xsd.views import figures, truth_figures

MARKS = ("<!-- measured -->", "<!-- /measured -->")
Results = tuple[hidden.HiddenStateResult, tokens.TokenResult, ReliabilityResult]


def write(found: Truth) -> dict[str, Any]:
    """Write everything and return what was written: folder, tables, figures (numbers of files),
    pictures (a sentence)."""
    target = folder.resolve(found.given.run_dir) / "report"
    live = folder.load_results(found.given.run_dir).get("live", {})
    texts, numbers_of, written, drawn = [], {}, 0, {}
    for name, one in found.sets.items():
        results = {level: _results(found, one, level) for level in one.evaluations}
        texts += [text_of(one, level, *result) for level, result in results.items()]
        rows = {
            level: [row for part in result for row in part.rows()]
            for level, result in results.items()
        }
        numbers_of[name] = {"levels": rows, **found.results["test"][name]}
        whole = {
            **one.tables, "metrics": tables.frame([{"level": level, **row}
                                                   for level, part in rows.items() for row in part])
        }
        for table, frame in whole.items():
            written += len(tables.write(frame, target / "tables" / f"{table}_{name}"))
        drawn |= {
            f"{figure}_{name}": picture for figure, picture in figures_of(found, one, live).items()
        }
    atomic_write(target / "report.txt", "\n".join(texts))
    write_json(target / "metrics.json",
               numbers.plain({"test": numbers_of, "provenance": found.results["provenance"]}))
    for name, picture in drawn.items():
        save_html(picture, target / "figures" / f"{name}.html")
    if found.given.page:
        update_page(folder.resolve(found.given.page), found)
    said = save_pictures(drawn, target /
                         "figures") if found.given.pictures else "not asked for (pictures=true)"
    return {"folder": target, "tables": written, "figures": len(drawn), "pictures": said}


def _results(found: Truth, one: Measured, level: str) -> Results:
    options = {"n_resamples": found.given.resamples, "seed": found.given.seed}
    own = one.evaluations[level]
    return own.hidden.result(**options), own.tokens.result(**options), own.reliability.result(
        **options)


def text_of(one: Measured, level: str, of_states: hidden.HiddenStateResult,
            of_tokens: tokens.TokenResult, reliable: ReliabilityResult) -> str:
    """The eight sections for one level; the comparison with the floors is the drafting loop's, the
    rest is one step."""
    title = (f"{level} on {one.name}: one step after the verified prefix; against the floors as a "
             "greedy loop drafts")
    return report_text.report(title, of_states, tokens=of_tokens, comparison=one.above[level],
                              reliability=reliable)


def figures_of(found: Truth, one: Measured, live: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Name → figure of one held-out set; the training curves come once, with the first set."""
    given, name = found.given, one.name
    levels = list(one.evaluations)
    table = one.tokens[one.tokens["level"].isin(levels)]
    options = {"resamples": given.resamples, "seed": given.seed}
    positions = curves.by_position(table, max_positions=acceptance.POSITIONS, **options)
    histogram = curves.cosine_histogram(table)
    gap = one.tables["gap"]
    own = gap[(gap["level"] == given.waterfall) & (gap["unit"] == "token_acceptance")]
    taus = tuple(given.thresholds)
    out = {
        "histogram": figures.cosine_histogram(histogram, thresholds=taus,
                                              title=f"Cosine to the verifier's state, {name}"),
        "by_position": figures.acceptance_by_position(positions, curve="marginal",
                                                      title=f"Acceptance by position, {name}"),
        "survival": figures.acceptance_by_position(
            positions, curve="survival", title=f"Accepted up to here without a break, {name}"),
        "reliability": reliability_figure(found, one), "waterfall": truth_figures.gap_waterfall(
            own, title=f"Where {given.waterfall} loses acceptance, {name}"),
        "summary": figures.four_panels(cosines=histogram, positions=positions,
                                       lengths=curves.unbroken_prefix_histogram(table),
                                       speedups=speedups(one, live), title=f"Summary, {name}",
                                       ),
        "two_phase": truth_figures.two_phase(one.tables["two_phase"]),
    }  # fmt: skip
    if one.tables["kinds"]["n"].max() >= 5:
        out["kinds"] = truth_figures.losses_by_kind(
            one.tables["kinds"], title=f"What {given.waterfall} loses in which words, {name}")
    if len(set(one.tables["arms"]["arm"]) - {counterfactual.REAL}):
        out["arms"] = arms_figure(one)
    if name == next(iter(found.sets)):
        history = training.history(given.run_dir, levels)
        out["training_loss"] = figures.training_curves(history, title="Training loss")
    return out


def reliability_figure(found: Truth, one: Measured) -> go.Figure:
    """P(same token | cosine) of every level as a greedy loop drafts."""
    table = one.tokens[one.tokens["level"].isin(list(one.evaluations))]
    bands = reliability.curve(table, n_resamples=found.given.resamples, seed=found.given.seed)
    return figures.reliability_curve(bands,
                                     title=f"Does a high cosine mean the same token? {one.name}")


def arms_figure(one: Measured, unit: str = "token_acceptance") -> go.Figure:
    """The counterfactual arms of a set, with the best floor that looks at nothing (the drafter's
    own tokens are a row)."""
    part = one.tables["arms"]
    blind = [
        value.value for name, value in next(iter(one.above.values())).floors.items()
        if acceptance.FLOORS[name] != acceptance.DRAFTER
    ]
    floor = max(blind) if unit == "token_acceptance" else None
    return truth_figures.arms(part[part["unit"] == unit], floor=floor,
                              title=f"Is it the sensor? {one.name}")


def speedups(one: Measured, live: Mapping[str, Any]) -> pd.DataFrame:
    """What the summary's last panel draws: the live run's arms where there is one, else what the
    reference's formula would predict."""
    rows = [{"name": row["label"], "kind": row["kind"], **row["speedup"]}
            for row in live.get("arms", {}).values()]
    if not rows:
        for level, own in one.evaluations.items():
            rate = own.tokens.result(n_resamples=50).rounds.acceptance_rate
            rows.append({
                "name": level, "kind": "predicted", "value": speedup.reference_wall_clock(rate),
                "low": None, "high": None
            })
    return pd.DataFrame(rows)[["name", "kind", "value", "low",
                               "high"]].astype({"low": float, "high": float})


def measured_block(found: Truth) -> str:
    """The acceptances of the first held-out set side by side, as Markdown with what they were
    counted on."""
    name, one = next(iter(found.sets.items()))
    arm = next(iter(one.above.values())).arm
    about = found.results["provenance"]
    lines = [
        f"Held-out set *{name}*: {arm.n} tokens of {one.tables['checks']['n'].iloc[1]} answers, "
        f"{arm.n_clusters} drives, "
        f"γ = {found.given.gamma}, seed {about['seed']}, revision "
        f"`{str(about['git_revision'])[:10]}`."
    ]
    for unit, (label, _) in truth_figures.UNITS.items():
        own = one.tables["acceptances"]
        lines += [
            "", f"{label[0].upper()}{label[1:]}:", "",
            tables.markdown(own[own["unit"] == unit].drop(columns=["unit"])).rstrip()
        ]
    return "\n".join(lines)


def update_page(page: Path, found: Truth) -> None:
    """Write :func:`measured_block` between the page's marks. Raises: ParameterError when the page
    has no such marks."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(MARKS[0]) != 1 or text.count(MARKS[1]) != 1:
        raise ParameterError(
            f"{page.name} has no place for measured figures; give a page that holds {MARKS[0]} and "
            f"{MARKS[1]} once each"
        )
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    atomic_write(page, f"{before}{MARKS[0]}\n{measured_block(found)}\n{MARKS[1]}{after}")


def save_html(figure: go.Figure, path: Path) -> None:
    """One page a figure; plotly.js stands once beside them, so that they open without a network.
    The same figure gives the same bytes."""
    script = path.parent / "plotly.min.js"
    if not script.is_file():
        from plotly.offline import get_plotlyjs

        atomic_write(script, get_plotlyjs())
    page = pio.to_html(figure, include_plotlyjs=script.name, full_html=True, div_id=path.stem,
                       auto_play=False)
    atomic_write(path, page)


def save_pictures(drawn: Mapping[str, go.Figure], place: Path, *, width: int = 1000) -> str:
    """PNG and SVG of every figure beside its page; returns a sentence that says what became of it.

    Without a Chromium, or when it does not start, nothing is drawn and the sentence says so: the
    pages hold the same figures.
    """
    if doctor.browser_path() is None:
        return ("none: no Chromium is installed (BROWSER_PATH names one); the HTML pages hold the "
                "same figures")
    place.mkdir(parents=True, exist_ok=True)
    heights = [figure.layout.height or 450 for figure in drawn.values()]
    try:
        for kind in ("png", "svg"):
            files = [place / f"{name}.{kind}" for name in drawn]
            pio.write_images(list(drawn.values()), files, format=kind, width=width, height=heights,
                             scale=2 if kind == "png" else 1)
    except (RuntimeError, OSError, ValueError) as error:
        return f"none: the browser did not draw them ({type(error).__name__}: {str(error)[:120]})"
    return f"{len(drawn)} figures as PNG and SVG"
