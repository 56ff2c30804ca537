"""Step 07: what the explorer shows of runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache

import pandas as pd

from xsd import files
from xsd.core import ParameterError, Sample
from xsd.evaluate.held_out import HeldOut
from xsd.runs import folder
from xsd.steps import evaluation, extraction, listing
from xsd.views import explorers


def pictures(runs: Sequence[str]) -> Callable[[str], Sample | None]:
    """Sample key → Sample of any of the runs, read when asked for; None for an unknown key."""

    @cache
    def places() -> dict[str, tuple[HeldOut, int]]:
        sets = [evaluation.held_out(run, data) for run in runs
                for data in extraction.held_out_names(run)]
        return {name: (one, i) for one in sets for i, name in enumerate(one.keys)}

    @cache
    def read(key: str) -> Sample | None:
        pairs, index = places().get(key, (None, 0))
        with contextlib.suppress(ParameterError):  # of imported chunks nobody knows the clips
            return pairs and pairs.load(index)
        return None

    return read


def explorer(runs: Sequence[str], *, levels: Sequence[str],
             threshold: float) -> explorers.AcceptanceExplorer:
    """The explorer, opened on ``levels`` as far as the first run holds them. In it, a run is a run
    folder and one of its held-out sets."""
    tables = [folder.load_tokens(run).assign(run=name)
              for name, run in zip(listing.names(runs), runs, strict=True)]
    tokens = pd.concat(tables, ignore_index=True)
    tokens = tokens.assign(run=tokens["run"] + " · " + tokens["data"].astype(str))
    found = explorers.ExplorerData(tokens, pictures(runs))
    held = found.levels(found.runs[0])
    chosen = [name for name in map(files.name_of, levels) if name in held] or held[:2]
    return explorers.AcceptanceExplorer(found, levels=chosen, tau=threshold)
