"""Schedules without models: walk draft-verify rounds over stored answers, and price them with
measured costs.

``draft(prefix, gamma)`` says what would be drafted after a prefix of the verifier's answer: a
stored table, an n-gram, a trace of a model that ran elsewhere. The walk is the one of
:mod:`xsd.decode.speculative` (same cuts, same bonus), so a replay of a deterministic proposer gives
the rounds of the live run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xsd.core import ParameterError
from xsd.decode.speculative import judge


@dataclass(frozen=True)
class ReplayedRound:
    """n_drafted, n_accepted; bonus: whether the verifier added a token of its own; rows: what it
    had to feed (0: a free check)."""

    n_drafted: int
    n_accepted: int
    bonus: bool
    rows: int
    hiding: bool = False


@dataclass(frozen=True)
class Prices:
    """Seconds, measured (bench.costs). verify: K rows → seconds, interpolated in between. draft_s:
    drafter step + adapter + LM head."""

    verifier_prefill_s: float
    drafter_prefill_s: float
    draft_s: float
    verify: Mapping[int, float]

    def verify_s(self, rows: int) -> float:
        """v(rows), linear between the measured widths and beyond the last two. Raises:
        ParameterError without a measured width."""
        known = sorted(self.verify)
        if not known:
            raise ParameterError(
                "no verification cost was measured; run costs.verification_curve first")
        if rows in self.verify or len(known) == 1:
            return self.verify.get(rows, self.verify[known[0]])
        right = next((i for i, width in enumerate(known) if width > rows), len(known) - 1)
        a, b = known[max(right - 1, 0)], known[max(right, 1)]
        return self.verify[a] + (self.verify[b] - self.verify[a]) * (rows - a) / (b - a)


def replay(
    answer: Sequence[int], draft: Callable[[Sequence[int], int],
                                           Sequence[int]], *, gamma: int, gamma_prefill: int = 0,
    eos_token_ids: frozenset[int] = frozenset(), max_new_tokens: int | None = None,
) -> list[ReplayedRound]:
    """The rounds that ``draft`` would have had on the verifier's ``answer`` (its greedy ids, with
    EOS if it ended by EOS).

    gamma_prefill: drafts made behind the prefill (0: none). max_new_tokens: the limit of the run to
    replay (default: the answer's length).
    Raises: ParameterError for gamma < 1 or an empty answer.
    """
    if gamma < 1 or not answer:
        raise ParameterError(
            f"gamma is {gamma} and the answer has {len(answer)} tokens; replay needs at least one "
            "of each"
        )
    limit = len(answer) if max_new_tokens is None else max_new_tokens
    rounds: list[ReplayedRound] = []
    at = 0
    while at < len(answer):
        hiding = at == 0
        room = min(gamma_prefill if hiding else gamma, limit - at - 1)
        drafts: list[int] = []
        for token in list(draft(answer[:at], room))[:room] if room > 0 else []:
            drafts.append(token)
            if token in eos_token_ids:
                break
        fed = len(drafts) - bool(drafts and drafts[-1] in eos_token_ids)
        rows = (fed if drafts and drafts[0] == answer[0] else 0) if hiding else 1 + fed
        n, bonus = judge(drafts, answer[at:at + fed + 1])
        rounds.append(ReplayedRound(len(drafts), n, bonus is not None, rows, hiding))
        at += n + (bonus is not None)
    return rounds


def predicted_seconds(rounds: Sequence[ReplayedRound], prices: Prices, *,
                      overlapped: bool = True) -> float:
    """End-to-end time of the rounds. overlapped: drafter prefill and first drafts run beside the
    verifier's prefill, the longer counts."""
    total = 0.0
    for each in rounds:
        drafting = each.n_drafted * prices.draft_s
        if each.hiding:
            lane = prices.drafter_prefill_s + drafting
            total += max(prices.verifier_prefill_s,
                         lane) if overlapped else prices.verifier_prefill_s + lane
        else:
            total += drafting
        total += prices.verify_s(each.rows) if each.rows else 0.0
    return total
