"""The simulated drive: the same seed gives the same bytes, and facts are what is really visible."""

import numpy as np
import pytest

from xsd.core import DatasetError
from xsd.embedded import drive, dvs, language, render, scenes
from xsd.sensors import folder


@pytest.fixture(scope="module")
def drives():
    return [drive.simulate_sequence(5, "test", index) for index in range(4)]


def test_the_same_seed_gives_the_same_bytes(drives):
    again = drive.simulate_sequence(5, "test", 0)
    for one, two in zip(drives[0].clips, again.clips, strict=True):
        assert one.video.tobytes() == two.video.tobytes() and one.events.t_us.tobytes(
        ) == two.events.t_us.tobytes()
        assert one.facts == two.facts


def test_splits_are_disjoint_by_sequence_and_content(drives):
    other = drive.simulate_sequence(5, "train", 0)
    assert other.sequence != drives[0].sequence and other.clips[0].video.tobytes(
    ) != drives[0].clips[0].video.tobytes()


def test_clips_overlap_by_half(drives):
    first, second = drives[0].clips[:2]
    assert second.t_us[0] - first.t_us[0] == 500_000 and first.t_us[1] - first.t_us[0] == 1_000_000
    shared = first.events.between(second.t_us[0], first.t_us[1])
    assert len(shared) == len(second.events.between(second.t_us[0], first.t_us[1]))


def test_a_clip_has_eight_frames_and_five_event_frames_of_one_size(drives):
    for simulated in drives:
        for clip in simulated.clips:
            assert clip.video.dtype == np.uint8 and clip.video.shape[0] == 8
            assert len(clip.event_frames) == 5 and {frame.shape for frame in clip.event_frames
                                                    } == {clip.video.shape[1:]}


SHARES = ("grey_fraction", "other_resolution_fraction", "noisy_fraction")


@pytest.mark.parametrize("share", SHARES)
def test_every_part_of_the_randomisation_can_be_had_and_left_out(share, monkeypatch):
    sensors, simulate = [], dvs.simulate_events
    monkeypatch.setattr(dvs, "simulate_events",
                        lambda *given: sensors.append(given[2]) or simulate(*given))
    configs = [
        drive.DriveConfig(**dict.fromkeys(SHARES, 0.0) | {share: value}) for value in (1.0, 0.0)
    ]
    always, never = (drive.simulate_sequence(5, "test", 1, config).clips[0] for config in configs)
    grey, size, noisy = ([], [], [])
    for clip, sensor in zip((always, never), sensors, strict=True):
        grey.append(bool((clip.video == clip.video[..., :1]).all()) and clip.facts["grey"])
        size.append(clip.video.shape[1:3] in ((72, 96), (120, 160)))
        noisy.append(sensor != dvs.DvsConfig())
    expected = {name: [name == share, False] for name in SHARES}
    assert [grey, size, noisy] == [expected[name] for name in SHARES]


def test_an_unknown_split_is_refused():
    with pytest.raises(DatasetError, match="unknown split 'dev'"):
        drive.simulate_sequence(0, "dev", 0)


def _scene(**changes):
    actor = scenes.Actor("van", "red", "parked", "right", 3.4, 10.0, 0.0, 0.0)
    values = {
        "time": "day", "sky": "clear", "ego": "stopped", "left": "fields", "right": "fields",
        "light": None, "light_z_m": 16.0
    }
    return scenes.Scene(**{**values, "actors": (actor,), "texture_seed": 1, **changes})


def _facts(scene, counts=None, grey=False):
    renderer = render.Renderer(scene)
    times = np.arange(20) / 20
    ids = np.stack([renderer.frame(t, with_ids=True)[1] for t in times])
    return render.clip_facts(scene, np.where(ids >= render.SCENERY_ID, 0, ids), times, counts or {},
                             grey=grey)


def test_a_visible_van_is_a_fact_and_an_occluded_one_is_not():
    assert [v["colour"] for v in _facts(_scene())["vehicles"]] == ["red"]
    bus = scenes.Actor("bus", "blue", "waiting", "ahead", 1.9, 9.0, 0.0, 0.0)
    hidden = _scene(actors=(scenes.Actor("car", "red", "parked", "right", 3.4, 18.0, 0.0, 0.0),
                            bus))
    assert [v["kind"] for v in _facts(hidden)["vehicles"]] == ["bus"]


def test_events_know_no_colour_and_nothing_that_stands_still():
    still = language.seen_by_events(_facts(_scene(), counts={1: 0}))
    assert still["vehicles"] == [] and still["time"] is None and still["left"] is None
    moving = language.seen_by_events(_facts(_scene(ego="slow"), counts={1: 500}))
    assert moving["vehicles"][0]["colour"] is None and moving["left"] == "fields"


def test_grey_video_hides_colours():
    assert _facts(_scene(), grey=True)["vehicles"][0]["colour"] is None


def test_a_static_scene_leaves_almost_no_events_and_a_moving_camera_many():
    def count(scene):
        renderer = render.Renderer(scene)
        return abs(renderer.frame(1.0)[0].astype(int) - renderer.frame(1.2)[0].astype(int)).sum()

    assert count(_scene()) == 0
    assert count(_scene(ego="slow")) > 10_000


def test_a_written_dataset_reads_back(tmp_path):
    summary = drive.write_dataset(tmp_path, split="test", n_sequences=1, seed=3)
    records = folder.open_folder(
        tmp_path, "test") if (tmp_path / "test").exists() else folder.open_folder(tmp_path)
    assert summary["clips"] == len(records) == 4 and summary["sequences"] == 1
    sample = folder.load_sample(records[0], "What is happening in this scene?")
    assert sample.video.shape[0] == 8 and len(
        sample.event_frames) == 5 and sample.source == "simulated"
    assert len(folder.read_questions(tmp_path / "questions.json")) == 10
