"""What a speed-up would be, were a price, the acceptance or the round another: speedup.predict over
a mapping of numbers that a slider can move (notebook 05 and the report's page, whose script,
runs/templates/what_if.js, computes the same)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xsd.core import MetricError, ParameterError
from xsd.decode.prices import Prices
from xsd.evaluate import speedup

INPUTS = {
    "verifier_prefill_ms": ("verifier's prefill", "", "ms"),
    "drafter_prefill_ms": ("drafter's prefill", "", "ms"),
    "step_ms": ("step v(1)", "one plain step of the verifier", "ms"),
    "width": ("v(K) − v(1)", "what a wider pass costs beyond a step", "× measured"),
    "draft_ms": ("draft", "drafter, adapter and head, for one token", "ms"),
    "round_ms": ("round", "what it costs beside its drafts and its pass", "ms"),
    "gamma": ("γ", "drafts a round", ""),
    "acceptance": ("α", "share of drafts accepted, once those before them are", ""),
    "hidden_acceptance": ("α behind the prefill", "the same of the drafts made there", ""),
    "overlap": ("overlap", "share of the drafter's work that the prefill hides", ""),
    "contention": ("contention", "how many times longer the prefill then takes", "×"),
    "n_tokens": ("answer", "its length", "tokens"),
}
"""Name → what a slider moves: short, in words, its unit. ``verify``, {K: ms} as measured, stands
beside them."""
WIDEST = 64
"""Rounds of at most so many drafts are tried."""


def given(prices: Prices, *, acceptance: float, gamma: int, n_tokens: float,
          hidden_acceptance: float | None = None) -> dict[str, Any]:
    """What :func:`what_if` takes, of prices that were measured or are one's own."""
    ms = {
        name: 1e3 * getattr(prices, f"{name.removesuffix('_ms')}_s")
        for name in ("verifier_prefill_ms", "drafter_prefill_ms", "draft_ms", "round_ms")
    }
    return {
        **ms, "step_ms": 1e3 * prices.verify_s(1), "width": 1.0, "gamma": gamma,
        "acceptance": acceptance, "overlap": prices.overlap, "contention": prices.contention,
        "hidden_acceptance": acceptance if hidden_acceptance is None else hidden_acceptance,
        "n_tokens": n_tokens, "verify": {k: 1e3 * s for k, s in prices.verify.items()}
    }


def ranges(presets: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Name → the ends of its slider, for all of these ``given``; γ as wide as was measured."""
    presets = list(presets)
    found = {name: (0.0, 1.0) for name in INPUTS} | {
        "width": (0.0, 3.0), "contention": (1.0, 3.0), "n_tokens": (1.0, 512.0),
        "gamma": (0, max(min(max(map(int, one["verify"])) - 1, WIDEST) for one in presets))}
    return found | {name: (0.0, 2 * max(max(one[name] for one in presets), 1.0))
                    for name, (_, _, unit) in INPUTS.items() if unit == "ms"}


def prices_of(given: Mapping[str, Any]) -> Prices:
    """v(K) = step + width · (measured v(K) − v(1)), never below the step that it contains. Raises:
    ParameterError for other names, or for what is no price."""
    if wrong := given.keys() ^ {*INPUTS, "verify"}:
        raise ParameterError(f"what_if takes {', '.join(INPUTS)} and verify; missing or unknown: "
                             f"{', '.join(sorted(map(str, wrong)))}")
    measured = {int(k): float(ms) for k, ms in given["verify"].items()}
    if 1 not in measured:
        raise ParameterError("verify needs v(1), the verifier's ordinary step")
    verify = {
        k: max(0.0, given["step_ms"] + given["width"] * (ms - measured[1])) / 1e3
        for k, ms in measured.items()
    }
    return Prices(given["verifier_prefill_ms"] / 1e3, given["drafter_prefill_ms"] / 1e3,
                  given["draft_ms"] / 1e3, verify, given["round_ms"] / 1e3, given["overlap"],
                  given["contention"])


def predict(given: Mapping[str, Any], **other: float) -> speedup.Prediction:
    """speedup.predict with every draft accepted with one probability after accepted ones. other:
    inputs in place of those given. Raises: MetricError, ParameterError."""
    now = {**given, **other}
    for name in ("acceptance", "hidden_acceptance"):
        if not 0 <= now[name] <= 1:
            raise MetricError(f"{name} is a share between 0 and 1 but is {now[name]}")
    curves = [[now[name], now[name]**2] for name in ("acceptance", "hidden_acceptance")]
    return speedup.predict(prices_of(now), curves[0], n_tokens=now["n_tokens"], gamma=now["gamma"],
                           prefill_survival=curves[1])


def what_if(given: Mapping[str, Any], change: float = 0.1) -> dict[str, Any]:
    """speedup and the prediction it stands in; break_even, the acceptance at which it is 1 (None:
    at none); best_gamma; by_gamma and by_acceptance, [x, speed-up] each; and sensitivity: input,
    less and more, the speed-up with it ``change`` smaller and larger, largest effect first.

    given: :data:`INPUTS` and verify, of :func:`given`, :func:`points` or :func:`reference`. Raises:
    MetricError or ParameterError for what is no price or share."""
    def ratio(**other: float) -> float:
        return predict(given, **other).speedup

    here = dataclasses.asdict(predict(given))
    widest = min(max(map(int, given["verify"])) - 1, WIDEST)
    by_gamma = [[gamma, ratio(gamma=gamma)] for gamma in range(1, widest + 1)]
    limits = {name: (0.0, 1.0) for name in ("acceptance", "hidden_acceptance", "overlap")}
    limits |= {"contention": (1.0, 1e9), "n_tokens": (1.0, 1e9)}
    moved = []
    for name in INPUTS:
        low, high = limits.get(name, (0.0, 1e9))
        if name != "gamma":  # it has a curve of its own
            less, more = (ratio(**{name: min(high, max(low, given[name] * factor))})
                          for factor in (1 - change, 1 + change))
            moved.append({"input": name, "less": less, "more": more})
    return {
        **here, "break_even": break_even(given),
        "best_gamma": max(by_gamma, key=lambda pair: pair[1])[0] if by_gamma else None,
        "by_gamma": by_gamma, "by_acceptance": [[at / 20, ratio(acceptance=at / 20)]
                                                for at in range(21)],
        "sensitivity": sorted(moved, key=lambda row: -abs(row["more"] - row["less"]))
    }


def break_even(given: Mapping[str, Any], target: float = 1.0) -> float | None:
    """The acceptance of a round at which the speed-up reaches ``target``; None where none does."""
    def reaches(alpha: float) -> bool:
        return predict(given, acceptance=alpha).speedup >= target

    return _least(reaches) if reaches(1.0) else None


def acceptance_of(accepted: float, gamma: int) -> float:
    """The α of which ``accepted`` of γ drafts are expected to be kept: α + α² + … + α^γ. Raises:
    MetricError for more than γ."""
    if not 0 <= accepted <= gamma:
        raise MetricError(f"{accepted} of {gamma} drafts cannot be accepted")
    return _least(lambda alpha: sum(alpha**k for k in range(1, gamma + 1)) >= accepted)


def _least(holds: Callable[[float], bool]) -> float:
    """The least share for which something holds, that holds for all larger ones."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return 0.0 if holds(0.0) else high


def points(live: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arm → its ``given`` and, where our own loop was run beside it, the speed-up over that loop
    that was ``measured``, of ``results/live.json``; nothing for runs that hold no prices of arms.
    """
    arms, costs = live.get("arms", {}), live.get("costs", {})
    by_label = {row["label"]: row for row in arms.values()}
    verify = {
        int(name.split()[1]): cost["ms"] for name, cost in costs.items()
        if name.startswith("verify ")
    }
    found = {}
    for label, row in live.get("predicted", {}).items():
        arm = by_label.get(label, {})
        if "draft_ms" not in row or "accepted_per_round" not in arm:
            continue
        gamma, hidden = int(row["gamma"]), arm.get("hidden_accepted")
        acceptance = acceptance_of(arm["accepted_per_round"]["value"], gamma)
        behind = acceptance_of(hidden["value"], round(
            arm["hidden_accepted_drafted"])) if hidden else 0.0
        found[label] = {
            "given": {
                "verifier_prefill_ms": costs["verifier_prefill"]["ms"], **{
                    name: row[name] for name in ("drafter_prefill_ms", "draft_ms", "round_ms")
                }, "step_ms": verify[1], "width": 1.0, "gamma": gamma, "acceptance": acceptance,
                "hidden_acceptance": behind, "contention": 1.0, "verify": verify,
                "overlap": min(1.0, max(0.0,
                                        live.get("hidden_share") or 0.0)) if hidden else 0.0,
                "n_tokens": arm["tokens"] / live["n_timed"]
            }
        }
        if "ar" in arms:
            found[label]["measured"] = arms["ar"]["total_ms"]["value"] / arm["total_ms"]["value"]
    return found


def reference(timing: speedup.Timing | None = None) -> dict[str, Any]:
    """``given`` of the reference's published times (RTX 4090, 7B in 4 bit, 30 tokens): drafts
    behind the prefill alone, then plain decoding (γ = 0), 21 % of those drafts accepted."""
    timing = timing or speedup.Timing()
    window = timing.prefill_verifier_ms - timing.prefill_drafter_ms
    prices = Prices(timing.prefill_verifier_ms / 1e3, timing.prefill_drafter_ms / 1e3,
                    window / timing.n_drafted / 1e3,
                    {1: timing.token_ms / 1e3,
                     int(timing.n_drafted): timing.verify_ms / 1e3})
    return given(prices, gamma=0, n_tokens=timing.n_tokens, acceptance=0.0,
                 hidden_acceptance=acceptance_of(0.21 * timing.n_drafted, int(timing.n_drafted)))


def reference_table(timing: speedup.Timing | None = None) -> list[dict[str, float]]:
    """accepted (share of the hidden drafts), formula, the speed-up that the reference's arithmetic
    gives (1.01, 1.14, 1.25, 1.47), and model, what :func:`predict` says of the same times: a token
    less, because the first one comes out of the prefill and costs no step."""
    timing = timing or speedup.Timing()
    start, n = reference(timing), int(timing.n_drafted)
    return [{
        "accepted": row["accepted"], "formula": row["speedup"],
        "model": predict(start, hidden_acceptance=acceptance_of(row["accepted"] * n, n)).speedup
    } for row in speedup.wall_clock_table(timing)]
