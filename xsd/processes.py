"""Helper processes that live no longer than the process that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

STOPPING = {signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def pool(n: int, begin: Callable[..., Any] | None = None, *given: Any) -> Iterator[
        ProcessPoolExecutor]:
    """``n`` processes that work at the same time, each after ``begin(*given)``. They end with this
    one however it ends, and at once when the block is left by an error. Ctrl-C, which a terminal
    sends to all of them, is this process's business alone."""
    # a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, _begin, (begin, given)) as made:
        with deaf():  # they start now
            for _ in range(n):
                made.submit(os.getpid)
        try:
            yield made
        except BaseException:
            # its thread stumbles over what map has cancelled when the processes are gone
            hook, threading.excepthook = threading.excepthook, lambda _: None
            for one in list((made._processes or {}).values()):
                one.terminate()
            made.shutdown()
            threading.excepthook = hook
            raise


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes started in this block never hear Ctrl-C, and what else asks to stop not before
    :func:`end_with_parent`; this one, not stopped while it starts them, hears it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOPPING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """What a helper process calls first: it ends where the process that started it is gone."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()


def _begin(begin: Callable[..., Any] | None, given: tuple[Any, ...]) -> None:
    end_with_parent()
    if begin:
        begin(*given)
