"""Figures as rows, and rows as text: DataFrame, CSV, Markdown, LaTeX (docs/metrics.md, section 9).
Every row carries n and, where known, its interval."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from xsd import digests
from xsd.core import MetricError, printable
from xsd.evaluate.statistics import Interval

COLUMNS = ("metric", "threshold", "position", "value", "low", "high", "n", "n_clusters")
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"}
})


def row(metric: str, value: Interval | float, *, n: int | None = None,
        **about: Any) -> dict[str, Any]:
    """One line of the long table: metric, value, low, high, n, n_clusters, after what ``about``
    says (threshold, position, level …). Bounds that are not known are None."""
    if not isinstance(value, Interval):
        value = Interval(float(value), math.nan, math.nan, n, None)
    unknown = {"low": None, "high": None} if math.isnan(value.low) else {}
    return {**about, "metric": metric, **vars(value), **unknown}


def sides(name: str, value: Interval | Mapping[str, Any]) -> dict[str, Any]:
    """A figure as three columns of a wide table, ``x``, ``x low``, ``x high``, that
    :func:`with_intervals` makes one text of."""
    found = vars(value) if isinstance(value, Interval) else {
        side: None if value[side] is None else float(value[side])  # a file may hold anything
        for side in ("value", "low", "high")}
    return {name: found["value"], f"{name} low": found["low"], f"{name} high": found["high"]}


def with_intervals(table: pd.DataFrame, percent: Sequence[str] = ()) -> pd.DataFrame:
    """For reading: columns ``x``, ``x low``, ``x high`` become one text, ``0.61 [0.58, 0.64]``;
    those in ``percent`` as shares. A figure that is not known is a dash."""
    out = table.copy()
    for name in [column for column in table if f"{column} low" in table]:
        bounds = [f"{name} low", f"{name} high"]
        lines = table[[name, *bounds]].astype(float).itertuples(index=False, name=None)
        out[name] = [Interval(*line, n=0, n_clusters=0).text(name in percent) for line in lines]
        out = out.drop(columns=bounds)
    return out


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a DataFrame: the common columns first, then any others in the order they appear.
    Raises: MetricError when there are none."""
    table = pd.DataFrame(list(rows))
    if table.empty:
        raise MetricError("there is no row to put into a table; run the evaluation first")
    known = [name for name in COLUMNS if name in table]
    return table[known + [name for name in table if name not in known]]


def markdown(table: pd.DataFrame) -> str:
    """GitHub-flavoured Markdown, four digits, numbers right-aligned; no text of a cell is read as
    HTML, as a link or as a column."""
    rule = ["---:" if pd.api.types.is_numeric_dtype(table[name]) else "---" for name in table]
    cells = table.map(_cell).map(_plain_markdown)
    lines = [map(_plain_markdown, table), rule, *cells.itertuples(index=False, name=None)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def latex(table: pd.DataFrame) -> str:
    """A booktabs ``tabular``, four digits, with every special sign escaped."""
    kinds = ["r" if pd.api.types.is_numeric_dtype(table[name]) else "l" for name in table]
    lines = [map(_cell, table), *table.map(_cell).itertuples(index=False, name=None)]
    head, *body = [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in lines]
    return "\n".join([rf"\begin{{tabular}}{{{''.join(kinds)}}}", r"\toprule", head, r"\midrule",
                      *body, r"\bottomrule", r"\end{tabular}", ""])


def write(table: pd.DataFrame, stem: str | Path, *,
          kinds: Sequence[str] = ("csv", "md", "tex")) -> list[Path]:
    """Write ``stem.csv`` (full precision), ``stem.md``, ``stem.tex``; each file whole or not at
    all. Raises: MetricError for another kind."""
    makers = {"csv": lambda table: table.to_csv(index=False), "md": markdown, "tex": latex}
    unknown = [kind for kind in kinds if kind not in makers]
    if unknown:
        raise MetricError(f"unknown table kind {unknown[0]!r}; choose among {', '.join(makers)}")
    paths = [Path(f"{stem}.{kind}") for kind in kinds]
    for kind, path in zip(kinds, paths, strict=True):
        with digests.sealed_path(path) as temporary:
            temporary.write_text(makers[kind](table), encoding="utf-8")
    return paths


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) >= 10 else f"{value:.4f}"
    return " ".join(printable(str(value)).splitlines())


def _plain_markdown(value: Any) -> str:
    cell = _cell(value)
    for sign, escaped in (("\\", r"\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", r"\|"), ("`", r"\`"),
                          ("](", r"]\("), ("$", r"\$")):
        cell = cell.replace(sign, escaped)
    return cell
