"""What of a draft may stay: sampling has the verifier's own distribution, whatever is drafted and
however; lossy modes say what they are."""

import math
from collections import Counter

import pytest
import torch
from toy_decoder import WIDTH, CopyAdapter, OracleProposer, SoftDecoder, ToyDecoder

from xsd.core import ParameterError
from xsd.decode import acceptance, autoregressive, hybrid, proposers, speculative, tracks, trees

BODY = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)
LENGTH = 3
SETTINGS = {"temperature": 1.2, "top_k": 4, "top_p": 0.97}


def exact(settings):
    """The probability of every answer of at most LENGTH tokens, from the verifier alone."""
    verifier, sampling = SoftDecoder(), acceptance.Sampling(**settings)
    found, open_texts = {}, {(): 1.0}
    while open_texts:
        text, share = open_texts.popitem()
        for token, p in enumerate(sampling.probabilities(verifier.row(text)).tolist()):
            if p > 0:
                longer = (*text, token)
                ends = token in verifier.eos_token_ids or len(longer) == LENGTH
                (found if ends else open_texts)[longer] = share * p
    return found


def drawn(proposer, settings, n, gamma=2):
    """Answers of n requests, each with its own seed, and how their rounds ended."""
    verifier, said, rounds = SoftDecoder(), Counter(), Counter()
    for seed in range(n):
        if hasattr(proposer, "sources"):
            proposer.sources[0].sampling = acceptance.Sampling(**settings, seed=7 * seed)
        elif hasattr(proposer, "sampling"):
            proposer.sampling = acceptance.Sampling(**settings, seed=7 * seed)
        got = speculative.generate(verifier, proposer, (), gamma=gamma, max_new_tokens=LENGTH,
                                   hide_prefill=seed % 2 == 0, overlap="serial",
                                   acceptance=acceptance.Sampling(**settings, seed=7 * seed + 3))
        said[got.ids] += 1
        rounds += Counter("bonus" if r.n_accepted == r.depth else "residual"
                          for r in got.rounds if r.drafted)
    return said, rounds


def chance(said, expected, at):
    """The chi-square test's p of the answers' first ``at`` tokens; rare ones are taken together."""
    n, cells, rest = said.total(), [], [0.0, 0.0]
    seen, wanted = Counter(), Counter()
    for answer, count in said.items():
        seen[answer[:at]] += count
    for answer, share in expected.items():
        wanted[answer[:at]] += n * share
    assert set(seen) <= set(wanted)
    for text, count in wanted.items():
        if count >= 5:
            cells.append((seen[text], count))
        else:
            rest = [rest[0] + seen[text], rest[1] + count]
    if rest[1] >= 5:
        cells.append(tuple(rest))
    if len(cells) < 2:
        return 1.0  # certain
    value = sum((a - b)**2 / b for a, b in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64),
                                         torch.tensor(value / 2, dtype=torch.float64)))


def drafter(**more):
    return proposers.DrafterTokens(tracks.DrafterTrack(SoftDecoder(salt=1)), 5, frozenset({0}))


def certain_tree():
    children = trees.by_position([[1, 2], [3, 0], [2, 4]], [[-0.5, -1], [-0.5, -1], [-0.5, -1]])
    made = OracleProposer(None)
    made.propose = lambda gamma, stop=None: trees.dynamic(children, gamma, 5, frozenset({0}))
    return made


DRAFTING = {
    "drawn chain": drafter,
    "drawn tree": lambda: hybrid.TreeProposer(drafter(), n_nodes=9, widths=(3, 2),
                                              eos_token_ids=frozenset({0})),
    "certain chain": lambda: OracleProposer(lambda known, gamma: [2, 1, 3][:gamma]),
    "certain tree": certain_tree,
}


@pytest.mark.parametrize("drafting", DRAFTING)
def test_samples_have_the_verifiers_own_distribution_at_every_position(drafting):
    said, rounds = drawn(DRAFTING[drafting](), SETTINGS, 400)
    assert min(rounds["bonus"], rounds["residual"]) > 25
    expected = exact(SETTINGS)
    assert sum(expected.values()) == pytest.approx(1)
    assert all(chance(said, expected, at) > 1e-3 for at in range(1, LENGTH + 1))


@pytest.mark.parametrize("drafting", ["drawn chain", "drawn tree"])
def test_a_biased_residual_is_found(drafting, monkeypatch):
    monkeypatch.setattr(acceptance.Sampling, "residual", staticmethod(lambda left, drawn: left))
    said, _ = drawn(DRAFTING[drafting](), SETTINGS, 400)
    assert chance(said, exact(SETTINGS), LENGTH) < 1e-6


def test_the_same_seed_gives_the_same_tokens_and_another_one_others():
    def said(seed):
        return autoregressive.generate(SoftDecoder(), (), 12,
                                       acceptance=acceptance.Sampling(seed=seed)).ids

    assert said(1) == said(1) and len({said(seed) for seed in range(8)}) > 4


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))

    def kept(**settings):
        return acceptance.Sampling(**settings).probabilities(logits)

    assert kept().tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert kept(top_k=2).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert kept(top_p=0.7).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert kept(top_p=0.71).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert kept(top_p=1e-9).tolist() == [1, 0, 0, 0]
    assert kept(temperature=1e-4).tolist() == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": math.inf},
                                      {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_that_leave_no_distribution_are_refused(settings):
    with pytest.raises(ParameterError, match="leave nothing to draw from"):
        acceptance.Sampling(**settings)


def test_a_drawn_draft_is_kept_as_often_as_the_distributions_overlap():
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.1, 0.5, 0.3])
    rule = acceptance.Sampling(seed=5).begin()
    kept, rows = 0, [p.double(), p.double()]
    for _ in range(2000):
        token = rule.draw(q.double())
        path, _ = rule.judge(trees.Tree.chain([token], [(0, q.double())]), rows, None, None)
        kept += len(path)
    assert kept / 2000 == pytest.approx(0.4, abs=0.04)  # Σ min(p, q)


def test_accepting_by_cosine_keeps_what_is_near_and_says_that_it_is_lossy():
    class Leaning(CopyAdapter):
        def step(self, drafter_states, verifier_states):
            return super().step(drafter_states, verifier_states) + 0.3

    def run(rule, slips=(2, 5)):
        made = proposers.AdapterProposer(tracks.DrafterTrack(ToyDecoder(slips)), Leaning(),
                                         lambda h: h, WIDTH)
        return speculative.generate(ToyDecoder(), made, BODY, gamma=4, max_new_tokens=10,
                                    overlap="serial", acceptance=rule).ids

    own = autoregressive.generate(ToyDecoder(), BODY, 10).ids
    assert run(acceptance.Cosine(tau=0.99)) == own != run(acceptance.Cosine(tau=0.1))
    assert acceptance.GREEDY.lossless and acceptance.Sampling().lossless
    assert not acceptance.Cosine().lossless and not acceptance.Typical().lossless
    with pytest.raises(ParameterError, match="needs a chain drafted by an adapter"):
        speculative.generate(ToyDecoder(), OracleProposer(lambda known, gamma: [3]), BODY, gamma=1,
                             max_new_tokens=4, overlap="serial", acceptance=acceptance.Cosine())


def test_typical_acceptance_keeps_the_likely_and_ends_with_the_argmax():
    rows = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [0.1, 0.1, 0.8]]))
    rule = acceptance.Typical(epsilon=0.25, delta=1.0)
    found = rule.rows(rows, None)
    assert rule.judge([1, 0], found, None, None) == ([0, 1], 2)
    assert rule.judge([2, 0], found, None, None) == ([], 0)
    tree, rows = trees.Tree((2, 1, 1), (-1, -1, 0)), [found[0], found[2], found[1]]
    assert rule.judge(tree, rows, None, None) == ([1], 0)
