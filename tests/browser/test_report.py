"""The report as a colleague gets it: one file, alone in a folder, opened from disk."""

import json
import random
import shutil

import lab_driver as lab
import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import sync_playwright
from test_evaluate_what_if import GIVEN
from test_runs_demo import results
from views_examples import live_runs, token_table

from xsd.evaluate import what_if
from xsd.runs import demo_page, doctor, folder, report
from xsd.steps import evaluation
from xsd.views import theme

CHROMIUM = doctor.browser_path()
pytestmark = pytest.mark.skipif(CHROMIUM is None,
                                reason="no Chromium is installed (set BROWSER_PATH to one)")
SIZES = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark"), (1600, "light")]
DRAWN = "() => [...document.querySelectorAll('script.figure')].every(e => e.dataset.drawn)"
DEAD = """() => [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href')).filter(
h => !(h.startsWith('#') && document.getElementById(h.slice(1))) &&
     !/^(https:|blob:)/.test(h))"""
NAMELESS = """() => [...document.querySelectorAll('.plot, input, select')].filter(
e => !e.getAttribute('aria-label') && !e.closest('label')).length"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The page without anything beside it."""
    place = tmp_path_factory.mktemp("report")
    run, found = place / "run", results()
    folder.save_tokens(run, token_table().assign(data="simulated"))
    kept = folder.save_live(run, live_runs(), {token: f" word{token}" for token in range(12)},
                            question="What is moving?")
    found["tokens"]["test"]["simulated"] |= evaluation.drawn(token_table())
    found["live"] |= {"timeline": json.loads(kept.read_text()), "hidden_share": 0.9, "costs": {
        name: {"ms": ms} for name, ms in {"verifier_prefill": 120.0, "verify 1": 6.0,
                                          "verify 6": 10.0}.items()}}
    arm = next(iter(found["live"]["arms"].values()))
    arm |= {"tokens": 300}
    found["live"]["predicted"] = {arm["label"]: {"drafter_prefill_ms": 40.0, "draft_ms": 2.0,
                                                 "round_ms": 0.0, "gamma": 5}}
    theme.register()
    figure = json.loads(go.Figure(go.Scatter(y=[1, 2])).to_json())
    cells = [new_markdown_cell("[elsewhere](../docs/metrics.md)"), new_code_cell("fig", outputs=[
        new_output("display_data", {report.PLOTLY_MIME: figure})])]
    nbformat.write(new_notebook(cells=cells), place / "05_live.ipynb")
    index = report.build_report(demo_page.template(), found, place / "out", title="A run",
                                notebooks=[place / "05_live.ipynb"], **demo_page.parts(run, found))
    (place / "sent").mkdir()
    return shutil.copy(index, place / "sent" / "report.html")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=lab.ARGUMENTS)
        yield opened
        opened.close()


def opened(browser, path, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.problems, page.asked = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda said: page.problems.append(said.text) if said.type == "error"
            else None)
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#what-if-app .js-plotly-plot")
    return page


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_one_file_is_whole_at_every_width_and_in_the_dark(browser, alone, width, scheme):
    page = opened(browser, alone, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_function(DRAWN)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(DEAD) == [] and page.evaluate(NAMELESS) == 0
    titles = page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title"
                           " || '')")
    assert len(titles) > 20 and not [one for one in titles if "hare" in one or "loud" in one]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    for link in page.locator("nav a").all():
        link.click()
    assert page.problems == [] and page.asked == [alone.as_uri()]
    page.close()


def test_a_row_leads_to_its_tokens_and_the_results_can_be_kept(browser, alone):
    page = opened(browser, alone, 1280, "light")
    assert not page.locator("#tokens-simulated-L4 .token-pairs").first.is_visible()
    page.locator('a[href="#tokens-simulated-L4"]').click()
    assert page.locator("#tokens-simulated-L4 .token-pairs").first.is_visible()
    with page.expect_download() as kept:
        page.locator("#results-file").click()
    assert json.loads(kept.value.path().read_text())["live"]["n_answers"] == 30
    page.close()


def test_the_sliders_of_the_page_say_what_python_says(browser, alone):
    draw, page = random.Random(0), opened(browser, alone, 1280, "light")
    tried = [GIVEN, what_if.reference()]
    for _ in range(40):
        low, high = draw.random(), draw.random()
        tried.append(GIVEN | {
            "verifier_prefill_ms": 400 * draw.random(), "drafter_prefill_ms": 300 * draw.random(),
            "step_ms": 1 + 20 * draw.random(), "width": 3 * draw.random(),
            "draft_ms": draw.choice([0.0, 10 * draw.random()]), "round_ms": 5 * draw.random(),
            "gamma": draw.randint(0, 21), "acceptance": low, "hidden_acceptance": high,
            "overlap": draw.choice([0.0, draw.random(), 1.0]), "contention": 1 + draw.random(),
            "n_tokens": 1 + 100 * draw.random()})
    for given in tried:
        ours, theirs = what_if.what_if(given), page.evaluate("g => xsdWhatIf(g)", given)
        assert set(ours) == set(theirs)
        for name in ("sensitivity", "parts_ms"):
            a, b = ours.pop(name), theirs.pop(name)
            if name == "sensitivity":
                a, b = ({row["input"]: [row["less"], row["more"]] for row in some}
                        for some in (a, b))
            assert set(a) == set(b)
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-9), (name, key, given)
        for name, value in ours.items():
            if isinstance(value, list):
                for pair, other in zip(value, theirs[name], strict=True):
                    assert pair == pytest.approx(other, rel=1e-9), (name, given)
            elif None in (value, theirs[name]):  # a break-even that no acceptance reaches
                assert value is theirs[name], (name, given)
            else:
                assert value == pytest.approx(theirs[name], rel=1e-9, abs=1e-9), (name, given)
    first = page.locator("#what-if-app p").inner_text()
    page.locator("#what-if-app input").nth(4).fill("0")  # drafts for nothing
    assert page.locator("#what-if-app p").inner_text() != first
    assert page.problems == []
    page.close()
