"""Stopping an extraction after the batch at hand, and starting a crashed one again: a bounded
number of times, with the reason of each crash on record."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xsd.extract import monitor

INTERRUPTED = 130
"""Exit status of an extraction that was told to stop (SIGINT, SIGTERM) and can be continued."""
_FINAL = (0, 2, INTERRUPTED)
"""Exit statuses that no restart would change: finished, the user's mistake, told to stop."""


@contextlib.contextmanager
def interruptible(child: subprocess.Popen[str] | None = None) -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that the batch at hand is finished; a second acts as
    usual. To a ``child``, each is handed on. Outside the main thread signals are left alone."""
    stop, main = threading.Event(), threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def told(number: int, _: Any) -> None:
        stop.set()
        if child is None:
            restore()
        else:
            child.send_signal(number)

    for number in before:
        signal.signal(number, told)
    try:
        yield stop
    finally:
        restore()


def supervise(command: Sequence[str], folder: str | Path, restarts: int, *, part: str = "") -> int:
    """Run ``command`` until it ends well, at most ``restarts`` times more after a crash (a signal,
    or a status other than 0, 2 and 130), noted in the errors of ``folder``; returns its exit
    status. SIGINT and SIGTERM are handed on, and nothing is started after them."""
    for attempt in range(restarts + 1):
        status, pid, last = _once(command)
        if status in _FINAL:
            return status
        then = (f"started again ({attempt + 1} of {restarts})" if attempt < restarts else
                f"given up after {restarts} restart(s)")
        why = f"ended with status {status}" + (f" ({last})" if last else "")
        if status < 0:
            why = f"killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                why += " (by hand, or by the system when memory runs out)"
        note = f"{why}; {then}"
        monitor.note(folder, "restart", note, pid=pid, part=part)
        print(f"xsd: {note}", file=sys.stderr, flush=True)
    return 1


def _once(command: Sequence[str]) -> tuple[int, int, str]:
    """(exit status, process id, last line on stderr) of one run; its stderr is passed through."""
    # In a session of its own: a Ctrl-C reaches it once, through us.
    options: dict[str, Any] = {"text": True, "errors": "replace", "start_new_session": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as child:
        assert child.stderr is not None
        last = ""
        with interruptible(child) as told:
            for line in child.stderr:
                last = line.strip() or last
                sys.stderr.write(line)
                sys.stderr.flush()
            status = child.wait()
    return (INTERRUPTED if told.is_set() and status else status), child.pid, last
