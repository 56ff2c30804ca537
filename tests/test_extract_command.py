"""The verbs extract, status, verify, repair and import-chunks, on a dataset folder and a pair of a
few kilobytes."""

import os
import signal

import numpy as np
import pytest
import torch
from models_fixtures import pair_folder, tiny_pair
from tiny_pair import make_samples

from xsd import cli
from xsd.core import ParameterError
from xsd.extract import ranks, run, supervise
from xsd.runs import progress
from xsd.sensors import folder
from xsd.sensors.events import Events
from xsd.shards import store
from xsd.steps import extract_request

QUESTIONS = [("What is on the road?", 9), ("How does the car move?", 5),
             ("Describe the scene in detail.", 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sequences of two clips in a split, one of them half as long as the others."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    with folder.FolderWriter(root, "train", source="random") as writer:
        for number in range(4):
            times = np.sort(draw.integers(0, 1_000_000, 400))
            x, y, p = (draw.integers(0, high, 400).astype(kind)
                       for high, kind in ((48, np.uint16), (36, np.uint16), (2, np.uint8)))
            video = draw.integers(0, 256, (8, 36, 48, 3)).astype(np.uint8)
            end = 500_000 if number == 3 else 1_000_000
            writer.add(f"seq{number // 2}", f"{number:06d}", events=Events(x, y, times, p, 48, 36),
                       video=video, t_us=(0, end))
    folder.write_questions(root / folder.QUESTIONS, QUESTIONS)
    return root


def extract(data, out, *more):
    return cli.main(["data", "extract",
        str(data), "-o",
        str(out), "--pair",
        str(pair_folder()), "--max-new-tokens", "4", "--batch", "3", "--samples-per-shard", "4",
        "--max-questions", "2", "--stored", "fp32", *more
    ])


@pytest.fixture(scope="module")
def five(data, tmp_path_factory):
    """The run of five event frames, in both modes."""
    out = tmp_path_factory.mktemp("five")
    assert extract(data, out, "--modes", "teacher_forced,free_running", "--layers=-1,-2") == 0
    return out


def test_every_clip_is_asked_the_first_questions_and_the_run_knows_what_it_is(five, data, capsys):
    dataset = store.ShardDataset(five / "free_running", expected_mode="free_running")
    table = dataset.table()
    assert list(zip(table["clip"], table["question"],
                    strict=True)) == [(f"{i:06d}", text) for i in range(4)
                                      for text, _ in QUESTIONS[:2]]
    config = dataset.manifest["config"]
    assert config["data_hash"] == folder.data_hash(data) and (config["split"], config["quant"],
                                                              config["n_event_frames"]) == ("train",
                                                                                            None, 5,
                                                                                            )
    assert (five / "teacher_forced.layer-2" / "manifest.json").is_file()
    assert extract(data, five, "--modes", "teacher_forced,free_running", "--layers=-1,-2") == 0
    assert "finished: 8 samples" in capsys.readouterr().out
    assert extract(data, five, "--modes", "free_running", "--max-questions", "1") == 2
    said = capsys.readouterr().err
    assert "begun with other settings: config.max_questions is 2 in the folder but 1 now" in said


def test_one_event_frame_takes_the_verifiers_answers_of_the_other_run(five, data, tmp_path, capsys):
    assert extract(data, tmp_path, "--event-frames", "1f", "--reuse-verifier", str(five)) == 0
    one, other = store.ShardDataset(tmp_path / "teacher_forced"), store.ShardDataset(
        five / "teacher_forced")
    assert one.manifest["config"]["n_event_frames"] == 1
    for new, old in zip(one, other, strict=True):
        assert torch.equal(new.hidden_by_verifier, old.hidden_by_verifier)
        assert not torch.equal(new.hidden_by_drafter, old.hidden_by_drafter)
    shard = tmp_path / "teacher_forced" / "shard-000000.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-3])
    assert cli.main(["data", "repair", str(tmp_path)
                     ]) == 0 and shard.read_bytes() == before, "the request remembers the other run"


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--duration", "2s"], "holds no clip of 2s: its clips last 500ms, 1000ms"),
     (["--duration", "long"], "duration='long'; expected a length such as 1s or 500ms"),
     (["--layers=-1,x"], "--layers -1,x: expected whole numbers with commas"),
     (["--layers=-9"], "there is no hidden layer -9 in a decoder of 2 layers"),
     (["--modes", "forced"], "expected one or more of teacher_forced, free_running"),
     (["--max-samples", "0"], "max_samples=0; give a positive number, or -1 for all"),
     (["--supervise", "-1"], "--supervise -1: give the largest number of restarts"),
     (["--split", "test"], "test"),],
)
def test_mistakes_are_one_sentence(data, tmp_path, capsys, more, words):
    assert extract(data, tmp_path, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("xsd: ") and words in said and said.count("\n") == 1


def test_only_clips_of_the_duration_and_no_more_than_asked_for(data, tmp_path):
    assert extract(data, tmp_path / "a", "--duration", "500ms") == 0
    assert set(store.ShardDataset(tmp_path / "a" / "teacher_forced").table()["clip"]) == {"000003"}
    assert extract(data, tmp_path / "b", "--max-samples", "3", "--seed", "1") == 0
    assert len(store.ShardDataset(tmp_path / "b" / "teacher_forced")) == 3


def test_status_of_a_stopped_run_and_of_one_that_is_being_written(data, tmp_path, capsys,
                                                                  monkeypatch):
    seen = []

    def tell(done):
        seen.append(cli.main(["data", "status", str(tmp_path)]))
        if done.done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress, "lines", lambda prefix: tell)
    assert extract(data, tmp_path) == supervise.INTERRUPTED
    said = capsys.readouterr().out
    assert seen == [0, 0] and f"running (process {os.getpid()}), 3 of 8 (38 %) samples" in said
    assert "interrupted after 6 samples" in said
    assert "the same command continues" in said
    assert cli.main(["data", "status", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "stopped, 6 of 8 (75 %) samples" in said
    assert "stopped runs are continued by the command that began them" in said
    monkeypatch.undo()
    assert extract(data, tmp_path) == 0 and "6 were done before" in capsys.readouterr().out
    assert cli.main(["data", "status", str(tmp_path)]) == 0
    assert cli.main(["data", "status", str(tmp_path / "nowhere")]) == 2


def test_an_error_in_the_middle_is_shown_by_status(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "Progress", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract(data, tmp_path)
    monkeypatch.undo()
    assert cli.main(["data", "status", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "errors and restarts (1):" in said
    assert f"error (process {os.getpid()}): ZeroDivisionError: division by zero" in said


def test_verify_names_what_is_wrong_and_repair_brings_back_the_bytes(data, tmp_path, capsys):
    assert extract(data, tmp_path) == 0
    place = tmp_path / "teacher_forced"
    before = {path.name: path.read_bytes() for path in place.glob("shard-*")}
    assert cli.main(["data", "verify", str(tmp_path)
                     ]) == 0 and f"{place}: all well" in capsys.readouterr().out
    shard = place / "shard-000001.safetensors"
    data_now = bytearray(shard.read_bytes())
    data_now[-1] ^= 1
    shard.write_bytes(data_now)
    (place / "shard-000000.parquet").unlink()
    assert cli.main(["data", "verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{place}: 2 problem(s)" in said
    assert "shard-000001.safetensors does not match its checksum; repair the run" in said
    assert cli.main(["data", "repair", str(tmp_path)]) == 0
    assert "2 file(s) mended, 0 problem(s) left" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in place.glob("shard-*")} == before


def test_repair_says_what_it_cannot_mend(five, data, tmp_path, capsys):
    assert extract(data, tmp_path) == 0
    (tmp_path / "teacher_forced" / "shard-000001.safetensors").unlink()
    (tmp_path / extract_request.FILE).unlink()
    assert cli.main(["data", "repair", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert ("does not say what it was extracted from (no extract.json); give --pair, --data and "
            "--split") in said
    assert cli.main(["data", "repair",
        str(tmp_path), "--pair",
        str(pair_folder()), "--data",
        str(data), "--split", "train"
    ]) == 1
    said = capsys.readouterr().out
    # it asked two questions
    assert "cannot be repaired with these models and samples: samples_hash is" in said


def test_a_damaged_manifest_states_that_are_no_numbers_and_mixed_runs_are_found(
        data, tmp_path, capsys, monkeypatch):
    assert extract(data, tmp_path, "--modes", "teacher_forced,free_running") == 0
    other = tmp_path / "other"
    assert extract(data, other, "--max-questions", "1") == 0
    (tmp_path / "free_running").rename(tmp_path / "set_aside")
    (other / "teacher_forced").rename(tmp_path / "free_running")
    assert cli.main(["data", "verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert ("is not of the run of free_running: max_questions is 1 in the folder but 2 now; they "
            "are of two runs") in said
    manifest = tmp_path / "set_aside" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    assert cli.main(["data", "verify", str(tmp_path / "set_aside")]) == 1
    said = capsys.readouterr().out
    assert "changed after it was written (its digest differs); restore it or extract again" in said


def test_the_request_is_kept_for_later(five, data):
    request = extract_request.load_request(five / "teacher_forced")
    assert request.data == str(data.resolve()) and request.max_questions == 2
    assert extract_request.load_request(ranks.Rank(0, 2).part(five / "teacher_forced"),
                                device="cuda").device == "cuda"
    with pytest.raises(ParameterError,
                       match="give the folder of the drives; `xsd data simulate FOLDER` makes one"):
        extract_request.Request(data="simulated").root()


def test_supervised_the_same_command_runs_without_that_option(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(supervise, "supervise", lambda command, *rest, **named: asked.append(
        (command, rest, named)) or 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert extract(data, tmp_path, "--supervise", "3", "--seed", "4") == 0
    assert extract(data, tmp_path, "--supervise=3") == 0
    (first, rest, named), (second, *_) = asked
    assert first[1:6] == ["-P", "-m", "xsd.cli", "data", "extract"]
    assert first[-2:] == second[-2:] == ["--supervise", "0"]
    assert rest == (tmp_path, 3) and named == {"part": "1 of 2"}


def test_old_chunks_are_imported(tmp_path, capsys, data):
    states = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    lines = [{"sample_idx": i, "question": "Q?", "egpt_text": "a", "vl_text": "b"}
             for i in range(2)]
    torch.save(
        {
            "egpt_hidden": states, "vl_hidden": states + 1, "seq_lens": torch.tensor([5, 3]),
            "metadata": lines
        }, tmp_path / "old.pt")
    assert cli.main(["data", "import-chunks",
        str(tmp_path / "old.pt"),
        str(tmp_path / "run"), "--data",
        str(data), "--split", "train"
    ]) == 0
    said = capsys.readouterr().out
    assert "2 free-running samples in fp32; the source has no token ids, which is marked" in said
    dataset = store.ShardDataset(tmp_path / "run")
    assert torch.equal(dataset[1].hidden_by_verifier,
                       states[1, :3] + 1) and dataset[1].sequence == "seq0"
    assert cli.main(["data", "verify", str(tmp_path / "run")]) == 0
    assert cli.main(["data", "import-chunks", str(tmp_path / "no.pt"), str(tmp_path / "no")]) == 2


def test_what_it_will_come_to_is_said_before_it_starts_and_whose_questions_they_were(
        data, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("Who crosses?\nIs it dark?\nWhere is the car?\n")
    more = ["--questions-file", str(tmp_path / "mine.txt"), "--max-scenes", "3"]
    assert extract(data, tmp_path / "run", *more) == 0
    said = capsys.readouterr().out
    assert "2 sequences, 3 clips, 2 questions: 6 pairs in 1 kind(s), at most 0.000 GB\n" in said
    stored = store.ShardDataset(tmp_path / "run" / "teacher_forced")
    assert stored.table()["question"].tolist()[:2] == ["Who crosses?", "Is it dark?"]
    told = stored.manifest["provenance"]["questions_file"]
    assert told["name"] == "mine.txt" and len(told["sha256"]) == 64
    assert extract(data, tmp_path / "spread", "--sampling", "spread",
                   "--questions-per-sequence", "1") == 0
    assert len(store.ShardDataset(tmp_path / "spread" / "teacher_forced")) == 2


def test_hours_come_from_one_batch_that_is_timed(tmp_path):
    pair, samples = tiny_pair(), make_samples(42)
    line = extract_request.announced(pair, samples, modes=["teacher_forced"], max_new_tokens=2,
                                     dtype="fp16", batch_size=2)
    assert line.endswith("GB, about 0.0 h as one batch took")
    assert "42 pairs" in line


def test_a_run_without_a_name_is_called_as_the_first_scripts_called_theirs():
    one = extract_request.Request("dsec", duration="1s", quant="4bit", event_frames=1)
    assert one.name() == "chunked_train_1s_4bit_1f"
    assert extract_request.Request("dsec", "test").name() == "chunked_test_all_float32"
