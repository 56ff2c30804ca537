"""One extraction by several processes: any of them may die and come back alone, and the run is the
one that a single process writes."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed
from forks import forked
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher

from xsd.core import ParameterError, ShardError
from xsd.extract import checks, monitor, ranks, run
from xsd.shards import format as layout
from xsd.shards import store, writer

OPTIONS = {
    "modes": ("teacher_forced", "free_running"), "layers": (-1, -2), "max_new_tokens": 4,
    "batch_size": 4, "samples_per_shard": 3, "dtype": "fp16",
}
N = 11
KINDS = ("free_running", "free_running.layer-2", "teacher_forced", "teacher_forced.layer-2")


@pytest.fixture(scope="module")
def samples():
    return make_samples(N, sequences=2)


@pytest.fixture(scope="module")
def whole(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run.extract(tiny_pair(), samples, folder, **OPTIONS)
    return contents(folder)


def contents(folder):
    """Everything of a run that must not depend on who wrote it: all files but times, and the
    manifests without provenance."""
    found = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
        if path.name.startswith(("shard-", "head-"))
    }
    for path in folder.rglob(layout.MANIFEST):
        manifest = layout.read_manifest(path.parent)
        found[str(path.relative_to(folder))] = {
            key: manifest[key] for key in set(manifest) - {"provenance", "digest", "files"}
        }
    return found


def ended(child):
    """Exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(progress):
    """A progress that kills its process, after the first batch."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_take_whole_shards_and_every_sample_once():
    for n, per_shard, size in ((10, 3, 2), (7, 3, 4), (1, 256, 3), (256, 256, 2), (1000, 7, 8)):
        shares = [ranks.Rank(number, size).share(n, per_shard) for number in range(size)]
        assert [i for share in shares for i in share] == list(range(n))
        assert all(share.start % per_shard == 0 or not share for share in shares)


def test_the_rank_is_read_from_the_environment_of_torchrun():
    assert ranks.Rank.of_this_process({"RANK": "1", "WORLD_SIZE": "4"}) == ranks.Rank(1, 4)
    assert ranks.Rank.of_this_process({}) == ranks.Rank(0, 1)
    with pytest.raises(ParameterError,
                       match="RANK='x' and WORLD_SIZE='2' are set but are no numbers"):
        ranks.Rank.of_this_process({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ParameterError, match="RANK=2 of WORLD_SIZE=2; expected a rank from 0 to 1"):
        ranks.Rank(2, 2)


def meet(number, file):
    """Join the process group of two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=number,
                                         world_size=2)


def test_two_gloo_processes_write_the_run_of_one(samples, whole, tmp_path):
    def work(number):
        meet(number, tmp_path / "meeting")
        report = run.extract(tiny_pair(), samples, tmp_path / "run", **OPTIONS,
                             rank=ranks.Rank.of_this_process())
        torch.distributed.barrier()
        assert report.finished and len(store.ShardDataset(tmp_path / "run" / "teacher_forced")) == N
        torch.distributed.destroy_process_group()

    assert [ended(child) for child in [forked(lambda: work(0)), forked(lambda: work(1))]] == [0, 0]
    assert contents(tmp_path / "run") == whole
    assert not list(
        (tmp_path / "run").rglob("part-*")) and not any(checks.verify(tmp_path / "run").values())
    assert store.ShardDataset(tmp_path / "run" / "free_running").table()["seconds"].notna().all()
    again = run.extract(tiny_pair(), samples, tmp_path / "run", **OPTIONS, rank=ranks.Rank(1, 2))
    assert again.finished and again.joined and again.tokens > 0, "found again by any rank"
    assert run.extract(tiny_pair(), samples, tmp_path / "run",
                       **OPTIONS).joined, "and by a single process"


def test_a_killed_rank_is_started_again_alone(samples, whole, tmp_path):
    def together(number):
        meet(number, tmp_path / "meeting")
        run.extract(tiny_pair(), samples, tmp_path, **OPTIONS, rank=ranks.Rank.of_this_process(),
                    progress=die if number else None)

    def alone():
        run.extract(tiny_pair(), samples, tmp_path, **OPTIONS,
                    rank=ranks.Rank.of_this_process({"RANK": "1", "WORLD_SIZE": "2"}))

    children = [forked(lambda: together(0)), forked(lambda: together(1))]
    assert [ended(child) for child in children] == [0, -signal.SIGKILL]
    states = {
        str(one.folder.relative_to(tmp_path)): (one.state, one.done, one.total)
        for one in monitor.status(tmp_path)
    }
    assert states == {f"{kind}/part-0000-of-0002": ("finished", 6, 6) for kind in KINDS
                      } | {f"{kind}/part-0001-of-0002": ("stopped", 2, 5) for kind in KINDS}
    with pytest.raises(
            ShardError,
            match=r"was begun by 2 process\(es\) but 1 would continue it now; start as many again"):
        run.extract(tiny_pair(), samples, tmp_path, **OPTIONS)
    assert ended(forked(alone)) == 0
    assert contents(tmp_path) == whole


def test_joining_that_is_killed_at_any_rename_is_continued(samples, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "provenance", dict)  # asks git, which is slow and no matter here
    options = {**OPTIONS, "modes": ("teacher_forced",), "layers": (-1,)}
    expected = {name: data for name, data in whole.items() if name.startswith("teacher_forced/")}

    def work(number, renames):
        real, left = os.replace, [renames]

        def replace(*names):
            if Path(names[0]).parent.name.startswith("part-") and not Path(
                    names[0]).name.startswith("."):  # a move, not a file written
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            real(*names)

        os.replace = replace
        run.extract(tiny_pair(), samples, tmp_path, **options, rank=ranks.Rank(number, 2))

    assert ended(forked(lambda: work(1, 99))) == 0
    kills = 0
    while ended(forked(lambda: work(0, 1))) == -signal.SIGKILL:
        kills += 1
    assert kills == 9, "four shards of two files and two heads, one rename a life"
    assert contents(tmp_path) == expected


def test_more_ranks_than_shards_leave_some_without_work(samples, whole, tmp_path):
    for number in reversed(range(6)):
        report = run.extract(tiny_pair(), samples, tmp_path,
                             **{**OPTIONS, "modes": ("free_running",),
                                "layers": (-1,)}, rank=ranks.Rank(number, 6))
        # 5, 4, 2 and 1 have a shard each; 0 comes when all is done.
        assert report.finished and report.joined == (number in (0, 1)), number
    assert contents(tmp_path) == {
        name: data for name, data in whole.items() if name.startswith("free_running/")
    }


def test_parts_of_other_settings_are_not_joined(samples, tmp_path):
    options = {**OPTIONS, "modes": ("teacher_forced",), "layers": (-1,)}
    run.extract(tiny_pair(), samples, tmp_path, **options, rank=ranks.Rank(0, 2))
    with pytest.raises(
            ShardError, match=
            r"part-0001-of-0002 does not belong to part-0000-of-0002: config\.max_new_tokens is 4"):
        run.extract(tiny_pair(), samples, tmp_path, **{**options, "max_new_tokens": 3},
                    rank=ranks.Rank(1, 2))
    (event,) = monitor.events(tmp_path)
    assert event.kind == "error" and event.part == "1 of 2" and "does not belong" in event.what


def torchrun_worker(samples, folder, options, killed):
    """What torchrun starts twice."""
    rank = ranks.Rank.of_this_process()
    report = run.extract(tiny_pair(), samples, folder, **options, rank=rank,
                         progress=die if rank.rank == killed else None)
    if not report.finished:  # told to stop because the other was killed
        os._exit(130)
    return report.joined


def test_the_same_command_under_torchrun_goes_on_after_one_process_was_killed(
        samples, whole, tmp_path):
    """torchrun's own launcher, its workers forked so that none of them imports torch again."""
    options = {**OPTIONS, "modes": ("teacher_forced",), "layers": (-1,)}

    def torchrun(name, killed=None):
        config = launcher.LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id=name,
                                       rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                                       max_restarts=0, monitor_interval=0.1, start_method="fork",
                                       log_line_prefix_template="",
                                       )
        return launcher.elastic_launch(config, torchrun_worker)(samples, tmp_path, options, killed)

    with pytest.raises(ChildFailedError):
        torchrun("first", killed=1)
    assert not (tmp_path / "teacher_forced" / layout.MANIFEST).exists()
    joined = torchrun("second")
    assert set(joined) == {0, 1} and any(joined.values())
    assert contents(tmp_path) == {
        name: data for name, data in whole.items() if name.startswith("teacher_forced/")
    }
    assert layout.read_manifest(tmp_path / "teacher_forced")["provenance"]["processes"] == 2
