"""Event streams: one record, safe reading of the usual files, checks, and the dataset's own file
(docs/sensors.md, section 3).

An event says that one pixel got brighter (ON, p = 1) or darker (OFF, p = 0) at one time. The
dataset keeps events as a pickled dict, and
a pickle can run any code: it is read here by an unpickler that knows plain containers, numbers and
numeric arrays, and nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from xsd.core import EventError
from xsd.files import atomic_write

OFFICIAL_LIMIT_US = 100_000
"""The official EventGPT code refuses streams this long (it was tuned for 50 ms)."""
_NAMES = {
    "x": ("x",), "y": ("y",), "t": ("t", "t_us", "timestamp", "timestamps"),
    "p": ("p", "on", "polarity")
}


@dataclass(frozen=True, eq=False)
class Events:
    """N events. x, y: uint16 [N] pixels; t_us: int64 [N] µs; p: uint8 [N], 0 OFF, 1 ON. width,
    height: of the sensor, where known."""

    x: np.ndarray
    y: np.ndarray
    t_us: np.ndarray
    p: np.ndarray
    width: int | None = None
    height: int | None = None

    def __len__(self) -> int:
        return len(self.t_us)

    def between(self, start_us: int, end_us: int) -> Events:
        """Events with start_us <= t < end_us; the stream must be in order of time."""
        first, last = np.searchsorted(self.t_us, [start_us, end_us], side="left")
        return Events(self.x[first:last], self.y[first:last], self.t_us[first:last],
                      self.p[first:last], self.width, self.height)


def empty(width: int | None = None, height: int | None = None) -> Events:
    """A stream of no event."""
    return Events(np.empty(0, np.uint16), np.empty(0, np.uint16), np.empty(0, np.int64),
                  np.empty(0, np.uint8), width, height)


def join(streams: Sequence[Events]) -> Events:
    """One stream after the other (no sorting); the sensor size is the first one's."""
    if not streams:
        return empty()
    columns = (np.concatenate([getattr(stream, name) for stream in streams])
               for name in ("x", "y", "t_us", "p"))
    return Events(*columns, streams[0].width, streams[0].height)


# --- checks
# ------------------------------------------------------------------------------------------------


def from_columns(columns: Mapping[str, Any], *, width: int | None = None, height: int | None = None,
                 name: str = "the event stream") -> Events:
    """Events from arrays of any integer type under x, y, t, p (p may be bool, 0/1 or -1/1).

    Raises: EventError for a missing column, other lengths, numbers that are not whole, negative
    coordinates, another polarity.
    """
    found: dict[str, np.ndarray] = {}
    for column, spellings in _NAMES.items():
        key = next((spelling for spelling in spellings if spelling in columns), None)
        if key is None:
            raise EventError(
                f"{name} has no column {column!r} (found: "
                f"{', '.join(map(str, columns)) or 'nothing'}); events need x, y, t and p"
            )
        values = np.asarray(columns[key])
        if values.ndim != 1 or values.dtype.kind not in "biu":
            raise EventError(
                f"{name}: column {column!r} is {values.dtype} of shape {values.shape}; expected "
                "whole numbers [N] (t in microseconds)"
            )
        found[column] = values
    if len({len(values) for values in found.values()}) > 1:
        raise EventError(
            f"{name}: columns differ in length "
            f"({', '.join(f'{key} {len(value)}' for key, value in found.items())})"
        )
    for column in "xy":
        values = found[column]
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise EventError(
                f"{name}: {column} runs from {values.min()} to {values.max()}; pixel coordinates "
                "must lie in the sensor, from 0 on"
            )
    polarity = found["p"].astype(np.int8)
    if polarity.size and not (polarity.min() >= -1 and polarity.max() <= 1):
        raise EventError(
            f"{name}: polarity runs from {polarity.min()} to {polarity.max()}; expected 0 or -1 "
            "(OFF) and 1 (ON)"
        )
    return Events(found["x"].astype(np.uint16), found["y"].astype(np.uint16),
                  found["t"].astype(np.int64), (polarity > 0).astype(np.uint8), width, height,
                  )


def check_events(events: Events, name: str = "the event stream") -> None:
    """Raises: EventError when the stream is empty, not in order of time, or outside the sensor
    (where its size is known)."""
    if len(events) == 0:
        raise EventError(
            f"{name} is empty; at least one event is needed (choose another clip or a longer "
            "window)"
        )
    backwards = np.flatnonzero(np.diff(events.t_us) < 0)
    if backwards.size:
        first = int(backwards[0])
        raise EventError(
            f"{name} is not sorted by time: event {first + 1} at {events.t_us[first + 1]} µs "
            f"follows {events.t_us[first]} µs; "
            "sort by t before saving")
    if events.t_us[0] < 0:
        raise EventError(f"{name} begins at {events.t_us[0]} µs; times must not be negative")
    for axis, values, size in (("x", events.x, events.width), ("y", events.y, events.height)):
        if size is not None and values.max() >= size:
            raise EventError(
                f"{name}: {axis} reaches {values.max()} but the sensor is "
                f"{events.width}x{events.height} (width x height); "
                "give its right size")


def official_limit_note(events: Events) -> str | None:
    """A sentence when the official EventGPT code would refuse the stream (100 ms or longer); it is
    used all the same."""
    duration = int(events.t_us[-1] - events.t_us[0]) if len(events) else 0
    if duration < OFFICIAL_LIMIT_US:
        return None
    return (
        f"the stream lasts {duration / 1000:.1f} ms; the official EventGPT code, tuned for 50 ms, "
        "refuses 100 ms and more; "
        "used here all the same")


# --- files
# ------------------------------------------------------------------------------------------------


def read_events(path: str | Path, *, width: int | None = None, height: int | None = None) -> Events:
    """Read and check an event file: the dataset's pickled-dict ``.npy``, a structured ``.npy``,
    ``.npz``, ``.aedat4``, DSEC's ``.h5``.

    Args: width, height: of the sensor, if the file does not say (or says something else).
    Returns: events in order of time; ``t`` in µs as in the file (zero-based or absolute), DSEC's
    with its ``t_offset`` added.
    Raises: EventError when the file is missing, unreadable, holds anything but numbers, or fails
    :func:`check_events`.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise EventError(
            f"{path}: event files of type {path.suffix or '(none)'} are not read here; expected "
            f"one of {', '.join(sorted(_READERS))}"
        )
    if not path.is_file():
        raise EventError(f"{path}: there is no such event file")
    try:
        columns = dict(reader(path))
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile,
            zlib.error) as error:
        raise EventError(
            f"{path} could not be read as events ({error}); the file is damaged or of another kind"
        ) from error
    width = width if width is not None else _size(columns.get("width"))
    height = height if height is not None else _size(columns.get("height"))
    events = from_columns(columns, width=width, height=height, name=str(path))
    check_events(events, str(path))
    return events


def write_events(path: str | Path, events: Events) -> None:
    """Write the dataset's file: ``.npy`` holding a pickled dict of x, y, t, p (t int64 µs), with
    width and height where known.

    The same events give the same bytes. Raises: StorageError when the disk is full.
    """
    content: dict[str, Any] = {
        "x": np.array(events.x, np.uint16), "y": np.array(events.y, np.uint16),
        "t": np.array(events.t_us, np.int64), "p": np.array(events.p, np.uint8),
    }
    if events.width is not None and events.height is not None:
        content |= {"width": int(events.width), "height": int(events.height)}
    holder = np.empty((), object)
    holder[()] = content
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, holder, allow_pickle=True)
    atomic_write(path, buffer.getvalue())


def _size(value: Any) -> int | None:
    return None if value is None else int(value)


def _read_npy(path: Path) -> Mapping[str, Any]:
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (
            1, 0) else np.lib.format.read_array_header_2_0
        _, _, dtype = read_header(file)
        if not dtype.hasobject:
            file.seek(0)
            array = np.lib.format.read_array(file, allow_pickle=False)
            if array.dtype.names is None:
                raise EventError(
                    f"{path} holds a plain array of shape {array.shape}; expected a dict or a "
                    "structured array with x, y, t, p"
                )
            return {name: array[name] for name in array.dtype.names}
        content = _unpickle(file, path)
    if isinstance(content, np.ndarray) and content.dtype == object and content.size == 1:
        content = content.reshape(())[()]
    if not isinstance(content, dict):
        raise EventError(
            f"{path} holds a pickled {type(content).__name__}; expected a dict with x, y, t, p")
    return content


def _read_npz(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_aedat4(path: Path) -> Mapping[str, Any]:
    try:
        import aedat
    except ImportError as error:
        raise EventError(
            f"{path}: reading .aedat4 needs the package aedat; install it with: pip install "
            "aedat==2.3.0"
        ) from error
    decoder = aedat.Decoder(str(path))
    stream = next(
        (stream for stream in decoder.id_to_stream().values() if stream["type"] == "events"), None)
    if stream is None:
        raise EventError(f"{path} holds no event stream")
    packets = [packet["events"] for packet in decoder if "events" in packet]
    if not packets:
        raise EventError(f"{path} is empty: its event stream holds no packet")
    array = np.concatenate(packets)
    return {
        "x": array["x"], "y": array["y"], "t": array["t"], "p": array["on"],
        "width": stream["width"], "height": stream["height"]
    }


def h5_module(path: Path) -> ModuleType:
    """h5py, with the blosc filter DSEC is compressed with. Raises: EventError naming ``path`` when
    a package is missing."""
    try:
        import h5py
        import hdf5plugin  # noqa: F401  registers the filter
    except ImportError as error:
        raise EventError(
            f"{path}: reading DSEC's .h5 needs the packages h5py and hdf5plugin; install them with "
            "pip"
        ) from error
    return h5py


def _read_h5(path: Path) -> Mapping[str, Any]:
    with h5_module(path).File(path, "r") as file:
        group = file["events"]
        columns: dict[str, Any] = {name: group[name][:] for name in ("x", "y", "t", "p")}
        columns["t"] = columns["t"].astype(
            np.int64) + (int(file["t_offset"][()]) if "t_offset" in file else 0)
        if "ms_to_idx" in file:  # DSEC's own files: a 640 x 480 sensor
            columns |= {"width": 640, "height": 480}
    return columns


_READERS = {
    ".npy": _read_npy, ".npz": _read_npz, ".aedat4": _read_aedat4, ".h5": _read_h5,
    ".hdf5": _read_h5
}

# --- a pickle read without running it
# ------------------------------------------------------------------------------------


class _Dtype:
    """Stands in for numpy.dtype: a kind and a size, nothing that could reach memory by other
    ways."""
    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "="
        if self.code not in ("b1", "O8", "O") and not (self.code[:1] in ("i", "u", "f")
                                                       and self.code[1:] in ("1", "2", "4", "8")):
            raise pickle.UnpicklingError(f"arrays of type {self.code!r} are not events")

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")
        self.order = state[1]

    def plain(self) -> np.dtype:
        return np.dtype(object) if self.code.startswith("O") else np.dtype(
            self.order.replace("|", "=") + self.code)


class _Array:
    """Stands in for an array until its state arrives."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.value = _array(content, dtype, shape, "F" if fortran else "C")


def _array(content: Any, dtype: _Dtype, shape: Sequence[int], order: str) -> np.ndarray:
    plain, shape = dtype.plain(), tuple(int(size) for size in shape)
    if plain.hasobject:
        if not isinstance(content, list) or len(content) != math.prod(shape):
            raise pickle.UnpicklingError("an object array does not list its objects")
        array = np.empty(len(content), object)
        array[:] = content
        return array.reshape(shape, order=order)
    return np.frombuffer(content, plain).reshape(shape, order=order).astype(plain.newbyteorder("="))


class _Unpickler(pickle.Unpickler):
    """Only numpy's own names for rebuilding arrays are known, and each is answered by a stand-in of
    ours."""
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("multiarray", "_reconstruct"): lambda *_: _Array(),
            ("multiarray", "scalar"): lambda dtype, content: _array(content, dtype, (), "C")[()],
            ("numeric", "_frombuffer"): lambda content, dtype, shape,
                                        order: _array(content, dtype, shape, order),
            ("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): lambda text, _codec: text.encode("latin1"),
        }
        place = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (place, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is code, not data")
        return known[place, name]


def _unpickle(file: BinaryIO, path: Path) -> Any:
    try:
        return _settle(_Unpickler(file).load())
    # a hostile pickle can fail in any way; whatever it is, the answer is the same
    except Exception as error:
        raise EventError(
            f"{path} was refused: its pickle is not a plain dict of arrays ({error}); nothing in "
            "it was run"
        ) from error


def _settle(value: Any) -> Any:
    """Replace the stand-ins by their arrays."""
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        return _settle(value.reshape(-1)[0])
    if isinstance(value, dict):
        return {key: _settle(item) for key, item in value.items()}
    return value
