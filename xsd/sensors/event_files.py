"""The columns of an event file of any kind (docs/sensors.md, section 3). A pickled dict, which
could run any code, is read by an unpickler that knows plain containers and numeric arrays alone."""

from __future__ import annotations

import math
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar

import numpy as np

from xsd.core import EventError

Columns = Mapping[str, Any]
DSEC_SENSOR = {"width": 640, "height": 480}


def read_columns(path: Path) -> dict[str, Any]:
    """The arrays of an event file by its own names, and width and height where it says. Raises:
    EventError when it is missing, of another type, or unreadable."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise EventError(f"{path}: event files of type {path.suffix or '(none)'} are not read "
                         f"here; expected one of {', '.join(sorted(_READERS))}")
    if not path.is_file():
        raise EventError(f"{path}: there is no such event file")
    try:
        return dict(reader(path))
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile,
            zlib.error) as error:
        raise EventError(f"{path} could not be read as events ({error}); the file is damaged or of "
                         "another kind") from error


def _read_npy(path: Path) -> Columns:
    layout = np.lib.format
    with open(path, "rb") as file:
        old = layout.read_magic(file) == (1, 0)
        header = (layout.read_array_header_1_0 if old else layout.read_array_header_2_0)(file)
        if header[-1].hasobject:
            content = _unpickle(file, path)
            if not isinstance(content, dict):
                raise EventError(f"{path} holds a pickled {type(content).__name__}; expected a "
                                 "dict with x, y, t, p")
            return content
        file.seek(0)
        array = layout.read_array(file, allow_pickle=False)
    if array.dtype.names is None:
        raise EventError(f"{path} holds a plain array of shape {array.shape}; expected a dict or a "
                         "structured array with x, y, t, p")
    return {name: array[name] for name in array.dtype.names}


def _read_npz(path: Path) -> Columns:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _read_aedat4(path: Path) -> Columns:
    try:
        import aedat
    except ImportError as error:
        raise EventError(f"{path}: reading .aedat4 needs the package aedat; install it with: pip "
                         "install aedat==2.3.0") from error
    decoder = aedat.Decoder(str(path))
    streams = [one for one in decoder.id_to_stream().values() if one["type"] == "events"]
    if not streams:
        raise EventError(f"{path} holds no event stream")
    packets = [packet["events"] for packet in decoder if "events" in packet]
    if not packets:
        raise EventError(f"{path} is empty: its event stream holds no packet")
    array, sensor = np.concatenate(packets), streams[0]
    return {name: array[name] for name in ("x", "y", "t", "on")} | {
        name: sensor[name] for name in ("width", "height")}


def h5_module(path: Path) -> ModuleType:
    """h5py with DSEC's blosc filter. Raises: EventError naming ``path`` without the packages."""
    try:
        import h5py
        import hdf5plugin  # noqa: F401  registers the filter
    except ImportError as error:
        raise EventError(f"{path}: reading DSEC's .h5 needs the packages h5py and hdf5plugin; "
                         "install them with pip") from error
    return h5py


def _read_h5(path: Path) -> Columns:
    with h5_module(path).File(path, "r") as file:
        columns: dict[str, Any] = {name: file["events"][name][:] for name in ("x", "y", "t", "p")}
        if "t_offset" in file:
            columns["t"] = columns["t"].astype(np.int64) + int(file["t_offset"][()])
        return columns | (DSEC_SENSOR if "ms_to_idx" in file else {})


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".aedat4": _read_aedat4, ".h5": _read_h5,
            ".hdf5": _read_h5}

# --- a pickle read without running it


class _Dtype:
    """Stands in for numpy.dtype: a kind and a size, nothing that could reach memory."""

    known = ("b1", "O8", "O", *(kind + size for kind in "iuf" for size in "1248"))

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "="
        if self.code not in self.known:
            raise pickle.UnpicklingError(f"arrays of type {self.code!r} are not events")

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")
        self.order = state[1]

    def plain(self) -> np.dtype:
        if self.code.startswith("O"):
            return np.dtype(object)
        return np.dtype(self.order.replace("|", "=") + self.code)


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
    """Only numpy's names for rebuilding arrays are known, each answered by a stand-in of ours."""

    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("multiarray", "_reconstruct"): lambda *_: _Array(),
        ("multiarray", "scalar"): lambda dtype, content: _array(content, dtype, (), "C")[()],
        ("numeric", "_frombuffer"): _array,
        ("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): lambda text, _codec: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        place = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (place, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is code, not data")
        return self.known[place, name]


def _unpickle(file: BinaryIO, path: Path) -> Any:
    try:
        return _settle(_Unpickler(file).load())
    except Exception as error:  # a hostile pickle can fail in any way; the answer is the same
        raise EventError(f"{path} was refused: its pickle is not a plain dict of arrays ({error}); "
                         "nothing in it was run") from error


def _settle(value: Any) -> Any:
    """Replace the stand-ins by their arrays."""
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        return _settle(value.reshape(-1)[0])
    if isinstance(value, dict):
        return {key: _settle(item) for key, item in value.items()}
    return value
