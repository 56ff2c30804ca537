"""Kill −9 at every step a writer takes on the disk: nothing flushed is lost, and the resumed run is
the same bytes."""

import os
import signal
from pathlib import Path

import pytest
from shard_examples import example, folder_bytes

from xsd.shards import store, writer

OPTIONS = {"mode": "teacher_forced", "dtype": "fp16", "config": {"seed": 3}, "samples_per_shard": 4}
N = 7


def go_on(folder, kill_before_step=None):
    """Write what is missing, in batches of three; SIGKILL to this process just before its n-th
    change of the disk."""
    steps = 0

    def counted(real):
        def step(*arguments, **keywords):
            nonlocal steps
            steps += 1
            if steps == kill_before_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return step

    if kill_before_step is not None:
        os.replace, os.fsync, Path.unlink = counted(os.replace), counted(os.fsync), counted(
            Path.unlink)
        Path.write_bytes = counted(Path.write_bytes)
    with writer.ShardWriter(folder, **OPTIONS) as out:
        for first in range(out.n_written, N, 3):
            for i in range(first, min(first + 3, N)):
                out.write(example(i))
            out.flush(seconds=1.0)


def killed_at(folder, step):
    """Run go_on in a forked process; True if it was killed, False if it came to its end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            go_on(folder, step)
            code = 0
        finally:
            os._exit(code)
    _, ended = os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended) == 0
    return os.WIFSIGNALED(ended)


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Provenance asks git for the revision, which is slow and no matter here."""
    monkeypatch.setattr(writer, "provenance", dict)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    go_on(folder)
    return folder_bytes(folder)


def test_killed_before_any_single_step_the_run_resumes_to_the_same_bytes(tmp_path, whole):
    step = 1
    while killed_at(tmp_path / str(step), step):
        go_on(tmp_path / str(step))
        assert folder_bytes(tmp_path / str(step)) == whole, step
        assert store.verify(tmp_path / str(step)) == []
        step += 1
    assert step > 30, "every file and every rename is a step"


def test_killed_again_and_again_it_still_arrives(tmp_path, whole):
    """Each life is a little longer than what opening costs, so that every one of them gets
    somewhere."""
    lives = 1
    while killed_at(tmp_path, 20):
        lives += 1
        assert lives < 50
    assert lives > 2 and folder_bytes(tmp_path) == whole
