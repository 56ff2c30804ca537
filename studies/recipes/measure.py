"""What the study counts on held-out answers, one row per answer, and how answers, seeds and
sequences become one figure with its interval.

Everything is counted on the positions 1 … n-1 of an answer, for every level: B1 and L5F cannot be
asked about the first token, so no level is. Cosine and token acceptance are of one step behind the
verified prefix; accepted drafts per round are of the greedy loop at γ, the bonus not counted.

Seeds: the counts of an answer are averaged over the seeds, then whole sequences are drawn with
replacement. So the interval speaks of other sequences, of a training like these on average; how far
the trainings lie apart stands beside it as the lowest and highest seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.adapters.base import Adapter
from xsd.core import MetricError
from xsd.evaluate import floors, rounds, statistics, table
from xsd.evaluate.held_out import HeldOut
from xsd.evaluate.statistics import Interval

RATIOS = {
    "cosine": ("cosine", "positions"),
    "accept": ("above", "positions"),
    "token_acceptance": ("matched", "positions"),
    "accepted_per_round": ("accepted", "rounds"),
}
"""Figure → (what is counted, what it is divided by), columns of the counts."""
COLUMNS = ("positions", "cosine", "above", "matched", "accepted", "rounds")


def measure(adapter: Adapter, pairs: HeldOut, *, gamma: int, threshold: float,
            batch_size: int = 64) -> pd.DataFrame:
    """Counts of one adapter: ``sequence`` and COLUMNS, one row per answer of two tokens or more.

    cosine: its sum over positions. above: positions with cosine > threshold. matched: positions
    whose argmax is the verifier's token. Raises: MetricError when no answer has a second token, and
    as the metrics do for NaN.
    """
    tokens = table.measure({"adapter": adapter}, pairs, gamma=gamma, top_k=1, drafter=False,
                           batch_size=batch_size)
    return counts(tokens, gamma, threshold)


def counts(tokens: pd.DataFrame, gamma: int, threshold: float) -> pd.DataFrame:
    """The counts of one level's token table. Raises: MetricError when nothing is drafted."""
    drafted = table.drafted(tokens)
    if drafted.empty:
        raise MetricError("no held-out answer has a second token, so nothing is drafted; extract "
                          "with a larger max_new_tokens")
    cosine = drafted["one_step_cosine"].astype(np.float32)
    step = drafted.assign(above=cosine > np.float32(threshold))
    step = step.groupby("sample", observed=True, sort=False)
    found = table.counts(tokens, gamma).set_index("sample")
    found["cosine"] = step["one_step_cosine"].sum()
    found["above"] = step["above"].sum()
    found["matched"] = step["one_step_match"].sum()
    return found.reset_index()[["sequence", *COLUMNS]]


def without_adapter(training: Sequence[Sequence[int]], pairs: HeldOut,
                    gamma: int) -> dict[str, pd.DataFrame]:
    """The floors that need no adapter, counted on the same positions: the drafter's own tokens and
    a 4-gram table of training answers."""
    arms = {
        "drafter's tokens": floors.drafter_tokens(pairs.ids_by_drafter),
        "4-gram": floors.ngram(training, 4),
    }
    out = {}
    for name, floor in arms.items():
        matches = enumerate(floor.match(pairs.answers))
        hits = {i: match[1:] for i, match in matches if len(match) > 1}
        each = rounds.from_matches(hits.values(), gamma).per_request()
        out[name] = pd.DataFrame({
            "sequence": [pairs.clusters[i] for i in hits],
            "positions": [len(hit) for hit in hits.values()],
            "matched": [int(hit.sum()) for hit in hits.values()],
            "accepted": each["accepted"], "rounds": each["rounds"],
        })
    return out


def averaged(seeds: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The counts of several trainings as those of one: every column the mean over seeds, answer by
    answer. Raises: MetricError when the trainings were not measured on the same answers."""
    first = seeds[0]
    if any(list(one["sequence"]) != list(first["sequence"]) for one in seeds):
        raise MetricError("the seeds of one row were measured on other samples; delete the study's "
                          "folder and run it again")
    numbers = first.columns.drop("sequence")
    return first[["sequence"]].assign(
        **{name: np.mean([one[name] for one in seeds], axis=0) for name in numbers})


def figures(seeds: Sequence[pd.DataFrame], **options: Any) -> dict[str, dict[str, Any]]:
    """Each figure of RATIOS that the counts hold: value, low, high, n, n_clusters, and the value of
    every seed. options: n_resamples and seed of the bootstrap."""
    mean, out = averaged(seeds), {}
    for name, (above, below) in RATIOS.items():
        if above in mean:
            one = statistics.bootstrap_ratio(mean[above], mean[below], mean["sequence"], **options)
            each = [float(one[above].sum() / one[below].sum()) for one in seeds]
            out[name] = {**vars(one), "seeds": each}
    return out


def times(first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], *, n_resamples: int,
          seed: int) -> Interval:
    """How many times as many drafts ``first`` accepts per round as ``second``: a ratio of ratios,
    the same sequences drawn for both."""
    one, other = averaged(first), averaged(second)
    if list(one["sequence"]) != list(other["sequence"]):
        raise MetricError("two rows of the study were measured on other samples; delete the "
                          "study's folder and run it again")
    columns = np.stack([one["accepted"], one["rounds"], other["accepted"], other["rounds"]], axis=1)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[:, :1] / sums[:, 1:2] / (sums[:, 2:3] / sums[:, 3:])

    return statistics.bootstrap(ratio, columns, list(one["sequence"]), [one["rounds"].sum()],
                                n_resamples=n_resamples, seed=seed)[0]
