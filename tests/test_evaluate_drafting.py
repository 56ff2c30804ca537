"""What an adapter drafts on stored pairs, against a plain decode loop that appends its own
predictions."""

import numpy as np
import pytest
import torch
import train_examples as examples
from test_adapters_levels import ALL, VOCABULARY, WIDTH, make, make_batch

from xsd.adapters import linear
from xsd.core import MetricError, ParameterError
from xsd.evaluate import curves, drafting, rounds, table
from xsd.train import source


def decode_loop(adapter, batch, head, gamma, row, start):
    """Accepted drafts when position ``start`` is the last verified one: one step() at a time,
    drafter states read only when they exist."""
    length = int(batch.mask[row].sum())
    ids, drafter = batch.ids_by_verifier[row], batch.drafter[row]
    known = list(batch.verifier[row, :start + 1])
    for accepted in range(min(gamma, length - 1 - start)):
        position = start + 1 + accepted
        seen = start + 2 if adapter.verified_only else position + 1
        predicted = adapter.step(drafter[:seen], torch.stack(known), ids[:position])
        if int((head @ predicted).argmax()) != int(ids[position]):
            return accepted
        known.append(predicted)
    return min(gamma, length - 1 - start)


def with_ids(batch, ids):
    return batch.__class__(**{**batch.__dict__, "ids_by_verifier": ids})


def often_right(adapter, batch, head):
    """The batch with tokens that the adapter often gets right, so that partial acceptance
    happens."""
    with torch.no_grad():
        said = (adapter.align(batch).aligned @ head.T).argmax(-1)
    ids, at = batch.ids_by_verifier.clone(), 1 - adapter.shift
    keep = torch.rand(ids[:, 1:].shape, generator=torch.Generator().manual_seed(1)) < 0.8
    ids[:, 1:] = torch.where(keep, said[:, at:], ids[:, 1:])
    return with_ids(batch, ids)


@pytest.mark.parametrize("name", ALL)
def test_accepted_drafts_equal_a_plain_decode_loop(name):
    adapter, head, gamma = make(name), torch.randn(VOCABULARY, WIDTH), 3
    batch = often_right(adapter, make_batch([7, 4, 1], seed=3), head)
    tokens = table.drafted(table.of_batches({"": adapter}, [batch], head, gamma=gamma))
    found = {(line.sample, line.position): line.accepted for line in tokens.itertuples()}
    assert found == {(row, start): decode_loop(adapter, batch, head, gamma, row, start)
                     for row, length in enumerate((7, 4, 1)) for start in range(length - 1)}


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("name", ["L5F", "B1", "L4"])
def test_a_position_holds_the_draft_of_the_round_that_reaches_it(name, gamma):
    """The rounds that the matches give are those that the runs give: a level that feeds on its own
    predictions is judged on them."""
    adapter, head = make(name), torch.randn(VOCABULARY, WIDTH)
    batch = often_right(adapter, make_batch([7, 6, 2], seed=5), head)
    tokens = table.drafted(table.of_batches({"": adapter}, [batch], head, gamma=gamma))
    _, (match, runs), inside = table.answers(tokens, "match", "accepted")
    own, rolled = (rounds.walk(some, inside.sum(axis=1), gamma)
                   for some in (rounds.runs_of(match, gamma), runs))
    np.testing.assert_array_equal(own.accepted, rolled.accepted)
    np.testing.assert_array_equal(own.request, rolled.request)


@pytest.mark.parametrize("name", ["L1", "L5F"])
def test_one_step_follows_the_verified_prefix_and_has_its_probability(name):
    adapter, head = make(name), torch.randn(VOCABULARY, WIDTH)
    batch = make_batch([7, 4, 1], seed=3)
    with torch.no_grad():
        aligned, target, ids, mask = adapter.align(batch)
    logits = aligned[mask] @ head.T
    found = drafting.one_step(adapter, batch, head, top_k=3)
    np.testing.assert_array_equal(found["draft_id"], logits.argmax(-1))
    np.testing.assert_array_equal(found["one_step_match"], logits.argmax(-1) == ids[mask])
    best = logits.topk(3).indices == ids[mask][:, None]
    np.testing.assert_array_equal(
        found["one_step_rank"], torch.where(best.any(-1), best.int().argmax(-1), drafting.MISSED))
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(found["draft_probability"], logits.softmax(-1).amax(-1), **close)
    loss = torch.nn.functional.cross_entropy(logits, ids[mask], reduction="none")
    np.testing.assert_allclose(found["cross_entropy"], loss, **close)
    cosine = torch.nn.functional.cosine_similarity(aligned[mask], target[mask], dim=-1)
    np.testing.assert_allclose(found["one_step_cosine"], cosine, **close)
    first = 0 if adapter.shift else -1
    assert found["position"].tolist() == [*range(first, 6), *range(first, 3), *range(first, 0)]


def test_an_adapter_with_a_draft_vocabulary_is_judged_by_what_it_may_draft():
    head = torch.randn(VOCABULARY, WIDTH)
    adapter = make("L1")
    batch = often_right(adapter, make_batch([7, 6, 5], seed=3), head)
    whole = table.of_batches({"": adapter}, [batch], head, gamma=3)
    adapter.set_draft_vocabulary(torch.arange(0, VOCABULARY, 2))
    own = table.of_batches({"": adapter}, [batch], head, gamma=3)
    even = own["verifier_id"] % 2 == 0
    assert not own["match"][~even].any()  # a token outside is never drafted
    assert own["match"][even & whole["match"]].all()  # among fewer the right one still wins
    assert own["cross_entropy"].equals(whole["cross_entropy"])


def test_rates_by_draft_weigh_every_start_alike():
    match = [[True, True, True, False]]
    tokens = table.answers_as_rows(match, gamma=3)
    found = curves.by_draft(tokens, 3)
    assert tokens["accepted"].tolist() == [3, 2, 1, 0]
    assert found["marginal"].tolist() == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert found["conditional"].tolist() == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert found["n"].tolist() == [4, 3, 2]


def test_a_perfect_adapter_is_accepted_to_the_end():
    answers = examples.answers(6)
    states = source.PackedStates(
        [a.__class__(**{**a.__dict__, "hidden_by_drafter": a.hidden_by_verifier}) for a in answers])
    batches = list(states.batches(torch.arange(6), 4))
    adapter = linear.fit_linear("identity", batches)
    tokens = table.drafted(table.of_batches({"": adapter}, batches, examples.head(), gamma=5))
    left = tokens.groupby("sample")["position"].transform("max") - tokens["position"] + 1
    assert tokens["match"].all() and (tokens["accepted"] == left.clip(upper=5)).all()


def test_closed_form_of_the_next_state_rolls_out():
    states = source.PackedStates(examples.answers(60))
    batches = list(states.batches(torch.arange(60), 16))
    for reads in ("verifier", "both"):
        adapter = linear.fit_linear("ridge", batches, reads=reads)
        each = table.counts(table.of_batches({"": adapter}, batches, examples.head(), gamma=2), 2)
        assert 0 < each["accepted"].sum() / each["rounds"].sum() <= 2


def test_what_cannot_be_measured_is_explained():
    head, batch = torch.randn(VOCABULARY, WIDTH), make_batch([3])
    with pytest.raises(MetricError, match=r"gamma must be at least 1 .* not 0"):
        table.of_batches({"B1": make("B1")}, [batch], head, gamma=0)
    with pytest.raises(MetricError, match="no batch held a token to predict"):
        table.of_batches({"L1": make("L1")}, [], head, gamma=2)
    other = batch.__class__(**{**batch.__dict__, "mode": "free_running"})
    with pytest.raises(MetricError, match="measure each mode by itself"):
        table.of_batches({"L1": make("L1")}, [batch, other], head, gamma=2)

    class Ahead:
        level, shift, draft_ids = "mine", 1, None

        def align(self, batch):
            later = batch.verifier[:, 1:]
            return later, later, batch.ids_by_verifier[:, 1:], batch.mask[:, 1:]

    with pytest.raises(ParameterError, match="mine predicts the next state but cannot be unrolled"):
        table.of_batches({"mine": Ahead()}, [batch], head, gamma=2)


@pytest.mark.parametrize("name", ["L4", "L5F", "B1"])
def test_alternatives_say_of_each_row_of_the_table_what_else_could_have_been_drafted(name):
    adapter, head, gamma = make(name), torch.randn(VOCABULARY, WIDTH), 3
    batch = often_right(adapter, make_batch([7], seed=5), head)
    tokens = table.of_batches({"": adapter}, [batch], head, gamma=gamma, top_k=VOCABULARY)
    found = drafting.alternatives(adapter, batch, head, gamma=gamma, top_k=3)
    assert found["position"].tolist() == tokens["position"].tolist()
    assert [ids[0] for ids in found["draft_ids"]] == tokens["draft_id"].tolist()
    np.testing.assert_allclose([p[0] for p in found["draft_probabilities"]],
                               tokens["draft_probability"], rtol=1e-5)
    assert ((found["rank"] == 0) == tokens["match"]).all()
    assert ((found["margin"] == 0) == tokens["match"]).all() and (found["certainty"] >= 0).all()
    if name == "L4":  # one that reads the drafter drafts the same in a loop and after one step
        assert found["rank"].tolist() == tokens["one_step_rank"].tolist()


def test_alternatives_know_the_drafters_own_head_and_a_draft_vocabulary():
    adapter, head = make("L1"), torch.randn(VOCABULARY, WIDTH)
    batch, own = make_batch([5], seed=3), torch.randn(VOCABULARY, make_batch([5]).drafter.shape[-1])
    found = drafting.alternatives(None, batch, head, gamma=3, top_k=2, drafter_head=own)
    said = (batch.drafter[0] @ own.T).topk(2).indices
    assert found["position"].tolist() == [-1, 0, 1, 2, 3]
    assert found["draft_ids"].tolist() == said.tolist()
    odd = batch.ids_by_verifier[0] % 2 == 1
    adapter.set_draft_vocabulary(torch.arange(0, VOCABULARY, 2))
    found = drafting.alternatives(adapter, batch, head, gamma=3)
    assert ((found["rank"] == -1).to_numpy() == odd.numpy()).all()
    assert all(token % 2 == 0 for ids in found["draft_ids"] for token in ids)
