"""Token strips and pictures: plain HTML, escaped, nothing loaded from elsewhere."""

import ast
import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from views_examples import WORDS, live_runs, sample, token_table

from xsd.core import ROOT, Round, VideoError
from xsd.evaluate import curves
from xsd.runs import numbers
from xsd.views import figures, images, safe, timeline, tokens
from xsd.views.safe import Html


def _rows(states):
    table = token_table(levels=("L1",))
    one = table[table["sample"] == "s0/0"].head(len(states)).copy()
    one["match"] = states
    return one


def test_after_a_rejection_a_round_begins_anew_and_a_full_one_ends_with_the_verifiers_token():
    page = tokens.pairs(_rows([True, False, True, True, True]), gamma=2)
    first, second = page.split("token-round")[1:]
    assert re.findall(r'class="token (\w+)"', first) == [
        "accepted", "verifier", "rejected", "bonus"
    ]
    assert re.findall(r'class="token (\w+)"', second) == [
        "accepted", "verifier", "accepted", "verifier", "unused", "bonus"
    ]
    assert "round 2: 2 accepted" in second


def test_what_a_round_accepts_is_read_from_the_table_where_it_stands_there():
    rows = _rows([True, True, True, False]).assign(accepted=[0, 1, 1, 0], position=[-1, 0, 1, 2])
    page = tokens.pairs(rows, gamma=1)
    given, *rounds = page.split("token-round")[1:]
    assert "from the prefill" in given
    assert [re.findall(r'class="token (\w+)"', one)[::2] for one in rounds] == [
        ["accepted", "unused"], ["rejected"]]


def test_a_draft_tree_has_a_row_for_each_branch():
    tree = Round((1, 2, 3, 4), 2, 5, 0, 0, 0, 0, parents=(-1, 0, 0, -1))
    page = tokens.one_round(tree, lambda token: WORDS[token], 0)
    places = re.findall(r"grid-column:(\d);grid-row:(\d)", page)
    assert places == [("1", "1"), ("2", "1"), ("2", "2"), ("1", "3")]
    assert re.findall(r'class="token (\w+)"', page) == [
        "accepted", "accepted", "rejected", "rejected", "bonus"]


def test_a_threshold_colours_by_cosine_instead_of_by_token():
    rows = _rows([False, False]).assign(cosine=[0.95, 0.5])
    assert re.findall(r'class="token (\w+)"', tokens.pairs(rows,
                                                           0.9))[::2] == ["accepted", "rejected"]


def test_text_and_hover_are_escaped():
    page = tokens.box('<script>"', "bonus", ['a"b<c'])
    assert "<script>" not in page and "&lt;script&gt;" in page and 'title="a&#34;b&lt;c"' in page


def test_white_space_tokens_are_visible():
    assert [tokens.visible(text)
            for text in ("▁the", "\n", "▁", "", "a\tb")] == ["the", "⏎", "␣", "∅", "a⇥b"]


def test_hover_tells_position_probability_and_cosine():
    row = _rows([True]).assign(draft_probability=[0.25], cosine=[0.9])
    page = tokens.pairs(row)
    assert "position 0" in page and "draft probability 0.250" in page and "cosine 0.900" in page


def test_a_live_run_shows_accepted_rejected_and_bonus_tokens_a_round():
    page = tokens.rounds(live_runs()["speculative"], lambda token: WORDS[token])
    assert page.count("token-strip") == 3
    first = page.split("token-strip")[1]
    assert re.findall(r'class="token (\w+)"', first) == ["accepted"] * 4 + ["rejected", "bonus"]


def test_pictures_are_inline_and_keep_their_pixels():
    image = np.zeros((20, 30, 3), np.uint8)
    image[5, 7] = (255, 0, 0)
    uri = images.png_uri(image, max_side=60)
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert back.shape == (40, 60, 3) and back[10, 14].tolist() == [255, 0, 0]
    assert images.png_uri(image) == images.png_uri(image)


def test_no_picture_is_named():
    with pytest.raises(VideoError, match=r"float64 \[2, 2\]"):
        images.png_uri(np.zeros((2, 2)))


def test_nothing_is_requested_from_elsewhere():
    page = images.sensors(sample()) + tokens.legend() + tokens.pairs(_rows([True, False]))
    assert numbers.external_requests(page) == [] and page.count("<img") == 5 + 8
    assert "<script" not in page


def test_a_table_escapes_cells_labels_and_names_and_keeps_its_text_for_a_terminal():
    bad = "<img src=x onerror=y>"
    frame = pd.DataFrame({bad: [bad, "$x$"], "share": [0.5, np.nan], "n": [12345, 3]},
                         index=pd.Index([bad, "b"], name="<u>"))
    page = safe.table(frame, precision=2, percent=["share"], thousands=" ")
    assert "<img" not in page and page.count("&lt;img src=x onerror=y&gt;") == 3
    assert "<th>&lt;u&gt;</th>" in page and "<td>12 345</td>" in page
    assert "<td>50%</td>" in page and "<td>–</td>" in page
    shown = page._repr_mimebundle_()
    assert shown["text/plain"] == repr(frame) and "mathjax_ignore" in shown["text/html"]
    assert "<th>0</th>" not in safe.table(frame.reset_index(), index=False)


def test_html_escapes_what_is_formatted_added_or_joined_into_it():
    made = Html("<b>{}</b>").format("<i>\u202e") + "<u>" + Html(", ").join(["<s>", Html("<p>")])
    assert made == "<b>&lt;i&gt;\\u202e</b>&lt;u&gt;&lt;s&gt;, <p>"


def test_a_label_of_a_figure_is_read_literally():
    assert safe.label("<b>%{x}</b> & $y$") == "&lt;b&gt;&#37;{x}&lt;/b&gt; &amp; &#36;y&#36;"
    assert safe.label("L4, γ = 5: 50 % of all") == "L4, γ = 5: 50 % of all"
    frame = token_table(levels=("L1",)).assign(level="<a>", position=1)
    drawn = figures.acceptance_by_position(curves.by_position(frame), title="<b>")
    assert {trace.name for trace in drawn.data} == {"&lt;a&gt;", "&lt;a&gt; interval"}
    assert drawn.layout.title.text == "&lt;b&gt;" and "<b><a></b>" not in drawn.to_json()
    assert "&lt;a&gt;" in timeline.timeline({"<a>": live_runs()["baseline"]}).to_json()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")),
                         ids=lambda path: path.stem)
def test_notebooks_show_data_through_the_one_door(path):
    """No cell makes HTML, Markdown or a styled table of its own; Html is given constant text."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        for node in ast.walk(tree):
            name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
            assert name not in ("HTML", "HTMLMath", "IFrame", "Javascript", "Latex", "Markdown",
                                "Math", "SVG", "publish_display_data", "style", "to_html"), (
                                    path.name, cell["id"])
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Html":
                assert [type(one) for one in node.args] == [ast.Constant]


def test_a_picture_that_grows_keeps_its_own_pixels():
    image = np.zeros((20, 30, 3), np.uint8)
    page = images.filmstrip([image], side=112, large=480)
    assert "<details" in page and "width:112px" in page and "480px" in page
    uri = re.search(r'src="data:image/png;base64,([^"]+)"', page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (30, 20)
    assert "<details" not in images.filmstrip([image])
