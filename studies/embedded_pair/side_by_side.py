"""Several trainings at once, each in a process of its own with its share of the cores.

Small models do not fill two cores (docs/log.md): two processes of one thread each train two models
in less time than one after the other.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import multiprocessing

from xsd import processes
from xsd.core import TrainingError, XsdError


def run(task: Callable[..., Any], each: Sequence[tuple], *, threads: int = 1,
        progress: Callable[..., None] | None = None) -> None:
    """Call ``task(*arguments, progress)`` in one new process for every entry of ``each`` and wait
    for all of them.

    task: a function of a module; what it returns is dropped, so it leaves its result on disk.
    progress: called here, with what the tasks report. threads: of every process.

    Raises: TrainingError with the first failing task's own sentence, or its exit code; the others
    are stopped at their last checkpoint.
    """
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    children = [
        context.Process(target=_call, args=(task, arguments, threads, reports), daemon=True)
        for arguments in each
    ]
    try:
        with processes.deaf():
            for child in children:
                child.start()
        while any(child.is_alive() for child in children) or not reports.empty():
            failed = [child for child in children if child.exitcode]
            try:
                kind, report = reports.get(timeout=0.5)
            except queue.Empty:
                if failed:
                    raise TrainingError(
                        f"a training process ended with exit code {failed[0].exitcode}; run the "
                        "same command again to go on from its last checkpoint, and if it was "
                        "killed, leave it more memory") from None
                continue
            if kind == "error":
                raise TrainingError(report)
            if progress is not None:
                progress(*report)
        if any(child.exitcode for child in children):
            raise TrainingError(
                "a training process ended early; run the same command again to go on from its last "
                "checkpoint"
            )
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
            if child.pid is not None:
                child.join()


def _call(task: Callable[..., Any], arguments: tuple, threads: int, reports: Any) -> None:
    processes.end_with_parent()
    torch.set_num_threads(max(1, threads))
    try:
        task(*arguments, lambda *report: reports.put(("progress", report)))
    except XsdError as error:
        reports.put(("error", str(error)))
