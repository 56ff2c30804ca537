"""Two-phase evaluation offline: one adapter hidden behind the prefill drafts n_first tokens once,
from the answer's start; another drafts gamma tokens per round from there on (docs/metrics.md,
section 4). What a round accepts depends on where it starts, so phase 2 is given as *runs*, one for
each start (xsd/evaluate/rounds.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import rounds, table
from xsd.evaluate.speedup import Timing
from xsd.evaluate.statistics import bootstrap_ratio
from xsd.evaluate.tables import row


def phases(tokens: pd.DataFrame,
           n_first: int) -> tuple[dict[str, Any], dict[str, Any], np.ndarray, list[str]]:
    """What each level of a token table gives in either phase: name → first int [N], for levels that
    predict the answer's first token (the others need verifier states that are not there yet);
    name → runs int [N, S] from every position of the answer; lengths int [N]; clusters.

    Answers of a single token are left out: nothing is drafted there."""
    drafted = table.drafted(tokens)["sample"].unique()
    tokens = tokens[tokens["sample"].isin(drafted)]
    opening = set(tokens.loc[tokens["position"] < 0, "level"])
    first, second = {}, {}
    for level, about, (match, runs), inside in table.by_level(tokens, "match", "accepted"):
        clusters = about["sequence"].tolist()
        if level in opening:
            first[level] = rounds.runs_of(match, n_first)[:, 0]
            lengths = inside.sum(axis=1)
        else:
            runs, lengths = np.pad(runs, ((0, 0), (1, 0))), inside.sum(axis=1) + 1
        second[level] = runs
    return first, second, lengths, clusters


def every_pair(phase1: Mapping[str, Any], phase2: Mapping[str, Any], lengths: Any,
               clusters: Sequence[str], *, n_first: int, gamma: int,
               timings: Mapping[str, Timing] | None = None, n_resamples: int = 2000,
               seed: int = 0) -> pd.DataFrame:
    """Every phase-1 × phase-2 combination: phase1, phase2, metric, value, low, high, n, n_clusters.

    The four arguments are as :func:`phases` returns them. Metrics: ``tokens_per_verification``
    (with bonus, over all verifier passes, phase 1's included), ``first_accepted`` (mean of phase
    1's run) and, where phase 2's level has a timing, ``speedup``, predicted: the time of plain
    decoding over that of these rounds, phase 1's drafts being free. Raises: MetricError when a
    phase has no adapter, and as rounds.walk."""
    if not phase1 or not phase2:
        raise MetricError("a two-phase evaluation needs at least one adapter for each phase")
    rows, draws = [], {"n_resamples": n_resamples, "seed": seed}
    for one, first in phase1.items():
        begin = bootstrap_ratio(first, np.ones(len(first)), clusters, **draws)
        for two, runs in phase2.items():
            each = rounds.walk(runs, lengths, gamma, first=first, n_first=n_first).per_request()
            tokens = bootstrap_ratio(each["accepted"] + each["bonus"], each["rounds"], clusters,
                                     **draws)
            found = {"tokens_per_verification": tokens, "first_accepted": begin}
            if two in (timings or {}):
                plain, drafting = _times(timings[two], each)
                found["speedup"] = bootstrap_ratio(plain, drafting, clusters, **draws)
            rows += [row(name, value, phase1=one, phase2=two) for name, value in found.items()]
    return pd.DataFrame(rows)


def _times(timing: Timing, each: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """ms of every answer, by plain decoding and by these rounds, the first of them phase 1's."""
    tokens, drew = each["accepted"] + each["bonus"], each["rounds"] > 0
    a_round = timing.token_ms * (1 + timing.overhead)
    rounds_ms = drew * timing.verify_ms + np.maximum(each["rounds"] - 1, 0) * a_round
    return (timing.prefill_verifier_ms + tokens * timing.token_ms,
            timing.prefill_verifier_ms + rounds_ms)
