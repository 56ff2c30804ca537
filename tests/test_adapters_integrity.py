"""Adapter files that were changed, exchanged, made to take the machine down, or would run code: one
sentence each, before anything is allocated."""

import json
import random
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_adapters_levels import WIDTH, make

from xsd.adapters import heads, registry, tensor_files
from xsd.core import CheckpointError


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def forged(path, tensors=None, **config):
    """A file as an older version wrote it, which had no digest, with what it says changed."""
    adapter = make("L1")
    about = {"format": "xsd-adapter-1", **adapter.config(), "info": {}} | config
    save_file(tensors or adapter.state_dict(), path, metadata={"config": json.dumps(about)})
    return path


def test_no_flipped_bit_of_a_file_is_loaded(tmp_path):
    path = registry.save_adapter(make("L1"), tmp_path / "one.safetensors", epoch=1)
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    bits = [8 * at + draw.randrange(8) for at in range(header)]  # every byte of the header
    bits += [draw.randrange(8 * header, 8 * len(whole)) for _ in range(150)]
    for bit in bits:
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(CheckpointError):
            registry.load_any_adapter(path)
    path.write_bytes(whole)
    assert registry.load_any_adapter(path).level == "L1"


def test_the_same_values_give_the_same_bytes_which_others_may_read(tmp_path):
    paths = [registry.save_adapter(make("L1"), tmp_path / name) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_mode & 0o044


@pytest.mark.filterwarnings("always")
def test_a_file_without_a_digest_is_loaded_and_that_is_said(tmp_path):
    with pytest.warns(UserWarning, match="holds no digest .* damage to it cannot be seen"):
        assert registry.load_any_adapter(forged(tmp_path / "old.safetensors")).level == "L1"
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        registry.load_any_adapter(forged(tmp_path / "cut.safetensors", format="xsd-adapter-2"))


@pytest.mark.parametrize("config", [
    {"hidden_size": 10**9}, {"hidden_size": -1}, {"hidden_size": "16"}, {"drafter_size": 10**12},
    {"options": {"bottleneck": 10**12}}, {"options": {"n_blocks": 10**7}}, {"options": [1]},
    {"level": "L4", "options": {"layers": 10**7}}, {"level": "L4", "options": {"n_heads": "x"}},
    {"level": "L5", "options": {"max_positions": 10**9}}, {"options": {"draft_vocabulary": 10**10}},
    {"level": None}, {"info": 3},
    {"options": {"hidden_size": 4}}, {"options": {"dropout": "x"}}, {"format": "xsd-adapter-9"}],
    ids=str)
@pytest.mark.filterwarnings("ignore:.*holds no digest")
def test_what_a_file_says_is_held_against_what_it_holds(config, tmp_path):
    with pytest.raises(CheckpointError):
        registry.load_any_adapter(forged(tmp_path / "x.safetensors", **config))


@pytest.mark.filterwarnings("ignore:.*holds no digest")
def test_a_class_of_ones_own_is_not_made_larger_than_its_file(tmp_path):
    for config in ({"hidden_size": 10**9}, {"options": {"width": 10**10}}):
        path = forged(tmp_path / "x.safetensors", level="my_levels:Mine", **config)
        with pytest.raises(CheckpointError):
            registry.load_any_adapter(path, level="my_levels:Mine")


@pytest.mark.filterwarnings("ignore:.*holds no digest")
def test_nothing_that_only_a_file_names_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "surprise.py").write_text("raise SystemExit('ran')")
    path = forged(tmp_path / "x.safetensors", level="surprise:Level")
    for level in (None, "L1"):
        with pytest.raises(CheckpointError):
            registry.load_any_adapter(path, level=level)
    registry.check(path)
    assert registry.read_config(path)["level"] == "surprise:Level"
    assert "surprise" not in sys.modules


def test_an_adapter_in_another_levels_folder_and_a_final_called_best_are_named(tmp_path):
    for level in ("L1", "L4"):
        for name in ("best", "final"):
            place = tmp_path / "adapters" / level
            registry.save_adapter(make(level), place / f"{name}.safetensors", file=name)
    first, fourth = (tmp_path / "adapters" / level / "best.safetensors" for level in ("L1", "L4"))
    whole = fourth.read_bytes()
    fourth.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="holds an L1, and its folder is that of L4"):
        registry.load_any_adapter(fourth)
    fourth.write_bytes(whole)
    first.write_bytes(first.with_name("final.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is the final.safetensors of a training"):
        registry.load_any_adapter(first)


@pytest.mark.filterwarnings("ignore:.*holds no digest")
def test_torch_files_are_bounded_before_they_are_read(tmp_path):
    bomb = {"a": 1}
    for _ in range(60):  # 10⁶⁰ entries, if one walked them
        bomb = {str(key): bomb for key in range(10)}
    wide = torch.as_strided(torch.zeros(1), (10**6, 10**6), (0, 0))
    reference = {"model_state_dict": {}, "config": {"hidden_dim": WIDTH, "bottleneck_dim": 8}}
    values = [bomb, *({**reference, **one} for one in (
        {"adapter_type": bomb}, {"config": {"hidden_dim": bomb}}, {"config": [1]},
        {"config": {"hidden_dim": 10**9}}, {"model_state_dict": bomb},
        {"model_state_dict": {"a": wide}},
        {"model_state_dict": {"a": torch.zeros(3, device="meta")}}))]
    for number, value in enumerate(values):
        torch.save(value, tmp_path / f"{number}.pt")
        with pytest.raises(CheckpointError):
            registry.load_any_adapter(tmp_path / f"{number}.pt")
    torch.save(wide, tmp_path / "wide.pt")
    torch.save(torch.zeros(3, 3, dtype=torch.int64), tmp_path / "whole.pt")
    for name in ("wide.pt", "whole.pt"):
        with pytest.raises(CheckpointError):
            heads.read(tmp_path / name)


def test_packed_and_unknown_things_in_a_torch_file_are_refused(tmp_path):
    torch.save(torch.zeros(2_000_000), tmp_path / "plain.pt")
    two_gigabytes = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    pickles = {"packed.pt": None, "bytes.pt": two_gigabytes, "torn.pt": b"\x80\x02s."}
    for name, text in pickles.items():
        with (zipfile.ZipFile(tmp_path / "plain.pt") as held,
              zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED if text is None
                              else zipfile.ZIP_STORED) as made):
            for one in held.namelist():
                made.writestr(one, text if text and one.endswith("data.pkl") else held.read(one))
        with pytest.raises(CheckpointError, match="without running code in it, or is damaged"):
            tensor_files.read_pt(tmp_path / name)


def test_numpy_numbers_in_a_reference_file_are_numbers(tmp_path):
    torch.save({"loss": np.float64(0.5), "epoch": np.int64(3)}, tmp_path / "x.pt")
    from xsd.adapters import reference_files

    assert tensor_files.read_pt(tmp_path / "x.pt", stand_ins=reference_files._STAND_INS) == {
        "loss": 0.5, "epoch": 3}


def test_a_head_is_held_against_its_manifest(tmp_path):
    path = tmp_path / "head-verifier.safetensors"
    save_file({"weight": torch.randn(4, 3)}, path)
    entry = {"file": path.name, "sha256": "0" * 64}
    (tmp_path / "manifest.json").write_text(json.dumps({"heads": {"verifier": entry}}))
    with pytest.raises(CheckpointError, match="does not match the checksum in its manifest"):
        heads.read(tmp_path)


def test_what_is_no_file_is_told_in_one_sentence(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    names = ["folder.safetensors", "loop.safetensors", "lfs.safetensors", "a" * 5000, "a\0b"]
    for name in names:
        with pytest.raises(CheckpointError):
            registry.load_any_adapter(tmp_path / name)
