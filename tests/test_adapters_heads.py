"""A reduced draft vocabulary: which tokens, what the head then says, what it costs, and that it is
drafted live as offline."""

import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
import train_examples as examples
from test_adapters_levels import VOCABULARY, WIDTH, make, make_batch

from xsd.adapters import heads, registry
from xsd.core import CheckpointError, ParameterError, TrainingError
from xsd.decode import proposers
from xsd.evaluate import drafting, metrics, table
from xsd.train import fit, objectives, source


def test_the_most_frequent_tokens_are_taken_and_doubts_go_to_the_smaller_id():
    answers = [[3, 3, 3, 1], torch.tensor([1, 7, 5])]
    assert heads.most_frequent(answers, 3).tolist() == [1, 3, 5]
    assert heads.most_frequent(answers, 99).tolist() == [1, 3, 5, 7]
    with pytest.raises(ParameterError,
                       match="needs at least one id and answers to count, not k = 0 of 7 tokens"):
        heads.most_frequent(answers, 0)
    with pytest.raises(ParameterError, match="distinct ids below 4"):
        heads.draft_head(torch.randn(4, 2), torch.tensor([1, 4]))


def test_rows_of_the_head_say_what_the_whole_head_says_among_them():
    head, hidden = torch.randn(VOCABULARY, WIDTH), torch.randn(2, 5, WIDTH)
    ids = torch.tensor([1, 4, 8, 10])
    reduced = heads.draft_head(head, ids)
    want = (hidden @ head.T)[..., ids]
    torch.testing.assert_close(heads.logits_of(reduced, hidden), want)
    assert torch.equal(heads.top_tokens(reduced, hidden), ids[want.argmax(-1)])
    rows = hidden[0]
    targets = torch.tensor([4, 10, 3, 8, 0])  # 3 and 0 cannot be drafted and ask for nothing
    aligned = rows.clone().requires_grad_()
    loss = objectives.TERMS["cross_entropy"](aligned, rows, targets, reduced)
    by_hand = -sum(
        float(want[0, i].log_softmax(0)[ids.tolist().index(int(targets[i]))])
        for i in (0, 1, 3)) / 5
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert aligned.grad[2].abs().sum() == 0 and aligned.grad[0].abs().sum() > 0


def test_training_with_one_drafts_only_its_tokens_and_says_what_that_costs(tmp_path):
    answers = examples.answers(60)
    states = source.PackedStates(answers)
    batches = list(states.batches(torch.arange(60), 16))
    config = fit.FitConfig(profile="tokens", epochs=3, validation_share=0.2, draft_vocabulary=8)
    result = fit.fit_adapter("L1", states, folder=tmp_path / "k8", config=config,
                             head=examples.head())
    adapter = registry.load_any_adapter(result.best_path)
    assert len(adapter.draft_ids) == 8
    tokens = table.of_batches({"L1": adapter}, batches[:1], examples.head(), gamma=3)
    assert set(tokens["draft_id"]) <= set(adapter.draft_ids.tolist())
    whole = fit.fit_adapter("L1", states, folder=tmp_path / "all",
                            config=fit.FitConfig(profile="tokens", epochs=3,
                                                 validation_share=0.2), head=examples.head())
    plain = registry.load_any_adapter(whole.best_path)
    cost = metrics.vocabulary_cost(plain, batches, examples.head(), adapter.draft_ids, gamma=3)
    assert cost["size"] == 8 and cost["head_share"] == 8 / examples.VOCABULARY
    assert 0 < cost["coverage"] < 1
    assert cost["reduced"] < cost["full"] and cost["kept"] == cost["reduced"] / cost["full"]
    everything = metrics.vocabulary_cost(plain, batches, examples.head(),
                                         torch.arange(examples.VOCABULARY), gamma=3)
    assert everything["coverage"] == 1 and everything["kept"] == 1
    with pytest.raises(ParameterError, match="this L1 drafts 8 tokens only"):
        metrics.vocabulary_cost(adapter, batches, examples.head(), adapter.draft_ids)
    with pytest.raises(TrainingError, match="needs the rows of the LM head"):
        fit.fit_adapter("L1", states, folder=tmp_path / "x", config=config,
                        head=lambda hidden: hidden @ examples.head().T)


class Recorded:
    """A drafter's track that reads stored states: position t is there once t tokens are known."""
    def __init__(self, states):
        self._stored, self._n = states, 1

    def begin(self, sample, timeline=None):
        self._n = 1

    def has_room(self, n):
        return n < len(self._stored)

    def follow(self, known):
        self._n = len(known) + 1

    def states(self):
        return self._stored[:self._n]


@pytest.mark.parametrize("name", ["L1", "L5 tokens", "L5F tokens", "B1 tokens"])
@pytest.mark.parametrize("reduced", ["none", "whole head", "rows alone"])
def test_live_drafts_are_the_rolled_out_ones(name, reduced):
    adapter, head, batch, gamma = make(name), torch.randn(VOCABULARY, WIDTH), make_batch([7],
                                                                                         seed=2), 3
    lm_head = lambda hidden: hidden @ head.T  # noqa: E731
    if reduced != "none":
        adapter.set_draft_vocabulary(torch.tensor([0, 2, 3, 7, 9]))
    if reduced == "rows alone":
        lm_head = lambda hidden: hidden @ head[adapter.draft_ids].T  # noqa: E731
    if adapter.shift:
        offline = drafting.from_every_start(adapter, batch, head, gamma)[0][0]
    else:
        said = drafting.one_step(adapter, batch, head)["draft_id"]
        offline = np.stack([said[k:k + 3] for k in range(1, gamma + 1)], axis=-1)
    ids = batch.ids_by_verifier[0].tolist()
    live = proposers.AdapterProposer(Recorded(batch.drafter[0]), adapter, lm_head, VOCABULARY)
    live.begin(None)
    for start in range(3):
        live.observe([ids[start]], batch.verifier[0, start:start + 1])
        drafts = live.propose(gamma)
        # offline rolls on as if every draft before were right: the first one, and all while they
        # are
        right = 0
        while right < gamma - 1 and drafts[right] == ids[start + 1 + right]:
            right += 1
        assert drafts[:right + 1] == offline[start, :right + 1].tolist()


def test_a_head_is_read_from_a_file_or_a_folder_of_shards(tmp_path):
    weight = torch.randn(5, 3)
    torch.save({"lm_head_weight": weight, "vocab_size": 5}, tmp_path / "vl_lm_head.pt")
    shards = tmp_path / "run" / "shards" / "test_simulated" / "teacher_forced"
    shards.mkdir(parents=True)
    stored = shards / "head-verifier.safetensors"
    safetensors.torch.save_file({"weight": weight.half()}, stored)
    assert torch.equal(heads.read(tmp_path / "vl_lm_head.pt"), weight)
    for path in (stored, shards, tmp_path / "run"):
        found = heads.read(path)
        assert found.dtype == torch.float32 and torch.equal(found, weight.half().float())
    with pytest.raises(CheckpointError, match="is for states 3 wide and these are 8 wide"):
        heads.read(stored, 8)


def test_what_holds_no_head_is_told_in_one_sentence(tmp_path):
    torch.save({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "empty").mkdir()
    for name, why in (("none.pt", "does not exist"), ("empty", "holds no LM heads of a verifier"),
                      ("two.pt", "holds 2 matrices; expected"), ("code.pt", "would run code")):
        with pytest.raises(CheckpointError, match=why):
            heads.read(tmp_path / name)
