"""Writing: what survives a stop, what is refused, and that a resumed run is the same bytes."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_examples import example, folder_bytes

from xsd import files
from xsd.core import ShardError, StorageError
from xsd.shards import store, writer

OPTIONS = {"mode": "teacher_forced", "dtype": "fp32", "config": {"seed": 3}, "samples_per_shard": 4}


def written(folder, n=10, **options):
    with writer.ShardWriter(folder, **{**OPTIONS, **options}) as out:
        for i in range(n):
            out.write(example(i))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return folder_bytes(written(tmp_path_factory.mktemp("whole")))


@settings(max_examples=15)
@given(stops=st.lists(st.integers(0, 10), max_size=4), flushes=st.sets(st.integers(0, 10)))
def test_stopped_and_resumed_anywhere_gives_the_bytes_of_one_go(tmp_path_factory, whole, stops,
                                                                flushes):
    folder = tmp_path_factory.mktemp("resumed")
    for stop in [*sorted(stops), 10]:
        with_pieces = writer.ShardWriter(folder, **OPTIONS)
        assert with_pieces.n_written <= stop
        for i in range(with_pieces.n_written, stop):
            with_pieces.write(example(i))
            if i in flushes:
                with_pieces.flush()
        with_pieces.close(finished=stop == 10 and with_pieces.n_written == 10)
    assert folder_bytes(folder) == whole


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_resuming_does_not_round_a_second_time(tmp_path, dtype):
    whole = written(tmp_path / "whole", dtype=dtype)
    out = writer.ShardWriter(tmp_path / "resumed", **{**OPTIONS, "dtype": dtype})
    for i in range(3):
        out.write(example(i))
    out.close(finished=False)
    with writer.ShardWriter(tmp_path / "resumed", **{**OPTIONS, "dtype": dtype}) as out:
        assert out.n_written == 3
        for i in range(3, 10):
            out.write(example(i))
    assert folder_bytes(tmp_path / "resumed") == folder_bytes(whole)


def test_an_exception_inside_keeps_what_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer.ShardWriter(tmp_path, **OPTIONS) as out:
        for i in range(6):
            out.write(example(i))
        raise KeyboardInterrupt
    with writer.ShardWriter(tmp_path, **OPTIONS) as out:
        assert out.n_written == 6 and not out.finished


def test_a_damaged_piece_is_dropped_with_those_after_it(tmp_path):
    out = writer.ShardWriter(tmp_path, **OPTIONS)
    for i in range(3):
        out.write(example(i))
        out.flush()
    out.close(finished=False)
    second = sorted(tmp_path.glob("pending-*"))[1]
    data = bytearray(second.read_bytes())
    data[-3] ^= 1
    second.write_bytes(data)
    assert [problem.file for problem in store.verify(tmp_path)] == [second]
    again = writer.ShardWriter(tmp_path, **OPTIONS)
    assert again.n_written == 1
    again.close(finished=False)
    assert len(list(tmp_path.glob("pending-*"))) == 1


def test_a_half_written_file_is_ignored_and_removed(tmp_path):
    written(tmp_path, 5)
    left = tmp_path / ".shard-000002.safetensors.abc.part"
    left.write_bytes(b"half")
    writer.ShardWriter(tmp_path, **OPTIONS).close()
    assert not left.exists() and len(store.ShardDataset(tmp_path)) == 5


@pytest.mark.parametrize(
    "change, message",
    [({"dtype": "bf16"}, "dtype is 'fp32' in the folder but 'bf16' now"),
     ({"mode": "free_running"}, "mode is 'teacher_forced' in the folder but 'free_running' now"),
     ({"tap": "pre_norm"}, "tap is 'post_norm' in the folder but 'pre_norm' now"),
     ({"config": {"seed": 4}}, "config.seed is 3 in the folder but 4 now"),
     ({"samples_per_shard": 5}, "samples_per_shard is 4 in the folder but 5 now"),],
)
def test_other_settings_are_refused_naming_the_field(tmp_path, change, message):
    written(tmp_path, 2)
    with pytest.raises(ShardError,
                       match=re.escape(message) + "; use the same ones or another folder"):
        writer.ShardWriter(tmp_path, **{**OPTIONS, **change})
    assert files.lock_holder(tmp_path) is None


def test_a_second_writer_is_refused_with_the_first_ones_pid(tmp_path):
    first = writer.ShardWriter(tmp_path, **OPTIONS)
    assert files.lock_holder(tmp_path) == os.getpid()
    with pytest.raises(StorageError,
                       match=f"being written by process {os.getpid()}; wait for it to finish"):
        writer.ShardWriter(tmp_path, **OPTIONS)
    first.close(finished=False)
    writer.ShardWriter(tmp_path, **OPTIONS).close(finished=False)


def test_a_killed_writer_leaves_no_lock(tmp_path):
    code = ("import os, sys\nfrom xsd.shards.writer import ShardWriter\nShardWriter(sys.argv[1], "
            f"**{OPTIONS!r})\nos.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False,
                          cwd=Path(writer.__file__).parents[2])
    assert done.returncode == -9
    assert files.lock_holder(tmp_path) is None
    writer.ShardWriter(tmp_path, **OPTIONS).close(finished=False)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_full_disk_stops_cleanly_and_the_run_resumes(tmp_path, monkeypatch, whole, fails_at):
    """fails_at: the first file of the first shard, its parquet, its manifest."""
    folder, real, calls = tmp_path / "full", Path.write_bytes, []
    out = writer.ShardWriter(folder, **OPTIONS)
    out.write(example(0))
    out.flush()

    def full(path, data):
        calls.append(path)
        if len(calls) >= fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="the disk is full; free space"):
        for i in range(1, 10):
            out.write(example(i))
            out.flush() if i == 3 else None
    with pytest.raises(StorageError, match="the disk is full"):
        out.close()
    monkeypatch.undo()
    with writer.ShardWriter(folder, **OPTIONS) as out:
        assert out.n_written == 1
        for i in range(1, 10):
            out.write(example(i))
    assert folder_bytes(folder) == whole


def test_a_finished_run_takes_no_more(tmp_path):
    written(tmp_path, 2)
    out = writer.ShardWriter(tmp_path, **OPTIONS)
    assert out.finished and out.n_written == 2
    with pytest.raises(ShardError, match="is finished with 2 samples; write to another folder"):
        out.write(example(2))
    out.close()


@pytest.mark.parametrize(
    "change, message",
    [({"mode": "free_running"}, "is of mode='free_running' but"),
     ({"tap": "pre_norm"}, "is of tap='pre_norm' but"),
     ({"ids_by_drafter": torch.arange(2)
       }, "the drafter has states [3, 6] and ids [2]; expected [S, D] and [S] of one length"),
     ({"hidden_by_verifier": torch.full(
         (3, 8), torch.nan)}, "the verifier's states hold NaN or infinity"),
     ({"hidden_by_drafter": torch.zeros(3, 5)}, "the drafter's states are 5 wide but"),
     ({"hidden_by_drafter": torch.zeros(2, 6), "ids_by_drafter": torch.arange(2)
       }, "teacher-forced pairs share their positions"),],
)
def test_what_does_not_belong_is_refused(tmp_path, change, message):
    with writer.ShardWriter(tmp_path, **OPTIONS) as out:
        out.write(example(0))
        with pytest.raises(ShardError, match=re.escape(message)):
            out.write(example(0, **change))


def test_values_beyond_fp16_are_refused_with_the_way_out(tmp_path):
    out = writer.ShardWriter(tmp_path, **{**OPTIONS, "dtype": "fp16"})
    with pytest.raises(ShardError, match="overflow dtype='fp16'; store them as 'bf16' or 'fp32'"):
        out.write(example(0, hidden_by_drafter=torch.full((3, 6), 1e5)))
    out.close(finished=False)


def test_an_unknown_mode_or_dtype_is_named(tmp_path):
    with pytest.raises(
            ShardError,
            match="mode='forced' is unknown; expected one of free_running, teacher_forced"):
        writer.ShardWriter(tmp_path, mode="forced")
    with pytest.raises(ShardError,
                       match="dtype='fp8' is unknown; expected one of fp32, bf16, fp16, int8"):
        writer.ShardWriter(tmp_path, mode="free_running", dtype="fp8")


def test_an_empty_run_cannot_be_finished(tmp_path):
    with pytest.raises(ShardError, match="nothing was written"):
        writer.ShardWriter(tmp_path, **OPTIONS).close()


def test_another_head_is_refused(tmp_path):
    out = writer.ShardWriter(tmp_path, **OPTIONS)
    out.save_head("verifier", torch.eye(100, 8), 7)
    out.save_head("verifier", torch.eye(100, 8), 7)
    with pytest.raises(ShardError, match="another LM head of the verifier"):
        out.save_head("verifier", 2 * torch.eye(100, 8), 7)
    out.close(finished=False)


def test_times_of_samples_come_back_in_the_table(tmp_path):
    with writer.ShardWriter(tmp_path, **OPTIONS) as out:
        for i in range(6):
            out.write(example(i))
            if i % 3 == 2:
                out.flush(seconds=3.0 * i)
    assert store.ShardDataset(tmp_path).table()["seconds"].tolist() == [2.0] * 3 + [5.0] * 3
    assert json.loads(
        (tmp_path /
         "times.jsonl").read_text().splitlines()[0]) == {"first": 0, "n": 3, "seconds": 6.0}
