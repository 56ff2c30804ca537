"""Grids of notebooks: what fails, what resumes, what points share, and their table."""

import json
import os

import pytest
from toy_notebook import Toy, write

from xsd.core import ParameterError
from xsd.runs import folder
from xsd.steps import sweep


@pytest.fixture
def toy(tmp_path):
    return write(tmp_path / "toy.ipynb", "import os",
                 "if size == 4: os._exit(1)\nassert size != 3, 'three is too many'")


def test_a_sweep_survives_failing_runs_says_so_and_resumes(toy, tmp_path):
    said, grid, place = [], {"size": [2, 3, 4]}, tmp_path / "sweep"
    rows = sweep.run(toy, grid, place, model=Toy, say=said.append)
    assert [row["status"] for row in rows] == ["finished", "failed", "failed"]
    assert "toy.ipynb stopped in code cell [4]: AssertionError: three is too" in rows[1]["error"]
    assert "its kernel died" in rows[2]["error"]
    assert (place / rows[1]["name"] / "toy.ipynb").is_file()  # the failed copy is kept
    stored = (place / rows[0]["name"] / "toy.ipynb").stat().st_mtime_ns
    rows = sweep.run(toy, {"size": [2, 3]}, place, model=Toy, say=said.append)
    assert (place / rows[0]["name"] / "toy.ipynb").stat().st_mtime_ns == stored
    assert "already finished" in said[3] and rows[1]["status"] == "failed"
    kept = json.loads((place / "sweep.json").read_text())["runs"]
    assert [row["status"] for row in kept] == ["finished", "failed", "failed"]
    assert list(sweep.metrics(rows)) == ["size", "seconds", "status"]
    write(toy, "print(1)")
    with pytest.raises(ParameterError, match="another notebook version"):
        sweep.run(toy, {"size": [2]}, place, model=Toy)


def test_several_points_at_a_time_compute_on_their_share_of_the_cores(toy, tmp_path):
    write(toy, "import os, pathlib, time",
          "here = pathlib.Path(run_dir)\nhere.mkdir(parents=True)\n"
          "(here / 'threads').write_text(os.environ['OMP_NUM_THREADS'])\n"
          "end = time.time() + 60\n"  # each waits for the other
          "while len(list(here.parents[1].glob('*/run/threads'))) < 2 and time.time() < end:\n"
          "    time.sleep(0.1)\nassert time.time() < end")
    rows = sweep.run(toy, {"size": [1, 2]}, tmp_path / "sweep", model=Toy, jobs=2)
    assert [row["status"] for row in rows] == ["finished"] * 2
    threads = (folder.resolve(rows[0]["run_dir"]) / "threads").read_text()
    assert int(threads) == max(1, os.cpu_count() // 2) and "OMP_NUM_THREADS" not in (
        set(os.environ) - {"OMP_NUM_THREADS"})


def test_points_of_other_notebooks_have_their_own_run_or_the_one_named(toy, tmp_path):
    P = Toy.checked({})
    _, _, given, _, base, levels = sweep._task(toy, tmp_path / "a", {"size": 1}, P)
    assert given["run_dir"] == str(tmp_path / "a" / "run") and base is None and levels == []
    named = sweep._task(toy, tmp_path / "a", {"size": 1, "run_dir": "runs/one"}, P)[2]
    assert named["run_dir"] == "runs/one"


def test_a_sweep_with_an_impossible_point_runs_nothing(toy, tmp_path):
    with pytest.raises(ParameterError, match="'size' of notebook toy cannot be 0"):
        sweep.run(toy, {"size": [2, 0]}, tmp_path / "sweep", model=Toy)
    with pytest.raises(ParameterError, match="the grid gives no value for 'size'"):
        sweep.points_of({"size": []})
    with pytest.raises(ParameterError, match="nothing is varied"):
        sweep.points_of({})
    assert not (tmp_path / "sweep").exists()


def test_names_of_points_are_readable_and_distinct():
    names = list(sweep.points_of({"levels": [["L1"], ["L1", "L4"]], "seed": [0, 1]}))
    assert len(set(names)) == 4 and names[2].startswith("levels=L1+L4_seed=0_")
