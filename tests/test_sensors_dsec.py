"""Raw DSEC sequences, on a small one written in DSEC's own format."""

import h5py
import hdf5plugin
import numpy as np
import pytest
from PIL import Image

from xsd.core import DatasetError, EventError, VideoError
from xsd.sensors import dsec, folder, frames

OFFSET = 51_648_500_000


def write_sequence(root, n_images=41, n_events=4000, seed=0):
    """2.05 s of events and 20 Hz images on one clock; the events begin 3 ms before the first
    image."""
    draw = np.random.default_rng(seed)
    (root / "events" / "left").mkdir(parents=True)
    (root / "images" / "left" / "rectified").mkdir(parents=True)
    t = np.sort(draw.integers(0, 2_060_000, n_events)).astype(np.uint32)
    x, y = draw.integers(0, 640,
                         n_events).astype(np.uint16), draw.integers(0, 480,
                                                                    n_events).astype(np.uint16)
    columns = {"x": x, "y": y, "t": t, "p": draw.integers(0, 2, n_events).astype(np.uint8)}
    with h5py.File(root / "events" / "left" / "events.h5", "w") as file:
        for name, values in columns.items():
            file.create_dataset(f"events/{name}", data=values, **hdf5plugin.Blosc(cname="zstd"))
        file["ms_to_idx"] = np.searchsorted(t,
                                            np.arange(0, t[-1] // 1000 + 1) * 1000).astype(
                                                np.uint64)
        file["t_offset"] = OFFSET
    with h5py.File(root / "events" / "left" / "rectify_map.h5", "w") as file:
        grid = np.stack(np.meshgrid(np.arange(640), np.arange(480)), axis=-1).astype(np.float32)
        file["rectify_map"] = grid + np.float32([-2.0, 1.0])
    times = OFFSET + 3000 + np.arange(n_images) * 50_000
    (root / "images" / "timestamps.txt").write_text("\n".join(map(str, times)) + "\n")
    for i in range(n_images):
        Image.fromarray(np.full(
            (9, 12, 3), i, np.uint8)).save(root / "images" / "left" / "rectified" / f"{i:06d}.png")
    return columns, times


def test_a_window_holds_exactly_its_events_on_the_image_clock(tmp_path):
    columns, times = write_sequence(tmp_path / "zurich_city_00_a")
    sequence = dsec.open_sequence(tmp_path / "zurich_city_00_a")
    absolute = columns["t"].astype(np.int64) + OFFSET
    for start, end in [(times[0], times[0] + 1_000_000), (OFFSET - 5000, OFFSET + 700),
                       (OFFSET + 2_059_321, OFFSET + 9_000_000)]:
        events = dsec.read_window(sequence, int(start), int(end))
        inside = (absolute >= start) & (absolute < end)
        assert np.array_equal(events.t_us, absolute[inside])
        assert np.array_equal(events.x, columns["x"][inside])
    assert (events.width, events.height) == (640, 480)


def test_rectification_moves_events_and_drops_those_that_leave(tmp_path):
    columns, _ = write_sequence(tmp_path / "a")
    events = dsec.read_window(dsec.open_sequence(tmp_path / "a"), OFFSET, OFFSET + 3_000_000,
                              rectify=True)
    kept = (columns["x"] >= 2) & (columns["y"] < 479)
    assert np.array_equal(events.x, columns["x"][kept] - 2)
    assert np.array_equal(events.y, columns["y"][kept] + 1)


def test_a_raw_folder_becomes_a_dataset_folder(tmp_path):
    write_sequence(tmp_path / "raw" / "a")
    write_sequence(tmp_path / "raw" / "b", seed=1)
    seen = []
    summary = dsec.prepare(tmp_path / "raw", tmp_path / "made", split="train",
                           progress=lambda *step: seen.append(step))
    assert (summary["sequences"], summary["clips"], summary["skipped"]) == (2, 6, 0)
    assert "refuses 100 ms and more" in summary["notes"][0]
    assert seen[-1] == ("b", 3, 3)
    records = folder.open_folder(tmp_path / "made", "train")
    sample = folder.load_sample(records[0], "What moves?")
    assert sample.video[:, 0, 0, 0].tolist() == [0, 2, 5, 8, 10, 13, 16, 19]
    official = frames.event_frames(folder.load_events(records[0]), 5, canvas="slice")
    assert all(np.array_equal(a, b) for a, b in zip(sample.event_frames, official, strict=True))
    assert records[1].t_us[0] - records[0].t_us[0] == 500_000


def test_a_stopped_preparation_continues_with_the_next_sequence(tmp_path):
    write_sequence(tmp_path / "raw" / "a")
    dsec.prepare(tmp_path / "raw" / "a", tmp_path / "made", split="train", video_size=(8, 6))
    before = (tmp_path / "made" / "event_npy" / "a" / "000000.npy").stat().st_mtime_ns
    write_sequence(tmp_path / "raw" / "b", seed=1)
    summary = dsec.prepare(tmp_path / "raw", tmp_path / "made", split="train", video_size=(8, 6))
    assert (summary["resumed"], summary["sequences"]) == (1, 1)
    assert (tmp_path / "made" / "event_npy" / "a" / "000000.npy").stat().st_mtime_ns == before
    assert len(folder.open_folder(tmp_path / "made")) == 6


def test_incomplete_sequences_are_named(tmp_path):
    with pytest.raises(DatasetError, match="there is no raw DSEC sequence"):
        dsec.prepare(tmp_path, tmp_path / "made", split="train")
    write_sequence(tmp_path / "a")
    sequence = dsec.open_sequence(tmp_path / "a")
    (tmp_path / "a" / "events" / "left" / "rectify_map.h5").unlink()
    with pytest.raises(DatasetError, match=r"has no events/left/rectify_map\.h5"):
        dsec.read_window(dsec.open_sequence(tmp_path / "a"), OFFSET, OFFSET + 1000, rectify=True)
    sequence.events_path.write_bytes(b"half a download")
    with pytest.raises(EventError, match="could not be read as DSEC events"):
        dsec.read_window(sequence, OFFSET, OFFSET + 1000)
    times = tmp_path / "a" / "images" / "timestamps.txt"
    times.write_text("1\n2\n")
    with pytest.raises(DatasetError, match="41 images but 2 timestamps"):
        dsec.open_sequence(tmp_path / "a")
    times.write_text("soon\n")
    with pytest.raises(DatasetError, match="one whole number"):
        dsec.open_sequence(tmp_path / "a")
    sequence.events_path.unlink()
    with pytest.raises(DatasetError, match=r"events\.h5 is missing"):
        dsec.open_sequence(tmp_path / "a")


def change(root, **columns):
    """Replace columns of a sequence's events.h5; __ stands for a slash."""
    with h5py.File(root / "events" / "left" / "events.h5", "r+") as file:
        for name, values in columns.items():
            name = name.replace("__", "/")
            values = values(file[name][()]) if callable(values) else values
            del file[name]
            file[name] = values


@pytest.mark.parametrize(("changes", "message"), [
    ({"events__t": lambda t: t / 1e6}, "column 't' is float64"),
    ({"events__p": lambda p: p * np.uint8(255)}, "polarity runs from 0 to 255"),
    ({"events__x": lambda x: x + np.uint16(300)}, "but the sensor is 640x480"),
    ({"events__t": lambda t: t[::-1]}, "ms_to_idx does not lead|is not sorted"),
    ({"ms_to_idx": lambda i: 0 * i}, "ms_to_idx does not lead to the events"),
    ({"ms_to_idx": lambda i: i + np.uint64(7)}, "ms_to_idx does not lead to the events"),
    ({"ms_to_idx": np.zeros(0, int)}, "could not be read as DSEC events"),
    ({"ms_to_idx": 5}, "no column ms_to_idx"), ({"t_offset": [1, 2]}, "not one whole number")])
def test_events_that_are_not_dsecs_are_named(tmp_path, changes, message):
    _, times = write_sequence(tmp_path / "a")
    change(tmp_path / "a", **changes)
    with pytest.raises(EventError, match=message):
        dsec.read_window(dsec.open_sequence(tmp_path / "a"), int(times[3]), int(times[33]))


def test_an_offset_of_one_element_is_an_offset(tmp_path):
    columns, times = write_sequence(tmp_path / "a")
    change(tmp_path / "a", t_offset=[OFFSET])
    events = dsec.read_window(dsec.open_sequence(tmp_path / "a"), OFFSET, int(times[-1]))
    assert np.array_equal(events.t_us, columns["t"][:len(events)].astype(np.int64) + OFFSET)


def test_times_that_no_recording_has_are_refused_before_clips_are_counted(tmp_path):
    _, times = write_sequence(tmp_path / "a")
    stamps = tmp_path / "a" / "images" / "timestamps.txt"
    for last, message in ((10**17, "more than a day"), (10**30, "one whole number")):
        stamps.write_text("\n".join(map(str, [*times[:-1], last])))
        with pytest.raises(DatasetError, match=message):
            dsec.open_sequence(tmp_path / "a")
    stamps.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="one whole number"):
        dsec.open_sequence(tmp_path / "a")
    with pytest.raises(VideoError, match=r"make .* clips; check the times or choose a longer hop"):
        frames.windows(np.array([0, 50_000, 8 * 10**10]), 1000, 1000)


def test_a_rectify_map_is_checked_before_events_are_moved_by_it(tmp_path):
    write_sequence(tmp_path / "a")
    sequence = dsec.open_sequence(tmp_path / "a")
    for table in (np.zeros((4, 4, 2), np.float32), np.zeros((480, 640, 2), int)):
        with h5py.File(sequence.rectify_path, "w") as file:
            file["rectify_map"] = table
        with pytest.raises(EventError, match="rectify_map"):
            dsec.read_window(sequence, OFFSET, OFFSET + 9_000, rectify=True)
    with h5py.File(sequence.rectify_path, "w") as file:
        file["rectify_map"] = np.full((480, 640, 2), np.nan, np.float32)
    assert len(dsec.read_window(sequence, OFFSET, OFFSET + 9_000, rectify=True)) == 0


def test_the_folder_one_stands_in_has_a_name(tmp_path, monkeypatch):
    write_sequence(tmp_path / "zurich")
    monkeypatch.chdir(tmp_path / "zurich")
    dsec.prepare(".", tmp_path / "made", split="train")
    assert {one.sequence for one in folder.open_folder(tmp_path / "made")} == {"zurich"}
