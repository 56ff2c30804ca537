"""The event-camera model against what its formulas predict."""

import math

import numpy as np
import pytest

from xsd.core import EventError
from xsd.embedded.dvs import DvsConfig, DvsSimulator, simulate_events

CLEAN = DvsConfig.clean()


def luminance(log_level):
    """The luminance whose ln(I + 20) is log_level."""
    return np.exp(np.asarray(log_level, np.float64)) - 20


def one_pixel(log_levels, times_us, config=CLEAN, seed=0):
    return simulate_events(
        luminance(log_levels)[:, None, None].astype(np.float32), times_us, config,
        np.random.default_rng(seed))


def test_a_ramp_gives_the_predicted_count_and_times():
    events = one_pixel([4.0, 5.1],
                       [0, 110_000])  # contrast 1.1 = 5 thresholds of 0.2 and a remainder of 0.1
    assert events.p.tolist() == [1] * 5
    assert np.abs(events.t_us - np.array([20_000, 40_000, 60_000, 80_000, 100_000])).max() <= 1


def test_a_ramp_cut_into_frames_gives_the_events_of_the_whole_ramp():
    times = np.arange(0, 110_001, 1000)
    whole, cut = one_pixel([4.0, 5.1], [0, 110_000]), one_pixel(4.0 + times * 1e-5, times)
    assert len(cut) == len(whole)
    assert np.abs(cut.t_us - whole.t_us).max() <= 3


def test_a_step_up_and_a_step_down_are_mirror_images():
    up, down = one_pixel([4.0, 5.1], [0, 1000]), one_pixel([5.1, 4.0], [0, 1000])
    assert up.t_us.tolist() == down.t_us.tolist()
    assert set(up.p) == {1}
    assert set(down.p) == {0}


def test_the_remainder_is_carried_to_the_next_frame():
    events = one_pixel([4.0, 4.15, 4.25, 4.39], [0, 1000, 2000, 3000])
    assert events.t_us.tolist() == [
        1500
    ], "0.15 and 0.10 together pass 0.2 once; the remaining 0.19 does not"
    assert len(one_pixel([4.0, 4.15, 4.0, 4.15],
                         [0, 1000, 2000, 3000])) == 0, "what goes back is not counted"


def test_the_first_frame_only_initialises():
    assert len(one_pixel([5.0], [0])) == 0
    assert len(one_pixel([5.0, 5.0], [7, 9])) == 0


def test_events_within_the_refractory_time_are_dropped():
    spaced = DvsConfig(threshold_sigma=0, cutoff_hz=0, leak_hz=0, shot_hz=0, refractory_us=350)
    events = one_pixel([4.0, 5.1], [0, 1100], spaced)  # events at 200, 400, …, 1000 µs
    assert events.t_us.tolist() == [200, 600, 1000]
    later = one_pixel([4.0, 4.21, 4.42], [0, 210, 420], spaced)
    assert later.t_us.tolist() == [200], "the last event is remembered across frames"
    assert len(one_pixel([4.0, 5.1, 5.1 + 0.09, 5.1 + 0.11], [0, 100, 10_000, 20_000],
                         spaced)) == 2, ("a dropped event still moves the memorised level")


def test_leak_makes_on_events_at_its_rate():
    config = DvsConfig(threshold_sigma=0, leak_hz=2.0, shot_hz=0)
    events = simulate_events(np.full((1001, 4, 5), 100, np.uint8),
                             np.arange(1001) * 10_200, config, np.random.default_rng(0))
    assert len(events) == 20 * 20, "10.2 s at 2 Hz on 20 pixels: 20 events each"
    assert set(events.p) == {1}


def test_thresholds_scatter_around_their_mean_and_stay_positive():
    simulator = DvsSimulator(100, 100,
                             DvsConfig(threshold_on=0.3, threshold_off=0.2, threshold_sigma=0.03),
                             np.random.default_rng(3))
    assert simulator.threshold_on.mean() == pytest.approx(0.3, abs=0.002)
    assert simulator.threshold_off.mean() == pytest.approx(0.2, abs=0.002)
    assert simulator.threshold_on.std() == pytest.approx(0.03, rel=0.05)
    assert DvsSimulator(100, 100, DvsConfig(threshold_sigma=0.2),
                        np.random.default_rng(3)).threshold_on.min() == pytest.approx(0.01)


def test_the_low_pass_follows_a_step_with_its_time_constant():
    config = DvsConfig(threshold_sigma=0, cutoff_hz=10.0, leak_hz=0, shot_hz=0, refractory_us=0)
    low, high = math.log(20 + 150), math.log(20 + 255)
    simulator = DvsSimulator(1, 1, config, np.random.default_rng(0))
    simulator.step(np.full((1, 1), 150.0), 0)
    for time_us in range(10, 16_000, 10):  # a fully lit pixel has tau = 1 / (2 pi 10 Hz) = 15.9 ms
        simulator.step(np.full((1, 1), 255.0), time_us)
    reached = (float(simulator._low_passed[0]) - low) / (high - low)
    assert reached == pytest.approx(1 - math.exp(-15.99 / 15.915), abs=0.002)


def test_dark_pixels_are_slower_than_bright_ones():
    config = DvsConfig(threshold_sigma=0, cutoff_hz=100.0, leak_hz=0, shot_hz=0)
    dark, bright = (one_pixel([level, level + 0.6], [0, 1000], config) for level in (3.1, 5.0))
    assert (len(dark), len(bright)) == (
        0, 1), "the same contrast: 9 % of it passes within 1 ms in the dark, 62 % in the light"


def test_shot_noise_has_its_rate_in_the_dark_and_less_in_the_light():
    config = DvsConfig(threshold_sigma=0, leak_hz=0, shot_hz=5.0, refractory_us=0)
    frames = np.zeros((201, 50, 50), np.uint8)
    dark = simulate_events(frames, np.arange(201) * 10_000, config, np.random.default_rng(0))
    bright = simulate_events(frames + 255,
                             np.arange(201) * 10_000, config, np.random.default_rng(0))
    assert len(dark) == pytest.approx(5 * 2 * 2500 * (1 - 0.75 * 20 / 275), rel=0.03)
    assert len(bright) == pytest.approx(5 * 2 * 2500 * 0.25, rel=0.05)
    assert dark.p.mean() == pytest.approx(0.5, abs=0.02)


def noise_video(seed=1, n=12, height=9, width=7):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width)).astype(
        np.uint8), np.arange(n) * 3000


def test_the_same_seed_gives_the_same_events_and_another_seed_others():
    frames, times = noise_video()
    first, again, other = (simulate_events(frames, times, DvsConfig.noisy(),
                                           np.random.default_rng(seed)) for seed in (5, 5, 6))
    for name in ("x", "y", "t_us", "p"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert len(first) != len(other) or not np.array_equal(first.t_us, other.t_us)


@pytest.mark.parametrize(
    "config",
    [DvsConfig(), DvsConfig.noisy(),
     DvsConfig(threshold_on=0.15, threshold_off=0.25)])
def test_the_stream_is_sorted_inside_the_sensor_and_keeps_the_refractory_time(config):
    frames, times = noise_video()
    events = simulate_events(frames, times, config, np.random.default_rng(2))
    assert events.x.dtype == events.y.dtype == np.uint16
    assert events.t_us.dtype == np.int64
    assert events.p.dtype == np.uint8
    assert (np.diff(events.t_us) >= 0).all()
    assert events.t_us.min() > 0
    assert events.t_us.max() <= times[-1]
    assert events.x.max() < events.width == 7
    assert events.y.max() < events.height == 9
    for pixel in range(63):
        own = events.t_us[(events.y.astype(int) * 7 + events.x) == pixel]
        assert (np.diff(own) >= config.refractory_us).all()


def slow_model(frames, times, theta_on, theta_off):
    """The formulas pixel by pixel in plain Python floats: base is kept, each crossing is found on
    the line between two frames."""
    found = []
    for y in range(frames.shape[1]):
        for x in range(frames.shape[2]):
            base = before = math.log(float(frames[0, y, x]) + 20)
            for k in range(1, len(frames)):
                level = math.log(float(frames[k, y, x]) + 20)
                while level - base >= theta_on:
                    base += theta_on
                    found.append((times[k - 1] + (base - before) / (level - before) *
                                  (times[k] - times[k - 1]), x, y, 1))
                while base - level >= theta_off:
                    base -= theta_off
                    found.append((times[k - 1] + (base - before) / (level - before) *
                                  (times[k] - times[k - 1]), x, y, 0))
                before = level
    return found


def test_the_vectorised_model_agrees_with_the_pixel_by_pixel_one():
    frames, times = noise_video(seed=4)
    config = DvsConfig(threshold_on=0.21, threshold_off=0.17, threshold_sigma=0, cutoff_hz=0,
                       leak_hz=0, shot_hz=0, refractory_us=0)
    events = simulate_events(frames, times, config, np.random.default_rng(0))
    expected = slow_model(frames, times, 0.21, 0.17)
    assert len(events) == len(expected)
    got = sorted(
        zip(events.x.tolist(), events.y.tolist(), events.t_us.tolist(), events.p.tolist(),
            strict=True))
    want = sorted((x, y, t, p) for t, x, y, p in expected)
    assert all(a[:2] == b[:2] and abs(a[2] - b[2]) <= 1 and a[3] == b[3]
               for a, b in zip(got, want, strict=True))


def test_frame_by_frame_is_the_same_as_all_at_once():
    frames, times = noise_video()
    whole = simulate_events(frames, times, DvsConfig(), np.random.default_rng(9))
    simulator = DvsSimulator(9, 7, DvsConfig(), np.random.default_rng(9))
    steps = [simulator.step(frame, time) for frame, time in zip(frames, times, strict=True)]
    assert np.array_equal(np.concatenate([step.t_us for step in steps]), whole.t_us)


def test_what_cannot_be_simulated_is_refused_in_one_sentence():
    generator = np.random.default_rng(0)
    still = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(EventError,
                       match="at least one frame and one time for each; got 2 frames and 3 times"):
        simulate_events(still, [0, 1, 2], CLEAN, generator)
    with pytest.raises(EventError, match="frame times must rise"):
        simulate_events(still, [5, 5], CLEAN, generator)
    with pytest.raises(EventError, match="luminance must lie in 0…255"):
        simulate_events(still + np.nan, [0, 1], CLEAN, generator)
    with pytest.raises(EventError, match="sees 3x4 pixels"):
        DvsSimulator(3, 4, CLEAN, generator).step(np.zeros((4, 3)), 0)
    with pytest.raises(EventError, match="cannot be negative"):
        DvsConfig(leak_hz=-1)
