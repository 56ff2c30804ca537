"""What the parts cost on this machine: the verification curve v(K), a draft, an adapter, both
prefills, and the overlap of the two.

Measured interleaved (every repeat goes once through all shapes) after a warm-up of each shape;
medians with the middle half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xsd.core import DecoderHandle, ParameterError
from xsd.decode import overlap, proposers, replay
from xsd.decode.prices import Prices


@dataclass(frozen=True)
class Cost:
    """Seconds of one operation. low_s, high_s: its quartiles over n repeats. rows: rows fed, 0
    where that has no meaning."""

    what: str
    rows: int
    median_s: float
    low_s: float
    high_s: float
    n: int


@dataclass(frozen=True)
class OverlapCost:
    """The prefill phase, seconds: each lane alone, one after the other, and really at once. ideal_s
    is the longer lane alone.

    ``hidden_share``: how much of the shorter lane disappears, 1 when the overlap is ideal, 0 when
    it saves nothing, below 0 when the lanes hinder each other more than they help.
    """

    verifier_s: Cost
    drafter_s: Cost
    serial_s: Cost
    overlapped_s: Cost
    n_drafts: int

    @property
    def ideal_s(self) -> float:
        return max(self.verifier_s.median_s, self.drafter_s.median_s)

    @property
    def hidden_share(self) -> float:
        return (self.serial_s.median_s - self.overlapped_s.median_s) / min(
            self.verifier_s.median_s, self.drafter_s.median_s)


def measure(operations: dict[str, tuple[int, Callable[[], Any]]], *, repeats: int = 5,
            clock: Callable[[], float] = time.perf_counter) -> list[Cost]:
    """name → (rows, operation); each is run once to warm up, then ``repeats`` times in turn.
    Raises: ParameterError if repeats < 1."""
    if repeats < 1:
        raise ParameterError(f"repeats is {repeats}; measure at least once")
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for turn in range(repeats + 1):
        for name, (_, operation) in operations.items():
            _settle()
            start = clock()
            operation()
            _settle()
            if turn:
                seconds[name].append(clock() - start)
    return [_cost(name, rows, seconds[name]) for name, (rows, _) in operations.items()]


@torch.inference_mode()
def verification_curve(handle: DecoderHandle, sample: Any, *,
                       rows: Sequence[int] = tuple(range(1, 10)), context: int = 0,
                       repeats: int = 5) -> list[Cost]:
    """v(K): seconds of one extend of K rows and its rollback, after the prompt and ``context``
    answer tokens; one Cost for each K in rows.

    gamma drafts are verified by K = gamma + 1 rows; K = 1 is a plain decode step.
    """
    state = handle.prefill(sample)
    token = int(state.logits.argmax())
    device = state.logits.device
    if context:
        handle.extend(state, torch.full((context,), token, device=device))
    start = state.length

    def verify(n: int) -> None:
        handle.extend(state, torch.full((n,), token, device=device))[1].argmax(-1).tolist()
        handle.rollback(state, start)

    return measure({f"verify {n}": (n, lambda n=n: verify(n)) for n in rows}, repeats=repeats)


@torch.inference_mode()
def step_costs(drafter: DecoderHandle, verifier: DecoderHandle, adapter: proposers.Adapter | None,
               sample: Any, *, context: int = 8, repeats: int = 5) -> dict[str, Cost]:
    """ "drafter_prefill", "verifier_prefill", "drafter_step", "verifier_step"; with an adapter also
    "adapter_step" (with LM head).

    context: answer positions that exist when the adapter steps.
    """
    by_drafter, by_verifier = drafter.prefill(sample), verifier.prefill(sample)

    def step(handle: DecoderHandle, state: Any) -> Callable[[], None]:
        start, token = state.length, state.logits.argmax()[None]

        def once() -> None:
            int(handle.extend(state, token)[1][-1].argmax())
            handle.rollback(state, start)

        return once

    operations = {
        "drafter_prefill":
            (by_drafter.length, lambda: int(drafter.prefill(sample).logits.argmax())),
        "verifier_prefill":
            (by_verifier.length, lambda: int(verifier.prefill(sample).logits.argmax())),
        "drafter_step": (1, step(drafter,
                                 by_drafter)), "verifier_step": (1, step(verifier, by_verifier)),
    }
    if adapter is not None:
        drafter_states = by_drafter.hidden[None].repeat(context + 1, 1)
        verifier_states = by_verifier.hidden[None].repeat(context, 1)

        fuses = getattr(adapter, "fuses_tokens", False)
        given = {"tokens": torch.zeros(context, dtype=torch.long)} if fuses else {
        }  # as live decoding gives them

        def adapt() -> None:
            int(
                verifier.lm_head(adapter.step(drafter_states, verifier_states,
                                              **given)[None])[0].argmax())

        operations["adapter_step"] = (1, adapt)
    return {cost.what: cost for cost in measure(operations, repeats=repeats)}


@torch.inference_mode()
def prefill_overlap(verifier: DecoderHandle, proposer: proposers.Proposer, sample: Any, *,
                    n_drafts: int = 4, repeats: int = 5) -> OverlapCost:
    """The same work three ways: verifier prefill and drafter prefill + ``n_drafts`` drafts, serial,
    overlapped, and each lane alone."""
    def prefill() -> int:
        return int(verifier.prefill(sample).logits.argmax())

    def draft(stop: overlap.Stop = proposers.never) -> list[int]:
        proposer.begin(sample)
        return [] if proposer.needs_verifier else proposer.propose(
            n_drafts)  # stop is ignored: the same drafts in every mode

    costs = measure(
        {
            "verifier_s": (0, prefill), "drafter_s": (0, draft), "serial_s":
                (0, lambda: overlap.run_lanes(prefill, draft, "serial")), "overlapped_s":
                    (0, lambda: overlap.run_lanes(prefill, draft, "threads")),
        }, repeats=repeats,
    )
    return OverlapCost(**{cost.what: cost for cost in costs}, n_drafts=n_drafts)


def prices(curve: Sequence[Cost], steps: Mapping[str, Cost]) -> Prices:
    """Medians of :func:`verification_curve` and :func:`step_costs` in the form that a schedule is
    priced with."""
    adapter_s = steps["adapter_step"].median_s if "adapter_step" in steps else 0.0
    return Prices(verifier_prefill_s=steps["verifier_prefill"].median_s,
                         drafter_prefill_s=steps["drafter_prefill"].median_s,
                         draft_s=steps["drafter_step"].median_s + adapter_s,
                         verify={cost.rows: cost.median_s for cost in curve},
                         )


def predict(records: Sequence[Mapping[str, Any]], price: Prices,
            eos_token_ids: frozenset[int]) -> dict[str, float]:
    """One arm's records priced by what the parts cost: predicted and measured seconds over all of
    them, and what is left unexplained.

    Returns: predicted_s, measured_s, residual (measured / predicted − 1), and the parts of the
    prediction: prefill_s, draft_s, verify_s.
    Raises: ParameterError without records or where they hold no rounds (an autoregressive arm).
    """
    if not records or not all(record["rounds"] for record in records):
        raise ParameterError("a prediction needs records with rounds; choose an arm that drafts")
    predicted = measured = drafting = verifying = 0.0
    for record in records:
        rounds = [_priced(r, record["ids"], eos_token_ids) for r in record["rounds"]]
        predicted += replay.predicted_seconds(rounds, price)
        measured += record["total_s"]
        drafting += sum(each.n_drafted * price.draft_s for each in rounds if not each.hiding)
        verifying += sum(price.verify_s(each.rows) for each in rounds if each.rows)
    return {
        "predicted_s": predicted, "measured_s": measured, "residual": measured / predicted - 1,
        "prefill_s": predicted - drafting - verifying, "draft_s": drafting, "verify_s": verifying,
    }


def _priced(row: Mapping[str, Any], ids: Sequence[int],
            eos: frozenset[int]) -> replay.ReplayedRound:
    drafted, hiding = row["drafted"], row["phase"] == "prefill_hiding"
    rows = replay.rows_fed(drafted, ids[0], eos, hiding)
    return replay.ReplayedRound(len(drafted), row["accepted"], row["bonus"] is not None, rows,
                                hiding)


def _cost(name: str, rows: int, seconds: Sequence[float]) -> Cost:
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Cost(name, rows, float(middle), float(low), float(high), len(seconds))


def _settle() -> None:
    """GPU work is queued; wait for it around the whole operation, never inside."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
