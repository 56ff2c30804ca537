"""Any recording or video before a pair: what is made where a sensor is missing, what is warned of,
and whose tokens are compared."""

import av
import numpy as np
import pytest
from tiny_pair import QUESTIONS, make_tiny_pair

from xsd.adapters import registry
from xsd.core import EventError, ParameterError, VideoError
from xsd.evaluate import table as token_table
from xsd.models import loading
from xsd.sensors import events as event_streams
from xsd.sensors import timed_video
from xsd.steps import recordings, traces

WORLD = recordings.Known((0.1, 2.0), ((128, 96),), 1000.0, 0.12)


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
    said = " | ".join(recordings.warnings(source, clips, WORLD))
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
    said = " | ".join(recordings.warnings(source, clips, WORLD))
    assert source.kind == "both recorded" and len(clips) == 2 and clips[0].video.shape == (8, 260,
                                                                                           346, 3)
    assert "the pictures are grey" in said and "refuses 100 ms and more" in said and "there is no video" not in said


def test_what_the_pair_knows_is_read_from_its_own_world():
    world = recordings.known(n_sequences=2)
    assert world.clip_ms == 1000 and world.rate[0] < world.rate[1] and (128, 96) in world.sizes


def test_answers_states_and_acceptance_come_from_the_same_answers(tmp_path, pair):
    source = recordings.open_source(write_video(tmp_path / "square.mp4"))
    clips = recordings.cut(source)
    told = recordings.ask(pair, clips, QUESTIONS[:2], max_new_tokens=6)
    assert len(told.samples) == len(recordings.answers(told)) == 4
    assert all(a.ids_by_verifier.tolist() == b.ids_by_verifier.tolist()
               for a, b in zip(told.forced, told.free, strict=True))
    saved = registry.save_adapter(registry.create_adapter("L1", 32, drafter_size=32),
                                  tmp_path / "l1")
    shifted = registry.save_adapter(registry.create_adapter("L5F", 32, drafter_size=32),
                                    tmp_path / "l5f")
    tokens = token_table.check(recordings.token_table(pair, told, {"L1": saved, "L5F": shifted}))
    own = tokens[tokens["level"] == "drafter"]
    forced = told.forced[0]
    assert own[own["sample"] == "00000"]["match"].tolist() == (
        forced.ids_by_drafter == forced.ids_by_verifier).tolist()
    assert tokens[tokens["level"] == "L5F"]["position"].min() == 1 and tokens["cosine"].between(
        -1.001, 1.001).all()
    table = recordings.summary(tokens, gamma=3, resamples=50)
    assert list(table["level"]) == ["drafter", "L1", "L5F"] and table["mean_accepted"].between(
        0, 3).all()
    assert table["token_acceptance"].iloc[0] == own["match"].mean()
    handed = recordings.as_traces(told)
    traces.write(tmp_path / "t.json", handed)
    assert traces.run(tmp_path / "t.json", tmp_path / "run", resamples=50)["n"] == len(handed) == 4
