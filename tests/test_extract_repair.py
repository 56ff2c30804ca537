"""Status of a run, what is found wrong with it, and repair of its damaged files."""

import os
import re
import signal
from dataclasses import replace

import pytest
from models_fixtures import tiny_pair
from tiny_pair import make_samples

from xsd.core import ShardError
from xsd.extract import monitor, repair, run
from xsd.shards import store

OPTIONS = {
    "modes": ("teacher_forced",), "max_new_tokens": 5, "batch_size": 2, "samples_per_shard": 3,
    "dtype": "fp16"
}


def contents(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir()
        if path.name.startswith(("shard-", "head-"))
    }


@pytest.fixture(scope="module")
def samples():
    return make_samples(9, sequences=3)


@pytest.fixture(scope="module")
def whole(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run.extract(tiny_pair(), samples, folder, **OPTIONS)
    return folder / "teacher_forced"


@pytest.fixture
def damaged(samples, tmp_path):
    run.extract(tiny_pair(), samples, tmp_path, **OPTIONS)
    folder = tmp_path / "teacher_forced"
    shard = folder / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 16
    shard.write_bytes(data)
    (folder / "shard-000002.parquet").unlink()
    head = folder / "head-drafter.safetensors"
    head.write_bytes(head.read_bytes()[:-4])
    (folder / "times.jsonl").write_text("{}")
    return folder


def test_repair_brings_back_the_very_bytes_and_touches_nothing_else(samples, whole, damaged):
    untouched = damaged / "shard-000000.safetensors"
    before = untouched.stat().st_mtime_ns
    mended = repair.repair(tiny_pair(), samples, damaged)
    assert {problem.file.name for problem in mended} == {
        "shard-000001.safetensors", "shard-000002.parquet", "head-drafter.safetensors",
        "times.jsonl",
    }
    assert store.verify(damaged) == [] and contents(damaged) == contents(whole)
    assert untouched.stat().st_mtime_ns == before
    assert store.ShardDataset(damaged).table()["seconds"].isna().all()
    assert repair.repair(tiny_pair(), samples, damaged) == []


def test_repair_with_other_samples_or_models_is_refused(samples, damaged):
    with pytest.raises(ShardError,
                       match="cannot be repaired with these models and samples: samples_hash is"):
        repair.repair(tiny_pair(), samples[:8], damaged)
    pair = tiny_pair()
    with pytest.raises(
            ShardError,
            match=re.escape("drafter.name is 'drafter' in the folder but 'verifier' now")):
        repair.repair(replace(pair, drafter=pair.verifier), samples, damaged)


def test_status_says_where_a_run_stands(samples, tmp_path):
    seen = []
    run.extract(tiny_pair(), samples, tmp_path, **OPTIONS, progress=lambda p:
                (seen.append(monitor.status(tmp_path)[0]), os.kill(os.getpid(), signal.SIGINT)
                 if p.done == 4 else None),
                )
    assert [(s.state, s.done, s.total, s.pid) for s in seen] == [("running", 2, 9, os.getpid()),
                                                                 ("running", 4, 9, os.getpid())]
    assert seen[1].rate > 0 and seen[1].eta_s == pytest.approx(5 / seen[1].rate)
    (stopped,) = monitor.status(tmp_path)
    assert (stopped.state, stopped.done, stopped.pid) == ("stopped", 4, None)
    assert "stopped, 4 of 9 (44 %) samples" in str(stopped)
    run.extract(tiny_pair(), samples, tmp_path, **OPTIONS)
    assert monitor.status(tmp_path / "teacher_forced")[0].state == "finished"
    with pytest.raises(ShardError, match="no run of an extraction"):
        monitor.status(tmp_path / "elsewhere")
