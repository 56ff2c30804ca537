"""Trees from any proposer, and several in one tree: lossless, and each path drafted as if it had
been walked alone."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from toy_decoder import EOS, WIDTH, CopyAdapter, ToyDecoder

from xsd.adapters import registry
from xsd.decode import (
    autoregressive,
    blocks,
    hybrid,
    proposers,
    rules,
    speculative,
    tracks,
    trees,
)
from xsd.decode.prices import Prices

BODY = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)
ANSWERS = [(3, 1, 4, 1, 6, 9, 2, EOS), (3, 1, 5, 9, 2, 6, 5, EOS), (3, 2, 4, 1, 5, EOS)]
PRICES = Prices(10.0, 4.0, 0.2, {1: 3.7, 9: 7.0, 17: 9.0})


def table():
    return proposers.RuleProposer(lambda sample: rules.NGramTable(ANSWERS), frozenset({EOS}))


def own_tokens(slips):
    return proposers.DrafterTokens(tracks.DrafterTrack(ToyDecoder(slips)), WIDTH, frozenset({EOS}))


def adapted(reads, slips):
    return proposers.AdapterProposer(tracks.DrafterTrack(ToyDecoder(slips)), CopyAdapter(reads),
                                     lambda h: 5 * h, WIDTH, frozenset({EOS}))


SOURCES = {
    "table": lambda slips: [table()],
    "drafter": lambda slips: [own_tokens(slips)],
    "L": lambda slips: [adapted("drafter", slips)],
    "L5F": lambda slips: [adapted("both", slips)],
    "table, lookup, L5F": lambda slips: [
        table(), proposers.RuleProposer(lambda sample: rules.prompt_lookup()),
        adapted("both", slips)],
}


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("options", [{}, {"prices": PRICES}, {"widths": (3, 2, 1)}],
                         ids=["likeliest", "priced", "static"])
def test_a_tree_of_any_source_is_lossless(sources, options):
    for slips, eos_at, length, gamma in itertools.product(((), (1, 4), range(12)), (2, 11), (2, 14),
                                                          (1, 4)):
        sample, verifier = (*BODY[:eos_at], EOS), ToyDecoder()
        expected = autoregressive.generate(ToyDecoder(), sample, length)
        made = hybrid.TreeProposer(*sources(slips), n_nodes=12, eos_token_ids=frozenset({EOS}),
                                   **options)
        for _ in range(2):  # the second request knows what the first one learnt
            got = speculative.generate(verifier, made, sample, gamma=gamma, max_new_tokens=length,
                                       overlap="serial")
            assert (got.ids, got.finish) == (expected.ids, expected.finish)
            assert all(r.depth <= gamma for r in got.rounds[1:])


@pytest.mark.parametrize("level", ["L4", "L5F", "B1", "X1", "L3"])
def test_each_path_is_drafted_as_if_it_were_walked_alone(level):
    pair, sample = tiny_pair(), make_samples(1, seed=3)[0]
    torch.manual_seed(0)
    adapter = registry.create_adapter(level, hidden_size=32).eval()
    state = pair.verifier.prefill(sample)
    known = [int(state.logits.argmax()), 7, 8]
    states = torch.cat([state.hidden[None], pair.verifier.extend(
        state, torch.tensor(known[:2]))[0]])

    def fresh():
        made = proposers.AdapterProposer(tracks.DrafterTrack(pair.drafter), adapter,
                                         pair.verifier.lm_head, 300)
        made.begin(sample)
        made.observe(known, states)
        return made

    one = fresh()
    wide = trees.dynamic(lambda path: one.children(path, 3), 4, 12, least=0.0)
    assert len(wide) == 12 and len(set(wide.parents)) > 3
    again = fresh()
    for path in [(), *sorted(one._guesses or [(), *((t,) for t in wide.tokens[:2])])]:
        alone = fresh()
        found = [alone.children(path[:n], 3) for n in range(len(path) + 1)][-1]
        for n in range(len(path) + 1):
            other = again.children(path[:n], 3)
        assert [token for token, _ in other] == [token for token, _ in found]
        assert [log for _, log in other] == pytest.approx([log for _, log in found], abs=1e-4)
    # a chain is drafted as before, after the tree has been judged
    one.observe([5, 6], states[:2])
    alone.observe([5, 6], states[:2])
    assert one.propose(4) == alone.propose(4)


def test_a_table_offers_what_followed_with_its_share():
    ngram = rules.NGramTable([(1, 2, 3), (1, 2, 4), (1, 2, 3), (5, 6)])
    found = ngram.children([1, 2], 3)
    assert found[0] == (3, math.log(2 / 4)) and found[1] == (4, math.log(1 / 4))
    assert found[0][0] == ngram([1, 2]) and len(found) == 3
    assert rules.NGramTable([]).children([1], 2) == []


def test_what_was_right_before_weighs_more():
    learnt = hybrid.Calibration()
    assert learnt(0.92) == pytest.approx(0.95) and learnt(0.1) == pytest.approx(0.15)
    for _ in range(96):
        learnt.learn(0.93, False)
    assert learnt(0.92) < 0.05 and learnt(1.0) == learnt(0.92)


def test_a_node_that_does_not_pay_for_its_row_is_not_offered():
    sure = {(): [(3, math.log(0.9)), (4, math.log(0.05))], (3,): [(1, math.log(0.8))]}

    class Sure(proposers.TokenByToken):
        def children(self, path, k):
            return sure.get(tuple(path), [])

    steep = Prices(10.0, 4.0, 0.2, {1: 1.0, 2: 1.2, 3: 1.4, 4: 9.0})
    made = hybrid.TreeProposer(Sure(), n_nodes=9, prices=steep)
    made.begin(BODY)
    assert made.propose(5).tokens == (3, 1)
    dear = hybrid.TreeProposer(Sure(), n_nodes=9, prices=Prices(1.0, 1.0, 1.0, {1: 1.0, 4: 9.0}))
    dear.begin(BODY)
    assert len(dear.propose(5)) == 0
    free = hybrid.TreeProposer(Sure(), n_nodes=9)
    free.begin(BODY)
    assert free.propose(5).tokens == (3, 1, 4) and free.propose(1).tokens == (3, 4)


def test_a_text_model_answers_spec_bench_with_its_own_ids():
    from transformers import LlamaConfig, LlamaForCausalLM

    from xsd.bench import spec_bench

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, eos_token_id=1)).eval()
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6]])
    own = model.generate(prompt, max_new_tokens=24, do_sample=False)
    found = spec_bench.forward_func({"input_ids": prompt}, model, None, 24, gamma=4)
    assert found[0].tolist() == own.tolist() and sum(found[3]) == found[1] == own.shape[1] - 6
    assert found[2] == len(found[3]) <= found[1]


def test_a_blocks_places_stand_in_a_tree_beside_a_table():
    class Block(blocks.BlockProposer):
        passes, needs_verifier = 0, True

        def __init__(self):
            self.adapter = SimpleNamespace(draft_ids=torch.tensor([1, 3, 4, 6]))

        def begin(self, sample, timeline=None):
            self.known, self._block = [], None

        def logits(self, gamma):
            self.passes += 1
            return torch.tensor([[0.0, 3.0, 1.0, 0.0], [4.0, 0.0, 0.0, 2.0]])[:gamma]

    block = Block()
    made = hybrid.TreeProposer(block, table(), n_nodes=6, eos_token_ids=frozenset({EOS}))
    made.begin(BODY)
    made.observe([3], None)
    tree = made.propose(3)
    assert block.passes == 1 and len(tree) == 6 and {1, 3} <= set(tree.tokens)
    assert block.children((), 2)[0][0] == 3 and block.children((4,), 1)[0][0] == 1
    assert block.children((4, 1), 3) == []  # a block of two
