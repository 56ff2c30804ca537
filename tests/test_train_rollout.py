"""Self-rollout against a plain decode loop that appends its own predictions."""

import pytest
import torch
import train_examples as examples
from test_adapters_levels import ALL, VOCABULARY, WIDTH, make, make_batch

from xsd.adapters import linear
from xsd.core import MetricError, ParameterError
from xsd.train import rollout, source


def decode_loop(adapter, batch, head, gamma, row, start):
    """Accepted drafts when position ``start`` is the last verified one: one step() at a time,
    drafter states read only when they exist."""
    length = int(batch.mask[row].sum())
    ids, drafter = batch.ids_by_verifier[row], batch.drafter[row]
    known = list(batch.verifier[row, :start + 1])
    for accepted in range(min(gamma, length - 1 - start)):
        position = start + 1 + accepted
        predicted = adapter.step(drafter[:position + 1], torch.stack(known), ids[:position])
        if int((head @ predicted).argmax()) != int(ids[position]):
            return accepted
        known.append(predicted)
    return min(gamma, length - 1 - start)


@pytest.mark.parametrize("name", ALL)
def test_counts_equal_a_plain_decode_loop(name):
    adapter, head, gamma = make(name), torch.randn(VOCABULARY, WIDTH), 3
    batch = make_batch([7, 4, 1], seed=3)
    with torch.no_grad(
    ):  # tokens that the adapter often gets right, so that partial acceptance happens
        drafts = rollout.drafted_tokens(adapter, batch, head, gamma)[..., 0]
    ids = batch.ids_by_verifier.clone()
    ids[:, 1:] = torch.where(
        torch.rand(ids[:, 1:].shape, generator=torch.Generator().manual_seed(1)) < 0.8,
        drafts[:, :-1], ids[:, 1:])
    batch = batch.__class__(**{**batch.__dict__, "ids_by_verifier": ids})
    result = rollout.self_rollout(adapter, [batch], head, gamma=gamma)
    for row, length in enumerate((7, 4, 1)):
        for start in range(7):
            want = decode_loop(adapter, batch, head, gamma, row,
                               start) if start < length - 1 else -1
            assert int(result.accepted[row, start]) == want
            assert int(result.drafted[row, start]) == (min(gamma, length - 1 -
                                                           start) if start < length - 1 else -1)


def result_of(accepted, drafted, lengths, gamma=3):
    names = [f"s{i}" for i in range(len(lengths))]
    return rollout.Rollout(torch.tensor(accepted), torch.tensor(drafted), torch.tensor(lengths),
                           names, list(range(len(names))), gamma, "teacher_forced")


def test_rounds_walk_as_decoding_does():
    #                       s = 0 accepts 2 → bonus is token 3, s = 3 accepts 0 → s = 4 accepts 1
    # (all that is left) → 6 > last
    result = result_of([[2, 3, 1, 0, 1, -1], [1, -1, -1, -1, -1, -1]],
                       [[3, 3, 3, 2, 1, -1], [1, -1, -1, -1, -1, -1]], [6, 2])
    assert result.rounds() == [[2, 0, 1], [1]]
    assert result.mean_accepted() == 1.0


def test_rates_by_draft_position():
    result = result_of([[3, 1, 0, -1]], [[3, 2, 1, -1]], [4])
    assert result.marginal() == pytest.approx([2 / 3, 1 / 2, 1.0])
    assert result.conditional() == pytest.approx([2 / 3, 1 / 2, 1.0])
    values, clusters = result.per_start()
    assert values.tolist() == [3.0] and clusters == ["s0"]


def test_a_perfect_adapter_is_accepted_to_the_end():
    answers = examples.answers(6)
    states = source.PackedStates(
        [a.__class__(**{**a.__dict__, "hidden_by_drafter": a.hidden_by_verifier}) for a in answers])
    batches = list(states.batches(torch.arange(6), 4))
    result = rollout.self_rollout(linear.fit_linear("identity", batches), batches, examples.head(),
                                  gamma=5)
    assert torch.equal(result.accepted, result.drafted)


def test_closed_form_of_the_next_state_rolls_out():
    states = source.PackedStates(examples.answers(60))
    batches = list(states.batches(torch.arange(60), 16))
    for reads in ("verifier", "both"):
        result = rollout.self_rollout(linear.fit_linear("ridge", batches, reads=reads), batches,
                                      examples.head(), gamma=2)
        assert 0 < result.mean_accepted() <= 2


def test_what_cannot_be_rolled_out_is_explained():
    with pytest.raises(ParameterError, match="gamma must be at least 1"):
        rollout.self_rollout(make("L1"), [], torch.randn(3, WIDTH), gamma=0)
    with pytest.raises(MetricError, match="no batch to roll out"):
        rollout.self_rollout(make("L1"), [], torch.randn(3, WIDTH))
    batch = make_batch([3])
    other = batch.__class__(**{**batch.__dict__, "mode": "free_running"})
    with pytest.raises(MetricError, match="cannot share one figure"):
        rollout.self_rollout(make("L1"), [batch, other], torch.randn(VOCABULARY, WIDTH))
