"""Speed-up models: the reference's formulas, and ours from measured costs (docs/metrics.md, section
10). Everything here is a *prediction*.

The reference's own projection (5.77×) was five times what its clock then showed (1.03×), because
verification was taken to be free and a cosine to be a token. Ours takes token survival and the
measured verification curve v(K), and is meant to be shown beside the measurement with its residual.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xsd.core import MetricError
from xsd.evaluate.hidden import HiddenStateResult

# --- the reference's formulas
# -----------------------------------------------------------------------------------------------


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
    """Rows gamma, target, alpha_percent (whole percent, halves up): the reference's break-even
    table."""
    return [{
        "gamma": gamma, "target": target,
        "alpha_percent": math.floor(100 * break_even(target, gamma, overhead) + 0.5 + 1e-9)
    } for gamma in gammas for target in targets]


@dataclass(frozen=True)
class ReferenceTiming:
    """The reference's published inputs (RTX 4090, 7B in 4-bit, 30 tokens): quoted figures, never
    this project's measurements."""

    prefill_drafter_ms: float = 130.0
    prefill_verifier_ms: float = 317.0
    decode_ms: float = 419.0
    """The verifier's decoding of n_tokens."""
    n_tokens: int = 30
    n_drafted: int = 21
    """Drafted for free while the verifier is in prefill."""
    verify_ms: float = 70.0
    """One batched verification of them."""
    overhead: float = 0.1

    @property
    def token_ms(self) -> float:
        """One verifier token, ≈14.0 ms."""
        return self.decode_ms / self.n_tokens


def reference_wall_clock(acceptance: float, timing: ReferenceTiming | None = None) -> float:
    """End to end: baseline / (baseline − (accepted + 1 bonus)·token + verification). 21/50/70/100 %
    give 1.01/1.14/1.25/1.47× (±0.01)."""
    _check_share(acceptance, "acceptance")
    timing = timing or ReferenceTiming()
    baseline = timing.prefill_verifier_ms + timing.decode_ms
    saved = (timing.n_drafted * acceptance + 1) * timing.token_ms - timing.verify_ms
    return baseline / (baseline - saved)


def reference_estimates(result: HiddenStateResult, threshold: float = 0.9,
                        timing: ReferenceTiming | None = None) -> dict[str, float]:
    """Group 6 of the reference's evaluation from a cosine threshold: prefill, decode, end_to_end.
    Estimates that a clock does not bear out.

    Raises: MetricError when the threshold was not measured.
    """
    if threshold not in result.thresholds:
        raise MetricError(
            f"threshold {threshold} was not measured; choose among {list(result.thresholds)}")
    timing = timing or ReferenceTiming()
    accepted = result.unbroken_prefix[threshold].mean
    return {
        "prefill": 1 + accepted * timing.token_ms / timing.prefill_verifier_ms,
        "decode": (result.draft_acceptance[threshold].decode.value * result.gamma + 1) /
                  (1 + timing.overhead),
        "end_to_end": reference_wall_clock(min(1.0, accepted / timing.n_drafted), timing),
    }


# --- ours: measured costs in, time out
# ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Measured costs of one machine and one pair, in ms. verify_ms: {K: ms of one verifier pass
    over K new tokens}, K = 1 included."""

    prefill_drafter_ms: float
    prefill_verifier_ms: float
    draft_token_ms: float
    """One drafter step."""
    align_ms: float
    """Adapter and LM head, once a round."""
    verify_ms: Mapping[int, float]
    overlap: float = 1.0
    """Share of the drafter's prefill and drafting that truly runs beside the verifier's prefill: 1
    ideal, 0 one after the other."""
    contention: float = 1.0
    """How much longer the verifier's prefill takes while the drafter runs beside it (1: not at
    all)."""
    def __post_init__(self) -> None:
        if 1 not in self.verify_ms:
            raise MetricError(
                "verify_ms needs the cost of a single-token pass (K = 1), the verifier's ordinary "
                "step; measure v(K) from K = 1 on"
            )
        times = (self.prefill_drafter_ms, self.prefill_verifier_ms, self.align_ms,
                 self.draft_token_ms, *self.verify_ms.values())
        if not all(math.isfinite(t) and t >= 0
                   for t in times) or not 0 <= self.overlap <= 1 or self.contention < 1:
            raise MetricError(
                "costs must be finite times of at least 0 ms, with overlap in [0, 1] and "
                "contention at least 1"
            )

    def verify(self, k: int) -> float:
        """v(k), linear between measured points. Raises: MetricError beyond the measured range (v
        may jump there: kernels change)."""
        known = sorted(self.verify_ms)
        if not known[0] <= k <= known[-1]:
            raise MetricError(
                f"v({k}) was not measured (K = {known[0]} … {known[-1]}); measure the verification "
                "curve up to that many tokens"
            )
        above = next(at for at in known if at >= k)
        if above == k:
            return float(self.verify_ms[k])
        below = max(at for at in known if at < k)
        share = (k - below) / (above - below)
        return (1 - share) * self.verify_ms[below] + share * self.verify_ms[above]


@dataclass(frozen=True)
class Prediction:
    """Predicted, not measured. parts_ms sums to total_ms. tokens_per_round: accepted + bonus of a
    decode round."""

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


def predict(costs: Costs, survival: Sequence[float], *, n_tokens: int, gamma: int,
            prefill_survival: Sequence[float] | None = None) -> Prediction:
    """Time of one answer with prefill hiding followed by draft–verify rounds, against plain
    decoding of the same n_tokens.

    baseline = prefill + (n − 1)·v(1), as prefill gives the first token. Hidden drafts: as many
    drafter steps as fit between the two prefills; one pass v(n_free) checks them and yields
    accepted + 1 tokens. Each round then costs γ drafter steps, the alignment and v(γ + 1).

    Args: survival: P(first i + 1 drafts all accepted) for i = 0 … (Acceptance.marginal).
    prefill_survival: the same for the hidden drafts,
    whose first position is the answer's first; default: survival. Beyond its end a curve goes on at
    its last ratio. Raises: MetricError for a curve that rises or leaves [0, 1], n_tokens or gamma
    below 1, a v(K) that was not measured.
    """
    if n_tokens < 1 or gamma < 1:
        raise MetricError(f"n_tokens and gamma must be at least 1 but are {n_tokens} and {gamma}")
    hidden_curve = survival if prefill_survival is None else prefill_survival
    window = costs.overlap * max(0.0, costs.prefill_verifier_ms - costs.prefill_drafter_ms)
    n_free = min(n_tokens, max(costs.verify_ms), int(
        window // costs.draft_token_ms)) if costs.draft_token_ms > 0 else min(n_tokens, gamma)
    if costs.overlap == 0:
        n_free = 0
    exposed = (1 - costs.overlap) * costs.prefill_drafter_ms + costs.overlap * max(
        0.0, costs.prefill_drafter_ms - costs.prefill_verifier_ms)
    parts = {
        "prefill": costs.prefill_verifier_ms * (costs.contention if costs.overlap else 1.0),
        "exposed_drafter_prefill": exposed
    }
    gained = 1.0
    parts["hidden_drafts"] = 0.0
    if n_free:
        parts["hidden_drafts"] = costs.align_ms + costs.verify(n_free)
        gained = min(float(n_tokens), accepted_within(hidden_curve, n_free) + 1)
    per_round = accepted_within(survival, gamma) + 1
    n_rounds = (n_tokens - gained) / per_round
    parts["draft"] = n_rounds * gamma * costs.draft_token_ms
    parts["align"] = n_rounds * costs.align_ms
    parts["verify"] = n_rounds * costs.verify(gamma + 1) if n_rounds > 0 else 0.0
    total, baseline = math.fsum(
        parts.values()), costs.prefill_verifier_ms + (n_tokens - 1) * costs.verify(1)
    return Prediction(total, baseline, baseline / total, parts, n_free, n_rounds, per_round)


def accepted_within(survival: Sequence[float], k: int) -> float:
    """Σ_{i<k} survival[i]: expected accepted tokens among k drafts; beyond the curve's end at its
    last ratio.

    Raises: MetricError for an empty curve, or one that rises or leaves [0, 1].
    """
    values = [float(value) for value in survival]
    if not values or not all(0 <= b <= a <= 1
                             for a, b in zip([1.0, *values], values, strict=False)):
        raise MetricError(
            f"a survival curve must start at or below 1 and never rise but is {values[:6]}; pass "
            "Acceptance.marginal"
        )
    before = [1.0, *values][-2]
    ratio = values[-1] / before if before > 0 else 0.0
    while len(values) < k:
        values.append(values[-1] * ratio)
    return math.fsum(values[:k])


def sensitivity(costs: Costs, survival: Sequence[float], *, n_tokens: int, gamma: int,
                change: float = 0.1) -> list[dict[str, Any]]:
    """Speed-up when one input alone is ``change`` smaller or larger: rows input, speedup_less,
    speedup, speedup_more, largest effect first."""
    base = predict(costs, survival, n_tokens=n_tokens, gamma=gamma).speedup

    def scaled(name: str, factor: float) -> float:
        if name == "survival":
            return predict(costs, _scaled_curve(survival, factor), n_tokens=n_tokens,
                           gamma=gamma).speedup
        if name == "verify_ms":
            value: Any = {k: ms * (factor if k > 1 else 1.0) for k, ms in costs.verify_ms.items()}
        else:
            value = getattr(costs, name) * factor
            value = min(1.0, value) if name == "overlap" else max(
                1.0, value) if name == "contention" else value
        return predict(dataclasses.replace(costs, **{name: value}), survival, n_tokens=n_tokens,
                       gamma=gamma).speedup

    names = ["survival", *(field.name for field in dataclasses.fields(costs))]
    rows = [{
        "input": n, "speedup_less": scaled(n, 1 - change), "speedup": base,
        "speedup_more": scaled(n, 1 + change)
    } for n in names]
    return sorted(rows, key=lambda r: -abs(r["speedup_more"] - r["speedup_less"]))


def break_even_acceptance(costs: Costs, *, n_tokens: int, gamma: int,
                          target: float = 1.0) -> float | None:
    """The per-token acceptance α (survival α, α², …) at which the predicted speed-up reaches
    ``target``; None when even α = 1 does not."""
    def speedup(alpha: float) -> float:
        return predict(costs, [alpha**(i + 1) for i in range(max(gamma, 2))], n_tokens=n_tokens,
                       gamma=gamma).speedup

    if speedup(1.0) < target:
        return None
    low, high = 0.0, 1.0
    if speedup(low) >= target:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(middle) >= target else (middle, high)
    return high


def _scaled_curve(survival: Sequence[float], factor: float) -> list[float]:
    """Every conditional acceptance scaled, at most 1, so that the curve stays a survival curve."""
    out, alive, before = [], 1.0, 1.0
    for value in survival:
        alive *= min(1.0, factor * (value / before if before > 0 else 0.0))
        out.append(alive)
        before = value
    return out


def _check_share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise MetricError(
            f"{name} must be a share between 0 and 1 but is {value}; a percentage must be divided "
            "by 100"
        )
