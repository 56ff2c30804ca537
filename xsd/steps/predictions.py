"""Step 13, what it would save: speed-ups predicted from acceptance and from times that are quoted,
given or measured (docs/metrics.md, section 10); and what a replay of stored states stands on (the
reference's cached mode). Notebook 05 measures."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from xsd import files
from xsd.adapters.base import Adapter
from xsd.bench import costs
from xsd.core import ParameterError
from xsd.decode import rules
from xsd.decode.prices import Prices
from xsd.evaluate import floors, table
from xsd.evaluate.held_out import HeldOut
from xsd.evaluate.speedup import Timing, break_even_table, expected_table, wall_clock_table
from xsd.files import read_json
from xsd.runs import folder
from xsd.steps import evaluation


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


def stored_arms(pairs: HeldOut, adapters: Mapping[str, Adapter],
                gamma: int) -> dict[str, floors.Floor]:
    """What adapters draft from stored states (the greedy loop at gamma), one rule for each answer
    that is not empty."""
    tokens = table.measure(adapters, pairs, gamma=gamma, drafter=False)
    found = {}
    for level, part in tokens.groupby("level", sort=False, observed=True):
        drafts = {key: [None] * len(ids) for key, ids in zip(pairs.keys, pairs.answers, strict=True)
                  if ids}
        for key, at, token in zip(part["sample"], part["position"], part["draft_id"], strict=True):
            drafts[key][at + 1] = int(token)
        found[level] = floors.Floor(level, [rules.stored(ids) for ids in drafts.values()])
    return found


def read_prices(path: str | Path, *, drafter: bool = True, level: str = "") -> Prices:
    """One's own ``{verifier_prefill_s, drafter_prefill_s, draft_s, verify: {"1": s, "6": s, …}}``,
    the same for every arm; or a run folder whose notebook 05 measured the parts, for an arm with
    the drafter (or without) and an adapter of this level. Raises: ParameterError naming what is
    wrong."""
    path = Path(path)
    try:
        if path.is_dir():
            stored = files.read_json(path / "results" / "live.json", ParameterError, folder.AGAIN)
            return costs.stored_prices(stored["costs"], drafter=drafter, level=level)
        stored = files.read_json(path, ParameterError, "give a JSON of seconds")
        verify = {int(rows): float(seconds) for rows, seconds in stored["verify"].items()}
        names = ("verifier_prefill_s", "drafter_prefill_s", "draft_s")
        return Prices(*(float(stored[name]) for name in names), verify)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ParameterError) as error:
        raise ParameterError(
            f"{path} holds no prices ({type(error).__name__}: {error}); expected "
            "verifier_prefill_s, drafter_prefill_s, draft_s and verify (rows → seconds), or a run "
            f"folder whose notebook 05 measured {level or 'the parts'}") from error
