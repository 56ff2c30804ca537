"""Draft–verify rounds: the one walk that every figure of accepted drafts goes through, and the one
form in which they are counted (docs/metrics.md, sections 4 and 5, with a drawn example).

What a round accepts depends on where it begins, so a drafter is described by its *runs*: run[s] is
how many drafts a round accepts whose first draft stands at position s. For a drafter of tokens they
follow from its one-step matches (:func:`runs_of`); a head that feeds on its own states gives them
by self-rollout (xsd/evaluate/drafting.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xsd.core import MetricError, Round


@dataclass(frozen=True)
class Rounds:
    """Flat record of rounds, answer by answer. accepted, drafted, bonus (0 or 1), request (0 …
    n_requests - 1): int64 [R] each."""

    accepted: np.ndarray
    drafted: np.ndarray
    bonus: np.ndarray
    request: np.ndarray
    n_requests: int
    gamma: int

    def per_request(self) -> dict[str, np.ndarray]:
        """accepted, drafted, bonus, rounds: int64 [n_requests]; what the paired, clustered
        bootstrap resamples."""
        each = {"accepted": self.accepted, "drafted": self.drafted, "bonus": self.bonus,
                "rounds": np.ones_like(self.request)}
        return {name: np.bincount(self.request, weights, self.n_requests).astype(np.int64)
                for name, weights in each.items()}


def walk(runs: Any, lengths: Any, gamma: int, *, first: Any = None,
         n_first: int | None = None) -> Rounds:
    """The rounds that a greedy loop visits, each beginning after the bonus of the one before.

    Positions beyond the answer are not drafted; a round that reaches the answer's end has no bonus.

    Args: runs: int [N, S], drafts accepted by a round whose first draft is position s (at most
        gamma). lengths: int [N], positions to draft of each answer; one without any has no round.
        first, n_first: an opening round that drafts n_first tokens and accepts first [N] of them,
        where another drafter makes it (behind the verifier's prefill).
    Raises: MetricError for shapes that do not fit, no answer, no position at all, runs longer than
        the draft or the answer, gamma or n_first below 1.
    """
    runs, lengths = np.asarray(runs, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    opening = gamma if first is None else n_first
    if gamma < 1 or not opening or opening < 1:
        raise MetricError(f"a round drafts at least 1 token, but gamma is {gamma}" +
                          ("" if first is None else f" and the first round's is {n_first}"))
    if runs.ndim != 2 or runs.shape[0] != len(lengths) or runs.shape[1] < lengths.max(initial=0):
        raise MetricError(
            f"runs of shape {list(runs.shape)} do not fit {list(lengths.shape)} answers of up to "
            f"{lengths.max(initial=0)} tokens; give one row of runs for each answer")
    if not lengths.any():
        raise MetricError("no answer has a position to draft, so there is no round; check that "
                          "the evaluation set is not empty")
    if runs.max(initial=0) > gamma or (first is not None and
                                       (np.asarray(first) > np.minimum(opening, lengths)).any()):
        raise MetricError("a run is longer than its draft, or its answer; a round accepts at most "
                          "the gamma tokens it drafts")
    alive = np.flatnonzero(lengths)
    at, pieces = np.zeros(len(alive), dtype=np.int64), []
    while alive.size:
        left = lengths[alive] - at
        opens = first is not None and not pieces
        found = np.asarray(first, dtype=np.int64)[alive] if opens else runs[alive, at]
        accepted = np.minimum(found, left)
        drafted = np.minimum(opening if opens else gamma, left)
        bonus = (accepted < left).astype(np.int64)
        pieces.append(np.stack([accepted, drafted, bonus, alive]))
        at = at + accepted + bonus
        alive, at = alive[at < lengths[alive]], at[at < lengths[alive]]
    accepted, drafted, bonus, request = np.concatenate(pieces, axis=1)
    order = np.argsort(request, kind="stable")
    return Rounds(accepted[order], drafted[order], bonus[order], request[order], len(lengths),
                  max(gamma, opening))


def runs_of(match: Any, gamma: int) -> np.ndarray:
    """Matches in a row from every position on, at most gamma: bool [N, S] → int64 [N, S]. Padding
    is False.

    >>> runs_of([[True, True, False, True]], 5).tolist()
    [[2, 1, 0, 1]]
    """
    match = np.asarray(match, dtype=bool)
    run = np.zeros((len(match), match.shape[1] + 1), dtype=np.int64)
    for t in range(match.shape[1] - 1, -1, -1):
        run[:, t] = np.where(match[:, t], np.minimum(run[:, t + 1] + 1, gamma), 0)
    return run[:, :-1]


def from_matches(matches: Iterable[Sequence[bool]], gamma: int) -> Rounds:
    """The rounds of a drafter of tokens, from its one-step matches: bool [n] for each answer; for
    one that feeds on its own states they are optimistic (docs/teacher_forcing.md). Raises:
    MetricError without answers, and as :func:`walk`."""
    padded, lengths = pad(matches)
    return walk(runs_of(padded, gamma), lengths, gamma)


def pad(matches: Iterable[Sequence[bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Matches of answers of different lengths as one array: (bool [N, S], lengths int64 [N])."""
    rows = [np.asarray(line, dtype=bool) for line in matches]
    lengths = np.array([len(line) for line in rows], dtype=np.int64)
    out = np.zeros((len(rows), lengths.max(initial=0)), dtype=bool)
    out[np.arange(out.shape[1]) < lengths[:, None]] = np.concatenate([[], *rows])
    return out, lengths


def from_requests(requests: Iterable[Sequence[Round]], gamma: int | None = None, *,
                  phase: str | None = None) -> Rounds:
    """The rounds of live generations (core.Generation.rounds) that drafted something, one sequence
    for each request. phase: "prefill_hiding" or "decode" alone. gamma: default the longest draft.
    Raises: MetricError when a round drafted over gamma, or none is left."""
    requests = [[r for r in rounds if r.drafted and phase in (None, r.phase)]
                for rounds in requests]
    flat = [(r.n_accepted, r.depth, int(r.bonus is not None), i)
            for i, rounds in enumerate(requests) for r in rounds]
    if not flat:
        raise MetricError(
            "no round was recorded; acceptance has a meaning only for generations that drafted")
    accepted, drafted, bonus, request = np.asarray(flat, dtype=np.int64).T
    gamma = int(drafted.max()) if gamma is None else gamma
    if drafted.max() > gamma or gamma < 1:
        raise MetricError(
            f"a round drafted {drafted.max()} tokens but gamma is {gamma}; pass the longest draft "
            "as gamma, or one phase alone")
    return Rounds(accepted, drafted, bonus, request, len(requests), gamma)


@dataclass(frozen=True)
class Acceptance:
    """How many draft tokens were accepted, in the one form everything else is converted from: the
    counts of some rounds; every figure follows from them, so none can contradict another.

    histogram[k]: rounds that accepted exactly k tokens, k = 0 … gamma. drafted_at[i]: rounds that
    accepted their first i tokens and drafted another. survived[k]: rounds that accepted k or more;
    marginal[i] = P(accepted > i) over *all* rounds; conditional[i] = P(token i accepted | tokens
    before it accepted, drafted), None where no round came that far. mean_accepted weighs every
    round alike, ``…_per_request`` is the mean over requests of the request's own mean;
    request_histogram: requests by that mean, rounded down.
    """

    n_drafted: int
    n_bonus: int
    histogram: tuple[int, ...]
    drafted_at: tuple[int, ...]
    mean_accepted_per_request: float
    mean_accepted_with_bonus_per_request: float
    acceptance_rate_per_request: float
    request_histogram: tuple[int, ...]

    @classmethod
    def of(cls, rounds: Rounds) -> Acceptance:
        """From rounds. Raises: MetricError when there is none, or one accepted more than it
        drafted."""
        gamma, accepted, drafted = rounds.gamma, rounds.accepted, rounds.drafted
        if not len(accepted):
            raise MetricError("acceptance needs at least one round")
        bad = np.flatnonzero((accepted > drafted) | (accepted < 0) | (drafted > gamma))
        if bad.size:
            raise MetricError(
                f"round {bad[0]} accepted {accepted[bad[0]]} of {drafted[bad[0]]} drafted tokens "
                f"at gamma {gamma}; a round accepts between none and all of its draft")
        each = rounds.per_request()
        active, drafting = each["rounds"] > 0, each["drafted"] > 0
        mean = each["accepted"][active] / each["rounds"][active]
        with_bonus = (each["accepted"] + each["bonus"])[active] / each["rounds"][active]
        rates = each["accepted"][drafting] / each["drafted"][drafting]
        by_mean = np.bincount(mean.astype(np.int64), minlength=gamma + 1)
        return cls(
            int(drafted.sum()), int(rounds.bonus.sum()),
            histogram=tuple(np.bincount(accepted, minlength=gamma + 1).tolist()),
            drafted_at=tuple(int(((accepted >= i) & (drafted > i)).sum()) for i in range(gamma)),
            mean_accepted_per_request=float(mean.mean()),
            mean_accepted_with_bonus_per_request=float(with_bonus.mean()),
            acceptance_rate_per_request=float(rates.mean()) if len(rates) else 0.0,
            request_histogram=tuple(by_mean.tolist()),
        )

    def __post_init__(self) -> None:
        between = zip(self.survived, self.drafted_at, self.survived[1:], strict=False)
        if not (0 <= self.n_bonus <= self.n_rounds and
                self.n_accepted <= self.n_drafted <= self.gamma * self.n_rounds and
                all(before >= at >= after for before, at, after in between)):
            raise MetricError("these acceptance figures contradict each other; recompute them from "
                              "the rounds")

    @property
    def gamma(self) -> int:
        return len(self.histogram) - 1

    @property
    def n_rounds(self) -> int:
        return sum(self.histogram)

    @property
    def n_requests(self) -> int:
        return sum(self.request_histogram)

    @property
    def n_accepted(self) -> int:
        return sum(k * count for k, count in enumerate(self.histogram))

    @property
    def survived(self) -> list[int]:
        return np.cumsum(self.histogram[::-1])[::-1].tolist()

    @property
    def marginal(self) -> tuple[float, ...]:
        return tuple(count / self.n_rounds for count in self.survived[1:])

    @property
    def conditional(self) -> tuple[float | None, ...]:
        return tuple(after / at if at else None
                     for after, at in zip(self.survived[1:], self.drafted_at, strict=True))

    @property
    def mean_accepted(self) -> float:
        return self.n_accepted / self.n_rounds

    @property
    def mean_accepted_with_bonus(self) -> float:
        return (self.n_accepted + self.n_bonus) / self.n_rounds

    @property
    def acceptance_rate(self) -> float:
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    def convention(self, system: str) -> dict[str, float | tuple[float | None, ...]]:
        """The same rounds in another system's words: "eagle", "vispec", "vllm", "sglang" (formulas:
        docs/metrics.md, section 5). Raises: MetricError for an unknown system."""
        rate, with_bonus = self.acceptance_rate, self.mean_accepted_with_bonus
        forms: dict[str, dict[str, float | tuple[float | None, ...]]] = {
            "eagle": {"tau": with_bonus, "n_alpha": self.conditional},
            "vispec": {"tau": self.mean_accepted},
            "vllm": {"mean_acceptance_length": 1 + self.mean_accepted,
                     "draft_acceptance_rate": rate,
                     "per_position_acceptance_rate": self.marginal},
            "sglang": {"accept_length": with_bonus, "accept_rate": rate},
        }
        if system.lower() not in forms:
            raise MetricError(f"unknown convention {system!r}; choose among {', '.join(forms)}")
        return forms[system.lower()]
