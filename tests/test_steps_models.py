"""How the models are loaded is a parameter of every notebook that loads a pair: 00, 01, 05, 09."""

import pytest
import torch
from tiny_pair import make_tiny_pair

from studies.gap import counterfactual
from xsd.core import ParameterError
from xsd.models import loading
from xsd.runs import folder, parameters
from xsd.steps import extraction, live, training

SIZES = {"test_data": ["simulated"], "n_train_sequences": 2, "n_test_sequences": 1,
         "questions_per_sequence": 2, "max_new_tokens": 6, "workers": 1,
         "test_modes": ["teacher_forced"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run extracted, trained and told about in bfloat16."""
    place = tmp_path_factory.mktemp("bf16")
    own = {"run_dir": str(place / "run")}
    pair = str(make_tiny_pair(place / "pair", seed=4))
    extraction.run(parameters.ExtractParameters.checked(
        {**own, **SIZES, "pair": pair, "dtype": "bfloat16"}))
    training.run(parameters.TrainParameters.checked({**own, "levels": ["L1"], "epochs": 1}))
    return place


def live_of(place, **values):
    return parameters.LiveParameters.checked(
        {"run_dir": str(place / "run"), "pair": str(place / "pair"), "test_data": ["simulated"],
         "arms": ["ar", "L1"], "check_arms": ["L1"], "max_new_tokens": 6, "repeats": 1, **values})


@pytest.mark.parametrize("notebook", ["00", "01", "05", "09"])
def test_notebooks_that_load_a_pair_say_how(notebook):
    model = parameters.model_of(notebook)
    assert model.checked({"quant": "int8", "dtype": "bfloat16", "device": "cuda"}).loads == {
        "quant": "8bit", "dtype": "bfloat16", "device": "cuda"}
    assert model.checked({}).loads == {"quant": None, "dtype": "float32", "device": "cpu"}
    for wrong in ({"quant": "2bit"}, {"dtype": "int8"}):
        with pytest.raises(ParameterError, match=f"parameter '{next(iter(wrong))}'"):
            model.checked(wrong)


def test_a_run_in_bfloat16_goes_on_in_bfloat16(place):
    opened = live.open_bench(live_of(place, dtype="bfloat16"))
    assert opened.pair.verifier.head.weight.dtype == torch.bfloat16
    records = live.measure(opened, opened.arms(["ar", "L1"]))
    assert len(records) == 2 * len(opened.timed["simulated"])
    own = folder.load_results(opened.given.run_dir)["extract"]["weights"]
    assert own["drafter"] == opened.pair.drafter.weights_hash()
    drafter = counterfactual.drafter_of(opened.given.run_dir)
    assert drafter.head.weight.dtype == torch.bfloat16


def test_other_numbers_than_the_runs_are_refused(place):
    with pytest.raises(ParameterError, match="was extracted with other weights"):
        live.open_bench(live_of(place))


def test_a_device_that_is_not_here_is_said_in_one_sentence():
    with pytest.raises(ParameterError, match="device='gpu' is none that torch knows"):
        loading.load_pair("embedded", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="no GPU is visible to torch; use cpu"):
            loading.load_pair("embedded", device="cuda", quant="4bit")
