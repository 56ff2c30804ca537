"""Figures and tables as files for a paper: ``xsd export``, or :func:`save_pictures` of any figure
and ``evaluate.tables.write`` of any table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from xsd.core import ParameterError
from xsd.evaluate import tables
from xsd.runs import demo_page, doctor, folder

KINDS = ("png", "svg", "pdf")


def save_pictures(drawn: Mapping[str, go.Figure], place: Path, *, kinds: Sequence[str] = KINDS,
                  width: int = 1000) -> str:
    """``place/<name>.png``, ``.svg`` and ``.pdf`` of every figure; returns a sentence that says
    what became of it, such as that there is no Chromium to draw them. Raises: ParameterError for
    another kind."""
    if unknown := set(kinds) - set(KINDS):
        raise ParameterError(f"a figure cannot be written as {', '.join(sorted(unknown))}; choose "
                             f"among {', '.join(KINDS)}")
    if doctor.browser_path() is None:
        return ("none: no Chromium is installed (BROWSER_PATH names one); the HTML pages hold the "
                "same figures")
    place.mkdir(parents=True, exist_ok=True)
    heights = [figure.layout.height or 450 for figure in drawn.values()]
    try:
        for kind in kinds:
            files = [place / f"{name}.{kind}" for name in drawn]
            pio.write_images(list(drawn.values()), files, format=kind, width=width, height=heights,
                             scale=2 if kind == "png" else 1)
    except (RuntimeError, OSError, ValueError) as error:
        return f"none: the browser did not draw them ({type(error).__name__}: {str(error)[:120]})"
    return f"{len(drawn)} figures as {', '.join(kind.upper() for kind in kinds)}"


def tables_of(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Name → the table of the report's page: accepted drafts, and the live arms, of each set."""
    found, shown = {}, {
        ("tokens", "rows"): ("token_acceptance", "accepted_per_round", "above_floor"),
        ("live", "arms"): ("speedup", "total_ms", "accepted_per_round")}
    for (of, key), metrics in shown.items():
        for data, one in results.get(of, {}).get("test", {}).items():
            rows = [{"name": row["label"], **{column: value for metric in metrics if metric in row
                     for column, value in tables.sides(metric, row[metric]).items()}}
                    for row in one[key].values()]
            found[f"{of}_{data}"] = tables.with_intervals(pd.DataFrame(rows))
    return found


def export(run_dir: str | Path, out: Path, *, kinds: Sequence[str] = KINDS) -> str:
    """Every figure of a run's page as pictures, and its tables as CSV, Markdown and LaTeX. Returns
    what was written, in words. Raises: ParameterError for a folder that is no run."""
    results = folder.load_results(run_dir)
    with folder.as_written(run_dir):
        drawn = {f"{kind}_{data}": figure
                 for kind, of in demo_page.pictures(results).items()
                 for data, figure in (of.items() if isinstance(of, dict) else [("one", of)])}
        made = tables_of(results)
    said = save_pictures(drawn, out, kinds=kinds)
    for name, table in made.items():
        tables.write(table, out / name)
    return f"{said}; {len(made)} tables as CSV, Markdown, LaTeX"
