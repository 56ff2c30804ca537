"""Raw DSEC: a sequence the simulator writes in its format, and the command that cuts it."""

import os
import signal

import numpy as np
import pytest
from forks import forked

from studies import raw_dsec
from xsd import cli
from xsd.core import DatasetError, ParameterError, StorageError
from xsd.embedded import drive
from xsd.sensors import dsec, folder, frames
from xsd.steps import data

SMALL = {"duration_s": 0.6, "image_size": (24, 18), "rendered": (40, 30)}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    for index in range(2):
        raw_dsec.write(root / f"drive_{index}", seed=index, **SMALL)
    return root


def test_the_simulated_sequence_is_one_for_the_reader(raw):
    sequence = dsec.open_sequence(raw / "drive_0")
    assert len(sequence.image_paths) == 13 and np.diff(
        sequence.image_times_us).tolist() == [50_000] * 12
    first = int(sequence.image_times_us[0])
    events = dsec.read_window(sequence, first, first + 600_000)
    assert len(events) > 100 and events.t_us[0] > first and int(events.x.max()) < 640
    parts = [
        dsec.read_window(sequence, first + k * 100_000, first + (k + 1) * 100_000) for k in range(6)
    ]
    assert sum(map(len, parts)) == len(events)
    moved = dsec.read_window(sequence, first, first + 600_000, rectify=True)
    assert np.array_equal(moved.x, events.x)
    with pytest.raises(DatasetError, match="holds a raw sequence already"):
        raw_dsec.write(raw / "drive_0", seed=0)


def test_the_same_seed_gives_the_same_sequence(raw, tmp_path):
    raw_dsec.write(tmp_path / "again", seed=0, **SMALL)
    one, other = dsec.open_sequence(raw / "drive_0"), dsec.open_sequence(tmp_path / "again")
    start = int(one.image_times_us[0])
    a, b = dsec.read_window(one, start,
                            start + 600_000), dsec.read_window(other, start, start + 600_000)
    assert np.array_equal(a.t_us, b.t_us) and np.array_equal(a.x, b.x)
    assert one.image_paths[3].read_bytes() == other.image_paths[3].read_bytes()


def test_the_command_cuts_resumes_and_sums_up(raw, tmp_path, capsys):
    made = tmp_path / "made"
    options = ["--clip-ms", "300", "--hop-ms", "150", "--video-size", "12x9", "--canvas", "sensor"]
    assert cli.main(["prepare-dsec", str(raw / "drive_0"), str(made), *options]) == 0
    assert "3 clips of 1 sequences written" in capsys.readouterr().out
    assert cli.main(["prepare-dsec", str(raw), str(made), *options]) == 0
    said = capsys.readouterr().out
    assert "3 clips of 1 sequences written, 1 sequences were there already" in said
    assert "note: drive_1/000000" in said
    table = data.clips_table(made)
    assert list(table["start_s"]) == [0, 0.15, 0.3] * 2 and set(table["width"]) == {640}
    sample = folder.load_sample(folder.open_folder(made)[0], "What moves?")
    assert sample.video.shape == (8, 9, 12, 3) and sample.event_frames[0].shape == (480, 640, 3)


def test_mistakes_are_named(raw, tmp_path):
    with pytest.raises(ParameterError, match="written WxH, such as 480x360, not '480'"):
        frames.size_of("480")
    with pytest.raises(ParameterError, match="both must be at least 1 ms"):
        data.prepare_dsec(raw, tmp_path / "made", clip_ms=0)
    assert cli.main(["prepare-dsec", str(tmp_path), str(tmp_path / "made")]) == 2
    assert not (tmp_path / "made").exists()


def test_one_folder_is_cut_in_one_way(raw, tmp_path):
    data.prepare_dsec(raw / "drive_0", tmp_path / "made", clip_ms=300)
    with pytest.raises(ParameterError,
                       match="was begun with clip_ms=300, not 200; choose another folder"):
        data.prepare_dsec(raw, tmp_path / "made", clip_ms=200)
    assert data.prepare_dsec(raw, tmp_path / "made", clip_ms=300)["resumed"] == 1


def test_two_cannot_write_one_folder(raw, tmp_path):
    with folder.writing(tmp_path), pytest.raises(StorageError, match="is being written by"):
        data.prepare_dsec(raw, tmp_path)


def test_settings_that_cannot_be_read_are_named(raw, tmp_path):
    for content in ("{", "[]"):
        (tmp_path / data.SETTINGS).write_text(content)
        with pytest.raises(ParameterError, match=r"preparation.json is not JSON|was begun with"):
            data.prepare_dsec(raw, tmp_path)


@pytest.mark.parametrize("verb", ["prepare", "simulate"])
def test_killed_at_any_file_the_next_run_ends_in_the_same_bytes(raw, tmp_path, verb, monkeypatch):
    drives = list(drive.simulate(1, "test", 1)) if verb == "simulate" else []
    monkeypatch.setattr(drive, "simulate", lambda *_, **__: drives)

    def go(root):
        if verb == "prepare":
            data.prepare_dsec(raw, root, clip_ms=300, video_size=(12, 9))
        else:
            drive.write_dataset(root, split="test", n_sequences=1, seed=1)

    go(tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    real = folder._write_png, os.replace
    for die_at in (1, 2, 9, 40, 53):
        count = iter(range(1, 10_000))

        def step(real):
            def done(*given):
                if next(count) == die_at:  # noqa: B023 (forked at once)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*given)

            return done

        def dying():
            monkeypatch.setattr(folder, "_write_png", step(real[0]))
            monkeypatch.setattr(os, "replace", step(real[1]))
            go(tmp_path / "made")

        os.waitpid(forked(dying), 0)
    go(tmp_path / "made")
    assert files_of(tmp_path / "made") == whole


def files_of(root):
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*") if path.is_file()}
