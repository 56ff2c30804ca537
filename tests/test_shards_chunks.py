"""Padded .pt chunks become a run folder, bit for bit, and nothing in them is executed."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from xsd.adapters import heads
from xsd.core import ShardError
from xsd.shards import chunks, store

LENGTHS = [5, 7, 6, 9, 5, 8, 6]


def scene(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(LENGTHS[i], 4,
                       generator=generator), torch.randn(LENGTHS[i], 4, generator=generator)


def chunk(first, n):
    longest = max(LENGTHS[first:first + n])
    drafter, verifier = torch.zeros(n, longest, 4), torch.zeros(n, longest, 4)
    for row in range(n):
        drafter[row, :LENGTHS[first + row]], verifier[row, :LENGTHS[first + row]] = scene(first +
                                                                                          row)
    lines = [{
        "sample_idx": (first + row) // 2, "question_idx": (first + row) % 2,
        "question": f"Q{(first + row) % 2}?", "egpt_text": "one", "vl_text": "other",
        "seq_len": LENGTHS[first + row]
    } for row in range(n)]
    return {
        "egpt_hidden": drafter, "vl_hidden": verifier,
        "seq_lens": torch.tensor(LENGTHS[first:first + n]), "metadata": lines, "chunk_id": first,
        "n_samples": n,
    }


CONFIG = {
    "split": "train", "duration": "1s", "quant": "4bit", "max_questions": 2, "max_new_tokens": 50,
    "hidden_dim": 4
}


@pytest.fixture
def chunked(tmp_path):
    folder = tmp_path / "chunked_train_1s_4bit"
    (folder / "chunks").mkdir(parents=True)
    listed = []
    for first, n in ((0, 4), (4, 3)):
        torch.save(chunk(first, n), folder / "chunks" / f"chunk_{first:06d}.pt")
        listed.append({"path": f"chunk_{first:06d}.pt", "start_idx": first, "n_samples": n})
    (folder / "index.json").write_text(
        json.dumps({"total_samples": 7, "chunk_size": 4, "chunks": listed, "config": CONFIG}))
    return folder


def test_every_state_comes_over_bit_for_bit(chunked, tmp_path):
    assert chunks.import_chunks(chunked, tmp_path / "run", samples_per_shard=3) == 7
    dataset = store.ShardDataset(tmp_path / "run", expected_mode="free_running",
                                 expected_tap="post_norm")
    for i, states in enumerate(dataset):
        drafter, verifier = scene(i)
        assert torch.equal(states.hidden_by_drafter, drafter) and torch.equal(
            states.hidden_by_verifier, verifier)
        assert (states.clip, states.question, states.split) == (f"{i // 2:06d}", f"Q{i % 2}?",
                                                                "train")
        assert (states.text_by_drafter, states.text_by_verifier) == ("one", "other")
    assert dataset.manifest["config"]["source_config"] == CONFIG


def test_absent_token_ids_are_marked(chunked, tmp_path):
    chunks.import_chunks(chunked, tmp_path / "run")
    dataset = store.ShardDataset(tmp_path / "run")
    assert not dataset.has_token_ids
    assert {
        int(i) for batch in dataset.batches(7)
        for i in batch.ids_by_verifier[batch.mask]
    } == {-1}


def test_a_single_file_reads_as_its_chunks_do(chunked, tmp_path):
    path = tmp_path / "hidden_states_train_1s_4bit_20260131_top2q.pt"
    torch.save({**chunk(0, 7), "config": CONFIG}, path)
    for one, other in zip(chunks.read_chunks(path), chunks.read_chunks(chunked), strict=True):
        assert torch.equal(
            one.hidden_by_drafter,
            other.hidden_by_drafter) and (one.clip, one.split) == (other.clip, other.split)


def test_scenes_are_named_by_the_dataset_folder(chunked):
    clips = [("interlaken", "000"), ("interlaken", "001"), ("zurich", "000"), ("zurich", "001")]
    assert [(s.sequence, s.clip)
            for s in chunks.read_chunks(chunked, clips=clips)] == [clips[i // 2] for i in range(7)]
    with pytest.raises(ShardError, match="sample 6 is of scene 3 but the dataset folder has 3"):
        list(chunks.read_chunks(chunked, clips=clips[:3]))


def test_an_import_goes_on_where_it_stopped(chunked, tmp_path):
    class StopError(Exception):
        pass

    seen = []

    def stop(n):
        seen.append(n)
        if len(seen) == 5:
            raise StopError

    with pytest.raises(StopError):
        chunks.import_chunks(chunked, tmp_path / "run", samples_per_shard=2, progress=stop)
    after = []
    assert chunks.import_chunks(chunked, tmp_path / "run", samples_per_shard=2,
                                progress=after.append) == 7
    assert 0 < len(after) < 7
    chunks.import_chunks(chunked, tmp_path / "whole", samples_per_shard=2)
    for shard in (tmp_path / "whole").glob("shard-*"):
        assert shard.read_bytes() == (tmp_path / "run" / shard.name).read_bytes()


def test_a_head_file_is_taken_along(chunked, tmp_path):
    torch.save({"lm_head_weight": torch.eye(4), "vocab_size": 4}, tmp_path / "vl_lm_head.pt")
    chunks.import_chunks(chunked, tmp_path / "run", head=heads.read(tmp_path / "vl_lm_head.pt"))
    assert torch.equal(store.ShardDataset(tmp_path / "run").head("verifier"), torch.eye(4))


class Harm:
    """Writes a file when unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(chunked, tmp_path):
    torch.save({**chunk(0, 4), "extra": Harm(tmp_path / "harm")},
               chunked / "chunks" / "chunk_000000.pt")
    with pytest.raises(ShardError, match=r"chunk_000000\.pt cannot be read"):
        list(chunks.read_chunks(chunked))
    assert not (tmp_path / "harm").exists()


def test_damaged_and_foreign_files_are_named(chunked, tmp_path):
    first, second = (chunked / "chunks" / f"chunk_{i:06d}.pt" for i in (0, 4))
    second.write_bytes(second.read_bytes()[:-200])
    with pytest.raises(ShardError, match=r"chunk_000004\.pt cannot be read"):
        list(chunks.read_chunks(chunked))
    second.unlink()
    with pytest.raises(ShardError, match=r"chunk_000004\.pt is missing; copy it beside the others"):
        list(chunks.read_chunks(chunked))
    torch.save(chunk(0, 3), first)
    with pytest.raises(ShardError, match="4 samples announced, 3 lengths"):
        list(chunks.read_chunks(chunked))
    torch.save({"weights": torch.zeros(3)}, first)
    with pytest.raises(
            ShardError, match=
            "holds no egpt_hidden, vl_hidden, seq_lens; it is not a file of paired hidden states"):
        list(chunks.read_chunks(chunked))
    with pytest.raises(
            ShardError,
            match=re.escape("has no index.json; give the folder that holds it and chunks/")):
        list(chunks.read_chunks(tmp_path))


def exploding():
    """Three kilobytes that are 2^40 texts once written out."""
    shared = ["x"] * 10
    for _ in range(40):
        shared = [shared, shared]
    return shared


def saved(path, **changes):
    torch.save({**chunk(0, 4), "config": CONFIG, **changes}, path)
    return path


def with_line(**fields):
    return [{**line, **fields} for line in chunk(0, 4)["metadata"]]


@pytest.mark.parametrize("changes", [
    {"metadata": with_line(seconds=np.float64(0.5), n=np.int64(3), said=np.str_("x"))},
    {"metadata": with_line(sample_idx=np.int64(0), ids=np.arange(3))},
    {"seq_lens": LENGTHS[:4]}, {"seq_lens": np.array(LENGTHS[:4])},
    {"seq_lens": [torch.tensor(n) for n in LENGTHS[:4]]},
    {"egpt_hidden": list(chunk(0, 4)["egpt_hidden"])},
    {"egpt_hidden": [scene(i)[0] for i in range(4)]},
    {"egpt_hidden": chunk(0, 4)["egpt_hidden"].numpy().astype(">f4")},
])
def test_numpys_numbers_and_lists_of_tensors_are_data(tmp_path, changes):
    plain = chunks.read_chunks(saved(tmp_path / "plain.pt"))
    for one, other in zip(chunks.read_chunks(saved(tmp_path / "own.pt", **changes)), plain,
                          strict=True):
        assert torch.equal(one.hidden_by_drafter, other.hidden_by_drafter)
        assert torch.equal(one.hidden_by_verifier, other.hidden_by_verifier)


@pytest.mark.parametrize("changes, words", [
    ({"seq_lens": torch.tensor([5.0, 7.0, 6.0, float("nan")])}, "seq_lens are float32"),
    ({"seq_lens": torch.tensor([5, 7, 6, -1])}, "whole numbers from 0 on"),
    ({"seq_lens": torch.tensor([5, 7, 6, 10])}, "4 lengths up to 10"),
    ({"seq_lens": "5769"}, "seq_lens holds str"),
    ({"egpt_hidden": torch.zeros(4, 9, 4, dtype=torch.float64)}, "no shard holds bit for bit"),
    ({"egpt_hidden": torch.zeros(1, 1, 4).expand(4, 10**9, 4)}, "is not whole in the file"),
    ({"egpt_hidden": [scene(0)[0][:, :3], *(scene(i)[0] for i in (1, 2, 3))]}, "disagrees with it"),
    ({"egpt_hidden": torch.full((4, 9, 4), float("inf"))}, "hold NaN or infinity"),
    ({"metadata": with_line(question=exploding())}, "the metadata of sample 0 holds something"),
    ({"metadata": with_line(question="x" * 200_000)}, "texts of at most 100000 characters"),
    ({"metadata": with_line(sample_idx=-1)}, "numbers from 0 on"),
    ({"metadata": ["a"] * 4}, "of metadata for 4 samples"),
    ({"config": {"a": exploding()}}, "nested too deep or too large"),
    ({"config": [1]}, "its config is list"),
    ({"when": np.datetime64("2026-01-01")}, "numpy values of type M8"),
])
def test_what_no_script_wrote_is_refused_before_anything_is_made_of_it(tmp_path, changes, words):
    path = saved(tmp_path / "x.pt", **changes)
    with pytest.raises(ShardError) as said:
        chunks.import_chunks(path, tmp_path / "run")
    assert words in str(said.value) and "\n" not in str(said.value)


def test_files_that_are_no_chunk_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(chunk(0, 4), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ShardError, match=r"torch's format before version 1\.6"):
        list(chunks.read_chunks(path))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ShardError, match="is a git-lfs pointer"):
        list(chunks.read_chunks(path))
    path.write_bytes(pickle.dumps({"a": 1})[1:])
    with pytest.raises(ShardError, match="truncated or not such a file"):
        list(chunks.read_chunks(path))
    saved(path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as inside, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for one in inside.infolist():
            out.writestr(one.filename, inside.read(one) + b"\0" * (1 << 20))
    with pytest.raises(ShardError, match="its records are compressed or too large"):
        list(chunks.read_chunks(packed))


@pytest.mark.parametrize("text", ["", "[]", '"x"', "{}", "[" * 100_000, '{"chunks": [3]}',
                                  '{"chunks": [{"path": "a.pt", "n_samples": 2.5}]}',
                                  '{"chunks": [{"path": "../../etc/passwd", "n_samples": 1}]}'])
def test_an_index_that_is_none_is_named(chunked, text):
    (chunked / "index.json").write_text(text)
    with pytest.raises(ShardError, match=r"index\.json|chunks/passwd is missing"):
        list(chunks.read_chunks(chunked))
