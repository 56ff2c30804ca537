"""Step 12: the study. Every level × recipe × seed on one extraction, judged on held-out sequences;
and a learning curve over the drives.

Each training leaves its folder below ``<run_dir>/study`` with results.json; the same call again
does only what is missing. Held-out answers
are read for judging alone: training sees the train split, early stopping whole sequences of it, and
a sequence in both is refused.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from studies.parameters import StudyParameters
from studies.recipes import grid as study_recipes
from studies.recipes import jobs as study_jobs
from studies.recipes import measure as study_measure
from studies.recipes.grid import CLOSED_FORM, FLOORS, Job
from xsd.evaluate import statistics, tables
from xsd.files import provenance
from xsd.runs import folder, parameters
from xsd.steps import data as datasets
from xsd.steps import extraction
from xsd.steps.evaluation import with_intervals

NO_ADAPTER = "no adapter"
"""Recipe of the floors that read tokens alone."""
Progress = Callable[[Job, dict[str, Any]], None]


def run(given: StudyParameters, *, progress: Progress | None = None) -> Study:
    """Train and judge what is missing, then write ``results/study.json`` and
    ``tables/study*.csv|md|tex``.

    progress: called with each finished job and its record. Raises: MetricError when a sequence is
    in training and in test; TrainingError
    when the study's folder holds trainings on other data or of another recipe; and as the rooms
    below.
    """
    ensure(given)
    place = folder.resolve(given.run_dir)
    sets = {"train": given.data, "test": given.test_data}
    for split, name in sets.items():
        extraction.open_pairs(
            given.run_dir, split, name,
            study_jobs.MODE)  # names what the run holds when it does not hold these
    train, test = (extraction.shard_folder(given.run_dir, split, name, study_jobs.MODE)
                   for split, name in sets.items())
    setting = study_jobs.Setting(place / "study", train, test, given.max_epochs, given.gamma,
                                 given.threshold, given.batch_size)
    data = study_jobs.opened(train, test)
    statistics.check_disjoint(list(data.states.sequence), data.test.table()["sequence"].tolist())
    seeds = [given.seed + i for i in range(given.n_seeds)]
    wanted = {"budget_levels": given.budget_levels, "shares": given.shares, "curve": given.curve}
    jobs = study_recipes.jobs(given.levels, given.recipes, seeds, **wanted)
    records = {}
    for job, record in _worked(jobs, setting, given.workers):
        records[job] = record
        if progress is not None:
            progress(job, record)
    found = Study(_results(given, data, records, seeds))
    folder.save_results(given.run_dir, "study", found.results)
    for name, table in (("study", found.table()), ("study_times", found.times()), ("study_curve",
                                                                                   found.curve())):
        if len(table):
            tables.write(table, place / "tables" / name)
    return found


def _worked(jobs: Sequence[Job], setting: study_jobs.Setting,
            workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Every job with its record, as they finish. Several workers: a process of one thread each, for
    adapters this small the faster way."""
    if workers == 1:
        yield from ((job, study_jobs.work(job, setting)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    options = {"mp_context": context, "initializer": torch.set_num_threads, "initargs": (1,)}
    with concurrent.futures.ProcessPoolExecutor(workers, **options) as pool:
        waiting = {pool.submit(study_jobs.work, job, setting): job for job in jobs}
        for done in concurrent.futures.as_completed(waiting):
            yield waiting[done], done.result()


def ensure(given: StudyParameters) -> None:
    """Extract the pairs when the run folder holds none at all."""
    if (folder.resolve(given.run_dir) / extraction.PAIR_FILE).is_file():
        return
    names = ("run_dir", "seed", "data", "n_train_sequences", "n_test_sequences",
             "questions_per_sequence", "max_new_tokens", "workers")
    values = {name: getattr(given, name) for name in names}
    values["test_data"] = list(
        dict.fromkeys(
            [given.test_data, *parameters.ExtractParameters.model_fields["test_data"].default]))
    extraction.run(
        parameters.ExtractParameters.checked({**values, "workers": max(2, given.workers)}))


# --- all of them
# ------------------------------------------------------------------------------------------------


def _results(given: StudyParameters, data: study_jobs.Data,
             records: Mapping[Job, Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    options = {"n_resamples": given.resamples, "seed": given.seed}

    def counted(jobs: Sequence[Job]) -> list[pd.DataFrame]:
        return [study_measure.from_columns(records[job]["counts"]) for job in jobs]

    def row(level: str, recipe: str, jobs: Sequence[Job]) -> dict[str, Any]:
        means = {
            name: sum(records[job][name] for job in jobs) / len(jobs)
            for name in ("seconds", "steps", "epochs", "best_epoch")
        }
        one = records[jobs[0]]
        about = {
            "level": level, "recipe": recipe, "reads": one["reads"],
            "parameters": one["parameters"], "pairs": one["pairs"]
        }
        return {
            **about, **means, "n_seeds": len(jobs),
            **study_measure.figures(counted(jobs), **options)
        }

    rows, ratios = [], []
    for level in given.levels:
        recipes = study_recipes.recipes_of(level, given.recipes, given.budget_levels)
        trained = {recipe: [Job(level, recipe, seed) for seed in seeds] for recipe in recipes}
        rows += [row(level, recipe, jobs) for recipe, jobs in trained.items()]
        for recipe in recipes:
            if recipe != "best" and "best" in trained:
                value = study_measure.times(counted(trained["best"]), counted(trained[recipe]),
                                            **options)
                ratios.append(
                    {"level": level, "recipe": recipe, "times": dataclasses.asdict(value)})
    rows += [row(level, CLOSED_FORM, [Job(level, CLOSED_FORM, 0)]) for level in FLOORS]
    answers = [[one.ids_by_verifier.tolist(),
                one.ids_by_drafter.tolist(), one.sequence] for one in data.test]
    bare = study_measure.without_adapter(extraction.answers(data.train),
                                         *map(list, zip(*answers, strict=True)), given.gamma)
    rows += [{"level": name, "recipe": NO_ADAPTER, **study_measure.figures([counts], **options)}
             for name, counts in bare.items()]
    curve = []
    for share in given.shares:
        for level in given.curve:
            solved = level in FLOORS
            jobs = [
                Job(level, CLOSED_FORM if solved else "best", seed, share)
                for seed in ([0] if solved else seeds)
            ]
            drives = len(study_recipes.sequences_of(data.states.sequence, share))
            curve.append({"share": share, "sequences": drives, **row(level, jobs[0].recipe, jobs)})
    counts = {
        "train_sequences": len(set(data.states.sequence)), "train_pairs": len(data.states),
        "seeds": list(seeds)
    }
    counts |= {
        "test_sequences": len(set(data.test.table()["sequence"])), "test_pairs": len(data.test),
        "gamma": given.gamma
    }
    about = provenance(seed=given.seed, data_hash=data.hashes["train"],
                       parameters=given.model_dump())
    return {
        **counts, "threshold": given.threshold, "rows": rows, "times": ratios, "curve": curve,
        "provenance": about
    }


@dataclasses.dataclass(frozen=True)
class Study:
    """What the study found. results: as written to ``results/study.json``."""

    results: dict[str, Any]

    def table(self) -> pd.DataFrame:
        """The one table: a row a level and recipe; each figure with its interval, accepted length
        also with its lowest and highest seed."""
        lines = []
        for found in self.results["rows"]:
            line = {name: found.get(name) for name in ("level", "recipe", "reads", "parameters")}
            for name in ("cosine", "accept", "token_acceptance", "accepted_per_round"):
                value = found.get(name, {})
                line |= {
                    name: value.get("value"), f"{name} low": value.get("low"),
                    f"{name} high": value.get("high")
                }
            seeds = found["accepted_per_round"]["seeds"]
            line |= {
                "lowest seed": min(seeds), "highest seed": max(seeds), "n": found["accepted_per_round"]
                                                                            ["n"]
            }
            lines.append(
                {**line, **{name: found.get(name) for name in ("seconds", "steps", "epochs")}})
        return pd.DataFrame(lines)

    def times(self) -> pd.DataFrame:
        """How many times the accepted length of each other recipe the best one reaches, by
        level."""
        found = [{
            "level": one["level"], "best against": one["recipe"], **_triple("times", one["times"])
        } for one in self.results["times"]]
        return pd.DataFrame(found)

    def curve(self) -> pd.DataFrame:
        """The learning curve: level, share, sequences, pairs, accepted_per_round and token_acceptance
        with their intervals."""
        names = ("level", "share", "sequences", "pairs", "steps", "n_seeds")
        figures = ("accepted_per_round", "token_acceptance")
        lines = []
        for one in self.results["curve"]:
            line = {name: one[name] for name in names}
            for name in figures:
                line |= _triple(name, one[name])
            lines.append(line)
        return pd.DataFrame(lines)

    def reading(self) -> pd.DataFrame:
        """The table for reading: intervals in one text, seconds rounded, counts whole, a dash where
        nothing was measured."""
        table = with_intervals(self.table(), percent=("accept", "token_acceptance"))
        for name, digits in (("parameters", 0), ("lowest seed", 2), ("highest seed", 2),
                             ("seconds", 1), ("steps", 0), ("epochs", 0)):
            table[name] = [
                f"{value:.{digits}f}" if pd.notna(value) else None for value in table[name]
            ]
        return table.astype(object).where(table.notna(), "–")


def _triple(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found["value"], f"{name} low": found["low"], f"{name} high": found["high"]}
