"""The report: one offline HTML page that reads from top to bottom, ``results.json`` beside it, and
the executed notebooks as pages.

Sections are data. Numbers are written only through xsd/runs/numbers.py, pictures are plotly figures
inlined with one copy of plotly.js, and the same results give the same bytes (no date, no random
id).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xsd.files import atomic_write, write_json
from xsd.runs import numbers

PLOTLY_MIME = "application/vnd.plotly.v1+json"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
PLOT_CONFIG = {
    "responsive": True, "displaylogo": False,
    "modeBarButtonsToRemove": ["sendDataToCloud", "lasso2d", "select2d"]
}


@dataclass(frozen=True)
class Text:
    """Paragraphs (split at empty lines) with ``{path:format}`` numbers, ``**bold**``, `` `code` ``.
    note: drawn as a boxed remark."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Figure:
    """A plotly figure and its caption (a Text)."""

    figure: Any
    caption: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a Table. path: below the row's path, e.g. ``accept@0.90/value``; a path without
    ``/value`` may hold value, low, high (interval)."""

    title: str
    path: str
    spec: str = ".2f"
    interval: bool = False
    best: str = ""
    """``max`` or ``min`` prints the best row's number in bold."""


@dataclass(frozen=True)
class Table:
    """rows: (label, path below which the row's numbers stand) or a string alone, which becomes a
    group heading. A missing cell shows an en dash."""

    rows: Sequence[tuple[str, str] | str]
    columns: Sequence[Column]
    caption: str = ""


@dataclass(frozen=True)
class Html:
    """Ready HTML without numbers of the results: token strips, pictures."""

    html: str


@dataclass(frozen=True)
class Section:
    """A heading with its parts in reading order."""

    title: str
    parts: Sequence[Text | Figure | Table | Html]


def build_report(results: Mapping[str, Any], sections: Sequence[Section], out_dir: str | Path, *,
                 title: str, lead: str = "", notebooks: Sequence[str | Path] = (),
                 ) -> Path:
    """Write ``index.html``, ``results.json`` and ``notebooks/*.html`` to ``out_dir``; returns the
    path of the page.

    results: nested dict of numbers; under ``provenance`` the record of :func:`xsd.files.provenance`,
    printed at the end. lead: the
    summary under the title.
    Raises: ReportError if a part asks for a number that is not there or the finished page shows one
    that is not from the results.
    """
    out_dir = Path(out_dir)
    results = numbers.plain(results)
    pages = [notebook_page(path, out_dir / "notebooks") for path in notebooks]
    body, index = [], 0
    for position, section in enumerate(sections):
        parts = []
        for part in section.parts:
            if isinstance(part, Figure):
                parts.append(_figure(results, part, f"figure-{index}"))
                index += 1
            else:
                parts.append(_part(results, part))
        body.append(
            '<section '
            f'id="part-{position}"><h2>{numbers.prose(results, section.title)}</h2>{"".join(parts)}</section>'
        )
    page = _page(results, title, lead, sections, body, pages, with_figures=index > 0)
    wrong = numbers.disagreements(page, results)
    if wrong:
        raise numbers.ReportError(
            f"the report shows numbers that are not from the results: {'; '.join(wrong[:5])}")
    write_json(out_dir / "results.json", results)
    atomic_write(out_dir / "index.html", page)
    return out_dir / "index.html"


def _part(results: Mapping[str, Any], part: Text | Table | Html) -> str:
    if isinstance(part, Html):
        return f'<div class="raw">{part.html}</div>'
    if isinstance(part, Table):
        return _table(results, part)
    text = "".join(f"<p>{numbers.prose(results, one)}</p>"
                   for one in re.split(r"\n\s*\n", part.text.strip()))
    return f'<div class="note">{text}</div>' if part.note else text


def _figure(results: Mapping[str, Any], part: Figure, name: str) -> str:
    drawn = json.loads(part.figure.to_json())
    title = (drawn["layout"].pop("title", None)
             or {}).get("text", "")  # as HTML it wraps on a narrow screen
    drawn["layout"].setdefault("margin", {}).setdefault("t", 40)
    frames = json.dumps(drawn.get("frames", []), sort_keys=True)
    data, layout, config = (json.dumps(one, sort_keys=True)
                            for one in (drawn["data"], drawn["layout"], PLOT_CONFIG))
    script = f'Plotly.newPlot("{name}",{data},{layout},{config})'
    if drawn.get("frames"):
        script += f'.then(function(){{Plotly.addFrames("{name}",{frames})}})'
    script = script.replace("</", "<\\/")
    height = drawn["layout"].get("height", 450)
    caption = f"<figcaption>{numbers.prose(results, part.caption)}</figcaption>" if part.caption else ""
    heading = f'<div class="figure-title" data-plain="1">{html.escape(title)}</div>' if title else ""
    plot = (f'<div class="wide"><div id="{name}" class="plot" '
            f'style="min-height:{height}px"></div></div>')
    return f"<figure>{heading}{plot}<script>{script}</script>{caption}</figure>"


def _table(results: Mapping[str, Any], table: Table) -> str:
    def cell_value(row: tuple[str, str], column: Column) -> Any:
        try:
            return numbers.lookup(results,
                                  f"{row[1]}/{column.path}" + ("/value" if column.interval else ""))
        except numbers.ReportError:
            return None

    best: dict[int, Any] = {}
    for place, column in enumerate(table.columns):
        values = [
            value for row in table.rows
            if not isinstance(row, str) and (value := cell_value(row, column)) is not None
        ]
        if column.best and values:
            best[place] = max(values) if column.best == "max" else min(values)
    head = "".join(f"<th>{numbers.prose(results, column.title)}</th>" for column in table.columns)
    lines = []
    for row in table.rows:
        if isinstance(row, str):
            lines.append(
                '<tr class="group"><th '
                f'colspan="{len(table.columns) + 1}">{numbers.prose(results, row)}</th></tr>'
            )
            continue
        cells = []
        for place, column in enumerate(table.columns):
            value = cell_value(row, column)
            cells.append(
                f"<td>{_cell(results, f'{row[1]}/{column.path}', column, value is not None and value == best.get(place), value)}</td>"
            )
        lines.append(
            f'<tr><th data-plain="1">{numbers.prose(results, row[0])}</th>{"".join(cells)}</tr>')
    caption = f"<caption>{numbers.prose(results, table.caption)}</caption>" if table.caption else ""
    return ('<div '
            f'class="wide"><table>{caption}<thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>')


def _cell(results: Mapping[str, Any], path: str, column: Column, is_best: bool, value: Any) -> str:
    if value is None:
        return "–"
    shown = numbers.number(results, f"{path}/value" if column.interval else path, column.spec)
    shown = f"<b>{shown}</b>" if is_best else shown
    if column.interval:
        node = numbers.lookup(results, path)
        if node.get("low") is not None and node.get("high") is not None:
            low, high = (numbers.number(results, f"{path}/{end}", column.spec)
                         for end in ("low", "high"))
            shown += f" <small>[{low}, {high}]</small>"
    return shown


STYLE = """
:root{--ink:#202124;--soft:#5f6368;--line:#e6e8eb;--blue:#0072b2}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.6 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 80px}
h1{font-size:1.9rem;line-height:1.25;margin:.2em 0}
h2{font-size:1.35rem;margin:2.4em 0 .6em;padding-top:.4em;border-top:1px solid var(--line)}
p{margin:.6em 0}
.lead{font-size:1.08rem}
nav{font-size:.92rem;color:var(--soft);margin:1em 0}
nav a{margin-right:1.1em;white-space:nowrap}
a{color:var(--blue);text-decoration:none} a:hover{text-decoration:underline}
figure{margin:1.2em 0} figure .wide{margin:0} .plot{min-width:480px}
.figure-title{font-weight:600;margin-bottom:.2em}
figcaption,caption{color:var(--soft);font-size:.9rem;text-align:left}
caption{caption-side:bottom;padding-top:.5em}
.wide{overflow-x:auto;margin:1.2em 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35em .8em;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tbody th,thead th:first-child{text-align:left;font-weight:500}
thead th{color:var(--soft);font-weight:600;white-space:normal;vertical-align:bottom;border-bottom:2px solid var(--line)}
tr.group th{color:var(--soft);font-weight:600;padding-top:1em}
small{color:var(--soft);font-size:.82em}
.note{background:#f6f8fa;border-left:4px solid var(--blue);padding:.4em 1em;border-radius:0 6px 6px 0}
.raw{margin:1em 0;overflow-x:auto}
code{background:#f1f3f4;padding:.1em .3em;border-radius:4px;font-size:.88em}
.number.predicted{font-style:italic;border-bottom:1px dashed var(--soft)}
.number.quoted{color:var(--soft)} .number.quoted::after{content:"”"} .number.quoted::before{content:"“"}
details{margin:1em 0;font-size:.9rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:1em;border-radius:6px;font-size:.82rem}
@media(max-width:600px){main{padding:14px 12px 60px} h1{font-size:1.5rem} h2{font-size:1.2rem}}
@media print{nav{display:none}}
"""


def _page(results: Mapping[str, Any], title: str, lead: str, sections: Sequence[Section],
          body: Sequence[str], pages: Sequence[Path], *, with_figures: bool,
          ) -> str:
    contents = " ".join(f'<a href="#part-{place}">{numbers.prose(results, one.title)}</a>'
                        for place, one in enumerate(sections))
    script = ""
    if with_figures:
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    links = "".join(
        f'<li><a href="notebooks/{html.escape(page.name)}">{html.escape(page.stem)}</a></li>'
        for page in pages)
    links = f'<section id="notebooks" data-plain="1"><h2>The executed notebooks</h2><ul>{links}</ul></section>' if links else ""
    record = html.escape(json.dumps(results.get("provenance", {}), indent=1, sort_keys=True),
                         quote=False)
    origin = (
        '<section id="provenance"><h2>Where the numbers come from</h2>'
        '<p>Every number on this page stands in <a href="results.json">results.json</a>; pointing '
        'at one shows its path there. '
        '<span class="number predicted">Predicted</span> and <span class="number '
        'quoted">quoted</span> numbers look different '
        'from measured ones.</p><details data-plain="1"><summary>Revision, versions, seed, data, '
        'device</summary>'
        f"<pre>{record}</pre></details></section>")
    paragraphs = "".join(f"<p>{numbers.prose(results, one)}</p>" for one in lead.split("\n\n")
                         if one.strip())
    titles = "<script>document.querySelectorAll('[data-key]').forEach(function(e){e.title=e.dataset.key})</script>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><link rel="icon" '
        f'href="data:,"><style>{STYLE}</style>{script}</head><body><main>'
        f'<h1>{html.escape(title)}</h1><div class="lead">{paragraphs}</div>'
        f"<nav>{contents}</nav>{''.join(body)}{links}{origin}</main>{titles}</body></html>\n")


def notebook_page(source: str | Path, folder: str | Path) -> Path:
    """An executed notebook as an offline page whose figures stay interactive; plotly.js is written
    once, beside the pages.

    Raises: ReportError if the page would load anything from elsewhere.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import Preprocessor

    source, folder = Path(source), Path(folder)

    class Inline(Preprocessor):
        def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
            first = True
            for place, cell in enumerate(nb.cells):
                for number, output in enumerate(cell.get("outputs", [])):
                    data = output.get("data", {})
                    data.pop(WIDGET_MIME, None)  # dead without a kernel; its text stays
                    if PLOTLY_MIME in data:
                        drawn = dict(data.pop(PLOTLY_MIME))
                        data["text/html"] = _notebook_figure(drawn, f"cell-{place}-{number}", first)
                        first = False
            return nb, resources

    notebook = nbformat.read(source, 4)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)  # start and end times would differ from run to run
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    exporter.mathjax_url = exporter.require_js_url = exporter.jupyter_widgets_base_url = exporter.mermaid_js_url = ""
    exporter.register_preprocessor(Inline(), enabled=True)
    page = exporter.from_notebook_node(notebook, resources={"metadata": {"name": source.stem}})[0]
    page = re.sub(r'<script[^>]*src=""[^>]*>\s*</script>', "", page)
    loads = numbers.external_requests(page)
    if loads:
        raise numbers.ReportError(
            f"the page of notebook {source.name} would load {loads[0]} when opened; "
            "let the notebook show pictures as figures or inline images")
    if "Plotly.newPlot" in page:
        from plotly.offline import get_plotlyjs

        atomic_write(folder / "plotly.min.js", get_plotlyjs())
    atomic_write(folder / f"{source.stem}.html", page)
    return folder / f"{source.stem}.html"


def _notebook_figure(drawn: dict[str, Any], name: str, first: bool) -> str:
    data, layout, frames, config = (json.dumps(one, sort_keys=True).replace("</", "<\\/")
                                    for one in (drawn["data"], drawn["layout"],
                                                drawn.get("frames", []), PLOT_CONFIG))
    library = '<script src="plotly.min.js"></script>' if first else ""
    add = f'.then(function(){{Plotly.addFrames("{name}",{frames})}})' if drawn.get("frames") else ""
    return (f'{library}<div '
            f'id="{name}"></div><script>Plotly.newPlot("{name}",{data},{layout},{config}){add}</script>')
