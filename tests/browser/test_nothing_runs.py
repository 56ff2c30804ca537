"""Hostile questions, answers, names and tokens in a real browser: every notebook as a page, the
report, and everything that notebooks show in a JupyterLab that trusts it. Nothing runs, nothing is
asked for, and the text is there to be read."""

import json
import shutil
from unittest import mock

import hostile
import lab_driver as lab
import nbformat
import plotly.io as pio
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import sync_playwright
from tiny_pair import make_tiny_pair

from studies import raw_dsec
from xsd.core import ROOT
from xsd.models.handle import ModelHandle
from xsd.runs import demo_page, doctor, folder, report

CHROMIUM = doctor.browser_path()
pytestmark = pytest.mark.skipif(CHROMIUM is None,
                                reason="no Chromium is installed (set BROWSER_PATH to one)")
LOOK = """() => {
const all = [...document.querySelectorAll('*')];
const named = (e, what) => [...e.attributes].filter(what);
return {ran: Object.keys(window).filter(key => key.startsWith('pwned')),
        handlers: all.filter(e => named(e, a => /^on/.test(a.name)).length).map(e => e.outerHTML),
        links: all.filter(e => named(e, a => /(href|src|action)$/.test(a.name) &&
                                     /^\\s*(javascript|vbscript|data:text)/i.test(a.value)).length)
                  .map(e => e.outerHTML),
        text: document.body.innerText}}"""
INLINE = ("data:", "blob:")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def made(place):
    """The run folder and the executed notebooks by stem, all of hostile names."""
    pair = str(make_tiny_pair(place / "pair", seed=4))
    data = str(hostile.write_dataset(place / f"train{hostile.PAYLOADS['img']}", "train", 2, 0))
    test = str(hostile.write_dataset(place / f"test{hostile.PAYLOADS['svg']}", "test", 2, 2))
    run = place / f"run{hostile.PAYLOADS['img']}{hostile.PAYLOADS['tex']}"
    level = place / f"L1{hostile.PAYLOADS['hover']}".replace("/", "") / hostile.PAYLOADS["img"]
    texts = list(hostile.PAYLOADS.values())
    sets = {"data": data, "test_data": [test]}
    few = {"resamples": 50}
    given = {
        "01_extract": {**sets, "pair": pair, "n_train_sequences": 2, "n_test_sequences": 2,
                       "questions_per_sequence": 5, "max_questions": 13, "max_new_tokens": 8},
        "02_train": {"data": data, "levels": ["L1"], "epochs": 2},
        "03_hidden": {"levels": [str(level)], "test_data": [test]},
        "04_tokens": {**sets, **few, "levels": ["L1", str(level)]},
        "05_live": {**sets, **few, "pair": pair, "arms": ["ar", "ngram", "L1"], "n_samples": 1,
                    "check_arms": ["L1"], "max_new_tokens": 8},
        "06_compare": {**few, "runs": [str(run)]},
        "07_explore": {"runs": [str(run)], "levels": ["L1"]},
        "13_truth": {**sets, **few, "levels": ["L1"], "waterfall": "L1"},
    }
    raw, recorded = place / f"raw{hostile.PAYLOADS['img']}", place / "recorded"
    raw_dsec.write(raw / f"s{hostile.PAYLOADS['svg']}", seed=0, duration_s=0.7, image_size=(48, 36),
                   rendered=(40, 30))
    recorded.mkdir()
    hostile.write_recording(recorded / f"{hostile.PAYLOADS['bold']}.npy".replace("/", ""))
    one = {**few, "data": data, "test_data": test, "n_train_sequences": 2, "n_test_sequences": 2}
    asked = {"questions_per_sequence": 4, "max_new_tokens": 8}
    given |= {
        "08_prepare_dsec": {"source": str(raw), "clip_ms": 300, "hop_ms": 150},
        "09_recordings": {**few, "pair": pair, "source": str(*recorded.iterdir()), "clip_ms": 300,
                          "hop_ms": 300, "max_clips": 1, "questions": texts[:3],
                          "max_new_tokens": 8, "adapters": [str(level)]},
        "10_storage": {**one, **asked, "levels": ["L1"], "dtypes": ["fp32", "int8"], "epochs": 1},
        "11_pixels": {**one, "epochs": 1, "image_size": 8},
        "12_study": {**one, **asked, "levels": ["L1"], "recipes": ["best"], "n_seeds": 1,
                     "max_epochs": 1, "shares": []},
    }
    said = mock.patch.object(ModelHandle, "token_text", lambda self, token:
                             texts[token % len(texts)] + hostile.UNSEEN)
    before, pio.renderers.default = pio.renderers.default, "plotly_mimetype"
    notebooks = {}
    with said:
        for stem, params in given.items():
            notebooks[stem] = hostile.executed(stem, run_dir=str(run), **params)
            if stem == "02_train":
                level.parent.mkdir()
                shutil.copytree(run / "adapters" / "L1", level)
    pio.renderers.default = before
    return run, notebooks


def looked_at(browser, path):
    """What a page has run and shows, and what it asked for besides itself and plotly.js."""
    page, asked = browser.new_page(viewport={"width": 1100, "height": 800}), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: request.failure == "csp" and
            asked.remove(request.url))  # refused before it was sent
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_function("() => document.querySelectorAll('script.figure, .plotly-graph-div')"
                           ".length <= document.querySelectorAll('.js-plotly-plot').length")
    page.wait_for_timeout(300)
    found = page.evaluate(LOOK)
    page.close()
    own = (*INLINE, path.as_uri(), (path.parent / "plotly.min.js").as_uri())
    return found | {"asked": [url for url in asked if not url.startswith(own)]}


def is_quiet(found):
    return [found[key] for key in ("ran", "handlers", "links", "asked")] == [[], [], [], []]


def test_pages_of_hostile_data_run_nothing_and_show_it(made, place):
    run, notebooks = made
    for stem, notebook in notebooks.items():
        nbformat.write(notebook, place / f"{stem}.ipynb")
    results = folder.load_results(run) | {"provenance": {"run": str(run)}}
    index = report.build_report(
        demo_page.template(), results, place / "out", title=hostile.PAYLOADS["bold"],
        notebooks=[place / f"{stem}.ipynb" for stem in notebooks],
        **demo_page.parts(run, results))
    pages = [index, *(report.notebook_page(place / f"{stem}.ipynb", place / "out" / "notebooks")
                      for stem in notebooks)]
    drawn = sorted((run / "report" / "figures").glob("*.html"))
    pages += drawn[:1]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=lab.ARGUMENTS)
        seen = {path.stem: looked_at(browser, path) for path in pages}
        browser.close()
    assert {name: found for name, found in seen.items() if not is_quiet(found)} == {}
    for name in ("index", "01_extract", "04_tokens"):
        missing = [text for text in hostile.PAYLOADS.values() if text not in seen[name]["text"]]
        assert len(missing) <= 9, (name, missing)
    assert all(text in seen["04_tokens"]["text"] for text in ("{{7*7}}", "<style>*{display:none}"))


def test_what_notebooks_show_is_html_of_the_one_door_or_a_figure(made):
    for notebook in made[1].values():
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                assert set(data) <= {"text/plain", "text/html", report.PLOTLY_MIME,
                                     "application/vnd.jupyter.widget-view+json"}
                assert data.get("text/html", "<div class=\"tex2jax_ignore mathjax_ignore\">"
                                ).startswith('<div class="tex2jax_ignore mathjax_ignore">')


def test_jupyterlab_runs_nothing_of_hostile_data(made, place):
    run, notebooks = made
    notebooks = {stem: one for stem, one in notebooks.items() if not "08" <= stem < "13"}
    shown = [(stem, output.data) for stem, notebook in notebooks.items() for cell in notebook.cells
             for output in cell.get("outputs", []) if "data" in output]
    drawn = ("04_tokens", )  # a figure takes a second there
    bundles = [data for stem, data in shown if "text/html" in data or
               (report.PLOTLY_MIME in data and stem in drawn)]
    printed = [output.text for notebook in notebooks.values() for cell in notebook.cells
               for output in cell.get("outputs", []) if output.output_type == "stream"]
    root = place / "lab"
    root.mkdir()
    (root / "shown.json").write_text(json.dumps([bundles, printed]))
    code = [
        "import json\nfrom IPython.display import display\nbundles, printed = json.load("
        "open('shown.json'))\nfor one in bundles:\n    display(one, raw=True)\n"
        "for one in printed:\n    print(one)",
        "from xsd.steps import explore\n"
        f"explorer = explore.explorer([{str(run)!r}], levels=['L1'], threshold=0.9)\n"
        "explorer.click(1)\nexplorer.widget",
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(one) for one in code], metadata=kernel),
                   root / "made.ipynb")
    with lab.jupyterlab(root, str(ROOT)) as (port, token), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=lab.ARGUMENTS)
        view = lab.Page(browser.new_page(viewport={"width": 1400, "height": 1000}), port, token)
        dialogs = []
        view.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        view.open("made.ipynb")
        view.run_all()
        assert view.failures() == []
        view.page.locator(".token-pairs").last.wait_for(timeout=60_000)
        view.page.wait_for_timeout(2500)  # MathJax would come late
        found = view.page.evaluate(LOOK)
        math = view.page.locator("mjx-container").count()
        browser.close()
    assert found["ran"] == [] and found["links"] == [] and dialogs == []
    assert [one for one in found["handlers"] if "pwned" in one] == []
    assert view.external == [] and math == 0
    assert hostile.PAYLOADS["img"] in found["text"] and hostile.PAYLOADS["tex"] in found["text"]


def test_a_notebook_somebody_sent_runs_nothing_in_its_page(place):
    path = place / "sent" / f"{hostile.PAYLOADS['img']}<title>.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps(hostile.notebook()))
    page = report.notebook_page(path, path.parent / "notebooks")
    assert "root:" not in page.read_text()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=lab.ARGUMENTS)
        found = looked_at(browser, page)
        # and with nothing but the cleaning in its way
        open_page = page.with_name("open.html")
        open_page.write_text(page.read_text().replace("Content-Security-Policy", "none"))
        bare = looked_at(browser, open_page)
        browser.close()
    assert is_quiet(found), {**found, 'text': ''}
    assert bare["ran"] == [] and bare["handlers"] == [] and bare["links"] == []
    assert hostile.PAYLOADS["img"] in found["text"]
