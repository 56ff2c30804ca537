"""The plan: counted sizes of the 7B models, arithmetic held against real files and real models, and
what it says to do."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_pair import make_tiny_pair

from xsd import cli, core
from xsd.core import CheckpointError, ParameterError
from xsd.models import full_size, loading, planning, quantization
from xsd.runs import doctor
from xsd.shards.writer import ShardWriter
from xsd.steps import plan


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    return make_tiny_pair(tmp_path_factory.mktemp("plan") / "tiny", hidden_size=64)


def test_the_full_size_models_have_the_published_parameter_counts():
    drafter, verifier = full_size.sizes("full")
    assert (drafter.total, verifier.total) == (7_079_684_096, 7_366_279_168)
    assert (drafter.visual_tokens, verifier.visual_tokens) == (582, 2056)
    assert planning.prompt_positions(drafter) == 641
    assert (drafter.parameters["linear"], drafter.layers,
            drafter.kv_width) == (verifier.parameters["linear"], 32, 4096)


def test_sizes_of_a_folder_come_from_its_configurations_alone(pair_folder):
    loaded = loading.load_pair(pair_folder)
    for size in full_size.sizes(pair_folder):
        handle = getattr(loaded, size.role)
        assert size.total == sum(p.numel() for p in handle.model.parameters())
        assert (size.hidden, size.vocab) == (handle.hidden_size, handle.vocab_size)
        sample = core.Sample("s", "c", "What?", [_picture()] * size.n_frames,
                             torch.zeros(8, 28, 28, 3, dtype=torch.uint8).numpy())
        if size.role == "drafter":
            assert handle.visual_tokens(sample).shape[0] == size.visual_tokens
    with pytest.raises(CheckpointError, match="give 'full', 'embedded' or a folder"):
        full_size.sizes("nowhere/at/all")


def _picture():
    return torch.zeros(28, 28, 3, dtype=torch.uint8).numpy()


@pytest.mark.parametrize("form", [("float32", None), ("bfloat16", None), ("float32", "4bit"),
                                  ("float32", "8bit")])
def test_predicted_weights_are_the_bytes_of_the_loaded_model(pair_folder, form):
    dtype, quant = form
    loaded = loading.load_pair(pair_folder, dtype=dtype, quant=quant)
    for size in full_size.sizes(pair_folder):
        model = getattr(loaded, size.role).model
        stored = quantization.weight_bytes(model)
        predicted = planning.weight_bytes(size, dtype, quant)
        # Quantised layers keep their constants outside the parameters, and every model has a few
        # small buffers.
        assert abs(stored - predicted) < 0.05 * predicted


def test_the_cache_takes_what_is_predicted(pair_folder):
    handle = loading.load_drafter(pair_folder / "drafter")
    sample = core.Sample("s", "c", "What?", [_picture()] * 5,
                         torch.zeros(8, 28, 28, 3, dtype=torch.uint8).numpy())
    embeds = handle.prompt_embeddings(sample)
    cache = handle.decoder(inputs_embeds=embeds[None], use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers
               for t in (layer.keys, layer.values))
    assert held == planning.kv_bytes(full_size.sizes(pair_folder)[0], len(embeds), 1, "float32")


@pytest.mark.parametrize("stored", ["fp32", "fp16", "int8"])
def test_predicted_shards_are_the_bytes_on_disk(tmp_path, pair_folder, stored):
    sizes = full_size.sizes(pair_folder)
    sizes = tuple(dataclasses.replace(size, hidden=256, vocab=1000) for size in sizes)
    n, tokens = 40, 30
    with ShardWriter(tmp_path / "run", mode="teacher_forced", dtype=stored, config={},
                     samples_per_shard=64) as writer:
        for role in ("drafter", "verifier"):
            writer.save_head(role, torch.zeros(1000, 256), 1000)
        for i in range(n):
            hidden = torch.full((tokens, 256), float(i))
            ids = torch.arange(tokens)
            writer.write(
                core.PairedStates("s", f"{i:06d}", "What?", hidden, hidden, ids, ids,
                                  "teacher_forced"))
        writer.close()
    on_disk = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    predicted = planning.shard_bytes(sizes, samples=n, tokens=tokens, modes=1, stored=stored,
                                 dtype="float32")
    assert abs(on_disk - predicted) < 0.03 * predicted


def test_hours_follow_the_stated_speed():
    pair = full_size.sizes("full")
    options = {
        "dtype": "bfloat16", "quant": None, "clips": 100, "questions": 10, "new_tokens": 50,
        "batch": 10, "modes": plan.BOTH_MODES
    }
    machine = planning.MACHINES["a100-80"]

    def seconds(machine, **changes):
        return planning.extraction_seconds(pair, machine, **{**options, **changes})

    once = sum(seconds(machine).values())
    twice = dataclasses.replace(machine, tflops=2 * machine.tflops, gb_s=2 * machine.gb_s)
    assert sum(seconds(twice).values()) == pytest.approx(once / 2)
    assert sum(seconds(machine, clips=300).values()) == pytest.approx(3 * once)
    forced = seconds(machine, modes=("teacher_forced",))
    assert "drafter answers" not in forced and sum(forced.values()) < once
    # One decode step of one row reads the weights once: 13.2 GB of linear layers and head at 35 %
    # of 2039 GB/s.
    step = planning.step_seconds(pair[1], machine, "bfloat16", None, batch=1, positions=0)
    assert step == pytest.approx((6_476_005_376 + 131_334_144) * 2 / (0.35 * 2039e9), rel=1e-6)


def value(made, section, what):
    """One figure of a plan."""
    rows = made["table"]
    return rows[rows["section"].str.startswith(section) & (rows["what"] == what)]["value"].item()


def test_a_level_is_counted_without_being_allocated():
    made = plan.make(planning.MACHINES["a100-80"], clips=10, levels=("L4",), epochs=2)
    parameters = value(made, "Training", "L4: parameters")
    assert parameters > 100_000_000
    assert value(made, "Training", "L4: peak memory") > 16 * parameters / 1e9
    with pytest.raises(ParameterError, match="L9"):
        plan.make(planning.MACHINES["a100-80"], levels=("L9",))


def test_what_does_not_fit_comes_with_a_way_out():
    machine = planning.MACHINES["rtx4090"]
    small = plan.make(machine, disk_free=1e9)
    assert "do not fit into the 24 GB" in small["advice"][0]
    assert "--quant 4bit with --batch 1 needs" in small["advice"][0]
    disk = next(line for line in small["advice"] if "do not fit onto the 1.0 GB" in line)
    assert "--stored" in disk
    assert any(line.startswith("these stages do not fit: 01") for line in small["advice"])
    large = plan.make(machine, quant="4bit", batch=1, disk_free=1e12)
    assert "fit into the 24 GB" in large["advice"][0] and "fit onto" in large["advice"][-1]
    assert large["advice"][1].startswith("every stage of 01 to 05 fits into the 24 GB")
    assert value(large, "Memory", "verifier: weights") < value(small, "Memory",
                                                               "verifier: weights") / 2
    with pytest.raises(ParameterError, match="batch must be at least 1"):
        plan.make(machine, batch=0)


def test_the_command_prints_every_figure_with_its_kind_and_every_assumption(capsys):
    assert cli.main([
        "plan", "--quant", "4bit", "--clips", "100", "--tflops", "100", "--gb-s", "500",
        "--memory-gb", "40"
    ]) == 0
    said = capsys.readouterr().out
    for words in ("7 366 279 168   counted", "GB   predicted", "h   predicted", "100 TFLOP/s",
                  "500 GB/s", "(given)", "Assumptions"):
        assert words in said
    assert cli.main(["plan", "--machine", "abacus"]) == 2
    assert "there is no machine 'abacus'; choose one of t4" in capsys.readouterr().err


def test_this_machine_can_be_measured_in_a_moment():
    machine = planning.measure_machine(size=64, repeats=1)
    assert machine.source == "measured" and machine.tflops > 0 and machine.gb_s > 0
    with pytest.raises(ParameterError, match="gb_s must be above 0"):
        dataclasses.replace(machine, gb_s=0)


# --- doctor
# ------------------------------------------------------------------------------------------------


def test_doctor_loads_a_pair_and_prints_its_number_formats(pair_folder):
    said = [str(finding) for finding in plan.examine(str(pair_folder), quant="4bit")]
    assert all(line.startswith("[ok  ]") for line in said)
    assert "predicted memory" in said[0] and "may be drafted" in said[
        1] and "measured peak memory" in said[-1]
    assert "uint8" in said[2] and "model.visual_tower float32" in said[2]


def test_doctor_does_not_load_what_cannot_fit(pair_folder):
    sizes = full_size.sizes("full")
    finding = plan.fits(sizes, int(20e9), dtype="float32", quant=None, device="cuda")
    assert finding.state == "bad" and "only 20.0 GB are free on cuda" in finding.what
    assert "--quant 4bit needs" in finding.advice
    assert plan.fits(sizes, None, dtype="float32", quant=None, device="cuda").state == "note"


def test_doctor_names_a_pair_that_does_not_load(tmp_path, capsys):
    assert cli.main(["doctor", "--pair", str(tmp_path)]) == 1
    assert "[bad ] the pair does not load or run: " in capsys.readouterr().out
    assert plan.examine("embedded", device="cuda")[0].state == "bad" or torch.cuda.is_available()


def test_doctor_names_settings_that_are_not_used_and_a_disk_that_cannot_be_written(
        pair_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(pair_folder, tmp_path / "pair")
    path = folder / "verifier" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.3}))
    said = [str(finding) for finding in plan.examine(str(folder))]
    assert any(line.startswith("[note] ") and "sets repetition_penalty=1.3: not used" in line
               for line in said)
    assert doctor.disk(tmp_path).state == "ok"
    refuse = OSError(30, "Read-only file system")
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(refuse))
    assert "cannot be written (Read-only file system)" in doctor.disk(tmp_path).what
    assert doctor.disk(tmp_path).state == "bad"
