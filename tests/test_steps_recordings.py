"""Any recording or video before a pair: what is made where a sensor is missing, what is warned of,
and whose tokens are compared."""

import dataclasses

import av
import numpy as np
import pytest
import torch
from tiny_pair import QUESTIONS, make_samples, make_tiny_pair

from studies.embedded_pair import depth
from xsd.adapters import registry
from xsd.core import DatasetError, EventError, ParameterError, VideoError
from xsd.evaluate import table
from xsd.extract import pairs
from xsd.models import loading
from xsd.sensors import events as event_streams
from xsd.sensors import timed_video
from xsd.shards import store
from xsd.shards.store import ShardDataset
from xsd.shards.writer import ShardWriter
from xsd.steps import recordings, traces

WORLD = {"rate": (0.1, 2.0), "sizes": {(128, 96)}, "clip_ms": 1000.0, "grey_share": 0.12}


def write_video(path, n=30, size=(64, 48), rate=20, grey=False):
    """A bright square that moves to the right before a dark ground."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(n):
            picture = np.full((size[1], size[0], 3), 30, np.uint8)
            picture[10:30, i:i + 20] = 220 if grey else (220, 180, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_events(path, n=3000, span_us=49_000, seed=0):
    draw = np.random.default_rng(seed)
    columns = {
        "x": draw.integers(0, 640, n), "y": draw.integers(0, 480, n),
        "t": np.sort(draw.integers(0, span_us, n))
    }
    stream = event_streams.from_columns({**columns, "p": draw.integers(0, 2, n)}, width=640,
                                        height=480)
    event_streams.write_events(path, stream)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return loading.load_pair(make_tiny_pair(tmp_path_factory.mktemp("pair")))


def test_a_video_gets_events_where_it_moves(tmp_path):
    source = recordings.open_source(write_video(tmp_path / "square.mp4"), max_side=32)
    assert source.kind == "events from the video" and source.pictures.shape == (30, 24, 32, 3)
    assert source.times_us.tolist()[:3] == [0, 50_000, 100_000] and source.span_us == (0, 1_500_000)
    rows = np.bincount(source.events.y, minlength=24)
    assert rows[6:14].sum() > 20 * max(1,
                                       rows[18:].sum())  # the square's rows, not the still ground's
    clips = recordings.cut(source)
    assert [clip.t_us for clip in clips] == [(0, 1_000_000), (500_000, 1_500_000)]
    assert clips[0].video.shape == (8, 24, 32, 3) and len(clips[0].event_frames) == 5


def test_times_are_those_of_the_file_and_reading_stops_in_time(tmp_path):
    pictures, times = timed_video.read(write_video(tmp_path / "v.mp4", rate=10), max_seconds=1.0)
    assert len(pictures) == len(times) == 11 and times[-1] == 1_000_000
    assert timed_video.luminance(pictures).shape == pictures.shape[:3]
    (tmp_path / "half.mp4").write_bytes((tmp_path / "v.mp4").read_bytes()[:300])
    with pytest.raises(VideoError, match="does not decode as a video"):
        timed_video.read(tmp_path / "half.mp4")
    with pytest.raises(VideoError, match="there is no such video file"):
        timed_video.read(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="a single picture"):
        recordings.open_source(write_video(tmp_path / "one.mp4", n=1))


def test_a_short_event_file_is_one_clip_whose_video_is_painted(tmp_path):
    source = recordings.open_source(write_events(tmp_path / "short.npy"))
    clips = recordings.cut(source)
    assert len(clips) == 1 and clips[0].video.shape == (
        8, 480, 640, 3) and source.kind == "pictures from the events"
    said = " | ".join(depth.warnings(source, clips, WORLD))
    for words in ("there is no video", "640x480 pixels, the pair knows up to 128x96",
                  "lasts 49 ms, the pair knows 1000", "their truth"):
        assert words in said
    assert "official EventGPT" not in said  # 49 ms is what the official code was tuned for
    with pytest.raises(EventError, match="holds five events; choose longer clips"):
        recordings.cut(_empty(source))
    with pytest.raises(ParameterError, match="each must be at least 1"):
        recordings.cut(source, hop_ms=0)


def _empty(source):
    few = source.events.between(0, int(source.events.t_us[3]))
    return recordings.Source("few", few, None, source.times_us, source.kind)


def test_the_shipped_recording_is_known_to_be_grey_and_long():
    source = recordings.open_source("davis_road")
    clips = recordings.cut(source, max_clips=2)
    said = " | ".join(depth.warnings(source, clips, WORLD))
    assert source.kind == "both recorded" and len(clips) == 2
    assert clips[0].video.shape == (8, 260, 346, 3)
    assert "the pictures are grey" in said and "refuses 100 ms and more" in said
    assert "there is no video" not in said


def test_what_the_pair_knows_is_read_from_its_own_world():
    world = depth.known(n_sequences=2)
    assert world["clip_ms"] == 1000 and world["rate"][0] < world["rate"][1]
    assert (128, 96) in world["sizes"] and 0 < world["grey_share"] < 1


def test_answers_states_and_acceptance_come_from_the_same_answers(tmp_path, pair):
    clips = recordings.cut(recordings.open_source(write_video(tmp_path / "square.mp4")))
    samples = [dataclasses.replace(clip, question=question)
               for clip in clips for question in QUESTIONS[:2]]
    said = pair.verifier.generate(samples, 6)
    forced = pairs.teacher_forced_pairs(pair, samples, 6, verifier=said)
    adapters = {level: registry.create_adapter(level, 32, drafter_size=32)
                for level in ("L1", "L5F")}
    tokens = table.check(
        table.measure(adapters, recordings.held_out_pairs(pair, forced), gamma=3))
    own = tokens[tokens["level"] == table.DRAFTER]
    first = forced[0]
    assert own[own["sample"] == samples[0].key]["match"].tolist() == (
        first.ids_by_drafter == first.ids_by_verifier).tolist()
    assert own["draft_token"].iloc[0] == pair.verifier.token_text(first.ids_by_drafter[0])
    assert tokens[tokens["level"] == "L5F"]["position"].min() == 0
    assert tokens["cosine"].dropna().between(-1.001, 1.001).all()
    found = recordings.summary(tokens, gamma=3, resamples=50).set_index("level")
    assert list(found.index) == ["L1", "L5F", table.DRAFTER]
    assert found["accepted_per_round"].between(0, 3).all()
    assert found.loc[table.DRAFTER, "token_acceptance"] == table.drafted(own)["match"].mean()
    assert found[["token_acceptance_low", "token_acceptance_high"]].isna().all(axis=None)


def test_free_running_answers_are_handed_on_as_traces(tmp_path, pair):
    clips = recordings.cut(recordings.open_source(write_video(tmp_path / "square.mp4")))
    samples = [dataclasses.replace(clip, question=question)
               for clip in clips for question in QUESTIONS[:2]]
    free = pairs.free_running_pairs(pair, samples, 6)
    handed = traces.of(recordings.held_out_pairs(pair, free))
    traces.write(tmp_path / "t.json", handed)
    found = traces.run(tmp_path / "t.json", tmp_path / "run", resamples=50)
    assert found["n"] == len(handed) == 4 and found["n_sequences"] == 1
    assert set(found["arms"]) > {"4-gram"}  # trained on the other clip
    assert np.isnan(found["arms"]["4-gram"]["token_acceptance"]["low"])
    assert "in one sequence: no interval" in traces.text(found)


def test_pairs_in_memory_read_like_a_run_folder(tmp_path, pair):
    samples = make_samples(3)
    forced = pairs.teacher_forced_pairs(pair, samples, 5)
    held = store.MemoryPairs(forced)
    with ShardWriter(tmp_path / "run", mode="teacher_forced", dtype="fp32", config={}) as writer:
        for one in forced:
            writer.write(one)
        writer.close()
    stored = ShardDataset(tmp_path / "run")
    assert held.table().equals(stored.table()[list(held.table())])
    for role in ("drafter", "verifier"):
        assert [ids.tolist() for ids in held.ids(role)] == [ids.tolist()
                                                            for ids in stored.ids(role)]
    for ours, theirs in zip(held.batches(2), stored.batches(2), strict=True):
        assert torch.equal(ours.verifier, theirs.verifier) and torch.equal(ours.mask, theirs.mask)
        assert (list(ours.sequence), list(ours.index)) == (list(theirs.sequence),
                                                           list(theirs.index))


def test_only_recordings_reach_a_decoder(tmp_path):
    lines = "".join(f"{k / 1000:.6f} {k % 64} {k % 48} {k % 2}\n" for k in range(1, 400))
    (tmp_path / "events.txt").write_text(lines)
    source = recordings.open_source(tmp_path / "events.txt")
    assert len(source.events) == 399 and source.kind == "pictures from the events"
    assert source.span_us == (1000, 399_001)
    for name in ("a.raw", "a.dat", "a.aedat", "a.csv", "a.gif", "a.m3u8", "a.json", "plain"):
        (tmp_path / name).write_text(lines)
        with pytest.raises(EventError, match=r"are not read here; expected one of \.npy"):
            recordings.open_source(tmp_path / name)


def test_a_sensor_has_the_size_that_is_given(tmp_path):
    write_events(tmp_path / "plain.npy")
    stream = event_streams.read_events(tmp_path / "plain.npy")
    np.savez(tmp_path / "a.npz", x=stream.x, y=stream.y, t=stream.t_us, p=stream.p)
    assert recordings.open_source(tmp_path / "a.npz", sensor_size=(1280, 720)).events.size == (
        1280, 720)
    with pytest.raises(EventError, match=r"sensor is 64x48 .* sensor_size of notebook 09"):
        recordings.open_source(tmp_path / "a.npz", sensor_size=(64, 48))
    with pytest.raises(ParameterError, match="sensor_size is of event files"):
        recordings.open_source(write_video(tmp_path / "v.mp4"), sensor_size=(64, 48))


def test_events_and_a_video_beside_them_stand_on_the_events_clock(tmp_path):
    events, video = write_events(tmp_path / "e.npy"), write_video(tmp_path / "v.mp4", rate=20)
    alone = recordings.open_source(events)
    both = recordings.open_source(events, video=video, offset_ms=-200, max_side=32)
    assert both.kind == "both recorded" and len(both.events) == len(alone.events)
    assert both.times_us[0] == alone.events.t_us[0] - 200_000
    assert np.diff(both.times_us).tolist() == [50_000] * 29 and both.pictures.shape[2] == 32
    clip = recordings.cut(both, clip_ms=300, hop_ms=100)[0]
    assert clip.video.shape == (8, *both.pictures.shape[1:])
    with pytest.raises(EventError, match="share no time: the events last"):
        recordings.open_source(events, video=video, offset_ms=1e6)
    with pytest.raises(ParameterError, match="give milliseconds below 1e12"):
        recordings.open_source(events, video=video, offset_ms=1e300)
    with pytest.raises(ParameterError, match="is a video, and so is"):
        recordings.open_source(video, video=video)


def test_only_questions_are_asked(tmp_path):
    clips = recordings.cut(recordings.open_source(write_events(tmp_path / "short.npy")))
    assert [one.question for one in recordings.asked(clips, ["Is it?"])] == ["Is it?"]
    for bad in ("", "a" * 200_000, "two\nlines"):
        with pytest.raises(DatasetError, match="questions: the question"):
            recordings.asked(clips, ["Is it?", bad])
