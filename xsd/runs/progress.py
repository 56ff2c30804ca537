"""tqdm that obeys TQDM_DISABLE in notebooks too (there tqdm 4.70 never looks at the variable)."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any


def tqdm(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """``tqdm.auto.tqdm`` with ``disable`` taken from TQDM_DISABLE unless given."""
    from tqdm.auto import tqdm as bar

    options.setdefault("disable", os.environ.get("TQDM_DISABLE", "0") not in ("", "0"))
    return bar(iterable, **options)


def lines(prefix: str = "", every_s: float = 10.0) -> Callable[[Any], None]:
    """Shows an extract.run.Progress on stderr, at most every ``every_s`` seconds, and the last."""
    shown = float("-inf")

    def show(progress: Any) -> None:
        nonlocal shown
        if time.monotonic() - shown >= every_s or progress.done == progress.total:
            shown = time.monotonic()
            print(f"{prefix}{progress}", file=sys.stderr, flush=True)

    return show
