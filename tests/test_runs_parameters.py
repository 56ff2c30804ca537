"""Typed parameters: what is wrong is said before anything runs."""

import re
from types import SimpleNamespace

import nbformat
import pytest

from tools import hygiene
from xsd.core import ParameterError
from xsd.runs import parameters, typed


def test_every_notebook_has_a_model_whose_defaults_are_valid_and_described():
    numbers = [name[:2] for name in parameters.NOTEBOOKS]
    assert numbers == sorted(
        set(numbers)) and numbers[:10] == [f"{number:02d}" for number in range(10)]
    for model in map(parameters.model_of, parameters.NOTEBOOKS):
        model.checked({})
        assert all(field.description for field in model.model_fields.values())


def test_a_misspelt_parameter_gets_a_suggestion():
    with pytest.raises(
            ParameterError, match=
            "notebook 01_extract has no parameter 'max_new_token': did you mean 'max_new_tokens'"):
        parameters.ExtractParameters.checked({"max_new_token": 3})


@pytest.mark.parametrize(("values", "words"), [
    ({"seed": "3"}, "parameter 'seed' of notebook 02_train cannot be '3'"),
    ({"seed": True}, "cannot be True"),
    ({"epochs": 0},
     "parameter 'epochs' of notebook 02_train cannot be 0: input should be greater than or equal "
     "to 1"
     ), ({"levels": ["L9"]}, "parameter 'levels.0' of notebook 02_train cannot be 'L9'"),
    ({"levels": []}, "cannot be \\[\\]"),
],
                         )
def test_ill_typed_and_out_of_range_values_are_named(values, words):
    with pytest.raises(ParameterError, match=words):
        parameters.TrainParameters.checked(values)


def test_an_adapter_may_be_named_by_its_path_where_levels_are_evaluated():
    path = "runs/a/adapters/L4/best.safetensors"
    model = parameters.TruthParameters.checked({"levels": ["L1", path], "waterfall": path})
    assert model.levels == ["L1", path] and model.waterfall == "L4 of a"
    assert model.model_dump()["levels"] == ["L1", path], "a path is kept as it was given"
    with pytest.raises(ParameterError, match="is trained already; name a level to train"):
        parameters.TrainParameters.checked({"levels": [path]})


def test_from_namespace_takes_its_own_names_and_leaves_the_rest():
    model = parameters.TrainParameters.from_namespace(
        {"seed": 4, "levels": ["L2"], "something_else": object()})
    assert (model.seed, model.levels,
            model.epochs) == (4, ["L2"], parameters.TrainParameters.checked({}).epochs)
    with pytest.raises(ValueError, match="frozen"):
        model.seed = 5


def test_values_of_the_command_line_are_typed_by_the_model():
    read = typed.read_values(["levels=L1,L5F", "seed=007", "learning_rate=1e-4", "run_dir=12"],
                                  parameters.TrainParameters)
    assert read == {"levels": ["L1", "L5F"], "seed": 7, "learning_rate": 1e-4, "run_dir": "12"}
    parameters.TrainParameters.checked(read)
    for text, words in (("seed", "written name=value"), ("levels=[L1", "cannot be read"),
                        ("learning_rate=1e", "must be a number")):
        with pytest.raises(ParameterError, match=words):
            typed.read_values([text], parameters.TrainParameters)


def test_levels_are_open_to_ones_own():
    mine = SimpleNamespace(reads="drafter", shift=0, forward=len, level="mine")
    given = parameters.HiddenParameters.checked({"levels": ["L1", "my_levels:Mine", mine]})
    assert given.levels == ["L1", "my_levels:Mine", mine]
    assert given.model_dump()["levels"] == ["L1", "my_levels:Mine", "mine"]
    read = typed.read_values(["levels=L1,my_levels:Mine"], parameters.TrainParameters)
    assert read == {"levels": ["L1", "my_levels:Mine"]}
    parameters.TrainParameters.checked({"levels": ["L6"]})
    with pytest.raises(ParameterError, match=r"one of L1, .*, B1, an adapter.s file .* your own"):
        parameters.HiddenParameters.checked({"levels": ["L6"]})


def test_notebooks_are_found_by_number_stem_and_path():
    for name in ("05", "05_live", "notebooks/05_live.ipynb"):
        assert parameters.model_of(name) is parameters.LiveParameters
    with pytest.raises(ParameterError, match="did you mean '05_live'"):
        parameters.model_of("05_life")


def test_an_arm_is_a_name_of_ours_a_level_or_ones_own():
    arms = ["ar", "L1+ngram@3", "B1~0.6", "my_levels:Mine+L5F", "my_proposers:Echo"]
    assert parameters.LiveParameters.checked({"arms": arms}).arms == arms
    for wrong in ("L1+L4+L5F", "L9", 3, "mine:"):
        with pytest.raises(ParameterError, match=r"should be one of ar, .* such as L1\+ngram"):
            parameters.LiveParameters.checked({"arms": [wrong]})


def test_the_parameters_cells_say_what_the_models_say():
    for path in hygiene.committed():
        cells = nbformat.read(path, 4).cells
        text = next(one.source for one in cells if "parameters" in one.metadata.get("tags", []))
        said = re.sub(r"(?m)^(# .*)\n# ", r"\1 ", text)
        for field in parameters.model_of(path.stem).model_fields.values():
            assert f"# {field.description}" in said
