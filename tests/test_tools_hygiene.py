"""The committed form of notebooks, and the comparison policy of nbval."""

import base64
import importlib.util
import io

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from tools import hygiene, pictures
from xsd.core import ROOT, ParameterError
from xsd.runs import doctor, parameters


def defaults_cell(**changes):
    values = {**parameters.CompareParameters.checked({}).model_dump(), **changes}
    return new_code_cell("\n".join(f"{name} = {value!r}" for name, value in values.items()),
                         metadata={"tags": ["parameters"]})


def golden(text="7\n"):
    return new_code_cell("print(7)", outputs=[new_output("stream", name="stdout", text=text)],
                         execution_count=2)


def picture(colour="white", width=8):
    held = io.BytesIO()
    Image.new("RGB", (width, 6), colour).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


def ignored(data, source="figure"):
    return new_code_cell(source, outputs=[new_output("display_data", data)],
                         metadata={"tags": ["nbval-ignore-output"]})


def stored(tmp_path, *cells, normal=True, shown=True):
    path = tmp_path / "06_compare.ipynb"
    seen = ignored({"image/png": picture(), "text/plain": "<picture>"}, "seen")
    nbformat.write(new_notebook(cells=[*cells, *[seen] * shown]), path)
    if normal:
        hygiene.normalise(path)
    return path


def test_a_clean_notebook_has_no_problem_and_normalising_is_idempotent(tmp_path):
    path = stored(tmp_path, defaults_cell(), golden())
    assert hygiene.problems(path) == []
    before = path.read_bytes()
    hygiene.normalise(path)
    assert path.read_bytes() == before
    hygiene.check([path])


@pytest.mark.parametrize(
    ("cells", "words"),
    [([golden()], "exactly one cell tagged 'parameters', this one has 0"),
     ([defaults_cell(), defaults_cell(), golden()], "this one has 2"),
     ([defaults_cell(seed=5), golden()
       ], "parameter 'seed' is 5 in the cell but 0 in CompareParameters"),
     ([defaults_cell(extra=1), golden()], "parameter 'extra' is in only one of"),
     ([defaults_cell()], "has no compared cell"),
     ([
         defaults_cell(),
         golden(),
         new_code_cell("x", outputs=[new_output("stream", name="stderr", text="no")])
     ], "stores an error or stderr",
      ),
     ([
         defaults_cell(),
         golden(),
         new_code_cell("x", outputs=[new_output("display_data", {"text/html": "<b>"})])
     ], "stores text/html"), ([defaults_cell(), golden("x" * 210_000)], "at most 200 kB"),],
)
def test_each_fault_is_named(tmp_path, cells, words):
    path = stored(tmp_path, *cells)
    assert any(words in problem for problem in hygiene.problems(path)), hygiene.problems(path)
    with pytest.raises(hygiene.HygieneError, match=r"06_compare\.ipynb"):
        hygiene.check([path])


FIGURE = {"application/vnd.plotly.v1+json": {"data": [], "layout": {}}, "text/plain": "Figure"}


def kept(path):
    return [output.data["image/png"] for cell in nbformat.read(path, 4).cells
            for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]


def test_figures_and_film_strips_of_ignored_cells_are_stored_as_small_pictures(
        tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_figures",
                        lambda drawn: [Image.new("RGB", (900, 90)) for _ in drawn])
    strip = "".join(f'<img src="data:image/png;base64,{picture(width=300)}">' for _ in range(3))
    path = stored(tmp_path, defaults_cell(), golden(), ignored(FIGURE),
                  ignored({"text/html": strip}, "strip"), ignored({"text/plain": "7"}, "time"),
                  shown=False)
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in kept(path)]
    assert sizes == [(pictures.WIDTH, 76), (604, 16)]
    assert hygiene.problems(path) == []
    before = path.read_bytes()
    hygiene.normalise(path)
    assert path.read_bytes() == before


def test_without_a_browser_the_pictures_of_before_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "browser_path", lambda: None)
    cells = [ignored({"image/png": picture("red"), "text/plain": "<picture>"}), ignored(FIGURE)]
    book = new_notebook(cells=[cells[1]])
    hygiene._keep_pictures(book, hygiene._pictures_of(new_notebook(cells=[cells[0]])), print)
    assert book.cells[0].outputs == cells[0].outputs
    said = []
    path = stored(tmp_path, defaults_cell(), golden(), ignored(FIGURE, "another"), normal=False,
                  shown=False)
    hygiene.normalise(path, say=said.append)
    assert kept(path) == [] and "figures need a Chromium" in said[0]


def test_pictures_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(hygiene, "PICTURE_BYTES", 150)  # each has about 120
    path = stored(tmp_path, defaults_cell(), golden(),
                  ignored({"image/png": picture("red")}, "red"))
    assert len(kept(path)) == 1


def test_a_notebook_without_a_picture_is_named(tmp_path):
    path = stored(tmp_path, defaults_cell(), golden(), shown=False)
    assert hygiene.problems(path) == [
        "stores no picture for GitHub to show; run xsd notebooks refresh where a Chromium is "
        "installed"]


def test_another_form_than_the_committed_one_is_named(tmp_path):
    path = stored(tmp_path, defaults_cell(), golden(), normal=False)
    assert "is not in its committed form; run xsd notebooks refresh" in hygiene.problems(path)


def test_code_in_the_parameters_cell_is_refused():
    cell = new_code_cell("seed: int = 0\nimport os", metadata={"tags": ["parameters"]})
    with pytest.raises(ParameterError, match="holds only lines such as"):
        hygiene.parameters_cell(new_notebook(cells=[cell]))
    cell.source = "seed = int(3)"
    with pytest.raises(ParameterError, match="plain literals"):
        hygiene.parameters_cell(new_notebook(cells=[cell]))


def test_committed_notebooks_are_clean():
    assert {
        path.stem: problems for path in hygiene.committed() if (problems := hygiene.problems(path))
    } == {}


def policy():
    spec = importlib.util.spec_from_file_location("notebook_policy",
                                                  ROOT / "notebooks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nbval_forgives_small_float_drift_and_nothing_else():
    close = policy().Close
    assert close("loss 0.5000 n 8") == close("loss 0.5002 n 8")
    assert close("loss 0.50 n 8") != close("loss 0.55 n 8")
    assert close("loss 0.5 n 8") != close("loss 0.5 n 9")
    assert close("loss 0.5") != close("cost 0.5")
    assert close("nan 1.0") == close("nan 1.0") and close("1.0") != close("1.0 2.0")
