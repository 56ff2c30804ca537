"""tqdm that obeys TQDM_DISABLE in notebooks too (the notebook bar of tqdm 4.70 looks at its
argument first and never at the variable)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any


def tqdm(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """``tqdm.auto.tqdm`` with ``disable`` taken from TQDM_DISABLE unless given. Accepts what tqdm
    accepts."""
    from tqdm.auto import tqdm as bar

    options.setdefault("disable", os.environ.get("TQDM_DISABLE", "0") not in ("", "0"))
    return bar(iterable, **options)


def counted(iterable: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """The items of ``iterable`` under a bar named ``what``."""
    yield from tqdm(iterable, desc=what, total=total)
