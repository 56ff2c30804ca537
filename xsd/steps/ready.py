"""Making what a run folder lacks, with the smoke parameters, so that each notebook runs alone.

One call in a notebook's set-up cell; the steps below only read, and say what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from xsd.runs import typed
from xsd.steps import data as datasets
from xsd.steps import extraction, training


def ensure(P: typed.NotebookParameters, *, pairs: bool = True,
           adapters: bool | Sequence[str] = False) -> None:
    """Extract pairs and train adapters where the run ``P.run_dir`` holds none at all.

    Whatever P has of data, test_data and levels is what is made. adapters: True for P.levels, or
    the names of the levels. Raises: as extraction.run and training.run.
    """
    data = getattr(P, "data", None)
    if pairs or adapters:
        extraction.ensure(P.run_dir, P.seed, data=data or datasets.SIMULATED,
                          test_data=getattr(P, "test_data", ()))
    if adapters:
        levels = P.levels if adapters is True else adapters  # type: ignore[attr-defined]
        data = data or extraction.pair_file(P.run_dir).get("data", datasets.SIMULATED)
        training.ensure(P.run_dir, P.seed, levels, data=data)
