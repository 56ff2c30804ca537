"""Safe writing, hashes, provenance and seeds: what every room leans on."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd import core, files, processes
from xsd.core import DatasetError, ParameterError, StorageError, XsdError


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))


@settings(max_examples=25)
@given(data=st.binary(max_size=4096))
def test_written_bytes_are_the_bytes_given(tmp_path_factory, data):
    target = tmp_path_factory.mktemp("bytes") / "new" / "file.bin"
    files.atomic_write(target, data)
    assert target.read_bytes() == data
    assert leftovers(target.parent) == []


def test_text_is_written_as_utf8_with_the_usual_permissions(tmp_path):
    files.atomic_write(tmp_path / "text.txt", "γ = 5")
    assert (tmp_path / "text.txt").read_bytes() == "γ = 5".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "text.txt").stat().st_mode) == 0o666 & ~umask


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    files.atomic_write(target, "old")
    with pytest.raises(RuntimeError, match="half way"), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path, monkeypatch, where):
    target = tmp_path / "file.txt"
    files.atomic_write(target, "old")

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(core.StorageError) as caught:
        files.atomic_write(target, "new")
    assert str(caught.value) == (
        f"cannot write {target}: the disk is full; free space or choose another output folder and "
        "run again (nothing was lost)"
    )
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"),
                    reason="needs /dev/full, the kernel's always full device")
def test_a_really_full_device_is_a_storage_error(tmp_path):
    with (pytest.raises(core.StorageError, match="the disk is full"),
          files.atomic_path(tmp_path / "file.txt"), open("/dev/full", "wb") as device,
          ):
        device.write(b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(
            core.StorageError,
            match=r"cannot write .*taken.*check the folder's permissions or choose another one"):
        files.atomic_write(tmp_path / "taken" / "file.txt", "new")


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    files.atomic_write(target, "old")
    code = ("import os, signal, sys; from xsd import files\n"
            "with files.atomic_path(sys.argv[1]) as temporary:\n"
            "    temporary.write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=core.ROOT, check=False)
    assert done.returncode == -9
    assert target.read_text() == "old"


def test_json_of_the_same_value_is_the_same_bytes(tmp_path):
    @dataclass(frozen=True)
    class Record:
        path: Path
        rate: float

    files.write_json(
        tmp_path / "a.json", {
            "b": Record(Path("x"), 0.5), "a": np.float32(0.25), "c": torch.tensor([1, 2]),
            "d": np.arange(2)
        })
    files.write_json(tmp_path / "b.json",
                    {"d": [0, 1], "c": [1, 2], "a": 0.25, "b": {"rate": 0.5, "path": "x"}})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["b"] == {"path": "x", "rate": 0.5}


def test_json_refuses_what_has_no_json_form(tmp_path):
    with pytest.raises(TypeError, match="object has no JSON form"):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_over_the_files_in_the_order_given(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"ab" * (1 << 19) + b"c")
    second.write_bytes(b"d")
    assert files.sha256_of(first, second) == hashlib.sha256(first.read_bytes() + b"d").hexdigest()
    assert files.sha256_of(second, first) != files.sha256_of(first, second)


def test_provenance_says_where_a_number_came_from():
    origin = files.provenance(seed=7, data_hash="abc", device="cpu", profile="smoke")
    assert {
        "git_revision", "git_dirty", "versions", "machine", "seed", "data_hash", "device",
        "command", "profile"
    } == set(origin)
    assert origin["seed"] == 7 and origin["profile"] == "smoke"
    assert origin["versions"]["torch"].startswith("2.13.0")
    assert isinstance(origin["git_dirty"], bool)
    json.dumps(origin)


def test_the_key_of_a_sample_names_its_question():
    def sample(question):
        return core.Sample("drive_000", "000003", question, [], np.zeros((8, 4, 4, 3), np.uint8))

    assert sample("What is ahead?").key != sample("What time is it?").key
    assert sample("What is ahead?").key == sample("What is ahead?").key
    assert sample("What is ahead?").key.startswith("drive_000/000003/")


def test_every_error_is_one_the_command_line_prints_as_a_sentence():
    errors = [
        value for value in vars(core).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert len(errors) >= 11
    assert all(issubclass(error, core.XsdError) and error.__doc__ for error in errors)


def test_provenance_holds_no_folder_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [
        str(tmp_path / "xsd"), "run", "04", "-p", f"run_dir={core.ROOT / 'runs' / 'a'}",
        str(tmp_path / "b")
    ])
    monkeypatch.delenv("XSD_NOTEBOOK", raising=False)
    origin = files.provenance(parameters={
        "run_dir": str(core.ROOT / "runs" /
                       "a"), "test_data": ["simulated", str(tmp_path / "own")]
    })
    assert origin["command"] == ["xsd", "run", "04", "-p", "run_dir=runs/a", "b"]
    assert origin["parameters"] == {"run_dir": "runs/a", "test_data": ["simulated", "own"]}
    assert str(tmp_path) not in json.dumps(origin)


def test_inside_a_kernel_the_command_is_the_notebook(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "ipykernel_launcher.py"), "-f",
                      str(tmp_path / "kernel.json")])
    monkeypatch.setenv("XSD_NOTEBOOK", "04_tokens.ipynb")
    assert files.provenance()["command"] == ["notebook", "04_tokens.ipynb"]


# --- objects named by a text


def test_an_object_is_found_in_the_working_directory_and_where_a_run_was_started(
        tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text("class Outer:\n    class Inner:\n        level = 'in'\n")
    monkeypatch.delitem(sys.modules, "made_here", raising=False)
    with pytest.raises(ParameterError, match=r"put made_here.py into the working directory"):
        files.import_object("made_here:Outer")
    monkeypatch.setenv("XSD_STARTED_IN", str(tmp_path))
    before = list(sys.path)
    found = files.import_object("made_here:Outer.Inner")
    assert found.level == "in" and sys.path == before
    assert files.name_of(found) == files.name_of(found()) == "in"
    assert files.name_of(sys.modules["made_here"].Outer) == "made_here:Outer"
    assert files.name_of("L4") == "L4" and not files.is_path("my_levels:Mine")


def test_a_part_named_by_its_path_has_a_short_name():
    names = {
        "runs/a/adapters/L4": "L4 of a", "runs/a/adapters/L4/best.safetensors": "L4 of a",
        "C:\\work\\a\\adapters\\L4": "L4 of a", "mine.safetensors": "mine",
        "tasks/L4/L4_20250101_120000/best_model.pt": "L4_20250101_120000", "some/mine.pt": "mine",
    }
    assert all(files.is_path(path) for path in names)
    assert {path: files.name_of(path) for path in names} == names
    for text, words in (("made_here", "names no object; write module:Name"),
                        ("made_here:Other", "the module made_here holds no Other")):
        with pytest.raises(ParameterError, match=words):
            files.import_object(text)


@pytest.mark.parametrize(("data", "said"), [
    (b"{", "is not JSON"), (b"\xff\xfe{}", "is not JSON"),
    (b"[" * 300_000, "is not JSON .nested too deep"),
    (b" " * 2_000_000 + b"1", "is larger than 1 MB"),
])
def test_json_that_cannot_be_read_is_one_sentence(tmp_path, data, said):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"x\.json.* {said}.*; write it again"):
        files.read_json(path, DatasetError, "write it again", max_bytes=1 << 20)


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert files.read_json(tmp_path / "x.json", DatasetError, "write it again") == [1]


def test_a_killed_helper_process_is_one_sentence():
    with (pytest.raises(XsdError, match="a helper process was killed, by hand or because the m"),
          processes.pool(1) as pool):
        pool.submit(os._exit, 9).result()


def test_what_killed_processes_left_is_removed_and_the_rest_stays(tmp_path):
    (tmp_path / ".a.json.0123.part").touch()
    (tmp_path / "b.part").touch()
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.part"]


def test_a_folder_has_one_writer_of_a_kind(tmp_path):
    with files.FolderLock(tmp_path, "train.lock"):
        assert files.lock_holder(tmp_path, "train.lock") == os.getpid()
        with files.FolderLock(tmp_path), pytest.raises(StorageError, match="is being written by"):
            files.FolderLock(tmp_path, "train.lock")
    assert list(tmp_path.iterdir()) == []
