"""Raw DSEC sequences, on a small one written in DSEC's own format."""

import h5py
import hdf5plugin
import numpy as np
import pytest
from PIL import Image

from xsd.core import DatasetError, EventError
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
