"""Reading: what was written comes back, and whatever is damaged or of another kind is named."""

import pickle
import re
from dataclasses import fields
from hashlib import sha256

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_examples import example

from xsd.core import ShardError
from xsd.shards import format as layout
from xsd.shards import reader, store
from xsd.shards.loader import Loader
from xsd.shards.writer import ShardWriter


def write(folder, n=10, *, dtype="fp32", mode="teacher_forced", tap="post_norm", heads=True):
    with ShardWriter(folder, mode=mode, tap=tap, dtype=dtype, samples_per_shard=4) as out:
        if heads:
            out.save_head("verifier", torch.arange(800.0).reshape(100, 8), 99)
        for i in range(n):
            out.write(example(i, mode=mode, tap=tap))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("run"))


@pytest.fixture
def own(tmp_path):
    return write(tmp_path)


@pytest.mark.parametrize("mode", ["teacher_forced", "free_running"])
def test_every_field_of_every_sample_comes_back(tmp_path, mode):
    dataset = store.ShardDataset(write(tmp_path, mode=mode))
    for i in reversed(range(10)):
        found, wanted = dataset[i], example(i, mode=mode)
        for field in fields(wanted):
            a, b = getattr(found, field.name), getattr(wanted, field.name)
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name
    assert torch.equal(dataset[-1].ids_by_drafter, dataset[9].ids_by_drafter)
    with pytest.raises(IndexError):
        dataset[10]


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1,
             max_size=5))
def test_int8_is_within_half_a_step_of_each_row(rows):
    states = torch.tensor(rows)
    stored, scale = layout.encode_states(states, "int8")
    step = states.abs().amax(-1, keepdim=True) / 127
    assert bool(((layout.decode_states(stored, scale) - states).abs()
                 <= 0.5001 * step + 1e-30).all())


@pytest.mark.parametrize("dtype, relative", [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_float_dtypes_keep_their_precision(tmp_path, dtype, relative):
    dataset = store.ShardDataset(write(tmp_path, 2, dtype=dtype))
    found, wanted = dataset[1].hidden_by_verifier, example(1).hidden_by_verifier
    assert found.dtype == torch.float32
    # fp16 loses more below its smallest normal number, 6e-5
    assert bool(((found - wanted).abs()
                 <= relative * wanted.abs() + (1e-7 if relative else 0)).all())


def test_torchs_dtype_names_are_understood(tmp_path):
    assert store.ShardDataset(write(tmp_path, 2, dtype="bfloat16")).manifest["dtype"] == "bf16"


@pytest.mark.parametrize("mode", ["teacher_forced", "free_running"])
def test_ids_are_read_without_a_state(tmp_path, monkeypatch, mode):
    dataset = store.ShardDataset(write(tmp_path, dtype="int8", mode=mode))
    pairs, read = list(dataset), []

    plain = reader.ShardFile.read
    monkeypatch.setattr(reader.ShardFile, "read", lambda file, target, name, *where:
                        read.append(name) or plain(file, target, name, *where))
    for role in ("drafter", "verifier"):
        wanted = [getattr(pair, f"ids_by_{role}").tolist() for pair in pairs]
        fresh = store.ShardDataset(tmp_path)
        found = fresh.ids(role)
        assert [ids.tolist() for ids in found] == wanted and found[0].dtype == "int64"
        assert fresh.ids(role) is found
        part = fresh.subset(indices=[7, 2])
        assert [ids.tolist() for ids in part.ids(role)] == [wanted[7], wanted[2]]
    assert set(read) == {"offsets_drafter", "offsets_verifier", "ids_by_drafter", "ids_by_verifier"}


def test_states_are_copies_that_may_be_changed(folder):
    dataset = store.ShardDataset(folder)
    dataset[0].hidden_by_drafter.zero_()
    assert torch.equal(dataset[0].hidden_by_drafter, example(0).hidden_by_drafter)


def test_the_head_and_the_draft_vocabulary_are_read_back(folder):
    dataset = store.ShardDataset(folder)
    assert torch.equal(dataset.head("verifier"),
                       torch.arange(800.0).reshape(100, 8)) and dataset.draft_vocab_size() == 99
    with pytest.raises(ShardError,
                       match=r"holds no LM head of the 'drafter' \(it holds: verifier\)"):
        dataset.head("drafter")


def test_states_before_the_norm_are_not_given_a_head(tmp_path):
    dataset = store.ShardDataset(write(tmp_path, tap="pre_norm"))
    with pytest.raises(
            ShardError,
            match="re-extract with tap='post_norm' or load the head together with its norm"):
        dataset.head("verifier")


def test_a_dataset_travels_to_another_process(folder):
    dataset = store.ShardDataset(folder)
    assert dataset[3].question == "Question 3?"
    assert torch.equal(
        pickle.loads(pickle.dumps(dataset))[3].hidden_by_drafter, dataset[3].hidden_by_drafter)


# --- subsets, splits, batches
# ----------------------------------------------------------------------------------------------


def test_a_subset_holds_its_sequences_only(folder):
    part = store.ShardDataset(folder).subset(sequences=["seq1"])
    assert [pair.question for pair in part] == [f"Question {i}?" for i in (1, 4, 7)]
    assert part.table()["question"].tolist() == [pair.question for pair in part]
    assert part.subset(indices=[2])[0].question == "Question 7?"
    with pytest.raises(ShardError, match="holds no sequence seq9; it holds seq0, seq1, seq2"):
        store.ShardDataset(folder).subset(sequences=["seq9"])


def test_batches_pad_on_the_right_and_cover_every_sample_once(folder):
    dataset = store.ShardDataset(folder)
    seen = []
    for batch in Loader(dataset, batch_size=4, shuffle_seed=5):
        assert batch.drafter.dtype == batch.verifier.dtype == torch.float32
        assert batch.mode == "teacher_forced"
        assert batch.mask.any(0).all(), "no column without a position"
        for row, i in enumerate(batch.index):
            n = int(batch.mask[row].sum())
            assert batch.mask[row, :n].all(
            ) and not batch.drafter[row, n:].any() and not batch.ids_by_verifier[row, n:].any()
            assert torch.equal(batch.drafter[row, :n], dataset[i].hidden_by_drafter)
            assert torch.equal(batch.ids_by_verifier[row, :n], dataset[i].ids_by_verifier)
            assert batch.sequence[row] == dataset[i].sequence
        seen += batch.index
    assert sorted(seen) == list(range(10)) and seen != list(range(10))


def test_free_running_batches_keep_positions_both_models_have(tmp_path):
    dataset = store.ShardDataset(write(tmp_path, mode="free_running"))
    (batch,) = dataset.batches(10)
    assert batch.mask.sum(1).tolist() == [3] * 10 and batch.drafter.shape == (10, 3, 6)


def test_batches_come_in_order_also_of_a_subset(folder):
    dataset = store.ShardDataset(folder)
    assert [batch.index for batch in dataset.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    (batch,) = dataset.subset(indices=[7, 1]).batches(3)
    assert batch.index == [0, 1]
    for row, i in enumerate((7, 1)):
        assert torch.equal(batch.verifier[row][batch.mask[row]], dataset[i].hidden_by_verifier)
    with pytest.raises(ShardError, match="batch_size=0; expected at least 1"):
        next(dataset.batches(0))


# --- refusals
# ------------------------------------------------------------------------------------------------


def test_the_other_mode_or_tap_is_refused(folder):
    with pytest.raises(ShardError,
                       match="holds teacher_forced pairs but free_running ones are needed here"):
        store.ShardDataset(folder, expected_mode="free_running")
    with pytest.raises(ShardError, match="taken with tap='post_norm' but 'pre_norm' is needed"):
        store.ShardDataset(folder, expected_tap="pre_norm")


def test_an_unfinished_run_is_read_only_on_request(tmp_path):
    out = ShardWriter(tmp_path, mode="teacher_forced", samples_per_shard=4)
    for i in range(6):
        out.write(example(i))
    out.close(finished=False)
    with pytest.raises(
            ShardError,
            match=r"is not finished \(4 samples in complete shards\); run the same extraction again"
    ):
        store.ShardDataset(tmp_path)
    assert len(store.ShardDataset(tmp_path, unfinished=True)) == 4


@pytest.mark.parametrize("field, value", [("mode", "forced"), ("tap", "middle"), ("dtype", "fp8")])
def test_an_unknown_kind_in_the_manifest_is_refused(own, field, value):
    layout.write_manifest(own, {**layout.read_manifest(own), field: value})
    with pytest.raises(ShardError, match=f"says {field}='{value}' .Input should be"):
        store.ShardDataset(own)


def test_another_version_is_refused(own):
    layout.write_manifest(own, {**layout.read_manifest(own), "version": 2})
    with pytest.raises(ShardError, match="version 2 but this code reads 'xsd-shards' version 1"):
        store.ShardDataset(own)


def test_a_manifest_edited_by_hand_is_refused(own):
    path = own / "manifest.json"
    path.write_text(path.read_text().replace('"mode": "teacher_forced"', '"mode": "free_running"'))
    with pytest.raises(ShardError, match="was changed after it was written"):
        store.ShardDataset(own)


def test_a_manifest_cannot_name_files_elsewhere(own):
    manifest = layout.read_manifest(own)
    manifest["shards"][0]["file"] = "../other.safetensors"
    layout.write_manifest(own, manifest)
    with pytest.raises(ShardError, match=re.escape("names the file '../other.safetensors'")):
        store.ShardDataset(own)


def test_a_folder_of_two_modes_points_to_its_sub_folders(tmp_path):
    write(tmp_path / "teacher_forced", 2)
    with pytest.raises(ShardError, match="give one of its sub-folders: teacher_forced"):
        store.ShardDataset(tmp_path)
    with pytest.raises(ShardError, match="run the extraction, or give the folder it wrote"):
        store.ShardDataset(tmp_path / "nowhere")


def test_a_truncated_shard_is_named(own):
    shard = own / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(
            ShardError,
            match=r"shard-000001\.safetensors has \d+ bytes instead of \d+; repair the run"):
        store.ShardDataset(own)


def test_a_missing_shard_is_named(own):
    (own / "shard-000002.parquet").unlink()
    with pytest.raises(ShardError, match=r"shard-000002\.parquet is missing; repair the run"):
        store.ShardDataset(own)
    assert [(p.file.name, p.shard) for p in store.verify(own)] == [("shard-000002.parquet", 2)]


@settings(max_examples=60)
@given(data=st.data())
def test_every_flip_of_a_single_bit_is_detected(folder, data):
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    before = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(before)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    try:
        if path.name == "manifest.json":
            with pytest.raises(ShardError, match=r"manifest\.json"):
                store.verify(folder)
        else:
            assert [(p.file, p.what)
                    for p in store.verify(folder)] == [(path, "does not match its checksum")]
    finally:
        path.write_bytes(before)
    assert store.verify(folder) == []


# --- manifests that lie, with the right digest


@pytest.mark.parametrize("change, words", [
    ({"n_samples": 10**12}, "n_samples=1000000000000 where its shards hold"),
    ({"n_samples": -1}, "says n_samples=-1"), ({"n_samples": "4"}, "says n_samples='4'"),
    ({"hidden_size_verifier": 10**9}, "says hidden_size_verifier=1000000000"),
    ({"shards": {}}, "says shards={}"), ({"heads": {"other": {}}}, "says heads.other"),
    ({"config": None}, "says config=None"), ({"finished": "yes"}, "says finished='yes'"),
])
def test_a_manifest_whose_fields_lie_is_refused(own, change, words):
    layout.write_manifest(own, {**layout.read_manifest(own), **change})
    with pytest.raises(ShardError) as said:
        store.ShardDataset(own)
    assert words in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize("field, value", [
    ("file", "../../etc/passwd"), ("file", "shard-000001.safetensors"), ("metadata_file", "/x"),
    ("n_samples", 10**12), ("first", 3), ("n_tokens_verifier", 10**12), ("bytes", 8)])
def test_a_shard_that_is_listed_wrongly_is_refused(own, field, value):
    manifest = layout.read_manifest(own)
    manifest["shards"][0][field] = value
    layout.write_manifest(own, manifest)
    with pytest.raises(ShardError, match=r"contradicts itself|instead of"):
        store.ShardDataset(own)


def test_a_shard_that_leads_out_of_the_folder_is_refused(own, tmp_path_factory):
    path = own / "shard-000000.safetensors"
    path.rename(away := tmp_path_factory.mktemp("away") / "x")
    path.symlink_to(away)
    with pytest.raises(ShardError, match="is a link that leaves the folder"):
        store.ShardDataset(own)


@pytest.mark.parametrize("line", ["", "junk", "[" * 100_000, '{"first": 0, "n": 0, "seconds": 1.0}',
                                  '{"first": "a", "n": [], "seconds": {}}', None])
def test_no_times_make_a_run_unreadable(own, line):
    path = own / layout.TIMES
    path.unlink(missing_ok=True)
    if line is not None:
        path.write_text(line)
    assert store.ShardDataset(own).table()["seconds"].isna().all()


def test_metadata_that_would_fill_the_memory_is_refused(own):
    manifest = layout.read_manifest(own)
    entry = manifest["shards"][0]
    path = own / entry["metadata_file"]
    table = pd.read_parquet(path)
    for texts, compression in (("x" * (64 << 20), "snappy"), ("x", "zstd")):
        table.assign(question=texts).to_parquet(path, index=False, compression=compression)
        data = path.read_bytes()
        entry |= {"metadata_bytes": len(data), "metadata_sha256": sha256(data).hexdigest()}
        layout.write_manifest(own, manifest)
        with pytest.raises(ShardError, match=r"parquet cannot be read \(.*(MB of text|lines of)"):
            store.ShardDataset(own).table()
