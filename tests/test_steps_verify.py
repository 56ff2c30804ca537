"""``xsd verify``: each byte of a run that changes is named, and so is what somebody wrote anew with
every checksum right."""

import hashlib
import json
import os
import random
import shutil

import pandas as pd
import pytest
import torch
from models_fixtures import tiny_pair
from safetensors.torch import load_file, save_file
from tiny_pair import make_samples

from xsd import cli, digests
from xsd.bench import records
from xsd.core import ParameterError
from xsd.evaluate import tables
from xsd.extract import run as extraction
from xsd.runs import folder
from xsd.shards import format as layout
from xsd.steps import extract_request, verify

TOKENS = {"data": "d", "level": "L1", "sample": "a", "sequence": "s", "position": [0, 1],
          "match": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a file of each kind."""
    place, pair = tmp_path_factory.mktemp("whole") / "run", tiny_pair()
    extraction.extract(pair, make_samples(6, sequences=3), place / "shards" / "test_d",
                       modes=("teacher_forced", "free_running"), max_new_tokens=5, batch_size=2,
                       samples_per_shard=3)
    extract_request.save_pair(place / "shards", pair, "tiny", {"q"})
    folder.save_results(place, "extract", {"data_hashes": {"test_d": "0"}, "test": {
        "d": {"modes": ["teacher_forced", "free_running"]}}})
    folder.save_results(place, "tokens", {"gamma": 5})
    folder.save_tokens(place, pd.DataFrame(TOKENS))
    folder.save_live(place, {}, {}, data="d")
    tables.write(tables.frame([tables.row("cosine", 0.5)]), place / "tables" / "hidden_d")
    row = {"arm": "ar", "sample": "a", "sequence": "s", "repeat": 0, "total_s": 0.5}
    with records.open_records(place / "records.jsonl", {"seed": 0}) as (_, append):
        append([row, {**row, "repeat": 1}])
        append([{**row, "repeat": 2}])
    return place


@pytest.fixture
def own(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def named(place):
    return {problem.file.relative_to(place).as_posix(): problem.what
            for problems in verify.verify(place).values() for problem in problems}


def test_a_whole_run_is_all_well_and_an_empty_one_is_said_to_be_empty(own, tmp_path, capsys):
    assert named(own) == {}
    assert cli.main(["verify", str(own)]) == 0
    assert capsys.readouterr().out.count("all well") == 6
    (tmp_path / "nothing").mkdir()
    for place, words in (("nothing", "is empty: it holds no pairs"), ("nowhere", "no folder")):
        assert cli.main(["verify", str(tmp_path / place)]) == 2
        assert words in capsys.readouterr().err


def test_a_changed_byte_of_any_file_is_named(own):
    draw, silent = random.Random(0), []
    files = [path for path in sorted(own.rglob("*")) if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".parquet", ".safetensors",
                                               ".csv", ".md", ".tex"}
    for path in files:
        before = path.read_bytes()
        for _ in range(6):
            place, change = draw.randrange(len(before)), draw.randrange(1, 256)
            path.write_bytes(before[:place] + bytes([before[place] ^ change]) + before[place + 1:])
            if not named(path.parent if path.suffix != ".safetensors" else own):
                silent.append((path.name, place, change))
        path.write_bytes(before)
    assert silent == [] and named(own) == {}


def test_what_is_gone_or_on_no_record_is_named(own):
    (own / "tokens.parquet").unlink()
    (own / "results" / "digests.jsonl").unlink()
    (own / "shards" / "test_d" / "free_running" / "manifest.json").unlink()
    shutil.rmtree(own / "shards" / "test_d" / "teacher_forced")
    found = named(own)
    assert found["tokens.parquet"] == "is missing, though the results name it"
    assert "lacks a line: nothing says whether extract.json" in found["results/digests.jsonl"]
    assert found["shards/test_d/free_running/manifest.json"].startswith("is missing")
    assert found["shards/test_d/teacher_forced/manifest.json"].startswith("is missing")


@pytest.mark.parametrize("change, words", [
    (lambda lines: lines[:1] + lines[2:], "line 2 was changed"),
    (lambda lines: [lines[0], *lines[:0:-1]], "line 2 was changed"),
    (lambda lines: [*lines[:2], lines[2].replace("0.5", "0.4"), lines[3]], "line 3 was changed"),
    (lambda lines: [*lines, "[]"], "line 5 is no record"),
    (lambda lines: [*lines, "[" * 100_000], "line 5 is not JSON (nested too deep)"),
])
def test_records_that_were_left_out_moved_or_changed_are_named(own, change, words):
    path = own / "records.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    assert words in named(own)["records.jsonl"]


def test_records_of_an_interrupted_run_go_on(own):
    path = own / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # killed inside a line
    with records.open_records(path, {"seed": 0}) as (before, append):
        assert [row["repeat"] for row in before] == [0, 1]
        append([{**before[0], "repeat": 2}])
    assert [row["repeat"] for row in records.read_records(path)] == [0, 1, 2]
    assert named(own) == {}


# --- written anew, every checksum right


def anew(place, manifest=None, tensors=None, column=None):
    """Change a run's first shard, and its manifest, as somebody would who wants to be believed."""
    known = layout.read_manifest(place)
    entry = known["shards"][0]
    if tensors:
        path = place / entry["file"]
        values = load_file(path)
        tensors(values)
        save_file({name: value.contiguous() for name, value in values.items()}, path)
    if column:
        path = place / entry["metadata_file"]
        table = pd.read_parquet(path)
        column(table)
        table.to_parquet(path, index=False)
    for prefix in ("", "metadata_"):
        data = (place / entry[f"{prefix}file"]).read_bytes()
        entry |= {f"{prefix}bytes": len(data),
                  f"{prefix}sha256": hashlib.sha256(data).hexdigest()}
    layout.write_manifest(place, {**known, **(manifest or {})})
    return place


def shuffle(values):
    values["hidden_by_verifier"] = values["hidden_by_verifier"].flip(0)


def foreign(values):
    values["ids_by_verifier"][0] = 10**6


def renamed(table):
    table["mode"] = "free_running"


@pytest.mark.parametrize("changes, words", [
    ({"manifest": {"mode": "free_running"}}, "says mode='free_running'"),
    ({"manifest": {"tap": "pre_norm"}}, "says tap='pre_norm' of layer -1"),
    ({"tensors": shuffle}, "do not give its ids through the saved head"),
    ({"tensors": foreign}, "but the vocabulary has"),
    ({"tensors": lambda values: values["ids_by_drafter"].mul_(-1)}, "but the vocabulary has"),
    ({"tensors": lambda values: values["hidden_by_drafter"].fill_(float("nan"))}, "holds NaN"),
    ({"column": renamed}, "where its samples say"),
])
def test_a_forgery_with_right_checksums_is_named(own, changes, words):
    anew(own / "shards" / "test_d" / "teacher_forced", **changes)
    assert words in " ".join(named(own).values())


def test_samples_in_another_order_than_planned_are_named(tmp_path):
    from xsd.extract import plan

    samples = make_samples(6, sequences=3)
    lazy = [plan.LazySample(one.sequence, one.clip, one.question, lambda one=one: one)
            for one in samples]
    extraction.extract(tiny_pair(), lazy, tmp_path, modes=("teacher_forced",), max_new_tokens=5,
                       batch_size=2, config={"data_hash": "0"})
    assert named(tmp_path) == {}

    def turn(table):
        table[["sequence", "clip"]] = table[["sequence", "clip"]].to_numpy()[::-1]

    anew(tmp_path / "teacher_forced", column=turn)
    assert "in another order, than were planned" in " ".join(named(tmp_path).values())


# --- on reading


@pytest.mark.parametrize("data", [b"", b"[]", b'"x"', b"{", b"[" * 100_000, b"\xff\xfe", None])
def test_files_of_a_run_that_cannot_be_read_are_answered_in_a_sentence(own, data):
    readers = {"results/tokens.json": lambda: folder.load_results(own),
               "results/extract.json": lambda: folder.data_hash(own),
               "tokens.parquet": lambda: folder.load_tokens(own),
               "shards/pair.json": lambda: extract_request.read_pair(own / "shards" / "pair.json")}
    for name, read in readers.items():
        read()
        path = own / name
        (path.parent / digests.RECORD).unlink(missing_ok=True)  # as in a run of an older version
        path.unlink()
        path.write_bytes(data) if data is not None else path.mkdir()
        with pytest.raises(ParameterError) as said:
            read()
        assert name.rsplit("/", 1)[-1] in str(said.value) and "\n" not in str(said.value)
        if data is None:
            path.rmdir()
            path.write_text("{}")  # in nobody's way


def test_a_result_that_was_changed_is_not_read(own):
    path = own / "results" / "tokens.json"
    path.write_text(json.dumps({"gamma": 7}))
    with pytest.raises(ParameterError, match=r"changed after it was written \(its checksum in"):
        folder.load_results(own)


def test_a_write_that_is_killed_before_its_name_leaves_a_run_that_is_well(own, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save_results(own, "tokens", {"gamma": 6})
    monkeypatch.undo()
    assert named(own) == {} and folder.load_results(own)["tokens"] == {"gamma": 5}
    assert torch.is_grad_enabled()
