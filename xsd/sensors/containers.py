"""Files of arrays that somebody else wrote (.npy, .npz, .h5), opened without trust: nothing in them
is run, no other file is read through them, and their size is known before memory is taken
(docs/sensors.md, section 3)."""

import io
import math
import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from xsd.core import EventError, reading

MOST_BYTES, MOST_TIMES = 4 << 30, 200
"""What a file may unpack to: so many bytes, and so many times its size (64 MB always)."""


def check_size(path: Path, n_bytes: int) -> None:
    """Raises: EventError where a file says that it unpacks to more than a sensor's file does."""
    if n_bytes > min(MOST_BYTES, (64 << 20) + MOST_TIMES * path.stat().st_size):
        raise EventError(
            f"{path} ({path.stat().st_size} bytes) says that it holds {n_bytes / 1e9:.2f} GB; at "
            f"most {MOST_TIMES} times its size and {MOST_BYTES >> 30} GB are read: cut it")


def read_npy(path: Path, wanted: Collection[str]) -> Any:
    """The array of a ``.npy``; of a pickled dict the wanted arrays, and the names of its others
    with None. Raises: EventError; ValueError."""
    with open(path, "rb") as file:
        if not _shape_and_dtype(file)[1].hasobject:
            return _array_of(file, path.stat().st_size)
        data = file.read()
    with reading(f"{path} was refused: its pickle is not a plain dict of arrays", EventError,
                 "nothing in it was run"):
        content = _Unpickler(io.BytesIO(data)).load()
        for _ in range(3):  # an array of an array of a dict, at most
            content = content.built() if isinstance(content, _Array) else content
        if not isinstance(content, dict):
            raise EventError(f"{path} holds a pickled {type(content).__name__}; expected a dict "
                             "with x, y, t, p")
        return {key: value.built() if isinstance(value, _Array) and key in wanted else
                value if isinstance(value, (int, float)) else None
                for key, value in content.items()}


def read_npz(path: Path, wanted: Collection[str]) -> dict[str, Any]:
    """As :func:`read_npy` of a dict. Raises: EventError; ValueError; BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        members = {one.filename.removesuffix(".npy"): one for one in archive.infolist()}
        found = [name for name in members if name in wanted]
        check_size(path, sum(members[name].file_size for name in found))
        arrays: dict[str, Any] = dict.fromkeys(members)
        for name in found:
            content = archive.read(members[name])
            arrays[name] = _array_of(io.BytesIO(content), len(content))
    return arrays


def _shape_and_dtype(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    layout = np.lib.format
    old = layout.read_magic(file) == (1, 0)
    shape, _, dtype = (layout.read_array_header_1_0 if old else layout.read_array_header_2_0)(file)
    return shape, dtype


def _array_of(file: BinaryIO, n_bytes: int) -> np.ndarray:
    file.seek(0)
    shape, dtype = _shape_and_dtype(file)
    if math.prod(shape) * max(1, dtype.itemsize) > n_bytes:
        raise ValueError(f"it declares {dtype} of shape {shape} but holds {n_bytes} bytes")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def open_h5(path: Path, mode: str = "r") -> Any:
    """An HDF5 file, a context manager. Raises: EventError without the packages; as h5py."""
    with reading(f"{path}: reading it needs the packages h5py and hdf5plugin", EventError,
                 "pip install h5py hdf5plugin"):
        import h5py
        import hdf5plugin  # noqa: F401  registers DSEC's blosc filter
    return h5py.File(path, mode)


def h5_node(file: Any, name: str) -> Any:
    """The group or dataset of that name, None where there is none. Raises: EventError for one that
    stands elsewhere: behind a link, in another file, put together of others."""
    node = file
    for part in filter(None, name.split("/")):
        links = getattr(node.id, "links", None)  # asked by name, a link's target would be opened
        if links is None or not links.exists(part.encode()):
            return None
        if links.get_info(part.encode()).type != 0:  # H5L_TYPE_HARD
            raise EventError(f"{file.filename}: {name} is a link to elsewhere, not data; copy what "
                             "it leads to into the file")
        node = node[part]
    if hasattr(node, "dtype"):
        if node.external or node.is_virtual:
            raise EventError(f"{file.filename}: {name} keeps its data outside of the file; copy it "
                             "into the file (h5repack does)")
        if node.dtype.hasobject or math.prod(node.chunks or ()) * node.dtype.itemsize > 1 << 28:
            raise EventError(f"{file.filename}: {name} ({node.dtype}, chunks {node.chunks}) is no "
                             "column of numbers")
    return node


def h5_part(file: Any, node: Any, part: slice = slice(None)) -> np.ndarray:
    """Rows of a dataset that :func:`h5_node` found. Raises: EventError where they are too many."""
    length = len(range(*part.indices(node.shape[0]))) if node.shape else 1
    columns = 1 if node.dtype.names or len(node.shape) > 1 else 4  # three more come with it
    check_size(Path(file.filename),
               columns * length * math.prod(node.shape[1:]) * node.dtype.itemsize)
    return node[part] if node.shape else np.asarray(node[()])


def h5_number(file: Any, name: str) -> int:
    """A dataset of one whole number, in whatever shape. Raises: EventError for any other."""
    node = h5_node(file, name)
    if node is None or not hasattr(node, "dtype") or node.size != 1 or node.dtype.kind not in "iu":
        raise EventError(f"{file.filename}: {name} is not one whole number; write it again")
    return int(np.asarray(node[()]).reshape(-1)[0])


class _Dtype:
    """Stands in for numpy.dtype: a kind and a size, nothing that could reach memory."""

    known = ("b1", "O8", "O", *(kind + size for kind in "iuf" for size in "1248"))

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or code not in self.known:
            raise pickle.UnpicklingError("an array is of a type that events do not have")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError("an array is in no known byte order")
        self.order = state[1]

    def plain(self) -> np.dtype:
        if self.code.startswith("O"):
            return np.dtype(object)
        return np.dtype(self.order.replace("|", "=") + self.code)


class _Array:
    """Stands in for an array. Nothing is built before it is asked for, without a copy: a pickle may
    name the same bytes a million times."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, _fortran, content = state
        self.given = content, dtype, shape

    def built(self) -> Any:
        content, dtype, shape = self.given
        plain = dtype.plain()
        if len(shape) > 1:
            raise pickle.UnpicklingError("an array has more than one axis")
        if plain.hasobject:  # numpy keeps a dict as the one object of an array
            if not isinstance(content, list) or len(content) != 1:
                raise pickle.UnpicklingError("an object array does not hold one object")
            return content[0]
        content = content.encode("latin1") if isinstance(content, str) else content
        array = np.frombuffer(content, plain).reshape(shape)
        return array.astype(plain.newbyteorder("="), copy=False)


class _Unpickler(pickle._Unpickler):  # C's one takes memory for any index of its memo
    """Only numpy's names for rebuilding arrays are known, each answered by a stand-in of ours. Keys
    are texts, since others can take forever to hash."""

    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("multiarray", "_reconstruct"): lambda *_: _Array(),
        ("multiarray", "scalar"): lambda dtype, content: _Array(content, dtype, ()),
        ("numeric", "_frombuffer"): lambda content, dtype, shape, *_: _Array(content, dtype, shape),
        ("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): lambda text, _codec: text,
    }

    def find_class(self, module: str, name: str) -> Any:
        place = module.removeprefix("numpy._core.").removeprefix("numpy.core.")
        if (place, name) not in self.known:
            raise pickle.UnpicklingError(
                f"it asks for {module[:80]}.{name[:80]}, which is code, not data")
        return self.known[place, name]

    def _with_texts(self) -> None:
        keys = self.stack[::2]  # since the mark
        if not all(isinstance(key, str) for key in keys):
            raise pickle.UnpicklingError("a key is not a text")
        self.load_setitems()

    def _of_stand_in(self) -> None:
        if not isinstance(self.stack[-2], (_Array, _Dtype)):
            raise pickle.UnpicklingError("it changes what it has no business with")
        self.load_build()

    def _within_the_file(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _refused(self) -> None:
        raise pickle.UnpicklingError("it holds what a dict of arrays does not")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEMS[0]: _with_texts, pickle.BUILD[0]: _of_stand_in,
        pickle.BYTEARRAY8[0]: _within_the_file,
        **dict.fromkeys(b"sd\x90\x91io\x81\x92", _refused)}  # sets, single items, other objects
