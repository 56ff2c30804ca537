"""Levels of one's own: by module:Class, by class and as an object; checked, saved, loaded,
unrolled; never imported because a file says so."""

import sys

import my_levels
import pytest
import torch
from test_adapters_levels import WIDTH, make, make_batch

from xsd import files
from xsd.adapters import base, checks, registry
from xsd.core import CheckpointError, ParameterError


@pytest.mark.parametrize("name", ["Mine", "Next"])
@pytest.mark.parametrize("form", ["text", "class", "object"])
def test_every_form_becomes_an_adapter_and_comes_back_from_its_file(name, form, tmp_path):
    built = getattr(my_levels, name)
    spec = {"text": f"my_levels:{name}", "class": built,
            "object": built(hidden_size=WIDTH, drafter_size=10)}[form]
    torch.manual_seed(0)
    adapter = registry.create_adapter(spec, WIDTH, drafter_size=10).eval()
    assert isinstance(adapter, base.Adapter) and adapter.level == f"my_levels:{name}"
    checks.check_adapter(adapter)
    batch = make_batch([3, 5], drafter_size=10)
    path = registry.save_adapter(adapter, tmp_path)
    again = registry.load_any_adapter(path, level=spec)
    assert torch.equal(again.align(batch).aligned, adapter.align(batch).aligned)
    assert again.config() == adapter.config() and again is not adapter
    known = batch.verifier[0, :2]
    step = adapter.step(batch.drafter[0, :2 + adapter.drafter_lead], known)
    torch.testing.assert_close(step, adapter.align(batch).aligned[0, 1])


def test_options_and_a_draft_vocabulary_travel_with_the_file(tmp_path):
    adapter = registry.create_adapter("my_levels:Mine", WIDTH, width=3)
    adapter.set_draft_vocabulary(torch.tensor([1, 4]))
    path = registry.save_adapter(adapter, tmp_path)
    for level in ("my_levels:Mine", my_levels.Mine,
                  my_levels.Mine(hidden_size=WIDTH, drafter_size=WIDTH, width=3)):
        again = registry.load_any_adapter(path, level=level)
        assert again.module.enter.out_features == 3 and again.draft_ids.tolist() == [1, 4]


def test_a_file_imports_nothing(tmp_path, monkeypatch):
    path = registry.save_adapter(registry.create_adapter("my_levels:Mine", WIDTH), tmp_path)
    monkeypatch.delitem(sys.modules, "my_levels")
    with pytest.raises(CheckpointError, match="a class of your own: name it with level='my_levels"):
        registry.load_any_adapter(path)
    assert "my_levels" not in sys.modules
    with pytest.raises(CheckpointError, match="holds 'my_levels:Mine', not the L1 asked for"):
        registry.load_any_adapter(path, level="L1")


@pytest.mark.parametrize(("name", "why"), [
    ("Peeks", "changes with states that come later"), ("Frozen", "no gradient reaches"),
    ("Forgets", "saved and loaded again it predicts something else"),
    ("Narrow", r"forward gives \(2, 6, 15\) where \(2, 6, 16\) is expected"),
    ("Shifted", "reads verifier with shift 0"), ])
def test_what_is_no_adapter_is_told_in_one_sentence(name, why):
    torch.manual_seed(0)
    with pytest.raises(ParameterError, match=why):
        checks.check_adapter(registry.create_adapter(f"my_levels:{name}", WIDTH))


def test_other_mistakes_are_explained():
    with pytest.raises(ParameterError, match=r"Linear.reads is None; say what forward takes"):
        registry.create_adapter(torch.nn.Linear(2, 2), WIDTH)
    with pytest.raises(ParameterError, match="forward does not run on one tensor"):
        checks.check_adapter(registry.create_adapter(
            my_levels.Mine(hidden_size=WIDTH, drafter_size=3), WIDTH))
    with pytest.raises(ParameterError, match=r"Mine cannot be made .* 'depth'"):
        registry.create_adapter("my_levels:Mine", WIDTH, depth=3)
    with pytest.raises(ParameterError, match="is made already; give its class"):
        registry.create_adapter(my_levels.Mine(hidden_size=4, drafter_size=4), 4, width=3)
    mine = my_levels.Mine(hidden_size=4, drafter_size=4)
    mine.level = "L1"
    with pytest.raises(ParameterError, match="which is one of our levels"):
        registry.create_adapter(mine, 4)


def test_names_for_tables_and_folders():
    mine = my_levels.Mine(hidden_size=4, drafter_size=4)
    assert files.name_of(mine) == files.name_of(my_levels.Mine) == "my_levels:Mine"
    mine.level = "mine, wide"
    assert files.name_of(mine) == registry.create_adapter(mine, 4).level == "mine, wide"
    assert files.name_of("L5F") == "L5F"


@pytest.mark.parametrize("level", list(registry.LEVELS))
def test_our_own_levels_pass_the_check(level):
    checks.check_adapter(make(level))


@pytest.mark.parametrize("name", ["B1", "L5F", "L5F lead 0", "L5F tokens", "L5F layers", "X1",
                                  "X1 layers"])
def test_the_plain_unrolling_equals_the_fast_one(name):
    adapter, batch = make(name), make_batch([6, 4])
    given = (batch.drafter, batch.verifier, 3, batch.ids_by_verifier)
    for k, (plain, fast) in enumerate(zip(base.Adapter.unroll(adapter, *given),
                                          adapter.unroll(*given), strict=True), start=1):
        torch.testing.assert_close(plain[:, :-k], fast[:, :-k], atol=1e-5, rtol=1e-4)
