"""Profiles: YAML below -p, one file for every notebook."""

import pytest

from xsd.core import ParameterError
from xsd.runs import profiles


def write(path, text):
    (path / "mine.yaml").write_text(text)
    return str(path / "mine.yaml")


def test_a_notebook_is_given_what_it_takes_and_its_own_section_and_p_come_over_it(tmp_path):
    mine = write(tmp_path, "gamma: 3  # for all\nlevels: [L1]\n'04':\n  gamma: 4\n  top_k: 2\n")
    found = profiles.values(mine, ["levels=L1,L4"], "03_hidden", "04_tokens", "06_compare")
    assert found == {"03_hidden": {"gamma": 3, "levels": ["L1", "L4"]},
                     "04_tokens": {"gamma": 4, "top_k": 2, "levels": ["L1", "L4"]},
                     "06_compare": {}}
    assert profiles.values(mine, ["gamma=7"], "04_tokens")["04_tokens"]["gamma"] == 7


@pytest.mark.parametrize(("text", "said"), [
    ("levls: [L1]\nsize: 3\n", "no notebook takes 'levls', 'size'; did you mean 'levels'"),
    ("'05': 3\n", "what stands under 05 must be names and values"),
    ("'04': {epochs: 3}\n", "notebook 04_tokens has no parameter 'epochs'"),
    ("run_dir: x\n", "no notebook takes 'run_dir'"),
    ("- a\n- b\n", "expected names and values"),
    ("a: &x [1]\nb: *x\n", "expected names and values"),
    ("gamma: [\n", "expected names and values"),
    ("gamma: 3\ngamma: 4\n", "expected names and values"),
    ("# " + "x" * 200_000, "are read"),
])
def test_what_is_no_profile_is_refused_in_one_sentence(text, said, tmp_path):
    with pytest.raises(ParameterError, match=said) as error:
        profiles.read(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_wrong_values_and_unknown_profiles_are_named(tmp_path):
    with pytest.raises(ParameterError, match="parameter 'gamma' of notebook 04_tokens cannot be"):
        profiles.values(write(tmp_path, "gamma: many\n"), [], "04_tokens")
    with pytest.raises(ParameterError, match="no profile '7b-bf61': did you mean '7b-bf16'"):
        profiles.read("7b-bf61")


def test_a_profile_of_the_size_of_the_7b_pair_says_how_it_is_loaded():
    live = profiles.values("7b-4bit-24gb", ["pair=x"], "05_live")["05_live"]
    assert (live["quant"], live["dtype"], live["device"]) == ("4bit", "bfloat16", "cuda")
