"""The real recording (data/davis_road): its events against those simulated from its frames, its
clips, and what the embedded pair, which was never shown it, says about it against what a person
sees there.

The recording looks down on a street from a window, by day, with parked and passing cars before
houses and trees: another camera, another height, grey pictures. So this asks for sense, not for
accuracy: of the few facts that can be told from the video by eye.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from xsd.core import DatasetError, EventError
from xsd.embedded import dvs, language
from xsd.sensors import folder, frames, timed_video
from xsd.sensors.events import Recording
from xsd.steps import data

CLIP_US, HOP_US = 1_000_000, 500_000

SEEN = {"time": ("day",), "ego": ("stopped",), "scenery": ("houses", "trees"), "vehicle": ("car",)}
"""fact → what a person sees in ``data/davis_road`` (both kinds of scenery are there)."""
_VEHICLES = ("car", "van", "truck", "bus")


def stated(text: str) -> list[tuple[str, str]]:
    """The (fact, value) of an answer that SEEN can judge, in the order of mention."""
    named = [("vehicle" if fact == "kind" and value in _VEHICLES else fact, value)
             for fact, value in language.mentions(text)]
    return [(fact, value) for fact, value in named if fact in SEEN and value != "static"]


def judge(pair: Any, simulated: Iterable[tuple[Any, dict[str, Any], str]], *,
          max_new_tokens: int = 64) -> pd.DataFrame:
    """Both models' ten answers about each of the recording's three clips.

    simulated: of simulated drives, as card.held_out gives them: how often the right answers there
    state the same values is what a model that ignores its sensor would reach (``by_chance``).

    Returns: one row per role and fact: role, fact, right, stated, share, by_chance (NaN where never
    stated). 30 answers of three overlapping clips of one scene: too few for an interval.
    """
    rows = list(simulated)
    asked = [lazy.load() for lazy in data.samples(data.root_of("", data.RECORDED, "test"), "test")]
    lines = []
    for role in ("verifier", "drafter"):
        handle = getattr(pair, role)
        with torch.inference_mode():
            answers = handle.generate(asked, max_new_tokens)
        said = [one for answer in answers for one in stated(handle.text(answer.ids.tolist()))]
        usual = [one for _, facts, kind in rows
                 for one in stated(language.answer(facts, kind, role))]
        for fact, values in SEEN.items():
            own, there = (pd.Series([value in values for name, value in some if name == fact],
                                    dtype=float) for some in (said, usual))
            lines.append({"role": role, "fact": fact, "right": int(own.sum()), "stated": len(own),
                          "share": own.mean(), "by_chance": there.mean()})
    return pd.DataFrame(lines)


# --- the recording itself


def windows(recording: Recording) -> list[tuple[int, int]]:
    """Start and end of every whole clip, in µs. Raises: DatasetError when not one fits."""
    times = recording.times_us
    cuts = frames.windows(times, CLIP_US, HOP_US)
    if not cuts:
        raise DatasetError(f"the frames span {(times[-1] - times[0]) / 1e6:.2f} s, less than one "
                           f"clip of {CLIP_US / 1e6:.2f} s; record longer")
    return cuts


def write_clips(recording: Recording, root: str | Path, sequence: str, *,
                split: str = "test") -> int:
    """Cut a recording and write it as a dataset folder. Returns: the number of clips. Raises:
    DatasetError when it is too short; EventError for a window with fewer than five events."""
    cuts, times = windows(recording), recording.times_us
    with folder.FolderWriter(root, split, source="recorded") as writer:
        for k, (start_us, end_us) in enumerate(cuts):
            inside = np.flatnonzero((times >= start_us) & (times < end_us))
            video = recording.frames[inside[frames.uniform_indices(len(inside), 8)]]
            if video.ndim == 3:
                video = np.repeat(video[..., None], 3, axis=3)
            writer.add(sequence, f"{k:06d}", events=recording.events.between(start_us, end_us),
                       video=video, t_us=(start_us, end_us))
    return len(cuts)


def compare_with_simulation(recording: Recording, config: dvs.DvsConfig,
                            generator: np.random.Generator) -> dict[str, Any]:
    """Simulate events from the frames of a recording and hold them against its real ones: counts,
    shares of ON, and the Pearson correlation of counts in cells of 4 x 4 pixels over the time the
    frames span. Raises: EventError when either has no event."""
    luminance, times = recording.frames, recording.times_us
    if luminance.ndim == 4:
        luminance = timed_video.luminance(luminance)
    simulated = dvs.simulate_events(luminance, times, config, generator)
    real = recording.events.between(int(times[0]) + 1, int(times[-1]) + 1)
    if not len(real) or not len(simulated):
        raise EventError(f"nothing to compare: {len(real)} real and {len(simulated)} simulated "
                         "events while the frames were taken")
    edges = [np.arange(0, size + 4, 4) for size in luminance.shape[1:]]
    maps = [np.histogram2d(one.y, one.x, edges)[0].ravel() for one in (real, simulated)]
    return {
        "n_real": len(real), "n_simulated": len(simulated), "ratio": len(simulated) / len(real),
        "on_share_real": float(real.p.mean()), "on_share_simulated": float(simulated.p.mean()),
        "spatial_correlation": float(np.corrcoef(*maps)[0, 1]),
    }
