"""Two lanes at once: the verifier prefills here while the drafter works in a second thread, on one
clock (docs/decoding.md, "Prefill hiding"); torch's operators release the interpreter lock."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal, TypeVar

import torch

from xsd.core import ParameterError, Span

Prefilled = TypeVar("Prefilled")
Drafted = TypeVar("Drafted")
Stop = Callable[[], bool]
Overlap = Literal["threads", "serial"]


class Timeline:
    """Spans of one request on one clock, from two threads. On a GPU a span lies where the GPU did
    its work, by events in the stream of its lane: a Python call returns when work is queued."""
    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._origin = clock()
        self._on_gpu = torch.cuda.is_initialized()
        self._begun = self._mark() if self._on_gpu else None
        self._marks: list[tuple[Any, str, Any, Any]] = []

    def now(self) -> float:
        """Seconds since the request began."""
        return self._clock() - self._origin

    @contextlib.contextmanager
    def span(self, lane: Literal["drafter", "adapter", "verifier"], what: str) -> Iterator[None]:
        """Record the block as one bar, also when it raises."""
        start = self._mark()
        try:
            yield
        finally:
            self._marks.append((lane, what, start, self._mark()))

    def spans(self) -> tuple[Span, ...]:
        """All bars so far, by start time."""
        found = (Span(lane, what, self._seconds(start), self._seconds(end))
                 for lane, what, start, end in self._marks)
        return tuple(sorted(found, key=lambda span: (span.start_s, span.end_s)))

    def _mark(self) -> Any:
        """This moment, of the clock or of the lane's stream."""
        if not self._on_gpu:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Any) -> float:
        if not self._on_gpu:
            return mark
        mark.synchronize()
        return self._begun.elapsed_time(mark) / 1e3


def run_lanes(prefill: Callable[[], Prefilled], draft: Callable[[Stop], Drafted],
              overlap: Overlap = "threads") -> tuple[Prefilled, Drafted]:
    """Both results. "threads": at the same time; ``stop()`` turns True the moment the prefill is
    done or has failed. "serial": ``draft`` first, ``stop()`` always False. Raises: whatever either
    lane raised (the prefill's error first), when both rest; ParameterError for another mode."""
    if overlap == "serial":
        drafted = draft(lambda: False)
        return prefill(), drafted
    if overlap != "threads":
        raise ParameterError(f"overlap is {overlap!r}, expected 'threads' or 'serial'")
    done = threading.Event()
    future = _worker(os.getpid()).submit(_draft_lane, draft, done.is_set)
    try:
        prefilled = prefill()
    finally:
        done.set()
        wait([future])
    return prefilled, future.result()


@torch.inference_mode()  # it is per thread, as the stream is
def _draft_lane(draft: Callable[[Stop], Drafted], stop: Stop) -> Drafted:
    """On CUDA the lane needs a stream of its own, or it would queue behind the prefill."""
    if not torch.cuda.is_initialized():
        return draft(stop)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        drafted = draft(stop)
    stream.synchronize()
    return drafted


@functools.lru_cache(maxsize=1)
def _worker(process: int) -> ThreadPoolExecutor:
    """One lasting thread a process: each new one would build an OpenMP team, and none forks."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="xsd-drafter")
