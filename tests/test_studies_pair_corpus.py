"""The embedded pair's training corpus: labels, reopening, the disk; and the answers' duplicates."""

from types import SimpleNamespace

import pandas as pd
import pytest

from studies.embedded_pair import card, corpus
from xsd.core import DatasetError, StorageError
from xsd.embedded import drive
from xsd.embedded.language import seen_by_events

FACTS = [
    clip.facts for index in range(6)
    for clip in drive.simulate_sequence(11, "test", index).clips[::2]
]


def test_duplicate_rate_counts_every_member_of_a_group():
    table = pd.DataFrame({
        "role": "verifier", "sequence": "s", "clip": list("0123"), "kind": "people",
        "answer": ["a", "a", "b", "c"],
    })
    assert card.duplicate_rate(table) == 0.5
    assert card.duplicate_rate(table.drop_duplicates("answer")) == 0.0


def test_labels_hide_from_the_drafter_what_events_cannot_show():
    for facts in FACTS:
        seen, known = corpus.labels(facts, "verifier"), corpus.labels(facts, "drafter")
        assert known["time"] == -1 and seen["time"] >= 0
        if not facts["moving"]:
            assert known["left"] == -1
        assert known["ahead_kind"] == corpus.labels(
            seen_by_events(facts) | {"moving": facts["moving"]}, "drafter")["ahead_kind"]


def test_a_corpus_reopens_and_refuses_another_configuration(tmp_path):
    built = corpus.build(tmp_path / "c", split="train", n_sequences=1, seed=4, size=48)
    again = corpus.build(tmp_path / "c", split="train", n_sequences=1, seed=4, size=48)
    assert built.video.tobytes() == again.video.tobytes() and built.layout.shape == (
        4, 13, 24, 24) and len(again) == 4
    assert len(built.dialogues("verifier")[0]) == 10
    with pytest.raises(DatasetError, match="holds the corpus"):
        corpus.build(tmp_path / "c", split="train", n_sequences=2, seed=4, size=48)


def test_a_corpus_that_does_not_fit_on_the_disk_is_refused_before_it_is_simulated(
        tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(
            StorageError,
            match=r"100 simulated drives take 0\.1 GB.*choose another folder or fewer drives"):
        corpus.build(tmp_path / "c", split="train", n_sequences=100, seed=4, size=96)
    assert not list((tmp_path / "c").iterdir())


def test_what_an_interrupted_simulation_left_does_not_count_against_the_disk(tmp_path, monkeypatch):
    (tmp_path / "video.npy").write_bytes(bytes(10**6))
    seen = []
    monkeypatch.setattr(corpus.shutil, "disk_usage",
                        lambda path: seen.append(list(path.iterdir())) or SimpleNamespace(free=0))
    with pytest.raises(StorageError):
        corpus.build(tmp_path, split="train", n_sequences=1, seed=4)
    assert seen == [[]]
