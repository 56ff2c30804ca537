"""The dataset folder: what is written reads back, and a user's own folder reads unchanged."""

import errno
import json
import os
import shutil

import av
import numpy as np
import pytest
from PIL import Image

from xsd.core import DatasetError, EventError, StorageError, VideoError
from xsd.sensors import folder, frames
from xsd.sensors.events import Events, write_events


def stream(n=60, seed=0, width=16, height=12):
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, width, n).astype(np.uint16), draw.integers(0, height,
                                                                       n).astype(np.uint16)
    return Events(x, y, np.sort(draw.integers(0, 50_000, n)),
                  draw.integers(0, 2, n).astype(np.uint8), width, height)


def video(seed=0, n=8):
    return np.random.default_rng(seed).integers(0, 256, (n, 12, 16, 3)).astype(np.uint8)


def write(root, split="test", sequences=("a", "b"), clips=2):
    with folder.FolderWriter(root, split, source="simulated") as writer:
        for number, sequence in enumerate(sequences):
            for k in range(clips):
                seed = number * 10 + k
                writer.add(sequence, f"{k:06d}", events=stream(seed=seed), video=video(seed),
                           t_us=(k * 500, k * 500 + 1000), facts={"seed": seed})
    return root


def test_a_written_folder_reads_back_as_it_was(tmp_path):
    records = folder.open_folder(write(tmp_path))
    assert [(record.sequence, record.clip, record.split) for record in records
            ] == [(sequence, f"{k:06d}", "test") for sequence in "ab" for k in range(2)]
    sample = folder.load_sample(records[1], "What moves?")
    assert np.array_equal(sample.video, video(1))
    for stored, painted in zip(sample.event_frames,
                               frames.event_frames(stream(seed=1), 5, canvas="sensor"),
                               strict=True):
        assert np.array_equal(stored, painted)
    assert (sample.t_us, sample.source, sample.split, sample.sequence,
            sample.clip) == ((500, 1500), "simulated", "test", "a", "000001")
    single = folder.load_sample(records[1], "What moves?", n_event_frames=1).event_frames
    assert np.array_equal(single[0], frames.event_frames(stream(seed=1), 1, canvas="sensor")[0])
    assert folder.read_facts(tmp_path)[records[1].id] == {"seed": 1}
    assert np.array_equal(folder.load_events(records[1]).t_us, stream(seed=1).t_us)


def test_the_index_has_the_keys_of_the_layout_and_paths_relative_to_their_folders(tmp_path):
    entry = json.loads((write(tmp_path) / folder.INDEX).read_text())[0]
    assert {
        "id", "split", "event_data", "video_data", "mp4_data", "event_image", "event_image_1f",
        "conversations"
    } <= set(entry)
    assert entry["event_data"] == "a/000000.npy"
    assert entry["video_data"] == "a/000000"
    assert entry["mp4_data"] == "a/000000.mp4"
    assert entry["event_image"] == [f"a/000000_{i}.png" for i in range(5)]
    assert entry["event_image_1f"] == ["a/000000_0.png"]
    assert (tmp_path / "event_image" / "a" / "000000_4.png").is_file()
    assert len(list((tmp_path / "video" / "a" / "000000").iterdir())) == 8


def users_folder(root, with_images=True):
    """A DSEC folder as users have it: no t_us, a number as id, 20 video frames, sixteen-bit times,
    no mp4."""
    root.mkdir()
    entry = {
        "id": 7, "split": "train", "event_data": "interlaken_00_c/000003.npy",
        "video_data": "interlaken_00_c/000003", "mp4_data": "interlaken_00_c/000003.mp4",
        "event_image": [f"interlaken_00_c/000003_{i}.png" for i in range(5)],
        "event_image_1f": ["interlaken_00_c/000003_0.png"], "conversations": [],
    }
    (root / folder.INDEX).write_text(json.dumps([entry]))
    events = stream()
    path = root / "event_npy" / "interlaken_00_c" / "000003.npy"
    path.parent.mkdir(parents=True)
    held = {"x": events.x, "y": events.y, "t": events.t_us.astype(np.uint16), "p": events.p}
    np.save(path, np.array(held, dtype=object), allow_pickle=True)
    place = root / "video" / "interlaken_00_c" / "000003"
    place.mkdir(parents=True)
    for i in range(20):
        Image.fromarray(np.full((12, 16, 3), i, np.uint8)).save(place / f"{i:06d}.png")
    if with_images:
        (root / "event_image" / "interlaken_00_c").mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full(
                (9, 8, 3), i,
                np.uint8)).save(root / "event_image" / "interlaken_00_c" / f"000003_{i}.png")
    return root


@pytest.mark.parametrize("with_images", [True, False])
def test_a_users_dsec_folder_reads_unchanged(tmp_path, with_images):
    (record,) = folder.open_folder(users_folder(tmp_path / "dsec", with_images), "train")
    sample = folder.load_sample(record, "What is on the road?")
    assert (record.id, record.sequence, record.clip, sample.t_us,
            sample.source) == ("7", "interlaken_00_c", "000003", None, "dsec")
    assert sample.video[:, 0, 0, 0].tolist() == [0, 2, 5, 8, 10, 13, 16, 19]
    if with_images:
        assert [int(picture[0, 0, 0]) for picture in sample.event_frames] == [0, 1, 2, 3, 4]
    else:
        for ours, official in zip(sample.event_frames,
                                  frames.event_frames(stream(), 5, canvas="slice"), strict=True):
            assert np.array_equal(ours, official)


def test_asking_for_a_canvas_paints_from_the_events(tmp_path):
    (record,) = folder.open_folder(users_folder(tmp_path / "dsec"))
    pictures = folder.load_sample(record, "What?", n_event_frames=3, canvas="sensor").event_frames
    assert [picture.shape for picture in pictures] == [(12, 16, 3)] * 3


def test_the_mp4_stands_in_for_a_missing_video_folder(tmp_path):
    (record,) = folder.open_folder(users_folder(tmp_path / "dsec"))
    shutil.rmtree(record.video_dir)
    with pytest.raises(DatasetError, match="clip 7 has no video: neither the folder"):
        folder.load_sample(record, "What?")
    record.mp4_path.parent.mkdir(parents=True)
    with av.open(str(record.mp4_path), "w") as container:
        made = container.add_stream("mpeg4", rate=20)
        made.width, made.height, made.pix_fmt = 16, 16, "yuv420p"
        for i in range(10):
            container.mux(
                made.encode(
                    av.VideoFrame.from_ndarray(np.full((16, 16, 3), 20 * i, np.uint8),
                                               format="rgb24")))
        container.mux(made.encode())
    assert folder.load_sample(record, "What?").video.shape == (8, 16, 16, 3)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_a_question_of_zero_length_is_refused(tmp_path, question):
    with pytest.raises(DatasetError, match="question has zero length"):
        folder.load_sample(folder.open_folder(write(tmp_path))[0], question)


def test_splits_are_found_as_subfolders_and_as_entries(tmp_path):
    write(tmp_path / "nested" / "train", "train", ("a",))
    write(tmp_path / "nested" / "test", "test", ("b",))
    write(tmp_path / "flat", "train", ("a",))
    write(tmp_path / "flat", "test", ("b",))
    for root in (tmp_path / "nested", tmp_path / "flat"):
        assert [record.sequence for record in folder.open_folder(root, "test")] == ["b", "b"]
        assert {record.sequence for record in folder.open_folder(root)} == {"a", "b"}
    with pytest.raises(DatasetError, match=r"no clip of split 'dev'; it has: test, train"):
        folder.open_folder(tmp_path / "flat", "dev")
    with pytest.raises(DatasetError, match=r"splits found: test, train"):
        folder.open_folder(tmp_path / "nested", "dev")


def test_a_sequence_cannot_be_in_two_splits(tmp_path):
    write(tmp_path, "train", ("a",))
    with pytest.raises(DatasetError, match="sequence a is already in split 'train'"):
        write(tmp_path, "test", ("a",))


def test_a_broken_run_leaves_no_index(tmp_path):
    with pytest.raises(RuntimeError), folder.FolderWriter(tmp_path, "test") as writer:
        writer.add("a", "000000", events=stream(), video=video())
        raise RuntimeError("stopped")
    with pytest.raises(DatasetError, match=f"there is no {folder.INDEX}"):
        folder.open_folder(tmp_path)


def test_a_clip_without_events_is_written_with_empty_pictures_and_refused_only_when_painted(
        tmp_path):
    nothing = stream().between(60_000, 70_000)
    with folder.FolderWriter(tmp_path, "test") as writer:
        writer.add("a", "000000", events=nothing, video=video(),
                   event_frames=[np.full((12, 16, 3), 255, np.uint8)] * 5)
    (record,) = folder.open_folder(tmp_path)
    assert (folder.load_sample(record, "What?").event_frames[0] == 255).all()
    with pytest.raises(EventError, match="is empty"):
        folder.load_sample(record, "What?", canvas="sensor")


def test_a_full_disk_is_one_clear_sentence(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder.Path, "write_bytes", full)
    writer = folder.FolderWriter(tmp_path, "test")
    with pytest.raises(StorageError, match="the disk is full"):
        writer.add("a", "000000", events=stream(), video=video())
    monkeypatch.setattr(folder.Image.Image, "save", full)
    with pytest.raises(StorageError, match=r"cannot write .*png: the disk is full"):
        folder._write_png(tmp_path / "a.png", video()[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("{}", "holds a dict; expected a list"),
     ('[{"id": 1}]', "entry 0 is malformed \\(no 'event_data'\\)"),
     ('[{"id": 1, "event_data": "../../a.npy", "video_data": "a"}]', "leaves the folder"),
     ('[{"id": 1, "event_data": "/etc/a.npy", "video_data": "a"}]', "leaves the folder"),
     ('["clip"]', "entry 0 is malformed"),],
)
def test_a_malformed_index_is_named(tmp_path, content, message):
    (tmp_path / folder.INDEX).write_text(content)
    with pytest.raises(DatasetError, match=message):
        folder.open_folder(tmp_path)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(DatasetError, match="no such dataset folder"):
        folder.open_folder(tmp_path / "nowhere")
    record = folder.open_folder(write(tmp_path / "made"))[0]
    record.events_path.unlink()
    assert folder.load_sample(
        record, "What?").video.shape == (8, 12, 16, 3), "the stored pictures do not need the events"
    with pytest.raises(EventError, match=r"000000\.npy: there is no such event file"):
        folder.load_events(record)
    for image in record.video_dir.iterdir():
        image.unlink()
    with pytest.raises(VideoError, match="holds no frame"):
        folder.load_sample(record, "What?")


def test_questions_are_kept_most_frequent_first(tmp_path):
    folder.write_questions(tmp_path / "questions.json", [("rare?", 1), ("often?", 9),
                                                         ("also often?", 9)])
    assert folder.read_questions(tmp_path / "questions.json") == ["often?", "also often?", "rare?"]
    assert folder.read_questions(tmp_path, n=1) == ["often?"]
    (tmp_path / "questions.json").write_text('["first?", "second?"]')
    assert folder.read_questions(tmp_path) == ["first?", "second?"]
    for bad in ("[]", '["first?", 2]', '[{"question": " ", "count": 1}]', '{"question": "a"}'):
        (tmp_path / "questions.json").write_text(bad)
        with pytest.raises(DatasetError, match=r"\{question, count\}"):
            folder.read_questions(tmp_path)


def test_the_hash_says_when_a_byte_of_the_data_changed(tmp_path):
    first, second = write(tmp_path / "one"), write(tmp_path / "two")
    assert folder.data_hash(first) == folder.data_hash(second)
    assert folder.data_hash(tmp_path) != folder.data_hash(first)
    write_events(second / "event_npy" / "a" / "000000.npy", stream(seed=99))
    assert folder.data_hash(first) != folder.data_hash(second)
    (tmp_path / "none").mkdir()
    with pytest.raises(DatasetError, match=f"there is no {folder.INDEX}"):
        folder.data_hash(tmp_path / "none")


def test_repeated_ids_are_refused_before_anything_is_written(tmp_path):
    root = write(tmp_path)
    entries = json.loads((root / folder.INDEX).read_text())
    for entry in entries[1:3]:
        entry["id"] = "clip"
    (root / folder.INDEX).write_text(json.dumps(entries))
    before = folder.data_hash(root)
    assert len(folder.open_folder(root)) == 4  # reading takes no harm
    with pytest.raises(DatasetError, match=r"id clip stands twice .* \(entries 1 and 2\)"):
        folder.FolderWriter(root, "test")
    assert folder.data_hash(root) == before


def test_one_writer_at_a_time_who_removes_what_killed_ones_left(tmp_path):
    root = write(tmp_path)
    left = [root / f".{folder.INDEX}.0.part", root / "event_npy/a/.000000.npy.0.part"]
    for path in left:
        path.write_text("half")
    with folder.writing(root):
        assert not any(path.exists() for path in left)
        with pytest.raises(StorageError, match="is being written by process"), folder.writing(root):
            pass
    with folder.writing(root):
        pass
