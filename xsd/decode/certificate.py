"""Is this output the verifier's own? Identical ids; or a tie that is proven by its margin; or a
divergence.

A pass over many rows and a pass over one row add the same numbers in another order, so their logits
differ in the last bits, and where the two best tokens are closer than that, both are "the argmax"
(docs/decoding.md, "Losslessness"). A real bug looks the same from outside. So a tie is never
assumed: the difference between the two kinds of pass is measured on this machine (the noise floor),
and a token other than the reference's counts as a near-tie only if the verifier puts it within
twice that floor of its best one, and everything the candidate says afterwards is again the
verifier's own choice after the candidate's prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xsd.core import DecoderHandle, LosslessError, ParameterError
from xsd.decode import autoregressive

Outcome = Literal["identical", "near-tie", "divergence"]

_ROUNDING = 0.25
"""A floor above this share of the logits' standard deviation is a defect of the cache, not rounding
(bf16 stays below a tenth of it)."""


@dataclass(frozen=True)
class NoiseFloor:
    """Largest |logit of a one-row pass − logit of a many-row pass| over n positions (all vocabulary
    entries), and its mean."""

    largest: float
    mean: float
    n: int


@dataclass(frozen=True)
class Verdict:
    """position: index of the first token that differs (None when identical). margin: top-1 minus
    top-2 logit there, one-row pass. gap: best logit minus the candidate's token's there. worst_gap:
    the largest such gap over the candidate's whole answer, each after the candidate's own prefix.
    floor: the noise floor it was held against. reason: one clause for a person.
    """

    outcome: Outcome
    position: int | None = None
    reference_token: int | None = None
    candidate_token: int | None = None
    margin: float | None = None
    gap: float | None = None
    worst_gap: float | None = None
    floor: NoiseFloor | None = None
    reason: str = ""


@torch.inference_mode()
def noise_floor(verifier: DecoderHandle, samples: Iterable[Any],
                answers: Iterable[Sequence[int]]) -> NoiseFloor:
    """Calibrate on this machine: the same answer one row at a time and in one pass, compared logit
    by logit. Raises: ParameterError when no answer has a second token (nothing was compared)."""
    floors = [_floor(_one_row(verifier, sample, ids), _many_rows(verifier, sample, ids))
              for sample, ids in zip(samples, answers, strict=True)]
    n = sum(floor.n for floor in floors)
    if not n:
        raise ParameterError(
            "no answer has a second token, so one-row and many-row passes cannot be compared; "
            "calibrate on longer answers")
    return NoiseFloor(max(floor.largest for floor in floors),
                      sum(floor.mean * floor.n for floor in floors) / n, n)


@torch.inference_mode()
def certify(verifier: DecoderHandle, sample: Any, reference: Sequence[int],
            candidate: Sequence[int], *, floor: NoiseFloor | None = None) -> Verdict:
    """Compare ``candidate`` with ``reference`` (both answers' ids; the reference is the verifier's
    greedy one).

    floor: a calibrated noise floor; by default it is measured on this very sample. Costs nothing
    when the ids are identical.
    """
    reference, candidate = [int(i) for i in reference], [int(i) for i in candidate]
    if reference == candidate:
        return Verdict("identical")
    both = min(len(reference), len(candidate))
    position = next((i for i in range(both) if reference[i] != candidate[i]), both)
    if position == both:
        longer, shorter = "reference", "candidate"
        if len(candidate) > both:
            longer, shorter = shorter, longer
        return Verdict("divergence", position, reason=f"the {longer} goes on where the {shorter} "
                       f"ends, after {both} equal tokens")
    one_row = _one_row(verifier, sample, candidate)
    floor = floor or _floor(one_row, _many_rows(verifier, sample, candidate))
    said = torch.tensor(candidate, device=one_row.device)[:, None]
    gaps = (one_row.amax(-1) - one_row.gather(-1, said)[:, 0]).tolist()
    top = one_row[position].topk(2).values
    reference_gap = float(top[0] - one_row[position, reference[position]])
    ended = reference[-1] in verifier.eos_token_ids
    defect = (_defect_of_the_pass(floor, float(one_row.std()))
              or _not_a_tie(position, gaps, reference_gap, 2 * floor.largest)
              or _ends_elsewhere(position, candidate, len(reference), ended,
                                 verifier.eos_token_ids))
    reason = defect or (f"the two tokens at {position} are {gaps[position] + reference_gap:.3g} "
                        f"apart, the noise allows {2 * floor.largest:.3g}")
    return Verdict("divergence" if defect else "near-tie", position, reference[position],
                   candidate[position], float(top[0] - top[1]), gaps[position], max(gaps), floor,
                   reason)


def _defect_of_the_pass(floor: NoiseFloor, scale: float) -> str:
    if floor.largest <= _ROUNDING * scale:
        return ""
    return (f"one-row and many-row passes differ by {floor.largest:.3g} where logits spread by "
            f"{scale:.3g}: that is no rounding")


def _not_a_tie(position: int, gaps: Sequence[float], reference_gap: float, bound: float) -> str:
    """bound: twice the floor, for each of the two logits may move by it, towards the other."""
    gap = max(gaps[position], reference_gap)
    if gap > bound:
        return f"token {position} is {gap:.3g} below the best, the noise allows {bound:.3g}"
    late = next((i for i in range(position + 1, len(gaps)) if gaps[i] > bound), None)
    if late is None:
        return ""
    return (f"a tie at {position}, but token {late} is {gaps[late]:.3g} below the best after the "
            "candidate's own prefix")


def _ends_elsewhere(position: int, candidate: Sequence[int], reference_length: int,
                    reference_ended: bool, eos: frozenset[int]) -> str:
    """After a tie the answers may have other lengths; each must still end at its first EOS or at
    the common maximum."""
    n = len(candidate)
    if any(token in eos for token in candidate[:-1]):
        right = False
    elif candidate[-1] in eos:
        right = reference_ended or n <= reference_length
    else:
        right = n >= reference_length if reference_ended else n == reference_length
    return "" if right else (f"a tie at {position}, but the candidate stops after {n} tokens "
                             "without EOS or goes on after it")


def control(verifier: DecoderHandle, samples: Iterable[Any], max_new_tokens: int) -> list[Verdict]:
    """The verifier's greedy output against itself, twice. Anything but "identical" means the
    machine itself is not repeatable."""
    verdicts = []
    for sample in samples:
        first, second = (autoregressive.generate(verifier, sample, max_new_tokens).ids
                         for _ in range(2))
        verdicts.append(certify(verifier, sample, first, second))
    return verdicts


def require_lossless(verdicts: Iterable[tuple[str, Verdict]], *,
                     allow_near_ties: bool = False) -> None:
    """verdicts: (sample key, verdict) pairs. Raises: LosslessError naming the first sample that is
    not the verifier's own."""
    allowed = {"identical", "near-tie"} if allow_near_ties else {"identical"}
    bad = [(key, verdict) for key, verdict in verdicts if verdict.outcome not in allowed]
    if bad:
        key, verdict = bad[0]
        raise LosslessError(
            f"{len(bad)} outputs differ from the verifier's own, first {key} at token "
            f"{verdict.position} ({verdict.outcome}: {verdict.reason}); no speed-up is reported "
            "for them")


def _one_row(verifier: DecoderHandle, sample: Any, ids: Sequence[int]) -> Tensor:
    """Logits [n, V] that predict each of ids, fed one token at a time, as the baseline does."""
    state = verifier.prefill(sample)
    rows = [state.logits]
    for token in ids[:-1]:
        rows.append(verifier.extend(state, torch.tensor([token], device=rows[0].device))[1][-1])
    return torch.stack(rows).float()


def _many_rows(verifier: DecoderHandle, sample: Any, ids: Sequence[int]) -> Tensor:
    """The same logits [n, V] from one pass over all rows, as verification does."""
    state = verifier.prefill(sample)
    rows = state.logits[None]
    if len(ids) > 1:
        fed = torch.tensor(ids[:-1], device=rows.device)
        rows = torch.cat([rows, verifier.extend(state, fed)[1]])
    return rows.float()


def _floor(one_row: Tensor, many_rows: Tensor) -> NoiseFloor:
    difference = (one_row[1:] - many_rows[1:]).abs()  # row 0 is the prefill in both
    if not len(difference):
        return NoiseFloor(0.0, 0.0, 0)
    return NoiseFloor(float(difference.max()), float(difference.mean()), len(difference))
