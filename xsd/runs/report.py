"""The report: one offline HTML page of a Jinja template, ``results.json`` beside it, and executed
notebooks as pages. Numbers come in through ``num`` and ``cell`` alone (xsd/runs/numbers.py); the
same results give the same bytes."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from xsd.files import atomic_write, write_json
from xsd.runs import numbers

TEMPLATES = Path(__file__).parent / "templates"
PLOTLY_MIME = "application/vnd.plotly.v1+json"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
PLOT_CONFIG = {"responsive": True, "displaylogo": False,
               "modeBarButtonsToRemove": ["sendDataToCloud", "lasso2d", "select2d"]}


def build_report(template: str, results: Mapping[str, Any], out_dir: str | Path, *, title: str,
                 notebooks: Sequence[str | Path] = (), **parts: Any) -> Path:
    """Write ``index.html``, ``results.json`` and ``notebooks/*.html``; returns the page's path.

    template: a Jinja template that sees ``results`` and ``parts`` and writes ``num(path, format)``,
    ``cell(path, format)`` (with its interval, or a dash) and ``plot(figure)``; an empty
    ``<nav></nav>`` becomes links to the sections. results: nested numbers, and their provenance.
    Raises: ReportError if the page asks for a number that is not there or shows another one.
    """
    out_dir, results = Path(out_dir), numbers.plain(results)
    body = render(template, results, **parts)
    library = Markup(get_plotlyjs()) if "Plotly.newPlot" in body else ""
    page = _environment().get_template("page.html.j2").render(
        title=title, body=body, plotly_js=library, notebooks=[Path(one).stem for one in notebooks],
        provenance=json.dumps(results.get("provenance", {}), indent=1, sort_keys=True))
    wrong = numbers.disagreements(page, results)
    if wrong:
        raise numbers.ReportError(
            f"the report shows numbers that are not from the results: {'; '.join(wrong[:5])}")
    for path in notebooks:
        notebook_page(path, out_dir / "notebooks")
    write_json(out_dir / "results.json", results)
    atomic_write(out_dir / "index.html", page)
    return out_dir / "index.html"


def render(template: str, results: Mapping[str, Any], **parts: Any) -> Markup:
    """The body of a page: :func:`build_report` without its frame. Raises: ReportError."""
    environment, drawn = _environment(), count()
    environment.globals |= {"plot": lambda figure: _picture(figure, f"figure-{next(drawn)}"),
                            "num": partial(numbers.number, results),
                            "cell": partial(numbers.cell, results)}
    body = environment.from_string(template).render(results=results, **parts)
    titles = re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', body)
    links = " ".join(f'<a href="#{name}">{text}</a>' for name, text in titles)
    return Markup(body.replace("<nav></nav>", f"<nav>{links}</nav>", 1))


def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                       lstrip_blocks=True, undefined=ChainableUndefined)


def _picture(figure: Any, name: str) -> Markup:
    """A figure that scrolls on a narrow screen, below its title, which wraps there as HTML."""
    drawn = json.loads(figure.to_json())
    title = (drawn["layout"].pop("title", None) or {}).get("text", "")
    drawn["layout"].setdefault("margin", {}).setdefault("t", 40)
    heading = f'<div class="figure-title" data-plain="1">{html.escape(title)}</div>'
    height = drawn["layout"].get("height", 450)
    plot = _plotly(drawn, name, f'class="plot" style="min-height:{height}px"')
    return Markup(f'{heading if title else ""}<div class="wide">{plot}</div>')


def _plotly(drawn: Mapping[str, Any], name: str, attributes: str = "") -> str:
    """The element and the script of one figure, given as plotly's JSON."""
    data, layout, frames, config = (
        json.dumps(one, sort_keys=True).replace("</", "<\\/")
        for one in (drawn["data"], drawn["layout"], drawn.get("frames"), PLOT_CONFIG))
    script = f'Plotly.newPlot("{name}",{data},{layout},{config})'
    if drawn.get("frames"):
        script += f'.then(function(){{Plotly.addFrames("{name}",{frames})}})'
    return f'<div id="{name}" {attributes}></div><script>{script}</script>'


def notebook_page(source: str | Path, folder: str | Path) -> Path:
    """An executed notebook as an offline page with live figures; plotly.js is written beside it.
    Raises: ReportError if the page would load anything from elsewhere."""
    import nbformat
    from nbconvert import HTMLExporter

    source, folder = Path(source), Path(folder)
    notebook = nbformat.read(source, 4)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)  # start and end times would differ from run to run
    library = '<script src="plotly.min.js"></script>'
    for place, cell in enumerate(notebook.cells):
        for number, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            data.pop(WIDGET_MIME, None)  # dead without a kernel; its text stays
            if PLOTLY_MIME in data:
                data.pop("image/png", None)
                picture = _plotly(data.pop(PLOTLY_MIME), f"cell-{place}-{number}")
                data["text/html"], library = library + picture, ""
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    for address in ("mathjax_url", "require_js_url", "jupyter_widgets_base_url", "mermaid_js_url"):
        setattr(exporter, address, "")
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": source.stem}})
    page = re.sub(r'<script[^>]*src=""[^>]*>\s*</script>', "", page)
    loads = numbers.external_requests(page)
    if loads:
        raise numbers.ReportError(
            f"the page of notebook {source.name} would load {loads[0]} when opened; "
            "let the notebook show pictures as figures or inline images")
    if not library:
        atomic_write(folder / "plotly.min.js", get_plotlyjs())
    atomic_write(folder / f"{source.stem}.html", page)
    return folder / f"{source.stem}.html"
