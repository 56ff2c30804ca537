"""docs/extending.md as it stands: its files are written, its blocks run, and what they make goes
from training to saving, loading and evaluation."""

import re
import sys
from pathlib import Path

import pytest
import train_examples as examples
from tiny_pair import make_samples, make_tiny_pair

from xsd.adapters import registry
from xsd.bench import arms
from xsd.decode import autoregressive
from xsd.evaluate import held_out, table
from xsd.models import loading
from xsd.shards import store
from xsd.shards.writer import ShardWriter
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


@pytest.fixture
def pairs(tmp_path):
    """A held-out set on disk."""
    with ShardWriter(tmp_path / "shards", mode="teacher_forced", tap="post_norm", dtype="fp32",
                     config={}) as writer:
        for answer in examples.answers(8, drafter_size=10, split="test", seed=5):
            writer.write(answer)
        writer.save_head("verifier", examples.head(), examples.VOCABULARY)
    return held_out.of("mine", store.ShardDataset(tmp_path / "shards"))


def test_every_block_runs(here, pairs):
    mine = registry.create_adapter("my_levels:Mine", examples.WIDTH, drafter_size=10)
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"),
             {"__name__": "page", "pairs": pairs, "mine": mine})


def test_a_level_and_a_term_of_ones_own_train_are_saved_loaded_and_evaluated(here, pairs):
    config = fit.FitConfig(profile="tokens", objective="mse + 0.5*my_terms:contrast", epochs=3,
                           batch_size=16, validation_share=0.2, adapter_options={"width": 8})
    states = source.open_states(examples.answers(drafter_size=10))
    result = fit.fit_adapter("my_levels:Mine", states, folder="run", config=config,
                             head=examples.head())
    assert {"train_my_terms:contrast", "validation_my_terms:contrast"} <= result.history[0].keys()
    assert result.history[-1]["train_total"] < result.history[0]["train_total"]
    adapter = registry.load_any_adapter("run", level="my_levels:Mine")
    tokens = table.measure({"mine": adapter}, pairs, gamma=3, columns=["my_columns:sure"])
    own = tokens[tokens["level"] == "mine"]
    assert own["sure"].tolist() == (own["draft_probability"] > 0.5).tolist()
    assert 0 < own["match"].mean() <= 1 and own["one_step_cosine"].between(-1, 1).all()


def test_a_level_of_ones_own_drafts_live_as_a_level_of_ours_does(here):
    pair = loading.load_pair(make_tiny_pair(here / "pair"))
    sizes = {"hidden_size": pair.verifier.hidden_size, "drafter_size": pair.drafter.hidden_size}
    mine = registry.create_adapter("my_levels:Mine", **sizes).eval()
    [sample] = make_samples(1)
    own = autoregressive.generate(pair.verifier, sample, 12).ids
    arm = arms.build("my_levels:Mine", pair, {"my_levels:Mine": mine}, gamma=3)
    assert arm.run(sample, 12).ids == own


def test_a_proposer_of_ones_own_drafts_and_the_answer_stays_the_verifiers(here):
    pair = loading.load_pair(make_tiny_pair(here / "pair"))
    arm = arms.build("my_proposers:Remembers", pair, gamma=3)
    [sample] = make_samples(1)
    own = autoregressive.generate(pair.verifier, sample, 12).ids
    first, second = arm.run(sample, 12), arm.run(sample, 12)
    assert first.ids == second.ids == own
    assert sum(r.n_accepted for r in second.rounds) > sum(r.n_accepted for r in first.rounds)
    assert arms.label_of(arm.name) == "Remembers" and arms.levels_of([arm.name]) == []
