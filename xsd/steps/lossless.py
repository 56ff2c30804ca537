"""Step 05, the check: the ids of every held-out sample against the verifier's own, off the clock
and on several processes if asked."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pandas as pd

from xsd.core import Sample
from xsd.decode import autoregressive, certificate
from xsd.models.handle import DecoderState, ModelHandle
from xsd.runs import parameters
from xsd.steps import live

LIMITS = (1, 2, 7)
"""Short maximum lengths that the first samples are also checked with."""
EVERY = 10
"""One sample in so many is also answered by the verifier's one-row loop."""


class _OnePrompt:
    """A handle that runs a sample's prompt once and hands the same cache, rolled back, to every
    request on it (never for timing)."""
    def __init__(self, handle: ModelHandle) -> None:
        self._handle, self._key = handle, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def prefill(self, sample: Sample) -> DecoderState:
        if sample.key != self._key:
            state = self._handle.prefill(sample, reuse_vision=True)
            self._key, self._state, self._first = sample.key, state, (state.length, state.hidden,
                                                                      state.logits)
        length, self._state.hidden, self._state.logits = self._first
        self._handle.rollback(self._state, length)
        return self._state


def check(bench_: live.Bench, *, progress: Callable[[int], None] | None = None) -> pd.DataFrame:
    """The ids of ``check_arms`` on every held-out sample against the verifier's own greedy ids, at
    the full length and at short limits.

    With ``check_in_turns`` the arms take turns, one a sample (all of them on the first two).
    Drafts behind the prefill are made in turn with it, so that there are ``gamma_prefill`` of them
    whatever the clock says. The verifier's ids are those that were extracted in batches; every
    tenth sample is also answered by the one-row loop, which is then what counts.

    Returns: data, sample, sequence, arm, limit, n_tokens, finish, identical, outcome ("identical" |
    "near-tie" | "divergence"), position,
    margin, n_hidden (drafts made behind the prefill), reference_identical (the extracted ids are
    the one-row loop's, None where it was not run); one row a sample, arm and limit. Where ids
    differ, the verifier's loop is run for this sample alone and a certificate decides.
    """
    given = bench_.given
    jobs = [(data, place) for data, some in bench_.samples.items() for place in range(len(some))]
    n = min(given.workers, len(jobs))
    if n <= 1:
        rows = list(_counted(_checked(bench_, jobs), progress))
    else:
        parts = [jobs[len(jobs) * i // n:len(jobs) * (i + 1) // n] for i in range(n)]
        with ProcessPoolExecutor(n - 1, mp_context=multiprocessing.get_context("spawn")) as pool:
            others = [pool.submit(_check_part, given.model_dump(), part) for part in parts[1:]]
            rows = list(_counted(_checked(bench_, parts[0]),
                                 progress))  # this process takes its share
            for other in others:
                rows += _counted(other.result(), progress)
    return pd.DataFrame(rows)


def _counted(rows: Any, progress: Callable[[int], None] | None) -> Iterator[dict[str, Any]]:
    for row in rows:
        if progress is not None:
            progress(1)
        yield row


def _check_part(given: Mapping[str, Any], jobs: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    return list(_checked(live.open_bench(parameters.LiveParameters.checked(given)), jobs))


def _checked(bench_: live.Bench, jobs: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    given = bench_.given
    pair = dataclasses.replace(bench_.pair, drafter=_OnePrompt(bench_.pair.drafter),
                               verifier=_OnePrompt(bench_.pair.verifier))
    made = live.build(bench_, given.check_arms, pair=pair, overlap="serial")
    eos = pair.verifier.eos_token_ids
    for data, place in jobs:
        one = bench_.samples[data][place]
        sample, reference = one.load(), one.reference
        agrees = None
        if place % EVERY == 0:
            loop = autoregressive.generate(
                bench_.pair.verifier, sample,
                given.max_new_tokens).ids  # its own prefill, nothing reused
            agrees, reference = None if reference is None else loop == reference, loop
        if reference is None:
            reference = autoregressive.generate(pair.verifier, sample, given.max_new_tokens).ids
        turn = [made[place % len(made)]
                ] if given.check_in_turns and place >= 2 else made  # the first two meet every arm
        for arm in turn:
            for limit in (given.max_new_tokens, *(LIMITS if place < 2 else ())):
                run = arm.run(sample, limit)
                got, own = run.ids, reference[:limit]
                # a batched reference may differ from the loop's by a tie: ask the loop itself
                if got != own:
                    own = autoregressive.generate(pair.verifier, sample, limit).ids
                verdict = certificate.certify(pair.verifier, sample, own, got)
                yield {
                    "data": data, "sample": one.key, "sequence": one.sequence, "arm": arm.name,
                    "limit": limit, "n_tokens": len(got),
                    "finish": "eos" if got[-1] in eos else "length",
                    "identical": verdict.outcome == "identical", "outcome": verdict.outcome,
                    "position": verdict.position, "margin": verdict.margin, "n_hidden": sum(
                        len(r.drafted) for r in run.rounds
                        if r.phase == "prefill_hiding"), "reference_identical": agrees,
                }


def counts(rows: pd.DataFrame) -> dict[str, Any]:
    """Answers identical of answers checked, by data set and in all; near-ties and divergences; how
    the answers ended; drafts that were made behind the prefill; extracted answers that the one-row
    loop gave again.
    """
    by_data = {
        str(data): {
            "n_samples": part["sample"].nunique(), "n_answers": len(part),
            "n_identical": int(part["identical"].sum())
        } for data, part in rows.groupby("data", sort=False)
    }
    loops = rows[rows["reference_identical"].notna()].drop_duplicates(["data", "sample"])
    return {
        "arms": list(dict.fromkeys(rows["arm"])), "data": by_data, "n_answers": len(rows),
        "n_identical": int(rows["identical"].sum()), "n_near_ties": int(
            (rows["outcome"] == "near-tie").sum()), "n_divergences": int(
                (rows["outcome"] == "divergence").sum()), "n_ended_by_eos": int(
                    (rows["finish"] == "eos").sum()), "n_ended_by_length": int(
                        (rows["finish"] == "length").sum()),
        "n_hidden_drafts": int(rows["n_hidden"].sum()), "n_references": len(loops),
        "n_references_identical": int(loops["reference_identical"].astype(bool).sum()),
    }
