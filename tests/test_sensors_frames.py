"""Event frames, and sampled video against slow or foreign references."""

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from xsd.core import EventError, VideoError
from xsd.sensors import frames, timed_video
from xsd.sensors.events import Events


def stream(n, width=20, height=15, seed=0):
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, width, n).astype(np.uint16), draw.integers(0, height,
                                                                       n).astype(np.uint16)
    return Events(x, y, np.sort(draw.integers(0, 50_000, n)),
                  draw.integers(0, 2, n).astype(np.uint8), width, height)


def paint_slowly(x, y, p, width, height):
    picture = np.full((height, width, 3), 255, np.uint8)
    for i in range(len(x)):
        picture[y[i], x[i]] = (0, 0, 255) if p[i] == 0 else (255, 0, 0)
    return picture


@settings(max_examples=25, deadline=None)
@given(n=st.integers(5, 400), n_frames=st.integers(1, 5), seed=st.integers(0, 50),
       canvas=st.sampled_from(["slice", "sensor"]))
def test_event_frames_are_those_of_the_event_by_event_loop(n, n_frames, seed, canvas):
    events = stream(n, seed=seed)
    pictures = frames.event_frames(events, n_frames, canvas=canvas)
    assert len(pictures) == n_frames
    for k, picture in enumerate(pictures):
        own = slice(k * (n // n_frames), n if k == n_frames - 1 else (k + 1) * (n // n_frames))
        x, y, p = events.x[own], events.y[own], events.p[own]
        size = (int(x.max()) + 1, int(y.max()) + 1) if canvas == "slice" else (20, 15)
        assert np.array_equal(picture, paint_slowly(x, y, p, *size))


def test_the_last_event_at_a_pixel_wins():
    twice = Events(np.array([1, 1], np.uint16), np.array([0, 0], np.uint16), np.array([3, 4]),
                   np.array([1, 0], np.uint8), 2, 1)
    assert frames.event_frames(twice, 1, canvas="sensor")[0].tolist() == [[[255, 255, 255],
                                                                           [0, 0, 255]]]


def test_time_slices_have_equal_durations():
    events = Events(np.arange(4, dtype=np.uint16), np.zeros(4, np.uint16), np.array([0, 1, 2, 100]),
                    np.ones(4, np.uint8), 4, 1)
    first, second = frames.event_frames(events, 2, canvas="sensor", by="time")
    assert (first == [255, 0, 0]).all(axis=2).tolist() == [[True, True, True, False]]
    assert (second == [255, 0, 0]).all(axis=2).tolist() == [[False, False, False, True]]
    with pytest.raises(EventError, match="time slice 1 of 4 holds no event"):
        frames.event_frames(events, 4, by="time")


def test_the_sensor_canvas_of_an_unknown_sensor_is_the_whole_streams():
    events = stream(50)
    unknown = Events(events.x, events.y, events.t_us, events.p)
    assert {picture.shape for picture in frames.event_frames(unknown, 5, canvas="sensor")
            } == {(events.y.max() + 1, events.x.max() + 1, 3)}


@pytest.mark.parametrize(("n", "n_frames", "message"),
                         [(4, 5, "holds 4 events, too few for 5 event frames"),
                          (9, 0, "0 event frames were asked")])
def test_too_few_events_are_refused(n, n_frames, message):
    with pytest.raises(EventError, match=message):
        frames.event_frames(stream(n), n_frames)


def test_events_outside_the_sensor_are_refused():
    events = stream(30)
    with pytest.raises(EventError, match="but the sensor is 5x5"):
        frames.event_frames(Events(events.x, events.y, events.t_us, events.p, 5, 5), 5)


@given(n=st.integers(1, 300), n_frames=st.integers(2, 40))
def test_uniform_indices_are_the_floor_of_linspace_computed_exactly(n, n_frames):
    indices = frames.uniform_indices(n, n_frames)
    assert indices[0] == 0
    assert indices[-1] == n - 1
    assert np.abs(np.array(indices) - np.linspace(0, n - 1, n_frames)).max() < 1
    assert all(index <= exact + 1e-9
               for index, exact in zip(indices, np.linspace(0, n - 1, n_frames), strict=True))


def test_eight_of_twenty_frames_are_dsecs():
    assert frames.uniform_indices(20, 8) == [0, 2, 5, 8, 10, 13, 16, 19] == np.linspace(
        0, 19, 8).astype(int).tolist()
    assert frames.uniform_indices(3, 8) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert frames.uniform_indices(9, 1) == [0]


def write_images(folder, n=10, size=(6, 8)):
    folder.mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (n, *size, 3)).astype(np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:06d}.png")
    return pictures


def test_a_folder_of_images_is_sampled_in_order_of_name(tmp_path):
    pictures = write_images(tmp_path / "clip")
    (tmp_path / "clip" / "notes.txt").write_text("not an image")
    assert np.array_equal(frames.read_video(tmp_path / "clip"),
                          pictures[frames.uniform_indices(10, 8)])


def test_grey_images_become_rgb(tmp_path):
    (tmp_path / "clip").mkdir()
    Image.fromarray(np.full((4, 5), 77, np.uint8)).save(tmp_path / "clip" / "0.png")
    assert frames.read_video(tmp_path / "clip", 2).tolist() == np.full((2, 4, 5, 3), 77).tolist()


def write_mp4(path, n=20, n_streams=1, codec="mpeg4", pixels="yuv420p", ratio=None):
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=20) for _ in range(n_streams)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 32, 24, pixels
            if ratio:
                stream.codec_context.sample_aspect_ratio = ratio
        for i in range(n):
            picture = np.full((24, 32, 3), i * 10, np.uint8)
            for stream in streams:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())


def test_an_mp4_is_decoded_and_sampled(tmp_path):
    write_mp4(tmp_path / "a.mp4")
    video = frames.read_video(tmp_path / "a.mp4")
    assert video.shape == (8, 24, 32, 3)
    assert np.abs(video.mean(axis=(1, 2, 3)) -
                  np.array(frames.uniform_indices(20, 8)) * 10).max() < 5


def test_videos_without_a_frame_or_that_do_not_decode_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty holds no frame"):
        frames.read_video(tmp_path / "empty")
    with pytest.raises(VideoError, match="there is no such video file"):
        frames.read_video(tmp_path / "missing.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"this is not a video" * 50)
    with pytest.raises(VideoError, match="does not decode as a video"):
        frames.read_video(tmp_path / "bad.mp4")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(VideoError, match=r"0\.png does not decode as an image"):
        frames.read_video(tmp_path / "bad")
    write_mp4(tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    with pytest.raises(VideoError, match=r"does not decode as a video|holds no video frame"):
        frames.read_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize(("name", "options", "message"), [
    ("a.mp4", {"n_streams": 2}, "holds 2 video streams; save the one to read alone"),
    ("a.mp4", {"ratio": Fraction(4, 3)}, "its pixels are shown as 4/3, not as squares"),
    ("a.mov", {"codec": "qtrle", "pixels": "argb"}, "has transparent pixels"),
])
def test_a_video_that_would_be_shown_otherwise_is_refused(tmp_path, name, options, message):
    write_mp4(tmp_path / name, 3, **options)
    with pytest.raises(VideoError, match=message):
        frames.read_video(tmp_path / name)


def test_images_of_two_sizes_are_no_video(tmp_path):
    write_images(tmp_path / "clip", 2)
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(tmp_path / "clip" / "9.png")
    with pytest.raises(VideoError, match="differ in size"):
        frames.read_video(tmp_path / "clip")


def clip_of(folder, pictures, names=None, **options):
    """The pictures as a folder of images, read back."""
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / (names[i] if names else f"{i}.png"), **options)
    return frames.read_video(folder)


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    grey = [Image.new("L", (4, 4), k) for k in range(1, 21)]
    read = clip_of(tmp_path / "a", grey, [f"{k}.png" for k in range(1, 21)])
    assert read[:, 0, 0, 0].tolist() == [1 + i for i in frames.uniform_indices(20, 8)]
    for k, names in enumerate((["0.1.png", "0.25.png", "0.3.png"], ["1.png", "01.png", "2.png"],
                               ["1.png", "1.jpg", "2.png"])):
        with pytest.raises(VideoError, match=r"decimal numbers of several lengths|twice the same"):
            clip_of(tmp_path / f"bad{k}", grey[:3], names)
    for k, names in enumerate((["t-1.png", "t0.png", "t1.png"], ["a1.png", "A2.png", "a3.png"],
                               ["0f.png", "10.png", "1a.png"], ["1.png", "2.png", "cover.png"])):
        with pytest.raises(VideoError, match="are numbered in two ways, which leaves their order"):
            clip_of(tmp_path / f"two{k}", grey[:3], names)
    other = clip_of(tmp_path / "digits", grey[:10], [f"{k}.png" for k in "١٢٣٤٥٦٧٨٩"] + ["١٠.png"])
    assert other[-1, 0, 0, 0] == 10


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    ramp = np.linspace(0, 65535, 9).astype(np.uint16)[None].repeat(8, 0)
    read = clip_of(tmp_path / "a", [Image.fromarray(ramp)] * 2)
    assert read[0, :, :, 1].tolist() == (ramp >> 8).tolist()


def test_only_kinds_of_pictures_whose_values_stay_are_read(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    for k, (picture, colour) in enumerate((
            (Image.new("1", (4, 4), 1), [255] * 3), (palette, [10, 20, 30]),
            (Image.new("LA", (4, 4), (200, 255)), [200] * 3),
            (Image.new("RGBA", (4, 4), (1, 2, 3, 255)), [1, 2, 3]))):
        assert (clip_of(tmp_path / f"good{k}", [picture]) == colour).all()
    more = {"save_all": True, "append_images": [Image.new("RGB", (4, 4), (9, 0, 0))]}
    for k, (picture, name, options, message) in enumerate((
            (Image.new("LA", (4, 4), (200, 0)), "0.png", {}, "transparent pixels"),
            (Image.new("RGBA", (4, 4), (1, 2, 3, 9)), "0.png", {}, "transparent pixels"),
            (palette, "0.png", {"transparency": 0}, "transparent pixels"),
            (Image.new("I;16", (4, 4)), "0.png", {"transparency": 0}, "transparent pixels"),
            (Image.new("CMYK", (4, 4)), "0.jpg", {}, "pictures of kind CMYK are not read"),
            (Image.new("F", (4, 4)), "0.png", {"format": "TIFF"}, "does not decode as an image"),
            (palette, "0.png", {"format": "GIF"}, "does not decode as an image"),
            (Image.new("RGB", (4, 4)), "0.png", more, "is animated"))):
        with pytest.raises(VideoError, match=message):
            clip_of(tmp_path / f"bad{k}", [picture], [name], **options)


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    assert clip_of(tmp_path / "a", [Image.new("RGB", (20, 10))], ["0.jpg"],
                   exif=exif).shape == (8, 20, 10, 3)


@pytest.mark.parametrize(("matrix", "corner"), [
    ((1, 0, 0, 1), (0, 0)), ((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)),
    ((0, -1, 1, 0), (-1, 0)), ((-1, 0, 0, 1), (0, -1)), ((1, 0, 0, -1), (-1, 0)),
    ((0, 1, 1, 0), (0, 0))])
def test_a_video_is_turned_and_mirrored_as_its_file_says(tmp_path, matrix, corner):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:16, :32] = 220  # the upper left quarter
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    turn(path, matrix)
    video = frames.read_video(path)
    assert video.shape[1:3] == ((64, 32) if matrix[0] == 0 else (32, 64))
    bright = {(y, x) for y in (0, -1) for x in (0, -1) if video[0, y, x, 0] > 150}
    assert bright == {corner}
    assert (timed_video.read(path)[0][0] == video[0]).all()
    turn(path, (0.7, 0.7, -0.7, 0.7))
    with pytest.raises(VideoError, match="only quarters are read"):
        frames.read_video(path)


def turn(path, matrix):
    """Write the display matrix into the track's header."""
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd") + 44
    for at, value in zip((0, 4, 12, 16), matrix, strict=True):
        content[start + at:start + at + 4] = (int(value * 65536) & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content)
