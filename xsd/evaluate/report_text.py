"""The printed evaluation report: eight sections of plain text, for terminals and notebooks
(docs/metrics.md, section 9)."""

from __future__ import annotations

from collections.abc import Sequence

from xsd.evaluate.counterfactual import FloorComparison
from xsd.evaluate.hidden import HiddenStateResult
from xsd.evaluate.reliability_old import ReliabilityResult
from xsd.evaluate.speedup import Prediction, ReferenceTiming, reference_estimates
from xsd.evaluate.statistics import Interval
from xsd.evaluate.tokens import TokenResult

_WIDTH = 100


def report(title: str, hidden: HiddenStateResult, *, tokens: TokenResult | None = None,
           comparison: FloorComparison | None = None, reliability: ReliabilityResult | None = None,
           prediction: Prediction | None = None, timing: ReferenceTiming | None = None,
           positions: int = 20,
           ) -> str:
    """Eight sections: 1 cosine, 2 Accept@τ, 3 consecutive, 4 lengths, 5 draft acceptance, 6
    speed-up estimates, 7 by position, 8 tokens.

    Sections 1 to 7 are the reference's hidden-state figures; section 8 is what the verifier's head
    says, beside the floors.
    """
    parts = [
        _heading(title, hidden),
        _cosine(hidden),
        _accept(hidden),
        _unbroken_prefix(hidden),
        _lengths(hidden),
        _draft(hidden)
    ]
    parts += [
        _speedup(hidden, prediction, timing),
        _positions(hidden, tokens, positions),
        _tokens(tokens, comparison, reliability)
    ]
    return "\n\n".join(parts) + "\n"


def _heading(title: str, hidden: HiddenStateResult) -> str:
    n = (f"{hidden.n_samples} samples, {hidden.cosine.n} tokens, {hidden.n_clusters} sequences; "
         "intervals: 95 %, clustered by sequence")
    return f"{'=' * _WIDTH}\n{title}\n{n}\n{'=' * _WIDTH}"


def _section(number: int, name: str, lines: Sequence[str]) -> str:
    return "\n".join([f"[{number}] {name}", "-" * _WIDTH, *(f"  {line}" for line in lines)])


def _cosine(hidden: HiddenStateResult) -> str:
    c = hidden.cosine
    tails = "  ".join(f"P{key} {value:.4f}" for key, value in c.percentiles.items())
    lines = [
        f"mean {_number(hidden.cosine_mean, 4)}   std {c.std:.4f}   median {c.median:.4f}   min "
        f"{c.min:.4f}   max {c.max:.4f}",
        tails,
    ]
    return _section(1, "Cosine of aligned and verifier states", lines)


def _accept(hidden: HiddenStateResult) -> str:
    lines = [f"cos > {tau:.2f}   {hidden.acceptance[tau].text()}" for tau in hidden.thresholds]
    return _section(
        2,
        "Accept@τ: share of tokens above the threshold (a threshold is not the verifier's verdict: "
        "see 8)",
        lines)


def _unbroken_prefix(hidden: HiddenStateResult) -> str:
    lines = []
    for tau in hidden.thresholds:
        c = hidden.unbroken_prefix[tau]
        spread = f"std {c.std:.2f}   median {c.median:.1f}   min {c.min:.0f}   max {c.max:.0f}"
        lines.append(f"cos > {tau:.2f}   {_number(hidden.unbroken_prefix_mean[tau])}   {spread}")
    return _section(3, "Consecutive tokens before the first rejection", lines)


def _lengths(hidden: HiddenStateResult) -> str:
    n = hidden.lengths
    return _section(
        4, "Answer lengths",
        [f"mean {n.mean:.1f}   std {n.std:.1f}   min {n.min:.0f}   max {n.max:.0f}   (tokens)"])


def _draft(hidden: HiddenStateResult) -> str:
    lines = []
    for tau in hidden.thresholds:
        at = hidden.draft_acceptance[tau]
        lines.append(
            f"cos > {tau:.2f}   prefill {at.prefill.text()}   decode, γ = {at.gamma}: "
            f"{at.decode.text()}"
        )
    return _section(5, "Draft acceptance by threshold: prefill (whole answer), decode (first γ)",
                    lines)


def _speedup(hidden: HiddenStateResult, prediction: Prediction | None,
             timing: ReferenceTiming | None) -> str:
    lines = []
    if 0.9 in hidden.thresholds:
        estimate = reference_estimates(hidden, 0.9, timing)
        figures = "   ".join(f"{name.replace('_', ' ')} {value:.2f}×"
                             for name, value in estimate.items())
        source = "given" if timing else "the reference's quoted"
        lines.append(
            f"the reference's formulas at cos > 0.90, {source} times: {figures}   (ESTIMATE; known "
            "to be too high)"
        )
    if prediction is not None:
        lines.append(
            f"predicted from measured costs: {prediction.speedup:.2f}× ({prediction.total_ms:.0f} "
            f"of {prediction.baseline_ms:.0f} ms)"
        )
        lines.append("   ".join(f"{name.replace('_', ' ')} {value:.0f} ms"
                                for name, value in prediction.parts_ms.items()))
    return _section(6, "Speed-up (estimates; the live benchmark measures it)", lines
                    or ["no times were given"])


def _positions(hidden: HiddenStateResult, tokens: TokenResult | None, positions: int) -> str:
    heads = [f"@{tau:.2f}" for tau in hidden.thresholds] + (["token", "survival"] if tokens else [])
    lines = ["pos      n    cos     std  " + "".join(f"{head:>9}" for head in heads)]
    for at in hidden.positions[:positions]:
        cells = [at.acceptance[tau].value for tau in hidden.thresholds]
        if tokens and at.position < len(tokens.positions):
            token = tokens.positions[at.position]
            cells += [token.match.value, token.survival.value]
        lines.append(f"{at.position:>3} {at.n:>6} {at.mean:>6.3f} {at.std:>7.3f}  " +
                     "".join(f"{100 * value:>8.1f}%" for value in cells))
    return _section(7, "By position in the answer", lines)


def _tokens(tokens: TokenResult | None, comparison: FloorComparison | None,
            reliability: ReliabilityResult | None) -> str:
    if tokens is None:
        return _section(8, "Tokens: the verifier's verdict",
                        ["not measured: give the verifier's head and ids to TokenMetrics"])
    lines = [f"token acceptance {tokens.acceptance.text()}"]
    lines += [
        f"right token among the first {k}: {value.text()}" for k, value in tokens.top_k.items()
        if k > 1
    ]
    lines.append(f"consecutive from the start {_number(tokens.unbroken_prefix_mean)}")
    bonus = tokens.rounds.mean_accepted_with_bonus
    lines.append(
        f"accepted a round, γ = {tokens.gamma}: {_number(tokens.accepted_per_round)} without, "
        f"{bonus:.2f} with the bonus token"
    )
    if comparison is not None:
        lines += [f"floor {name}: {value.text()}" for name, value in comparison.floors.items()]
        lines.append(comparison.sentence())
    if reliability is not None:
        for band in reliability.bands:
            lines.append(
                f"P(match | {band.low:.2f} < cos ≤ {band.high:.2f}) = {band.match.text()}   n = "
                f"{band.n}"
            )
        for tau, at in reliability.thresholds.items():
            verb = "overstates" if at.difference.value > 0 else "understates"
            lines.append(
                f"Accept@{tau:.2f} {verb} token acceptance by {abs(100 * at.difference.value):.1f} "
                "points"
            )
    return _section(8, "Tokens: the verifier's verdict", lines)


def _number(value: Interval, digits: int = 2) -> str:
    bounds = "[–]" if value.low != value.low else f"[{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value.value:.{digits}f} {bounds}"
