"""Hidden states of other layers than the last: what they are, where they go, and that batches
change nothing."""

import copy

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples

from xsd.core import ParameterError, ShardError
from xsd.extract import pairs, repair, run
from xsd.models import batched
from xsd.shards import store

TOKENS = 6
LAYERS = (-1, -2, 0)


@pytest.fixture(scope="module")
def samples():
    return make_samples(7)


def one_at_a_time(pair, samples):
    """The slow way that batches are held against."""
    found = {mode: {layer: [] for layer in LAYERS} for mode in pairs.MODES}
    for mode in pairs.MODES:
        for sample in samples:
            for layer, states in pairs.by_layer(mode, pair, [sample], TOKENS, 1,
                                                layers=LAYERS).items():
                found[mode][layer] += states
    return found


@pytest.fixture(scope="module")
def single(samples):
    return one_at_a_time(tiny_pair(), samples)


@pytest.fixture(scope="module")
def stopping(samples):
    """The pair with end-of-answer tokens that stop some rows of a batch before others, and its
    answers one at a time."""
    pair = copy.copy(tiny_pair())
    for role in ("drafter", "verifier"):
        handle = copy.copy(getattr(pair, role))
        answers = handle.generate(samples, TOKENS)
        handle.eos_token_ids = frozenset({int(answers[0].ids[1]), int(answers[-1].ids[3])})
        object.__setattr__(pair, role, handle)
    found = one_at_a_time(pair, samples)
    assert len({len(states.ids_by_verifier)
                for states in found["free_running"][-1]}) > 1, "all rows end at once"
    return pair, found


@pytest.mark.parametrize("batch_size", [3, 7])
@pytest.mark.parametrize("mode", pairs.MODES)
def test_batches_give_the_tokens_and_states_of_one_at_a_time(samples, stopping, mode, batch_size):
    """7 samples of two clips in batches of 3: shared prompts, unequal questions, and rows that end
    before others are all in it."""
    pair, single = stopping
    for layer, found in pairs.by_layer(mode, pair, samples, TOKENS, batch_size,
                                         layers=LAYERS).items():
        for states, own in zip(found, single[mode][layer], strict=True):
            assert torch.equal(states.ids_by_drafter, own.ids_by_drafter) and torch.equal(
                states.ids_by_verifier, own.ids_by_verifier)
            assert (states.text_by_drafter, states.text_by_verifier) == (own.text_by_drafter,
                                                                         own.text_by_verifier)
            # The same sums in another order: float32 rounding through three layers.
            torch.testing.assert_close(states.hidden_by_drafter, own.hidden_by_drafter, rtol=1e-3,
                                       atol=1e-4)
            torch.testing.assert_close(states.hidden_by_verifier, own.hidden_by_verifier, rtol=1e-3,
                                       atol=1e-4)


def test_a_layer_is_the_hidden_state_that_transformers_numbers_so(samples):
    handle = tiny_pair().drafter
    prompt = handle.prompt_embeddings(samples[0])
    answer = handle.generate(samples[:1], TOKENS, layers=(-2, 0))[0]
    line = torch.cat([prompt, handle._lookup(answer.ids[:-1])])
    with torch.no_grad():
        output = handle.model(inputs_embeds=line[None], output_hidden_states=True)
    for layer in (-2, 0):
        expected = output.hidden_states[layer][0, len(prompt) - 1:]
        torch.testing.assert_close(answer.layers[layer], expected, rtol=1e-3, atol=1e-4)


def test_without_further_layers_nothing_is_recorded_and_no_hook_stays(samples):
    handle = tiny_pair().drafter
    assert handle.generate(samples[:1], 2)[0].layers == {}
    handle.generate(samples[:1], 2, layers=(-2,))
    assert not any(layer._forward_pre_hooks for layer in handle.decoder.layers)


def test_a_layer_that_is_not_there_is_named():
    decoder = tiny_pair().drafter.decoder  # two layers
    assert [batched.place(decoder, layer) for layer in (-3, -2, 0, 1)] == [0, 1, 0, 1]
    for layer in (-4, 2, -1):
        with pytest.raises(
                ParameterError, match=
                rf"no hidden layer {layer} in a decoder of 2 layers: give -1 .* or -3 … -2 or 0 … 1"
        ):
            batched.place(decoder, layer)


OPTIONS = {
    "modes": pairs.MODES, "layers": LAYERS, "max_new_tokens": TOKENS, "batch_size": 2,
    "samples_per_shard": 3, "dtype": "fp32"
}


@pytest.fixture(scope="module")
def whole(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    return folder, run.extract(tiny_pair(), samples, folder, **OPTIONS)


def test_each_layer_has_a_folder_of_its_own_whose_head_is_refused(samples, single, whole):
    folder, report = whole
    assert set(report.folders) == {
        f"{mode}{layer}" for mode in pairs.MODES for layer in ("", ".layer-2", ".layer0")
    }
    for mode in pairs.MODES:
        last = store.ShardDataset(folder / mode, expected_tap="post_norm")
        deeper = store.ShardDataset(folder / f"{mode}.layer-2", expected_mode=mode,
                                    expected_tap="pre_norm")
        assert deeper.manifest["config"]["layer"] == -2 and "layer" not in last.manifest["config"]
        assert deeper.table()["text_by_verifier"].tolist() == last.table(
        )["text_by_verifier"].tolist()
        for states, own, sample in zip(deeper, single[mode][-2], samples, strict=True):
            assert states.clip == sample.clip and torch.equal(states.ids_by_verifier,
                                                              own.ids_by_verifier)
            torch.testing.assert_close(states.hidden_by_verifier, own.hidden_by_verifier, rtol=1e-3,
                                       atol=1e-4)
        with pytest.raises(ShardError, match="holds no LM head of the 'verifier'"):
            deeper.head("verifier")


def test_a_layer_can_be_added_to_a_finished_run(samples, whole, tmp_path):
    run.extract(tiny_pair(), samples, tmp_path, **{**OPTIONS, "layers": (-1,)})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*")}
    assert run.extract(tiny_pair(), samples, tmp_path, **OPTIONS).finished
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    for path in (whole[0]).rglob("shard-*"):
        assert (tmp_path / path.relative_to(whole[0])).read_bytes() == path.read_bytes()


def test_a_reused_verifier_brings_its_layers_and_is_never_run(samples, whole, tmp_path):
    silent = copy.copy(tiny_pair())
    verifier = copy.copy(silent.verifier)
    verifier.generate = None  # would fail if it were called
    object.__setattr__(silent, "verifier", verifier)
    run.extract(silent, samples, tmp_path, **OPTIONS, verifier_from=whole[0])
    for name in ("teacher_forced", "teacher_forced.layer-2"):
        for new, old in zip(store.ShardDataset(tmp_path / name),
                            store.ShardDataset(whole[0] / name), strict=True):
            assert torch.equal(new.hidden_by_verifier, old.hidden_by_verifier)
    with pytest.raises(ShardError, match=r"no manifest.json in .*free_running\.layer-3"):
        run.extract(silent, samples, tmp_path / "other", **{**OPTIONS, "layers": (-3,)},
                    verifier_from=whole[0])


def test_a_damaged_layer_is_repaired_to_its_bytes_also_with_a_reused_verifier(
        samples, whole, tmp_path):
    run.extract(tiny_pair(), samples, tmp_path, **OPTIONS, verifier_from=whole[0])
    place = tmp_path / "teacher_forced.layer-2"
    shard = place / "shard-000001.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-1])
    with pytest.raises(ShardError,
                       match="took the verifier's answers from another run; give that run too"):
        repair.repair(tiny_pair(), samples, place)
    with pytest.raises(ShardError, match=r"cannot be repaired .* verifier_from is"):
        repair.repair(tiny_pair(), samples, place, verifier_from=tmp_path)
    repair.repair(tiny_pair(), samples, place, verifier_from=whole[0])
    assert shard.read_bytes() == before
