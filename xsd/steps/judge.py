"""``xsd evaluate``: adapters by path on one held-out set, as a printed report and tables, without
arms (docs/metrics.md, section 9), and speed-ups predicted from acceptance and from times that are
quoted, given or measured (section 10). Notebook 05 measures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.adapters.base import Adapter
from xsd.bench import costs
from xsd.core import MetricError, ParameterError
from xsd.decode.prices import Prices
from xsd.evaluate import comparison, curves, metrics, reliability, report_text, table, tables
from xsd.evaluate.held_out import HeldOut
from xsd.evaluate.speedup import Timing, break_even_table, expected_table, wall_clock_table
from xsd.files import atomic_write, provenance, read_json
from xsd.runs import folder
from xsd.steps import evaluation, extraction, training

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


def figures(own: pd.DataFrame, reliable: pd.DataFrame, *, gamma: int, top_k: int = 5,
            thresholds: Sequence[float] = metrics.THRESHOLDS, **draws: int) -> pd.DataFrame:
    """Every figure of every level one step after the verified prefix, as one long table:
    hidden-state, token and reliability figures. own: the token table of the adapters' levels.
    reliable: reliability.figures of it."""
    of_states = metrics.state_figures(own, thresholds=thresholds, gamma=gamma, **draws)
    of_tokens = metrics.token_figures(own, top_k=(1, top_k), gamma=gamma, **draws)
    return tables.frame([row for part in (of_states, of_tokens, reliable)
                         for row in part.to_dict("records")])


def timings(timing: str | Mapping[str, float], adapters: Mapping[str, Adapter], pairs: HeldOut, *,
            run_dir: str | Path, gamma: int, gamma_prefill: int) -> dict[str, Timing]:
    """Level or floor → what its speed-up is predicted from: the reference's times, one's own, or
    what notebook 05 measured in the run ("measured"); then levels it did not time are left out.

    Raises: ParameterError where the run holds no measured costs, or not of rounds this wide."""
    reads = dict.fromkeys(evaluation.FLOORS.values(), "") | {"drafter tokens": "drafter"} | {
        level: one.reads for level, one in adapters.items()}
    if timing != "measured":
        return dict.fromkeys(reads, Timing.read(timing))
    path = folder.resolve(run_dir) / "results" / "live.json"
    with folder.as_written(path):
        known = read_json(path, ParameterError, folder.AGAIN)["costs"] if path.is_file() else None
    if not known:
        raise ParameterError(f"the run {run_dir} holds no measured costs; run notebook 05 with "
                             f"run_dir={run_dir} first, or give timing=reference")
    n_tokens = sum(map(len, pairs.answers)) / len(pairs)
    return {
        name: Timing.of(costs.stored_prices(known, level=name if name in adapters else "",
                                            drafter=read in ("drafter", "both")),
                        n_tokens=n_tokens, gamma=gamma, most=gamma_prefill)
        for name, read in reads.items() if name not in adapters or f"adapter {name}" in known
    }


def read_prices(path: str | Path, *, drafter: bool = True, level: str = "") -> Prices:
    """One's own ``{verifier_prefill_s, drafter_prefill_s, draft_s, verify: {"1": s, "6": s, …}}``,
    the same for every arm; or a run folder whose notebook 05 measured the parts, for an arm with
    the drafter (or without) and an adapter of this level. Raises: ParameterError naming what is
    wrong."""
    path = Path(path)
    try:
        if path.is_dir():
            stored = read_json(path / "results" / "live.json", ParameterError, folder.AGAIN)
            return costs.stored_prices(stored["costs"], drafter=drafter, level=level)
        stored = read_json(path, ParameterError, "give a JSON of seconds")
        verify = {int(rows): float(seconds) for rows, seconds in stored["verify"].items()}
        names = ("verifier_prefill_s", "drafter_prefill_s", "draft_s")
        return Prices(*(float(stored[name]) for name in names), verify)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ParameterError) as error:
        raise ParameterError(
            f"{path} holds no prices ({type(error).__name__}: {error}); expected "
            "verifier_prefill_s, drafter_prefill_s, draft_s and verify (rows → seconds), or a run "
            f"folder whose notebook 05 measured {level or 'the parts'}") from error


def speedups(counted: pd.DataFrame, timed: Mapping[str, Timing]) -> dict[str, pd.DataFrame]:
    """Predictions by the reference's formulas: expected_speedup, of every timed level's token
    acceptance (counted: table.counts of a greedy loop); wall_clock, end to end at 21, 50, 70 and
    100 %; break_even, the acceptance that it takes. Each with level and kind of the timing."""
    loop = counted.groupby("level")[["matched", "positions"]].sum()
    share = (loop["matched"] / loop["positions"]).rename({table.DRAFTER: "drafter tokens"})
    timed = {level: of for level, of in timed.items() if level in share}
    of_any = {"any": next(iter(timed.values()))} if len(set(timed.values())) == 1 else timed
    made = {"expected_speedup": (timed, lambda level, of: expected_table(share[level], of)),
            "wall_clock": (of_any, lambda _, of: wall_clock_table(of)),
            "break_even": (of_any, lambda _, of: break_even_table(of.gammas, overhead=of.overhead))}
    return {name: pd.DataFrame([{"level": level, "timing": of.kind, **row}
                                for level, of in some.items() for row in rows(level, of)])
            for name, (some, rows) in made.items()}


def judge(adapters: Sequence[str], pairs: str, out: str | Path, *, head: str = "", train: str = "",
          gamma: int = 5, timing: str | Mapping[str, float] = "reference", device: str = "auto",
          seed: int = 0) -> str:
    """Write ``report.txt``, ``tokens.parquet``, ``tables/*.{csv,md,tex}`` and
    ``results/evaluate.json`` into ``out`` and return the report.

    pairs, train: as notebooks take data by path. Without ``train`` there are no floors of training
    answers and nothing is compared with its sequences. Raises: as the steps of 04 and 13."""
    draws = {"n_resamples": curves.RESAMPLES, "seed": seed}
    levels, answers = training.load(out, adapters, device), []
    held_out = evaluation.held_out(out, pairs, head=head)
    if train:
        trained_on = extraction.open_pairs(out, "train", train)
        extraction.remember(out, "train", [trained_on])
        evaluation.check_leakage(out, [held_out])
        answers = evaluation.training_answers(out, train)
    tokens = table.measure(levels, held_out, gamma=gamma, kinds=evaluation.token_kinds)
    floors = evaluation.floor_rows(held_out, answers, gamma)
    own = tokens[tokens["level"] != table.DRAFTER]
    counted = pd.concat([table.counts(one, gamma) for one in (floors, tokens) if len(one)])
    counted = counted.astype({"level": str, "sequence": str})
    found = {"metrics": figures(own, reliability.figures(own, **draws), gamma=gamma, **draws)}
    if set(counted["level"]) == set(levels):
        raise MetricError(f"{pairs} holds neither prompts nor tokens of the drafter, so there is "
                          "no floor to compare with; name the training set too (--train)")
    found["headline"], found["floors"] = headline(counted, **draws)
    timed = timings(timing, levels, held_out, run_dir=out, gamma=gamma, gamma_prefill=10)
    found |= speedups(counted, timed)
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
