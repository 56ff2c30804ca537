"""Files that somebody sends: nothing in them is run, no other file is read through them, and none
takes the machine's memory or time. Each is answered in one sentence."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image
from test_sensors_folder import stream, video, write
from test_sensors_frames import write_mp4

from xsd.core import ROOT, DatasetError, EventError, VideoError, XsdError
from xsd.files import read_json
from xsd.sensors import containers, folder, frames, timed_video
from xsd.sensors.events import read_events, write_events

HEAD = np.lib.format.magic(
    1, 0) + b"F\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(69) + b"\n"


def columns(**changes):
    return {"x": np.arange(6), "y": np.arange(6), "t": 100 * np.arange(6), "p": np.arange(6) % 2
            } | changes


def shared(levels, kind):
    value = kind(0)
    for _ in range(levels):
        value = kind(value)
    return value


def hash_bomb():
    """A dict whose key is a tuple of twice a tuple of twice …: hashing it takes for ever."""
    return b"\x80\x04}(" + b")" + b"2\x86" * 60 + b"K\x01u."


@pytest.mark.parametrize("body", [
    pickle.dumps(shared(60, lambda one: {"x": one, "y": one})),
    pickle.dumps({name: shared(20, lambda one: [one] * 10) for name in "xytp"}),
    hash_bomb(),
    b"\x80\x04}r\xff\xff\xff\x7f.",  # index 2147483647 of the memo
    b"\x80\x05\x96" + struct.pack("<Q", 7 << 30) + b"x.",  # 7 GB of bytes, of which one is there
    # sets the defaults of a function of ours
    b"\x80\x04\x8c\x16numpy.core.multiarray\x8c\x06scalar\x93N}\x8c\x0c__defaults__K\x01s\x86b.",
], ids=["dicts", "lists", "hash", "memo", "bytes", "build"])
def test_a_pickle_that_would_take_all_memory_or_time_is_refused(tmp_path, body):
    (tmp_path / "a.npy").write_bytes(HEAD + body)
    with pytest.raises(EventError, match=r"was refused|has no column|column .x. is object"):
        read_events(tmp_path / "a.npy")


def test_declared_sizes_are_compared_with_the_file_before_memory_is_taken(tmp_path):
    kinds = [(name, "<i8") for name in "xytp"]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": kinds, "fortran_order": False, "shape": (10**11,)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(64))
    with pytest.raises(EventError, match=r"declares .* of shape \(100000000000,\) but holds"):
        read_events(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "xytp":
            archive.writestr(f"{name}.npy", bytes(20 << 20))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in "xytp":
            file.create_dataset(f"events/{name}", (1 << 29,), "i8", chunks=(1 << 20,),
                                compression="gzip")
    for name in ("a.npz", "a.h5"):
        with pytest.raises(EventError, match=r"says that it holds .* GB; at most 200 times"):
            read_events(tmp_path / name)


def h5(path, change):
    with h5py.File(path, "w") as file:
        for name, values in columns().items():
            file[f"events/{name}"] = values
        del file["events/x"]
        change(file)
    return path


def test_a_recording_reads_no_other_file(tmp_path):
    np.arange(6).tofile(tmp_path / "secret")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.arange(6)
    layout = h5py.VirtualLayout((6,), "i8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (6,))
    outside = str(tmp_path / "other.h5")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for change in (
            lambda file: file.create_dataset("events/x", (6,), "i8",
                                             external=[(str(tmp_path / "secret"), 0, 48)]),
            lambda file: file.__setitem__("events/x", h5py.ExternalLink(outside, "/x")),
            lambda file: file.__setitem__("events/x", h5py.ExternalLink(str(tmp_path / "pipe"),
                                                                        "/x")),
            lambda file: file.__setitem__("events/x", h5py.SoftLink("/events/y")),
            lambda file: file.create_virtual_dataset("events/x", layout)):
        with pytest.raises(EventError, match=r"is a link to elsewhere|keeps its data outside"):
            read_events(h5(tmp_path / "a.h5", change))


def test_columns_of_an_h5_that_are_none_are_named(tmp_path):
    for change in (lambda file: file.create_group("events/x"),
                   lambda file: file.__setitem__("events/x", ["a"] * 6),
                   lambda file: file.__setitem__("events/x", h5py.Empty("i8")),
                   lambda file: file.create_dataset("events/x", (6,), "i8", maxshape=(None,),
                                                    chunks=(1 << 28,), compression="gzip")):
        with pytest.raises(EventError, match=r"could not be read as events|no column of numbers"):
            read_events(h5(tmp_path / "a.h5", change))


@pytest.mark.parametrize("name", ["units", "Unit", "scale_factor", "add_offset"])
def test_attributes_that_change_a_columns_numbers_are_refused(tmp_path, name):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for column, values in columns().items():
            file[f"events/{column}"] = values
        file["events/t"].attrs[name] = 1000
    with pytest.raises(EventError, match=f"events/t has an attribute '{name.lower()}', and no"):
        read_events(tmp_path / "a.h5")


def test_a_damaged_aedat4_is_one_sentence_though_its_decoder_panics(tmp_path):
    whole = (ROOT / "data/davis_road/davis346_road.aedat4").read_bytes()
    panics = whole[:18] + b"\xff\xff\xff\x7f" + whole[22:]  # where the header's table begins
    for content in (panics, whole[:3_000_000], whole[:2000], b""):
        (tmp_path / "a.aedat4").write_bytes(content)
        with pytest.raises(EventError, match=r"a\.aedat4 could not be read as events"):
            read_events(tmp_path / "a.aedat4")


@pytest.mark.parametrize("content", [
    "ffconcat version 1.0\nfile whole.mp4\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nwhole.mp4\n#EXT-X-ENDLIST\n",
    "0.000190 307 8 0\n" * 500,
])
def test_a_text_named_as_a_video_is_neither_painted_nor_followed(tmp_path, content):
    write_mp4(tmp_path / "whole.mp4")
    (tmp_path / "a.mp4").write_text(content)
    with pytest.raises(VideoError, match=r"does not decode as a video: it does not begin as \.mp4"):
        frames.read_video(tmp_path / "a.mp4")


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mp4(tmp_path / "whole.mp4")
    for name in ("2024-01-01T10:20:30.mp4", "concat:whole.mp4"):
        shutil.copy("whole.mp4", name)
        assert frames.read_video(name).shape == (8, 24, 32, 3)
    for name in ("http://127.0.0.1:9/a.mp4", "concat:whole.mp4|whole.mp4"):
        with pytest.raises(VideoError, match="there is no such video file"):
            frames.read_video(name)


def test_a_video_of_an_unknown_codec_is_one_sentence(tmp_path):
    write_mp4(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes().replace(b"mp4v", b"\0xyz").replace(b"esds", b"free")
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=r"does not decode as a video|holds no video frame"):
        frames.read_video(tmp_path / "a.mp4")


def test_large_pictures_and_videos_are_bounded_before_they_are_decoded(tmp_path, monkeypatch):
    folder_of_images = tmp_path / "clip"
    folder_of_images.mkdir()
    Image.new("1", (13_000, 13_000)).save(folder_of_images / "0.png")
    with pytest.raises(VideoError, match="13000x13000 pixels is not read"):
        frames.read_video(folder_of_images)
    Image.new("1", (20_000, 20_000)).save(folder_of_images / "0.png")
    with pytest.raises(VideoError, match="does not decode as an image"):
        frames.read_video(folder_of_images)
    write_mp4(tmp_path / "a.mp4")
    monkeypatch.setattr(timed_video, "MOST_FRAMES", 12)
    with pytest.raises(VideoError, match="more than 12 frames"):
        frames.read_video(tmp_path / "a.mp4")
    monkeypatch.setattr(timed_video, "MOST_BYTES", 10 * 24 * 32 * 3)
    with pytest.raises(VideoError, match="give less max_seconds or max_side"):
        timed_video.read(tmp_path / "a.mp4")
    monkeypatch.setattr(timed_video, "MOST_PIXELS", 500)
    with pytest.raises(VideoError, match="frames of 32x24 pixels are not read"):
        frames.read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_never_waited_for(tmp_path, kind):
    def stand(name):
        path = tmp_path / name
        {"pipe": os.mkfifo, "device": lambda path: os.symlink("/dev/zero", path),
         "folder": os.mkdir}[kind](path)
        return path

    readers = [(read_events, "a.npy"), (read_events, "a.h5"), (read_events, "a.aedat4"),
               (frames.read_image, "a.png"), (timed_video.read, "a.mp4")]
    for read, name in readers:
        with pytest.raises(XsdError, match=r"is (a folder|a device), not the|device, pipe"):
            read(stand(name))
    with pytest.raises(DatasetError):
        read_json(stand("a.json"), DatasetError, "write it again", max_bytes=1 << 20)
    root = write(tmp_path / "data")
    (root / folder.INDEX).unlink()
    shutil.move(stand("index"), root / folder.INDEX)
    with pytest.raises(DatasetError):
        folder.open_folder(root)


@pytest.mark.parametrize("change", [
    {"t_us": [1]}, {"t_us": "12"}, {"t_us": [5, 5]}, {"t_us": [0.5, 2]}, {"t_us": [0, 10**40]},
    {"id": {}}, {"id": None}, {"split": ["test"]}, {"source": 5}, {"event_data": 5},
    {"event_data": ""}, {"event_data": "/etc/passwd"}, {"event_data": "../a.npy"},
    {"event_data": "a/b\0.npy"}, {"event_data": "a\nb/0.npy"}, {"event_data": "\ud800/0.npy"},
    {"event_data": "a" * 300 + "/0.npy"}, {"event_data": "a/" * 900 + "0.npy"},
    {"event_data": "a\\b.npy"}, {"event_data": "https://a/b.npy"}, {"video_data": "a/../../b"},
    {"mp4_data": [1]}, {"event_image": "abcde"},
    {"event_image": [None] * 5},
], ids=lambda change: json.dumps(change)[:40])
def test_an_entry_that_is_none_is_named_by_its_number(tmp_path, change):
    root = write(tmp_path)
    entries = json.loads((root / folder.INDEX).read_text())
    entries[1] |= change
    (root / folder.INDEX).write_text(json.dumps(entries))
    with pytest.raises(DatasetError, match="entry 1 is malformed"):
        folder.open_folder(root)


def test_an_index_with_a_byte_order_mark_is_read_and_one_that_is_none_is_named(tmp_path):
    root = write(tmp_path)
    content = (root / folder.INDEX).read_bytes()
    (root / folder.INDEX).write_bytes(b"\xef\xbb\xbf" + content)
    assert len(folder.open_folder(root)) == 4
    for bad in (content.decode().encode("utf-16"), b"[" * 100_000, b"[NaN]", b"{}",
                content.replace(b'"id"', b'"id": "x", "id"', 1)):
        (root / folder.INDEX).write_bytes(bad)
        with pytest.raises(DatasetError, match=folder.INDEX):
            folder.open_folder(root)


def test_links_that_leave_the_folder_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()

    def led_out(name):
        root = write(tmp_path / f"data_{len(list(tmp_path.iterdir()))}")
        place = outside / root.name
        shutil.move(root / name, place)
        (root / name).symlink_to(place)
        return root

    def load(root):
        return folder.load_sample(folder.open_folder(root)[0], "What?", canvas=None)

    for name in ("event_image/a/000000_2.png", "video/a/000000/000003.png", "video/a"):
        with pytest.raises(DatasetError, match="leads out of the dataset folder"):
            load(led_out(name))
    for act in (folder.data_hash, lambda root: folder.load_events(folder.open_folder(root)[0])):
        with pytest.raises(DatasetError, match="leads out of the dataset folder"):
            act(led_out("event_npy/a/000000.npy"))
    inside = write(tmp_path / "inside")
    shutil.move(inside / "video/a", inside / "video/moved")
    (inside / "video/a").symlink_to("moved")
    assert load(inside).video.shape == (8, 12, 16, 3)


def test_a_clip_that_differs_in_capitals_alone_is_not_written(tmp_path):
    with folder.FolderWriter(tmp_path, "test") as writer:
        writer.add("a", "0", events=stream(), video=video())
        with pytest.raises(DatasetError, match="'a/0' is there, which differs in capitals alone"):
            writer.add("A", "0", events=stream(), video=video())


def test_nothing_is_written_outside_of_the_folder(tmp_path):
    (tmp_path / "made").mkdir()
    for sequence, clip in (("..", "0"), ("", "0"), ("/tmp", "0"), ("a\nb", "0"), ("a", "../../b")):
        with pytest.raises(DatasetError, match="cannot be written"):
            folder.FolderWriter(tmp_path / "made", "test").add(sequence, clip, events=stream(),
                                                               video=video())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "made" / "video").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="leads out of the dataset folder"):
        folder.FolderWriter(tmp_path / "made", "test").add("a", "0", events=stream(),
                                                           video=video())
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(("content", "message"), [
    (json.dumps(["a" * 200_000]), "is no text of at most 2000 characters"),
    ('["two\\nlines"]', "control characters"), ('["\\ud800?"]', "control characters"),
    ('[{"question": 5, "count": 1}]', "malformed"), ('[{"question": "a?", "count": "x"}]',
                                                     "malformed"),
    ('[{"question": "a?", "count": NaN}]', "malformed"), ("[" * 100_000, "is not JSON"),
    ('[{"question": "a?", "count": 1e999}]', "malformed"), ('["\\u200b "]', "has zero length"),
    ('[{"question": "a?", "question": "b?"}]', "'question' stands twice in one object"),
    ('["two\\u2028lines"]', "control characters"),
    ('[' + '"aaaaaaaa",' * 2_000_000 + '"a"]', "is larger than 16 MB"),
])
def test_questions_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        folder.read_questions(tmp_path)


def test_a_text_of_questions_is_read_over_a_mark_and_refused_in_another_coding(tmp_path):
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfIs it day?\r\n\r\nWho crosses?\n")
    assert folder.read_questions(tmp_path / "q.txt") == ["Is it day?", "Who crosses?"]
    (tmp_path / "q.csv").write_text("question,count\nIs it day?,5\n")
    with pytest.raises(DatasetError, match=r"questions are read from .json, or .txt"):
        folder.read_questions(tmp_path / "q.csv")
    (tmp_path / "q.txt").write_bytes("Fährt es?".encode("latin-1"))
    with pytest.raises(DatasetError, match="is not UTF-8 text"):
        folder.read_questions(tmp_path / "q.txt")
    write_events(tmp_path / "a.npy", stream())
    with pytest.raises(DatasetError, match="the question 'aa"):
        folder.load_sample(folder.open_folder(write(tmp_path / "data"))[0], "a" * 5000)


def test_what_is_proportionate_is_read(tmp_path):
    n = 300_000
    np.savez_compressed(tmp_path / "a.npz", **columns(
        x=np.zeros(n, int), y=np.zeros(n, int), t=np.arange(n), p=np.ones(n, int)))
    assert len(read_events(tmp_path / "a.npz")) == n
    containers.check_size(tmp_path / "a.npz", 64 << 20)


def test_the_sentences_of_the_page_are_those_of_the_code():
    tables = [line for line in (ROOT / "docs/sensors.md").read_text().splitlines()
              if line.startswith("|") and "…" in line.rsplit("|", 2)[1]]
    code = "".join(path.read_text() for room in ("sensors", "steps", "embedded")
                   for path in (ROOT / "xsd" / room).glob("*.py"))
    code += (ROOT / "xsd/files.py").read_text()
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # one text over several lines
    pieces = [piece.strip("; ") for line in tables
              for piece in line.rsplit("|", 2)[1].split("…") if piece.strip("; ")]
    assert len(pieces) > 60 and [piece for piece in pieces if piece not in code] == []
