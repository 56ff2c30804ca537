"""Step 05, the check: the ids of every held-out sample against the verifier's own, not timed and on
several processes if asked."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from xsd import processes
from xsd.core import Sample
from xsd.decode import autoregressive, certificate
from xsd.models.handle import DecoderState, ModelHandle
from xsd.runs import parameters
from xsd.steps import live

LIMITS = (1, 2, 7)
"""Short maximum lengths that the first samples are also checked with."""
FIRST = 2
"""How many samples of a set are the first: they meet every arm and every limit."""
EVERY = 10
"""One sample in so many is also answered by the verifier's one-row loop."""
Job = tuple[str, int, int]
"""A data set, the index of a sample in it, and its turn among those that are checked."""


class _OnePrompt:
    """A handle that runs a sample's prompt once and hands the same cache, rolled back, to every
    request on it (never for timing)."""
    def __init__(self, handle: ModelHandle) -> None:
        self._handle, self._key, self._state = handle, ("", 0), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def prefill(self, sample: Sample, *, layers: Sequence[int] = ()) -> DecoderState:
        key = sample.key, len(sample.event_frames)
        held = getattr(getattr(self._state, "context", None), "layers", None)
        other = layers and held != [*layers]
        if key != self._key or other:
            self._key = key
            self._state = state = self._handle.prefill(sample, reuse_vision=True, layers=layers)
            self._first = state.length, state.hidden, state.logits
        length, self._state.hidden, self._state.logits = self._first
        self._handle.rollback(self._state, length)
        return self._state


def check(opened: live.Bench) -> pd.DataFrame:
    """The ids of ``check_arms`` on every held-out sample (or ``n_checked`` of a set) against the
    verifier's own greedy ids, at the full length and at short limits (docs/lossless.md). Drafts
    behind the prefill are made in turn with it, so that there are ``gamma_prefill`` of them
    whatever the clock says.

    Returns: one row per sample, arm and limit: data, sample, sequence, arm, limit, n_tokens,
    finish, identical, outcome (of certificate.certify), position, margin, n_hidden (drafts made
    behind the prefill), reference_identical (the extracted ids are the one-row loop's, None where
    it was not run).
    """
    given = opened.given
    jobs = [(data, place, turn) for data, some in opened.samples.items()
            for turn, place in enumerate(some.choose(given.n_checked or len(some), given.seed))]
    n = min(given.workers, len(jobs))
    parts = [jobs[len(jobs) * i // n:len(jobs) * (i + 1) // n] for i in range(n)]
    with processes.pool(n - 1) if n > 1 else contextlib.nullcontext() as pool:
        others = [pool.submit(_check_part, given.model_dump(), part) for part in parts[1:]]
        rows = list(_checked(opened, parts[0]))  # this process takes its share
        for other in others:
            rows += other.result()
    return pd.DataFrame(rows)


def _check_part(given: Mapping[str, Any], jobs: Sequence[Job]) -> list[dict[str, Any]]:
    return list(_checked(live.open_bench(parameters.LiveParameters.checked(given)), jobs))


def _checked(opened: live.Bench, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    given = opened.given
    pair = dataclasses.replace(opened.pair, drafter=_OnePrompt(opened.pair.drafter),
                               verifier=_OnePrompt(opened.pair.verifier))
    made = opened.arms(given.check_arms, pair=pair, overlap="serial", hide_prefill=True)
    for data, place, turn in jobs:
        sample = opened.samples[data].load(place)
        reference, agrees = opened.samples[data].reference(place, given.max_new_tokens), None
        if turn % EVERY == 0:  # the loop's own prefill, nothing reused
            loop = autoregressive.generate(opened.pair.verifier, sample, given.max_new_tokens).ids
            agrees, reference = None if reference is None else loop == reference, loop
        elif reference is None:
            reference = autoregressive.generate(pair.verifier, sample, given.max_new_tokens).ids
        in_turn = given.check_in_turns and turn >= FIRST
        for arm in [made[turn % len(made)]] if in_turn else made:
            for limit in (given.max_new_tokens, *(LIMITS if turn < FIRST else ())):
                run = arm.run(sample, limit)
                own = reference[:limit]
                if run.ids != own:
                    # a batched reference may differ from the loop's by a tie: ask the loop itself
                    own = autoregressive.generate(pair.verifier, sample, limit).ids
                verdict = certificate.certify(pair.verifier, sample, own, run.ids)
                hidden = [r.drafted for r in run.rounds if r.phase == "prefill_hiding"]
                yield {
                    "data": data, "sample": sample.key, "sequence": sample.sequence,
                    "arm": arm.name, "limit": limit, "n_tokens": len(run.ids),
                    "finish": run.finish,
                    "identical": verdict.outcome == "identical", "outcome": verdict.outcome,
                    "position": verdict.position, "margin": verdict.margin,
                    "n_hidden": sum(map(len, hidden)), "reference_identical": agrees,
                }


def counts(rows: pd.DataFrame) -> dict[str, Any]:
    """Answers identical of answers checked, by data set and in all; near-ties and divergences; how
    the answers ended; drafts made behind the prefill; extracted answers the one-row loop gave
    again."""
    outcomes, ends = (rows[name].value_counts() for name in ("outcome", "finish"))
    by_data = {str(data): {"n_samples": part["sample"].nunique(), "n_answers": len(part),
                           "n_identical": int(part["identical"].sum())}
               for data, part in rows.groupby("data", sort=False)}
    loops = rows[rows["reference_identical"].notna()].drop_duplicates(["data", "sample"])
    return {
        "arms": list(dict.fromkeys(rows["arm"])), "data": by_data, "n_answers": len(rows),
        "n_identical": int(rows["identical"].sum()),
        "n_near_ties": int(outcomes.get("near-tie", 0)),
        "n_divergences": int(outcomes.get("divergence", 0)),
        "n_ended_by_eos": int(ends.get("eos", 0)),
        "n_ended_by_length": int(ends.get("length", 0)),
        "n_hidden_drafts": int(rows["n_hidden"].sum()), "n_references": len(loops),
        "n_references_identical": int(loops["reference_identical"].astype(bool).sum()),
    }
