"""What a pair of full size asks of a machine, tried with small ones: where and in which numbers it
runs, batches that memory does not do for, two models that do not fit, what is reckoned with."""

import dataclasses
import types

import pandas as pd
import pytest
import torch
import train_examples as examples
from models_fixtures import pair_folder, tiny_pair
from test_evaluate_table import make_batches
from tiny_pair import make_samples

from xsd.adapters.registry import create_adapter
from xsd.bench import arms, costs
from xsd.core import ParameterError, as_used
from xsd.decode import tracks
from xsd.evaluate import table
from xsd.extract import pairs, run
from xsd.models import full_size, loading, planning
from xsd.runs import parameters
from xsd.shards import store
from xsd.steps import plan
from xsd.train import fit

OPTIONS = {"max_new_tokens": 5, "samples_per_shard": 3, "dtype": "fp32"}


# --- where, and in which numbers


def test_auto_is_bfloat16_on_a_gpu_and_float32_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert as_used() == ("cpu", "float32") and as_used("cuda:1") == ("cuda:1", "bfloat16")
    assert parameters.ExtractParameters.checked({}).loads["dtype"] == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert as_used() == ("cuda", "bfloat16") and as_used("cpu", "float16") == ("cpu", "float16")
    used = parameters.TrainParameters.from_namespace({})
    assert (used.device, used.dtype) == ("cuda", "bfloat16")
    assert parameters.HiddenParameters.from_namespace({"gamma": 3}).device == "cuda"
    assert parameters.CompareParameters.from_namespace({}).seed == 0


def test_the_drafter_may_stand_on_a_device_of_its_own(monkeypatch):
    seen = {}
    loaders = {name: getattr(loading, name) for name in ("load_drafter", "load_verifier")}
    for name, load in loaders.items():
        monkeypatch.setattr(loading, name, lambda *given, name=name, load=load, device, **more: (
            seen.update({name: device}), load(*given, device="cpu", **more))[1])
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    loading.load_pair(pair_folder(), device="cuda:0", drafter_device="cuda:1", dtype="float32")
    assert seen == {"load_drafter": "cuda:1", "load_verifier": "cuda:0"}


def test_states_and_head_go_where_an_adapter_stands():
    history = tracks.History(torch.device("meta"))
    history.replace(0, torch.zeros(3, 8))
    assert history.rows().device.type == "meta" and history.length == 3
    head = torch.nn.Linear(8, 12, bias=False)
    verifier = types.SimpleNamespace(head=head, lm_head=head)
    assert arms.draft_head(verifier, create_adapter("L1", 8)) is head
    there = arms.draft_head(verifier, create_adapter("L1", 8).to("meta"))
    assert there(torch.zeros(1, 8)).device.type == "meta"


def test_whether_to_draft_behind_the_prefill_is_measured_once_and_said(tmp_path, monkeypatch):
    def measured(at_once, in_turn):
        return lambda *given, **more: pd.DataFrame(
            {"what": [costs.AT_ONCE, costs.SERIAL], "ms": [at_once, in_turn]})

    def hiding(asked="auto", **about):
        return costs.hiding(asked, None, None, None, tmp_path / "hiding.json", 5, about)

    monkeypatch.setattr(costs, "prefill_overlap", measured(404.0, 329.0))
    found = hiding()
    assert (found["hide_prefill"], found["overlap"]) == (False, "serial")
    assert "404.0 ms at once and 329.0 ms one after the other" in found["why"]
    monkeypatch.setattr(costs, "prefill_overlap", measured(291.0, 333.0))
    assert hiding() == found
    other = hiding(device="cuda:1")
    assert (other["hide_prefill"], other["overlap"]) == (True, "threads")
    assert hiding("no")["hide_prefill"] is False and hiding("yes")["overlap"] == "threads"


# --- batches


class Limited:
    """A model with memory for ``most`` answers at a time."""

    def __init__(self, handle, most):
        self._handle, self.most, self.tried = handle, most, []

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def _limited(self, name, *given, batch_size, **more):
        self.tried.append(batch_size)
        if batch_size > self.most:
            raise torch.OutOfMemoryError("no room")
        return getattr(self._handle, name)(*given, batch_size=batch_size, **more)

    def generate(self, samples, n, *, batch_size=1, **more):
        return self._limited("generate", samples, n, batch_size=batch_size, **more)

    def force(self, samples, ids, *, batch_size=1, **more):
        return self._limited("force", samples, ids, batch_size=batch_size, **more)


def limited(most):
    pair = tiny_pair()
    return dataclasses.replace(pair, drafter=Limited(pair.drafter, most),
                               verifier=Limited(pair.verifier, most))


def ids_of(folder):
    return [ids.tolist() for ids in store.ShardDataset(folder / "teacher_forced").ids("verifier")]


def test_an_extraction_goes_on_with_half_a_batch_where_memory_does_not_do(tmp_path):
    samples = make_samples(8)
    whole = run.extract(tiny_pair(), samples, tmp_path / "whole", batch_size=4, **OPTIONS)
    pair = limited(1)
    found = run.extract(pair, samples, tmp_path / "less", batch_size=4, **OPTIONS)
    assert (whole.batch_size, found.batch_size, found.n) == (4, 1, 8)
    assert pair.verifier.tried == [4, 2, 1, 1]  # each batch of four, one after the other inside
    assert ids_of(tmp_path / "less") == ids_of(tmp_path / "whole")
    with pytest.raises(torch.OutOfMemoryError):
        run.extract(limited(0), samples, tmp_path / "none", batch_size=4, **OPTIONS)


def test_auto_grows_until_memory_stops_and_a_run_keeps_its_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "GAIN", 0.0)  # the rate does not stop it
    samples, pair = make_samples(8), limited(4)
    found = run.extract(pair, samples, tmp_path, batch_size="auto", **OPTIONS)
    assert found.finished and found.batch_size == 4 and pair.verifier.tried[:4] == [1, 2, 4, 8]
    kept = store.ShardDataset(tmp_path / "teacher_forced").manifest["config"]["batch_size"]
    again = limited(1)
    assert run.extract(again, samples, tmp_path, batch_size="auto", **OPTIONS).batch_size == kept
    assert kept == 4 and again.verifier.tried == []
    monkeypatch.setattr(pairs, "GAIN", 1e9)
    assert pairs.fastest(lambda n: None, 64) == 1
    with pytest.raises(ParameterError, match="is for one process"):
        run.extract(pair, samples, tmp_path / "ranks", batch_size="auto",
                    rank=run.ranks.Rank(0, 2), **OPTIONS)


def test_a_token_table_is_the_same_where_batches_are_cut(monkeypatch):
    head = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    adapters = {"L1": create_adapter("L1", 16), "B1": create_adapter("B1", 16)}
    whole = table.of_batches(adapters, make_batches(head), head, gamma=3)
    rows = table.rows

    def with_little_memory(adapter, batch, *more):
        if len(batch.index) > 1:
            raise torch.OutOfMemoryError("no room")
        return rows(adapter, batch, *more)

    monkeypatch.setattr(table, "rows", with_little_memory)
    cut = table.of_batches(adapters, make_batches(head), head, gamma=3)
    pd.testing.assert_frame_equal(whole, cut, rtol=1e-4)


# --- two models that do not fit


def test_two_models_that_do_not_fit_take_turns(monkeypatch, tmp_path):
    load, failed = loading.load_verifier, []

    def once_too_large(*given, **more):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        return load(*given, **more)

    monkeypatch.setattr(loading, "load_verifier", once_too_large)
    with pytest.warns(UserWarning, match="do not fit on cpu: one at a time is there"):
        pair = loading.load_pair(pair_folder())
    assert pair.turns == "cpu" and tiny_pair().turns == ""
    assert run.extract(pair, make_samples(4), tmp_path, batch_size=4, **OPTIONS).finished


# --- what is reckoned with


@pytest.mark.parametrize("level", ["L1", "L4", "L5F", "B1"])
def test_a_real_training_holds_the_bytes_a_parameter_that_are_reckoned_with(level, tmp_path):
    config = fit.FitConfig(profile="tokens", epochs=1, batch_size=16, validation_share=0.2)
    training = fit.Training(level, examples.answers(), folder=tmp_path, config=config,
                            head=examples.head(), seed=0)
    training.prepare()
    training.train_pass(0)
    moments = [value for state in training.optimiser.state.values() for value in state.values()
               if torch.is_tensor(value) and value.numel() > 1]
    gradients = sum(parameter.nbytes for parameter in training.parameters)
    held = sum(one.nbytes for one in (*training.parameters, *moments)) + gradients
    count = sum(parameter.numel() for parameter in training.parameters)
    assert held == pytest.approx(planning.TRAINED_BYTES * count, rel=0.01)


def test_the_chain_on_two_models_in_four_bits_fits_into_24_gb():
    made = plan.make(planning.MACHINES["rtx4090"], quant="4bit", batch=8)
    assert any("every stage of 01 to 05 fits into the 24 GB" in line for line in made["advice"])
    stages = made["table"].query("section == 'Memory on the device by stage'")
    assert list(stages["what"].str[:2]) == ["01", "02", "02", "02", "02", "03", "05"]
    half = plan.make(planning.MACHINES["rtx4090"], batch=1)
    said = " ".join(half["advice"])
    assert "these stages do not fit: 01 extraction" in said and "one model at a time there" in said


def test_a_forward_pass_in_half_precision_keeps_copies():
    verifier = full_size.sizes("full")[1]
    options = {"samples": 10, "tokens": 50, "epochs": 1, "batch": 64}
    machine, count = planning.MACHINES["h100"], 10**8
    whole, half = (planning.training(count, verifier, machine, **options, dtype=dtype)[1]
                   for dtype in ("float32", "bfloat16"))
    assert half - whole == 2 * (count + verifier.vocab * verifier.hidden)
