"""``xsd evaluate``: adapters by path on one held-out set, as a printed report and tables, without
arms (docs/metrics.md, section 9)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import comparison, metrics, reliability, report_text, table, tables
from xsd.evaluate.speedup import Timing
from xsd.files import atomic_write, provenance
from xsd.runs import folder
from xsd.steps import evaluation, extraction, predictions, training

FLOORS = {name: name for name in evaluation.FLOORS.values()} | {"drafter tokens": table.DRAFTER}
"""A floor's name → the level that it is in the counts."""


def text_of(name: str, level: str, found: Mapping[str, pd.DataFrame], gamma: int,
            timing: Timing | None = None, live: Mapping[str, Any] | None = None) -> str:
    """The eight sections for one level; the comparison with the floors is the drafting loop's, the
    rest is one step. live: the set's part of the live results, where there is one."""
    clock = (live or {}).get("arms", {}).get(level, {}).get("speedup", {})
    title = (f"{level} on {name}: one step after the verified prefix; against the floors as a "
             "greedy loop drafts")
    rows, unit = found["metrics"], "unit == 'token_acceptance'"
    return report_text.report(
        title, rows[rows["level"] == level], gamma=gamma, floors=found["floors"].query(unit),
        headline=found["headline"].query(unit).set_index("level").loc[level], timing=timing,
        measured=None if clock.get("busy") else clock.get("value"))


def headline(loop: pd.DataFrame, **draws: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """table.counts of a greedy loop, floors included → (one row per level and unit: its acceptance,
    the best floor and the distance above it, with intervals, and what was detectable; the floors
    themselves: unit, floor, value, low, high, n)."""
    rows, of_floors = [], []
    below = {name: level for name, level in FLOORS.items() if level in set(loop["level"])}
    found = comparison.above_floors(loop, below, **draws)
    for unit, levels in found.items():
        rows += [{
            "level": level, "unit": unit, "best floor": one.best, "n": one.arm.n,
            "clusters": one.arm.n_clusters, **tables.sides("acceptance", one.arm),
            **tables.sides("floor", one.floors[one.best]),
            **tables.sides("above floor", one.above_best), "detectable": one.detectable,
        } for level, one in levels.items() if level not in FLOORS.values()]
        of_floors += [tables.row("floor", levels[level].arm, unit=unit, floor=name)
                      for name, level in below.items()]
    return pd.DataFrame(rows), pd.DataFrame(of_floors).drop(columns="metric")


def figures(own: pd.DataFrame, reliable: pd.DataFrame, *, thresholds: Sequence[float], top_k: int,
            gamma: int, **draws: int) -> pd.DataFrame:
    """Every figure of every level one step after the verified prefix, as one long table:
    hidden-state, token and reliability figures. own: the token table of the adapters' levels.
    reliable: reliability.figures of it."""
    of_states = metrics.state_figures(own, thresholds=thresholds, gamma=gamma, **draws)
    of_tokens = metrics.token_figures(own, top_k=(1, top_k), gamma=gamma, **draws)
    return tables.frame([row for part in (of_states, of_tokens, reliable)
                         for row in part.to_dict("records")])


def judge(adapters: Sequence[str], pairs: str, out: str | Path, *, head: str = "", train: str = "",
          mode: str | None = None, gamma: int = 5, gamma_prefill: int = 10, top_k: int = 5,
          thresholds: Sequence[float] = (0.8, 0.85, 0.9, 0.95), batch_size: int = 64,
          device: str = "auto", timing: str | Mapping[str, float] = "reference",
          n_resamples: int = 400, seed: int = 0) -> str:
    """Write ``report.txt``, ``tokens.parquet``, ``tables/*.{csv,md,tex}`` and
    ``results/evaluate.json`` into ``out`` and return the report.

    pairs, train: as notebooks take data by path. Without ``train`` there are no floors of training
    answers and nothing is compared with its sequences. Raises: as the steps of 04 and 13."""
    draws = {"n_resamples": n_resamples, "seed": seed}
    levels, answers = training.load(out, adapters, device), []
    held_out = evaluation.held_out(out, pairs, mode, head)
    if train:
        trained_on = extraction.open_pairs(out, "train", train)
        extraction.remember(out, "train", [trained_on])
        evaluation.check_leakage(out, [held_out])
        answers = evaluation.training_answers(out, train)
    tokens = table.measure(levels, held_out, gamma=gamma, top_k=top_k, batch_size=batch_size,
                           kinds=evaluation.token_kinds)
    floors = evaluation.floor_rows(held_out, answers, gamma)
    own = tokens[tokens["level"] != table.DRAFTER]
    counted = pd.concat([table.counts(one, gamma) for one in (floors, tokens) if len(one)])
    counted = counted.astype({"level": str, "sequence": str})
    reliable = reliability.figures(own, thresholds=thresholds, **draws)
    found = {"metrics": figures(own, reliable, thresholds=thresholds, top_k=top_k, gamma=gamma,
                                **draws)}
    if set(counted["level"]) == set(levels):
        raise MetricError(f"{pairs} holds neither prompts nor tokens of the drafter, so there is "
                          "no floor to compare with; name the training set too (--train)")
    found["headline"], found["floors"] = headline(counted, **draws)
    timed = predictions.timings(timing, levels, held_out, run_dir=out, gamma=gamma,
                                gamma_prefill=gamma_prefill)
    found |= predictions.speedups(counted, timed)
    place = folder.resolve(out)
    for name, rows in found.items():
        tables.write(rows, place / "tables" / name)
    text = "\n".join(text_of(held_out.name, level, found, gamma, timed.get(level))
                     for level in levels)
    atomic_write(place / "report.txt", text)
    folder.save_tokens(out, table.join({held_out.name: table.drafted(tokens)}))
    given = {"adapters": list(adapters), "pairs": pairs, "head": head, "train": train}
    data_hash = str(held_out.dataset.manifest["config"].get("data_hash", ""))
    rows = {name: frame.to_dict("records") for name, frame in found.items()}
    folder.save_results(out, "evaluate", rows | {"provenance": provenance(
        seed=seed, data_hash=data_hash, parameters=given)})
    return text
