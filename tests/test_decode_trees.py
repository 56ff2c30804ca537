"""Draft trees: their shapes, and that what leaves is the verifier's own whatever they hold."""

import itertools
import random

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from toy_decoder import EOS, WIDTH, OracleProposer, ToyDecoder

from xsd.core import ParameterError, depths
from xsd.decode import acceptance, autoregressive, speculative, trees
from xsd.models import small_steps

BODY = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)
#        -1 → 0 → 2 → 4,  0 → 3,  -1 → 1 → 5
TREE = trees.Tree((7, 8, 9, 5, 6, 4), (-1, -1, 0, 0, 2, 1))


def test_a_chain_is_a_tree_without_branches():
    chain = trees.Tree(BODY[:4], (-1, 0, 1, 2))
    for predicted in ([3, 1, 9, 9, 9], [3, 1, 4, 1, 5], [7, 0, 0, 0, 0]):
        path, bonus = chain.walk(predicted)
        assert path == list(range(len(path)))
        assert (len(path), bonus) == acceptance.judge(BODY[:4], predicted)


def test_the_walk_follows_the_verifier_from_child_to_child():
    assert TREE.walk([7, 9, 0, 6, 0, 3, 0]) == ([0, 2, 4], 3)
    assert TREE.walk([8, 0, 2, 0, 0, 0, 0]) == ([1], 2)
    assert TREE.walk([3, 0, 0, 0, 0, 0, 0]) == ([], 3)
    assert depths(TREE.parents) == [1, 1, 2, 2, 3, 2] and TREE.under(8) == [1, 5]


def test_a_cut_tree_is_as_deep_and_wide_as_there_is_room_and_ends_at_eos():
    assert TREE.cut(1, 99, frozenset()) == TREE.only([0, 1])
    assert TREE.cut(9, 4, frozenset()) == TREE.only([0, 1, 2, 3])
    ended = TREE.cut(9, 99, frozenset({9}))  # nothing after 9, and 9 itself last
    assert ended.tokens == (7, 8, 5, 4, 9) and ended.n_fed(frozenset({9})) == 4


@pytest.mark.parametrize("tokens,parents", [((1, 2), (-1,)), ((1, 2), (-1, 1)), ((1, 2), (-2, 0)),
                                            ((1, 1), (-1, -1))])
def test_what_is_no_tree_is_refused(tokens, parents):
    with pytest.raises(ParameterError, match="a draft tree"):
        trees.Tree(tokens, parents)


def test_a_static_tree_has_its_shape_and_a_dynamic_one_the_most_probable_nodes():
    table = trees.by_position([[1, 2], [3, 4], [5, 6]], [[-0.2, -1.7], [-0.1, -2.3], [-0.7, -0.7]])
    full = trees.static(table, trees.shape((2, 1, 1)))
    assert full.tokens == (1, 2, 3, 3, 5, 5) and full.parents == (-1, -1, 0, 1, 2, 3)
    assert trees.static(table, trees.shape((2, 3)), frozenset({1})).tokens == (1, 2, 3, 4)
    for n in range(1, 15):
        best = trees.dynamic(table, 3, n)
        assert len(best) == min(n, 14) and list(best.log_probs) == sorted(best.log_probs)[::-1]
    everything = sorted(best.log_probs)[::-1]
    assert list(trees.dynamic(table, 3, 5).log_probs) == everything[:5]
    assert len(trees.dynamic(table, 3, 99, least=0.1)) == sum(p >= -2.302 for p in everything)


def grown(verifier, choice, known, depth, n, eos_rate=0.1):
    """A tree of n nodes at most, with the right path somewhere in it or cut short."""
    tokens, parents, texts = [], [], []
    for _ in range(n):
        parent = choice.randrange(-1, len(tokens)) if choice.random() < 0.5 else len(tokens) - 1
        text = [*known, *(texts[parent] if parent >= 0 else [])]
        right = verifier.next(text)
        token = right if choice.random() < 0.6 else (
            EOS if choice.random() < eos_rate else choice.randrange(1, WIDTH))
        if (token, parent) in zip(tokens, parents, strict=True) or (
                len(text) - len(known) >= depth):
            continue
        tokens.append(token)
        parents.append(parent)
        texts.append([*text[len(known):], token])
    return trees.Tree(tuple(tokens), tuple(parents))


def test_whatever_a_tree_holds_the_answer_is_the_verifiers_own():
    choice, verifier, branched = random.Random(0), ToyDecoder(), 0
    for eos_at, length, gamma in itertools.product(range(11), range(1, 13), (1, 2, 4, 8)):
        sample = (*BODY[:eos_at], EOS)
        expected = autoregressive.generate(verifier, sample, length)
        offered = OracleProposer(None)
        offered.propose = lambda gamma, stop=None, offered=offered: grown(
            verifier, choice, offered.known, gamma + 2, 12)  # deeper than asked for, too
        got = speculative.generate(verifier, offered, sample, gamma=gamma, gamma_prefill=gamma,
                                   max_new_tokens=length, overlap="serial")
        assert got.ids == expected.ids and got.finish == expected.finish
        said = [token for r in got.rounds for token in (
            *r.drafted[:r.n_accepted], *(() if r.bonus is None else (r.bonus,)))]
        assert tuple(said) == got.ids
        branched += sum(r.n_accepted > 0 and r.n_accepted < len(r.drafted) for r in got.rounds)
        assert all(r.n_accepted <= r.depth <= len(r.drafted) for r in got.rounds)
    assert branched > 300


@pytest.mark.parametrize("steps", ["small", "plain", "static"])
@torch.no_grad()
def test_each_row_of_a_tree_is_what_its_path_alone_would_give(steps):
    handle = tiny_pair().verifier.plain(steps)
    sample = make_samples(1, seed=3)[0]
    state = handle.prefill(sample)
    start = state.length
    hidden, _ = handle.extend(state, torch.tensor(TREE.tokens), TREE.parents)
    assert state.length == start + len(TREE)
    for node, depth in enumerate(depths(TREE.parents)):
        path = [node]
        while TREE.parents[path[0]] >= 0:
            path.insert(0, TREE.parents[path[0]])
        alone = handle.prefill(sample)
        rows, _ = handle.extend(alone, torch.tensor([TREE.tokens[i] for i in path]))
        torch.testing.assert_close(hidden[node], rows[-1], atol=2e-5, rtol=0)
        assert len(path) == depth
    # the path 7 9 6 stays: rows 0, 2 and 4 move together, and the answer goes on as if alone
    handle.rollback(state, start, [start, start + 2, start + 4])
    alone = handle.prefill(sample)
    handle.extend(alone, torch.tensor([7, 9, 6]))
    assert state.length == alone.length == start + 3
    more = torch.tensor([11, 12])
    torch.testing.assert_close(handle.extend(state, more)[0], handle.extend(alone, more)[0],
                               atol=2e-5, rtol=0)


def test_mask_and_positions_fit_a_cache_of_fixed_size():
    places, seen = small_steps.tree_rows(TREE.parents, 3, room=12)
    assert places.tolist() == [3, 3, 4, 4, 5, 4] and seen.shape == (6, 12)
    assert seen[4].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 5, 7]
