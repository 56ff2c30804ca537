"""What a notebook's set-up cell makes, and on which data."""

import pytest

from xsd.runs import parameters
from xsd.steps import extraction, ready, training

BOTH = ["simulated", "davis_road"]


@pytest.fixture
def made(monkeypatch):
    """What would be extracted and trained."""
    asked = []
    monkeypatch.setattr(extraction, "run", lambda given: asked.append(
        ("pairs", given.data, given.test_data)))
    monkeypatch.setattr(training, "run", lambda given: asked.append(
        ("adapters", given.data, given.levels)))
    monkeypatch.setattr(extraction, "pair_file", lambda run_dir: {"data": "the/runs"})
    return asked


def test_a_missing_training_is_made_on_the_data_of_the_run(made):
    own = {"run_dir": "runs/none", "levels": ["L1"], "test_data": ["simulated"]}
    ready.ensure(parameters.TokenParameters.checked({**own, "data": "own/drives"}), adapters=True)
    ready.ensure(parameters.HiddenParameters.checked(own), adapters=True)
    assert made == [("pairs", "own/drives", ["simulated"]), ("adapters", "own/drives", ["L1"]),
                    ("pairs", "simulated", ["simulated"]), ("adapters", "the/runs", ["L1"])]


def test_only_what_is_asked_for_is_made(made):
    train = parameters.TrainParameters.checked({"run_dir": "runs/none"})
    ready.ensure(train)
    assert made == [("pairs", "simulated", BOTH)]
    ready.ensure(train, adapters=["L4"])
    assert made[1:] == [("pairs", "simulated", BOTH), ("adapters", "simulated", ["L4"])]
    ready.ensure(train, pairs=False)
    assert len(made) == 3


def test_what_is_there_is_left_alone(made, tmp_path, monkeypatch):
    (tmp_path / extraction.PAIR_FILE).parent.mkdir()
    (tmp_path / extraction.PAIR_FILE).write_text("{}")
    own = parameters.TrainParameters.checked({"run_dir": str(tmp_path)})
    ready.ensure(own)
    assert made == []
    monkeypatch.setattr(training, "trained", lambda run_dir: ["L4"])
    ready.ensure(own, adapters=True)
    assert made == []


def test_a_run_on_pairs_from_elsewhere_gets_no_token_table_of_other_pairs(made, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "named.json").write_text('{"train": ["elsewhere"]}')
    compare = parameters.CompareParameters.checked({"run_dir": str(tmp_path),
                                                    "runs": [str(tmp_path)]})
    ready.ensure(compare, tokens=True)
    assert made == []
