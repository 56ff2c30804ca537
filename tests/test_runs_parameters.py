"""Typed parameters: what is wrong is said before anything runs."""

import re
from types import SimpleNamespace

import nbformat
import pytest

from studies.parameters import TruthParameters
from tools import hygiene
from xsd.core import ParameterError
from xsd.runs import command_line, parameters


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
    model = TruthParameters.checked({"levels": ["L1", path], "waterfall": path})
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
    read = command_line.read_values(
        ["levels=L1,L5F", "seed=007", "learning_rate=1e-4", "run_dir=12"],
        parameters.TrainParameters)
    assert read == {"levels": ["L1", "L5F"], "seed": 7, "learning_rate": 1e-4, "run_dir": "12"}
    parameters.TrainParameters.checked(read)
    for text, words in (("seed", "written name=value"), ("levels=[L1", "cannot be read"),
                        ("learning_rate=1e", "expected a number, such as 0.5")):
        with pytest.raises(ParameterError, match=words):
            command_line.read_values([text], parameters.TrainParameters)


def test_levels_are_open_to_ones_own():
    mine = SimpleNamespace(reads="drafter", shift=0, forward=len, level="mine")
    given = parameters.HiddenParameters.checked({"levels": ["L1", "my_levels:Mine", mine]})
    assert given.levels == ["L1", "my_levels:Mine", mine]
    assert given.model_dump()["levels"] == ["L1", "my_levels:Mine", "mine"]
    read = command_line.read_values(["levels=L1,my_levels:Mine"], parameters.TrainParameters)
    assert read == {"levels": ["L1", "my_levels:Mine"]}
    parameters.TrainParameters.checked({"levels": ["L6"]})
    with pytest.raises(ParameterError, match=r"one of L1, .*, D5F, an adapter.s file .* your own"):
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


@pytest.mark.parametrize(("notebook", "text", "value"), [
    ("01", "seed=010", 10), ("01", "seed=1_000", 1000), ("01", "test_data=2024_01_01,0123,yes,~",
                                                         ["2024_01_01", "0123", "yes", "~"]),
    ("01", "run_dir=*a: [b", "*a: [b"), ("02", "epochs=none", None), ("02", "epochs=020", 20),
    ("02", "token_fusion=on", True), ("02", "options=dropout: 8e-1, L5: {layers: 2}",
                                      {"dropout": 0.8, "L5": {"layers": 2}}),
    ("02", "options={a: 010, b: 1:30, c: yes, d: 2024-01-01}",
     {"a": "010", "b": "1:30", "c": "yes", "d": "2024-01-01"}),
    ("03", "thresholds=8e-1,.9", [0.8, 0.9]), ("09", "questions=", []),
    ("09", "questions=Is it day?", ["Is it day?"]),
    ("09", "questions=What's ahead: #1?,- a car", ["What's ahead: #1?", "- a car"]),
    ("09", 'questions="Is it day, or night?",b', ["Is it day, or night?", "b"]),
    ("09", 'questions=["What [is] it, \\"this\\"?", b]', ['What [is] it, "this"?', "b"]),
    ("12", 'curve=ridge,"ridge, both",L1', ["ridge", "ridge, both", "L1"]),
    ("13", "timing={a: 1, b: 2.5}", {"a": 1, "b": 2.5}), ("13", "timing=a.json", "a.json"),
])
def test_a_text_is_read_as_its_parameter_s_type_asks(notebook, text, value):
    model = parameters.model_of(notebook)
    read = command_line.read_values([text], model)
    assert repr(read) == repr({text.partition("=")[0]: value})
    model.checked(read)


@pytest.mark.parametrize(("notebook", "text", "words"), [
    *[("01", f"seed={text}", "whole number") for text in (
        "0x10", "0b1", "0o7", "1:30", "1e3", "3.0", "yes", "~", "", "[3]", "9" * 5000, "\uff13")],
    *[("09", f"max_seconds={text}", "a number") for text in (
        "1:30", ".inf", "nan", "0x10", "1,5", "true", "")],
    *[("09", f"max_seconds={text}", "finite number") for text in ("1e400", "9" * 400)],
    ("01", f"seed={'9' * 30}", "below 2.63"), ("01", "seed=-1", "greater than or equal to 0"),
    *[("09", f"questions={text}", "quotes or brackets") for text in ('"a, b', "[a", "a]", "[[a]]")],
    ("09", "questions=a,,b", "nothing between two commas"), ("09", "questions=a,a", "twice"),
    *[("09", f"questions={text}", "cannot be printed") for text in ("a\0b", "\udcff", "a\x1bb")],
    ("01", "run_dir=a\nb", "cannot be printed"), ("09", f"questions={'x' * 20_000}", "20000 char"),
    ("09", f"questions={','.join(map(str, range(2000)))}", "1000 entries"),
    ("03", "thresholds=0,9", "less than 1"), ("02", "token_fusion=1", "true or false"),
    *[("02", f"options={text}", "expected names and values") for text in (
        "{a: &a [1], b: *a}", "{a: !!python/object/apply:os.system [ls]}", "{a: !!binary aGk=}",
        "{a: 1, a: 2}", "[1]", "[" * 5000)],
    ("02", "options={a: 1e400}", "finite"), ("02", "options={1: 2}", "must be texts"),
    ("02", f"options={{a: {'[' * 12}{']' * 12}}}", "lists in each other"),
    ("05", "arms=ar,l4", "did you mean 'L4'"), ("01", "sead=3", "did you mean 'seed'"),
    *[("05", f"arms={arm}", "should be one of ar") for arm in (
        "ar@3", "ar~0.5", "hf_generate@3", "ar+L4", "L4+hf_generate", "L4@0", "L4@65", "L4@x",
        "L4@3@4", "L4~2", "L4@")],
])
def test_what_a_parameter_cannot_be_is_one_short_sentence(notebook, text, words):
    model = parameters.model_of(notebook)
    with pytest.raises(ParameterError, match=words) as refused:
        model.checked(command_line.read_values([text], model))
    assert len(str(refused.value)) < 900 and "\n" not in str(refused.value)


def test_a_parameter_or_an_axis_given_twice_is_refused():
    model = parameters.HiddenParameters
    with pytest.raises(ParameterError, match="seed is given twice"):
        command_line.read_values(["seed=1", "seed=2"], model)
    with pytest.raises(ParameterError, match="levels is given twice"):
        command_line.read_grid(["level=L1", "levels=L4"], model)


def test_the_axes_of_a_grid_are_split_outside_brackets_and_quotes():
    read = command_line.read_grid(["seed=0,010", "levels=[L1,L4],[L2]"],
                                  parameters.HiddenParameters)
    assert read == {"seed": [0, 10], "levels": [["L1", "L4"], ["L2"]]}
    read = command_line.read_grid(["level=L1,L4", "gamma=3|5"], parameters.HiddenParameters)
    assert read == {"levels": [["L1"], ["L4"]], "gamma": [3, 5]}
    read = command_line.read_grid(['questions="Is it day, or night?"|b,c'],
                                  parameters.RecordingParameters)
    assert read == {"questions": [["Is it day, or night?"], ["b", "c"]]}
    read = command_line.read_grid(['objective="a, b",mse'], parameters.TrainParameters)
    assert read == {"objective": ["a, b", "mse"]}
    with pytest.raises(ParameterError, match="has no parameter 'gama': did you mean 'gamma'"):
        command_line.read_grid(["gama=3"], parameters.HiddenParameters)
