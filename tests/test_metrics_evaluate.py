"""One pass of real adapters over batches, with floors on the same tokens."""

import dataclasses

import pytest
import torch

from xsd.adapters.registry import create_adapter
from xsd.core import Batch, MetricError
from xsd.evaluate.evaluate import evaluate

D, V, S = 16, 40, 8


def make_batches(head, mode="teacher_forced"):
    g = torch.Generator().manual_seed(0)
    out = []
    for k in range(3):
        verifier = torch.randn(4, S, D, generator=g)
        lengths = torch.tensor([S, 5, 3, 1])
        out.append(
            Batch(drafter=verifier + 0.3 * torch.randn(4, S, D, generator=g), verifier=verifier,
                  ids_by_drafter=torch.randint(0, V, (4, S), generator=g),
                  ids_by_verifier=(verifier @ head.T).argmax(-1), mask=torch.arange(S)
                  < lengths[:, None], sequence=[f"drive{k}"] * 4,
                  index=list(range(4 * k, 4 * k + 4)), mode=mode,
                  ))
    return out


@pytest.fixture
def head():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("level", ["L1", "L5"])
def test_adapter_and_floors_are_counted_on_the_same_tokens(level, head):
    torch.manual_seed(0)
    adapter = create_adapter(level, hidden_size=D)
    batches = make_batches(head)
    out = evaluate(adapter, batches, head, gamma=3)
    n = sum(int(b.mask[:, out.shift:].sum()) for b in batches)
    result = out.tokens.result(n_resamples=50)
    assert result.acceptance.n == n == out.hidden.result(n_resamples=50).cosine.n
    assert out.left_out == (3 if out.shift else 0)
    comparison = out.above_floors(out.answers, n_resamples=50)
    assert set(comparison.floors) == {"position mode", "4-gram", "prompt lookup", "drafter tokens"}
    assert all(value.n == n for value in (comparison.arm, *comparison.floors.values()))
    assert comparison.arm.value == result.acceptance.value
    rounds = out.above_floors(out.answers, per_round=True, n_resamples=50)
    assert rounds.arm.value == pytest.approx(result.rounds.mean_accepted)
    assert out.reliability.result(n_resamples=50).n == n


def test_identity_adapter_on_identical_states_accepts_everything(head):
    batches = [dataclasses.replace(b, drafter=b.verifier) for b in make_batches(head)]
    adapter = create_adapter("L1", hidden_size=D)

    class Identity:
        shift = 0

        def align(self, batch):
            return batch.drafter, batch.verifier, batch.ids_by_verifier, batch.mask

    result = evaluate(Identity(), batches, head).tokens.result(n_resamples=50)
    assert (result.acceptance.value, result.acceptance.low) == (1.0, 1.0)
    adapter.train()
    evaluate(adapter, batches, head)
    assert adapter.training  # left as it was found


def test_modes_are_not_mixed_and_nothing_is_not_measured(head):
    adapter = create_adapter("L1", hidden_size=D)
    with pytest.raises(MetricError, match="measure each mode by itself"):
        evaluate(adapter, [*make_batches(head), *make_batches(head, "free_running")], head)
    with pytest.raises(MetricError, match="no batch held a token"):
        evaluate(adapter, [], head)


def test_an_adapter_with_a_draft_vocabulary_is_judged_by_what_it_may_draft(head):
    batches = make_batches(head)
    adapter = create_adapter("L1", hidden_size=D)
    whole = evaluate(adapter, batches, head)
    adapter.set_draft_vocabulary(torch.arange(0, V, 2))
    own = evaluate(adapter, batches, head)
    even = torch.cat([b.ids_by_verifier[b.mask] % 2 == 0 for b in batches])
    hits = torch.cat(
        [own.tokens.matches()[0][i, :len(answer)] for i, answer in enumerate(own.answers)])
    assert not hits[~even].any()  # a token outside is never drafted
    before = torch.cat(
        [whole.tokens.matches()[0][i, :len(answer)] for i, answer in enumerate(whole.answers)])
    assert hits[even][before[even]].all()  # among fewer candidates the right one still wins
    assert own.tokens.result(n_resamples=50).cross_entropy.value == whole.tokens.result(
        n_resamples=50).cross_entropy.value
