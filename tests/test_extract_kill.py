"""An extraction that is killed, starved of disk, or started twice: nothing flushed is lost, and the
bytes are those of a quiet run."""

import errno
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from forks import forked
from models_fixtures import tiny_pair
from tiny_pair import make_samples

from xsd.core import StorageError
from xsd.extract import checks, monitor, run, supervise
from xsd.shards import writer

N = 80
OPTIONS = {
    "modes": ("teacher_forced", "free_running"), "max_new_tokens": 3, "batch_size": 2,
    "samples_per_shard": 7, "dtype": "fp16",
}
QUICK = {**OPTIONS, "modes": ("teacher_forced",)}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
        if path.name.startswith(("shard-", "head-", "pend"))
    }


@pytest.fixture(scope="module")
def samples():
    return make_samples(N, sequences=4)


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Provenance asks git for the revision, which is slow and no matter here."""
    monkeypatch.setattr(writer, "provenance", dict)


def ends_within(child, seconds):
    """True if the process ended by itself, and well, within that time."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.0005)


def test_killed_more_than_fifty_times_at_random_moments_it_ends_in_the_same_bytes(
        samples, tmp_path):
    """One run, many lives, each at most a few batches further than the last: how long one may be
    follows the progress, and a life that ran ahead in a quiet second waits for its end."""
    run.extract(tiny_pair(), samples, tmp_path / "whole", **OPTIONS)
    whole, folder = contents(tmp_path / "whole"), tmp_path / "run"
    draw, limit_s, done, wanted = random.Random(0), 0.05, 0, 55

    def live(end):
        run.extract(tiny_pair(), samples, folder, **OPTIONS,
                    progress=lambda now: time.sleep(600) if now.done >= end else None)

    for kills in range(1, wanted + 1):
        due = N * kills / (wanted + 20)
        child = forked(lambda end=due + 6: live(end))
        assert not ends_within(child, draw.uniform(0, limit_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before, states = done, monitor.status(folder) if list(
            folder.glob("*/manifest.json")) else []
        done = min((state.done for state in states), default=0)
        assert done >= before, "a flushed batch was lost"
        limit_s = max(limit_s * (0.5 if done > due else 1.3), 0.001)
    assert 0 < done < N
    report = run.extract(tiny_pair(), samples, folder, **OPTIONS)
    assert report.finished and report.resumed == done
    assert contents(folder) == whole and not any(checks.verify(folder).values())


def test_a_second_process_on_one_run_is_refused_and_the_first_goes_on(samples, tmp_path):
    def second():
        try:
            run.extract(tiny_pair(), samples[:6], tmp_path, **QUICK)
        except StorageError as error:
            os._exit(7 if f"is being written by process {parent}; wait for it to finish, stop it" in
                     str(error) else 8)

    parent, codes = os.getpid(), []

    def start_another(progress):
        if progress.done == 2:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(forked(second), 0)[1]))

    assert run.extract(tiny_pair(), samples[:6], tmp_path, **QUICK, progress=start_another).finished
    assert codes == [
        7
    ] and monitor.events(tmp_path) == [], "a refusal is no error of the run that goes on"


def test_a_full_disk_at_any_write_stops_cleanly_and_the_run_goes_on(samples, tmp_path, monkeypatch):
    """A life writes up to eight files, and half of the next."""
    run.extract(tiny_pair(), samples[:12], tmp_path / "whole", **QUICK)
    folder, real, lives = tmp_path / "run", Path.write_bytes, 0
    left = 0

    def write_bytes(path, data):
        nonlocal left
        if left == 0:
            real(path, data[:len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    while lives < 60:
        left = lives % 9
        try:
            run.extract(tiny_pair(), samples[:12], folder, **QUICK)
            break
        except StorageError as error:
            assert ("the disk is full; free space or choose another output folder and run again "
                    "(nothing was lost)") in str(error)
            lives += 1
    monkeypatch.undo()
    assert lives >= 5 and contents(folder) == contents(tmp_path / "whole")
    assert not list(folder.rglob("*.part")) and not any(checks.verify(folder).values())
    said = monitor.events(folder)
    assert said and all(
        event.kind == "error" and event.what.startswith("StorageError: cannot write")
        for event in said)


def test_a_file_limit_of_the_system_is_named_and_survived(samples, tmp_path):
    """The kernel itself refuses to write beyond the limit, which no head fits into."""
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE,
                           (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(StorageError,
                           match=r"cannot write .*head-drafter.safetensors: File too large"):
            run.extract(tiny_pair(), samples[:4], tmp_path, **QUICK)

    assert ends_within(forked(limited), 60)
    assert run.extract(tiny_pair(), samples[:4], tmp_path, **QUICK).finished


# --- supervised
# ------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
lives = open({path!r}, "a+")
lives.write("x"); lives.flush(); lives.seek(0); life = len(lives.read())
print("life", life, file=sys.stderr)
if life == 1: os.kill(os.getpid(), signal.SIGKILL)
if life == 2: raise RuntimeError("out of memory")
{then}
"""


def command(tmp_path, then=""):
    return [sys.executable, "-c", CHILD.format(path=str(tmp_path / "lives"), then=then)]


@pytest.fixture
def begun(samples, tmp_path):
    """A run whose events can be asked for."""
    run.extract(tiny_pair(), samples[:2], tmp_path, **QUICK)
    return tmp_path


def test_a_crashed_extraction_is_started_again_and_each_reason_is_kept(begun, capsys):
    assert supervise.supervise(command(begun), begun, 3) == 0
    killed, failed = monitor.events(begun)
    assert killed.what == ("killed by SIGKILL (by hand, or by the system when memory runs out); "
                           "started again (1 of 3)")
    assert failed.what == ("ended with status 1 (RuntimeError: out of memory); started again (2 of "
                           "3)")
    report = monitor.report(begun)
    assert "errors and restarts (2):" in report and killed.what in report
    said = capsys.readouterr().err
    assert "life 1" in said and "life 3" in said and "xsd: killed by SIGKILL" in said


def test_restarts_are_bounded(begun):
    assert supervise.supervise(command(begun), begun, 1) == 1
    assert [event.what.rsplit("; ", 1)[1] for event in monitor.events(begun)
            ] == ["started again (1 of 1)", "given up after 1 restart(s)"]


@pytest.mark.parametrize("status", [2, supervise.INTERRUPTED])
def test_what_a_restart_cannot_mend_is_handed_back(begun, status):
    assert supervise.supervise([sys.executable, "-c", f"raise SystemExit({status})"], begun,
                               5) == status
    assert monitor.events(begun) == []


def test_a_supervisor_that_is_told_to_stop_stops_its_extraction(begun):
    (begun / "lives").write_text("xx")
    then = ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); os.kill(os.getppid(), "
            "signal.SIGTERM); signal.pause()")
    assert supervise.supervise(command(begun, then), begun, 5) == supervise.INTERRUPTED
    assert (begun / "lives").read_text() == "xxx"
