"""Starting a crashed extraction again, a bounded number of times, with the reason of each crash on
record."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from xsd.extract import monitor

INTERRUPTED = 130
"""Exit status of an extraction that was told to stop (SIGINT, SIGTERM) and can be continued."""
_FINAL = (0, 2, INTERRUPTED)
"""Exit statuses that a restart would not change: finished, a mistake that the user must mend, told
to stop."""


def supervise(command: Sequence[str], folder: str | Path, restarts: int, *, part: str = "") -> int:
    """Run ``command`` until it ends well, at most ``restarts`` times more after a crash; returns
    its exit status.

    Crashes (a signal, or an exit status other than 0, 2 and 130) are noted in the errors of the run
    ``folder``, where ``xsd data status`` shows them. SIGINT and SIGTERM are handed on, and nothing is
    started after them.
    """
    for attempt in range(restarts + 1):
        status, pid, last = _once(command)
        if status in _FINAL:
            return status
        reason = reason_of(status, last)
        if attempt < restarts:
            note = f"{reason}; started again ({attempt + 1} of {restarts})"
        else:
            note = f"{reason}; given up after {restarts} restart(s)"
        monitor.note(folder, "restart", note, pid=pid, part=part)
        print(f"xsd: {note}", file=sys.stderr, flush=True)
    return 1


def reason_of(status: int, last_line: str) -> str:
    """Why a process ended, in words. status: its exit status, negative for a signal."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (by hand, or by the system when memory runs out)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"ended with status {status}" + (f" ({last_line})" if last_line else "")


def _once(command: Sequence[str]) -> tuple[int, int, str]:
    """(exit status, process id, last line on stderr) of one run of the command; its stderr is
    passed through."""
    # In a session of its own: a Ctrl-C reaches it once, through us.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace",
                          start_new_session=True) as child:
        assert child.stderr is not None
        last = ""
        with _handing_on(child) as told:
            for line in child.stderr:
                last = line.strip() or last
                sys.stderr.write(line)
                sys.stderr.flush()
            status = child.wait()
    return (INTERRUPTED if told and status else status), child.pid, last


@contextlib.contextmanager
def _handing_on(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Signals that would stop us go to the child; the list holds those that came."""
    came: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
