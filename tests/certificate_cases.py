"""Every kind of request that the losslessness certificate is asked about: who drafts × drafts a
round × where the answer ends × where the length ends it × chain, static and dynamic tree × exact
and rounding arithmetic. The suite draws some of them; ``python tests/certificate_cases.py`` runs
all of them on toy decoders, and further ones on the tiny pair, and counts."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections import Counter

import torch
from toy_decoder import EOS, RoundingDecoder, ToyDecoder

from xsd.decode import autoregressive, certificate, proposers, speculative, trees

BODY = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
DRAFTERS = ("identical", "random", "partial")
SHAPES = ("chain", "static tree", "dynamic tree")
LOGS = [math.log(share) for share in (0.5, 0.3, 0.15)]


class Scripted(proposers.TokenByToken):
    """Knows the answer and drafts it, or nothing of it, or a part drawn anew in every round; in a
    tree the right token is any of three."""

    def __init__(self, answer, drafter, shape, vocab, seed=0):
        self.answer, self.drafter, self.shape = tuple(answer), drafter, shape
        self.vocab, self.seed = vocab, seed

    def children(self, path, k=3):
        at, path = len(self.known), tuple(path)
        draw = random.Random(f"{self.seed} {self.known} {path}")
        found = draw.sample(range(self.vocab), 3)
        reach = {"identical": 99, "random": 0,
                 "partial": random.Random(f"{self.seed} {at}").randrange(9)}[self.drafter]
        right = self.answer[at + len(path):][:1]
        if right and len(path) < reach and path == self.answer[at:at + len(path)]:
            found = [token for token in found if token != right[0]][:2]
            place = 0 if self.shape == "chain" else draw.randrange(3)
            found.insert(min(place, len(found)), right[0])
        return list(zip(found, LOGS, strict=False))

    def propose(self, gamma, stop=proposers.never):
        if self.shape == "static tree":
            return trees.static(self.children, trees.shape((3, 2, 1, 1, 1, 1, 1, 1)[:gamma]))
        if self.shape == "dynamic tree":
            return trees.dynamic(self.children, gamma, 2 * gamma + 2)
        chain = []
        while len(chain) < gamma:
            chain.append(self.children(chain)[0][0])
        return chain


def verdict(verifier, sample, drafter, shape, gamma, length, *, answer=None, seed=0, floor=None):
    """One request, judged: its verdict, and what its rounds accepted."""
    reference = autoregressive.generate(verifier, sample, length)
    whole = answer or autoregressive.generate(verifier, sample, 16).ids
    made = Scripted(whole, drafter, shape, verifier.draft_vocab_size, seed)
    got = speculative.generate(verifier, made, sample, gamma=gamma, gamma_prefill=gamma,
                               max_new_tokens=length, overlap="serial")
    said: list[int] = []
    for one in got.rounds:
        said += [*one.drafted[:one.n_accepted], *([] if one.bonus is None else [one.bonus])]
    assert tuple(said) == got.ids and len(got.ids) <= length
    found = certificate.certify(verifier, sample, reference.ids, got.ids, floor=floor)
    assert found.outcome != "identical" or got.finish == reference.finish
    return found, Counter(one.n_accepted for one in got.rounds if one.drafted)


def exact(step=1):
    """Verdicts of every ``step``-th case in exact arithmetic."""
    grid = itertools.product(DRAFTERS, range(1, 9), range(12), range(1, 14), SHAPES)
    verifier = ToyDecoder()
    for drafter, gamma, eos_at, length, shape in itertools.islice(grid, 0, None, step):
        yield verdict(verifier, (*BODY[:eos_at], EOS), drafter, shape, gamma, length)


def rounding(step=1):
    """The same where passes over many rows round differently, and two tokens are nearly equal at
    one position, at every one in turn."""
    grid = itertools.product(DRAFTERS, (1, 2, 3, 5, 8), range(1, 11), (1, 3, 6, 12), SHAPES)
    for drafter, gamma, tie_at, length, shape in itertools.islice(grid, 0, None, step):
        yield verdict(RoundingDecoder(tie_at=tie_at), (*BODY, EOS), drafter, shape, gamma, length)


def live(handle, samples, step=1, floor=None):
    """The same on a real model, of which each token of its answer in turn is made the last."""
    own = handle.eos_token_ids
    grid = itertools.product(samples, DRAFTERS, (1, 2, 4, 8), (0, 1, 3, 6), (1, 5, 10), SHAPES)
    for sample, drafter, gamma, eos_at, length, shape in itertools.islice(grid, 0, None, step):
        try:
            handle.eos_token_ids = frozenset()
            answer = autoregressive.generate(handle, sample, 12).ids
            handle.eos_token_ids = frozenset({answer[eos_at]})
            yield verdict(handle, sample, drafter, shape, gamma, length, answer=answer, floor=floor)
        finally:
            handle.eos_token_ids = own


def counted(found):
    """(cases by outcome, rounds by accepted drafts)"""
    outcomes, accepted = Counter(), Counter()
    for each, rounds in found:
        outcomes[each.outcome] += 1
        accepted += rounds
    return dict(outcomes), dict(sorted(accepted.items()))


if __name__ == "__main__":
    from models_fixtures import pair_folder, tiny_pair
    from tiny_pair import make_samples

    from xsd.models import loading

    step, total = int(sys.argv[1]) if sys.argv[1:] else 1, 0
    samples = make_samples(2, seed=3)
    half = loading.load_pair(pair_folder(), dtype=torch.bfloat16).verifier
    for name, found in (
            ("exact", exact(step)), ("rounding", rounding(step)),
            ("tiny pair, float32, small steps", live(tiny_pair().verifier, samples, step)),
            ("tiny pair, float32, transformers' cache",
             live(tiny_pair().verifier.plain(), samples, 4 * step)),
            ("tiny pair, bfloat16", live(half, samples, 4 * step))):
        outcomes, accepted = counted(found)
        total += sum(outcomes.values())
        print(f"{name}: {outcomes}; rounds by accepted drafts: {accepted}", flush=True)
        assert "divergence" not in outcomes
        assert "float32" not in name or "near-tie" not in outcomes
    print(f"{total} cases", flush=True)
