"""Event files: what is read, what is refused, and that nothing in a file is ever run."""

import os
import pickle
import sys

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsd.core import EventError
from xsd.sensors import events as event_streams
from xsd.sensors.events import Events, check_events, read_events, write_events


def stream(n=50, width=12, height=9, seed=0, start=0):
    draw = np.random.default_rng(seed)
    return Events(
        draw.integers(0, width, n).astype(np.uint16),
        draw.integers(0, height, n).astype(np.uint16), start + np.sort(draw.integers(0, 40_000, n)),
        draw.integers(0, 2, n).astype(np.uint8), width, height,
    )


def same(first, second):
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("x", "y", "t_us", "p"))


def save_dict(path, **columns):
    np.save(path, np.array(columns, dtype=object), allow_pickle=True)
    return path


def columns(events, **changes):
    return {"x": events.x, "y": events.y, "t": events.t_us, "p": events.p} | changes


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 60), seed=st.integers(0, 99),
       start=st.sampled_from([0, 1_589_163_147_365_215]))
def test_what_is_written_is_read_back(tmp_path_factory, n, seed, start):
    path = tmp_path_factory.mktemp("events") / "a.npy"
    events = stream(n, seed=seed, start=start)
    write_events(path, events)
    back = read_events(path)
    assert same(back, events)
    assert (back.width, back.height) == (12, 9)
    assert (back.x.dtype, back.y.dtype, back.t_us.dtype, back.p.dtype) == (np.uint16, np.uint16,
                                                                           np.int64, np.uint8)


def test_the_same_events_give_the_same_bytes(tmp_path):
    write_events(tmp_path / "a.npy", stream())
    write_events(tmp_path / "b.npy", read_events(tmp_path / "a.npy"))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_numpy_itself_reads_the_written_dict_as_the_official_code_does(tmp_path):
    write_events(tmp_path / "a.npy", stream())
    content = np.array(np.load(tmp_path / "a.npy", allow_pickle=True)).item()
    assert np.array_equal(content["t"], stream().t_us)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_numpy_wrote_is_read(tmp_path, protocol):
    events = stream()
    header = np.lib.format.magic(
        1,
        0) + b"F\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(69) + b"\n"
    held = np.array(columns(events, t=events.t_us.astype(np.uint16)), dtype=object)
    for old in (False, True):
        content = pickle.dumps(held, protocol=protocol)
        if old and protocol < 4:  # the module name that numpy 1 wrote
            content = content.replace(b"numpy._core.", b"numpy.core.")
        (tmp_path / "a.npy").write_bytes(header + content)
        assert same(read_events(tmp_path / "a.npy"), events)


def test_times_of_sixteen_bits_and_polarity_of_minus_one_are_understood(tmp_path):
    events = stream()
    path = save_dict(
        tmp_path / "a.npy",
        **columns(events, t=events.t_us.astype(np.uint16), p=events.p.astype(np.int8) * 2 - 1))
    assert same(read_events(path), events)


def test_structured_arrays_and_npz_are_read(tmp_path):
    events = stream()
    array = np.empty(len(events), [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])
    array["t"], array["x"], array["y"], array["on"] = events.t_us, events.x, events.y, events.p
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", **columns(events), width=12, height=9)
    assert same(read_events(tmp_path / "a.npy"), events)
    assert same(read_events(tmp_path / "a.npz"), events)
    assert read_events(tmp_path / "a.npz").width == 12


def test_dsec_events_get_their_time_offset(tmp_path):
    events = stream()
    with h5py.File(tmp_path / "events.h5", "w") as file:
        for name, values in columns(events, t=events.t_us.astype(np.uint32)).items():
            file.create_dataset(f"events/{name}", data=values, **hdf5plugin.Blosc(cname="zstd"))
        file["t_offset"], file["ms_to_idx"] = 7_000_000, np.zeros(1, np.uint64)
    back = read_events(tmp_path / "events.h5")
    assert np.array_equal(back.t_us, events.t_us + 7_000_000)
    assert (back.width, back.height) == (640, 480)


class Hostile:
    """What a pickle can do: call any function while it is loaded."""
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, getattr])
def test_a_hostile_pickle_is_refused_and_nothing_is_run(tmp_path, function):
    target = tmp_path / "ran"
    code = f"__import__('os').mkdir({str(target)!r})"
    arguments = {
        os.mkdir: (str(target),), os.system: (f"mkdir {target}",), eval: (code,),
        getattr: ("x", "upper")
    }[function]
    path = save_dict(tmp_path / "a.npy", **columns(stream()), extra=Hostile(function, *arguments))
    with pytest.raises(
            EventError,
            match=r"a\.npy was refused: .*which is code, not data.*nothing in it was run"):
        read_events(path)
    assert not target.exists()


@pytest.mark.parametrize("content", [
    b"", b"garbage", b"cbuiltins\neval\n(S'1'\ntR.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", b"(lp0\n0."
])
def test_a_broken_pickle_is_one_clear_error(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(
        np.lib.format.magic(1, 0) + b"F\x00" +
        b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(69) + b"\n" + content)
    with pytest.raises(EventError, match=r"a\.npy was refused"):
        read_events(tmp_path / "a.npy")


def test_an_array_cannot_claim_raw_bytes_as_objects(tmp_path):
    class Forged:
        def __reduce__(self):
            array = np.empty(1, object)
            function, arguments, state = array.__reduce__()
            return function, arguments, (*state[:4], b"\x41" * 8)

    with pytest.raises(EventError, match="was refused"):
        read_events(
            save_dict(tmp_path / "a.npy", x=Forged(), y=stream().y, t=stream().t_us, p=stream().p))


def test_objects_hidden_in_npz_are_refused(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        **columns(stream(), x=np.array([Hostile(os.mkdir, str(tmp_path / "ran"))], dtype=object)))
    with pytest.raises(EventError, match="could not be read as events"):
        read_events(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({name: np.empty(0, np.int64) for name in "xytp"}, "is empty; at least one event"),
     ({"t": np.array([5, 9, 7])}, "not sorted by time: event 2 at 7 µs follows 9 µs"),
     ({"t": np.array([-5, 0, 7])}, "begins at -5 µs"),
     ({"x": np.array([0, -1, 2])}, "x runs from -1 to 2; pixel coordinates"),
     ({"x": np.array([0, 12, 2])}, r"x reaches 12 but the sensor is 12x9 \(width x height\)"),
     ({"y": np.array([0, 9, 2])}, "y reaches 9 but the sensor is 12x9"),
     ({"p": np.array([0, 1, 2])}, "polarity runs from 0 to 2"),
     ({"p": np.array([0, 1])}, "columns differ in length"),
     ({"t": np.array([0.0, 0.1, 0.2])}, "column 't' is float64 .* expected whole numbers"),],
)
def test_bad_streams_each_give_one_clear_sentence(tmp_path, changes, message):
    good = {
        "x": np.array([0, 1, 2]), "y": np.array([0, 1, 2]), "t": np.array([5, 6, 7]),
        "p": np.array([0, 1, 1])
    }
    with pytest.raises(EventError, match=message):
        read_events(save_dict(tmp_path / "a.npy", **good | changes), width=12, height=9)


def test_files_that_are_not_events_are_named(tmp_path):
    with pytest.raises(EventError, match="there is no such event file"):
        read_events(tmp_path / "missing.npy")
    with pytest.raises(EventError, match=r"type \.raw are not read here; expected one of \.aedat4"):
        read_events(tmp_path / "a.raw")
    np.save(tmp_path / "plain.npy", np.zeros((5, 4)))
    with pytest.raises(EventError, match="plain array of shape"):
        read_events(tmp_path / "plain.npy")
    with pytest.raises(EventError, match="has no column 'p'"):
        read_events(save_dict(tmp_path / "a.npy", x=np.arange(2), y=np.arange(2), t=np.arange(2)))
    for name in ("cut.npy", "cut.npz", "cut.h5", "cut.aedat4"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not an archive")
        with pytest.raises(EventError, match="could not be read as events"):
            read_events(tmp_path / name)


def test_a_window_is_half_open_and_keeps_the_sensor():
    events = Events(np.arange(5, dtype=np.uint16), np.zeros(5, np.uint16),
                    np.array([0, 10, 20, 20, 30]), np.zeros(5, np.uint8), 8, 4)
    window = events.between(10, 30)
    assert window.t_us.tolist() == [10, 20, 20]
    assert (window.width, window.height) == (8, 4)
    assert len(events.between(40, 50)) == 0


def test_streams_beyond_the_official_limit_are_noted_and_not_refused():
    short, long = (Events(np.zeros(2, np.uint16), np.zeros(2, np.uint16), np.array([5, 5 + span]),
                          np.zeros(2, np.uint8)) for span in (99_999, 100_000))
    assert event_streams.official_limit_note(short) is None
    assert event_streams.official_limit_note(long).startswith(
        "the stream lasts 100.0 ms; the official EventGPT code")
    check_events(long)


@pytest.mark.parametrize(("suffix", "package"), [("aedat4", "aedat"), ("h5", "hdf5plugin")])
def test_a_missing_reader_package_is_named(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"a.{suffix}").write_bytes(b"anything")
    with pytest.raises(EventError, match=f"needs the packages? .*{package}"):
        read_events(tmp_path / f"a.{suffix}")


WHOLE = {"x": np.arange(4), "y": np.arange(4), "t": 100 * np.arange(4), "p": np.arange(4) % 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"p": np.uint8([0, 255, 0, 255])}, "polarity runs from 0 to 255"),
     ({"p": np.array([0, 256, 0, 256])}, "polarity runs from 0 to 256"),
     ({"p": np.uint16([0, 65535, 0, 0])}, "polarity runs from 0 to 65535"),
     ({"p": [0.5, 0, 1, 1]}, "column 'p' is float64"),
     ({"p": np.ones(4, complex)}, "column 'p' is complex128"),
     ({"x": [0, np.nan, 1, 2]}, "column 'x' is float64"),
     ({"x": np.ones(4, bool)}, "column 'x' is bool"),
     ({"x": np.array([0, 70_000, 1, 2])}, "x runs from 0 to 70000"),
     ({"x": np.array([0, 2**63, 1, 2], np.uint64)}, "x runs from 0 to 9223372036854775808"),
     ({"x": np.full(4, -1).astype(np.uint16)}, "x runs from 65535 to 65535"),
     ({"x": np.full(4, 9999), "y": np.full(4, 9999)}, "a sensor of 10000x10000 pixels"),
     ({"p": np.array([-1, 0, 1, 1])}, "polarity holds both -1 and 0"),
     ({"t": np.array([0, 1, 2, 2**63], np.uint64)}, "t runs from 0 to 9223372036854775808"),
     ({"t": np.array([0, 1, 2, 10**17])}, "more than a day; expected t in microseconds"),
     ({"t": np.linspace(0, 1, 4)}, "column 't' is float64"),
     ({"t": [0, 1, 2, np.inf]}, "column 't' is float64"),
     ({"t": np.float32([1e9, 2e9, 3e9, 4e9])}, "column 't' is float32"),
     ({"t": np.arange(4).astype("M8[us]")}, "column 't' is datetime64"),
     ({"timestamps": np.arange(4)}, "several columns for 't'"),
     ({"width": np.array([3, 4]), "height": 4}, "its width is not one whole number"),
     ({"width": 10**9, "height": 10**9}, "its width is not one whole number")])
def test_numbers_are_checked_before_they_are_narrowed(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **WHOLE | changes)
    with pytest.raises(EventError, match=message):
        read_events(tmp_path / "a.npz")


def test_whole_numbers_in_floats_and_v2es_minus_one_are_read(tmp_path):
    kept = {name: values.astype(float) for name, values in WHOLE.items()}
    np.savez(tmp_path / "a.npz", **kept | {"p": np.uint32([2**32 - 1, 1, 2**32 - 1, 1])})
    events = read_events(tmp_path / "a.npz")
    assert events.t_us.tolist() == [0, 100, 200, 300] and events.p.tolist() == [0, 1, 0, 1]


def test_an_h5_is_read_where_its_columns_have_their_names(tmp_path):
    def h5(**content):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for name, values in content.items():
                file[name.replace("__", "/")] = values
        return tmp_path / "a.h5"

    records = np.zeros(4, [("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])
    records["t"] = WHOLE["t"]
    events = {f"events__{name}": values for name, values in WHOLE.items()}
    assert read_events(h5(CD__events=records)).t_us.tolist() == [0, 100, 200, 300]
    assert len(read_events(h5(**WHOLE))) == 4
    plural = {f"events__{name}s": values for name, values in WHOLE.items()}
    assert len(read_events(h5(**plural))) == 4
    assert read_events(h5(**events, t_offset=[700])).t_us[0] == 700
    wide = events | {"events__x": np.array([0, 1279, 3, 3]), "events__y": np.array([0, 719, 3, 3])}
    assert read_events(h5(**wide, ms_to_idx=[0])).size == (1280, 720)
    assert read_events(h5(**events, ms_to_idx=[0])).size == (640, 480)
    for content, message in (
            ({"events": np.zeros((4, 4))}, r"holds 0 streams .*\(found: events\)"),
            ({"events__a": [1]}, r"found: events, events/a\); expected events/x, y, t, p"),
            (events | {"CD__events": records}, "holds 2 streams"),
            (events | {"events__t": WHOLE["t"] / 1e6}, "column 't' is float64"),
            (events | {"t_offset": [1, 2]}, "t_offset is not one whole number"),
            (events | {"t_offset": np.uint64(2**64 - 1)}, "t_offset is 18446744073709551615")):
        with pytest.raises(EventError, match=message):
            read_events(h5(**content))


def test_v2es_text_is_read_and_other_texts_are_named(tmp_path):
    lines = "0.000190 307 8 -1\n0.000222 56 32 1\n1.5 1 1 -1\n"
    for before in ("", "# v2e: timestamp x y polarity\n", "\ufeff"):
        (tmp_path / "a.txt").write_text(before + lines)
        events = read_events(tmp_path / "a.txt")
        assert events.t_us.tolist() == [190, 222, 1_500_000] and events.p.tolist() == [0, 1, 0]
        assert events.x.tolist() == [307, 56, 1] and events.size == (308, 33)
    for text, message in (("240 180\n" + lines, "is no text of events"),
                          ("190 307 8 0\n222 56 32 1\n", "t in seconds"),
                          ("307 8 0.000190 0\n", "t in seconds"),
                          ("1.5 307.5 8 0\n", "column 'x' is float64"),
                          ("0.1,2,3,1\n", "is no text of events"), ("prose\n", "is no text")):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(EventError, match=message):
            read_events(tmp_path / "a.txt")
