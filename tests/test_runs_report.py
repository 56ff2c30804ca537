"""The report: one offline page whose numbers are those of results.json."""

import copy
import html
import json
import os
import re

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from views_examples import live_runs, sample, token_table

from xsd.runs import numbers, report
from xsd.views import images, timeline, tokens

RESULTS = {
    "n": 24, "levels": {
        "L1": {"length": {"value": 1.25, "low": 0.71, "high": 1.754}, "accept@0.90": 0.31},
        "L4": {"length": {"value": 1.67, "low": 1.08, "high": 2.12}, "accept@0.90": 0.42},
    }, "reference": {"kind": "quoted",
                     "speedup": 1.03}, "model": {"kind": "predicted", "speedup": 1.31},
    "provenance": {"git_revision": "abc", "seed": 0},
}
TABLE = """{% from "parts.html.j2" import table %}
{{ table([("Adapters", none), ("L1", "levels/L1"), ("L4", "levels/L4")],
         [("accepted drafts a round", "length", ".2f"), ("absent", "nothing", "")],
         "Over " ~ num("n") ~ " samples.") }}"""


def build(out, *parts, results=RESULTS, **options):
    template = "<nav></nav>" + '<section id="seen"><h2>What was seen</h2>' + "".join(parts)
    return report.build_report(template + "</section>", results, out, title="A run", **options)


def test_every_number_on_the_page_is_that_of_the_results(tmp_path):
    text = ("<p>In short: {{ num('levels/L1/accept@0.90', '.0%') }}. With <b>L4</b> "
            "{{ num('levels/L4/length/value', '.2f') }} of {{ num('n') }}; others say "
            "{{ num('reference/speedup', '.2fx') }}, a model {{ num('model/speedup', '.2fx') }}.")
    page = build(tmp_path, text, TABLE).read_text()
    stored = json.loads((tmp_path / "results.json").read_text())
    shown = dict(re.findall(r'data-key="([^"]+)" data-format="[^"]*">([^<]+)<', page))
    assert shown["levels/L4/length/value"] == "1.67" and shown["reference/speedup"] == "1.03×"
    assert shown["levels/L1/accept@0.90"] == "31%" and shown["n"] == "24"
    assert '<nav><a href="#seen">What was seen</a></nav>' in page
    assert numbers.disagreements(page, stored) == []
    changed = copy.deepcopy(stored)
    changed["levels"]["L4"]["length"]["value"] = 1.7
    assert numbers.disagreements(page, changed)[0] == (
        "levels/L4/length/value is shown as '1.67' but the results say '1.70'")


def test_measured_predicted_and_quoted_numbers_look_different():
    for path, kind in (("n", "measured"), ("model/speedup", "predicted"), ("reference/speedup",
                                                                           "quoted")):
        assert f'class="number {kind}"' in numbers.number(RESULTS, path)


def test_a_number_written_by_hand_is_refused(tmp_path):
    with pytest.raises(
            numbers.ReportError,
            match=r"'1\.5' in 'It was 1\.5 times better\.' is not taken from the results"):
        build(tmp_path, "<p>It was 1.5 times better.</p>")
    assert not (tmp_path / "index.html").exists()


def test_names_with_digits_and_code_are_no_numbers(tmp_path):
    build(tmp_path, "<p>Level L5F at τ, run with <code>xsd run 05 -p gamma=5</code>.</p>")


def test_text_of_the_results_is_escaped(tmp_path):
    page = build(tmp_path, "{{ num('name') }}", results={"name": "<b>L9</b> & co"}).read_text()
    assert ">&lt;b&gt;L9&lt;/b&gt; &amp; co<" in page


def test_a_number_that_is_not_there_is_named():
    with pytest.raises(numbers.ReportError,
                       match=r"nothing at 'levels/L9/x': no 'L9' under levels \(there: L1, L4\)"):
        numbers.lookup(RESULTS, "levels/L9/x")
    with pytest.raises(numbers.ReportError, match="is not one number but a dict"):
        numbers.number(RESULTS, "levels/L1/length")


def test_tables_show_intervals_and_leave_a_dash(tmp_path):
    page = build(tmp_path, TABLE).read_text()
    assert 'data-key="levels/L1/length/high" data-format=".2f">1.75<' in page
    assert "<td>–</td>" in page and '<th scope="rowgroup" colspan="3">Adapters</th></tr>' in page


def test_the_page_is_offline_and_the_same_bytes_twice(tmp_path):
    table = token_table(levels=("L1",))
    parts = {
        "live": timeline.scrubber(live_runs(), lambda ids: "</script>" * len(ids)),
        "line": go.Figure(go.Scatter(y=[1, 2])),
        "strips": tokens.legend() + tokens.pairs(table[table["sample"] == "s0/0"]) +
        images.sensors(sample()),
    }
    text = "{{ plot(live) }}{{ plot(line) }}{{ strips }}"
    page = build(tmp_path / "a", text, **parts).read_text()
    assert numbers.external_requests(page) == []
    assert page.count('class="figure"') >= 2 and page.count('id="plotly"') == 1
    assert 1e6 < len(page) < 3e6  # plotly.js once, packed
    assert build(tmp_path / "b", text, **parts).read_text() == page


@pytest.mark.parametrize("text", [
    '<script src="https://cdn.plot.ly/p.js"></script>', '<img src="//x.org/a.png">',
    '<link rel="stylesheet" href="http://x.org/a.css">', "<style>@import 'a.css'</style>",
    "<style>b{background:url(https://x.org/a.png)}</style>",
    '<p style="background:url(//x.org/a)">',
],
                         )
def test_requests_are_found(text):
    assert numbers.external_requests(text)


def test_links_to_click_are_no_requests():
    assert numbers.external_requests(
        '<a href="https://example.org">paper</a><img src="data:image/png;base64,AA">') == []


def executed(tmp_path):
    figure = json.loads(go.Figure(go.Scatter(y=[1, 2])).to_json())
    cells = [
        new_code_cell(
            "fig", outputs=[new_output("display_data", {"application/vnd.plotly.v1+json": figure})],
            execution_count=1),
        new_code_cell(
            "w", outputs=[
                new_output("display_data",
                           {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox()"})
            ]),
    ]
    book = new_notebook(cells=cells, metadata={"widgets": {"x": {"state": {}}}})
    for place, cell in enumerate(book.cells):
        cell["id"] = f"cell-{place}"
    nbformat.write(book, tmp_path / "05_live.ipynb")
    return tmp_path / "05_live.ipynb"


def test_executed_notebooks_stand_in_the_page_and_become_offline_pages(tmp_path):
    index = build(tmp_path / "out", "<p>Words.</p>", notebooks=[executed(tmp_path)]).read_text()
    part = index[index.index('<details class="notebook" id="notebook-05_live">'):]
    assert part.count('class="figure" data-at="nb0-cell-0-0"') == 1 and "VBox()" in part
    assert '<div id="nb0-cell-0-0">' in part and "</details>" in part
    page = report.notebook_page(tmp_path / "05_live.ipynb", tmp_path / "notebooks")
    first = page.read_text()
    assert numbers.external_requests(first) == []
    assert "src='plotly.min.js'" in first and (page.parent / "plotly.min.js").stat().st_size > 3e6
    assert first.count('class="figure"') == 1 and "VBox()" in first
    report.notebook_page(tmp_path / "05_live.ipynb", page.parent)
    assert page.read_text() == first


def test_a_page_holds_its_results_and_no_link_to_another_file(tmp_path):
    cell = new_markdown_cell("[a](../docs/metrics.md) [b](https://example.org) [c](#d)\n# d")
    index = build(tmp_path, "{{ num('n') }}", notebooks=[sent(tmp_path, cell)]).read_text()
    kept = re.search('(?s)<pre tabindex="0" id="results-json">(.*?)</pre>', index).group(1)
    assert json.loads(html.unescape(kept)) == json.loads((tmp_path / "results.json").read_text())
    links = set(re.findall(r'<a\b[^>]*href="([^"]*)"', index))
    assert links == {"#seen", "#results", "https://example.org"}


SENT = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}


def sent(tmp_path, *cells, name="sent.ipynb"):
    path = tmp_path / name
    path.write_text(json.dumps({**SENT, "cells": list(cells)}))
    return path


@pytest.mark.parametrize(("text", "kept"), [
    ("<p onclick=x()>a</p>", "<p>a</p>"), ("<script>x()</script>b", "b"),
    ("<style>c{}</style>", ""),
    ("<a href='java\tscript:x()'>d</a>", "<a>d</a>"), ("<a href='#e'>e</a>", '<a href="#e">e</a>'),
    ("<a href=data:text/html,x>f</a>", "<a>f</a>"), ("<img src=g.png>", "<img>"),
    ("<img src='data:image/png;base64,AA=='>", '<img src="data:image/png;base64,AA==">'),
    ("<img src='data:image/svg+xml;base64,AA=='>", "<img>"), ("<svg onload=x()>h</svg>", "h"),
    ("<b style='color:red;position:fixed;background:url(x)'>i</b>", '<b style="color:red;">i</b>'),
    ("<b style=\"font:'&#39;;background:url(x);y:'\">m</b>", "<b style='font:\"\";'>m</b>"),
    ("<b style=\"font:'&amp;#39;;background:url(x);y:'\">m</b>", '<b style="">m</b>'),
    (images.filmstrip([], label="n", colour="red"),
     "<div class=\"filmstrip\"><div style='font:13px "
     'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;color:red;'
     "font-weight:600;'>n</div></div>"),
    ("<iframe src=x></iframe>j", "j"), ("<form action=x>k</form>", "k"),
    ("<a href='https://x.org'>l</a>", '<a href="https://x.org">l</a>'),
])
def test_html_of_unknown_origin_keeps_its_words_and_nothing_that_runs_or_loads(text, kept):
    assert report.clean(text) == kept


def test_a_page_of_a_notebook_holds_two_scripts_of_ours_at_most(tmp_path):
    figure = {"data": [{"name": "</script><!--<script>"}], "layout": {}}
    cell = new_code_cell("1", outputs=[
        new_output("display_data", {"application/javascript": "x()", "text/plain": "<b>"}),
        new_output("display_data", {"image/svg+xml": "<svg onload=x()>"}),
        new_output("display_data", {report.PLOTLY_MIME: figure})])
    raw = {"cell_type": "raw", "source": "<i>raw", "metadata": {"raw_mimetype": "text/html"}}
    text = report.notebook_page(sent(tmp_path, cell, raw), tmp_path / "out").read_text()
    assert len(re.findall("<script", text)) == 2 == len(re.findall("</script", text))
    assert "not shown: image/svg+xml" in text and "&lt;i&gt;raw" in text and "x()" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert "default-src &#39;none&#39;" in policy and "unsafe-eval" not in policy
    assert text.index("Content-Security-Policy") < text.index("<script")


def test_a_notebook_that_cannot_be_read_is_answered_in_one_sentence(tmp_path):
    elsewhere = sent(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    (place / "link.ipynb").symlink_to(elsewhere)
    os.mkfifo(place / "pipe.ipynb")
    for name in ("link", "pipe", "missing"):
        with pytest.raises(numbers.ReportError, match="is no file of its folder"):
            report.notebook_page(place / f"{name}.ipynb", place / "notebooks")
    for text in ("", "{", "[]", "1", "{}", '{"nbformat": 4}', '{"nbformat": 99, "cells": []}',
                 '{"nbformat": 3}', '{"nbformat": 4, "cells": [1]}', "[" * 10**5,
                 '{"nbformat": 4, "cells": [{"cell_type": "code", "outputs": 5}]}',
                 '{"nbformat": "x", "cells": null}', '{"nbformat": 4, "cells": {"a": 1}}',
                 '{"nbformat": 4, "cells": [{"cell_type": "code", "outputs": [{"data": 3}]}]}'):
        (place / "bad.ipynb").write_text(text)
        with pytest.raises(numbers.ReportError, match="run the notebook again"):
            report.notebook_page(place / "bad.ipynb", place / "notebooks")
    (place / "notebooks").symlink_to(tmp_path)
    with pytest.raises(numbers.ReportError, match="is a link to another place"):
        report.notebook_page(sent(place), place / "notebooks")


def test_deep_and_long_html_of_a_notebook_is_bounded(tmp_path):
    long = new_output("display_data", {"text/html": "<b>a</b>" * 600_000})
    deep = new_output("display_data", {"text/html": "<div>" * 50_000})
    cells = [new_code_cell("1", outputs=[long, deep]), new_markdown_cell("<div>" * 5_000)]
    page = report.notebook_page(sent(tmp_path, *cells), tmp_path / "out").read_text()
    assert "not shown: 4.8 MB of HTML" in page and page.count("nested too deep") == 3


def test_a_number_is_found_under_a_name_with_slashes():
    results = {"live": {"arms": {"data/adapters/D1@8": {"speedup": {"value": 1.5}}, "data": 2}}}
    path = "live/arms/data/adapters/D1@8/speedup/value"
    assert numbers.lookup(results, path) == 1.5 and path in numbers.number(results, path, ".2f")
    with pytest.raises(numbers.ReportError, match="no 'other' under live/arms"):
        numbers.lookup(results, "live/arms/other/D1/label")
