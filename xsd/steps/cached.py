"""What stored states and measured costs stand in for: adapters that draft without a model, and the
prices of a replay (the reference's cached mode)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xsd import files
from xsd.adapters.base import Adapter
from xsd.bench import costs
from xsd.core import ParameterError
from xsd.decode import rules
from xsd.decode.prices import Prices
from xsd.evaluate import floors, table
from xsd.evaluate.held_out import HeldOut
from xsd.runs import folder


def arms(pairs: HeldOut, adapters: Mapping[str, Adapter], gamma: int) -> dict[str, floors.Floor]:
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
