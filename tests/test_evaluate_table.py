"""The token table: one pass of real adapters over batches, and what is counted from it."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from xsd.adapters.registry import create_adapter
from xsd.core import Batch, MetricError
from xsd.evaluate import floors, table

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
                  ids_by_verifier=(verifier @ head.T).argmax(-1),
                  mask=torch.arange(S) < lengths[:, None], sequence=[f"drive{k}"] * 4,
                  index=list(range(4 * k, 4 * k + 4)), mode=mode))
    return out


@pytest.fixture
def head():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1))


def on_its_own_drafts(floor, ids, sample, gamma):
    """Drafts accepted in each round of a plain loop after the answer's first token."""
    at, found = 1, []
    while at < len(ids):
        drafted = floor.draft(ids[:at], min(gamma, len(ids) - at), sample)
        k = 0
        while k < len(drafted) and drafted[k] == ids[at + k]:
            k += 1
        found.append(k)
        at += k + 1
    return found


def test_adapters_drafter_and_floors_are_counted_on_the_same_tokens(head):
    torch.manual_seed(0)
    adapters = {level: create_adapter(level, hidden_size=D) for level in ("L1", "L5", "B1")}
    batches = make_batches(head)
    tokens = table.of_batches(adapters, batches, head, gamma=3, drafter=True)
    answers = [b.ids_by_verifier[i, :int(b.mask[i].sum())].tolist() for b in batches
               for i in range(4)]
    floor = floors.ngram(answers, 4)
    rows = table.answers_as_rows(floor.match(answers), 3, level="ngram", first=-1,
                                 clusters=[f"drive{i // 4}" for i in range(12)])
    counted = pd.concat([table.counts(one, 3) for one in (tokens, rows)])
    parts = [part for _, part in counted.groupby("level", sort=False)]
    assert len(parts) == 5
    for part in parts:
        assert part["positions"].tolist() == [7, 4, 2] * 3  # an answer of one token has none
        assert part["sample"].tolist() == parts[0]["sample"].tolist()
        assert part["sequence"].tolist() == parts[0]["sequence"].tolist()
    rolled = [on_its_own_drafts(floor, ids, i, 3) for i, ids in enumerate(answers) if len(ids) > 1]
    assert parts[-1]["accepted"].tolist() == [sum(one) for one in rolled]
    assert parts[-1]["rounds"].tolist() == [len(one) for one in rolled]
    first = tokens[tokens["position"] == -1]
    assert set(first["level"]) == {"L1", "L5", table.DRAFTER}  # B1 is not asked about it
    assert len(table.drafted(tokens)) == 4 * 3 * (7 + 4 + 2)


def test_a_perfect_adapter_accepts_everything_and_is_left_in_its_mode(head):
    batches = [dataclasses.replace(b, drafter=b.verifier) for b in make_batches(head)]

    class Identity:
        shift = 0

        def align(self, batch):
            return batch.drafter, batch.verifier, batch.ids_by_verifier, batch.mask

    adapter = create_adapter("L1", hidden_size=D).train()
    tokens = table.of_batches({"own": Identity(), "L1": adapter}, batches, head, gamma=5)
    own = tokens[tokens["level"] == "own"]
    assert own["match"].all() and (own["one_step_rank"] == 0).all()
    assert np.allclose(own["cosine"], 1) and (own["accepted"].max(), adapter.training) == (5, True)


def test_without_gamma_no_head_is_applied(head):
    tokens = table.of_batches({"L1": create_adapter("L1", hidden_size=D)}, make_batches(head),
                              head[:, :3], gamma=None)  # a head that does not fit
    assert list(tokens.columns) == [
        "level", "sample", "sequence", "position", "verifier_id", "one_step_cosine"
    ]


def test_tables_of_several_sets_are_one_with_a_column_that_says_which(head):
    adapters = {"L1": create_adapter("L1", hidden_size=D)}
    tokens = table.of_batches(adapters, make_batches(head), head, gamma=3)
    other = tokens.assign(level=pd.Categorical(["L4"] * len(tokens)))
    whole = table.join({"a": tokens, "b": other})
    assert whole["data"].tolist() == ["a"] * len(tokens) + ["b"] * len(tokens)
    assert isinstance(whole["level"].dtype, pd.CategoricalDtype)
    counted = table.counts(whole, 3)
    assert counted["data"].tolist() == ["a"] * 9 + ["b"] * 9
    assert counted["accepted"].tolist()[:9] == counted["accepted"].tolist()[9:]


def test_answers_are_taken_position_by_position_whatever_the_order_of_rows(head):
    adapters = {"L1": create_adapter("L1", hidden_size=D)}
    tokens = table.of_batches(adapters, make_batches(head), head, gamma=3)
    about, (ids,), inside = table.answers(tokens, "verifier_id")
    shuffled = tokens.sample(frac=1, random_state=1)
    other, (again,), _ = table.answers(shuffled, "verifier_id")
    place = {sample: i for i, sample in enumerate(other["sample"])}
    order = [place[sample] for sample in about["sample"]]
    assert np.array_equal(ids, again[order]) and inside.sum(axis=1).tolist() == [8, 5, 3, 1] * 3


def test_what_is_no_table_is_named(head):
    with pytest.raises(MetricError, match=r"lacks the column\(s\) position, cosine"):
        table.check(pd.DataFrame({"level": ["L1"], "sample": [0], "sequence": ["a"]}), "cosine")
    with pytest.raises(MetricError, match="no answer has a position to draft"):
        table.counts(table.answers_as_rows([[True]], 3, first=-1), 3)
