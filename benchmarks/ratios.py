"""Speed as a ratio measured in one run: the contenders take turns after a warm-up, and medians over
the rounds are compared.

Absolute times of a shared CPU say little; what survives is how many times faster one way is than
another in the same minutes (docs/benchmarks/README.md). Nothing here is a test: ``make bench-*``
prints and writes it.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from xsd.core import ROOT, ParameterError
from xsd.files import provenance, write_json


@dataclass(frozen=True)
class Ratio:
    """How many times faster ``ours`` is than ``alternative``: median over rounds, with the smallest
    and largest round.

    target: what is aimed at, None where nothing is. ours_s, alternative_s: median seconds of one
    call.
    """

    name: str
    ours: str
    alternative: str
    value: float
    low: float
    high: float
    rounds: int
    ours_s: float
    alternative_s: float
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value >= self.target


def interleave(contenders: Mapping[str, Callable[[], object]], *, repeats: int = 7,
               warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every contender in every round; each round runs all of them, starting with another
    one each time.

    Raises: ParameterError for fewer than two contenders or no repeat.
    """
    if len(contenders) < 2 or repeats < 1:
        raise ParameterError(
            f"a ratio needs two contenders and one repeat, not {sorted(contenders)} and {repeats}")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            start = time.perf_counter()
            contenders[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(name: str, seconds: Mapping[str, Sequence[float]], ours: str, alternative: str, *,
          ours_work: float = 1.0, alternative_work: float = 1.0, target: float | None = None,
          note: str = "") -> Ratio:
    """Throughput of ours over the alternative's, round by round.

    ours_work, alternative_work: how much each did in one call (pairs, bytes), where that differs.
    """
    each = [(b / alternative_work) / (a / ours_work)
            for a, b in zip(seconds[ours], seconds[alternative], strict=True)]
    middle = statistics.median
    return Ratio(name, ours, alternative, middle(each), min(each), max(each), len(each),
                 middle(seconds[ours]), middle(seconds[alternative]), target, note)


def table(ratios: Sequence[Ratio]) -> str:
    """The ratios as a Markdown table, the aim and whether it is met beside each."""
    lines = [
        "| what | ours / alternative | ratio (median) | smallest … largest round | aim | met |",
        "|---|---|---|---|---|---|",
    ]
    for r in ratios:
        aim = "" if r.target is None else f"≥ {r.target:g}"
        met = "" if r.met is None else "yes" if r.met else "**no**"
        about = r.name + (f" ({r.note})" if r.note else "")
        lines.append(f"| {about} | {r.ours} / {r.alternative} | {r.value:.2f}× | "
                     f"{r.low:.2f} … {r.high:.2f} | {aim} | {met} |")
    return "\n".join(lines)


def save(folder: str | Path, ratios: Sequence[Ratio], *, facts: Mapping[str, object] | None = None,
         seed: int = 0) -> Path:
    """Write ``ratios.json`` (figures, what else was counted, provenance) into ``folder``; returns
    its path."""
    target = Path(folder) / "ratios.json"
    rows = [asdict(r) | {"met": r.met} for r in ratios]
    write_json(target, {"ratios": rows, "facts": dict(facts or {}),
                        "provenance": provenance(seed=seed, device="cpu")})
    return target


def peak_bytes() -> int:
    """The most memory that this process has held. getrusage alone would start from the parent's
    peak in a new process."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(name: str, run: Callable[[Path], str]) -> None:
    """``python -m benchmarks.<name> [folder]``: measure, write, print."""
    print(run(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "reports" / f"bench_{name}"))
