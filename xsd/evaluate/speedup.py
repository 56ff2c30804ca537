"""Speed-up models: the reference's formulas, and ours from token survival and measured costs
(docs/metrics.md, section 10). Everything here is a *prediction*, to stand beside a measurement: the
reference's own projection (5.77×) was five times what its clock then showed (1.03×), because
verification was taken to be free and a cosine to be a token."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from xsd.core import MetricError, ParameterError
from xsd.decode.prices import Prices

# --- the reference's formulas ---


def expected_tokens(alpha: float, gamma: int) -> float:
    """(1 − α^(γ+1)) / (1 − α): tokens a round with bonus when every draft is accepted with
    probability α independently (Leviathan 2023, eq. 1)."""
    _check_share(alpha, "alpha")
    return float(gamma + 1) if alpha == 1 else (1 - alpha**(gamma + 1)) / (1 - alpha)


def round_speedup(alpha: float, gamma: int, overhead: float = 0.1) -> float:
    """expected_tokens / (1 + overhead)."""
    return expected_tokens(alpha, gamma) / (1 + overhead)


def relaxed_speedup(alpha: float, gamma: int, overhead: float = 0.1) -> float:
    """γ·α / (1 + overhead): the reference's relaxed form, which counts accepted tokens wherever
    they stand."""
    _check_share(alpha, "alpha")
    return gamma * alpha / (1 + overhead)


def break_even(target: float, gamma: int, overhead: float = 0.1) -> float:
    """The α at which relaxed_speedup reaches ``target``: target·(1 + overhead) / γ."""
    return target * (1 + overhead) / gamma


def break_even_table(gammas: Sequence[int] = (5, 8, 10), targets: Sequence[float] = (1.0, 1.5, 2.0),
                     overhead: float = 0.1) -> list[dict[str, Any]]:
    """Rows gamma, target, alpha_percent (whole, halves up): the reference's break-even table."""
    return [{"gamma": gamma, "target": target,
             "alpha_percent": int(100 * break_even(target, gamma, overhead) + 0.5 + 1e-9)}
            for gamma in gammas for target in targets]


def wall_clock_table(timing: Timing, shares: Sequence[float] = (0.21, 0.5, 0.7,
                                                                1.0)) -> list[dict[str, Any]]:
    """Rows accepted, speedup: reference_wall_clock at these shares of the hidden drafts."""
    return [{"accepted": share, "speedup": reference_wall_clock(share, timing)} for share in shares]


def expected_table(alpha: float, timing: Timing) -> list[dict[str, Any]]:
    """Rows gamma, alpha, tokens (a round, with bonus), speedup (unbroken drafts), relaxed."""
    return [{"gamma": gamma, "alpha": alpha, "tokens": expected_tokens(alpha, gamma),
             "speedup": round_speedup(alpha, gamma, timing.overhead),
             "relaxed": relaxed_speedup(alpha, gamma, timing.overhead)} for gamma in timing.gammas]


@dataclass(frozen=True)
class Timing:
    """What the reference's formulas read; by default its published inputs (RTX 4090, 7B in 4-bit,
    30 tokens), quoted and never this project's. decode_ms: the verifier's decoding of n_tokens.
    n_drafted: drafts made for free while the verifier is in prefill; verify_ms: one batched
    verification of them. overhead: what a round of any of the gammas costs beyond a verifier's
    token, in such tokens. kind: quoted, own or measured."""

    prefill_drafter_ms: float = 130.0
    prefill_verifier_ms: float = 317.0
    decode_ms: float = 419.0
    n_tokens: int = 30
    n_drafted: int = 21
    verify_ms: float = 70.0
    overhead: float = 0.1
    kind: str = "quoted"
    gammas: tuple[int, ...] = (5, 8, 10)

    @classmethod
    def of(cls, prices: Prices, *, n_tokens: float, gamma: int, most: int) -> Timing:
        """From measured prices: answers of n_tokens, rounds of gamma drafts, at most ``most``
        hidden ones. Raises: ParameterError for a v(K) that was not measured."""
        n_drafted, token_s = _hidden_drafts(prices, most, gamma), prices.verify_s(1)
        round_s = gamma * prices.draft_s + prices.round_s + prices.verify_s(gamma + 1)
        return cls(1e3 * prices.drafter_prefill_s, 1e3 * prices.verifier_prefill_s,
                   1e3 * token_s * n_tokens, n_tokens, n_drafted,
                   1e3 * prices.verify_s(max(1, n_drafted)), round_s / token_s - 1, "measured",
                   (gamma,))

    @classmethod
    def read(cls, given: str | Mapping[str, Any]) -> Timing:
        """"reference", a mapping of one's own times, or a JSON file of them; what is not named is
        the reference's. Raises: ParameterError for other names, or a time that is none."""
        if given == "reference":
            return cls()
        fields = [field.name for field in dataclasses.fields(cls)][:-2]
        try:
            text = "" if isinstance(given, Mapping) else Path(given).read_text(encoding="utf-8")
            own = json.loads(text) if text else given
            good = own.keys() <= set(fields) and all(
                float(value) >= 0 for value in own.values()) and min(
                    float(own.get(name, 1)) for name in ("decode_ms", "n_tokens")) > 0
        except (OSError, ValueError, TypeError, AttributeError):
            good = False
        if not good:
            raise ParameterError(f"{given!r} is no timing; give reference, measured, or "
                                 f"{', '.join(fields)} in ms, as a mapping or a JSON file")
        return cls(**{name: float(value) for name, value in own.items()}, kind="own")

    @property
    def token_ms(self) -> float:
        """One verifier token, ≈14.0 ms."""
        return self.decode_ms / self.n_tokens


def reference_wall_clock(acceptance: float, timing: Timing | None = None) -> float:
    """End to end: baseline / (baseline − (accepted + 1 bonus)·token + verification). 21/50/70/100 %
    give 1.01/1.14/1.25/1.47× (±0.01)."""
    _check_share(acceptance, "acceptance")
    timing = timing or Timing()
    baseline = timing.prefill_verifier_ms + timing.decode_ms
    saved = (timing.n_drafted * acceptance + 1) * timing.token_ms - timing.verify_ms
    return baseline / (baseline - saved)


def reference_estimates(unbroken_prefix: float, draft_acceptance: float, gamma: int,
                        timing: Timing | None = None) -> dict[str, float]:
    """Group 6 of the reference's evaluation: prefill, decode, end_to_end. unbroken_prefix,
    draft_acceptance: at one cosine threshold, the mean unbroken prefix and the mean of
    min(unbroken, gamma) / gamma (metrics.state_figures)."""
    timing = timing or Timing()
    hidden = unbroken_prefix / timing.n_drafted if timing.n_drafted else 0.0
    return {
        "prefill": 1 + unbroken_prefix * timing.token_ms / timing.prefill_verifier_ms,
        "decode": (draft_acceptance * gamma + 1) / (1 + timing.overhead),
        "end_to_end": reference_wall_clock(min(1.0, hidden), timing),
    }


# --- ours: measured costs in, time out ---


@dataclass(frozen=True)
class Prediction:
    """parts_ms sums to total_ms. tokens_per_round: accepted + bonus of a decode round."""

    total_ms: float
    baseline_ms: float
    speedup: float
    parts_ms: Mapping[str, float]
    n_free: int
    n_rounds: float
    tokens_per_round: float

    def residual_ms(self, measured_ms: float) -> float:
        """Measured − predicted: what the model does not know."""
        return measured_ms - self.total_ms


def predict(prices: Prices, survival: Sequence[float], *, n_tokens: float, gamma: int,
            prefill_survival: Sequence[float] | None = None) -> Prediction:
    """Time of one answer with prefill hiding followed by draft–verify rounds, against plain
    decoding of the same n_tokens (the formulas: docs/metrics.md, section 10).

    survival: P(first i + 1 drafts all accepted) for i = 0 … (Rounds.marginal), going on at its
    last ratio. prefill_survival: of the hidden drafts, from the answer's first position on. gamma:
    0 decodes plainly after the hidden drafts. Raises: MetricError for a curve that rises or leaves
    [0, 1], n_tokens below 1, gamma below 0; ParameterError for a v(K) that was not measured."""
    if n_tokens < 1 or gamma < 0:
        raise MetricError("n_tokens must be at least 1 and gamma at least 0 but they are "
                          f"{n_tokens} and {gamma}")
    n_free, gained, checked = _hidden_drafts(prices, n_tokens, gamma), 1.0, 0.0
    if n_free:
        checked = prices.round_s + prices.verify_s(n_free)
        hidden = survival if prefill_survival is None else prefill_survival
        gained = min(float(n_tokens), accepted_within(hidden, n_free) + 1)
    per_round = accepted_within(survival, gamma) + 1
    n_rounds = (n_tokens - gained) / per_round
    parts = {
        "prefill": prices.contended_prefill_s, "exposed_drafter_prefill": prices.exposed_s(),
        "hidden_drafts": checked, "draft": n_rounds * gamma * prices.draft_s,
        "align": n_rounds * prices.round_s * (gamma > 0),
        "verify": n_rounds * prices.verify_s(gamma + 1) if n_rounds > 0 else 0.0,
    }
    total = math.fsum(parts.values())
    baseline = prices.verifier_prefill_s + (n_tokens - 1) * prices.verify_s(1)
    parts_ms = {name: 1e3 * seconds for name, seconds in parts.items()}
    return Prediction(1e3 * total, 1e3 * baseline, baseline / total, parts_ms, n_free, n_rounds,
                      per_round)


def _hidden_drafts(prices: Prices, n_tokens: float, gamma: int) -> int:
    """Drafts that fit between the two prefills, at most one pass that was measured."""
    if prices.overlap == 0:
        return 0
    if prices.draft_s == 0:
        return int(min(n_tokens, gamma))
    window = prices.overlap * max(0.0, prices.verifier_prefill_s - prices.drafter_prefill_s)
    fitting = window / prices.draft_s + 1e-9  # where they fill it, the last one fits
    return int(min(n_tokens, max(prices.verify), fitting))


def accepted_within(survival: Sequence[float], k: int) -> float:
    """Σ_{i<k} survival[i]: expected accepted tokens among k drafts; beyond the curve's end at its
    last ratio.

    Raises: MetricError for an empty curve, or one that rises or leaves [0, 1]."""
    values = [1.0, *map(float, survival)]
    if len(values) == 1 or not all(0 <= b <= a <= 1 for a, b in pairwise(values)):
        raise MetricError("a survival curve must start at or below 1 and never rise but is "
                          f"{values[1:7]}; pass Rounds.marginal")
    ratio = values[-1] / values[-2] if values[-2] > 0 else 0.0
    while len(values) <= k:
        values.append(values[-1] * ratio)
    return math.fsum(values[1:k + 1])


def _check_share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise MetricError(f"{name} must be a share between 0 and 1 but is {value}; a percentage "
                          "must be divided by 100")
