"""Token strips and pictures: plain HTML, escaped, nothing loaded from elsewhere."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from views_examples import WORDS, live_runs, sample, token_table

from xsd.core import VideoError
from xsd.runs import numbers
from xsd.views import images, tokens


def _rows(states):
    table = token_table(levels=("L1",))
    one = table[table["sample"] == "s0/0"].head(len(states)).copy()
    one["match"] = states
    return one


def test_tokens_after_a_rejection_are_marked_as_lost():
    page = tokens.pairs(_rows([True, False, True]))
    assert re.findall(r'class="token (\w+)"', page) == [
        "accepted", "verifier", "rejected", "verifier", "unused", "verifier"
    ]


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
