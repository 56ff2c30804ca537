"""Draft trees: continuations of one text, verified in one pass (docs/decoding.md draws one).
A chain of drafts is a list of ids; a tree also says which token stands before each."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from xsd.core import ParameterError, depths

Path = tuple[int, ...]
"""Draft tokens one after the other, from the verified text on."""
Children = Callable[[Path], Sequence[tuple[int, float]]]
"""What may follow a path: (id, natural log of its probability there), best first."""


@dataclass(frozen=True)
class Tree:
    """tokens: ids. parents: for each the index of the token before it, smaller than its own, -1
    after the verified text. log_probs: of the whole path to each, by who drafted it; may be
    empty. drawn: of drafts drawn at random, for each its rank among its siblings and the
    distribution [n ≤ V] it was drawn from, without the siblings before it."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    drawn: tuple[tuple[int, Tensor], ...] = field(default=(), compare=False)

    @classmethod
    def chain(cls, tokens: Sequence[int], drawn: Sequence[tuple[int, Tensor]] = ()) -> Tree:
        """Tokens one after the other."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), drawn=tuple(drawn))

    def __post_init__(self) -> None:
        """Raises: ParameterError for what is no tree, or the same token twice in one place."""
        n = len(self.tokens)
        if len(self.parents) != n or (self.log_probs and len(self.log_probs) != n) or not all(
                -1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ParameterError(
                f"a draft tree of {n} tokens needs {n} parents (and log_probs, or none), each the "
                "index of a token before it or -1")
        if len(set(zip(self.tokens, self.parents, strict=True))) < n:
            raise ParameterError("a draft tree holds the same token twice after one parent; give "
                                 "each continuation once")

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(self.tokens)

    def only(self, nodes: Iterable[int]) -> Tree:
        """These nodes in this order; the parent of each is among them, and before it."""
        nodes = list(nodes)
        place = {-1: -1, **{node: i for i, node in enumerate(nodes)}}
        return Tree(tuple(self.tokens[i] for i in nodes),
                    tuple(place[self.parents[i]] for i in nodes),
                    tuple(self.log_probs[i] for i in nodes) if self.log_probs else (),
                    tuple(self.drawn[i] for i in nodes) if self.drawn else ())

    def first(self, nodes: Sequence[int]) -> Tree:
        """The same tree with these nodes (closed towards the root) at its beginning."""
        chosen = set(nodes)
        return self.only([*nodes, *(i for i in range(len(self)) if i not in chosen)])

    def cut(self, depth: int, rows: int, eos: frozenset[int]) -> Tree:
        """The first ``rows`` nodes of at most this depth, none after EOS; EOS itself, whose row
        nobody reads, comes last."""
        alive: list[int] = []
        known, deep = set(), depths(self.parents)
        for i, parent in enumerate(self.parents):
            if len(alive) < rows and deep[i] <= depth and (parent in known or parent < 0) and not (
                    parent >= 0 and self.tokens[parent] in eos):
                alive.append(i)
                known.add(i)
        return self.only(sorted(alive, key=lambda i: self.tokens[i] in eos))

    def n_fed(self, eos: frozenset[int]) -> int:
        """How many nodes of a :meth:`cut` tree are worth a row: all before the EOS tokens."""
        return sum(token not in eos for token in self.tokens)

    def under(self, token: int) -> Sequence[int]:
        """The nodes that begin with ``token``, in their order."""
        kept: list[int] = []
        for i, parent in enumerate(self.parents):
            if parent in kept or (parent < 0 and self.tokens[i] == token):
                kept.append(i)
        return kept

    def siblings(self, parent: int) -> list[tuple[int, Tensor | None]]:
        """The nodes after this one and what each was drawn from, in the order drawn."""
        nodes = [i for i, above in enumerate(self.parents) if above == parent]
        if not self.drawn:
            return [(i, None) for i in nodes]
        return [(i, self.drawn[i][1]) for i in sorted(nodes, key=lambda i: self.drawn[i][0])]

    def walk(self, predicted: Sequence[int]) -> tuple[list[int], int | None]:
        """The nodes that the verifier agrees with, and its own token after them (None after EOS).
        predicted[0] stands after the verified text, predicted[1 + i] after node i."""
        child = {pair: i for i, pair in enumerate(zip(self.parents, self.tokens, strict=True))}
        path: list[int] = []
        at = -1
        while at + 1 < len(predicted):
            following = child.get((at, predicted[at + 1]))
            if following is None:
                return path, predicted[at + 1]
            path.append(at := following)
        return path, None


Drafts = Sequence[int] | Tree


def by_position(ids: Sequence[Sequence[int]],
                log_probs: Sequence[Sequence[float]]) -> Children:
    """Children of who drafts a block in one pass: each position's best ids [γ][k], whatever stands
    before them."""
    rows = [list(zip(*row, strict=True)) for row in zip(ids, log_probs, strict=True)]
    return lambda path: rows[len(path)] if len(path) < len(rows) else []


def shape(widths: Sequence[int]) -> list[Path]:
    """A fixed shape, as paths of ranks: ``widths[d]`` children of each token at depth d.

    >>> shape((2, 1))
    [(0,), (1,), (0, 0), (1, 0)]
    """
    return [path for depth in range(1, len(widths) + 1)
            for path in itertools.product(*map(range, widths[:depth]))]


def static(children: Children, ranks: Iterable[Path], eos: frozenset[int] = frozenset()) -> Tree:
    """The tree of a fixed shape: rank r is the (r+1)-th best child. ranks: as :func:`shape` gives
    them, parents first. What a child is not offered for is left out, as is all after EOS."""
    grown, known, found = _Grown(), {(): (-1, (), 0.0)}, {}
    for path in ranks:
        if path[:-1] not in known:
            continue
        parent, text, log_prob = known[path[:-1]]
        if text and text[-1] in eos:
            continue
        if text not in found:
            found[text] = children(text)
        if path[-1] < len(found[text]):
            token, own = found[text][path[-1]]
            known[path] = (grown.add(token, parent, log_prob + own), (*text, token), log_prob + own)
    return grown.tree()


def dynamic(children: Children, depth: int, n_nodes: int, eos: frozenset[int] = frozenset(), *,
            least: float = 0.0) -> Tree:
    """The ``n_nodes`` most probable nodes of at most this depth, best first: EAGLE-2's expansion by
    joint probability and its re-ranking in one search, because no node is likelier than the one
    before it. least: of a path's probability, below which nothing is added or followed."""
    grown, order = _Grown(), itertools.count()
    heap: list[tuple[float, int, int, Path]] = []

    def offer(parent: int, path: Path, log_prob: float) -> None:
        for token, own in children(path):
            joint = log_prob + min(own, 0.0)
            if joint > -math.inf and math.exp(joint) >= least:
                heapq.heappush(heap, (-joint, next(order), parent, (*path, token)))

    offer(-1, (), 0.0)
    while heap and len(grown.tokens) < n_nodes:
        cost, _, parent, path = heapq.heappop(heap)
        node = grown.add(path[-1], parent, -cost)
        if len(path) < depth and path[-1] not in eos and len(grown.tokens) < n_nodes:
            offer(node, path, -cost)
    return grown.tree()


class _Grown:
    """A tree while it grows."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.log_probs: list[float] = []

    def add(self, token: int, parent: int, log_prob: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.log_probs.append(log_prob)
        return len(self.tokens) - 1

    def tree(self) -> Tree:
        return Tree(tuple(self.tokens), tuple(self.parents), tuple(self.log_probs))
