"""tqdm that obeys TQDM_DISABLE in notebooks too (the notebook bar of tqdm 4.70 looks at its
argument first and never at the variable)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any


def tqdm(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """``tqdm.auto.tqdm`` with ``disable`` taken from TQDM_DISABLE unless given. Accepts what tqdm
    accepts."""
    from tqdm.auto import tqdm as bar

    options.setdefault("disable", os.environ.get("TQDM_DISABLE", "0") not in ("", "0"))
    return bar(iterable, **options)


def lines(prefix: str = "", every_s: float = 10.0) -> Callable[[Any], None]:
    """Progress as lines on stderr, at most one every ``every_s`` seconds; the last is always shown.

    What it returns is called with an extract.run.Progress.
    """
    shown = float("-inf")

    def show(progress: Any) -> None:
        nonlocal shown
        if time.monotonic() - shown >= every_s or progress.done == progress.total:
            shown = time.monotonic()
            print(f"{prefix}{progress}", file=sys.stderr, flush=True)

    return show
