"""Trainings side by side: each leaves its result, reports progress, and a failure of one is told in
its own words."""

import os
import time
from pathlib import Path

import pytest
import torch

from studies.embedded_pair import side_by_side
from xsd.core import TrainingError


def _task(name, folder, progress):
    progress(name, torch.get_num_threads())
    Path(folder, name).write_text(str(os.getpid()))


def _diverges(name, folder, progress):
    if name == "a":
        raise TrainingError("the loss of a is nan; lower learning_rate")
    time.sleep(60)


def _is_killed(name, folder, progress):
    os._exit(9)


def test_each_task_runs_in_a_process_of_its_own_and_reports(tmp_path):
    told = []
    side_by_side.run(_task, [("a", str(tmp_path)), ("b", str(tmp_path))], threads=1,
                     progress=lambda *r: told.append(r))
    assert sorted(told) == [("a", 1), ("b", 1)]
    assert len({(tmp_path / name).read_text() for name in "ab"} | {str(os.getpid())}) == 3


def test_a_failure_is_told_in_its_own_words_and_stops_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(TrainingError, match="the loss of a is nan"):
        side_by_side.run(_diverges, [("a", ""), ("b", "")])
    assert time.monotonic() - start < 55


def test_a_killed_process_is_named_with_the_way_out():
    with pytest.raises(TrainingError, match="run the same command again"):
        side_by_side.run(_is_killed, [("a", "")])
