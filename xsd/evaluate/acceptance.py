"""One schema for acceptance, its identities, and the conventions of others (docs/metrics.md,
sections 4 and 5).

A *round* drafts up to gamma tokens; the verifier accepts the longest correct prefix and adds one
token of its own, the *bonus*::

    answer   a b c d e f g h          round 1 drafts a b x · ·  → accepted 2, bonus c
             └─┬─┘ ↑bonus             round 2 drafts d e f g h  → accepted 5, no bonus: the answer ended inside the draft
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xsd.core import MetricError, Round
from xsd.evaluate import checks

_CLOSE = {"rel_tol": 1e-9, "abs_tol": 1e-12}


@dataclass(frozen=True)
class Rounds:
    """Flat record of draft–verify rounds. accepted, drafted, bonus (0 or 1), request (0 …
    n_requests-1): int64 [R] each."""

    accepted: np.ndarray
    drafted: np.ndarray
    bonus: np.ndarray
    request: np.ndarray
    n_requests: int
    gamma: int

    def per_request(self) -> dict[str, np.ndarray]:
        """accepted, drafted, bonus, rounds: int64 [n_requests]; what the paired, clustered
        bootstrap resamples."""
        out = {
            name: np.bincount(self.request, weights=getattr(self, name),
                              minlength=self.n_requests).astype(np.int64)
            for name in ("accepted", "drafted", "bonus")
        }
        out["rounds"] = np.bincount(self.request, minlength=self.n_requests)
        return out


def rounds_from_matches(match: Tensor, mask: Tensor, gamma: int) -> Rounds:
    """Replay draft–verify rounds from teacher-forced one-step matches: every round starts after the
    last bonus and drafts gamma tokens.

    accepted = run of matches from the round's start, at most gamma; the next round starts after the
    bonus. Positions beyond the answer are not drafted, and a round that reaches the end of the
    answer has no bonus. It is what drafting would give if a drafter's own earlier drafts, all
    accepted, are the verifier's tokens (true inside the accepted run), so it is exact for drafters
    that condition on tokens alone and optimistic for drafters that feed on their own states (see
    docs/teacher_forcing.md).

    Args: match: bool [B, S], mask: bool [B, S] right-padded. Raises: MetricError for other shapes,
    empty rows, gamma below 1.
    """
    _check_gamma(gamma)
    checks.same_shape(match, mask, "match", "mask")
    lengths = checks.mask_lengths(mask).cpu().numpy()
    hit = (match.bool() & mask).cpu().numpy()
    n, width = hit.shape
    run = np.zeros((n, width + 1),
                   dtype=np.int64)  # run[b, t]: matches in a row from t on, at most gamma
    for t in range(width - 1, -1, -1):
        run[:, t] = np.where(hit[:, t], np.minimum(run[:, t + 1] + 1, gamma), 0)
    start, pieces = np.zeros(n, dtype=np.int64), []
    while (alive := np.flatnonzero(start < lengths)).size:
        at = start[alive]
        accepted = run[alive, at]
        bonus = (at + accepted < lengths[alive]).astype(np.int64)
        pieces.append(np.stack([accepted, np.minimum(gamma, lengths[alive] - at), bonus, alive]))
        start[alive] = at + accepted + bonus
    accepted, drafted, bonus, request = np.concatenate(pieces, axis=1)
    order = np.argsort(request, kind="stable")
    return Rounds(accepted[order], drafted[order], bonus[order], request[order], n, gamma)


def rounds_from_lists(matches: Iterable[Sequence[bool]], gamma: int) -> Rounds:
    """rounds_from_matches for answers of different lengths given as lists."""
    rows = [torch.as_tensor(np.asarray(line, dtype=bool)) for line in matches]
    if not rows:
        raise MetricError(
            "there is no answer to replay; check that the evaluation set is not empty")
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(line), dtype=torch.bool) for line in rows], batch_first=True)
    return rounds_from_matches(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask, gamma)


def rounds_from_requests(requests: Iterable[Sequence[Round]], gamma: int | None = None, *,
                         phase: str | None = None) -> Rounds:
    """The rounds of live generations (core.Generation.rounds), one sequence a request.

    phase: "prefill_hiding" or "decode" alone; None takes both. The hidden draft is longer than a
    decode round's, so gamma defaults to the
    longest draft. Raises: MetricError when a round drafted over gamma, or none is left.
    """
    requests = [[r for r in rounds if phase in (None, r.phase)] for rounds in requests]
    flat = [(r.n_accepted, len(r.drafted), int(r.bonus is not None), i)
            for i, rounds in enumerate(requests) for r in rounds]
    if not flat:
        raise MetricError(
            "no round was recorded; acceptance has a meaning only for generations that drafted")
    accepted, drafted, bonus, request = np.asarray(flat, dtype=np.int64).T
    gamma = max(1, int(drafted.max())) if gamma is None else gamma
    _check_gamma(gamma)
    if drafted.max() > gamma:
        raise MetricError(
            f"a round drafted {drafted.max()} tokens but gamma is {gamma}; pass the longest draft "
            "as gamma, or one phase alone"
        )
    return Rounds(accepted, drafted, bonus, request, len(requests), gamma)


@dataclass(frozen=True)
class Acceptance:
    """How many draft tokens were accepted, in the one form everything else is converted from; the
    identities are checked when it is made.

    histogram[k]: rounds that accepted exactly k tokens, k = 0 … gamma.
    reached[i], drafted_at[i]: rounds whose first i tokens were all accepted, and those of them that
    drafted token i at all. marginal[i] = P(accepted > i): share of *all* rounds (survival).
    conditional[i] = P(token i accepted | tokens before it accepted, drafted); None where no round
    came that far.
    per step: every round weighs the same. per request: the mean over requests of the request's own
    mean.
    """

    gamma: int
    n_rounds: int
    n_requests: int
    n_drafted: int
    n_accepted: int
    n_bonus: int
    histogram: tuple[int, ...]
    drafted_at: tuple[int, ...]
    marginal: tuple[float, ...]
    conditional: tuple[float | None, ...]
    mean_accepted: float
    mean_accepted_with_bonus: float
    mean_accepted_per_request: float
    mean_accepted_with_bonus_per_request: float
    acceptance_rate: float
    acceptance_rate_per_request: float
    request_histogram: tuple[int, ...]
    """Requests by their mean accepted length, rounded down: [k, k+1) for k = 0 … gamma."""
    @classmethod
    def of(cls, rounds: Rounds) -> Acceptance:
        """From rounds. Raises: MetricError when a round accepted more than it drafted, or an
        identity fails."""
        if len(rounds.accepted) == 0:
            raise MetricError("acceptance needs at least one round")
        bad = np.flatnonzero((rounds.accepted > rounds.drafted) | (rounds.accepted < 0)
                             | (rounds.drafted > rounds.gamma))
        if bad.size:
            i = int(bad[0])
            raise MetricError(
                f"round {i} accepted {rounds.accepted[i]} of {rounds.drafted[i]} drafted tokens at "
                f"gamma {rounds.gamma}; "
                "a round accepts between none and all of its draft")
        histogram = np.bincount(rounds.accepted, minlength=rounds.gamma + 1)
        survived = histogram[::-1].cumsum()[::-1]  # survived[k]: rounds with accepted >= k
        drafted_at = [
            int(((rounds.accepted >= i) & (rounds.drafted > i)).sum()) for i in range(rounds.gamma)
        ]
        each = rounds.per_request()
        active = each["rounds"] > 0
        mean = each["accepted"][active] / each["rounds"][active]
        mean_with = (each["accepted"] + each["bonus"])[active] / each["rounds"][active]
        drafting = each["drafted"] > 0
        n_rounds = len(rounds.accepted)
        return cls(
            gamma=rounds.gamma, n_rounds=n_rounds, n_requests=int(active.sum()),
            n_drafted=int(rounds.drafted.sum()), n_accepted=int(rounds.accepted.sum()), n_bonus=int(
                rounds.bonus.sum()), histogram=tuple(map(int,
                                                         histogram)), drafted_at=tuple(drafted_at),
            marginal=tuple(float(count) / n_rounds for count in survived[1:]), conditional=tuple(
                float(survived[i + 1]) / drafted_at[i] if drafted_at[i] else None
                for i in range(rounds.gamma)),
            mean_accepted=float(rounds.accepted.sum()) / n_rounds,
            mean_accepted_with_bonus=float(rounds.accepted.sum() + rounds.bonus.sum()) / n_rounds,
            mean_accepted_per_request=float(mean.mean()),
            mean_accepted_with_bonus_per_request=float(mean_with.mean()), acceptance_rate=_share(
                int(rounds.accepted.sum()),
                int(rounds.drafted.sum())), acceptance_rate_per_request=float(
                    (each["accepted"][drafting] /
                     each["drafted"][drafting]).mean()) if drafting.any() else 0.0,
            request_histogram=tuple(
                map(int, np.bincount(np.floor(mean).astype(np.int64), minlength=rounds.gamma + 1))),
        )

    def __post_init__(self) -> None:
        identities = {
            "Σ histogram = rounds": sum(self.histogram) == self.n_rounds,
            "Σ k·histogram[k] = accepted": sum(k * count for k, count in enumerate(self.histogram))
                                           == self.n_accepted,
            "mean accepted length = Σ marginal": math.isclose(self.mean_accepted,
                                                              math.fsum(self.marginal), **_CLOSE),
            "mean accepted length = accepted / rounds": math.isclose(
                self.mean_accepted, self.n_accepted / self.n_rounds,
                **_CLOSE), "mean with bonus = (accepted + bonus) / rounds": math.isclose(
                    self.mean_accepted_with_bonus, (self.n_accepted + self.n_bonus) / self.n_rounds,
                    **_CLOSE), "marginal never rises": all(
                        a >= b for a, b in zip(self.marginal, self.marginal[1:], strict=False)),
            "conditional·drafted_at = marginal·rounds": all(
                rate is None or math.isclose(rate * at, share * self.n_rounds, **_CLOSE)
                for rate, at, share in zip(self.conditional, self.drafted_at, self.marginal,
                                           strict=True)),
            "acceptance rate = accepted / drafted": math.isclose(
                self.acceptance_rate, _share(self.n_accepted, self.n_drafted),
                **_CLOSE), "at most one bonus a round": 0 <= self.n_bonus <= self.n_rounds,
            "Σ request histogram = requests": sum(self.request_histogram) == self.n_requests,
        }
        broken = [name for name, holds in identities.items() if not holds]
        if broken:
            raise MetricError(
                f"these acceptance figures contradict each other ({broken[0]} does not hold); "
                "recompute them from the rounds"
            )

    def convention(self, system: str) -> dict[str, float | tuple[float | None, ...]]:
        """The same rounds in another system's words: "eagle", "vispec", "vllm", "sglang" (formulas:
        docs/metrics.md, section 5).

        Raises: MetricError for an unknown system.
        """
        forms: dict[str, dict[str, float | tuple[float | None, ...]]] = {
            "eagle": {"tau": self.mean_accepted_with_bonus, "n_alpha": self.conditional},
            "vispec": {"tau": self.mean_accepted}, "vllm": {
                "mean_acceptance_length": 1 + self.n_accepted / self.n_rounds,
                "draft_acceptance_rate": self.acceptance_rate,
                "per_position_acceptance_rate": self.marginal,
            }, "sglang": {
                "accept_length": self.mean_accepted_with_bonus, "accept_rate": self.acceptance_rate
            },
        }
        if system.lower() not in forms:
            raise MetricError(f"unknown convention {system!r}; choose among {', '.join(forms)}")
        return forms[system.lower()]


def _share(part: int, whole: int) -> float:
    """0 when nothing was drafted: a drafter that never proposes accepts nothing."""
    return part / whole if whole else 0.0


def _check_gamma(gamma: int) -> None:
    if gamma < 1:
        raise MetricError(f"gamma must be at least 1 draft token a round but is {gamma}")
