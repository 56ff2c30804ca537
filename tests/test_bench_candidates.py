"""transformers' generate with our proposers: its own ids, our drafts."""

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from toy_decoder import OracleProposer
from transformers import LlamaConfig, LlamaForCausalLM

from xsd.adapters import registry
from xsd.bench import arms, baselines, candidates
from xsd.core import ParameterError
from xsd.decode import hybrid, proposers, rules, speculative

LAYERS = {"verifier": [0, 2], "drafter": [1]}
TOKENS = 12


def adapter_of(level, head):
    torch.manual_seed(1)
    options = {"vocab_size": len(head), "block": 4, "n_heads": 2, "context_layers": LAYERS}
    adapter = registry.create_adapter(level, head.shape[1],
                                      **(options if level in registry.BLOCKS else {}))
    if level in registry.BLOCKS:
        adapter.set_token_embedding(head)
    return adapter.eval()


@pytest.mark.parametrize("level", ["D1", "D5F", "L5F", "B1", "drafter"])
def test_generate_says_its_own_ids_and_is_offered_the_drafts_of_our_engine(level):
    pair, offered = tiny_pair(), []
    head = pair.verifier.head.weight
    given = {} if level == "drafter" else {level: adapter_of(level, head)}
    for sample in make_samples(3):
        proposer = arms.proposer_of(level, pair, given)
        propose, drafts = proposer.propose, []
        proposer.propose = lambda *a, propose=propose, to=drafts: to.append(propose(*a)) or to[-1]
        found = baselines.hf_generate(
            pair.verifier, sample, TOKENS,
            custom_generate=candidates.drafted_by(proposer, sample, gamma=3))
        assert found.ids == baselines.hf_generate(pair.verifier, sample, TOKENS).ids
        ours = speculative.generate(pair.verifier, arms.proposer_of(level, pair, given), sample,
                                    gamma=3, max_new_tokens=TOKENS, hide_prefill=False)
        drafted = [list(one.drafted) for one in ours.rounds if one.drafted]
        assert [one for one in drafts if one] == drafted
        offered += drafted
    assert offered


def text_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, eos_token_id=1)).eval()


@pytest.mark.parametrize("right", [0, 1, 3])
def test_a_text_model_takes_drafts_from_any_proposer_and_needs_fewer_passes(right):
    model, prompt, passes = text_model(), torch.tensor([[5, 6, 7, 8, 5, 6]]), []
    own = model.generate(prompt, max_new_tokens=24, do_sample=False)
    answer = own[0, prompt.shape[1]:].tolist()

    def script(known, gamma):
        true = answer[len(known):len(known) + gamma]
        return [t if i < right else (t + 1) % 40 for i, t in enumerate(true)]

    count = model.register_forward_hook(lambda *_: passes.append(1))
    found = model.generate(prompt, max_new_tokens=24, do_sample=False,
                           custom_generate=candidates.drafted_by(OracleProposer(script), gamma=4))
    count.remove()
    assert found.tolist() == own.tolist()
    assert len(passes) == 1 + -(-(len(answer) - 1) // (1 + right))


def test_settings_of_generate_stay_in_force():
    model, prompt = text_model(), torch.tensor([[5, 6, 7, 8, 5, 6]])
    lookup = proposers.RuleProposer(lambda _: rules.prompt_lookup([5, 6, 7, 8]), frozenset())
    for settings in ({"repetition_penalty": 1.3}, {"suppress_tokens": [7, 8]},
                     {"max_new_tokens": 1}, {"eos_token_id": 11}):
        settings = {"max_new_tokens": 16, "do_sample": False, **settings}
        drafted = candidates.drafted_by(lookup, gamma=2)
        assert model.generate(prompt, custom_generate=drafted, **settings).tolist() == \
            model.generate(prompt, **settings).tolist()
    assert "_get_candidate_generator" not in vars(model)


def test_a_tree_or_no_drafts_at_all_is_refused():
    lookup = proposers.RuleProposer(lambda _: rules.prompt_lookup([5, 6, 5, 6]), frozenset())
    tree = hybrid.TreeProposer(lookup, n_nodes=3, prices=None, eos_token_ids=frozenset())
    with pytest.raises(ParameterError, match="chains"):
        text_model().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False,
                              custom_generate=candidates.drafted_by(tree, gamma=3))
    with pytest.raises(ParameterError, match="at least 1"):
        candidates.drafted_by(lookup, gamma=0)
