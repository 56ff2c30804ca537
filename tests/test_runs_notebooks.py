"""Executing notebooks with checked parameters."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from toy_notebook import Toy, write

from tools import hygiene
from xsd.core import ParameterError, StorageError
from xsd.files import FolderLock
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
            (RuntimeError("Kernel died before replying"), notebooks.NotebookError, "kernel died"),
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


def cell(**changes):
    return {"cell_type": "code", "id": "a", "metadata": {}, "source": "1", "outputs": [],
            "execution_count": None, **changes}


def book(*cells, **changes):
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": list(cells),
                       **changes}).encode()


@pytest.mark.parametrize(("data", "said"), [
    (b"", "is not JSON"), (b"\x89PNG", "is not JSON"), (b"[" * 300_000, "nested too deep"),
    (b"[]", "no notebook of format 4"), (book(nbformat=3), "no notebook of format 4"),
    (book(nbformat="4"), "no notebook of format 4"), (book(cells={}), "damaged notebook"),
    (book(cell(source=5)), "damaged notebook"), (book(cell(outputs="x")), "damaged notebook"),
    (book(cell(metadata={"tags": 5})), "damaged notebook"),
    (book(metadata={"kernelspec": 5}), "damaged notebook"),
    (book(metadata={"papermill": 5}), "damaged notebook"),
    (book(cell(metadata={"papermill": []})), "damaged notebook"),
    (book(cell(source="\ud800")), "damaged notebook"),
    (book(metadata={"language_info": {"name": "R"}}), "is a notebook of 'R'"),
    (book(metadata={"kernelspec": {"name": "ir", "display_name": "", "language": "R"}}),
     "is a notebook of 'R'"),
])
def test_what_is_no_notebook_of_python_is_refused_before_anything_runs(data, said, tmp_path):
    path = tmp_path / "toy.ipynb"
    path.write_bytes(data)
    with pytest.raises(ParameterError, match=said) as refused:
        notebooks.run_notebook(path, tmp_path / "out", model=Toy)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_notebook_names_no_kernel_and_needs_a_cell_for_its_parameters(tmp_path):
    named = {"name": "../../bin/evil", "display_name": "x", "argv": ["sh", "-c", "exit 3"]}
    nbformat.write(new_notebook(cells=[new_code_cell("print('ran')")],
                                metadata={"kernelspec": named}), tmp_path / "toy.ipynb")
    data = (tmp_path / "toy.ipynb").read_bytes()
    (tmp_path / "toy.ipynb").write_bytes(b"\xef\xbb\xbf" + data)  # a byte-order mark is read over
    target = notebooks.run_notebook(tmp_path / "toy.ipynb", tmp_path / "{out}", model=Toy)
    assert "ran" in target.read_text()
    with pytest.raises(ParameterError, match="no cell tagged 'parameters'"):
        notebooks.run_notebook(tmp_path / "toy.ipynb", tmp_path / "{out}", {"size": 3}, model=Toy)


def test_two_runs_of_a_notebook_into_one_folder_or_run_do_not_mix(toy, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for place in (tmp_path / "out", run):
        with FolderLock(place, ".toy.lock"), pytest.raises(StorageError, match="being written by"):
            notebooks.run_notebook(toy, tmp_path / "out", {"run_dir": str(run)}, model=Toy)
    with FolderLock(tmp_path / "out", ".other.lock"):  # another notebook's
        notebooks.run_notebook(toy, tmp_path / "out", {"run_dir": str(run)}, model=Toy)


def test_a_killed_run_leaves_the_earlier_copy_no_kernel_and_nothing_for_long(tmp_path):
    path = write(tmp_path / "toy.ipynb", "import os, pathlib, time",
                 "if size == 5:\n    pathlib.Path(run_dir).write_text(str(os.getpid()))\n"
                 "    time.sleep(60)")
    before = notebooks.run_notebook(path, tmp_path / "out", model=Toy).read_bytes()
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from toy_notebook import Toy\n"
            "from xsd.runs import notebooks\n"
            "given = {'size': 5, 'run_dir': sys.argv[4]}\n"
            "notebooks.run_notebook(*sys.argv[2:4], given, model=Toy)")
    child = subprocess.Popen([sys.executable, "-c", code, os.path.dirname(__file__), path,
                              tmp_path / "out", tmp_path / "kernel"])
    while not ((tmp_path / "kernel").is_file() and (tmp_path / "kernel").read_text()):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kernel = int((tmp_path / "kernel").read_text())
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{kernel}/cmdline") and Path(
            f"/proc/{kernel}/cmdline").read_bytes():
        assert time.monotonic() < end, "the kernel outlived the run"
        time.sleep(0.1)
    assert (tmp_path / "out" / "toy.ipynb").read_bytes() == before
    assert list((tmp_path / "out").glob(".*.part"))
    notebooks.run_notebook(path, tmp_path / "out", model=Toy)
    assert not [*(tmp_path / "out").glob(".*")]
    assert not [one for one in Path(tempfile.gettempdir()).glob("xsd-kernel-*")
                if str(child.pid) in (one / "writer.lock").read_text()]


def test_a_run_that_goes_well_says_nothing(toy, tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from toy_notebook import Toy\n"
            "from xsd.runs import notebooks; notebooks.run_notebook(*sys.argv[2:], model=Toy)")
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), toy,
                           tmp_path / "out"], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
