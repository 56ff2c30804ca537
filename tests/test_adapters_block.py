"""Block drafters: D1 reads the verifier's context, D2 the drafter's, D5F both."""

import dataclasses

import pytest
import torch

from xsd.adapters import registry
from xsd.core import Batch, Context, ParameterError
from xsd.train import objectives, parts, recipes

WIDTH, DRAFTER, VOCABULARY, BLOCK = 16, 8, 11, 4
LAYERS = {"verifier": [1, 2], "drafter": [0]}


def make(level, **options):
    torch.manual_seed(0)
    adapter = registry.create_adapter(
        level, WIDTH, drafter_size=DRAFTER, vocab_size=VOCABULARY, block=BLOCK, n_heads=2,
        context_layers=LAYERS, **options)
    adapter.set_token_embedding(torch.randn(VOCABULARY, WIDTH))
    return adapter.eval()


def make_batch(lengths=(6, 3), prompts=(5, 7), seed=0):
    """Answers of these lengths after prompts of these; every number random."""
    draw = torch.Generator().manual_seed(seed)
    size = max(lengths)

    def states(width):
        return torch.randn(len(lengths), size, width, generator=draw)

    def context(width, more):
        longest = max(n + p + more for n, p in zip(lengths, prompts, strict=True)) - 1
        starts = torch.tensor(prompts) + more
        return Context(torch.randn(len(lengths), longest, width, generator=draw), starts)

    ids = torch.randint(VOCABULARY, (len(lengths), size), generator=draw)
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    return Batch(states(DRAFTER), states(WIDTH), ids, ids, mask, ["a"] * len(lengths),
                 range(len(lengths)), "teacher_forced",
                 {"verifier": context(2 * WIDTH, 0), "drafter": context(DRAFTER, 2)})


@pytest.mark.parametrize("level", registry.BLOCKS)
def test_a_block_after_a_position_is_what_its_prefix_alone_gives(level):
    adapter, batch = make(level), make_batch()
    steps = adapter.rolled(batch, BLOCK)
    assert len(steps) == BLOCK and steps[0].shape == batch.verifier.shape
    place = 2
    kept = adapter.keep()
    with torch.no_grad():
        for role in adapter.context_layers:
            one = batch.context[role]
            start = int(one.start[0])
            adapter.read(kept, role, one.states[0, :3], -start)
            adapter.read(kept, role, one.states[0, 3:start + place + (role == "drafter")],
                         3 - start)
        alone = adapter.step_block(kept, int(batch.ids_by_verifier[0, place]), place)
    torch.testing.assert_close(torch.stack([step[0, place] for step in steps]), alone)


@pytest.mark.parametrize("level", registry.BLOCKS)
def test_what_is_not_verified_yet_and_padding_change_nothing(level):
    adapter, batch = make(level), make_batch()
    cut = 2
    later = {}
    for role, one in batch.context.items():
        states = one.states.clone()
        for row, start in enumerate(one.start.tolist()):
            states[row, start + cut + (role == "drafter"):] = 9.0
        later[role] = Context(states, one.start)
    ids = batch.ids_by_verifier.clone()
    ids[:, cut + 1:] = 0
    changed = dataclasses.replace(batch, context=later, ids_by_verifier=ids)
    for before, after in zip(adapter.rolled(batch, BLOCK), adapter.rolled(changed, BLOCK),
                             strict=True):
        torch.testing.assert_close(before[:, :cut + 1], after[:, :cut + 1])


def test_align_is_the_first_draft_and_fewer_steps_are_the_first_ones():
    adapter, batch = make("D1"), make_batch()
    steps = adapter.rolled(batch, 9)
    assert len(steps) == BLOCK, "no more than the block"
    aligned = adapter.align(batch)
    torch.testing.assert_close(aligned.aligned, steps[0][:, :-1])
    assert torch.equal(aligned.ids, batch.ids_by_verifier[:, 1:])
    torch.testing.assert_close(adapter.rolled(batch, 2)[1], steps[1])


@pytest.mark.parametrize("level", registry.BLOCKS)
def test_a_saved_block_drafter_says_the_same(level, tmp_path):
    adapter, batch = make(level), make_batch()
    again = registry.load_any_adapter(registry.save_adapter(adapter, tmp_path))
    assert again.context_layers == adapter.context_layers
    assert torch.equal(again.rolled(batch, 1)[0], adapter.rolled(batch, 1)[0])


def test_missing_and_other_contexts_are_answered_in_a_sentence():
    adapter, batch = make("D5F"), make_batch()
    with pytest.raises(ParameterError, match="D5F reads the verifier's context and these pairs "
                       "came without"):
        adapter.rolled(dataclasses.replace(batch, context={}), 1)
    narrow = {**batch.context, "drafter": batch.context["verifier"]}
    with pytest.raises(ParameterError, match=r"reads layers \[0\] of the drafter, 8 numbers"):
        adapter.rolled(dataclasses.replace(batch, context=narrow), 1)
    for options in ({"block": 0}, {"n_heads": 3}, {"context_layers": {"drafter": [1]}}):
        with pytest.raises(ParameterError, match="needs block, layers, vocab_size"):
            registry.create_adapter("D1", WIDTH, **options)


@pytest.mark.parametrize(("level", "parameters"), [("D1", 671_961_088), ("D2", 671_961_088),
                                                   ("D5F", 722_300_928)])
def test_parameters_at_full_size(level, parameters):
    with torch.device("meta"):
        adapter = registry.create_adapter(level, 4096, vocab_size=32_000)
    assert registry.count_parameters(adapter) == parameters


def test_drafting_from_some_positions_gives_those_rows():
    adapter, batch = make("D5F"), make_batch()
    starts = torch.tensor([[True, False, True, True, False, False],
                           [False, True, False, False, False, False]])
    whole, some = adapter.rolled(batch, BLOCK), adapter.rolled(batch, BLOCK, starts=starts)
    for every, drawn in zip(whole, some, strict=True):
        torch.testing.assert_close(drawn[starts], every[starts])


def test_a_step_trains_from_as_many_anchors_as_asked():
    adapter, batch = make("D1").train(), make_batch()
    config = recipes.FitConfig(profile="tokens", objective="cross_entropy", anchors=2)
    starts = parts.draw_starts(adapter, batch.mask, config)
    assert starts.sum(1).tolist() == [2, 2] and not starts[0, 5:].any() and not starts[1, 2:].any()
    norms = parts.norms(adapter, batch.mask, config, starts)
    assert len(norms) == BLOCK and norms[0] == 4 and (norms.diff() <= 0).all()
    found = parts.losses(adapter, batch, objectives.parse("cross_entropy"),
                         adapter.token_embedding, config, [1.0] * BLOCK, norms.tolist(), starts)
    found["total"].backward()
    assert all(p.grad is not None for p in adapter.layers.parameters())
    assert parts.draw_starts(adapter, batch.mask, recipes.FitConfig(profile="tokens")) is None
