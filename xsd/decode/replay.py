"""Schedules without models: rounds over stored answers, priced with measured costs. The walk is
:mod:`xsd.decode.speculative`'s, so a deterministic proposer has the rounds of the live run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xsd.core import ParameterError
from xsd.decode import acceptance, speculative
from xsd.decode.prices import Prices

Draft = Callable[[Sequence[int], int], Sequence[int]]


@dataclass(frozen=True)
class ReplayedRound:
    """bonus: whether the verifier added a token of its own. rows: of its pass (0: a free check)."""

    n_drafted: int
    n_accepted: int
    bonus: bool
    rows: int
    hiding: bool = False


def replay(answer: Sequence[int], draft: Draft, *, gamma: int, gamma_prefill: int = 0,
           eos_token_ids: frozenset[int] = frozenset(), max_new_tokens: int | None = None,
           ) -> list[ReplayedRound]:
    """The rounds that ``draft(prefix, gamma) -> ids`` would have had on the verifier's ``answer``.
    gamma_prefill: drafts behind the prefill. max_new_tokens: of the run to replay (default: the
    answer's length). Raises: ParameterError for gamma < 1, an empty answer."""
    if gamma < 1 or not answer:
        raise ParameterError(
            f"gamma is {gamma} and the answer has {len(answer)} tokens; replay needs at least one "
            "of each")
    limit = len(answer) if max_new_tokens is None else max_new_tokens
    rounds: list[ReplayedRound] = []
    at = 0
    while at < len(answer):
        hiding = at == 0
        room = min(gamma_prefill if hiding else gamma, limit - at - 1)
        offered = draft(answer[:at], room) if room > 0 else []
        drafts = speculative.cut(offered, room, eos_token_ids)
        fed = speculative.worth_feeding(drafts, eos_token_ids)
        n, bonus = acceptance.judge(drafts, answer[at:at + len(fed) + 1])
        rows, _ = speculative.rows_to_feed(drafts, answer[max(at - 1, 0)], eos_token_ids, hiding)
        rounds.append(ReplayedRound(len(drafts), n, bonus is not None, len(rows), hiding))
        at += n + (bonus is not None)
    return rounds


def predicted_seconds(rounds: Sequence[ReplayedRound], prices: Prices) -> float:
    """End-to-end time of the rounds of one request at these prices."""
    total = 0.0
    for each in rounds:
        drafting = each.n_drafted * prices.draft_s + (prices.round_s if each.n_drafted else 0.0)
        if each.hiding:
            total += prices.contended_prefill_s + prices.exposed_s(drafting)
        else:
            total += drafting
        total += prices.verify_s(each.rows) if each.rows else 0.0
    return total
