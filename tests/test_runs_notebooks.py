"""Executing notebooks with checked parameters, and grids of them."""

import errno
import json
from typing import ClassVar

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pydantic import Field

from tools import hygiene
from xsd.core import ParameterError
from xsd.runs import notebooks, typed


class Toy(typed.NotebookParameters):
    notebook: ClassVar[str] = "toy"
    size: int = Field(2, ge=1, description="how many")


def write(path, *code, tags=()):
    cells = [
        new_markdown_cell("# Toy"),
        new_code_cell('run_dir: str = "runs/smoke"\nseed: int = 0\nsize: int = 2',
                      metadata={"tags": ["parameters"]}),
    ]
    cells += [new_code_cell(text, metadata={"tags": list(tags)} if tags else {}) for text in code]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def toy(tmp_path):
    return write(tmp_path / "toy.ipynb", "print(size * 10)",
                 "import os; print(os.getcwd()); assert size != 3, 'three is too many'")


def test_a_run_leaves_the_executed_copy_and_its_provenance(toy, tmp_path):
    target = notebooks.run_notebook(toy, tmp_path / "out", {"size": 5}, model=Toy)
    cells = nbformat.read(target, 4).cells
    assert next(cell.outputs[0].text for cell in cells if cell.get("outputs")) == "50\n"
    record = json.loads(target.with_suffix(".provenance.json").read_text())
    assert record["status"] == "finished" and record["parameters"]["size"] == 5 and record[
        "git_revision"]
    assert "widgets" not in nbformat.read(target, 4).metadata


def test_a_wrong_parameter_is_an_error_before_anything_runs(toy, tmp_path):
    with pytest.raises(ParameterError, match="has no parameter 'sise': did you mean 'size'"):
        notebooks.run_notebook(toy, tmp_path / "out", {"sise": 5}, model=Toy)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ParameterError, match="there is no notebook at"):
        notebooks.run_notebook(tmp_path / "other.ipynb", tmp_path / "out", model=Toy)


def test_a_sweep_survives_a_failing_run_says_so_and_resumes(toy, tmp_path):
    said = []
    rows = notebooks.sweep(toy, {"size": [2, 3]}, tmp_path / "sweep", model=Toy, say=said.append)
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert "notebook toy.ipynb stopped in code cell [4]: AssertionError: three is too many" in rows[
        1]["error"]
    assert (tmp_path / "sweep" / rows[1]["name"] / "toy.ipynb").is_file()  # the failed copy is kept
    stored = (tmp_path / "sweep" / rows[0]["name"] / "toy.ipynb").stat().st_mtime_ns
    rows = notebooks.sweep(toy, {"size": [2, 3]}, tmp_path / "sweep", model=Toy, say=said.append)
    assert (tmp_path / "sweep" / rows[0]["name"] / "toy.ipynb").stat().st_mtime_ns == stored
    assert "already finished" in said[2] and [row["status"]
                                              for row in rows] == ["finished", "failed"]
    assert [
        row["status"] for row in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    ] == ["finished", "failed"]
    assert notebooks.table(rows).splitlines()[0].split() == ["size", "status", "seconds"]
    write(toy, "print(1)")
    with pytest.raises(ParameterError, match="another notebook version"):
        notebooks.sweep(toy, {"size": [2]}, tmp_path / "sweep", model=Toy)


def test_a_sweep_survives_a_dying_kernel_and_a_full_disk(toy, tmp_path, monkeypatch):
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    errors = iter([
        DeadKernelError("Kernel died"),
        CellTimeoutError("too slow"),
        OSError(errno.ENOSPC, "No space left on device")
    ])

    def execute(*paths, **options):
        raise next(errors)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    rows = notebooks.sweep(toy, {"size": [1, 2, 4]}, tmp_path / "sweep", model=Toy,
                           say=lambda *_, **__: None)
    assert [row["status"] for row in rows] == ["failed"] * 3
    for row, words in zip(rows,
                          ("its kernel died", "a cell took too long", "No space left on device"),
                          strict=True):
        assert words in row["error"]


def test_every_point_of_a_sweep_has_its_own_run(toy, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(notebooks, "run_notebook", lambda source, out, params, model: given.append(
        (out, params)))
    notebooks.sweep(toy, {"size": [1, 2]}, tmp_path / "a", model=Toy, say=lambda *_: None)
    assert [params["run_dir"] for _, params in given] == [str(out / "run") for out, _ in given]
    notebooks.sweep(toy, {"size": [1]}, tmp_path / "b", fixed={"run_dir": "runs/one"}, model=Toy,
                    say=lambda *_: None)
    assert given[-1][1]["run_dir"] == "runs/one"


def test_a_sweep_with_an_impossible_point_runs_nothing(toy, tmp_path):
    with pytest.raises(ParameterError, match="'size' of notebook toy cannot be 0"):
        notebooks.sweep(toy, {"size": [2, 0]}, tmp_path / "sweep", model=Toy)
    with pytest.raises(ParameterError, match="the grid gives no value for 'size'"):
        notebooks.grid_points({"size": []})
    assert not (tmp_path / "sweep").exists()


def test_names_of_grid_points_are_readable_and_distinct():
    points = notebooks.grid_points({"levels": [["L1"], ["L1", "L4"]], "seed": [0, 1]})
    names = [notebooks.point_name(point) for point in points]
    assert len(set(names)) == 4 and names[2].startswith("levels=L1+L4_seed=0_")


def test_no_widget_state_is_stored(tmp_path):
    path = write(tmp_path / "toy.ipynb", "import ipywidgets; ipywidgets.IntSlider(7)")
    target = notebooks.run_notebook(path, tmp_path / "out", model=Toy)
    assert "IntSlider(value=7" in target.read_text()
    assert "widgets" not in nbformat.read(target, 4).metadata


def test_refreshing_twice_gives_the_same_bytes_and_keeps_golden_cells_only(tmp_path):
    path = write(tmp_path / "toy.ipynb", "print(size * 10)")
    book = nbformat.read(path, 4)
    book.cells.append(
        new_code_cell("import time; time.time()",
                      metadata={"tags": ["nbval-ignore-output"], "jupyter": {"x": 1}}))
    nbformat.write(book, path)
    hygiene.refresh(path)
    first = path.read_bytes()
    hygiene.refresh(path)
    assert path.read_bytes() == first
    cells = nbformat.read(path, 4).cells
    assert cells[2].outputs[0].text == "20\n" and cells[3].outputs == [] and cells[
        3].execution_count is None


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path):
    path = write(tmp_path / "toy.ipynb", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(notebooks.NotebookError,
                       match=r"toy\.ipynb does not run: ZeroDivisionError"):
        hygiene.refresh(path)
    assert path.read_bytes() == before
