"""The door that every verb leaves by: what becomes of signals, of an output that nobody reads, and
of a disk or a memory that refuses."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from xsd.cli.exits import say

INTERRUPTED = "stopped; run the same command again to go on (what was finished is kept)"
PIPE_CLOSED = 128 + 13
AGAIN_S = 10.0


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit status.

    0: done; 1: problems found; 2: a mistake of the user's or a disk that refuses, with one sentence
    on stderr; 130, 143, 129: stopped by Ctrl-C, SIGTERM, SIGHUP, with a line that says how to go
    on; 141: nobody reads the output any more. argv: without the program's name; by default the
    command line.
    """
    if argv is None:
        _open_streams()
    with _stoppable(for_good=argv is None) as told:
        try:
            from xsd.cli import app

            status = app.run(argv)
            if sys.stdout:
                sys.stdout.flush()
        except BrokenPipeError:
            status = PIPE_CLOSED
        except OSError as error:
            where = f"{error.filename} cannot be used" if error.filename else (
                "the output cannot be written")
            status = say(f"{where}: {error.strerror or error}; free space, check the permissions, "
                          "or choose another place")
        except MemoryError:
            status = say("there is not enough memory; ask for less at a time (batch size, "
                          "workers, samples)")
        except BaseException as error:
            # a library may turn the interruption of its own import into another error
            if not told and not isinstance(error, KeyboardInterrupt):
                raise
            status = 130
        if told or status == 130:
            say(INTERRUPTED)
            status = 128 + (told[0] if told else signal.SIGINT)
    if argv is None:
        _close_output()
    return status


@contextlib.contextmanager
def _stoppable(*, for_good: bool) -> Iterator[list[int]]:
    """A list of the signals that asked to stop; the first is raised as KeyboardInterrupt, another
    one a second later ends the process at once. for_good: afterwards, while Python shuts down, they
    end it without a traceback."""
    told: list[int] = []
    since = 0.0

    def stop(number: int, _: object) -> None:
        nonlocal since
        if number == signal.SIGALRM:
            raise KeyboardInterrupt
        if not told:
            told.append(number)
            since = time.monotonic()
            # C code, numpy's among it, may lose the exception: it comes again
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
            raise KeyboardInterrupt
        if time.monotonic() - since > 1:
            os._exit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM) if main_thread}
    # what nohup, or a shell in the background, had ignored stays ignored
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield told
    finally:
        if told:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if for_good else old)


def _open_streams() -> None:
    """Closed streams become empty ones, else the next file opened would take their place; what a
    terminal cannot show is written as an escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (for the life of the process)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _close_output() -> None:
    """What is left in stdout's buffer is written, or dropped where it cannot be."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
