"""Step 07: what the explorer shows of run folders: their token tables, and the pictures of the
sample that was clicked."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from xsd.core import Sample
from xsd.runs import folder, parameters
from xsd.steps import compare, extraction, held_out
from xsd.views import explorers


class Pictures:
    """Sample key → Sample of any of the runs, read from its data set when asked for and remembered;
    None for an unknown key."""
    def __init__(self, runs: Sequence[str]) -> None:
        self._places = [(run, data) for run in runs
                        for data in dict.fromkeys(folder.load_tokens(run)["data"])]
        self._samples: dict[str, held_out.HeldOut] | None = None
        self._read: dict[str, Sample] = {}

    def __call__(self, key: str) -> Sample | None:
        if self._samples is None:
            self._samples = {
                one.key: one for run, data in self._places
                for one in held_out.read(run, _given_name(run, data))
            }
        if key not in self._samples:
            return None
        if key not in self._read:
            self._read[key] = self._samples[key].load()
        return self._read[key]


def _given_name(run: str, data: str) -> str:
    """The data set as notebook 01 was given it: the token table holds its short name, a dataset
    folder needs its path."""
    about = folder.resolve(run) / extraction.PAIR_FILE
    given = extraction.pair_file(run).get("test_data", []) if about.is_file() else []
    return next((one for one in given if held_out.datasets.name_of(one) == data), data)


def tokens(runs: Sequence[str]) -> pd.DataFrame:
    """The token tables of all runs in one; ``run`` is the run's name and the data set, since one
    explorer choice is one held-out set."""
    pieces = []
    for name, run in zip(compare.names(runs), runs, strict=True):
        table = folder.load_tokens(run)
        pieces.append(table.assign(run=name + " · " + table["data"].astype(str)))
    return pd.concat(pieces, ignore_index=True)


def data(given: parameters.ExploreParameters) -> explorers.ExplorerData:
    """What there is to explore; this notebook's own run is made with the smoke parameters where it
    is missing."""
    compare.ensure(given)
    return explorers.ExplorerData(tokens(given.runs), Pictures(given.runs))


def explorer(given: parameters.ExploreParameters,
             found: explorers.ExplorerData) -> explorers.AcceptanceExplorer:
    """The widget, opened on the levels asked for as far as the first run holds them."""
    held = found.levels(found.runs[0])
    return explorers.AcceptanceExplorer(
        found, levels=[level for level in given.levels if level in held] or held[:2],
        tau=given.threshold)
