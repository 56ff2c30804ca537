"""Is this output the verifier's own? Identical ids; or a tie that is proven by its margin; or a
divergence (docs/decoding.md, "Losslessness"). A real bug looks like a tie from outside, so ties are
judged by a *clean* handle of the same checkpoint (``plain()``), never by the passes on trial."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xsd.core import DecoderHandle, LosslessError, ParameterError, not_finite
from xsd.decode import autoregressive

Outcome = Literal["identical", "near-tie", "divergence"]

_ROUNDING = 0.25
"""A floor above this share of the logits' standard deviation is a defect of the cache, not rounding
(bf16 stays below a tenth of it)."""


@dataclass(frozen=True)
class NoiseFloor:
    """Largest |logit of a one-row pass − logit of a many-row pass| over n positions."""

    largest: float
    n: int


@dataclass(frozen=True)
class Verdict:
    """position: of the first token that differs (None when identical). margin: top-1 minus top-2
    logit there, one-row pass. gap: best logit minus the candidate's token's there. worst_gap: the
    largest such gap over the candidate's whole answer, each after its own prefix. floor: the noise
    floor it was held against. reason: one clause for a person."""

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
    """Calibrate on this machine, with the handle's clean form where it has one. Raises:
    ParameterError when no answer has a second token (nothing was compared), CheckpointError where
    logits are no numbers."""
    judge = getattr(verifier, "plain", lambda: verifier)()
    floors = [_floor(_one_row(judge, sample, ids), _many_rows(judge, sample, ids))
              for sample, ids in zip(samples, answers, strict=True)]
    if not any(floor.n for floor in floors):
        raise ParameterError(
            "no answer has a second token, so one-row and many-row passes cannot be compared; "
            "calibrate on longer answers")
    if not all(math.isfinite(floor.largest) for floor in floors):
        raise not_finite(getattr(verifier, "role", "model"))
    return NoiseFloor(max(floor.largest for floor in floors), sum(floor.n for floor in floors))


@torch.inference_mode()
def certify(verifier: DecoderHandle, sample: Any, reference: Sequence[int],
            candidate: Sequence[int], *, floor: NoiseFloor | None = None) -> Verdict:
    """Compare the ids of an answer with the verifier's greedy ones; costs nothing when they are
    identical. floor: a calibrated noise floor; by default it is measured on this very sample with
    ``verifier.plain()``, which also judges. Of a handle without that nothing is a near-tie."""
    reference, candidate = [int(i) for i in reference], [int(i) for i in candidate]
    if reference == candidate:
        return Verdict("identical")
    both = min(len(reference), len(candidate))
    position = next((i for i in range(both) if reference[i] != candidate[i]), both)
    if position == both:
        names = ["reference", "candidate"]
        longer, shorter = names if len(reference) > both else names[::-1]
        return Verdict("divergence", position, reason=f"the {longer} goes on where the {shorter} "
                       f"ends, after {both} equal tokens")
    clean = hasattr(verifier, "plain")
    judge = verifier.plain() if clean else verifier
    one_row = _one_row(judge, sample, candidate)
    if not bool(one_row.isfinite().all()) or (floor and not math.isfinite(floor.largest)):
        return Verdict("divergence", position, reference[position], candidate[position],
                       reason="logits are not finite: NaN or infinity decides nothing")
    if floor is None:
        measured = _many_rows(judge, sample, candidate) if clean else one_row
        floor = _floor(one_row, measured)
    said = torch.tensor(candidate, device=one_row.device)[:, None]
    gaps = (one_row.amax(-1) - one_row.gather(-1, said)[:, 0]).tolist()
    top = one_row[position].topk(2).values
    reference_gap = float(top[0] - one_row[position, reference[position]])
    # twice the floor: each of the two logits may move by it, towards the other
    bound, scale = 2 * floor.largest, float(one_row.std())
    apart = max(gaps[position], reference_gap)
    late = next((i for i in range(position + 1, len(gaps)) if gaps[i] > bound), None)
    outcome: Outcome = "divergence"
    if floor.largest > _ROUNDING * scale:
        reason = (f"one-row and many-row passes differ by {floor.largest:.3g} where logits spread "
                  f"by {scale:.3g}: that is no rounding")
    elif apart > bound:
        reason = f"token {position} is {apart:.3g} below the best, the noise allows {bound:.3g}"
    elif late is not None:
        reason = (f"a tie at {position}, but token {late} is {gaps[late]:.3g} below the best after "
                  "the candidate's own prefix")
    elif not _ends_rightly(candidate, reference, verifier.eos_token_ids):
        reason = (f"a tie at {position}, but the candidate stops after {len(candidate)} tokens "
                  "without EOS or goes on after it")
    else:
        outcome = "near-tie"
        reason = (f"the two tokens at {position} are {gaps[position] + reference_gap:.3g} apart, "
                  f"the noise allows {bound:.3g}")
    return Verdict(outcome, position, reference[position], candidate[position],
                   float(top[0] - top[1]), gaps[position], max(gaps), floor, reason)


def _ends_rightly(candidate: Sequence[int], reference: Sequence[int], eos: frozenset[int]) -> bool:
    """After a tie lengths may differ; each answer still ends at its first EOS or the maximum."""
    n, most, ended = len(candidate), len(reference), reference[-1] in eos
    if any(token in eos for token in candidate[:-1]):
        return False
    if candidate[-1] in eos:
        return ended or n <= most
    return n >= most if ended else n == most


def control(verifier: DecoderHandle, samples: Iterable[Any], max_new_tokens: int) -> list[Verdict]:
    """The verifier's greedy output against itself: "identical", or the machine does not repeat."""
    def said(sample: Any) -> tuple[int, ...]:
        return autoregressive.generate(verifier, sample, max_new_tokens).ids

    return [certify(verifier, sample, said(sample), said(sample)) for sample in samples]


def require_lossless(verdicts: Iterable[tuple[str, Verdict]], *,
                     allow_near_ties: bool = False) -> None:
    """verdicts: (sample key, verdict). Raises: LosslessError naming the first that differs."""
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
    return NoiseFloor(float(difference.max()) if len(difference) else 0.0, len(difference))
