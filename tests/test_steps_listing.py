"""What ``xsd runs`` says of run folders."""

import json

import pytest

from xsd import cli
from xsd.core import ParameterError
from xsd.runs import folder, listing


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def finished(run, gamma, **extract):
    given = {"run_dir": str(run), "seed": 0}
    folder.save_results(run, "extract", {"provenance": {"parameters": {
        **given, "batch_size": 32, **extract}}})
    rows = {"L4": {"label": "L4", "accepted_per_round": interval(gamma / 2)}}
    folder.save_results(run, "tokens", {
        "test": {"davis_road": {}, "simulated": {"best_adapter": "L4", "rows": rows}},
        "provenance": {"parameters": {**given, "gamma": gamma, "batch_size": 64,
                                      "levels": ["L1", "L4"]}}})
    return run


@pytest.fixture
def runs(tmp_path):
    finished(tmp_path / "a", 3)
    live = finished(tmp_path / "report" / "run", 5)
    arms = {"ar": {"label": "own greedy loop"}, "L4": {"label": "L4", "speedup": interval(1.2)}}
    folder.save_results(live, "live", {"arms": arms, "best_arm": "L4", "baseline": "ar"})
    return tmp_path


def test_runs_are_listed_with_what_differs_and_what_came_of_them(runs, capsys):
    assert cli.main(["runs", str(runs)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "01 04" in first and "L4 1.50 [1.40, 1.60]" in " ".join(first.split())
    assert "L4 1.20 [1.10, 1.30] own greedy loop" in " ".join(second.split())
    found = listing.listing([runs])
    assert list(found["gamma"]) == ["3", "5"]
    assert not {"levels", "seed", "run_dir", "batch_size"} & set(found.columns)
    assert cli.main(["runs", str(runs), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[1]["accepted per round low"] == pytest.approx(2.4) and rows[0]["speed-up"] is None
    stored = json.loads((runs / "report/run/results/live.json").read_text())
    folder.save_results(runs / "report/run", "live", {**stored, "busy": True})
    assert listing.listing([runs])["speed-up"].isna().all()
    assert cli.main(["runs", str(runs), "--csv"]) == 0
    assert capsys.readouterr().out.startswith("run,date,MB,holds,notebooks,gamma,data,")


def test_a_name_that_notebooks_of_one_run_were_given_differently_stands_for_each(tmp_path):
    finished(tmp_path / "a", 3)
    finished(tmp_path / "b", 3, batch_size=16)
    assert list(listing.listing([tmp_path])["batch_size"]) == ["32", "16"]
    made = [{"02": {"batch_size": 1}, "04": {"batch_size": 2}},
            {"02": {"batch_size": 8}, "04": {"batch_size": 9}}, {"04": {"batch_size": 9}}]
    assert listing.differing(made) == [{"02 batch_size": "1", "04 batch_size": "2"},
                                       {"02 batch_size": "8", "04 batch_size": "9"},
                                       {"04 batch_size": "9"}]


@pytest.mark.parametrize(("text", "why"), [
    ("", "is not JSON"), ("[" * 100_000, "nested too deep"), ("[]", "holds list and no fields"),
    ('{"provenance": 5}', "is not what our notebooks"),
    ('{"test": {"simulated": 5}}', "is not what our notebooks"),
    ('{"provenance": {"parameters": []}}', "is not what our notebooks"),
    ('{"test": {"simulated": {"best_adapter": "L4", "rows": {"L4": {"accepted_per_round": '
     '{"value": "many", "low": null, "high": null}}}}}}', "could not convert string to float")])
def test_a_run_that_cannot_be_read_is_listed_with_the_reason_beside_the_others(runs, text, why):
    (runs / "a" / "results" / "tokens.json").write_text(text)
    (runs / "a" / "results" / "digests.jsonl").unlink()  # that alone would say that it was changed
    found = listing.listing([runs])
    assert why in found["problem"][0] and folder.AGAIN in found["problem"][0]
    assert found["problem"].isna().tolist() == [False, True] and found["best arm"][1] == "L4"
    with pytest.raises(ParameterError, match=why):
        listing.overview([str(runs / "a"), str(runs / "report" / "run")])


def test_a_sweep_stands_for_the_runs_in_its_own_folder(runs, tmp_path):
    row = {"name": "p", "status": "finished", "run_dir": str(runs / "a")}
    place = tmp_path / "sweep"
    place.mkdir()
    (place / "sweep.json").write_text(json.dumps({"runs": [row]}))
    with pytest.raises(ParameterError, match=r"are not in its folder but in .*give that run"):
        listing.runs_of([str(place)])
    (place / "p" / "run").mkdir(parents=True)  # a folder that was moved here
    assert listing.runs_of([str(place)]) == [str(place / "p" / "run")]
