"""The report: one offline HTML page of a Jinja template, ``results.json`` beside it, and executed
notebooks as pages. Numbers come in through ``num`` and ``cell`` alone (xsd/runs/numbers.py); the
same results give the same bytes. What is data stays data: no script but the two that stand here
runs in a page, and nothing is loaded from elsewhere (docs/security.md)."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import html
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from xsd.core import printable
from xsd.files import atomic_write, read_json, write_json
from xsd.runs import numbers
from xsd.runs.cleaning import clean
from xsd.views.safe import Html

if TYPE_CHECKING:
    from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent / "templates"
DARK = ("@media(prefers-color-scheme:dark){html{background:#fff;filter:invert(.92) "
        "hue-rotate(180deg)}img{filter:invert(1) hue-rotate(180deg)}}")
PLOTLY_MIME = "application/vnd.plotly.v1+json"
SHOWN_MIMES = ("text/html", "text/markdown", "image/png", "image/jpeg", "text/plain")
"""Of a notebook's outputs, besides figures, what a page shows: what cannot run, once cleaned."""
LARGEST_MARKDOWN = 50_000
"""Signs of one cell: more take minutes to read."""
PLOT_CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False,
               "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
def _script(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8").replace("CONFIG", json.dumps(PLOT_CONFIG))


DRAW, WHAT_IF = _script("draw.js"), _script("what_if.js")
"""Draws the figures of a page, which stand in it as JSON, with the plotly.js in it or beside it;
and the sliders of evaluate.what_if."""


def build_report(template: str, results: Mapping[str, Any], out_dir: str | Path, *, title: str,
                 notebooks: Sequence[str | Path] = (), **parts: Any) -> Path:
    """Write :func:`page` as ``index.html``, and ``results.json``; returns the page's path. Raises:
    as page."""
    out_dir, results = Path(out_dir), numbers.plain(results)
    made = page(template, results, title=title, notebooks=notebooks, **parts)
    write_json(out_dir / "results.json", results)
    atomic_write(out_dir / "index.html", made)
    return out_dir / "index.html"


def page(template: str, results: Mapping[str, Any], *, title: str,
         notebooks: Sequence[str | Path] = (), **parts: Any) -> str:
    """One file that needs no other: the page, the notebooks, the results and plotly.js.

    template: a Jinja template that sees ``results`` and ``parts`` and writes ``num(path, format)``,
    ``cell(path, format)`` (with its interval, or a dash) and ``plot(figure)``; an empty
    ``<nav></nav>`` becomes links to the sections. results: nested numbers, and their provenance.
    Raises: ReportError if the page asks for a number that is not there or shows another one."""
    results = numbers.plain(results)
    body = render(template, results, **parts)
    wrong = numbers.disagreements(body, results)
    if wrong:
        raise numbers.ReportError(
            f"the report shows numbers that are not from the results: {'; '.join(wrong[:5])}")
    shown = {Path(one).stem: notebook_part(one, f"nb{at}-") for at, one in enumerate(notebooks)}
    scripts = [DRAW, WHAT_IF] if 'id="what-if-data"' in body else [DRAW]
    library = get_plotlyjs() if 'class="figure"' in body + "".join(shown.values()) else ""
    packed = _packed(library)
    return _environment().get_template("page.html.j2").render(
        title=title, body=body, css=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        packed=packed, scripts=map(Markup, scripts), policy=_policy(library, *scripts),
        notebooks=shown, results=json.dumps(results, indent=1),
        provenance=json.dumps(results.get("provenance", {}), indent=1, sort_keys=True))


@functools.cache
def _packed(library: str) -> str:
    """What draw.js unpacks: a fourth of its bytes."""
    return base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode() if library else ""


def render(template: str, results: Mapping[str, Any], **parts: Any) -> Markup:
    """The body of a page: :func:`build_report` without its frame. Raises: ReportError."""
    environment, drawn = _environment(), count()
    environment.globals |= {"plot": lambda figure: _picture(figure, f"figure-{next(drawn)}"),
                            "num": functools.partial(numbers.number, results),
                            "stored": functools.partial(numbers.lookup, results),
                            "cell": functools.partial(numbers.cell, results)}
    body = environment.from_string(template).render(results=results, **parts)
    titles = re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', body)
    links = " ".join(f'<a href="#{name}">{text}</a>' for name, text in titles)
    return Markup(body.replace("<nav></nav>", f"<nav>{links}</nav>", 1))


def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                       lstrip_blocks=True, undefined=ChainableUndefined,
                       finalize=lambda shown: printable(shown) if type(shown) is str else shown)


def _policy(*scripts: str) -> str:
    """What a browser may run and load for a page: these scripts, and what they themselves add."""
    digests = (hashlib.sha256(script.replace("\r\n", "\n").encode()).digest()
               for script in scripts if script)
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
    return (f"default-src 'none'; script-src {allowed} 'strict-dynamic'; style-src 'unsafe-inline';"
            " img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'")


def _picture(figure: Any, name: str) -> Markup:
    """A figure that scrolls on a narrow screen, below its title, which wraps there as HTML."""
    drawn = json.loads(figure.to_json())
    title = (drawn["layout"].pop("title", None) or {}).get("text", "")
    drawn["layout"].setdefault("margin", {}).setdefault("t", 40)
    lines = Markup("<br>").join(html.unescape(line) for line in title.split("<br>"))
    heading = Markup('<div class="figure-title" data-plain="1">{}</div>').format(lines)
    height = int(drawn["layout"].get("height", 450))
    return Markup('{}<div class="wide" tabindex="0"><div id="{}" class="plot" role="img" '
                  'aria-label="{}" style="min-height:{}px"></div>{}</div>').format(
                      heading if title else "", name, " ".join(html.unescape(title).split("<br>")),
                      height, _figure(drawn, name))


def _figure(drawn: Mapping[str, Any], name: str) -> Markup:
    """plotly's JSON as the page's data, for ``DRAW`` to draw into the element of that name."""
    drawn = drawn if isinstance(drawn, Mapping) else {}  # a notebook may say anything
    parts = json.dumps({key: drawn.get(key) for key in ("data", "layout", "frames")},
                       sort_keys=True).replace("<", "\\u003c")
    return Markup('<script type="application/json" class="figure" data-at="{}">{}</script>').format(
        name, Markup(parts))


def figure_page(figure: Any) -> Markup:
    """A page of one figure, drawn with the plotly.min.js beside it; the same figure gives the same
    bytes."""
    page = Markup('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv='
                  '"Content-Security-Policy" content="{}"><title>{}</title></head><body>'
                  '<div id="figure"></div>{}<script>{}</script></body></html>\n')
    drawn = json.loads(figure.to_json())
    return page.format(_policy(DRAW), "figure", _figure(drawn, "figure"), Markup(DRAW))


# --- executed notebooks


def notebook_page(source: str | Path, folder: str | Path) -> Path:
    """An executed notebook, whoever made it, as an offline page with live figures; plotly.js is
    written beside it. Its HTML is cleaned and its scripts are left out. Raises: ReportError if it
    cannot be read, or a link leads out of the folder."""
    source, folder = Path(source), Path(folder)
    if folder.is_symlink():
        raise numbers.ReportError(f"{folder} is a link to another place; remove it, so that the "
                                  "pages are written here")
    made, figures = _exported(source, "lab", "")
    made = made.replace("<head>", Html(
        '<head><meta http-equiv="Content-Security-Policy" content="{}"><style>{}</style>').format(
            _policy(DRAW), Html(DARK)), 1)
    before, end, after = made.rpartition("</body>")
    if figures:
        atomic_write(folder / "plotly.min.js", get_plotlyjs())
    atomic_write(folder / f"{source.stem}.html",
                 f"{before}{''.join(figures)}<script>{DRAW}</script>{end}{after}")
    return folder / f"{source.stem}.html"


def notebook_part(source: str | Path, name: str) -> Markup:
    """The same as a part of a page, its links to other files as text; name: what the ids of its
    figures begin with. Raises: as notebook_page."""
    made, figures = _exported(Path(source), "basic", name)
    made = re.sub(r'<a\b(?![^>]*href="(https?:|mailto:))[^>]*>', "<a>", made)
    made = re.sub(rf'(<\w+\b[^>]*?) id="(?!{name}cell-\d+-\d+")[^"]*"', r"\1", made)
    return Markup(made + "".join(figures))


def _exported(source: Path, look: str, name: str) -> tuple[str, list[Markup]]:
    """A notebook in one of nbconvert's looks without any script, and its figures; name: what theirs
    begin with."""
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import InvalidNotebook

    notebook, figures = _shown(read_notebook(source), name)
    exporter = HTMLExporter(template_name=look, sanitize_html=True)
    exporter.register_filter("clean_html", clean)  # every cell's Markdown and HTML goes through it
    for address in ("mathjax_url", "require_js_url", "jupyter_widgets_base_url", "mermaid_js_url"):
        setattr(exporter, address, "")
    try:
        made, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": source.stem}})
        made = re.sub(r"(?is)<script\b.*?</script\s*>", "", made)  # the template's own
        loads = numbers.external_requests(made)
    except (RecursionError, InvalidNotebook) as error:
        why = error if isinstance(error, InvalidNotebook) else "text nested too deep"
        raise numbers.ReportError(f"{source} cannot be shown ({why}); run the notebook "
                                  "again") from error
    if loads:
        raise numbers.ReportError(
            f"the page of notebook {source.name} would load {loads[0]} when opened; "
            "let the notebook show pictures as figures or inline images")
    return made, figures


def read_notebook(path: Path) -> NotebookNode:
    """A notebook of any age, in today's form. Raises: ReportError."""
    import nbformat

    way_out = "run the notebook again"
    if not path.is_file() or not path.resolve().is_relative_to(path.parent.resolve()):
        raise numbers.ReportError(f"{path} is no file of its folder; put the notebook itself there")
    found = read_json(path, numbers.ReportError, way_out)
    try:
        with warnings.catch_warnings(action="ignore"):  # cells without an id
            notebook = nbformat.convert(nbformat.from_dict(found), 4)
            nbformat.validate(notebook, relax_add_props=True)
        return notebook
    except Exception as error:  # nbformat meets what it does not know with any of a dozen
        raise numbers.ReportError(
            f"{path} is no notebook ({type(error).__name__}: {str(error)[:100]}); {way_out}"
        ) from error


def _shown(notebook: NotebookNode, name: str) -> tuple[NotebookNode, list[Markup]]:
    """A notebook made anew of what a page shows, and the figures in it. Nothing else of the old one
    is taken over: no metadata, attachments, raw cells as they are, or widgets (dead without a
    kernel; their text stays)."""
    from nbformat import v4

    cells, figures = [], []
    for place, cell in enumerate(notebook.get("cells", [])):
        kind, text = cell.get("cell_type"), _text(cell.get("source", ""))
        if kind == "code":
            made = v4.new_code_cell(text, execution_count=_count(cell))
            for number, output in enumerate(cell.get("outputs", [])):
                made.outputs.append(_output(output, f"{name}cell-{place}-{number}", figures))
        else:
            read = kind == "markdown" and len(text) <= LARGEST_MARKDOWN
            made = v4.new_markdown_cell(text if read else str(Html("<pre>{}</pre>").format(text)))
        made["id"] = f"{name}cell-{place}"[-64:]
        cells.append(made)
    return v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), figures


def _output(output: Mapping[str, Any], name: str, figures: list[Markup]) -> NotebookNode:
    """One output of a cell; its figure, called ``name``, is added to ``figures``."""
    from nbformat import v4

    kind = output.get("output_type")
    if kind == "stream":
        stream = "stderr" if output.get("name") == "stderr" else "stdout"
        return v4.new_output("stream", name=stream, text=_text(output.get("text", "")))
    if kind == "error":
        return v4.new_output("error", traceback=[_text(output.get("traceback", []))])
    data = output.get("data", {})
    shown = {mime: _text(data[mime]) for mime in SHOWN_MIMES if mime in data}
    if (drawn := data.get(PLOTLY_MIME)) is not None:
        figures.append(_figure(drawn, name))
        shown = {"text/html": f'<div id="{name}"></div>'}
    if len(shown.get("text/markdown", "")) > LARGEST_MARKDOWN:
        shown = {"text/plain": shown["text/markdown"]}
    made = {"text/plain": f"not shown: {', '.join(data)}"} | shown
    if kind == "execute_result":
        return v4.new_output(kind, made, execution_count=_count(output))
    return v4.new_output("display_data", made)


def _text(value: Any) -> str:
    """What a notebook stores as one text or a list of them, of its control signs the colours."""
    text = "".join(map(str, value)) if isinstance(value, list) else str(value)
    parts = re.split(r"(\x1b\[[0-9;]*m|\r)", text)
    return "".join(part if place % 2 else printable(part) for place, part in enumerate(parts))


def _count(numbered: Mapping[str, Any]) -> int | None:
    found = numbered.get("execution_count")
    return found if isinstance(found, int) else None
