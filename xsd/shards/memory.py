"""Paired states in memory that are read like a run folder: for the few samples of a cell of one's
own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from xsd.core import Batch, PairedStates
from xsd.shards.store import collate


class MemoryPairs(list[PairedStates]):
    """A list of pairs with table, ids and batches as store.ShardDataset has them."""

    def table(self) -> pd.DataFrame:
        """One row per sample: sequence, clip, question, text_by_drafter, text_by_verifier."""
        columns = ("sequence", "clip", "question", "text_by_drafter", "text_by_verifier")
        return pd.DataFrame([[getattr(one, name) for name in columns] for one in self],
                            columns=list(columns))

    def ids(self, role: str) -> list[np.ndarray]:
        """The token ids [S] of every sample by "drafter" or "verifier"."""
        return [getattr(one, f"ids_by_{role}").numpy() for one in self]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once and in order, ``batch_size`` at a time."""
        for start in range(0, len(self), batch_size):
            chunk: Sequence[PairedStates] = self[start:start + batch_size]
            yield collate(chunk, range(start, start + len(chunk)))
