"""Helper processes that live no longer than the process that started them."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import InvalidStateError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from xsd.core import XsdError

STOPPING = {signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def pool(n: int, begin: Callable[..., Any] | None = None, *given: Any) -> Iterator[
        ProcessPoolExecutor]:
    """``n`` processes that work at the same time, each after ``begin(*given)``. They end with this
    one however it ends, and at once when the block is left by an error. Ctrl-C, which a terminal
    sends to all of them, is this process's business alone. Raises: XsdError where one is killed."""
    # a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    # packed, so that a helper watches its parent before it imports what it begins with
    packed = (pickle.dumps((begin, given)),)
    with ProcessPoolExecutor(n, context, _begin, packed) as made:
        try:
            with deaf():  # they start now
                for _ in range(n):
                    made.submit(os.getpid)
            yield made
        except BaseException as error:
            helpers, manager = list((made._processes or {}).values()), made._executor_manager_thread
            before, threading.excepthook = threading.excepthook, _unsaid
            made.shutdown(wait=False, cancel_futures=True)
            for one in helpers:
                one.terminate()
            # one that is just starting would miss what this process takes down with it
            for one in (*helpers, *filter(None, [manager])):
                one.join(5)
            threading.excepthook = before
            if isinstance(error, BrokenProcessPool):
                raise XsdError("a helper process was killed, by hand or because the memory ran out;"
                               " run the same again, perhaps with fewer at a time") from error
            raise


def _unsaid(failed: threading.ExceptHookArgs) -> None:
    """The thread that looks after helpers stumbles over cancelled work when they are ended."""
    if not issubclass(failed.exc_type, InvalidStateError):
        threading.__excepthook__(failed)


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


def _begin(packed: bytes) -> None:
    end_with_parent()
    begin, given = pickle.loads(packed)
    if begin:
        begin(*given)
