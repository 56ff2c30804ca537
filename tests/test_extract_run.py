"""An extraction end to end on a tiny real pair: what it writes, how it stops, how it goes on."""

import copy
import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples

from xsd.core import PairError, ParameterError, ShardError, StorageError
from xsd.extract import checks, plan, run
from xsd.shards import store
from xsd.shards.writer import ShardWriter

BOTH = ("teacher_forced", "free_running")
OPTIONS = {
    "modes": BOTH, "max_new_tokens": 5, "batch_size": 2, "samples_per_shard": 3, "dtype": "fp32"
}


def shard_bytes(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
        if path.name.startswith(("shard-", "head-"))
    }


@pytest.fixture(scope="module")
def samples():
    return make_samples(9, sequences=3)


@pytest.fixture(scope="module")
def whole(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run.extract(tiny_pair(), samples, folder, **OPTIONS)


class StopAfter:
    """A progress that counts batches and, after the given one, does what it is told."""
    def __init__(self, batches, action):
        self.left, self.action, self.seen = batches, action, []

    def __call__(self, progress):
        self.seen.append(progress)
        self.left -= 1
        if self.left == 0:
            self.action()


def test_every_sample_is_stored_once_in_each_mode_with_both_models_ids(samples, whole):
    folder, report = whole
    assert report.n == 9 and report.finished and report.resumed == 0 and report.gb > 0
    for mode in BOTH:
        dataset = store.ShardDataset(folder / mode, expected_mode=mode, expected_tap="post_norm")
        assert sorted(zip(dataset.table()["clip"],
                          dataset.table()["question"], strict=True)) == sorted(
                              (s.clip, s.question) for s in samples)
        assert dataset.table()["seconds"].gt(0).all()
        assert report.tokens >= dataset.table()["n_tokens_verifier"].sum() == sum(
            len(states.ids_by_verifier) for states in dataset)
        assert store.verify(folder / mode) == []


def test_the_saved_head_gives_the_stored_tokens_of_both_models(whole):
    folder, _ = whole
    for mode in BOTH:
        dataset = store.ShardDataset(folder / mode)
        assert dataset.draft_vocab_size() == tiny_pair().draft_vocab_size
        for states in dataset:
            assert torch.equal((states.hidden_by_verifier @ dataset.head("verifier").T).argmax(-1),
                               states.ids_by_verifier)
            assert torch.equal((states.hidden_by_drafter @ dataset.head("drafter").T).argmax(-1),
                               states.ids_by_drafter)


def test_a_finished_run_returns_at_once(samples, whole):
    folder, _ = whole
    pair = tiny_pair()
    handle = SimpleNamespace(head=pair.drafter.head, name=pair.drafter.name,
                             weights_hash=pair.drafter.weights_hash)
    other = SimpleNamespace(head=pair.verifier.head, name=pair.verifier.name,
                            weights_hash=pair.verifier.weights_hash)
    before = shard_bytes(folder)
    report = run.extract(replace(pair, drafter=handle, verifier=other), samples, folder,
                         **OPTIONS)  # these cannot generate
    assert report.finished and report.resumed == report.n == 9
    assert shard_bytes(folder) == before


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bytes(samples, whole, tmp_path, batches, number):
    stop = StopAfter(batches, lambda: os.kill(os.getpid(), number))
    first = run.extract(tiny_pair(), samples, tmp_path, **OPTIONS, progress=stop)
    assert not first.finished and first.n == 2 * batches
    with pytest.raises(ShardError, match=re.escape("is not finished")):
        store.ShardDataset(tmp_path / "teacher_forced")
    second = run.extract(tiny_pair(), samples, tmp_path, **OPTIONS)
    assert second.finished and second.resumed == 2 * batches
    assert shard_bytes(tmp_path) == shard_bytes(whole[0])


def test_an_error_in_a_batch_loses_no_batch_before_it(samples, whole, tmp_path):
    def fail():
        raise RuntimeError("the GPU fell off")

    with pytest.raises(RuntimeError, match="fell off"):
        run.extract(tiny_pair(), samples, tmp_path, **OPTIONS, progress=StopAfter(2, fail))
    report = run.extract(tiny_pair(), samples, tmp_path, **OPTIONS)
    assert report.resumed == 4 and shard_bytes(tmp_path) == shard_bytes(whole[0])


def test_a_mode_that_fell_behind_the_other_catches_up(samples, whole, tmp_path):
    run.extract(tiny_pair(), samples, tmp_path, **OPTIONS,
                progress=StopAfter(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    pieces = sorted((tmp_path / "free_running").glob("pending-*"))
    pieces[-1].unlink()
    report = run.extract(tiny_pair(), samples, tmp_path, **OPTIONS)
    assert report.resumed == 3 and shard_bytes(tmp_path) == shard_bytes(whole[0])


def test_other_settings_are_refused_by_name(samples, whole):
    with pytest.raises(ShardError, match=r"config\.max_new_tokens is 5 in the folder but 6 now"):
        run.extract(tiny_pair(), samples, whole[0], **{**OPTIONS, "max_new_tokens": 6})
    with pytest.raises(ShardError, match=r"config\.quant is None in the folder but '4bit' now"):
        run.extract(tiny_pair(), samples, whole[0], **OPTIONS, config={"quant": "4bit"})
    with pytest.raises(ShardError, match=r"config\.n_samples is 9 in the folder but 8 now"):
        run.extract(tiny_pair(), samples[:8], whole[0], **OPTIONS)


def test_a_second_extraction_into_the_same_folder_is_refused(samples, tmp_path):
    writer = ShardWriter(tmp_path / "teacher_forced", mode="teacher_forced")
    try:
        with pytest.raises(StorageError, match=f"being written by process {os.getpid()}"):
            run.extract(tiny_pair(), samples, tmp_path, **OPTIONS)
    finally:
        writer.close(finished=False)


def test_progress_tells_rate_and_time_left(samples, tmp_path):
    seen = StopAfter(99, lambda: None)
    run.extract(tiny_pair(), samples[:4], tmp_path, **{**OPTIONS, "modes": ("teacher_forced",)},
                progress=seen)
    assert [(p.done, p.total) for p in seen.seen] == [(2, 4), (4, 4)]
    assert seen.seen[0].eta_s > 0 and seen.seen[1].eta_s == 0


def test_a_progress_bar_is_moved_by_samples(samples, tmp_path):
    moved = []
    run.extract(tiny_pair(), samples[:3], tmp_path, **{**OPTIONS, "modes": ("teacher_forced",)},
                progress=SimpleNamespace(update=moved.append))
    assert moved == [2, 1]


def test_lazy_samples_are_read_a_batch_at_a_time_and_give_the_same_bytes(samples, whole, tmp_path):
    live = []

    def lazy(sample):
        return plan.LazySample(sample.sequence, sample.clip, sample.question,
                               lambda: live.append(sample.key) or sample)

    counts = StopAfter(99, lambda: None)
    seen = []
    run.extract(tiny_pair(), [lazy(s) for s in samples], tmp_path, **OPTIONS, progress=lambda p:
                (counts(p), seen.append(len(live))))
    assert seen == [2, 4, 6, 8, 9]
    assert shard_bytes(tmp_path) == shard_bytes(whole[0])


def test_another_drafter_takes_the_verifiers_stored_answers(samples, whole, tmp_path):
    pair = tiny_pair()

    def refuse(*arguments, **keywords):
        raise AssertionError("the verifier was run")

    silent = copy.copy(pair.verifier)
    silent.generate = refuse
    options = {**OPTIONS, "verifier_from": whole[0] / "free_running"}
    one_frame = [replace(sample, event_frames=sample.event_frames[:1]) for sample in samples]
    run.extract(replace(pair, verifier=silent), one_frame, tmp_path, **options)
    for mode in BOTH:
        for new, old in zip(store.ShardDataset(tmp_path / mode),
                            store.ShardDataset(whole[0] / mode), strict=True):
            assert torch.equal(new.hidden_by_verifier, old.hidden_by_verifier) and torch.equal(
                new.ids_by_verifier, old.ids_by_verifier)
            assert new.text_by_verifier == old.text_by_verifier and not torch.equal(
                new.hidden_by_drafter, old.hidden_by_drafter)
    with pytest.raises(ShardError,
                       match=r"cannot be used: max_new_tokens is 5 in the folder but 6 now"):
        run.extract(pair, samples, tmp_path / "longer", **{**options, "max_new_tokens": 6})
    with pytest.raises(ShardError, match=r"holds no answer for other/"):
        run.extract(pair, [replace(samples[0], sequence="other")], tmp_path / "other", **options)


def test_a_head_that_does_not_give_the_logits_is_refused(samples):
    verifier = tiny_pair().verifier
    scaled = SimpleNamespace(head=verifier.head, hidden_size=verifier.hidden_size, role="verifier",
                             lm_head=lambda hidden: 2 * verifier.lm_head(hidden))
    with pytest.raises(PairError, match="the verifier's LM head does not give its logits"):
        run.check_head(scaled, verifier.generate(samples[:1], 3))


def test_samples_are_taken_clip_by_clip_and_drawn_by_seed():
    samples = make_samples(12, sequences=1)
    mixed = samples[::4] + samples[1::4] + samples[2::4] + samples[3::4]
    assert [s.clip for s in plan.order(mixed)] == sorted(s.clip for s in samples)
    drawn = [plan.order(mixed, max_samples=6, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert [s.key for s in drawn[0]] == [s.key
                                         for s in drawn[1]] and all(len(d) == 6 for d in drawn)
    assert len({tuple(s.key for s in d) for d in drawn}) > 1
    assert plan.plan_hash(drawn[0]) == plan.plan_hash(drawn[1]) != plan.plan_hash(samples)


@pytest.mark.parametrize("options, message",
                         [({"max_samples": 0}, "max_samples=0; give a positive number"),
                          ({"batch_size": 0}, "batch_size=0")])
def test_impossible_numbers_are_named(options, message, tmp_path):
    with pytest.raises(ParameterError, match=message):
        run.extract(tiny_pair(), make_samples(1), tmp_path, **options)


def test_no_samples_and_unknown_modes_are_named(tmp_path):
    with pytest.raises(ParameterError, match="no samples to extract"):
        run.extract(tiny_pair(), [], tmp_path)
    with pytest.raises(ShardError, match="expected one or more of teacher_forced, free_running"):
        run.extract(tiny_pair(), make_samples(1), tmp_path, modes=("forced",))


def test_a_run_goes_on_with_another_batch_size(samples, tmp_path):
    stop = StopAfter(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run.extract(tiny_pair(), samples, tmp_path, **OPTIONS, progress=stop).n == 2
    report = run.extract(tiny_pair(), samples, tmp_path, **{**OPTIONS, "batch_size": 4})
    assert report.finished and report.resumed == 2 and report.n == 9
    assert run.extract(tiny_pair(), samples, tmp_path, **{**OPTIONS, "batch_size": 1}).finished
    assert not any(checks.verify(tmp_path).values())


def test_the_manifest_says_when_it_was_made_and_its_longest_answer(whole):
    manifest = store.ShardDataset(whole[0] / "teacher_forced").manifest
    assert manifest["provenance"]["created"].startswith(manifest["provenance"]["date"])
    longest = store.ShardDataset(whole[0] / "teacher_forced").table()["n_tokens_verifier"].max()
    assert manifest["max_seq_len"] == longest


@pytest.mark.parametrize("save", [{"save_every": 5}, {"save_every_s": 1e9}])
def test_what_was_not_saved_yet_is_saved_in_the_end_and_the_bytes_are_the_same(
        samples, whole, tmp_path, save):
    pieces = []
    options = {**OPTIONS, **save, "samples_per_shard": 100}
    run.extract(tiny_pair(), samples[:8], tmp_path, **options, progress=lambda p: pieces.append(
        len(list((tmp_path / "teacher_forced").glob("pending-*")))))
    assert pieces == ([0, 0, 1, 1] if "save_every" in save else [0, 0, 0, 0])
    found = store.ShardDataset(tmp_path / "teacher_forced")
    assert found.table()["seconds"].gt(0).all()
    wanted = list(store.ShardDataset(whole[0] / "teacher_forced"))[:8]
    assert all(torch.equal(a.hidden_by_verifier, b.hidden_by_verifier)
               for a, b in zip(found, wanted, strict=True))


def test_scenes_are_drawn_whole():
    samples = make_samples(12, sequences=1)
    some = plan.order(samples, max_scenes=1, seed=3)
    assert len({one.clip for one in some}) == 1
    assert len(some) == sum(one.clip == some[0].clip for one in samples)
    with pytest.raises(ParameterError, match="max_scenes=0; give a positive number"):
        plan.order(samples, max_scenes=0)
