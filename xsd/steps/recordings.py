"""Any event recording or any video before the pair: answers, states and token acceptance, and plain
warnings where it is out of its depth.

What is missing is made, and said so: a video gets events from the event-camera model, run on its
luminance; an event file without pictures shows the verifier its painted events, which it was never
trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from xsd.adapters import registry
from xsd.core import ROOT, EventError, PairedStates, ParameterError, Sample, VideoError
from xsd.embedded import drive, dvs, language, recording
from xsd.evaluate import statistics
from xsd.evaluate.acceptance import Acceptance, Rounds, rounds_from_lists
from xsd.extract import pairs
from xsd.models.loading import Pair
from xsd.runs import folder
from xsd.sensors import events as event_streams
from xsd.sensors import frames, timed_video
from xsd.sensors.events import Events
from xsd.shards import store
from xsd.steps.traces import Trace

EVENT_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".aedat4")
N_VIDEO = 8
SHIPPED = "davis_road"
"""Name of the recording that comes with the project: a DAVIS346 beside a road, events and grey
pictures."""


@dataclass(frozen=True, eq=False)
class Source:
    """A recording on one clock. pictures: uint8 [T, H, W, 3] and times_us int64 [T], or None for an
    event file without any.

    kind: which of the two was made here ("events from the video", "pictures from the events") or
    "both recorded".
    """

    name: str
    events: Events
    pictures: np.ndarray | None
    times_us: np.ndarray
    kind: Literal["both recorded", "events from the video", "pictures from the events"]

    @property
    def span_us(self) -> tuple[int, int]:
        """Start and end (not included) of what can be cut into clips."""
        if self.pictures is None:
            return int(self.events.t_us[0]), int(self.events.t_us[-1]) + 1
        gap = int(np.median(np.diff(self.times_us))) if len(self.times_us) > 1 else 40_000
        return int(self.times_us[0]), int(self.times_us[-1]) + gap


def open_source(path: str | Path, *, max_seconds: float = 10.0, max_side: int = 346,
                seed: int = 0) -> Source:
    """``"davis_road"``, an event file (.npy, .npz, .h5, .aedat4) or a video. max_seconds, max_side:
    how much of a video is read, and how large it may be.

    Raises: EventError, VideoError; VideoError for a video of a single picture, which moves nothing.
    """
    path = ROOT / "data/davis_road/davis346_road.aedat4" if str(
        path) == SHIPPED else folder.resolve(path)
    if path.suffix.lower() not in EVENT_SUFFIXES:
        pictures, times = timed_video.read(path, max_seconds=max_seconds, max_side=max_side)
        if len(pictures) < 2:
            raise VideoError(
                f"{path} holds a single picture; the event-camera model needs at least two")
        made = dvs.simulate_events(timed_video.luminance(pictures), times, dvs.DvsConfig(),
                                   np.random.default_rng(seed))
        return Source(path.stem, made, pictures, times, "events from the video")
    if path.suffix.lower() == ".aedat4":
        try:
            found = recording.read_aedat4(path)
        except VideoError:  # events alone, from a sensor that takes no pictures
            return Source(path.stem, event_streams.read_events(path), None, np.empty(0, np.int64),
                          "pictures from the events")
        pictures = found.frames if found.frames.ndim == 4 else np.repeat(
            found.frames[..., None], 3, axis=3)
        return Source(path.stem, found.events, pictures, found.times_us, "both recorded")
    return Source(path.stem, event_streams.read_events(path), None, np.empty(0, np.int64),
                  "pictures from the events")


def cut(source: Source, *, clip_ms: int = 1000, hop_ms: int = 500, max_clips: int = 6,
        canvas: str = "sensor") -> list[Sample]:
    """One sample a clip (its question still empty): event frames and 8 pictures of every whole
    window, at most ``max_clips``.

    A recording shorter than a clip is one clip. Windows with fewer than five events are left out.
    Raises: ParameterError for a clip, hop or number below 1; EventError when no window has enough
    events.
    """
    if min(clip_ms, hop_ms, max_clips) < 1:
        raise ParameterError(
            f"clips of {clip_ms} ms every {hop_ms} ms, {max_clips} of them: each must be at least 1"
        )
    start, end = source.span_us
    length = min(1000 * clip_ms, end - start)
    made = []
    for k, first in enumerate(range(start, end - length + 1, 1000 * hop_ms)):
        last = first + length
        events = source.events.between(first, last)
        inside = np.flatnonzero((source.times_us >= first) & (source.times_us < last))
        if len(events) < 5 or (source.pictures is not None and len(inside) == 0):
            continue
        painted = frames.event_frames(events, 5, canvas=canvas)  # type: ignore[arg-type]
        if source.pictures is None:
            video = np.stack(frames.event_frames(events, N_VIDEO, canvas="sensor"))
        else:
            video = source.pictures[inside[frames.uniform_indices(len(inside), N_VIDEO)]]
        made.append(
            Sample(source.name, f"{k:06d}", "", painted, video, (first, last), "test", "recorded"))
        if len(made) == max_clips:
            break
    if not made:
        raise EventError(
            f"{source.name}: no window of {length / 1000:.0f} ms holds five events; choose longer "
            "clips or another recording"
        )
    return made


# --- what the embedded pair knows
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """The world the embedded pair was trained on, seen in a few of its drives. rate: events per
    pixel and second, lowest and highest.

    sizes: sensors in pixels. clip_ms: length of every clip. grey_share: of the drives.
    """

    rate: tuple[float, float]
    sizes: tuple[tuple[int, int], ...]
    clip_ms: float
    grey_share: float


def known(n_sequences: int = 12, seed: int = 0) -> Known:
    """Look at the first ``n_sequences`` training drives (a third of a second each)."""
    clips = [clip for one in drive.simulate(seed, "train", n_sequences) for clip in one.clips]
    rates = [
        len(clip.events) / (clip.events.width * clip.events.height) * 1e6 /
        (clip.t_us[1] - clip.t_us[0]) for clip in clips
    ]
    sizes = tuple(sorted({(clip.events.width, clip.events.height) for clip in clips}))
    return Known((min(rates), max(rates)), sizes, (clips[0].t_us[1] - clips[0].t_us[0]) / 1000,
                 drive.DriveConfig().grey_fraction)


def warnings(source: Source, clips: Sequence[Sample], world: Known) -> list[str]:
    """Where the recording lies outside what the embedded pair was trained on, a sentence each.
    Nothing is refused."""
    said = []
    if source.kind == "pictures from the events":
        said.append(
            "there is no video: the verifier is shown painted events, which it was not trained on; "
            "its answers mean little"
        )
    if source.kind == "events from the video":
        gap = float(np.median(np.diff(source.times_us))) / 1000
        said.append(
            f"the events are simulated from pictures {gap:.0f} ms apart; what moves far between "
            "two of them jumps"
        )
    width, height = _sensor(source)
    largest = max(world.sizes)
    if width > 1.5 * largest[0] or height > 1.5 * largest[1]:
        said.append(
            f"the sensor has {width}x{height} pixels, the pair knows up to "
            f"{largest[0]}x{largest[1]}: events are painted thinner"
        )
    if abs(width / height - 4 / 3) > 0.15:
        said.append(
            f"the picture is {width}x{height}, the pair knows 4:3; only the central square is seen")
    durations = [(clip.t_us[1] - clip.t_us[0]) / 1000 for clip in clips if clip.t_us]
    if durations and abs(durations[0] - world.clip_ms) > 0.1 * world.clip_ms:
        said.append(
            f"a clip lasts {durations[0]:.0f} ms, the pair knows {world.clip_ms:.0f} ms: it will "
            "misjudge speed"
        )
    first = source.events.between(*clips[0].t_us) if clips[0].t_us else source.events
    limit = event_streams.official_limit_note(first)
    if limit:
        said.append(limit)
    rates = [
        len(source.events.between(*clip.t_us)) / (width * height) * 1e6 /
        (clip.t_us[1] - clip.t_us[0]) for clip in clips if clip.t_us
    ]
    low, high = world.rate
    if rates and (max(rates) > 1.5 * high or min(rates) < low / 1.5):
        said.append(
            f"{min(rates):.2f} to {max(rates):.2f} events per pixel and second; the pair knows "
            f"{low:.2f} to {high:.2f}"
        )
    if source.pictures is not None and _is_grey(source.pictures):
        said.append(
            f"the pictures are grey: no colour can be told ({world.grey_share:.0%} of the drives "
            "it was trained on were grey)"
        )
    said.append(
        "the pair knows simulated roads and ten questions; on anything else its answers keep their "
        "form but not their truth"
    )
    return said


def _sensor(source: Source) -> tuple[int, int]:
    stream_ = source.events
    return stream_.width or int(stream_.x.max()) + 1, stream_.height or int(stream_.y.max()) + 1


def _is_grey(pictures: np.ndarray) -> bool:
    some = pictures[::max(1, len(pictures) // 5)].astype(np.int16)
    return int(np.abs(some - some.mean(axis=3, keepdims=True)).max()) <= 2


# --- the pair's answers, states and acceptance
# ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What the pair made of a recording, a row an (clip, question): both kinds of paired states,
    and the samples they belong to."""

    samples: list[Sample]
    forced: list[PairedStates]
    free: list[PairedStates]


def ask(pair: Pair, clips: Sequence[Sample], questions: Sequence[str] | int = 4, *,
        max_new_tokens: int = 48, batch_size: int = 16) -> Told:
    """Ask every clip every question. questions: texts, or how many of the ten the embedded pair
    knows. The verifier answers once."""
    if isinstance(questions, int):
        questions = [question.text for question in language.questions()][:questions]
    samples = [
        Sample(clip.sequence, clip.clip, question, clip.event_frames, clip.video, clip.t_us,
               clip.split, clip.source) for clip in clips for question in questions
    ]
    with torch.inference_mode():
        verifier = pair.verifier.generate(samples, max_new_tokens, batch_size=batch_size)
        forced = pairs.teacher_forced_pairs(pair, samples, max_new_tokens, batch_size,
                                            verifier=verifier)
        free = pairs.free_running_pairs(pair, samples, max_new_tokens, batch_size,
                                        verifier=verifier)
    return Told(samples, forced, free)


def answers(told: Told) -> pd.DataFrame:
    """clip, question, what the drafter (events) and the verifier (video) said, each in its own
    words."""
    return pd.DataFrame([{
        "clip": p.clip, "question": p.question, "the drafter (events)": p.text_by_drafter,
        "the verifier (video)": p.text_by_verifier
    } for p in told.free])


def token_table(pair: Pair, told: Told,
                adapters: dict[str, str | Path] | None = None) -> pd.DataFrame:
    """The project's token table (evaluate/table.py) on the verifier's answers: level "drafter" is its
    own state and token under the verifier's prefix, unadapted (cosine NaN where the widths differ);
    further levels are the adapters given as name → file or folder.

    Raises: CheckpointError for an adapter that does not load.
    """
    rows = []
    for place, (sample, forced) in enumerate(zip(told.samples, told.forced, strict=True)):
        hidden_d, hidden_v = forced.hidden_by_drafter.float(), forced.hidden_by_verifier.float()
        cosine = torch.full((len(hidden_v),), torch.nan)
        if hidden_d.shape[1] == hidden_v.shape[1]:
            cosine = torch.nn.functional.cosine_similarity(hidden_d, hidden_v, dim=-1)
        rows += _rows("drafter", sample, place, 0, cosine, forced.ids_by_drafter,
                      forced.ids_by_verifier, pair)
    for name, path in (adapters or {}).items():
        adapter = registry.load_any_adapter(path)
        for place, (sample, forced) in enumerate(zip(told.samples, told.forced, strict=True)):
            if len(forced.ids_by_verifier) <= adapter.shift:
                continue
            with torch.inference_mode():
                aligned, target, ids, mask = adapter.align(store.collate([forced], [place]))
                said = pair.verifier.lm_head(aligned[0].to(
                    pair.verifier.head.weight))[..., :pair.draft_vocab_size].argmax(-1).cpu()
            cosine = torch.nn.functional.cosine_similarity(aligned[0].float(), target[0].float(),
                                                           dim=-1)
            length = int(mask[0].sum())
            rows += _rows(name, sample, place, adapter.shift, cosine[:length], said[:length],
                          ids[0][:length], pair)
    return pd.DataFrame(rows)


def _rows(level: str, sample: Sample, place: int, first: int, cosine: torch.Tensor,
          drafted: torch.Tensor, ids: torch.Tensor, pair: Pair) -> list[dict[str, Any]]:
    say = pair.verifier.token_text
    return [{
        "level": level, "sample": f"{place:05d}", "sequence": f"{sample.sequence}/{sample.clip}",
        "clip": sample.clip, "question": sample.question, "position": t, "cosine": near,
        "match": ours == theirs, "draft_token": say(ours), "verifier_token": say(theirs),
    } for t, (near, ours, theirs) in enumerate(
        zip(cosine.tolist(), drafted.tolist(), ids.tolist(), strict=True), start=first)]


def rounds(tokens: pd.DataFrame, level: str, gamma: int) -> Rounds:
    """Draft–verify rounds of one level, from its teacher-forced matches (docs/metrics.md, section
    4)."""
    part = tokens[tokens["level"] == level].sort_values(["sample", "position"], kind="stable")
    return rounds_from_lists([
        group["match"].to_numpy(bool, copy=True) for _, group in part.groupby("sample", sort=True)
    ], gamma)


def summary(tokens: pd.DataFrame, *, gamma: int = 5, resamples: int = 400,
            seed: int = 0) -> pd.DataFrame:
    """A level a row: token acceptance and mean accepted length (without bonus) with intervals over
    clips, median cosine, tokens.

    The clips of one recording overlap, so the intervals are too narrow: they say what this
    recording said, no more.
    """
    out = []
    for level in dict.fromkeys(tokens["level"]):
        part = tokens[tokens["level"] == level]
        each = part.groupby("sample", sort=True).agg(right=("match", "sum"), n=("match", "size"),
                                                     sequence=("sequence", "first"))
        rate = statistics.bootstrap_ratio(each["right"], each["n"], list(each["sequence"]),
                                          n_resamples=resamples, seed=seed)
        walked = Acceptance.of(rounds(tokens, level, gamma))
        out.append({
            "level": level, "token_acceptance": rate.value, "low": rate.low, "high": rate.high,
            "mean_accepted": walked.mean_accepted, "median_cosine": float(part["cosine"].median()),
            "tokens": len(part), "answers": len(each),
        })
    return pd.DataFrame(out)


def as_traces(told: Told) -> list[Trace]:
    """The free-running answers in the form of steps.traces: what another machine would have handed
    over."""
    return [
        Trace(p.clip, f"{p.sequence}/{p.clip}", p.question, tuple(p.ids_by_drafter.tolist()),
              tuple(p.ids_by_verifier.tolist())) for p in told.free if len(p.ids_by_verifier)
    ]
