"""What the study counts on held-out answers, a row a sample, and how samples, seeds and sequences
become one figure with its interval.

Everything is counted on the positions 1 … n-1 of an answer, for every level: B1 and L5F cannot be
asked about the first token, so no level is.
Cosine and token acceptance are of one step behind the verified prefix; accepted length is of the
self-rollout, draft tokens accepted a verification at γ, the bonus token not counted.

Seeds: the counts of a sample are averaged over the seeds, then whole sequences are drawn with
replacement. The interval so speaks of other
sequences, of a training like these on average; how far the trainings lie apart stands beside it as
the lowest and highest seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from xsd.adapters.base import Adapter
from xsd.core import Batch, MetricError
from xsd.evaluate import floors, statistics, table
from xsd.evaluate.statistics import Interval

RATIOS = {
    "cosine": ("cosine", "positions"), "accept": ("above", "positions"),
    "token_acceptance": ("matched", "positions"), "accepted_per_round": ("accepted", "rounds"),
}
"""Figure → (what is counted, what it is divided by), columns of the counts."""
COLUMNS = ("positions", "cosine", "above", "matched", "accepted", "rounds")


def measure(adapter: Adapter, batches: Iterable[Batch], head: torch.Tensor, *, gamma: int,
            threshold: float) -> pd.DataFrame:
    """Counts of one adapter: ``sequence`` and COLUMNS, one row per answer of two tokens or more, in
    the order of the batches.

    cosine: its sum over positions. above: positions with cosine > threshold. matched: positions
    whose argmax is the verifier's token. Raises: MetricError when no answer has a second token, and
    as table.measure for NaN.
    """
    found = table.drafted(table.of_batches({"": adapter}, batches, head, gamma=gamma))
    if found.empty:
        raise MetricError(
            "no held-out answer has a second token, so nothing is drafted; extract with a larger "
            "max_new_tokens")
    found["above"] = found["one_step_cosine"].astype(np.float32) > np.float32(threshold)
    one_step = found.groupby("sample", sort=False).agg(
        cosine=("one_step_cosine", "sum"), above=("above", "sum"),
        matched=("one_step_match", "sum"))  # fmt: skip
    each = table.counts(found, gamma).set_index("sample").drop(columns="matched")
    return each.join(one_step).reset_index()[["sequence", *COLUMNS]].astype({"sequence": str})


def without_adapter(training: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                    by_drafter: Sequence[Sequence[int]], sequences: Sequence[str], gamma: int,
                    ) -> dict[str, pd.DataFrame]:
    """The floors that need no adapter, counted on the same positions: the drafter's own tokens and
    a 4-gram table of training answers."""
    used = [i for i, ids in enumerate(answers) if len(ids) > 1]
    asked = [answers[i] for i in used]
    out = {}
    for name, floor in (("drafter's tokens", floors.DrafterTokens([by_drafter[i] for i in used])),
                        ("4-gram", floors.NGram(training, 4))):
        each, matches = floor.rounds(
            asked, gamma, start=1).per_request(), [hit[1:] for hit in floor.match(asked)]
        out[name] = pd.DataFrame({
            "sequence": [sequences[i] for i in used], "positions": [len(hit) for hit in matches],
            "matched": [int(hit.sum()) for hit in matches], "accepted": each["accepted"],
            "rounds": each["rounds"],
        })
    return out


def averaged(seeds: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The counts of several trainings as those of one: every column the mean over seeds, sample by
    sample.

    Raises: MetricError when the trainings were not measured on the same samples.
    """
    first = seeds[0]
    if any(list(one["sequence"]) != list(first["sequence"]) for one in seeds):
        raise MetricError(
            "the seeds of one row were measured on other samples; delete the study's folder and "
            "run it again"
        )
    numbers = [name for name in first.columns if name != "sequence"]
    return first[[
        "sequence"
    ]].assign(**{name: np.mean([one[name] for one in seeds], axis=0) for name in numbers})


def figures(seeds: Sequence[pd.DataFrame], *, n_resamples: int,
            seed: int) -> dict[str, dict[str, Any]]:
    """Each figure of RATIOS that the counts hold: value, low, high, n, n_clusters, and the value of
    every seed."""
    counts, out = averaged(seeds), {}
    for name, (above, below) in RATIOS.items():
        if above not in counts:
            continue
        measured = statistics.bootstrap_ratio(counts[above], counts[below], counts["sequence"],
                                              n_resamples=n_resamples, seed=seed)
        out[name] = {
            **dataclasses.asdict(measured), "seeds": [
                float(one[above].sum() / one[below].sum()) for one in seeds
            ]
        }
    return out


def times(first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], *, n_resamples: int,
          seed: int) -> Interval:
    """How many times the accepted length of ``second`` the one of ``first`` is: a ratio of ratios,
    the same sequences drawn for both."""
    one, other = averaged(first), averaged(second)
    if list(one["sequence"]) != list(other["sequence"]):
        raise MetricError(
            "two rows of the study were measured on other samples; delete the study's folder and "
            "run it again"
        )
    columns = np.stack([one["accepted"], one["rounds"], other["accepted"], other["rounds"]], axis=1)
    sums = statistics.cluster_sums(columns, list(one["sequence"]))
    total = sums.sum(axis=0)
    drawn = statistics.resampled_sums(sums, n_resamples=n_resamples, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = drawn[:, 0] / drawn[:, 1] / (drawn[:, 2] / drawn[:, 3])
        value = float(np.divide(total[0] / total[1], total[2] / total[3]))
    return statistics.interval_of(value, ratios, n=round(float(total[1])), n_clusters=len(sums))


def to_columns(counts: pd.DataFrame) -> dict[str, list[Any]]:
    """Counts as JSON holds them."""
    return {str(name): counts[name].tolist() for name in counts.columns}


def from_columns(stored: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Counts again from :func:`to_columns`."""
    return pd.DataFrame({name: list(values) for name, values in stored.items()})
