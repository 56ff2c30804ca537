"""Training and held-out sets named by path: what the verb extracted, a shard folder, another run,
and chunks of the first scripts go through the steps of notebooks 02, 03 and 04."""

import shutil

import pytest
from tiny_pair import make_tiny_pair

from xsd import cli
from xsd.core import ParameterError
from xsd.embedded import drive
from xsd.evaluate import hidden, table
from xsd.runs import folder, parameters
from xsd.steps import data as datasets
from xsd.steps import evaluation, extraction, ready, training

LEVELS = ["L1", "B1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two extractions by verb (train in both modes, test), and the pair they are of."""
    root = tmp_path_factory.mktemp("by_path")
    pair = make_tiny_pair(root / "pair", seed=4)
    for split, modes in (("train", "teacher_forced,free_running"), ("test", "teacher_forced")):
        drive.write_dataset(root / "drives", split=split, n_sequences=2, seed=7, workers=1)
        assert cli.main(["data", "extract", str(root / "drives"), "-o", str(root / split),
                         "--pair", str(pair), "--split", split, "--modes", modes,
                         "--max-questions", "2", "--max-new-tokens", "8"]) == 0  # fmt: skip
    return root


@pytest.fixture(scope="module")
def found(place):
    """The steps of 02, 03 and 04 on those paths, in a run of their own."""
    run, train, test = (str(place / name) for name in ("run", "train", "test"))
    training_given = parameters.TrainParameters.checked(
        {"run_dir": run, "data": train, "levels": LEVELS, "epochs": 1})
    ready.ensure(training_given)
    training.run(training_given)
    given = {"run_dir": run, "levels": LEVELS, "test_data": [test], "resamples": 50}
    hidden_given = parameters.HiddenParameters.checked(given)
    ready.ensure(hidden_given, adapters=True)
    adapters = training.load(run, LEVELS)
    pairs = evaluation.held_out_sets(run, hidden_given.test_data, hidden_given.mode)
    states = {name: table.measure(adapters, one, gamma=None) for name, one in pairs.items()}
    figures = {name: hidden.figures(one, n_resamples=50) for name, one in states.items()}
    results = evaluation.hidden(figures, adapters, pairs, threshold=0.9)
    evaluation.save(run, "hidden", results, pairs, hidden_given.model_dump(), figures)
    tokens = ready.token_table(parameters.TokenParameters.checked({**given, "data": train}))
    return run, pairs, tokens


def test_what_the_verb_extracted_is_trained_on_and_judged_and_nothing_else_is_extracted(found):
    run, pairs, tokens = found
    assert list(tokens["test"]) == ["test"] and list(pairs) == ["test"]
    assert not (folder.resolve(run) / extraction.PAIR_FILE).exists()
    assert set(folder.load_results(run)) == {"train", "hidden", "tokens"}
    rows = folder.load_tokens(run)
    assert rows["draft_token"].notna().all() and "kind" in rows, "texts are known"
    assert set(tokens["test"]["test"]["rows"]) == {*LEVELS, "drafter_tokens", "position_mode",
                                                   "ngram", "prompt_lookup"}  # fmt: skip


def test_the_pictures_of_a_sample_come_from_the_folder_that_was_extracted(found):
    _, pairs, _ = found
    sample = pairs["test"].load(3)
    assert sample.key == pairs["test"].keys[3] and len(sample.event_frames) == 5


def test_a_training_sequence_by_path_is_refused_among_the_held_out(found, place):
    run, *_ = found
    with pytest.raises(Exception, match="sequences are in training and in test"):
        evaluation.held_out_sets(run, [str(place / "train")], "teacher_forced")


def test_a_shard_folder_an_extraction_and_a_run_are_one_set(place):
    train, other = place / "train", place / "other"
    shutil.copytree(train, other / "shards" / "train_drives")
    for path in (train, train / "teacher_forced", other, other / "shards" / "train_drives"):
        found = extraction.open_pairs(place / "run", "train", str(path), "teacher_forced")
        assert len(found) == 16 and found.mode == "teacher_forced"
        assert datasets.name_of(str(path)) in ("train", "other", "train_drives")
    shutil.copytree(train, other / "shards" / "train_more")
    with pytest.raises(ParameterError, match=r"2 train sets \(train_drives, train_more\); name"):
        extraction.open_pairs(place / "run", "train", str(other))


def test_a_mode_is_chosen_only_where_it_is_the_only_one(place):
    run = place / "run"
    assert extraction.open_pairs(run, "test", str(place / "test"),
                                 "free_running").mode == "teacher_forced"
    assert extraction.open_pairs(run, "train", str(place / "train")).mode == "teacher_forced"
    assert extraction.open_pairs(run, "train", str(place / "train"),
                                 "free_running").mode == "free_running"
