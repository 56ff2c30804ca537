"""Contexts: what block drafters read, stored once and equal to what live decoding records; and
decoding a block a round, token for token the verifier's own."""

import dataclasses
import json
import shutil

import pytest
import safetensors
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples

from xsd.adapters import registry
from xsd.bench import arms, costs
from xsd.core import ParameterError, ShardError, TrainingError
from xsd.decode import autoregressive
from xsd.evaluate import drafting, table
from xsd.extract import checks, contexts, run
from xsd.shards import contexts as stored
from xsd.shards.store import ShardDataset
from xsd.steps import extract_request
from xsd.train import fit, recipes

TOKENS = 9
LAYERS = {"verifier": [0, 2], "drafter": [1]}


@pytest.fixture(scope="module")
def samples():
    return [dataclasses.replace(one, split="train") for one in make_samples(8)]


@pytest.fixture(scope="module")
def extracted(samples, tmp_path_factory):
    """A run of eight pairs with the contexts of both models, as float32."""
    folder = tmp_path_factory.mktemp("contexts")
    run.extract(tiny_pair(), samples, folder, modes=("teacher_forced",), max_new_tokens=TOKENS,
                dtype="fp32")
    pairs = ShardDataset(folder / "teacher_forced")
    contexts.extract(tiny_pair(), samples, pairs, roles=("verifier", "drafter"), layers=LAYERS,
                     dtype="fp32")
    return pairs


@pytest.fixture
def pairs(extracted, tmp_path):
    """The same in a folder of one's own."""
    return ShardDataset(shutil.copytree(extracted.folder, tmp_path / "teacher_forced"))


def make(level, head, block=4):
    torch.manual_seed(1)
    adapter = registry.create_adapter(
        level, head.shape[1], vocab_size=len(head), block=block, n_heads=2,
        context_layers={role: LAYERS[role] for role in LAYERS})
    adapter.set_token_embedding(head)
    return adapter.eval()


def with_context(pairs, adapter):
    return [pairs.with_context(batch, adapter.context_layers) for batch in pairs.batches(3)]


@pytest.mark.parametrize("plain", [False, True], ids=["own steps", "transformers"])
@pytest.mark.parametrize("role", LAYERS)
def test_stored_contexts_are_what_a_live_request_records(extracted, samples, role, plain):
    handle = getattr(tiny_pair(), role)
    handle = handle.plain() if plain else handle
    for place in (0, 5):
        found = extracted.contexts.of([place], [role])[role]
        ids = torch.from_numpy(extracted.ids("verifier")[place][:-1])
        state = handle.prefill(samples[place], layers=LAYERS[role])
        assert int(found.start[0]) == state.length
        for token in ids.split(2):
            handle.extend(state, token)
        live = state.context.rows(0, state.length)
        torch.testing.assert_close(live, found.states[0], rtol=1e-3, atol=1e-3)


def test_rejected_rows_leave_the_recorded_context(samples):
    verifier = tiny_pair().verifier
    state = verifier.prefill(samples[0], layers=[1])
    prompt = state.length
    verifier.extend(state, torch.tensor([5, 6, 7]), [-1, 0, 0])
    kept = state.context.rows(prompt + 2, prompt + 3).clone()
    verifier.rollback(state, prompt + 1, [prompt + 2])
    assert torch.equal(state.context.rows(prompt + 1, state.length), kept)
    again = verifier.prefill(samples[0], layers=[1])
    verifier.extend(again, torch.tensor([5, 7]))
    torch.testing.assert_close(again.context.rows(0, again.length),
                               state.context.rows(0, state.length), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["D1@3", "D5F@4", "D2@1", "L1+D5F@3", "drafter+D1@4"])
def test_blocks_are_lossless_and_the_drafts_of_the_stored_pairs(extracted, samples, name):
    pair, head = tiny_pair(), extracted.head("verifier")
    levels = [level for level in arms.levels_of([name]) if level in registry.BLOCKS]
    adapters = {level: make(level, head) for level in levels}
    if "L1" in name:
        torch.manual_seed(0)
        adapters["L1"] = registry.create_adapter("L1", head.shape[1]).eval()
    arm = arms.build(name, pair, adapters, overlap="serial")
    for place, sample in enumerate(samples[:4]):
        found = arm.run(sample, TOKENS)
        assert found.ids == autoregressive.generate(pair.verifier, sample, TOKENS).ids
        (batch,) = with_context(extracted.subset(indices=[place]), adapters[levels[0]])
        drafted = head[:pair.draft_vocab_size]  # the others may not be drafted
        offline, _ = drafting.from_every_start(adapters[levels[0]], batch, drafted, 4)
        at = 0
        for round_ in found.rounds:
            if round_.phase == "decode" and at <= offline.shape[1]:  # stored ones may end before
                there = [int(token) for token in offline[0, at - 1] if token >= 0]
                assert list(round_.drafted[:len(there)]) == there[:len(round_.drafted)]
            at += round_.n_accepted + (round_.bonus is not None)


def test_a_block_is_priced_once_a_round(extracted, samples):
    pair, adapter = tiny_pair(), make("D5F", extracted.head("verifier"))
    steps = costs.step_costs(pair.drafter, pair.verifier, {"D5F": adapter}, samples[0], repeats=2)
    curve = costs.verification_curve(pair.verifier, samples[0], rows=(1, 5), repeats=2)
    price = costs.prices_of("D5F@4", curve, steps, {"D5F": adapter})
    assert price.draft_s == 0 and price.round_s > 0 and price.drafter_prefill_s > 0
    record = {"ids": [1, 2, 3, 4, 5], "total_s": 1.0, "rounds": [
        {"drafted": [], "accepted": 0, "bonus": 1, "phase": "prefill_hiding"},
        {"drafted": [2, 3, 9], "accepted": 2, "bonus": 4, "phase": "decode"}]}
    told = costs.predict([record], price, frozenset())
    assert told["draft_s"] == pytest.approx(price.round_s)


def test_a_token_table_holds_a_block_drafter(extracted):
    head = extracted.head("verifier")
    adapter = make("D1", head)
    for gamma in (3, 4, 6):  # 6: more than a block
        rows = table.of_batches({"D1": adapter}, with_context(extracted, adapter), head,
                                gamma=gamma)
        assert rows["accepted"].between(0, min(gamma, adapter.block)).all()
        assert len(rows) == sum(len(ids) - 1 for ids in extracted.ids("verifier"))


def test_contexts_are_made_once_and_go_on_after_a_stop(pairs, samples, monkeypatch):
    monkeypatch.setattr(contexts, "CLIPS", 1)
    folder = pairs.folder / stored.FOLDER
    shutil.rmtree(folder)
    asked = []
    handle = tiny_pair().verifier
    own = handle.contexts
    monkeypatch.setattr(type(handle), "contexts",
                        lambda self, *given: asked.append(1) or own.__func__(self, *given))
    options = {"roles": ("verifier",), "layers": LAYERS, "dtype": "fp32"}
    with pytest.raises(InterruptedError):
        contexts.extract(tiny_pair(), samples, pairs, progress=_stop, **options)
    assert len(asked) == 1
    with pytest.raises(ShardError, match="is unfinished: it has 4 of 8 samples; extract"):
        stored.Contexts(pairs.folder, pairs.manifest)
    contexts.extract(tiny_pair(), samples, pairs, **options)
    assert len(asked) == 2, "the first group is not made again"
    contexts.extract(tiny_pair(), samples, pairs, **options)
    assert len(asked) == 2, "found again"
    contexts.extract(tiny_pair(), samples, pairs, **{**options, "layers": {"verifier": [1]}})
    assert len(asked) == 4, "other layers are other contexts"
    (folder / stored.name_of(0)).write_bytes(b"damaged")
    contexts.extract(tiny_pair(), samples, pairs, **{**options, "layers": {"verifier": [1]}})
    assert len(asked) == 5, "only a damaged group is made again"
    assert not stored.damaged(pairs.folder, pairs.manifest)


def test_a_finished_extraction_is_given_contexts_by_its_own_request(tmp_path):
    place = tmp_path / "run"
    request = extract_request.Request("data/davis_road", "test", "embedded", max_questions=1)
    pair = request.load_pair()
    run.extract(pair, request.samples(pair), place, modes=("teacher_forced",), max_new_tokens=4)
    request.save(place)
    line = extract_request.add_contexts(place, ["verifier"])
    assert "contexts of 3 answers, layers [4, 7, 10] of the verifier" in line
    with pytest.raises(ParameterError, match="of the drafter or the verifier, not of both"):
        extract_request.add_contexts(place, ["both"])


FORGED = {
    "a start": lambda about: about["start"].update({"verifier.0": -1}),
    "no start": lambda about: about.pop("start"),
    "a clip": lambda about: about["clip"].update({"0": [1]}),
}


@pytest.mark.parametrize("how", FORGED)
def test_groups_that_somebody_wrote_anew_are_a_sentence(pairs, how):
    folder = pairs.folder / stored.FOLDER
    with safetensors.safe_open(folder / stored.name_of(0), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["about"])
    FORGED[how](about)
    record = json.loads((folder / stored.RECORD).read_text())
    record["files"][0] = stored.write(folder, 0, 0, tensors, **about)
    stored.write_record(folder, record)
    with pytest.raises(ShardError, match="holds no sample 0 of the verifier; extract"):
        pairs.contexts.of([0], ["verifier"])


@pytest.mark.parametrize("change", [
    {"files": [{"first": "0", "bytes": 1, "sha256": ""}]}, {"layers": {"verifier": 3}},
    {"layers": {"other": [1]}}, {"n_samples": 1e400}, {"format": None}])
def test_a_record_of_another_form_is_a_sentence(pairs, change):
    record = pairs.folder / stored.FOLDER / stored.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(ShardError, match="is no record of contexts; extract"):
        stored.Contexts(pairs.folder, pairs.manifest)


@pytest.mark.parametrize("change", [{"dtype": "fp32 "}, {"weights": {}}, {"layers": {}}])
def test_a_record_that_was_changed_is_named(pairs, change):
    record = pairs.folder / stored.FOLDER / stored.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(ShardError, match="was changed after it was written; extract"):
        stored.Contexts(pairs.folder, pairs.manifest)


def _stop(n):
    raise InterruptedError


def test_damage_and_other_pairs_are_named(pairs, samples):
    file = pairs.folder / stored.FOLDER / stored.name_of(0)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"contexts-000000.safetensors .* checksum"):
        pairs.contexts.of([0], ["verifier"])
    (problem,) = checks.verify(pairs.folder)[pairs.folder]
    assert str(problem).endswith("does not match its checksum; make them anew (xsd data contexts)")
    with pytest.raises(ShardError, match=r"layers \[1\] of the verifier are wanted"):
        pairs.contexts.check({"verifier": [1]})
    record = pairs.folder / stored.FOLDER / stored.RECORD
    record.write_text(record.read_text().replace('"sha256"', '"sha"'))
    with pytest.raises(ShardError, match="is no record of contexts"):
        stored.Contexts(pairs.folder, pairs.manifest)
    contexts.extract(tiny_pair(), samples, pairs, roles=("verifier",), layers=LAYERS, dtype="fp32")
    stored.Contexts(pairs.folder, pairs.manifest)  # the way out that the sentence names
    other = {**pairs.manifest, "shards": []}
    with pytest.raises(ShardError, match="belongs to other pairs"):
        stored.Contexts(pairs.folder, other)
    shutil.rmtree(pairs.folder / stored.FOLDER)
    with pytest.raises(ShardError, match="holds no contexts, which block drafters"):
        _ = ShardDataset(pairs.folder).contexts
    with pytest.raises(ShardError, match="answers about other clips or questions"):
        contexts.extract(tiny_pair(), samples[:2], pairs)


def test_contexts_are_not_written_through_a_link(pairs, samples, tmp_path):
    shutil.move(pairs.folder / stored.FOLDER, tmp_path / "elsewhere")
    (pairs.folder / stored.FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShardError, match="contexts is a link, and nothing is written through one"):
        contexts.extract(tiny_pair(), samples, pairs)


def test_a_layer_that_is_not_there_is_refused(pairs, samples):
    shutil.rmtree(pairs.folder / stored.FOLDER)
    with pytest.raises(ParameterError, match="there is no hidden layer 9"):
        contexts.extract(tiny_pair(), samples, pairs, layers={"verifier": [9]})


def test_a_block_drafter_is_trained_resumed_and_loaded(extracted, tmp_path):
    config = fit.FitConfig(**recipes.settings("best", "D5F") | {
        "epochs": 3, "batch_size": 4, "validation_share": 0.5,
        "adapter_options": {"block": 3, "n_heads": 2}})
    head = extracted.head("verifier")
    given = {"config": config, "head": head}
    whole = fit.fit_adapter("D5F", extracted, folder=tmp_path / "whole", **given)

    def stop(row):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit.fit_adapter("D5F", extracted, folder=tmp_path / "cut", progress=stop, **given)
    again = fit.fit_adapter("D5F", extracted, folder=tmp_path / "cut", **given)
    left, right = (registry.load_any_adapter(one.best_path) for one in (whole, again))
    assert left.context_layers == LAYERS
    assert all(torch.equal(value, right.state_dict()[name])
               for name, value in left.state_dict().items())
    with pytest.raises(TrainingError, match="read contexts, which are stored beside shards"):
        fit.fit_adapter("D1", list(extracted), folder=tmp_path / "none", **given)
