"""Executing notebooks with checked parameters."""

import errno
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from toy_notebook import Toy, write

from tools import hygiene
from xsd.core import ParameterError, StorageError
from xsd.runs import notebooks


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


def test_a_dying_kernel_a_slow_cell_and_a_full_disk_are_named(toy, tmp_path, monkeypatch):
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    for error, kind, words in (
            (DeadKernelError("Kernel died"), notebooks.NotebookError, "its kernel died"),
            (CellTimeoutError("too slow"), notebooks.NotebookError, "a cell took too long"),
            (OSError(errno.ENOSPC, "No space left on device"), StorageError, "the disk is full")):

        def execute(*paths, error=error, **options):
            raise error

        monkeypatch.setattr(papermill, "execute_notebook", execute)
        with pytest.raises(kind, match=words):
            notebooks.run_notebook(toy, tmp_path / "out", model=Toy)


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
