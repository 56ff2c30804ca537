"""The made-up extraction of benchmarks/many_pairs.py, much smaller: found by path, trained on and
judged, and it is something to find anything in."""

from benchmarks import many_pairs
from xsd.runs import parameters
from xsd.steps import extraction, ready, training


def test_made_up_pairs_are_trained_on_by_path_and_their_tokens_are_found(tmp_path):
    world, train, test = many_pairs.World(), tmp_path / "train", tmp_path / "held_out"
    many_pairs.write(train, world, 300, "train", 12)
    many_pairs.write(test, world, 100, "test", 5)
    many_pairs.write(test, world, 100, "test", 5)  # a finished one is found again
    run = str(tmp_path / "run")
    pairs = extraction.open_pairs(run, "train", str(train))
    assert len(pairs) == 300 and pairs.table()["sequence"].nunique() == 12
    assert pairs.drafter_size == many_pairs.WIDTH
    training.run(parameters.TrainParameters.checked(
        {"run_dir": run, "data": str(train), "levels": ["L1"], "recipe": "reference",
         "epochs": 1}))
    found = ready.token_table(parameters.TokenParameters.checked(
        {"run_dir": run, "data": str(train), "test_data": [str(test)], "levels": ["L1"],
         "resamples": 50}))
    rows = found["test"]["held_out"]["rows"]
    assert 0.7 < rows["drafter_tokens"]["token_acceptance"]["value"] < 0.9
    assert rows["ngram"]["token_acceptance"]["value"] > 0.2
