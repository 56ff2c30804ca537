"""Which clip is asked what, and where data sets come from."""

import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.embedded_pair import recipe as pair
from xsd.core import DatasetError, MetricError, ParameterError, ShardError
from xsd.embedded import drive
from xsd.evaluate import statistics
from xsd.sensors import folder
from xsd.steps import data, extract_request

SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=6)


def clips_of(sizes):
    return [(f"s{number}", str(clip)) for number, size in enumerate(sizes) for clip in range(size)]


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, n_questions=st.integers(1, 12), per_sequence=st.integers(1, 12))
def test_a_sequence_is_asked_each_question_at_most_once_and_its_clips_in_turn(
        sizes, n_questions, per_sequence):
    clips = clips_of(sizes)
    chosen = data.asked(clips, n_questions, per_sequence)
    assert chosen == sorted(chosen)
    for sequence in {name for name, _ in clips}:
        own = [(clip, question) for clip, question in chosen if clips[clip][0] == sequence]
        assert len({question for _, question in own}) == len(own) == min(n_questions, per_sequence)
        used = Counter(clip for clip, _ in own)
        members = [index for index, (name, _) in enumerate(clips) if name == sequence]
        assert max(used[clip] for clip in members) - min(used[clip] for clip in members) <= 1


def test_no_question_and_no_place_in_a_drive_is_preferred():
    chosen = data.asked(clips_of([4] * 20), 10, 4)
    assert len(set(Counter(question for _, question in chosen).values())) == 1
    assert len(set(Counter((clip % 4) for clip, _ in chosen).values())) == 1
    assert len({(clip % 4) for clip, question in chosen if question == 0}) > 1


def test_every_clip_of_a_single_sequence_is_asked_everything():
    assert data.asked([("road", "0"), ("road", "1")], 10, 3) == [(0, 0), (0, 1), (0, 2), (1, 0),
                                                                 (1, 1), (1, 2)]


def test_simulated_drives_are_made_once_and_other_ones_are_refused(tmp_path):
    root = data.prepare(tmp_path, "simulated", "test", n_sequences=1, seed=3, workers=1)
    index = root / folder.INDEX
    before = index.stat().st_mtime_ns
    assert data.prepare(tmp_path, "simulated", "test", n_sequences=1, seed=3, workers=1) == root
    assert index.stat().st_mtime_ns == before
    with pytest.raises(ParameterError, match=r"holds 1 drives.*asks for 2.*choose another run_dir"):
        data.prepare(tmp_path, "simulated", "test", n_sequences=2, seed=3, workers=1)
    samples = data.samples(root, "test", questions_per_sequence=5)
    assert len(samples) == 4 * 5 and {sample.sequence for sample in samples} == {"test_1003_00000"}
    first = samples[0].load()
    assert first.video.shape[0] == 8 and len(
        first.event_frames) == 5 and first.question == samples[0].question


def test_a_run_never_draws_the_drives_that_the_pair_was_trained_on():
    trained_on = {f"train_0_{index:05d}" for index in range(pair.PROFILES["full"].n_sequences)}
    for seed in (0, 7):
        statistics.check_disjoint(
            trained_on,
            data.simulated_sequences("train", 3, seed) + data.simulated_sequences("test", 3, seed))
    with pytest.raises(MetricError, match="1 sequences are in training and in test"):
        statistics.check_disjoint(["a", "b"], ["b"])


def test_the_recording_is_for_testing_alone():
    samples = data.samples(data.root_of("unused", "davis_road", "test"), "test",
                           questions_per_sequence=2)
    assert len(samples) == 6 and {sample.sequence for sample in samples} == {"davis_road"}
    assert len({one.clip for one in samples}) == 3


@pytest.mark.parametrize(("name", "split", "words"),
                         [("davis_road", "train", "only for testing"),
                          ("no/such/place", "test", "there is no data set 'no/such/place'")],
                         )
def test_a_data_set_that_cannot_be_had_is_named(name, split, words):
    with pytest.raises(ParameterError, match=words):
        data.root_of("runs/any", name, split)


def test_a_clip_without_stored_images_is_painted_on_the_canvas_of_the_pair(tmp_path):
    root = tmp_path / "road"
    shutil.copytree(data.root_of(tmp_path, data.RECORDED, "test"), root)
    stored = data.samples(root, "test", canvas="sensor")[0]
    clips = {(stored.sequence, stored.clip)}
    assert data.event_frames_of(root, "test", clips, 5,
                                "sensor") == {"stored": 1, "painted": 0, "canvas": "sensor"}
    for images in list(root.rglob("event_image*")):
        shutil.rmtree(images)
    assert data.event_frames_of(root, "test", clips, 5,
                                "sensor") == {"stored": 0, "painted": 1, "canvas": "sensor"}
    sensor, sliced = (data.samples(root, "test", canvas=canvas)[0].load()
                      for canvas in ("sensor", "slice"))
    assert all(one.shape == sensor.event_frames[0].shape for one in sensor.event_frames)
    assert [one.shape
            for one in sliced.event_frames] != [one.shape for one in sensor.event_frames] or any(
                (a != b).any()
                for a, b in zip(sensor.event_frames, sliced.event_frames, strict=True))


@pytest.fixture
def folder_of_drives(tmp_path):
    """A dataset folder of one's own: two sequences, no questions."""
    drive.write_dataset(tmp_path / "drives", split="test", n_sequences=2, seed=3, workers=1)
    for path in (tmp_path / "drives").rglob(folder.QUESTIONS):
        path.unlink()
    return tmp_path / "drives"


def test_all_clips_are_asked_all_questions_where_that_is_asked_for(folder_of_drives, tmp_path):
    (tmp_path / "mine.txt").write_text("Where is the car?\n\nIs it dark?\nWho crosses?\n")
    options = {"questions_file": str(tmp_path / "mine.txt")}
    clips = len(folder.open_folder(folder_of_drives, "test"))
    every = data.samples(folder_of_drives, "test", questions_per_sequence=0, **options)
    assert len(every) == 3 * clips and every[1].question == "Is it dark?"
    two = data.samples(folder_of_drives, "test", questions_per_sequence=0, max_questions=2,
                       **options)
    assert len(two) == 2 * clips
    assert len(data.samples(folder_of_drives, "test", questions_per_sequence=2, **options)) == 4
    (tmp_path / "mine.json").write_text('["Where is the car?"]')
    options = {"questions_file": str(tmp_path / "mine.json"), "questions_per_sequence": 0}
    assert len(data.samples(folder_of_drives, "test", **options)) == clips


def test_a_folder_without_questions_is_not_asked_somebody_elses(folder_of_drives):
    with pytest.raises(DatasetError, match=r"holds no questions.json.*give questions_file=… "):
        data.samples(folder_of_drives, "test")


@pytest.mark.parametrize("content", ["{", "[]", '{"data": 5}', '{"data": "x", "code": "y"}',
                                     '{"data": "x", "split": ["test"]}', "[" * 50_000])
def test_a_request_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / extract_request.FILE).write_text(content)
    with pytest.raises(ShardError, match=r"extract\.json .*delete it and give --pair"):
        extract_request.load_request(tmp_path)
