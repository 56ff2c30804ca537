"""A step is the same whether its answers came as one batch, several, or with weights by position;
noise is on what is read alone."""

import dataclasses

import pytest
import torch
import train_examples as examples
from test_adapters_levels import VOCABULARY, WIDTH, make, make_batch

from xsd.adapters import base
from xsd.core import ParameterError, TrainingError
from xsd.train import fit, objectives, parts, source
from xsd.train.recipes import FitConfig

CASES = [("L4", {}), ("L5", {}), ("B1", {}), ("L5F", {"profile": "rollout"}),
         ("L5F tokens", {"profile": "rollout", "position_decay": 0.8})]


def config_of(options):
    return FitConfig(**{"objective": "mse + 0.5*cosine + cross_entropy", **options})


def gradients(adapter, batches, config, head):
    adapter.zero_grad()
    own = [parts.norms(adapter, batch.mask, config) for batch in batches]
    whole = torch.stack(own).sum(0)
    scale = whole.clamp_min(1e-12) * parts.factor_sum(parts.plan(adapter, config), whole, adapter)
    objective, total = objectives.parse(config.objective), 0.0
    for batch, norms in zip(batches, own, strict=True):
        if norms[0]:
            losses = parts.losses(adapter, batch, objective, head, config, (norms / scale).tolist(),
                                  norms.tolist())
            losses["total"].backward()
            total += float(losses["total"].detach())
    return total, torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


def rows(batch, chosen):
    names = ("drafter", "verifier", "ids_by_drafter", "ids_by_verifier", "mask")
    width = int(batch.mask[chosen].sum(-1).max())
    return dataclasses.replace(batch,
                               **{name: getattr(batch, name)[chosen][:, :width] for name in names},
                               sequence=["s"] * len(chosen))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_several_small_batches_make_the_step_of_one_large_one(name, options):
    adapter, head, config = make(name), torch.randn(VOCABULARY, WIDTH), config_of(options)
    batch = make_batch([7, 1, 4, 2, 6], seed=1)
    whole = gradients(adapter, [batch], config, head)
    pieces = gradients(adapter, [rows(
        batch, [0]), rows(batch, [1]), rows(batch, [2, 3, 4])], config, head)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(pieces[1], whole[1], atol=1e-5, rtol=1e-4)


def test_l5_is_also_asked_for_the_next_state():
    adapter, batch = make("L5"), make_batch([4, 4])
    total, _ = gradients(adapter, [batch], FitConfig(), None)
    aligned = adapter.align(batch).aligned
    here = base.alignment_loss(aligned, batch.verifier)["total_loss"]
    later = base.alignment_loss(aligned[:, :-1], batch.verifier[:, 1:])["total_loss"]
    assert total == pytest.approx(float((here + 0.5 * later).detach()), rel=1e-5)


def test_training_and_validation_are_one_sum_in_l5_too(tmp_path):
    other = [dataclasses.replace(one, sequence=f"other {one.sequence}")
             for one in examples.answers()]
    config = FitConfig(epochs=1, learning_rate=1e-12, adapter_options={"dropout": 0.0})
    result = fit.fit_adapter("L5", examples.answers(), folder=tmp_path, config=config,
                             validation=other)
    row = result.history[0]
    assert row["train_total"] == pytest.approx(row["validation_total"], rel=1e-5)
    assert row["train_mse"] == pytest.approx(row["validation_mse"], rel=1e-5)


def test_rollout_steps_are_averaged_with_their_decay():
    adapter, head, batch = make("B1"), torch.randn(VOCABULARY, WIDTH), make_batch([6, 6])
    config = config_of({"profile": "rollout", "rollout_steps": 3, "rollout_decay": 0.5})
    with torch.no_grad():
        steps = adapter.unroll(None, batch.verifier, 3)
        objective = objectives.parse(config.objective)
        each = [
            float(
                objective(state[:, :-k], batch.verifier[:, k:], batch.ids_by_verifier[:, k:],
                          batch.mask[:, k:], head)["total"])
            for k, state in enumerate(steps, start=1)
        ]
    assert gradients(adapter, [batch], config, head)[0] == pytest.approx(
        (each[0] + 0.5 * each[1] + 0.25 * each[2]) / 1.75, rel=1e-5)


def test_position_decay_weighs_the_first_tokens_most():
    config = FitConfig(position_decay=0.5)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert parts.weights_of(mask, 1, config).tolist() == [[0.5, 0.25], [0.5, 0.25]]
    assert parts.norms(make("L1"), mask, config).tolist() == [1 + 0.5 + 0.25 + 1]
    assert parts.weights_of(mask, 0, FitConfig()) is None
    with pytest.raises(ParameterError, match="position_decay must be positive, not 0"):
        FitConfig(position_decay=0.0)


def test_noise_moves_inputs_and_never_targets():
    head, batch = torch.randn(VOCABULARY, WIDTH), make_batch([6, 6])
    seen = []

    def objective(aligned, target, ids, mask, head, weights):
        seen.append(target)
        return {"total": aligned[mask].pow(2).mean()}

    for name in ("L4", "B1", "L5F"):
        adapter, config = make(name), FitConfig(noise=0.3)
        torch.manual_seed(0)
        noisy = parts.losses(adapter, batch, objective, head, config, [1.0], [1.0])["total"]
        clean = parts.losses(adapter, batch, objective, head, FitConfig(), [1.0], [1.0])["total"]
        assert float(noisy.detach()) != float(clean.detach())
        assert torch.equal(seen[-1], seen[-2]) and torch.equal(seen[-1],
                                                               batch.verifier[:, adapter.shift:])


@pytest.mark.parametrize("weighted", [1.0, 0.7])
def test_a_level_that_looks_at_one_position_computes_no_padding_and_the_same_loss(weighted):
    adapter, head, batch = make("L3"), torch.randn(VOCABULARY, WIDTH), make_batch([7, 2, 4])
    config = config_of({"position_decay": weighted})
    objective, widths = objectives.parse(config.objective), []
    adapter.input_norm.register_forward_hook(
        lambda module, inputs, output: widths.append(tuple(inputs[0].shape)))
    got = parts.losses(adapter, batch, objective, head, config, [1.0], [1.0])
    want = objective(
        adapter.align(batch).aligned, batch.verifier, batch.ids_by_verifier, batch.mask, head,
        parts.weights_of(batch.mask, 0, config))
    assert widths[0] == (13, WIDTH)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_accumulated_training_is_that_of_the_large_batch(tmp_path):
    states = source.PackedStates(examples.answers())
    common = {"epochs": 2, "validation_share": 0.2, "adapter_options": {"dropout": 0.0}}
    large, small = (fit.fit_adapter("L5", states, folder=tmp_path / name,
                                    config=FitConfig(**common, **sizes))
                    for name, sizes in (("a", {"batch_size": 16}),
                                        ("b", {"batch_size": 4, "accumulation": 4})))
    assert small.history[-1]["train_total"] == pytest.approx(large.history[-1]["train_total"],
                                                             rel=1e-4)
    assert small.history[-1]["validation_total"] == pytest.approx(
        large.history[-1]["validation_total"], rel=1e-3)


def test_bfloat16_training_stays_near_float32_and_its_weights_are_float32(tmp_path):
    states = source.PackedStates(examples.answers())
    runs = [
        fit.fit_adapter(
            "L4", states, folder=tmp_path / dtype,
            config=FitConfig(epochs=3, batch_size=16, validation_share=0.2, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    losses = [run.history[-1]["train_total"] for run in runs]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    from xsd.adapters import registry

    assert {p.dtype
            for p in registry.load_any_adapter(runs[1].best_path).parameters()} == {torch.float32}


def test_token_fusion_by_name_and_where_it_cannot_be(tmp_path):
    config = FitConfig(profile="tokens", epochs=2, validation_share=0.2, token_fusion=True)
    for level in ("L5", "L5F"):
        result = fit.fit_adapter(level, examples.answers(), folder=tmp_path / level, config=config,
                                 head=examples.head())
        assert result.history[-1]["train_total"] < result.history[0]["train_total"]
        stored = fit.registry.load_any_adapter(result.best_path)
        assert stored.fuses_tokens and len(stored.token_embedding) == examples.VOCABULARY
    with pytest.raises(ParameterError, match="L4 fuses no tokens; token_fusion is for L5, B1, L5F"):
        fit.fit_adapter("L4", examples.answers(), folder=tmp_path / "x", config=config,
                        head=examples.head())
    with pytest.raises(TrainingError,
                       match="L5 with fused tokens needs the rows of the LM head"):
        fit.fit_adapter("L5", examples.answers(), folder=tmp_path / "y", config=config,
                        head=lambda hidden: hidden @ examples.head().T)
