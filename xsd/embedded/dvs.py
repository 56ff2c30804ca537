"""The event camera: luminance frames in, ON and OFF events out, as in v2e on ESIM's linear
interpolation in time, but with ``ln(I + 20)`` (docs/sensors.md, section 1). Its state is the
difference ``d`` between the low-passed log intensity and the level memorised at the pixel's last
event (float32 resolves it better than two large levels):

    d:  +0.05 --(frame: +0.47)--> 0.52 = 2 ON events of 0.2, and 0.12 are left for the next frame
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from xsd.core import EventError
from xsd.sensors import events as event_streams
from xsd.sensors.events import Events

_LONG_AGO_US = -(2**62)
_WHITE = 255.0
_Fired = tuple[np.ndarray, np.ndarray, np.ndarray]  # pixel, time in µs, polarity


@dataclass(frozen=True)
class DvsConfig:
    """What kind of event camera; the defaults match a real DAVIS346 (docs/sensors.md, section 2).
    threshold_on, threshold_off: rise and fall of log intensity that make an event, means over
    pixels; threshold_sigma: their deviation. cutoff_hz: low-pass of a fully lit pixel (0: none).
    leak_hz, shot_hz: spontaneous ON events per pixel, noise events per dark pixel, each second.
    refractory_us: an event closer than this to its pixel's last one is dropped. offset: added to
    the luminance before the logarithm."""

    threshold_on: float = 0.2
    threshold_off: float = 0.2
    threshold_sigma: float = 0.03
    cutoff_hz: float = 300.0
    leak_hz: float = 0.01
    shot_hz: float = 0.001
    refractory_us: int = 500
    offset: float = 20.0

    def __post_init__(self) -> None:
        if min(self.threshold_on, self.threshold_off, self.offset) <= 0:
            raise EventError(f"the event camera needs thresholds and offset above 0; got {self}")
        if min(self.threshold_sigma, self.cutoff_hz, self.leak_hz, self.shot_hz,
               self.refractory_us) < 0:
            raise EventError("the event camera's sigma, rates and refractory time cannot be "
                             f"negative; got {self}")

    @classmethod
    def clean(cls) -> Self:
        """An ideal sensor: equal thresholds, no low-pass, no noise, no refractory time."""
        return cls(threshold_sigma=0.0, cutoff_hz=0.0, leak_hz=0.0, shot_hz=0.0, refractory_us=0)

    @classmethod
    def noisy(cls) -> Self:
        """A sensor in poor light: v2e's noisy preset."""
        return cls(threshold_sigma=0.05, cutoff_hz=30.0, leak_hz=0.1, shot_hz=5.0)


class DvsSimulator:
    """One sensor, shown frame after frame. generator: draws thresholds now, noise at each step."""

    def __init__(self, height: int, width: int, config: DvsConfig,
                 generator: np.random.Generator) -> None:
        self.height, self.width, self.config, self.generator = height, width, config, generator
        n = height * width
        self.threshold_on = self._draw_thresholds(config.threshold_on, n)
        self.threshold_off = self._draw_thresholds(config.threshold_off, n)
        self.time_us: int | None = None
        self._low_passed = np.zeros(n, np.float32)
        self._difference = np.zeros(n, np.float32)
        self._last_event_us = np.full(n, _LONG_AGO_US, np.int64)

    def _draw_thresholds(self, mean: float, n: int) -> np.ndarray:
        sigma = self.config.threshold_sigma
        drawn = self.generator.normal(mean, sigma, n) if sigma else np.full(n, mean)
        return np.maximum(drawn, 0.01).astype(np.float32)

    def step(self, luminance: np.ndarray, time_us: int) -> Events:
        """Events since the previous frame, in order; the first, float or uint8 [H, W], initialises.
        Raises: EventError for another shape, luminance outside 0…255, time that does not rise."""
        level = self._level(luminance)
        log_level = np.log(level)
        if self.time_us is None:
            self._low_passed, self.time_us = log_level, int(time_us)
            return event_streams.empty(self.width, self.height)
        start_us, self.time_us = self.time_us, int(time_us)
        duration_us = self.time_us - start_us
        if duration_us <= 0:
            raise EventError(
                f"a frame at {time_us} µs follows one at {start_us} µs; frame times must rise")
        before = self._difference
        after = self._advance(level, log_level, duration_us * 1e-6)
        parts = [self._signal_events(before, after, start_us, duration_us)]
        self._difference = after
        if self.config.shot_hz:
            parts += self._shot_events(level, start_us, duration_us)
        pixel, time, polarity = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(time, kind="stable")
        y, x = np.divmod(pixel[order], self.width)
        return Events(x.astype(np.uint16), y.astype(np.uint16), time[order],
                      polarity[order].astype(np.uint8), self.width, self.height)

    def _level(self, luminance: np.ndarray) -> np.ndarray:
        frame = np.asarray(luminance)
        if frame.shape != (self.height, self.width):
            raise EventError(f"the event camera sees {self.height}x{self.width} pixels (height x "
                             f"width) but was shown an array of shape {frame.shape}")
        level = frame.reshape(-1).astype(np.float32)
        if not (level.min() >= 0 and level.max() <= _WHITE):  # written so that NaN fails too
            raise EventError(f"luminance must lie in 0…255; got {level.min()}…{level.max()} (scale "
                             "the frame first)")
        return level + np.float32(self.config.offset)

    def _advance(self, level: np.ndarray, log_level: np.ndarray, duration_s: float) -> np.ndarray:
        """Low-pass and leak: the new ``d`` before any event is taken off it."""
        config, low_passed = self.config, log_level
        if config.cutoff_hz:
            # epsilon = (I + offset) / (255 + offset) * dt / tau, tau = 1 / (2 pi f_c), at most 1
            gain = duration_s * 2 * math.pi * config.cutoff_hz / (_WHITE + config.offset)
            epsilon = np.minimum(level * np.float32(gain), np.float32(1))
            low_passed = (log_level - self._low_passed) * epsilon + self._low_passed
        after = low_passed - self._low_passed + self._difference
        self._low_passed = low_passed
        if config.leak_hz:
            after += np.float32(duration_s * config.leak_hz) * self.threshold_on
        return after

    def _signal_events(self, before: np.ndarray, after: np.ndarray, start_us: int,
                       duration_us: int) -> _Fired:
        """Of the pixels whose ``d`` passed a threshold; takes them off ``after`` in place."""
        fired = np.flatnonzero((after >= self.threshold_on) | (after <= -self.threshold_off))
        if not fired.size:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool)
        start, end = before[fired].astype(np.float64), after[fired].astype(np.float64)
        rising = end > 0
        sign = np.where(rising, 1.0, -1.0)
        threshold = np.where(rising, self.threshold_on[fired], self.threshold_off[fired])
        threshold = threshold.astype(np.float64)
        # at least 1: float64 division may fall a hair short of the float32 comparison above
        count = np.maximum(np.floor(sign * end / threshold).astype(np.int64), 1)
        after[fired] = (end - sign * count * threshold).astype(np.float32)

        # d runs on a straight line from start to end, so crossing number k happens at
        # (k * threshold - |start|) / |end - start| of the interval
        slope, origin = duration_us / (sign * (end - start)), sign * start
        last_us, parts = self._last_event_us, []
        for k in range(1, int(count.max()) + 1):
            alive = np.flatnonzero(count >= k)
            pixel = fired[alive]
            offset_us = np.rint((k * threshold[alive] - origin[alive]) * slope[alive])
            time = start_us + np.clip(offset_us, 1, duration_us).astype(np.int64)
            kept = time - last_us[pixel] >= self.config.refractory_us
            pixel, time = pixel[kept], time[kept]
            last_us[pixel] = time
            parts.append((pixel, time, rising[alive[kept]]))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _shot_events(self, level: np.ndarray, start_us: int, duration_us: int) -> list[_Fired]:
        """Noise events, which also reset their pixel's ``d``. Chance per pixel: (R/2) dt (1 - 0.75
        (I + 20) / 275), ON and OFF each; a uniformly drawn subset of binomial size, thinned by
        brightness, is exactly that independent draw and touches few pixels."""
        chance = min(1.0, self.config.shot_hz / 2 * duration_us * 1e-6)
        brightest, found = _WHITE + self.config.offset, []
        for polarity in (True, False):
            n = int(self.generator.binomial(level.size, chance))
            if n == 0:
                continue
            pixel = self.generator.choice(level.size, n, replace=False)
            pixel = pixel[self.generator.random(n) < 1 - 0.75 * level[pixel] / brightest]
            time = start_us + self.generator.integers(1, duration_us + 1, pixel.size)
            # also drops noise drawn before the pixel's own event of this interval, so that a
            # pixel's events stay in order and apart
            kept = time - self._last_event_us[pixel] >= self.config.refractory_us
            pixel, time = pixel[kept], time[kept]
            self._last_event_us[pixel] = time
            self._difference[pixel] = 0
            found.append((pixel, time, np.full(pixel.size, polarity)))
        return found


def simulate_events(frames: np.ndarray | Iterable[np.ndarray], times_us: Sequence[int] | np.ndarray,
                    config: DvsConfig, generator: np.random.Generator) -> Events:
    """Events of luminance frames [T, H, W] at T rising times, in order, within (times_us[0],
    times_us[-1]]. generator: the only source of randomness. Raises: EventError for no frame,
    another number of times; as DvsSimulator.step."""
    frames = frames if isinstance(frames, np.ndarray) else list(frames)
    if len(frames) == 0 or len(frames) != len(times_us):
        raise EventError("simulating events needs at least one frame and one time for each; got "
                         f"{len(frames)} frames and {len(times_us)} times")
    simulator = DvsSimulator(*np.shape(frames[0]), config, generator)
    return event_streams.join([simulator.step(frame, int(time))
                               for frame, time in zip(frames, times_us, strict=True)])
