"""Creating, saving and loading adapters, closed forms, and what is said when a file is no
adapter."""

import json

import pytest
import torch
from test_adapters_levels import ALL, WIDTH, make, make_batch

from xsd.adapters import checks, linear, registry
from xsd.core import CheckpointError, ParameterError, TrainingError


@pytest.mark.parametrize("name", ALL)
def test_saved_adapter_comes_back_with_the_same_output(name, tmp_path):
    adapter, batch = make(name), make_batch([3, 5])
    path = registry.save_adapter(adapter, tmp_path / "best.safetensors", note="x")
    again = registry.load_any_adapter(tmp_path)
    assert again.config() == adapter.config() and not again.training
    assert torch.equal(again.align(batch).aligned, adapter.align(batch).aligned)
    assert json.loads(path.with_suffix(".json").read_text())["info"] == {"note": "x"}
    assert registry.read_config(path)["level"] == adapter.level


def test_loading_leaves_the_random_stream_alone(tmp_path):
    registry.save_adapter(make("L4"), tmp_path)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    registry.load_any_adapter(tmp_path)
    assert torch.equal(torch.rand(2), want)


def test_unknown_names_are_explained():
    with pytest.raises(ParameterError, match=r"level 'L9'; choose one of L1, L2, .* module:Class"):
        registry.create_adapter("L9")
    with pytest.raises(ParameterError, match=r"L1 cannot be made .* keyword argument 'heads'"):
        registry.create_adapter("L1", 8, heads=2)


def test_files_that_are_no_adapter_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        registry.load_any_adapter(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        registry.load_any_adapter(tmp_path)
    path = registry.save_adapter(make("L1"), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        registry.load_any_adapter(path)
    torch_file = tmp_path / "x.pt"
    torch.save([1, 2], torch_file)
    with pytest.raises(CheckpointError, match="no model_state_dict"):
        registry.load_any_adapter(torch_file)
    torch_file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read without running code"):
        registry.load_any_adapter(torch_file)


class HiddenAdapterConfig:
    """As pickled inside the reference's L1 files."""
    def __init__(self, **fields):
        self.__dict__.update(fields)


LAYER = {
    "layer.attention_norm": "layers.0.attn_norm", "layer.attention_out": "layers.0.attn.out_proj",
    "layer.ffn_norm": "layers.0.ffn_norm", "layer.ffn_up": "layers.0.ffn.0",
    "layer.ffn_down": "layers.0.ffn.3", "alpha": "alpha",
    "layer.query_key_value.weight": "layers.0.attn.in_proj_weight",
    "layer.query_key_value.bias": "layers.0.attn.in_proj_bias",
}
EAGLE = {**LAYER, "positions": "pos_embed", "final_norm": "output_norm",
         "projection": "output_proj", "input_norm": "input_norm"}
WIDE = {"input_norm": "input_norm", "final_norm": "final_norm"}
for block in (0, 1):
    WIDE |= {f"down.{block}": f"blocks.{block}.0", f"norms.{block}": f"blocks.{block}.1",
             f"up.{block}": f"blocks.{block}.4", f"alphas.{block}": f"alphas.{block}"}
THEIRS = {
    "L3": WIDE, "L4": {**LAYER, "final_norm": "output_proj.0", "projection": "output_proj.1"},
    "L5": EAGLE, "B1": EAGLE,
    "L5F": {**EAGLE, "input_norm": "fusion_norm", "fusion": "fusion_proj", "gate": "gate.0"},
}
PARTS = {"norm": "layer_norm", "down": "down_proj", "up": "up_proj", "alpha": "alpha_param"}
for level, blocks in (("L1", "layers"), ("L2", "blocks")):
    THEIRS[level] = {"final_norm": "final_norm"} | {
        f"blocks.{i}.{ours}": f"{blocks}.{i}.{theirs}"
        for i in range(3) for ours, theirs in PARTS.items()}


def _reference_names(adapter):
    """State dict of one of our adapters under the published file layout's names, written out by
    hand."""
    names, result = dict(THEIRS[adapter.level]), {}
    for ours, theirs in LAYER.items():
        names[ours.replace("layer.", "further.0.")] = theirs.replace("layers.0", "layers.1")
    for name, tensor in adapter.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        result[names[name] if name in names else f"{names[stem]}.{leaf}"] = tensor
    return result


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [("L1", None, HiddenAdapterConfig(hidden_dim=WIDTH, bottleneck_dim=8, num_layers=1)),
     ("L3", "L3_WideBottleneck", {"hidden_dim": WIDTH, "bottleneck_dim": 16, "num_blocks": 2}),
     ("L2", "L2_MultiLayerBottleneck", {"hidden_dim": WIDTH, "bottleneck_dim": 8, "num_blocks": 3}),
     ("L4 bidirectional", "L4_Attention",
      {"hidden_dim": WIDTH, "num_heads": 8, "ffn_dim": 32, "num_layers": 1}),
     ("L5", "L5_EAGLE", {
         "hidden_dim": WIDTH, "num_heads": 8, "ffn_dim": 32, "num_layers": 1,
         "use_token_embed": False
     }),
     ("L5 layers", "L5_EAGLE",
      {"hidden_dim": WIDTH, "num_heads": 8, "ffn_dim": 32, "num_layers": 2}),
     ("L5F lead 0", "L5F_FusedEAGLE",
      {"hidden_dim": WIDTH, "num_heads": 8, "ffn_dim": 32, "num_layers": 1}),])
def test_reference_pt_files_are_read_without_running_code(name, kind, config, tmp_path):
    adapter, batch = make(name), make_batch([4])
    stored = {"model_state_dict": _reference_names(adapter), "config": config, "epoch": 3}
    torch.save(stored | ({"adapter_type": kind} if kind else {}), tmp_path / "best.pt")
    again = registry.load_any_adapter(tmp_path / "best.pt")
    assert again.level == adapter.level and again.causal == adapter.causal
    assert torch.equal(again.align(batch).aligned, adapter.align(batch).aligned)


def test_b1_is_told_from_l5_by_its_folder_or_by_name(tmp_path):
    adapter, batch = make("B1"), make_batch([4])
    config = {
        "hidden_dim": WIDTH, "num_heads": 8, "ffn_dim": 32, "num_layers": 1,
        "use_token_embed": False
    }
    stored = {
        "model_state_dict": _reference_names(adapter), "config": config, "adapter_type": "L5_EAGLE"
    }
    (tmp_path / "B1").mkdir()
    for path, level in ((tmp_path / "B1" / "best.pt", None), (tmp_path / "best.pt", "B1")):
        torch.save(stored, path)
        again = registry.load_any_adapter(path, level=level)
        assert again.level == "B1" and torch.equal(
            again.align(batch).aligned,
            adapter.align(batch).aligned)
    assert registry.load_any_adapter(tmp_path / "best.pt").level == "L5"
    with pytest.raises(CheckpointError, match=r"holds an L5 \(L5_EAGLE\), not the L4 asked for"):
        registry.load_any_adapter(tmp_path / "best.pt", level="L4")
    deep = {"adapter_type": "L4_Attention", "config": config | {"num_layers": 2}}
    torch.save(stored | deep, tmp_path / "deep.pt")
    with pytest.raises(CheckpointError, match="has 2 bidirectional layers, and L4 of several is"):
        registry.load_any_adapter(tmp_path / "deep.pt")
    torch.save(stored | {"config": config | {"use_token_embed": True}}, tmp_path / "fused.pt")
    with pytest.raises(CheckpointError, match="fuses tokens in front of its norm"):
        registry.load_any_adapter(tmp_path / "fused.pt")


def test_a_draft_vocabulary_is_saved_with_the_weights(tmp_path):
    adapter = make("L1")
    adapter.set_draft_vocabulary(torch.tensor([1, 4, 9]))
    again = registry.load_any_adapter(registry.save_adapter(adapter, tmp_path))
    assert again.draft_ids.tolist() == [
        1, 4, 9
    ] and again.options["draft_vocabulary"] == 3 and make("L1").draft_ids is None
    with pytest.raises(ParameterError, match="none twice, not 2, 1 different"):
        adapter.set_draft_vocabulary(torch.tensor([2, 2]))


def test_ridge_recovers_a_linear_map_over_streamed_batches():
    batches = [make_batch([9, 7, 5], seed=seed) for seed in range(6)]
    weight, bias = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    batches = [
        batch.__class__(**{**batch.__dict__, "verifier": batch.drafter @ weight + bias})
        for batch in batches
    ]
    adapter = linear.fit_linear("ridge", batches, ridge=1e-9)
    aligned, target, _, mask = adapter.align(batches[0])
    torch.testing.assert_close(aligned[mask], target[mask], atol=1e-3, rtol=1e-3)


def test_procrustes_recovers_a_scaled_rotation_and_stays_orthogonal():
    batches = [make_batch([9, 7, 5], seed=seed) for seed in range(6)]
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    batches = [
        batch.__class__(**{**batch.__dict__, "verifier": 2 * batch.drafter @ rotation + 1})
        for batch in batches
    ]
    adapter = linear.fit_linear("procrustes", batches)
    aligned, target, _, mask = adapter.align(batches[0])
    torch.testing.assert_close(aligned[mask], target[mask], atol=1e-3, rtol=1e-3)
    unscaled = linear.fit_linear("procrustes", batches, scale=False).map.weight
    torch.testing.assert_close(unscaled @ unscaled.T, torch.eye(WIDTH), atol=1e-4, rtol=1e-4)


def test_closed_forms_of_the_next_state_are_shifted_and_saved(tmp_path):
    batch = make_batch([9, 9, 8])
    for reads in ("verifier", "both"):
        adapter = linear.fit_linear("ridge", [batch], reads=reads)
        assert adapter.shift == 1 and adapter.align(batch).aligned.shape == (3, 8, WIDTH)
        registry.save_adapter(adapter, tmp_path / reads)
        assert torch.equal(
            registry.load_any_adapter(tmp_path / reads).align(batch).aligned,
            adapter.align(batch).aligned)
    assert torch.equal(linear.fit_linear("identity", [batch]).align(batch).aligned, batch.drafter)


def test_closed_forms_explain_what_they_cannot_do():
    with pytest.raises(ParameterError, match="unknown closed form 'pca'"):
        linear.fit_linear("pca", [])
    with pytest.raises(TrainingError, match="stream of batches is empty"):
        linear.fit_linear("ridge", [])
    with pytest.raises(ParameterError, match="identity needs one width"):
        registry.create_adapter("identity", 8, drafter_size=4)


def test_self_test_reports_every_level_and_files(tmp_path):
    path = str(registry.save_adapter(make("B1 tokens"), tmp_path / "mine.safetensors"))
    rows = checks.self_test(WIDTH, levels=[*registry.LEVELS, path], positions=4)
    assert [row["level"] for row in rows] == [*registry.LEVELS, "mine"]
    assert all(row["latency_ms"] > 0 and row["megabytes"] == 4 * row["parameters"] / 1e6
               for row in rows)
