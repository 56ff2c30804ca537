"""``xsd bench full-size``: two 7B models made in memory, and everything about them that costs time
or memory, in at most eight minutes on one 80 GB GPU; the same in tiny on a CPU, so that the script
is right before a GPU sees it.

Every part has a time of its own and writes what it found before the next one starts. One that fails
or runs over leaves its one sentence, and the rest goes on.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import full_size_page, full_size_pair, ratios
from benchmarks import full_size_parts as parts
from benchmarks import full_size_rates as rates
from xsd.core import as_used
from xsd.files import atomic_write, provenance, write_json
from xsd.models import loading, quantization

SECONDS = 480
"""All parts together."""
PARTS: Mapping[str, tuple[int, Callable[[parts.Bench], dict[str, Any]]]] = {
    "load": (60, parts.load), "prefills": (25, parts.prefills), "ladder": (60, parts.ladder),
    "verification": (30, parts.verification), "dial": (60, rates.dial),
    "int4": (40, parts.in_fewer_bits("int4")), "4bit": (40, parts.in_fewer_bits("4bit")), "8bit":
        (40, parts.in_fewer_bits("8bit")), "adapters": (30, rates.adapter_steps), "blocks":
            (20, rates.blocks_of), "overlap": (20, parts.overlap), "extraction":
                (45, rates.extraction), "static": (90, parts.static), "two in 4bit":
                    (30, parts.small), "training": (40, rates.training),
}
"""Seconds at most, the dearest to lose first; what needs the 16-bit models before what drops
them."""


class OutOfTime(BaseException):
    """A part ran over its time; none of its own handlers may hold it."""


def run(out: Path, *, size: str = "full", device: str = "auto", seconds: float = SECONDS) -> str:
    """Measure, write ``full_size.json`` and ``full_size.md`` into ``out`` and return the page.
    Raises: ParameterError for a device that is not there."""
    device, dtype = as_used(device)
    loading.check_device(device)
    bench = parts.Bench(full_size_pair.size_of(size), device, quantization.dtype_of(dtype))
    end = time.perf_counter() + seconds
    results: dict[str, Any] = {
        "size": size, "device": device, "dtype": dtype, "parts": {},
        "provenance": provenance(seed=0, device=device)
    }
    for name, (most, part) in PARTS.items():
        results["parts"][name] = _one(bench, part, min(most, end - time.perf_counter()))
        write_json(out / "full_size.json", results)
        print(
            f"{name}: {results['parts'][name].get('error', 'done')} "
            f"({results['parts'][name]['seconds']:.0f} s)", flush=True)
    page = full_size_page.page(results)
    atomic_write(out / "full_size.md", page)
    return page


def _one(bench: parts.Bench, part: Callable[[parts.Bench], dict[str, Any]],
         seconds: float) -> dict[str, Any]:
    bench.clear()
    start = time.perf_counter()
    bench.until = start + seconds
    try:
        if seconds < 1:
            raise OutOfTime("no time was left for it")
        with _at_most(seconds):
            found = part(bench)
    except KeyError as error:
        found = {"error": f"it needs {error}, which an earlier part did not leave"}
    except (Exception, OutOfTime) as error:
        found = {"error": parts.sentence(error)}
    peak = {} if bench.device == "cpu" else {
        "part_peak_bytes": quantization.peak_memory_bytes(bench.device)
    }
    return found | peak | {"seconds": time.perf_counter() - start}


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises: OutOfTime in the block after so many seconds, where signals can say it (the main
    thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime(f"it took longer than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    ratios.main("full_size", run)
