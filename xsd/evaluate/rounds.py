"""Draft–verify rounds: the one walk that every figure of accepted drafts goes through, and the one
form in which they are counted (docs/metrics.md, sections 4 and 5, with a drawn example).

What a round accepts depends on where it begins, so a drafter is described by its *runs*: run[s] is
how many drafts a round accepts whose first draft stands at position s. For a drafter of tokens they
follow from its one-step matches (:func:`runs_of`); a head that feeds on its own states gives them
by self-rollout (xsd/evaluate/drafting.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xsd.core import MetricError, Round


@dataclass(frozen=True)
class Rounds:
    """Flat record of rounds, answer by answer, and every figure of them. accepted, drafted, bonus
    (0 or 1), request (0 … n_requests - 1): int64 [R] each. Raises: MetricError where a round
    accepted more than it drafted, or drafted more than gamma."""

    accepted: np.ndarray
    drafted: np.ndarray
    bonus: np.ndarray
    request: np.ndarray
    n_requests: int
    gamma: int

    def __post_init__(self) -> None:
        accepted, drafted = self.accepted, self.drafted
        bad = np.flatnonzero((accepted > drafted) | (accepted < 0) | (drafted > self.gamma))
        if bad.size:
            raise MetricError(
                f"round {bad[0]} accepted {accepted[bad[0]]} of {drafted[bad[0]]} drafted tokens "
                f"at gamma {self.gamma}; a round accepts between none and all of its draft")

    def per_request(self) -> dict[str, np.ndarray]:
        """accepted, drafted, bonus, rounds: int64 [n_requests]; what the paired, clustered
        bootstrap resamples."""
        each = {"accepted": self.accepted, "drafted": self.drafted, "bonus": self.bonus,
                "rounds": np.ones_like(self.request)}
        return {name: np.bincount(self.request, weights, self.n_requests).astype(np.int64)
                for name, weights in each.items()}

    @property
    def histogram(self) -> tuple[int, ...]:
        """Rounds that accepted exactly k tokens, k = 0 … gamma."""
        return tuple(np.bincount(self.accepted, minlength=self.gamma + 1).tolist())

    @property
    def marginal(self) -> tuple[float, ...]:
        """P(accepted > i) over *all* rounds, i = 0 … gamma - 1."""
        return tuple(float((self.accepted > i).mean()) for i in range(self.gamma))

    @property
    def conditional(self) -> tuple[float | None, ...]:
        """P(token i accepted | tokens before it accepted, drafted); None where no round came that
        far."""
        there = [(self.accepted >= i) & (self.drafted > i) for i in range(self.gamma)]
        return tuple(float((self.accepted[at] > i).mean()) if at.any() else None
                     for i, at in enumerate(there))

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts per round, every round weighing alike."""
        return float(self.accepted.mean())

    @property
    def mean_accepted_with_bonus(self) -> float:
        return float((self.accepted + self.bonus).mean())

    @property
    def acceptance_rate(self) -> float:
        """Accepted of all drafted tokens."""
        return float(self.accepted.sum() / max(1, self.drafted.sum()))

    def by_request(self) -> dict[str, np.ndarray]:
        """mean_accepted, mean_accepted_with_bonus and acceptance_rate of each request that has a
        round, float [n]; their means weigh every request alike."""
        each = self.per_request()
        accepted, drafted, bonus, n = (each[name][each["rounds"] > 0] for name in (
            "accepted", "drafted", "bonus", "rounds"))
        return {"mean_accepted": accepted / n, "mean_accepted_with_bonus": (accepted + bonus) / n,
                "acceptance_rate": accepted / np.maximum(1, drafted)}

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
