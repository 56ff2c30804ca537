"""Grids of notebooks: what fails, what resumes, what points share, and their table."""

import json
import os

import pytest
from tiny_pair import make_tiny_pair
from toy_notebook import Toy, write

from xsd import cli
from xsd.core import ParameterError, StorageError
from xsd.files import FolderLock
from xsd.runs import folder, notebooks, parameters
from xsd.steps import extraction, sweep, training


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


def test_a_point_that_ended_before_its_sweep_was_killed_is_not_run_again(toy, tmp_path):
    said, place = [], tmp_path / "sweep"
    [row] = sweep.run(toy, {"size": [2]}, place, model=Toy, say=said.append)
    copy = place / row["name"] / "toy.ipynb"
    at = copy.stat().st_mtime_ns
    record = json.loads((place / "sweep.json").read_text())
    (place / "sweep.json").write_text(json.dumps({**record, "runs": []}))
    [again] = sweep.run(toy, {"size": [2]}, place, model=Toy, say=said.append)
    assert again | {"seconds": 0} == row | {"seconds": 0} and copy.stat().st_mtime_ns == at
    assert said[-1].endswith("already finished")
    (place / "sweep.json").write_text(json.dumps({**record, "runs": []}))
    copy.write_bytes(copy.read_bytes() + b" ")  # not the one of the record
    sweep.run(toy, {"size": [2]}, place, model=Toy, say=said.append)
    assert copy.stat().st_mtime_ns != at


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


def test_points_share_what_they_have_in_common(tmp_path):
    def base(P, **given):
        return sweep._task(tmp_path / "x.ipynb", tmp_path / "sweep" / "p", given, P)[4:]

    tokens = parameters.TokenParameters.checked
    first = base(tokens({"gamma": 3, "levels": ["L1"]}))
    assert first == (base(tokens({"gamma": 5, "levels": ["L1"]}))[0], ["L1"])
    assert first[0].parent == tmp_path / "sweep" / "shared"
    assert base(tokens({"levels": ["L4"]})) == (first[0], ["L4"])
    assert base(tokens({"seed": 1}))[0] != first[0]
    assert base(tokens({"test_data": ["davis_road"]}))[0] != first[0]
    assert base(tokens({}), run_dir=str(tmp_path / "mine"))[0] == tmp_path / "mine"
    assert base(parameters.TrainParameters.checked({"epochs": 1}))[1] == []
    live = parameters.LiveParameters.checked({"arms": ["ar", "L5F+ngram"], "check_arms": ["L1"]})
    assert sorted(base(live)[1]) == ["L1", "L5F"]


def test_shared_levels_are_trained_once_and_linked_into_the_points(tmp_path, monkeypatch):
    pair = make_tiny_pair(tmp_path / "pair", seed=4)
    place, own = tmp_path / "shared", tmp_path / "point" / "run"
    extraction.run(parameters.ExtractParameters.checked({
        "run_dir": str(place), "pair": str(pair), "n_train_sequences": 3, "n_test_sequences": 2,
        "questions_per_sequence": 4, "max_new_tokens": 8, "workers": 1}))
    P = parameters.TokenParameters.checked({"run_dir": str(place)})
    assert sweep._make(P, ["L1"]) is None
    before = (place / "adapters" / "L1" / "best.safetensors").stat().st_mtime_ns
    assert sweep._make(P, ["L1", "L2"]) is None
    assert (place / "adapters" / "L1" / "best.safetensors").stat().st_mtime_ns == before
    assert sweep._make(P, ["nowhere:Level"]) is not None
    monkeypatch.setattr(notebooks, "run_notebook", lambda *_, **__: None)
    assert sweep._point(tmp_path, tmp_path, {"run_dir": str(own)}, type(P), place, ["L2"]) is None
    assert training.trained(own) == ["L2"] and list(training.load(own, ["L2"])) == ["L2"]
    held = [extraction.open_pairs(run, "test", "simulated", "teacher_forced").table()
            for run in (own, place)]
    assert held[0].equals(held[1]) and folder.data_hash(own) == folder.data_hash(place)


def test_metrics_of_points_become_one_table_and_a_busy_machine_claims_nothing(tmp_path):
    def ends(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    rows = [{"parameters": {"gamma": gamma, "levels": ["L1"]}, "status": "finished",
             "run_dir": str(tmp_path / str(gamma)), "seconds": 7.0} for gamma in (3, 5)]
    for row, busy in zip(rows, (False, True), strict=True):
        tokens = {"L1": {"kind": "adapter", "token_acceptance": ends(0.5),
                         "accepted_per_round": ends(2.0)}, "ngram": {"kind": "floor"}}
        arms = {"ar": {"label": "our loop", "baseline": True},
                "L1": {"baseline": False, "speedup": ends(1.1)}}
        folder.save_results(row["run_dir"], "tokens", {"test": {"simulated": {"rows": tokens}}})
        folder.save_results(row["run_dir"], "live", {"test": {"simulated": {
            "arms": arms, "baseline": "ar", "busy": busy}}})
    found = sweep.metrics([*rows, {**rows[0], "status": "failed"}])
    assert found["gamma"].tolist() == ["3", "5", "3"] and found["level"].tolist()[:2] == ["L1"] * 2
    assert found["accepted_per_round low"].tolist()[:2] == [1.9, 1.9]
    assert found["speedup"].tolist()[0] == 1.1 and found["speedup"][1:].isna().all()
    assert found["baseline"].tolist()[:2] == ["our loop"] * 2


def test_sweeps_in_one_folder_keep_each_other_s_rows(tmp_path, capsys):
    path, place = write(tmp_path / "06_compare.ipynb"), tmp_path / "sweep"
    for axis in ("seed=0,1", "seed=2", "seed=0,1"):
        assert cli.main(["sweep", str(path), axis, "-o", str(place)]) == 0
    assert capsys.readouterr().out.count("already finished") == 2
    table = (place / "sweep.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table] == ["seed", "0", "1", "2"]
    assert len(json.loads((place / "sweep.json").read_text())["runs"]) == 3


def test_one_sweep_at_a_time_and_none_over_what_is_fixed_or_unreadable(toy, tmp_path):
    place = tmp_path / "sweep"
    with FolderLock(place, "sweep.lock"), pytest.raises(StorageError, match="being written by"):
        sweep.run(toy, {"size": [2]}, place, model=Toy)
    with pytest.raises(ParameterError, match="size is varied and fixed"):
        sweep.run(toy, {"size": [2]}, place, fixed={"size": 3}, model=Toy)
    for text, said in (("[", "is not JSON"), ("[]", "is not what a sweep writes"),
                       ('{"runs": [{"run_dir": 5}]}', "is not what a sweep writes")):
        (place / "sweep.json").write_text(text)
        with pytest.raises(ParameterError, match=said):
            sweep.run(toy, {"size": [2]}, place, model=Toy)
