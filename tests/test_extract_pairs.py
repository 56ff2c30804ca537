"""Both kinds of pairs, from a tiny real pair."""

from dataclasses import replace

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples

from xsd.extract import pairs

TOKENS = 6


@pytest.fixture(scope="module")
def samples():
    return make_samples(5)


@pytest.fixture(scope="module")
def forced(samples):
    return pairs.teacher_forced_pairs(tiny_pair(), samples, TOKENS, batch_size=3)


@pytest.fixture(scope="module")
def free(samples):
    return pairs.free_running_pairs(tiny_pair(), samples, TOKENS, batch_size=3)


def test_pairs_keep_the_order_and_the_names_of_their_samples(samples, forced, free):
    for found in (forced, free):
        assert [(p.sequence, p.clip, p.question, p.split)
                for p in found] == [(s.sequence, s.clip, s.question, s.split) for s in samples]
    assert {p.mode for p in forced} == {"teacher_forced"} and {p.mode
                                                               for p in free} == {"free_running"}


def test_each_models_own_tokens_are_the_argmax_of_its_own_states(forced, free):
    pair = tiny_pair()
    for states in (*forced, *free):
        assert torch.equal(
            pair.drafter.lm_head(states.hidden_by_drafter).argmax(-1), states.ids_by_drafter)
        assert torch.equal(
            pair.verifier.lm_head(states.hidden_by_verifier).argmax(-1), states.ids_by_verifier)


def test_the_verifiers_generated_states_are_those_of_a_forced_pass(samples, forced):
    again = tiny_pair().verifier.force(samples, [states.ids_by_verifier for states in forced])
    for states, other in zip(forced, again, strict=True):
        # Same sums in another order: float32 rounding through three layers.
        torch.testing.assert_close(states.hidden_by_verifier, other.hidden, rtol=1e-3, atol=1e-4)


def test_teacher_forced_drafter_states_follow_the_verifiers_tokens(samples, forced):
    drafter = tiny_pair().drafter
    states, state = forced[1], drafter.prefill(samples[1])
    hidden = [state.hidden, *drafter.extend(state, states.ids_by_verifier[:-1])[0]]
    torch.testing.assert_close(states.hidden_by_drafter, torch.stack(hidden), rtol=1e-3, atol=1e-4)


def test_a_forced_answer_ends_with_the_first_token_that_only_the_verifier_knows(samples):
    pair = tiny_pair()
    answer = pair.verifier.generate(samples[:1], TOKENS)[0]
    foreign = replace(answer, ids=torch.tensor([5, pair.draft_vocab_size, 7]),
                      hidden=answer.hidden[:3])
    states = pairs.teacher_forced_pairs(pair, samples[:1], TOKENS, verifier=[foreign])[0]
    assert states.ids_by_verifier.tolist() == [5, pair.draft_vocab_size]
    assert len(states.hidden_by_drafter) == len(states.hidden_by_verifier) == 2


def test_free_running_drafter_states_follow_its_own_tokens(samples, free):
    own = tiny_pair().drafter.generate([samples[2]], TOKENS)[0]
    assert torch.equal(free[2].ids_by_drafter, own.ids)
    torch.testing.assert_close(free[2].hidden_by_drafter, own.hidden, rtol=1e-3, atol=1e-4)


def test_both_modes_share_the_verifiers_answer(samples):
    answers = tiny_pair().verifier.generate(samples, TOKENS)
    for mode in pairs.MODES:
        for states, answer in zip(
                pairs.by_layer(mode, tiny_pair(), samples, TOKENS, verifier=answers)[-1], answers,
                strict=True):
            n = len(states.ids_by_verifier)
            assert torch.equal(states.ids_by_verifier, answer.ids[:n]) and torch.equal(
                states.hidden_by_verifier, answer.hidden[:n])
