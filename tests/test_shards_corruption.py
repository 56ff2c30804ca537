"""Corruption: 1 500 random changes of a single byte, over every file of a finished run, each one
detected and named."""

import random

import pytest
from shard_examples import example
from torch import randn

from xsd.core import ShardError
from xsd.shards import store
from xsd.shards.writer import ShardWriter

FLIPS = 1500


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with ShardWriter(folder, mode="teacher_forced", dtype="int8", samples_per_shard=4) as out:
        out.save_head("drafter", randn(99, 6), 99)
        out.save_head("verifier", randn(100, 8), 99)
        for i in range(10):
            out.write(example(i))
            out.flush(seconds=0.5)
    return folder


def flip(path, place, change):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ change]))


def test_every_single_byte_flip_in_any_file_of_a_run_is_detected(run):
    draw = random.Random(0)
    files = sorted(path for path in run.iterdir() if path.is_file())
    assert [path.name for path in files] == [
        "head-drafter.safetensors", "head-verifier.safetensors", "manifest.json",
        *(f"shard-00000{i}.{kind}" for i in range(3) for kind in ("parquet", "safetensors")),
        "times.jsonl",
    ]
    # Every file has its share, and the rest falls where the bytes are.
    chosen = [path for path in files for _ in range(50)]
    chosen += draw.choices(files, [path.stat().st_size for path in files], k=FLIPS - len(chosen))
    undetected = []
    for path in chosen:
        place, change = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
        flip(path, place, change)
        try:
            named = [problem.file for problem in store.verify(run)]
        except ShardError as error:  # the manifest cannot be trusted to name anything
            named = [run / "manifest.json"] if "manifest.json" in str(error) else []
        finally:
            flip(path, place, change)
        if named != [path]:
            undetected.append((path.name, place, change, named))
    assert undetected == []
    assert store.verify(run) == []


def test_a_file_that_lost_or_gained_a_byte_or_is_gone_is_named(run):
    for path in sorted(path for path in run.iterdir() if path.name != "manifest.json"):
        before = path.read_bytes()
        for after in (before[:-1], before + b"\0", b""):
            path.write_bytes(after)
            (problem,) = store.verify(run)
            assert problem.file == path
            assert problem.what == f"has {len(after)} bytes instead of {len(before)}"
        path.unlink()
        (problem,) = store.verify(run)
        assert problem.file == path and problem.what == "is missing"
        path.write_bytes(before)
    assert store.verify(run) == []
