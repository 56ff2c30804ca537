"""The event-camera model against a real sensor that saw events and frames at once, and the clips
cut from that recording."""

import numpy as np
import pytest

from studies.embedded_pair import real_road
from xsd.core import ROOT, DatasetError, EventError, VideoError
from xsd.embedded.dvs import DvsConfig, simulate_events
from xsd.files import sha256_of
from xsd.sensors import event_files, folder, frames
from xsd.sensors import events as event_streams

PLACE = ROOT / "data" / "davis_road"
FILE = PLACE / "davis346_road.aedat4"


@pytest.fixture(scope="module")
def real():
    return event_streams.read_aedat4(FILE)


def test_the_recording_is_the_one_its_notice_names():
    assert sha256_of(FILE) in (PLACE / "NOTICE").read_text(encoding="utf-8")


def test_the_recording_holds_events_and_frames_on_one_clock(real):
    assert len(real.events) == 78_830
    assert (real.events.width, real.events.height) == (346, 260)
    assert real.frames.shape == (59, 260, 346)
    assert np.abs(np.diff(real.times_us) - 40_000).max() <= 1
    assert abs(int(real.events.t_us[0]) - int(real.times_us[0])) < 10_000


def test_simulated_events_match_the_real_sensors_in_number_and_place(real):
    result = real_road.compare_with_simulation(real, DvsConfig(), np.random.default_rng(0))
    assert result["n_real"] == 77_139
    assert result["ratio"] == pytest.approx(1, abs=0.15)
    assert result["spatial_correlation"] >= 0.95


def test_the_comparison_notices_a_sensor_of_another_kind(real):
    noisy = real_road.compare_with_simulation(real, DvsConfig.noisy(), np.random.default_rng(0))
    shuffled = event_streams.Recording(real.events, real.frames[:, :, ::-1], real.times_us)
    assert noisy["ratio"] > 5
    assert real_road.compare_with_simulation(shuffled, DvsConfig(),
                                             np.random.default_rng(0))["spatial_correlation"] < 0.7


def test_the_shipped_clips_are_cut_from_the_shipped_recording(real, tmp_path):
    assert real_road.write_clips(real, tmp_path, "davis_road") == 3
    for shipped, cut in zip(folder.open_folder(PLACE, "test"), folder.open_folder(tmp_path),
                            strict=True):
        first, second = folder.load_sample(shipped,
                                           "What moves?"), folder.load_sample(cut, "What moves?")
        assert (first.sequence, first.clip, first.t_us,
                first.source) == (second.sequence, second.clip, second.t_us, "recorded")
        assert np.array_equal(first.video, second.video)
        assert all(
            np.array_equal(a, b)
            for a, b in zip(first.event_frames, second.event_frames, strict=True))
        events = folder.load_events(shipped)
        assert np.array_equal(events.t_us, real.events.between(*first.t_us).t_us)
        assert all(
            np.array_equal(a, b) for a, b in zip(
                first.event_frames, frames.event_frames(events, 5, canvas="sensor"), strict=True))


def synthetic(seconds=2.0, fps=20):
    times = np.arange(int(seconds * fps)) * (1_000_000 // fps) + 7_000_000
    x = np.arange(24)
    video = np.stack([np.tile(127 + 100 * np.sin((x + k) / 3), (10, 1))
                      for k in range(len(times))]).astype(np.uint8)
    return event_streams.Recording(
        simulate_events(video, times, DvsConfig.clean(), np.random.default_rng(0)), video, times)


def test_a_simulation_from_the_same_frames_is_its_own_perfect_match():
    result = real_road.compare_with_simulation(synthetic(), DvsConfig.clean(),
                                               np.random.default_rng(0))
    assert result["ratio"] == 1
    assert result["spatial_correlation"] == pytest.approx(1)


def test_clips_overlap_by_half_and_the_last_frame_counts_its_interval():
    cuts = real_road.windows(synthetic())
    assert cuts == [(7_000_000, 8_000_000), (7_500_000, 8_500_000), (8_000_000, 9_000_000)]


def test_what_cannot_be_cut_or_compared_is_named(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=r"span 0\.4\d s, less than one clip of 1\.00 s"):
        real_road.windows(synthetic(0.5))
    still = event_streams.Recording(event_streams.empty(24, 10),
                                    synthetic().frames,
                                    synthetic().times_us)
    with pytest.raises(EventError, match="0 real and"):
        real_road.compare_with_simulation(still, DvsConfig.clean(), np.random.default_rng(0))
    (tmp_path / "cut.aedat4").write_bytes(FILE.read_bytes()[:100_000])
    with pytest.raises(EventError, match=r"cut\.aedat4 could not be read as events"):
        event_streams.read_aedat4(tmp_path / "cut.aedat4")
    shots = {"x": [0], "frames": np.zeros((2, 4, 4, 4), np.uint8), "times": np.array([5, 5])}
    for kinds, message in ((["RGBA"] * 2, "its frames are RGBA"), (["RGB"] * 2, "do not rise")):
        monkeypatch.setattr(event_files, "read_columns",
                            lambda _, kinds=kinds: shots | {"formats": np.array(kinds)})
        with pytest.raises(VideoError, match=message):
            event_streams.read_aedat4(tmp_path / "a.aedat4")
