"""Notebook 12: every level × recipe × seed on one extraction, judged on held-out sequences; and a
learning curve over the drives.

Each training leaves its folder below ``<run_dir>/study`` with results.json; the same call again
does only what is missing. Held-out answers are read for judging alone: training sees the train
split, early stopping whole sequences of it, and a sequence in both is refused.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from studies.parameters import StudyParameters
from studies.recipes import grid, jobs, measure
from studies.recipes.grid import CLOSED_FORM, FLOORS, Job
from xsd import processes
from xsd.evaluate import statistics, tables
from xsd.files import provenance
from xsd.runs import folder, parameters
from xsd.steps import extraction

NO_ADAPTER = "no adapter"
"""Recipe of the floors that read tokens alone."""
FIGURES = ("cosine", "accept", "token_acceptance", "accepted_per_round")


def ensure(P: StudyParameters) -> None:
    """Extract the pairs when the run folder holds none at all and not both sets come by path."""
    train, test = extraction.stored(P.data, "train"), extraction.stored(P.test_data, "test")
    if (folder.resolve(P.run_dir) / extraction.PAIR_FILE).is_file() or (train and test):
        return
    names = ("run_dir", "seed", "data", "n_train_sequences", "n_test_sequences",
             "questions_per_sequence", "max_new_tokens")
    sets = dict.fromkeys([*([] if test else [P.test_data]), *parameters.SETS])
    own = {"test_data": list(sets), "workers": max(2, P.workers)}
    if train:
        own["n_train_sequences"] = 0
    extraction.run(parameters.ExtractParameters.checked(
        {name: getattr(P, name) for name in names} | own))


def run(P: StudyParameters, *,
        progress: Callable[[Job, dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train and judge what is missing; returns what it writes to ``results/study.json``, and writes
    the tables below as ``tables/study*.csv|md|tex``.

    progress: called with each finished job and its record. Raises: MetricError when a sequence is
    in training and in test; TrainingError when the study's folder holds trainings on other data or
    of another recipe; ParameterError when the run holds no such pairs; and as the rooms below.
    """
    data = jobs.opened(P.run_dir, P.data, P.test_data)
    tested = list(data.test.samples["sequence"])
    statistics.check_disjoint(data.states.sequence, tested)
    seeds = [P.seed + i for i in range(P.n_seeds)]
    wanted = grid.jobs(P.levels, P.recipes, seeds, budget_levels=P.budget_levels, shares=P.shares,
                       curve=P.curve)
    records = {}
    for job, record in _worked(wanted, P):
        records[job] = record
        if progress is not None:
            progress(job, record)
    results = {
        "train_sequences": len(set(data.states.sequence)), "train_pairs": len(data.states),
        "test_sequences": len(set(tested)), "test_pairs": len(data.test), "seeds": seeds,
        "gamma": P.gamma, "threshold": P.threshold,
        "rows": _rows(P, data, records, seeds), "times": _times(P, records, seeds),
        "curve": _curve(P, data, records, seeds),
        "provenance": provenance(seed=P.seed, data_hash=data.hashes["train"],
                                 parameters=P.model_dump()),
    }
    folder.save_results(P.run_dir, "study", results)
    for name, found in (("study", table(results)), ("study_times", times(results)),
                        ("study_curve", curve(results))):
        if len(found):
            tables.write(found, folder.resolve(P.run_dir) / "tables" / name)
    return results


def _worked(wanted: Sequence[Job], P: StudyParameters) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every job with its record, as they finish. Several workers: a process of one thread each, the
    faster way for adapters this small."""
    if P.workers == 1:
        yield from ((job, jobs.work(job, P)) for job in wanted)
        return
    with processes.pool(P.workers, torch.set_num_threads, 1) as pool:
        waiting = {pool.submit(jobs.work, job, P): job for job in wanted}
        for done in concurrent.futures.as_completed(waiting):
            yield waiting[done], done.result()


# --- the results of all jobs

Records = Mapping[Job, Mapping[str, Any]]


def _options(P: StudyParameters) -> dict[str, int]:
    return {"n_resamples": P.resamples, "seed": P.seed}


def _counts(records: Records, some: Sequence[Job]) -> list[pd.DataFrame]:
    return [pd.DataFrame(records[job]["counts"]) for job in some]


def _row(P: StudyParameters, records: Records, some: Sequence[Job]) -> dict[str, Any]:
    """One level and recipe, its seeds together."""
    one = records[some[0]]
    means = {
        name: sum(records[job][name] for job in some) / len(some)
        for name in ("seconds", "steps", "epochs", "best_epoch")
    }
    return {
        "level": some[0].level, "recipe": some[0].recipe, "reads": one["reads"],
        "parameters": one["parameters"], "pairs": one["pairs"], **means, "n_seeds": len(some),
        **measure.figures(_counts(records, some), **_options(P)),
    }


def _rows(P: StudyParameters, data: jobs.Data, records: Records,
          seeds: Sequence[int]) -> list[dict[str, Any]]:
    trained = [[Job(level, recipe, seed) for seed in seeds] for level in P.levels
               for recipe in grid.recipes_of(level, P.recipes, P.budget_levels)]
    solved = [[Job(level, CLOSED_FORM, 0)] for level in FLOORS]
    rows = [_row(P, records, some) for some in trained + solved]
    training = [ids.tolist() for ids in data.train.ids("verifier")]
    bare = measure.without_adapter(training, data.test, P.gamma)
    return rows + [
        {"level": name, "recipe": NO_ADAPTER, **measure.figures([counts], **_options(P))}
        for name, counts in bare.items()
    ]


def _times(P: StudyParameters, records: Records, seeds: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for level in P.levels:
        trained = {
            recipe: _counts(records, [Job(level, recipe, seed) for seed in seeds])
            for recipe in grid.recipes_of(level, P.recipes, P.budget_levels)
        }
        best = trained.pop("best", None)
        for recipe, counts in trained.items() if best else ():
            value = measure.times(best, counts, **_options(P))
            found.append({"level": level, "recipe": recipe, "times": vars(value)})
    return found


def _curve(P: StudyParameters, data: jobs.Data, records: Records,
           seeds: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for share in P.shares:
        drives = len(grid.sequences_of(data.states.sequence, share))
        for level in P.curve:
            row = _row(P, records, grid.curve_jobs(level, seeds, share))
            found.append({"share": share, "sequences": drives, **row})
    return found


# --- the results as tables


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The one table: one row per level and recipe; each figure with its interval, accepted drafts
    per round also with its lowest and highest seed."""
    lines = []
    for found in results["rows"]:
        line = {name: found.get(name) for name in ("level", "recipe", "reads", "parameters")}
        for name in FIGURES:
            missing = dict.fromkeys(("value", "low", "high"))
            line |= tables.sides(name, found.get(name, missing))
        per_round = found["accepted_per_round"]
        line |= {"lowest seed": min(per_round["seeds"]), "highest seed": max(per_round["seeds"]),
                 "n": per_round["n"]}
        lines.append(line | {name: found.get(name) for name in ("seconds", "steps", "epochs")})
    return pd.DataFrame(lines)


def times(results: Mapping[str, Any]) -> pd.DataFrame:
    """How many times as many drafts per round the best recipe accepts as each other, by level."""
    return pd.DataFrame([{
        "level": one["level"], "best against": one["recipe"], **tables.sides("times", one["times"])
    } for one in results["times"]])


def curve(results: Mapping[str, Any]) -> pd.DataFrame:
    """The learning curve: level, share, sequences, pairs, steps, n_seeds; accepted drafts per round
    and token acceptance with their intervals."""
    about = ["level", "share", "sequences", "pairs", "steps", "n_seeds"]
    figures = ["accepted_per_round", "token_acceptance"]
    lines = []
    for one in results["curve"]:
        line = {name: one[name] for name in about}
        for name in figures:
            line |= tables.sides(name, one[name])
        lines.append(line)
    sides = [f"{name}{side}" for name in figures for side in ("", " low", " high")]
    return pd.DataFrame(lines, columns=about + sides)


def reading(results: Mapping[str, Any]) -> pd.DataFrame:
    """:func:`table` for reading: an interval is one text, counts are whole, and a dash stands where
    nothing was measured."""
    found = tables.with_intervals(table(results), percent=("accept", "token_acceptance"))
    digits = {"parameters": 0, "lowest seed": 2, "highest seed": 2, "seconds": 1, "steps": 0,
              "epochs": 0}
    for name, n in digits.items():
        found[name] = [f"{value:.{n}f}" if pd.notna(value) else None for value in found[name]]
    return found.astype(object).where(found.notna(), "–")
