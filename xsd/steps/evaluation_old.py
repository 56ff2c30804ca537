"""Step 03: how close the aligned states come to the verifier's, and what the cosine says about the
token."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.core import Batch, ParameterError
from xsd.evaluate import evaluate, statistics, tables
from xsd.evaluate.evaluate import Evaluation
from xsd.evaluate.statistics import Interval
from xsd.evaluate.tables import with_intervals  # noqa: F401 - read by the notebooks as evaluation.with_intervals
from xsd.files import provenance
from xsd.runs import folder, parameters
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets
from xsd.steps import extraction, training


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One held-out set of a run. name: short name. clusters: what intervals draw, a name a sample.
    keys: core.Sample.key of each sample."""

    name: str
    dataset: ShardDataset
    head: Tensor
    clusters: list[str]
    keys: list[str]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The pairs in their order, ``sequence`` replaced by the clusters."""
        for batch in self.dataset.batches(batch_size):
            yield dataclasses.replace(batch, sequence=[self.clusters[i] for i in batch.index])


def held_out(run_dir: str | os.PathLike[str], data: str, mode: str) -> HeldOut:
    """A held-out set that notebook 01 extracted. Raises: ParameterError when the run does not hold
    it."""
    dataset = extraction.open_pairs(run_dir, "test", data, mode)
    table = dataset.table()
    keys = [
        key_of(*line)
        for line in zip(table["sequence"], table["clip"], table["question"], strict=True)
    ]
    clusters = datasets.clusters(table["sequence"].tolist(), table["clip"].tolist())
    return HeldOut(datasets.name_of(data), dataset, dataset.head("verifier"), clusters, keys)


def key_of(sequence: str, clip: str, question: str) -> str:
    """core.Sample.key without the pictures."""
    from xsd.core import Sample

    return Sample(sequence, clip, question, (), None).key  # type: ignore[arg-type]


def pairs_and_adapters(given: parameters.HiddenParameters | parameters.TokenParameters
                       | parameters.TruthParameters,
                       mode: str | None = None) -> tuple[list[HeldOut], dict[str, Adapter]]:
    """What steps 03, 04 and 13 read, made with the smoke parameters in a run that holds nothing
    yet. mode: the held-out pairs', by default as given.

    Raises: ParameterError for a data set that was not extracted or a level that was not trained,
    MetricError when a held-out sequence is
    among the training ones.
    """
    asked = {} if isinstance(given, parameters.HiddenParameters) else {"data": given.data}
    extraction.ensure(given.run_dir, given.seed, test_data=given.test_data, **asked)
    data = asked.get("data") or extraction.pair_file(given.run_dir).get("data", datasets.SIMULATED)
    training.ensure(given.run_dir, given.seed, given.levels, data=data)
    adapters = training.load(given.run_dir, given.levels)
    sets = [held_out(given.run_dir, name, mode or given.mode) for name in given.test_data]
    check_leakage(given.run_dir, sets)
    if len({one.name for one in sets}) < len(sets):
        raise ParameterError(
            f"two of the held-out sets {', '.join(given.test_data)} share a name; rename one of "
            "the folders"
        )
    return sets, adapters


def check_leakage(run_dir: str | os.PathLike[str], sets: Sequence[HeldOut]) -> dict[str, int]:
    """Compare the sequences in the manifests of every training set of the run with those of the
    held-out sets.

    Returns the numbers of sequences: training, held_out. Raises: MetricError naming shared
    sequences, or when the run holds no training set to compare with (a check of nothing proves
    nothing).
    """
    places = sorted((folder.resolve(run_dir) / "shards").glob("train_*/*/"))
    train = {
        name for place in places
        for name in ShardDataset(place, unfinished=True).table()["sequence"]
    }
    test = {name for one in sets for name in one.dataset.table()["sequence"]}
    statistics.check_disjoint(train, test)
    return {"training": len(train), "held_out": len(test)}


def interval(value: Interval) -> dict[str, Any]:
    """value, low, high, n and n_clusters, as the results hold a figure."""
    return dataclasses.asdict(value)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What step 03 found. results: as written. evaluations: (data, level) → the metrics
    themselves."""

    results: dict[str, Any]
    evaluations: Mapping[tuple[str, str], Evaluation]

    def table(self, data: str) -> pd.DataFrame:
        """Level, mean cosine and share above τ, each with its interval."""
        rows = []
        for level, found in self.results["test"][data]["levels"].items():
            line: dict[str, Any] = {"level": level, "reads": found["reads"]}
            for name in ("cosine", "accept"):
                line |= {
                    name: found[name]["value"], f"{name} low": found[name]["low"],
                    f"{name} high": found[name]["high"]
                }
            rows.append(
                {**line, "unbroken": found["unbroken_prefix"]["value"], "tokens": found["cosine"]["n"]})
        return pd.DataFrame(rows)

    def cosine_histogram(self, data: str, bins: int = 40) -> pd.DataFrame:
        """Share of tokens in each cosine bin, as ``views.figures.cosine_histogram`` reads it."""
        chosen = {
            level: found.hidden.values() for (name, level), found in self.evaluations.items()
            if name == data
        }
        low = min(0.9, np.floor(10 * min(values.min() for values in chosen.values())) / 10)
        edges, pieces = np.linspace(low, 1.0, bins + 1), []
        for level, values in chosen.items():
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            share = counts / len(values)
            pieces.append(
                pd.DataFrame({
                    "level": level, "cosine_low": edges[:-1], "cosine_high": edges[1:], "n": counts,
                    "share": share
                }))
        return pd.concat(pieces, ignore_index=True)

    def by_position(self, data: str, threshold: float, max_positions: int,
                    resamples: int) -> pd.DataFrame:
        """``cosine > τ`` at each position of each level, as
        ``views.figures.acceptance_by_position`` reads it."""
        rows = []
        for (name, level), found in self.evaluations.items():
            if name != data:
                continue
            shift = found.shift
            for at in found.hidden.result(n_resamples=resamples).positions[:max_positions]:
                marginal, survival = at.acceptance[threshold], at.survival[threshold]
                rows.append({
                    "level": level, "position": at.position + shift, "n": at.n,
                    "marginal": marginal.value, "marginal_low": marginal.low,
                    "marginal_high": marginal.high, "survival": survival.value,
                    "survival_low": survival.low, "survival_high": survival.high,
                })
        return pd.DataFrame(rows)


def hidden(given: parameters.HiddenParameters) -> Hidden:
    """Cosines of every level on every held-out set; writes ``results/hidden.json`` and
    ``tables/hidden_<data>.csv``.

    One step: each prediction follows the verified states before it, for the levels that read them
    too.
    """
    sets, adapters = pairs_and_adapters(given)
    thresholds = tuple(sorted({*given.thresholds, given.threshold}))
    evaluations: dict[tuple[str, str], Evaluation] = {}
    results: dict[str, Any] = {"mode": given.mode, "threshold": given.threshold, "test": {}}
    for one in sets:
        rows, levels = [], {}
        for level, adapter in adapters.items():
            found = evaluate.evaluate(adapter, one.batches(given.batch_size), one.head,
                                      thresholds=thresholds, gamma=given.gamma,
                                      max_positions=given.max_positions,
                                      )
            evaluations[one.name, level] = found
            measured = found.hidden.result(n_resamples=given.resamples, seed=given.seed)
            levels[level] = {
                "reads": adapter.reads, "cosine": interval(measured.cosine_mean),
                "accept": interval(measured.acceptance[given.threshold]), "accept_at": {
                    f"{tau:.2f}": interval(measured.acceptance[tau]) for tau in thresholds
                }, "unbroken_prefix": interval(measured.unbroken_prefix_mean[given.threshold]),
            }
            rows += [{"level": level, **row} for row in measured.rows()]
        results["test"][one.name] = {
            "threshold": given.threshold, "n_clusters": len(set(one.clusters)), "levels": levels
        }
        tables.write(tables.frame(rows),
                     folder.resolve(given.run_dir) / "tables" / f"hidden_{one.name}",
                     kinds=("csv",))
    results["provenance"] = provenance(seed=given.seed, data_hash=pairs_hash(sets),
                                       parameters=given.model_dump())
    folder.save_results(given.run_dir, "hidden", results)
    return Hidden(results, evaluations)


def pairs_hash(sets: Sequence[HeldOut]) -> str:
    """One hash of the held-out sets: their own data hashes in order."""
    return "+".join(str(one.dataset.manifest["config"].get("data_hash", ""))[:16] for one in sets)
