"""The report: one offline HTML page of a Jinja template, ``results.json`` beside it, and executed
notebooks as pages. Numbers come in through ``num`` and ``cell`` alone (xsd/runs/numbers.py); the
same results give the same bytes. What is data stays data: no script but the two that stand here
runs in a page, and nothing is loaded from elsewhere (docs/security.md)."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bleach
from bleach.css_sanitizer import CSSSanitizer
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from xsd.core import printable
from xsd.files import atomic_write, read_json, write_json
from xsd.runs import numbers
from xsd.views.safe import Html

if TYPE_CHECKING:
    from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent / "templates"
PLOTLY_MIME = "application/vnd.plotly.v1+json"
SHOWN_MIMES = ("text/html", "text/markdown", "image/png", "image/jpeg", "text/plain")
"""Of a notebook's outputs, besides figures, what a page shows: what cannot run, once cleaned."""
LARGEST_HTML, DEEPEST_HTML, LARGEST_MARKDOWN = 4_000_000, 200, 50_000
"""Signs of one output or cell, and tags inside each other: more take minutes to read."""
PLOT_CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False,
               "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
DRAW = """(function(){function draw(){
document.querySelectorAll('script.figure').forEach(function(e){
var f=JSON.parse(e.textContent),at=document.getElementById(e.dataset.at);
Plotly.newPlot(at,f.data,f.layout,%s).then(function(){if(f.frames)Plotly.addFrames(at,f.frames)})});
document.querySelectorAll('[data-key]').forEach(function(e){e.title=e.dataset.key})}
if(!document.querySelector('script.figure')||(window.Plotly&&Plotly.newPlot))return draw();
var s=document.createElement('script');s.src='plotly.min.js';s.onload=draw;
document.body.appendChild(s)})()""" % json.dumps(PLOT_CONFIG)  # noqa: UP031 (braces all over)
"""Draws the figures of a page, which stand in it as JSON, with the plotly.js in it or beside it."""


def build_report(template: str, results: Mapping[str, Any], out_dir: str | Path, *, title: str,
                 notebooks: Sequence[str | Path] = (), **parts: Any) -> Path:
    """Write ``index.html``, ``results.json`` and ``notebooks/*.html``; returns the page's path.

    template: a Jinja template that sees ``results`` and ``parts`` and writes ``num(path, format)``,
    ``cell(path, format)`` (with its interval, or a dash) and ``plot(figure)``; an empty
    ``<nav></nav>`` becomes links to the sections. results: nested numbers, and their provenance.
    Raises: ReportError if the page asks for a number that is not there or shows another one."""
    out_dir, results = Path(out_dir), numbers.plain(results)
    body = render(template, results, **parts)
    library = get_plotlyjs() if 'class="figure"' in body else ""
    page = _environment().get_template("page.html.j2").render(
        title=title, body=body, plotly_js=Markup(library), draw=Markup(DRAW),
        policy=_policy(library, DRAW), notebooks=[Path(one).stem for one in notebooks],
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
                            "stored": partial(numbers.lookup, results),
                            "cell": partial(numbers.cell, results)}
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
    return Markup('{}<div class="wide"><div id="{}" class="plot" style="min-height:{}px"></div>{}'
                  "</div>").format(heading if title else "", name, height, _figure(drawn, name))


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
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import InvalidNotebook

    source, folder = Path(source), Path(folder)
    if folder.is_symlink():
        raise numbers.ReportError(f"{folder} is a link to another place; remove it, so that the "
                                  "pages are written here")
    notebook, figures = _shown(read_notebook(source))
    exporter = HTMLExporter(template_name="lab", sanitize_html=True)
    exporter.register_filter("clean_html", clean)  # every cell's Markdown and HTML goes through it
    for address in ("mathjax_url", "require_js_url", "jupyter_widgets_base_url", "mermaid_js_url"):
        setattr(exporter, address, "")
    try:
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": source.stem}})
        page = re.sub(r"(?is)<script\b.*?</script\s*>", "", page)  # the template's own
        page = page.replace("<head>", Html(
            '<head><meta http-equiv="Content-Security-Policy" content="{}">').format(_policy(DRAW)),
            1)
        before, end, after = page.rpartition("</body>")
        page = f"{before}{''.join(figures)}<script>{DRAW}</script>{end}{after}"
        loads = numbers.external_requests(page)
    except (RecursionError, InvalidNotebook) as error:
        why = error if isinstance(error, InvalidNotebook) else "text nested too deep"
        raise numbers.ReportError(f"{source} cannot be shown ({why}); run the notebook "
                                  "again") from error
    if loads:
        raise numbers.ReportError(
            f"the page of notebook {source.name} would load {loads[0]} when opened; "
            "let the notebook show pictures as figures or inline images")
    if figures:
        atomic_write(folder / "plotly.min.js", get_plotlyjs())
    atomic_write(folder / f"{source.stem}.html", page)
    return folder / f"{source.stem}.html"


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


def _shown(notebook: NotebookNode) -> tuple[NotebookNode, list[Markup]]:
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
                made.outputs.append(_output(output, f"cell-{place}-{number}", figures))
        else:
            read = kind == "markdown" and len(text) <= LARGEST_MARKDOWN
            made = v4.new_markdown_cell(text if read else str(Html("<pre>{}</pre>").format(text)))
        made["id"] = f"cell-{place}"
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


_words = re.compile(r"\S+").findall
_TAGS = frozenset(_words("a abbr b blockquote br caption code col colgroup dd del details div dl "
                         "dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre s "
                         "small span strong sub summary sup table tbody td tfoot th thead tr u ul"))
_ATTRIBUTES = frozenset(_words("align alt border class colspan id rowspan style title"))
_STYLES = frozenset(_words(
    "background-color border border-bottom border-collapse border-color border-radius color "
    "display font font-family font-size font-style font-weight line-height margin margin-left "
    "margin-right margin-top max-width min-height min-width overflow-x padding text-align "
    "text-decoration vertical-align white-space"))
"""None of them can name a file or an address, or lay itself over the page."""
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+")
_LINK = re.compile(r"(?is)(https?://|mailto:).*|[^:&\\]*")


def _depth(text: str) -> int:
    """At most so many tags stand inside each other."""
    # what HTML closes by itself does not count
    tags = re.finditer(r"<(/?)(?!(?:p|br|hr|img|li|td|th|tr|dt|dd|col)\b)[a-zA-Z]", text)
    return max(accumulate(-1 if tag[1] else 1 for tag in tags), default=0)


def clean(text: str) -> str:
    """HTML of unknown origin without whatever could run, load or cover the page: the tags, the
    attributes and the styles that a page of words, tables and inline pictures needs stay."""
    def allowed(tag: str, name: str, value: str) -> bool:
        if (tag, name) in (("img", "src"), ("a", "href")):
            return bool((_PICTURE if tag == "img" else _LINK).fullmatch(value))
        return name in _ATTRIBUTES

    if len(text) > LARGEST_HTML or _depth(text) > DEEPEST_HTML:
        return f"<p>not shown: {len(text) / 1e6:.1f} MB of HTML, or nested too deep</p>"
    # Their text is no text to be read.
    text = re.sub(r"(?is)<(script|style|template|title)\b.*?(</\1\s*>|$)", "", str(text))
    return bleach.clean(text, tags=_TAGS, attributes=allowed, strip=True,
                        protocols={"http", "https", "mailto", "data"},
                        css_sanitizer=_Styles(allowed_css_properties=_STYLES))


class _Styles(CSSSanitizer):
    """bleach reads a style without decoding its entities, which a browser does."""

    def sanitize_css(self, style: str) -> str:
        style = html.unescape(style)
        return "" if "&" in style else super().sanitize_css(style)
