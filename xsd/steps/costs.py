"""Step 05, the costs: what each part takes on this machine, and what the rounds that were counted
should have taken at these prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pandas as pd

from xsd.bench import costs
from xsd.bench import run as bench
from xsd.decode import proposers, tracks
from xsd.steps import live


@dataclasses.dataclass(frozen=True)
class Parts:
    """curve: v(K), one Cost a width. steps: name → Cost. adapters: level → Cost of one adapter step
    with the LM head. overlap: None where no arm drafts behind the prefill."""

    curve: list[costs.Cost]
    steps: Mapping[str, costs.Cost]
    adapters: Mapping[str, costs.Cost]
    overlap: costs.OverlapCost | None


def measure(bench_: live.Bench, *, repeats: int = 5) -> Parts:
    """Measured on the first timed sample: the verification curve, steps, prefills, each adapter,
    and how the prefills overlap."""
    given, pair = bench_.given, bench_.pair
    sample = next(iter(bench_.timed.values()))[0].load()
    longest = max(live.parts_of(name)[1] or given.gamma for name in given.arms)
    widths = sorted({1, 2, 4, given.gamma + 1, 2 * given.gamma, given.gamma_prefill, longest + 1})
    curve = costs.verification_curve(pair.verifier, sample, rows=widths, context=8,
                                     repeats=2 * repeats)
    steps = costs.step_costs(pair.drafter, pair.verifier, None, sample, repeats=repeats)
    by_level, overlap = {}, None
    for level, adapter in bench_.adapters.items():
        by_level[level] = costs.step_costs(pair.drafter, pair.verifier, adapter, sample,
                                           repeats=2)["adapter_step"]
        if overlap is None and adapter.reads == "drafter":
            track = tracks.DrafterTrack(pair.drafter)
            proposer = proposers.AdapterProposer(track, adapter, pair.verifier.lm_head,
                                                 pair.draft_vocab_size, pair.verifier.eos_token_ids)
            overlap = costs.prefill_overlap(pair.verifier, proposer, sample, n_drafts=given.gamma,
                                            repeats=repeats)
    return Parts(curve, steps, by_level, overlap)


def table(found: Parts) -> pd.DataFrame:
    """All costs, milliseconds: what, median, quartiles, in units of one verifier step."""
    named = [
        *found.curve, *found.steps.values(),
        *(dataclasses.replace(c, what=f"adapter {level}") for level, c in found.adapters.items())
    ]
    if found.overlap is not None:
        named += [
            dataclasses.replace(found.overlap.serial_s,
                                what="both prefills and first drafts, one after the other"),
            dataclasses.replace(found.overlap.overlapped_s,
                                what="both prefills and first drafts, at once"),
        ]
    unit = found.steps["verifier_step"].median_s
    rows = [(c.what, 1e3 * c.median_s, 1e3 * c.low_s, 1e3 * c.high_s, c.median_s / unit)
            for c in named]
    if found.overlap is not None:
        ideal = found.overlap.ideal_s
        rows.append(("the longer lane alone (ideal overlap)", 1e3 * ideal, float("nan"),
                     float("nan"), ideal / unit))
    return pd.DataFrame(rows, columns=["what", "ms", "low", "high", "verifier steps"])


def predictions(bench_: live.Bench, records: Sequence[bench.Record], found: Parts) -> pd.DataFrame:
    """Each arm of one proposer: seconds that its rounds should take at the measured prices, beside
    what they took.

    Returns: arm, predicted_ms and measured_ms an answer, residual (measured / predicted − 1), and
    the shares of prefill, draft, verify.
    """
    rows = []
    for name in dict.fromkeys(record["arm"] for record in records):
        own = [record for record in records if record["arm"] == name and record["rounds"]]
        if not own or "+" in name:
            continue
        price = costs.prices(found.curve, found.steps)
        kind = live.parts_of(name)[0]
        if kind in bench_.adapters:
            extra = found.adapters[kind].median_s
            reads = bench_.adapters[kind].reads
            price = dataclasses.replace(
                price, draft_s=extra + (0 if reads == "verifier" else price.draft_s))
            if reads == "verifier":
                price = dataclasses.replace(price, drafter_prefill_s=0.0)
        elif kind != "drafter":  # tables cost next to nothing
            price = dataclasses.replace(price, draft_s=0.0, drafter_prefill_s=0.0)
        told = costs.predict(own, price, bench_.pair.verifier.eos_token_ids)
        rows.append({
            "arm": live.label_of(name), "predicted_ms": 1e3 * told["predicted_s"] / len(own),
            "measured_ms": 1e3 * told["measured_s"] / len(own), "residual": told["residual"], **{
                part: told[f"{part}_s"] / told["predicted_s"] for part in ("prefill", "draft", "verify")
            },
        })
    return pd.DataFrame(
        rows,
        columns=["arm", "predicted_ms", "measured_ms", "residual", "prefill", "draft", "verify"])


def curve_table(found: Parts) -> pd.DataFrame:
    """The verification curve as ``views.cost_figures.verification_curve`` draws it."""
    return pd.DataFrame(
        [{"rows": c.rows, "ms": 1e3 * c.median_s, "low": 1e3 * c.low_s, "high": 1e3 * c.high_s}
         for c in found.curve])
