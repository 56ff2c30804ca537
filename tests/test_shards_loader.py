"""The stream over a run: every sample once, the same for any number of ranks and workers, resumable
at any batch, never far ahead."""

import gc
import itertools
import json
import threading
import time
import weakref
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_examples import example
from torch.utils.data import DataLoader

from xsd.core import ShardError
from xsd.shards import batching, reader, store
from xsd.shards.loader import Loader
from xsd.shards.writer import ShardWriter

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def write(folder, n=23, *, dtype="fp32", mode="teacher_forced", samples_per_shard=4):
    with ShardWriter(folder, mode=mode, dtype=dtype, samples_per_shard=samples_per_shard) as out:
        for i in range(n):
            out.write(example(i, mode=mode))
    return store.ShardDataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run"))


def equal(a, b):
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else list(x) ==
        list(y) for x, y in pairs)


def indices(batches):
    return [list(batch.index) for batch in batches]


# --- batches as numbers
# ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths, st.floats(0, 0.8), st.integers(1, 8))
def test_padding_stays_below_its_bound(sizes, max_padding, batch_size):
    bounds = {"batch_size": batch_size, "max_padding": max_padding}
    found = list(batching.batched(enumerate(sizes), **bounds))
    assert sorted(i for batch in found for i in batch) == list(range(len(sizes)))
    for batch in found:
        here = [sizes[i] for i in batch]
        assert len(here) <= batch_size and 1 - sum(here) / (len(here) * max(here)) <= max_padding


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(300, 2000), st.sampled_from([None, 0.0, 0.3]))
def test_a_token_budget_is_kept_and_used(sizes, budget, max_padding):
    bounds = {"tokens_per_batch": budget, "max_padding": max_padding}
    found = list(batching.batched(enumerate(sizes), **bounds))
    assert sorted(i for batch in found for i in batch) == list(range(len(sizes)))
    assert all(len(batch) * max(sizes[i] for i in batch) <= budget for batch in found)
    if max_padding is None:  # no batch could have taken the next sample too
        assert all((len(a) + 1) * max(sizes[i] for i in [*a, b[0]]) > budget
                   for a, b in itertools.pairwise(found))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 5), st.integers(0, 3),
       st.integers(1, 40))
def test_a_shuffle_gives_every_item_once_and_looks_no_further_than_its_buffer(
        shards, seed, epoch, buffer):
    items = {number: [(10 * number + row, 1) for row in range(n)]
             for number, n in enumerate(shards)}
    opened = []

    def items_of(number):
        for item in items[number]:
            opened.append(item)
            yield item

    found = []
    for item in batching.shuffled(list(items), items_of, seed=seed, epoch=epoch, buffer=buffer):
        found.append(item)
        assert len(opened) - len(found) <= buffer
    assert sorted(found) == sorted(item for some in items.values() for item in some)
    assert found == list(
        batching.shuffled(list(items), items.get, seed=seed, epoch=epoch, buffer=buffer))


def test_another_epoch_or_seed_is_another_order():
    items = {0: [(i, 1) for i in range(50)]}
    orders = [
        list(batching.shuffled([0], items.get, seed=s, epoch=e, buffer=20))
        for s, e in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(
    "rule, message",
    [({}, "a batch needs a bound; give batch_size"),
     ({"batch_size": 0}, "batch_size=0; expected at least 1"),
     ({"batch_size": 2, "max_padding": 1.0}, r"max_padding=1.0; expected a share in \[0, 1\)"),],
)
def test_a_rule_that_allows_no_batch_is_refused(rule, message):
    with pytest.raises(ShardError, match=message):
        batching.check_bounds(**rule)


def test_an_answer_longer_than_the_budget_is_named():
    with pytest.raises(ShardError, match="sample 1 has 9 positions but tokens_per_batch=8"):
        list(batching.batched([(0, 3), (1, 9)], tokens_per_batch=8))


# --- the stream
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("mode", ["teacher_forced", "free_running"])
def test_batches_are_those_of_single_samples_put_together(tmp_path, dtype, mode):
    stored = write(tmp_path, 9, dtype=dtype, mode=mode)
    for batch in Loader(stored, batch_size=4, shuffle_seed=3):
        assert equal(batch, store.collate([stored[i] for i in batch.index], batch.index))
    (plain,) = stored.batches(9)
    assert equal(plain, store.collate(list(stored), range(9)))


def test_states_can_be_delivered_as_they_are_stored(tmp_path):
    stored = write(tmp_path, 6, dtype="bf16")
    (wide,), (narrow,) = Loader(stored, batch_size=6), Loader(stored, batch_size=6,
                                                              dtype="bfloat16")
    assert narrow.drafter.dtype == torch.bfloat16 and torch.equal(narrow.drafter.float(),
                                                                  wide.drafter)
    with pytest.raises(
            ShardError,
            match="dtype='fp8'; states are delivered as one of float32, bfloat16, float16"):
        Loader(stored, batch_size=6, dtype="fp8")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([None, 0.2]), st.integers(0, 9),
       st.integers(1, 30), st.booleans())
def test_ranks_are_disjoint_and_together_complete(dataset, world_size, batch_size, max_padding,
                                                  seed, buffer, drop_uneven):
    options = {
        "batch_size": batch_size, "max_padding": max_padding, "shuffle_seed": seed,
        "shuffle_buffer": buffer
    }
    ranks = [
        Loader(dataset, **options, rank=r, world_size=world_size, drop_uneven=drop_uneven)
        for r in range(world_size)
    ]
    found = [indices(loader) for loader in ranks]
    every = indices(Loader(dataset, **options))
    if drop_uneven:
        assert {len(own) for own in found} == {len(every) // world_size}
        every = every[:len(every) // world_size * world_size]
    else:
        assert sorted(i for own in found for batch in own for i in batch) == list(range(23))
    assert all(own == every[r::world_size] for r, own in enumerate(found))
    for loader, own in zip(ranks, found, strict=True):
        loader.set_epoch(0)
        assert loader.n_batches() == len(own)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 25), st.integers(1, 4), st.integers(0, 2), st.integers(0, 9),
       st.integers(1, 3), st.integers(1, 3))
def test_a_restored_stream_gives_exactly_what_was_left(dataset, taken, batch_size, epoch, seed,
                                                       old_world, new_world):
    options = {
        "batch_size": batch_size, "max_padding": 0.3, "shuffle_seed": seed, "shuffle_buffer": 7
    }
    whole = Loader(dataset, **options)
    whole.set_epoch(epoch)
    every = list(whole)
    first = Loader(dataset, **options, world_size=old_world, prefetch=2)
    first.set_epoch(epoch)
    taken = min(taken, first.n_batches() - 1)
    for _, _batch in zip(range(taken), first, strict=False):
        pass
    state = json.loads(json.dumps(first.state()))
    assert state["epoch"] == epoch and state["batch"] == taken * old_world
    left = []
    for rank in range(new_world):
        again = Loader(dataset, **options, rank=rank, world_size=new_world)
        again.restore(state)
        left.append(list(again))
        assert again.state()["epoch"] == epoch + 1 and again.state()["batch"] == 0
    for rank, own in enumerate(left):
        wanted = every[taken * old_world:][rank::new_world]
        assert len(own) == len(wanted) and all(
            equal(a, b) for a, b in zip(own, wanted, strict=True))
    assert indices(first) == indices(every)[taken * old_world::
                                            old_world]  # broken off, the next iteration continues


def test_epochs_differ_and_repeat_with_the_seed(dataset):
    loader = Loader(dataset, batch_size=3, shuffle_seed=1)
    first, second = indices(loader), indices(loader)
    assert first != second and loader.epoch == 2
    again = Loader(dataset, batch_size=3, shuffle_seed=1)
    assert [indices(again), indices(again)] == [first, second]
    assert indices(Loader(
        dataset, batch_size=3)) == [list(range(i, min(i + 3, 23))) for i in range(0, 23, 3)]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_dataloader_workers_share_a_ranks_batches_in_order(dataset, n_workers):
    options = {"batch_size": 2, "shuffle_seed": 4, "world_size": 2, "rank": 1}
    loader, alone = Loader(dataset, **options), list(Loader(dataset, **options))
    found = list(DataLoader(loader, batch_size=None, num_workers=n_workers))
    assert len(found) == len(alone) and all(equal(a, b) for a, b in zip(found, alone, strict=True))
    state = loader.state(taken=2)
    resumed = Loader(dataset, **options)
    resumed.restore(state)
    assert indices(DataLoader(resumed, batch_size=None,
                              num_workers=n_workers)) == indices(alone)[2:]


def test_subsets_and_indices_read_their_samples_only(dataset):
    part = dataset.subset(sequences=["seq1"])
    found = list(Loader(part, batch_size=3, shuffle_seed=0))
    assert {name for batch in found for name in batch.sequence} == {"seq1"}
    assert sorted(i for batch in found for i in batch.index) == list(range(len(part)))
    assert all(
        equal(batch, store.collate([part[i] for i in batch.index], batch.index))
        for batch in found)
    assert indices(Loader(dataset, batch_size=9, indices=[20, 1, 7])) == [[1, 7, 20]]


def test_a_position_of_another_stream_is_refused(dataset, tmp_path):
    state = Loader(dataset, batch_size=3, shuffle_seed=1).state()
    with pytest.raises(
            ShardError, match=
            "batch_size is 3 in the state but 4 now; build the loader with the settings and data"):
        Loader(dataset, batch_size=4, shuffle_seed=1).restore(state)
    with pytest.raises(ShardError, match="another stream: data is"):
        Loader(write(tmp_path, 5), batch_size=3, shuffle_seed=1).restore(state)
    with pytest.raises(ShardError, match="another stream: part is None in the state"):
        Loader(dataset, batch_size=3, shuffle_seed=1, indices=[0, 1]).restore(state)


@pytest.mark.parametrize("options, message",
                         [({"rank": 2, "world_size": 2}, "rank=2 of world_size=2; expected 0 … 1"),
                          ({"prefetch": 0}, "prefetch=0; expected at least 1")])
def test_impossible_settings_are_refused(dataset, options, message):
    with pytest.raises(ShardError, match=message):
        Loader(dataset, batch_size=2, **options)


# --- background, memory, damage
# --------------------------------------------------------------------------------------------


def test_no_more_batches_are_alive_than_the_bound_counts(dataset, monkeypatch):
    alive, most, plain = weakref.WeakSet(), [0], reader.ShardReader.batch

    class Counted:
        """Stands for a batch's states: counted while anything holds it."""

    def counting(self, *what):
        batch = plain(self, *what)
        token = Counted()
        alive.add(token)
        object.__setattr__(batch, "token", token)
        most[0] = max(most[0], len(alive))
        return batch

    monkeypatch.setattr(reader.ShardReader, "batch", counting)
    loader = Loader(dataset, batch_size=1, prefetch=3)
    for _batch in loader:
        end = time.monotonic() + 10
        while most[0] < 3 and time.monotonic() < end:  # a busy machine reads ahead later
            time.sleep(0.01)
        most[0] = max(most[0], len(alive))
    assert 3 <= most[0] <= 3 + 2
    del _batch
    gc.collect()
    assert not alive


def test_the_memory_bound_does_not_grow_with_the_dataset(tmp_path):
    bounds = []
    for n in (64, 256):
        stored = write(tmp_path / str(n), n)
        bounds.append(Loader(stored, batch_size=4, shuffle_seed=0, shuffle_buffer=8).memory_bound())
        by_tokens = Loader(stored, tokens_per_batch=60, batch_size=4)
        largest = max(t.nbytes for batch in by_tokens for t in (batch.drafter, batch.verifier))
        assert by_tokens.memory_bound() >= 6 * largest
    assert bounds[0] == bounds[1]


def test_breaking_off_leaves_no_thread_behind(dataset):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("shards")]

    for _batch in Loader(dataset, batch_size=1, prefetch=8, readers=2):
        assert threads()
        break
    gc.collect()
    assert threads() == []


def test_memory_is_lent_again_only_when_no_tensor_stands_on_it():
    memory = reader.Memory(2)
    first = memory.take((3, 4), torch.float32)
    kept, place = first[1:, :2], first.data_ptr()
    kept.fill_(7)
    del first
    second = memory.take((3, 4), torch.float32).fill_(1)
    assert second.data_ptr() != place and bool((kept == 7).all())
    del kept
    assert memory.take((2, 4), torch.bfloat16).data_ptr() == place
    assert memory.take((50, 4), torch.float32).shape == (50, 4)


def test_batches_that_are_kept_stay_as_they_were(dataset):
    kept = list(Loader(dataset, batch_size=2, shuffle_seed=0))
    assert all(
        equal(batch, store.collate([dataset[i] for i in batch.index], batch.index))
        for batch in kept)


def test_a_shard_truncated_under_the_reader_is_named_in_the_consumer(tmp_path):
    stored = write(tmp_path, 12)
    path = tmp_path / "shard-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    stored.verify, found = False, []
    what = r"shard-000002\.safetensors cannot be read .* in bytes 800 to 1376.*; run verify and rep"
    with pytest.raises(ShardError, match=what):
        for batch in Loader(stored, batch_size=2, prefetch=4):
            found += batch.index
    assert found == list(range(len(found))) and len(found) <= 8  # the batches before it


def test_a_shard_that_is_none_is_named(tmp_path):
    stored = write(tmp_path, 5)
    stored.verify = False
    for data, what in ((b"\x09" + b"\0" * 90, "cannot be read"), (b"\x02" + b"\0" * 7 + b"{}",
                                                                  "holds no offsets_drafter")):
        (tmp_path / "shard-000000.safetensors").write_bytes(data)
        with pytest.raises(ShardError,
                           match=rf"shard-000000\.safetensors {what} .*; run verify and repair"):
            list(Loader(stored, batch_size=2))


def test_offsets_that_do_not_fit_are_refused(tmp_path):
    stored = write(tmp_path, 4)
    path = tmp_path / "shard-000000.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    place = 8 + int.from_bytes(data[:8], "little") + header["offsets_verifier"]["data_offsets"][0]
    data[place + 8] ^= 0x40
    path.write_bytes(data)
    stored.verify = False
    with pytest.raises(
            ShardError,
            match="states of the verifier that fit neither its offsets nor the manifest"):
        list(Loader(stored, batch_size=2))


def test_missing_metadata_is_named(tmp_path):
    stored = write(tmp_path, 4)
    (tmp_path / "shard-000000.parquet").write_bytes(b"PAR1")
    stored.verify = False
    with pytest.raises(ShardError, match=r"shard-000000\.parquet cannot be read"):
        list(Loader(stored, batch_size=2))


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_a_changed_file_is_named_when_it_is_first_opened(tmp_path, kind):
    write(tmp_path, 4)
    path = tmp_path / f"shard-000000.{kind}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"shard-000000\.{kind} does not match its checksum"):
        list(Loader(store.ShardDataset(tmp_path), batch_size=2))
