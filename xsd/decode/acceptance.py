"""What of a draft may stay (docs/lossless.md): greedy, the verifier's own ids; sampled, its own
distribution; or lossy, which is neither and says so."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from xsd.core import ParameterError, not_finite
from xsd.decode.trees import Drafts, Tree

Kept = tuple[list[int], int | None]
"""The accepted nodes, one below the other, and the verifier's own token after them (None: EOS)."""


def greedy(logits: Tensor, handle: object) -> list[int]:
    """The best id of each row of logits [n, V]. Raises: CheckpointError naming the handle's role
    where they are no numbers."""
    best = logits.argmax(-1, keepdim=True)  # of a row with NaN: the NaN
    if not all(map(math.isfinite, logits.gather(-1, best)[:, 0].tolist())):
        raise not_finite(getattr(handle, "role", "model"))
    return best[:, 0].tolist()


def judge(drafts: Sequence[int], predicted: Sequence[int]) -> tuple[int, int | None]:
    """Length of the correct prefix of ``drafts``, and the verifier's own token after it (None where
    the last draft was EOS, which is never fed). ``predicted[i]`` stands where ``drafts[i]`` does.

    >>> judge([5, 6, 7], [5, 6, 9, 1]), judge([5, 6], [5, 6, 8]), judge([5, 0], [5, 0])
    ((2, 9), (2, 8), (2, None))
    """
    n = 0
    while n < len(drafts) and n < len(predicted) and drafts[n] == predicted[n]:
        n += 1
    return n, predicted[n] if n < len(predicted) else None


@dataclass(frozen=True)
class Greedy:
    """Each token is the argmax of the verifier's row: a round reads rows as ids."""

    lossless = True

    def begin(self) -> Greedy:
        """The state of one request."""
        return self

    def rows(self, logits: Tensor, handle: Any) -> list[Any]:
        """What is decided by, of each row of logits [n, V]. Raises: as :func:`greedy`."""
        return greedy(logits, handle)

    def said(self, row: Any) -> int:
        """The verifier's own token where no draft stays."""
        return row

    def only(self, token: int, row: Any) -> Any:
        """The row of a place whose token is known."""
        return token

    def judge(self, drafts: Drafts, rows: Sequence[Any], states: Tensor, proposer: Any) -> Kept:
        """rows[0] and states[0] [D_v]: after the verified text; rows[1 + i]: after draft i, fewer
        where no row was fed."""
        if isinstance(drafts, Tree):
            return drafts.walk(rows)
        n, bonus = judge(drafts, rows)
        return list(range(n)), bonus


@dataclass(frozen=True)
class Sampling(Greedy):
    """Tokens of the verifier's distribution at this temperature, among its ``top_k`` likeliest (0:
    all) and then the fewest whose probabilities reach ``top_p``; the same seed, the same tokens.

    Exact: Leviathan et al. 2023 for chains; in trees siblings are tried one after the other against
    what the ones before left over (Miao et al. 2024, SpecInfer, without replacement). A draft that
    was drawn brings the distribution it was drawn from (Tree.drawn), any other counts as certain.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises: ParameterError for settings that leave no distribution."""
        if not (self.temperature > 0 and math.isfinite(self.temperature) and self.top_k >= 0
                and 0 < self.top_p <= 1):
            raise ParameterError(
                f"temperature {self.temperature}, top_k {self.top_k} and top_p {self.top_p} leave "
                "nothing to draw from: temperature above 0 (greedy decoding has none), top_k of at "
                "least 1 or 0 for all, top_p above 0 up to 1")

    def begin(self) -> Sampling:
        mixed = random.Random(self.seed).getrandbits(63)  # torch's streams of near seeds are alike
        return replace(self, generator=torch.Generator().manual_seed(mixed))

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] → float64 [..., V] on the CPU."""
        scores = logits.double().cpu() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        found = scores.softmax(-1)
        if self.top_p < 1:
            ranked, order = found.sort(descending=True, stable=True)
            beyond = ranked.cumsum(-1) - ranked >= self.top_p  # reached before this one
            found = found.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
            found = found / found.sum(-1, keepdim=True)
        return found

    def draw(self, row: Tensor) -> int:
        """A token of a row of probabilities [V]."""
        return int(torch.multinomial(row, 1, generator=self.generator))

    def rows(self, logits: Tensor, handle: Any) -> list[Any]:
        greedy(logits, handle)  # refuses what is no number
        return list(self.probabilities(logits))

    def said(self, row: Any) -> int:
        return self.draw(row)

    def only(self, token: int, row: Any) -> Any:
        return torch.zeros_like(row).index_fill_(0, torch.tensor(token), 1.0)

    def judge(self, drafts: Drafts, rows: Sequence[Any], states: Tensor, proposer: Any) -> Kept:
        tree = drafts if isinstance(drafts, Tree) else Tree.chain(drafts)
        path: list[int] = []
        at = -1
        while at + 1 < len(rows):
            left, stays = rows[at + 1], None
            for node, given in tree.siblings(at):
                drawn_from = self._whole(given, tree.tokens[node], left)
                chance = float(left[tree.tokens[node]] / drawn_from[tree.tokens[node]])
                if float(torch.rand((), generator=self.generator, dtype=torch.float64)) < chance:
                    stays = node
                    break
                left = self.residual(left, drawn_from)
            if stays is None:
                return path, self.draw(left)
            path.append(at := stays)
        return path, None

    @staticmethod
    def residual(left: Tensor, drawn_from: Tensor) -> Tensor:
        """What a refused draft leaves over, [V]."""
        rest = (left - drawn_from).clamp_min(0.0)
        total = rest.sum()
        return rest / total if float(total) > 0 else left  # equal: nothing can be refused

    def _whole(self, given: Tensor | None, token: int, left: Tensor) -> Tensor:
        """The distribution [V] that a draft was drawn from."""
        found = torch.zeros_like(left)
        if given is None:
            found[token] = 1.0
        else:
            found[:len(given)] = given
        return found


@dataclass(frozen=True)
class Typical(Sampling):
    """Lossy: a draft stays where its probability is above min(epsilon, delta · exp(−entropy)) (Cai
    et al. 2024, Medusa, "typical acceptance"), the likeliest of several; else the argmax."""

    lossless = False
    epsilon: float = 0.09
    delta: float = 0.3

    def begin(self) -> Typical:
        return self

    def said(self, row: Any) -> int:
        return int(row.argmax())

    def judge(self, drafts: Drafts, rows: Sequence[Any], states: Tensor, proposer: Any) -> Kept:
        tree = drafts if isinstance(drafts, Tree) else Tree.chain(drafts)
        path: list[int] = []
        at = -1
        while at + 1 < len(rows):
            row = rows[at + 1]
            entropy = float(-(row * row.clamp_min(1e-300).log()).sum())
            least = min(self.epsilon, self.delta * math.exp(-entropy))
            chances = [(float(row[tree.tokens[node]]), node) for node, _ in tree.siblings(at)]
            share, node = max(chances, default=(0.0, -1))
            if share <= least:
                return path, self.said(row)
            path.append(at := node)
        return path, None


@dataclass(frozen=True)
class Cosine(Greedy):
    """Lossy, as the reference accepts: a draft stays where the state that it was drafted from has a
    cosine above ``tau`` to the verifier's, whatever token that says. Chains of an adapter alone."""

    lossless = False
    tau: float = 0.9

    def judge(self, drafts: Drafts, rows: Sequence[Any], states: Tensor, proposer: Any) -> Kept:
        guesses = getattr(proposer, "drafted_states", None)
        if isinstance(drafts, Tree) or guesses is None:
            raise ParameterError("accepting by cosine needs a chain drafted by an adapter: the "
                                 "states that its drafts come from are what is compared")
        n = 0
        while n < len(drafts) and n < len(rows) and (drafts[n] == rows[n] or float(
                torch.cosine_similarity(guesses[n].float(), states[n].float(), dim=0)) > self.tau):
            n += 1
        return list(range(n)), rows[n] if n < len(rows) else None


GREEDY = Greedy()
