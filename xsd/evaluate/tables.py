"""Rows of figures → DataFrame → CSV, Markdown, LaTeX (docs/metrics.md, section 9). Every row
carries n and, where known, its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.core import MetricError
from xsd.evaluate.statistics import Interval
from xsd.files import atomic_write

COLUMNS = ("metric", "threshold", "position", "value", "low", "high", "n", "n_clusters")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}"
}


def row(metric: str, value: Interval | float, *, threshold: float | None = None,
        position: int | None = None, n: int | None = None) -> dict[str, Any]:
    """One line of the long table. An Interval brings its own bounds and counts; a bare number has
    unknown bounds (None)."""
    if isinstance(value, Interval):
        low, high = (None, None) if math.isnan(value.low) else (value.low, value.high)
        return dict(
            zip(COLUMNS,
                (metric, threshold, position, value.value, low, high, value.n, value.n_clusters),
                strict=True))
    return dict(
        zip(COLUMNS, (metric, threshold, position, float(value), None, None, n, None), strict=True))


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a DataFrame: the common columns first, then any others in the order they appear.
    Raises: MetricError when there are none."""
    table = pd.DataFrame(list(rows))
    if table.empty:
        raise MetricError("there is no row to put into a table; run the evaluation first")
    known = [name for name in COLUMNS if name in table]
    return table[known + [name for name in table if name not in known]]


def markdown(table: pd.DataFrame, *, digits: int = 4) -> str:
    """GitHub-flavoured Markdown, numbers right-aligned."""
    cells = _cells(table, digits)
    rule = ["---:" if pd.api.types.is_numeric_dtype(table[name]) else "---" for name in table]
    lines = [
        list(map(str, table.columns)), rule,
        *[[cell.replace("|", "\\|") for cell in line] for line in cells]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def latex(table: pd.DataFrame, *, digits: int = 4) -> str:
    """A booktabs ``tabular`` with every special sign escaped."""
    kinds = "".join("r" if pd.api.types.is_numeric_dtype(table[name]) else "l" for name in table)
    head = " & ".join(_escape(str(name)) for name in table.columns) + r" \\"
    body = [" & ".join(_escape(cell) for cell in line) + r" \\" for line in _cells(table, digits)]
    return "\n".join([
        rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}", ""
    ])


def write(table: pd.DataFrame, stem: str | Path, *, kinds: Sequence[str] = ("csv", "md", "tex"),
          digits: int = 4) -> list[Path]:
    """Write ``stem.csv`` (full precision), ``stem.md``, ``stem.tex``; each file whole or not at
    all. Raises: MetricError for another kind."""
    makers = {
        "csv": lambda: table.to_csv(index=False), "md": lambda: markdown(table, digits=digits),
        "tex": lambda: latex(table, digits=digits),
    }
    unknown = [kind for kind in kinds if kind not in makers]
    if unknown:
        raise MetricError(f"unknown table kind {unknown[0]!r}; choose among {', '.join(makers)}")
    paths = []
    for kind in kinds:
        path = Path(f"{stem}.{kind}")
        atomic_write(path, makers[kind]())
        paths.append(path)
    return paths


def _cells(table: pd.DataFrame, digits: int) -> list[list[str]]:
    return [[_cell(value, digits) for value in line]
            for line in table.itertuples(index=False, name=None)]


def _cell(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, Interval):
        return value.text()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) >= 10 else f"{value:.{digits}f}"
    return str(value)


def _escape(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
