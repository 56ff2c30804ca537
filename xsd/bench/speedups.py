"""Records of a live run into speed-ups: paired sample by sample, against the best baseline of the
same run; nothing is claimed where the machine was busy (docs/decoding.md, "Measuring")."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import statistics

OTHERS = 0.15
"""Share of its cores that other processes may take before the machine is called busy."""
SPREAD = 0.25
"""The same for how far the repeats of an arm lie apart (interquartile range over median). An
idle shared machine shows 5 to 20 %, which the interval of the paired ratios has in it."""


def seconds(records: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, str, pd.Series]:
    """Of the samples that every arm has run: seconds [sample, arm], the median over repeats; the
    best baseline; and the cluster of each sample.

    The best baseline is the one that no other beats by much, sample by sample: its worst *median*
    of paired ratios against the others is the largest. So neither one stalled sample nor a few long
    answers can choose it. Raises: MetricError without a baseline or a common sample.
    """
    rows = pd.DataFrame(records, columns=["arm", "sample", "sequence", "baseline", "total_s"])
    times = rows.groupby(["sample", "arm"])["total_s"].median().unstack("arm").dropna()
    baselines = sorted(rows.loc[rows["baseline"].astype(bool), "arm"].unique())
    if times.empty or not baselines:
        raise MetricError(
            f"{rows['arm'].nunique()} arms share {len(times)} samples and {len(baselines)} of them "
            "are baselines; measure 'ar' beside the others")
    clusters = rows.drop_duplicates("sample").set_index("sample")["sequence"]
    worst = {one: times[baselines].div(times[one], axis=0).median().min() for one in baselines}
    return times, max(baselines, key=worst.__getitem__), clusters.reindex(times.index)


def of(records: Sequence[Mapping[str, Any]], *, n_resamples: int = statistics.N_RESAMPLES,
       seed: int = 0) -> dict[str, dict[str, Any]]:
    """arm → its speed-up: value, the median over samples of baseline time / arm time, with the
    interval (low, high; None for one cluster) of these paired ratios, n, n_clusters; total, the
    ratio of total times; baseline, by name; slower, the share of samples that took longer; spread
    of the repeats (None without any); others, the share of the cores that other processes took
    meanwhile (None where the system does not say); busy: by either, nothing may be claimed.

    Raises: as :func:`seconds`.
    """
    times, baseline, clusters = seconds(records)
    rows = pd.DataFrame(records, columns=["arm", "sample", "total_s", "others"])
    each = rows.groupby(["arm", "sample"])["total_s"]
    off = (rows["total_s"] / each.transform("median"))[each.transform("size") > 1]
    off = off.groupby(rows["arm"]).quantile([0.25, 0.75]).unstack()
    spread = (off[0.75] - off[0.25]).to_dict() if len(off) else {}
    others = _known(rows.drop_duplicates("sample")["others"].astype(float).mean())
    found = {}
    for arm in times:
        ratios = times[baseline] / times[arm]
        interval = median(ratios, clusters, n_resamples=n_resamples, seed=seed)
        loose = max(spread.get(arm, 0.0), spread.get(baseline, 0.0)) > SPREAD
        found[arm] = {
            **{name: _known(value) for name, value in dataclasses.asdict(interval).items()},
            "total": float(times[baseline].sum() / times[arm].sum()), "baseline": baseline,
            "slower": float((ratios < 1).mean()), "spread": spread.get(arm), "others": others,
            "busy": bool(loose or (others or 0.0) > OTHERS),
        }
    return found


def median(values: Any, clusters: Sequence[Any], *, minus: Any = None,
           **options: Any) -> statistics.Interval:
    """Median over samples with its interval, whole sequences drawn. values: n numbers. minus: n
    others, whose median in the same draws is taken off. options, Raises: as statistics.bootstrap.
    """
    columns = [np.asarray(one, dtype=float) for one in (values, minus) if one is not None]

    def medians(drawn: np.ndarray) -> np.ndarray:
        """drawn: how often each sample was, [R, n]."""
        found = []
        for column in columns:
            order = np.argsort(column, kind="stable")
            reached = drawn[:, order].cumsum(axis=1)
            both = [(2 * reached >= reached[:, -1:]), (2 * reached > reached[:, -1:])]
            found.append(np.mean([column[order][side.argmax(axis=1)] for side in both], axis=0))
        return (found[0] - sum(found[1:]))[:, None]

    n = len(columns[0])
    return statistics.bootstrap(medians, np.eye(n), clusters, [n], **options)[0]


def _known(value: float) -> float | None:
    """JSON has no NaN: what is not known is null."""
    return value if value == value else None
