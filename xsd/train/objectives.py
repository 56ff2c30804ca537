"""Objectives, named and composable: ``parse("mse + 0.5*cosine + cross_entropy")``
(docs/adapters.md, section 4). Every term is a mean over the real positions, handed in flat:
aligned, target [N, D], ids int64 [N], optional weights [N]. Terms that need logits run through the
frozen verifier head in chunks, after Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989).
Through a DraftHead distributions are over its k ids, renormalised; cross-entropy is 0 where the
token is not among them."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xsd import files
from xsd.adapters.heads import CHUNK, DraftHead, Head, logits_of
from xsd.core import ParameterError, TrainingError

_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?"
Term = Callable[[Tensor, Tensor, Tensor, "Head | None", "Tensor | None"], Tensor]

STATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda aligned, target: (aligned - target).pow(2).mean(-1),
    "cosine": lambda aligned, target: 1 - F.cosine_similarity(aligned, target, dim=-1),
    # Huber with beta 1, EAGLE's regression loss
    "smooth_l1": lambda aligned, target: F.smooth_l1_loss(aligned, target,
                                                          reduction="none").mean(-1),
}
"""States against states: one value per row, over the width."""


def _of_states(name: str) -> Term:
    def term(aligned: Tensor, target: Tensor, ids: Tensor, head: Head | None = None,
             weights: Tensor | None = None) -> Tensor:
        if name == "mse" and weights is None:
            return F.mse_loss(aligned, target)  # the same mean in one pass
        rows = STATES[name](aligned, target)
        return rows.mean() if weights is None else (rows * weights).sum() / weights.sum()

    return term


def _cross_entropy(head: Head, aligned: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    ids = head.rows[ids] if isinstance(head, DraftHead) else ids
    return F.cross_entropy(logits_of(head, aligned).float(), ids, reduction="none", ignore_index=-1)


def _kl(head: Head, aligned: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    drafted = logits_of(head, aligned).float().log_softmax(-1)
    true = logits_of(head, target).float().log_softmax(-1)
    return (true.exp() * (true - drafted)).sum(-1)


def _overlap(head: Head, aligned: Tensor, target: Tensor) -> Tensor:
    drafted = logits_of(head, aligned).float().softmax(-1)
    true = logits_of(head, target).float().softmax(-1)
    return torch.minimum(drafted, true).sum(-1)


Rows = Callable[[Head, Tensor, Tensor, Tensor], Tensor]
ROWS: dict[str, Rows] = {
    # -log p(verifier's token) under head(aligned)
    "cross_entropy": _cross_entropy,
    # KL(p_verifier ‖ p_aligned), nats: zero where both heads say the same
    "kl": _kl,
    # 1 - Σ min(p, q), the chance that speculative sampling rejects (Leviathan et al. 2023)
    "total_variation": lambda head, aligned, target, ids: 1 - _overlap(head, aligned, target),
    # -log Σ min(p, q): the acceptance itself as a likelihood (LK loss)
    "likelihood_of_acceptance":
        lambda head, aligned, target, ids: -_overlap(head, aligned, target).clamp_min(1e-12).log(),
}
"""Tokens, through the frozen head: one value per row, of rows that fit into memory together."""


class _Chunked(torch.autograd.Function):
    """Weighted mean of ``rows`` over chunks; the gradient by ``aligned`` is finished in the forward
    pass and only scaled in the backward."""

    @staticmethod
    def forward(context, aligned: Tensor, target: Tensor, ids: Tensor, weights: Tensor, head: Head,
                rows: Rows, chunk: int) -> Tensor:
        total, norm = aligned.new_zeros((), dtype=torch.float32), weights.sum()
        gradient = torch.empty_like(aligned) if context.needs_input_grad[0] else None
        for start in range(0, len(aligned), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                piece = aligned[part].detach().requires_grad_(gradient is not None)
                loss = (rows(head, piece, target[part], ids[part]) * weights[part]).sum() / norm
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(loss, piece)
            total += loss.detach()
        context.gradient = gradient
        return total

    @staticmethod
    def backward(context, upstream: Tensor):
        return context.gradient * upstream, None, None, None, None, None, None


def _through_head(name: str) -> Term:
    def term(aligned: Tensor, target: Tensor, ids: Tensor, head: Head | None = None,
             weights: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
        if head is None:
            raise TrainingError(f"objective {name!r} needs the verifier's LM head; pass head= (a "
                                "weight [V, D]), for shards dataset.head('verifier')")
        weights = torch.ones(len(aligned), device=aligned.device) if weights is None else weights
        return _Chunked.apply(aligned, target.detach(), ids, weights, head, ROWS[name], chunk)

    return term


TERMS: dict[str, Term] = {**{name: _of_states(name) for name in STATES},
                          **{name: _through_head(name) for name in ROWS}}
PRESETS = {"mse_cosine": "mse + 0.5*cosine", "tokens": "mse + 0.5*cosine + cross_entropy"}
"""``mse_cosine`` is the reference's; ``tokens`` adds what decides: the verifier's token."""


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms. weights: by term. own: a user's by their "module:function"."""

    weights: dict[str, float]
    own: dict[str, Term] = field(default_factory=dict)

    @property
    def needs_head(self) -> bool:
        """Whether a term of ours goes through the LM head."""
        return bool(ROWS.keys() & self.weights)

    def __str__(self) -> str:
        return " + ".join(name if weight == 1 else f"{weight:g}*{name}"
                          for name, weight in self.weights.items())

    def __call__(self, aligned: Tensor, target: Tensor, ids: Tensor, mask: Tensor,
                 head: Head | None = None, weights: Tensor | None = None) -> dict[str, Tensor]:
        """All terms and their weighted sum ``total``. aligned, target: [B, S, D]. ids: int64
        [B, S]. mask: bool [B, S]; padded positions have no effect at all. weights: [B, S] or None.
        Raises: TrainingError when nothing is unmasked, or a term lacks its head."""
        return self.flat(aligned[mask], target[mask], ids[mask], head,
                         None if weights is None else weights[mask])

    def flat(self, aligned: Tensor, target: Tensor, ids: Tensor, head: Head | None = None,
             weights: Tensor | None = None) -> dict[str, Tensor]:
        """The same over real positions alone: aligned, target [N, D], ids, weights [N]."""
        if len(aligned) == 0:
            raise TrainingError("an objective was asked for a batch without a real position; drop "
                                "empty answers from the dataset")
        terms = {name: _own(name, self.own[name], aligned, target, ids, head, weights)
                 if name in self.own else TERMS[name](aligned, target, ids, head, weights)
                 for name in self.weights}
        weighed = [self.weights[name] * term.float() for name, term in terms.items()]
        return {"total": torch.stack(weighed).sum(), **terms}


def _own(name: str, term: Term, *states: Any) -> Tensor:
    """A term of one's own. Raises: TrainingError when it fails or gives no scalar."""
    try:
        value = term(*states)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise TrainingError(f"the term {name} cannot be called with (aligned, target, ids, head, "
                            f"weights): {error}; see docs/extending.md") from error
    if not isinstance(value, Tensor) or value.dim():
        raise TrainingError(f"the term {name} gives {type(value).__name__} "
                            f"{list(getattr(value, 'shape', []))}; it is to give a scalar tensor")
    return value


def parse(text: str) -> Objective:
    """``"mse + 0.5*cosine + 0.1*my_terms:contrast"`` or a name of PRESETS → Objective. A term
    "module:function" is your own, called like ours: (aligned [N, D], target [N, D], ids int64 [N],
    head or None, weights [N] or None) → scalar, over real positions alone. Raises: ParameterError
    naming the unknown term and the known ones."""
    weights: dict[str, float] = {}
    own: dict[str, Term] = {}
    said = repr(text) if len(str(text)) < 200 else repr(str(text)[:200]) + " …"
    for part in PRESETS.get(str(text), str(text)).split("+"):
        found = re.fullmatch(rf"\s*(?:({_NUMBER})\s*\*\s*)?(\w+|[\w.]+:[\w.]+)\s*", part)
        if not found or (":" not in found[2] and found[2] not in TERMS):
            raise ParameterError(
                f"objective {said}: {part.strip()[:80]!r} is no term; write e.g. 'mse + 0.5*cosine'"
                f" with {', '.join(TERMS)}, {', '.join(PRESETS)}, or a function of your own as "
                "module:function")
        name = found[2]
        weights[name] = weights.get(name, 0.0) + float(found[1] or 1)
        if ":" in name:
            own[name] = files.import_object(name)
            if not callable(own[name]):
                raise ParameterError(f"objective {said}: {name} is no function; write "
                                     "module:function")
    if not 0 < sum(weights.values()) < math.inf:
        raise ParameterError(f"objective {said} weighs its terms with {sum(weights.values()):g}; "
                             "give weights above 0")
    return Objective(weights, own)
