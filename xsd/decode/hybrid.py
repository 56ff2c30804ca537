"""Proposers made of proposers: one for each phase, or several in one tree, weighed by how often
each was right (docs/decoding.md, "Hybrids"); where prices are known, no node that does not pay."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from xsd.core import ParameterError
from xsd.decode import trees
from xsd.decode.overlap import Stop, Timeline
from xsd.decode.prices import Prices
from xsd.decode.proposers import Proposer, never
from xsd.decode.trees import Drafts, Tree


class TwoPhase:
    """One proposer for the prefill, another for the rounds; a shared drafter prefills once."""
    def __init__(self, first: Proposer, second: Proposer) -> None:
        self.first, self.second = first, second
        self.needs_verifier = first.needs_verifier
        self.context_layers = getattr(second, "context_layers", ())

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        self._active, timeline = self.first, timeline or Timeline()
        for proposer in (self.first, self.second):
            proposer.begin(sample, timeline)

    def propose(self, gamma: int, stop: Stop = never) -> Drafts:
        return self._active.propose(gamma, stop)

    def read_context(self, context: Any, length: int) -> None:
        """For a block drafter in the rounds."""
        self.second.read_context(context, length)

    @property
    def drafted_states(self) -> list[Tensor] | None:
        """Of who drafts now (acceptance.Cosine)."""
        return getattr(self._active, "drafted_states", None)

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """The first observation ends the first phase: only the second proposer is told."""
        self._active = self.second
        self.second.observe(tokens, hidden)


class Checked:
    """A proposer from outside this project. Raises: ParameterError when it is no :class:`Proposer`,
    drafts too much, or something that is no id below ``vocab_size``."""
    def __init__(self, proposer: Proposer, vocab_size: int) -> None:
        self.name = type(proposer).__name__
        missing = [part for part in ("begin", "propose", "observe", "needs_verifier")
                   if not hasattr(proposer, part)]
        if missing:
            raise ParameterError(f"{self.name} is no proposer: it lacks {', '.join(missing)} "
                                 "(decode.proposers.Proposer says what each does)")
        self.proposer, self.vocab_size = proposer, vocab_size
        self.begin, self.observe = proposer.begin, proposer.observe
        if hasattr(proposer, "children"):
            self.children, self.steps = proposer.children, getattr(proposer, "steps", True)
        self.needs_verifier = bool(proposer.needs_verifier)

    def propose(self, gamma: int, stop: Stop = never) -> Drafts:
        offered = self.proposer.propose(gamma, stop)
        drafts = list(offered)
        if len(drafts) > gamma and not isinstance(offered, Tree):
            raise ParameterError(f"{self.name} drafted {len(drafts)} tokens where at most {gamma} "
                                 "were asked for")
        for token in drafts:
            if isinstance(token, bool) or not isinstance(token, int) or not (
                    0 <= token < self.vocab_size):
                raise ParameterError(
                    f"{self.name} drafted {token!r}; a draft is a Python int, an id from 0 to "
                    f"{self.vocab_size - 1}")
        return offered if isinstance(offered, Tree) else drafts


class Calibration:
    """What share of the tokens said at a probability was right, learnt while decoding: a count for
    each tenth of probability, which begins as ``trust`` tokens that were as good as was said."""

    def __init__(self, trust: float = 4.0, bins: int = 10) -> None:
        self.right = [trust * (i + 0.5) / bins for i in range(bins)]
        self.said = [trust] * bins

    def _bin(self, probability: float) -> int:
        return min(int(probability * len(self.said)), len(self.said) - 1)

    def __call__(self, probability: float) -> float:
        at = self._bin(probability)
        return self.right[at] / self.said[at]

    def learn(self, probability: float, right: bool) -> None:
        """One token said at this probability, where the verifier's own is known."""
        at = self._bin(probability)
        self.right[at] += right
        self.said[at] += 1


class TreeProposer:
    """The most probable nodes of what ``sources`` (proposers with ``children``) offer.

    n_nodes: at most, a round. width: children asked of each source in one place. widths: a fixed
    shape in place of the most probable nodes (trees.shape). least: of a path's probability. prices:
    with them, a node is kept while what it is expected to save is more than its row costs, and a
    model is asked for another step on the same terms; without, models are asked along the path
    that they hold for the best. Behind the prefill the first source drafts a chain.
    """

    def __init__(self, *sources: Any, n_nodes: int, width: int = 3, widths: Sequence[int] = (),
                 least: float = 0.02, prices: Prices | None = None,
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.sources, self.eos = sources, eos_token_ids
        self.n_nodes, self.widths, self.least = n_nodes, widths, least
        self.width = max(width, *widths, 1)
        if prices is not None:
            self.n_nodes = min(n_nodes, max(prices.verify) - 1)
        self.prices = prices
        self.calibrations = [Calibration() for _ in sources]
        self._spent = self._gained = 0.0
        free = [one for one in sources if not one.needs_verifier]
        self.first: Proposer = free[0] if free else sources[0]
        self.needs_verifier = not free
        wanted = {tuple(getattr(one, "context_layers", ())) for one in sources} - {()}
        if len(wanted) > 1:
            raise ParameterError("block drafters of one tree must read the same layers of the "
                                 "verifier; join one of them with tables or adapters")
        self.context_layers = next(iter(wanted), ())

    def read_context(self, context: Any, length: int) -> None:
        """For a block drafter among the sources."""
        for source in self.sources:
            if getattr(source, "context_layers", ()):
                source.read_context(context, length)

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        timeline = timeline or Timeline()
        for source in self.sources:
            source.begin(sample, timeline)
        self._offers: dict[trees.Path, list[tuple[int, list[tuple[int, float]]]]] = {}

    def propose(self, gamma: int, stop: Stop = never) -> Drafts:
        if stop is not never:
            return self.first.propose(gamma, stop)
        self._joint = {(): 0.0}
        self._best: dict[int, trees.Path] = {}  # of each model, the path it holds for the best
        self._asked = 0
        if getattr(self.sources[0], "sampling", None) is not None:
            return self._drawn(gamma)
        if self.widths:
            tree = trees.static(self._children, trees.shape(self.widths[:gamma]), self.eos)
        else:
            tree = trees.dynamic(self._children, gamma, self.n_nodes, self.eos, least=self.least)
        return self._paying(tree)

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Also what was right of all that was offered on the way, in the tree or not."""
        for n, token in enumerate(tokens):
            for source, offered in self._offers.get(tuple(tokens[:n]), ()):
                for said, log_prob in offered:
                    self.calibrations[source].learn(math.exp(log_prob), said == token)
        self._offers.clear()
        self._gained += len(tokens)
        for source in self.sources:
            source.observe(tokens, hidden)

    def _drawn(self, gamma: int) -> Tree:
        """A tree of fixed shape, siblings drawn without replacement. (What chooses nodes by their
        probability after drawing them would no longer draw from the distribution it names.)"""
        source, drawn = self.sources[0], {}

        def children(path: trees.Path) -> list[tuple[int, float]]:
            wide = max(self.widths[len(path):len(path) + 1] or (1,))
            logits = source.logits_in_tree(path)
            found = [] if logits is None else source.draws(logits, wide)
            drawn.update({(*path, token): tuple(rest) for token, *rest in found})
            return [(token, 0.0) for token, *_ in found]

        tree = trees.static(children, trees.shape((self.widths or (1,) * gamma)[:gamma]), self.eos)
        paths: list[trees.Path] = []
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        return replace(tree, drawn=tuple(drawn[path] for path in paths))

    def _children(self, path: trees.Path) -> list[tuple[int, float]]:
        best: dict[int, float] = {}
        for number, source in enumerate(self.sources):
            if source.steps and not self._worth_a_step(number, path):
                continue
            offered = source.children(path, self.width)
            if source.steps and offered:
                self._asked += 1
                if self._best.get(number, ()) == path:
                    self._best[number] = (*path, offered[0][0])
            self._offers.setdefault(path, []).append((number, offered))
            for token, log_prob in offered:
                share = self.calibrations[number](math.exp(log_prob))
                best[token] = max(best.get(token, 0.0), share)
        ranked = sorted(best.items(), key=lambda one: -one[1])
        found = [(token, math.log(share)) for token, share in ranked if share > 0]
        for token, log_prob in found:
            self._joint[(*path, token)] = self._joint[path] + log_prob
        return found

    # --- what pays

    @property
    def _token_s(self) -> float:
        """What a token has cost so far, the verifier's own step before anything is known."""
        one = self.prices.verify_s(1)
        return min(one, (self._spent + one) / (self._gained + 1))

    def _worth_a_step(self, number: int, path: trees.Path) -> bool:
        if self.prices is None:
            return self._best.get(number, ()) == path
        row = self.prices.verify_s(2) - self.prices.verify_s(1)
        return math.exp(self._joint[path]) * self._token_s > self.prices.draft_s + row

    def _paying(self, tree: Tree) -> Tree:
        """The first nodes, as many as are expected to save most; best first, they are a tree."""
        if self.prices is None:
            return tree
        price, token_s, saved = self.prices, self._token_s, 0.0
        best, kept = 0.0, 0
        for n, log_prob in enumerate(tree.log_probs[:self.n_nodes], start=1):
            saved += math.exp(log_prob) * token_s
            worth = saved - (price.verify_s(n + 1) - price.verify_s(1))
            if worth > best:
                best, kept = worth, n
        self._spent += self._asked * price.draft_s + price.verify_s(kept + 1) + price.round_s
        return tree.only(range(kept))
