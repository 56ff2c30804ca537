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
