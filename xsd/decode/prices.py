"""What the parts of a request cost, and the one way in which the curve v(K), one verifier pass over
K rows, is read: a straight line between measured widths, refused outside them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from xsd.core import ParameterError


@dataclass(frozen=True)
class Prices:
    """Measured costs of one machine and one pair, in seconds (bench.costs). draft_s: a drafter
    step, the adapter and the LM head. verify: {K: one verifier pass over K rows}, K = 1 included.
    round_s: what a round costs beside its drafts and its pass. overlap: share of the drafter's
    prefill and first drafts that truly runs beside the verifier's prefill. contention: how many
    times longer that prefill then takes."""

    verifier_prefill_s: float
    drafter_prefill_s: float
    draft_s: float
    verify: Mapping[int, float]
    round_s: float = 0.0
    overlap: float = 1.0
    contention: float = 1.0

    def __post_init__(self) -> None:
        """Raises: ParameterError without v(1), or for what is no time or share."""
        if 1 not in self.verify:
            raise ParameterError(
                "verify needs the cost of a single-token pass (K = 1), the verifier's ordinary "
                "step; measure v(K) with costs.verification_curve from K = 1 on")
        times = (self.verifier_prefill_s, self.drafter_prefill_s, self.draft_s, self.round_s,
                 *self.verify.values())
        if (not all(math.isfinite(t) and t >= 0 for t in times) or not 0 <= self.overlap <= 1
                or self.contention < 1):
            raise ParameterError("prices must be finite times of at least 0 s, with overlap in "
                                 "[0, 1] and contention at least 1")

    def verify_s(self, rows: float) -> float:
        """v(rows) in seconds. Raises: ParameterError outside the measured widths."""
        widths = sorted(self.verify)
        if not widths[0] <= rows <= widths[-1]:
            raise ParameterError(
                f"v({rows}) was not measured (K = {widths[0]} … {widths[-1]}); measure the "
                "verification curve up to that many rows")
        return float(np.interp(rows, widths, [self.verify[width] for width in widths]))

    @property
    def contended_prefill_s(self) -> float:
        """The verifier's prefill with the drafter at work beside it."""
        return self.verifier_prefill_s * (self.contention if self.overlap else 1.0)

    def exposed_s(self, drafting_s: float = 0.0) -> float:
        """What the verifier's prefill does not hide of the drafter's prefill and ``drafting_s``."""
        lane = self.drafter_prefill_s + drafting_s
        late = max(0.0, lane - self.verifier_prefill_s)
        return (1 - self.overlap) * lane + self.overlap * late
