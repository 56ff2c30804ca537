"""docs/extending.md as it stands: its files are written, its blocks run, and what they make goes from
training to saving, loading and evaluation."""

import re
import sys
from pathlib import Path

import pytest
import torch
import train_examples as examples
from tiny_pair import make_samples, make_tiny_pair

from xsd.adapters import registry
from xsd.bench import arms
from xsd.decode import autoregressive
from xsd.models import loading
from xsd.train import fit, source

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FILES = {found[1]: block for block in BLOCKS if (found := re.match(r"# (my_\w+)\.py\n", block))}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own with the page's files in it."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != str(ROOT / "tests")])
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


def test_each_part_is_at_most_thirty_lines():
    assert all(len(text.splitlines()) <= 30 for text in FILES.values())


def test_every_block_runs(here):
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"), {"__name__": "page"})


def test_a_level_and_a_term_of_ones_own_train_and_are_saved_and_loaded(here):
    config = fit.FitConfig(profile="tokens", objective="mse + 0.5*my_terms:contrast", epochs=3,
                           batch_size=16, validation_share=0.2, adapter_options={"width": 8})
    states = source.open_states(examples.answers(drafter_size=10))
    result = fit.fit_adapter("my_levels:Mine", states, folder="run", config=config,
                             head=examples.head())
    assert {"train_my_terms:contrast", "validation_my_terms:contrast"} <= result.history[0].keys()
    assert result.history[-1]["train_total"] < result.history[0]["train_total"]
    adapter = registry.load_any_adapter("run", level="my_levels:Mine")
    batch = next(iter(states.batches(torch.arange(4), 4)))
    assert adapter.align(batch).aligned.shape == batch.verifier.shape


def test_a_proposer_of_ones_own_drafts_and_the_answer_stays_the_verifiers(here):
    pair = loading.load_pair(make_tiny_pair(here / "pair"))
    arm = arms.build("my_proposers:Remembers", pair, gamma=3)
    [sample] = make_samples(1)
    own = autoregressive.generate(pair.verifier, sample, 12).ids
    first, second = arm.run(sample, 12), arm.run(sample, 12)
    assert first.ids == second.ids == own
    assert sum(r.n_accepted for r in second.rounds) > sum(r.n_accepted for r in first.rounds)
    assert arms.label_of(arm.name) == "Remembers" and arms.levels_of([arm.name]) == []
