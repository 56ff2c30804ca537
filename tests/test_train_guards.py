"""What an adapter is judged on trains nothing: refused by split, by manifest, by sequence name, by
shard hash, by answer hash."""

import dataclasses

import pytest
import torch
import train_examples as examples

from xsd.core import TrainingError
from xsd.shards.store import ShardDataset
from xsd.shards.writer import ShardWriter
from xsd.train import fit, guards, source

HELD = [
    dataclasses.replace(one, sequence=f"held_{one.sequence}", split="test")
    for one in examples.answers(6, seed=5)
]


def write(folder, answers, dtype="fp32", **config):
    with ShardWriter(folder, mode="teacher_forced", tap="post_norm", dtype=dtype, config=config,
                     samples_per_shard=16) as writer:
        for answer in answers:
            writer.write(answer)
    return ShardDataset(folder)


def train(tmp_path, data, **options):
    return fit.fit_adapter("L1", data, folder=tmp_path / "run",
                           config=fit.FitConfig(epochs=1, validation_share=0.2), **options)


def test_held_out_answers_are_refused_under_any_name_and_in_either_precision(tmp_path):
    renamed = [
        dataclasses.replace(one, sequence=f"train_{i}", split="train") for i, one in enumerate(HELD)
    ]
    mixed = [*examples.answers(10), *renamed]
    for dtype in ("fp32", "fp16"):
        sets = [write(tmp_path / dtype, HELD, dtype)]
        with pytest.raises(
                TrainingError, match=
                r"6 of 16 training answers are held-out ones under other names .*train_0, by its "
                r"hash"
        ):
            train(tmp_path, mixed, held_out=sets)
    with pytest.raises(TrainingError, match="held-out ones under other names"):
        train(tmp_path, examples.answers(10), validation=renamed, held_out=[HELD])
    result = train(tmp_path, examples.answers(10), held_out=guards.marks_of([HELD]))
    assert len(result.history) == 1


def test_a_cut_answer_is_the_same_answer():
    one = HELD[0]
    cut = dataclasses.replace(one, ids_by_drafter=one.ids_by_drafter[:4],
                              hidden_by_drafter=one.hidden_by_drafter[:4])
    long = [a for a in (one, cut) if len(a.ids_by_verifier) >= 4]
    assert len(guards.marks_of([long]).answers) == 1


def test_sequences_and_manifests_are_refused_by_name(tmp_path):
    shared = [dataclasses.replace(one, sequence="s3") for one in HELD]
    with pytest.raises(
            TrainingError,
            match=r"sequence s3 is in the training data and in a held-out set \(1 such\)"):
        train(tmp_path, examples.answers(10), held_out=[shared])
    unlabelled = [dataclasses.replace(one, split="") for one in examples.answers(6)]
    with pytest.raises(TrainingError, match="extracted from the test split"):
        train(tmp_path, write(tmp_path / "shards", unlabelled, split="test"))


def test_a_copied_shard_is_refused_even_when_streamed(tmp_path):
    dataset = write(tmp_path / "shards", examples.answers(10))
    states = source.open_states(dataset, memory_limit_gb=0)
    hashes = frozenset(shard["sha256"] for shard in dataset.manifest["shards"])
    with pytest.raises(TrainingError, match="a training shard file has a held-out shard's hash"):
        guards.refuse_held_out(states, guards.Marks(frozenset(), hashes, frozenset()))
    guards.refuse_held_out(states, guards.Marks(frozenset(), frozenset(), frozenset({"other"})))


def test_batches_fetched_ahead_are_the_same_and_errors_come_through():
    states = source.PackedStates(examples.answers(10))
    plain, ahead = (list(states.batches(torch.arange(10), 4)) for _ in range(2))
    assert all(
        torch.equal(a.verifier, b.verifier)
        for a, b in zip(plain, source.ahead(ahead), strict=True))

    def broken():
        yield plain[0]
        raise TrainingError("no more")

    with pytest.raises(TrainingError, match="no more"):
        list(source.ahead(broken()))
