"""The explorer in a real browser: JupyterLab runs it, the slider and a click change what is seen,
nothing leaves the machine."""

import io
import os
from pathlib import Path

import lab_driver as lab
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from playwright.sync_api import sync_playwright

from xsd.core import ROOT
from xsd.runs import doctor

CHROMIUM = doctor.browser_path()
NOTEBOOK = ROOT / "notebooks" / "07_explore.ipynb"
PLOT = ".jupyter-widgets .js-plotly-plot"
"""The explorer's own picture; the notebook also shows a still one."""

pytestmark = pytest.mark.skipif(CHROMIUM is None,
                                reason="no Chromium is installed (set BROWSER_PATH to one)")


def made_notebook(folder: Path) -> Path:
    """The explorer over made-up tokens: what it does must not hang on a trained pair."""
    code = [
        "import pandas as pd, views_examples\nfrom xsd.core import Round\n"
        "from xsd.views import controls, explorers",
        "table = pd.concat([views_examples.token_table(), views_examples.token_table(3, "
        "run='other', levels=('L1', 'L4'))])\n"
        "table['kind'] = ['place' if at % 2 else 'colour' for at in table['position']]\n"
        "about = {'rank': 1, 'margin': 0.5, 'certainty': 1.0, 'draft_texts': ['red', 'blue'], "
        "'draft_probabilities': [0.6, 0.3], 'verifier_texts': ['blue', 'red'], "
        "'verifier_probabilities': [0.7, 0.2]}\n"
        "why = pd.DataFrame([{'position': at, **about} for at in range(14)])\n"
        "data = explorers.ExplorerData(table, lambda key: views_examples.sample(), "
        "lambda *given: why)\n"
        "explorer = controls.AcceptanceExplorer(data)\nexplorer.widget",
        "runs = views_examples.live_runs()\nspeculative = runs['speculative']\n"
        "tree = Round((0, 1, 5, 6, 7), 2, 8, 0, .01, .01, .02, 'decode', (-1, 0, 0, -1, 3))\n"
        "runs['tree'] = type(speculative)(speculative.ids, 'length', (tree,))\n"
        "live = controls.LiveExplorer({'a': 'first sample', 'b': 'second'}, list(runs), "
        "lambda key, arm: runs[arm], lambda token: views_examples.WORDS[token], "
        "sample=lambda key: views_examples.sample(), "
        "why=lambda arm, key, at: {'position': at, **about})\nlive.widget",
    ]
    path = folder / "made.ipynb"
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(text) for text in code], metadata=metadata),
                   path)
    return path


def shot(page, path):
    """A picture of the page with few colours: those under docs/images are made by this test, with
    XSD_SCREENSHOTS=docs/images."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.thumbnail((1200, 1200))
    picture.quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)


def notebooks():
    return ["made", *([NOTEBOOK.stem] if NOTEBOOK.is_file() else [])]


@pytest.mark.parametrize("which", notebooks())
def test_the_slider_and_a_click_change_what_is_seen(which, tmp_path):
    shots = Path(os.environ.get("XSD_SCREENSHOTS", tmp_path / "shots"))
    shots.mkdir(parents=True, exist_ok=True)
    source = made_notebook(tmp_path) if which == "made" else NOTEBOOK
    root = tmp_path / "lab"
    root.mkdir()
    copy = lab.blanked_copy(source, root)
    with lab.jupyterlab(root, str(ROOT / "tests")) as (port, token), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=lab.ARGUMENTS)
        view = lab.Page(browser.new_page(viewport={"width": 1500, "height": 1250}), port, token)
        view.open(copy.name)
        view.run_all()
        assert view.failures() == []
        page = view.page
        page.locator(".widget-slider").first.wait_for(timeout=120_000)
        page.locator(PLOT).first.wait_for(timeout=120_000)
        page.locator(PLOT).last.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        shot(page, shots / f"{which}_1_start.png")

        before = view.plots()
        page.get_by_role("button", name="cosine > τ").last.click()
        by_cosine = view.changed(before)
        handle = page.locator(".widget-slider .noUi-handle").first
        handle.focus()
        for _ in range(6):
            page.keyboard.press("ArrowLeft")
        moved = view.changed(by_cosine)
        assert [one["title"] for one in moved] == [one["title"] for one in by_cosine]
        assert sum(map(sum, moved[-1]["y"])) > sum(map(
            sum, by_cosine[-1]["y"]))  # a lower threshold accepts more
        shot(page, shots / f"{which}_2_threshold.png")

        strips = page.locator(".token-pairs").first.inner_text()
        point = page.locator(PLOT).last.locator(
            ".scatterlayer .trace .points path").nth(2)
        box = point.bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_function(
            "() => [...document.querySelectorAll('.widget-readout')].some(e => "
            "e.textContent.trim() === '2')",
            timeout=120_000)
        page.wait_for_function("before => document.querySelector('.token-pairs').innerText !== "
                               "before", arg=strips, timeout=120_000)
        assert page.locator(".token-pairs").count() >= 1 and page.locator(
            ".filmstrip img").count() >= 2
        page.locator(".token-legend").last.scroll_into_view_if_needed()
        shot(page, shots / f"{which}_3_position.png")
        assert view.errors == [] and view.external == []
        browser.close()
