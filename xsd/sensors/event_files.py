"""The columns of an event file of any kind (docs/sensors.md, section 3)."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xsd.core import EventError, reading
from xsd.sensors import containers, names

Columns = Mapping[str, Any]
DSEC_SENSOR = {"width": 640, "height": 480}
SPELLINGS = {"x": ("x", "xs"), "y": ("y", "ys"), "t": ("t", "ts", "t_us", "timestamp",
             "timestamps"), "p": ("p", "ps", "on", "polarity")}
_CHANGES = {"unit", "units", "scale_factor", "add_offset", "_fillvalue"}
"""Attributes of an HDF5 column after which its numbers mean others."""
_WANTED = {name for names in SPELLINGS.values() for name in names} | {"width", "height"}


def read_columns(path: Path) -> dict[str, Any]:
    """The arrays of an event file by its own names, and width and height where it says; of .aedat4
    its pictures, too. Raises: EventError when it is missing, of another type, or unreadable."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise EventError(f"{path}: event files of type {path.suffix or '(none)'} are not read "
                         f"here; expected one of {', '.join(sorted(_READERS))}")
    names.check_plain(path, EventError, "event file")
    with reading(f"{path} could not be read as events", EventError,
                 "the file is damaged or of another kind"):
        return dict(reader(path))


def _read_npy(path: Path) -> Columns:
    content = containers.read_npy(path, _WANTED)
    if isinstance(content, dict):
        return content
    if content.dtype.names is None:
        raise EventError(f"{path} holds a plain array of shape {content.shape}; expected a dict or "
                         "a structured array with x, y, t, p")
    return {name: content[name] for name in content.dtype.names}


def _read_text(path: Path) -> Columns:
    """v2e's text: lines of t x y p, t in seconds, ``#`` before remarks."""
    containers.check_size(path, 8 * path.stat().st_size)
    with reading(f"{path} is no text of events", EventError,
                 "expected lines of t x y p: seconds, two pixels, polarity"):
        rows = np.loadtxt(path, np.float64, ndmin=2, encoding="utf-8-sig")
    if rows.shape[1] != 4 or (len(rows) and (rows[:, 0] % 1 == 0).all()):
        raise EventError(f"{path}: expected lines of t x y p with t in seconds, such as 0.000190 "
                         "307 8 0; other texts are not read, save .npz with x, y, t, p")
    return dict(zip("txyp", (np.rint(1e6 * rows[:, 0]), *rows[:, 1:].T), strict=True))


def _read_h5(path: Path) -> Columns:
    with containers.open_h5(path) as file:
        streams = [columns for name in ("events", "CD/events", "")
                   if (columns := _stream(file, name))]
        if len(streams) != 1:
            there = [*file, *(f"{name}/{child}" for name in ("events", "CD") for node in
                              [containers.h5_node(file, name)] if hasattr(node, "keys")
                              for child in node)]
            raise EventError(f"{path} holds {len(streams)} streams with x, y, t and p (found: "
                             f"{', '.join(there)[:200] or 'nothing'}); expected events/x, y, t, p "
                             "as DSEC has them, or CD/events, else save .npz with x, y, t, p")
        columns = streams[0]
        if containers.h5_node(file, "t_offset") is not None:
            columns["t_offset"] = containers.h5_number(file, "t_offset")
        # DSEC's sensor, unless the events themselves say that it is a larger one
        fits = all(columns[axis].max(initial=0) < side for axis, side in (
            ("x", DSEC_SENSOR["width"]), ("y", DSEC_SENSOR["height"])) if axis in columns)
        known = fits and containers.h5_node(file, "ms_to_idx") is not None
        return columns | (DSEC_SENSOR if known else {})


def _stream(file: Any, name: str) -> dict[str, Any]:
    """The four columns under that name, as a group of datasets or one of records; else nothing."""
    node = containers.h5_node(file, name)
    fields = getattr(getattr(node, "dtype", None), "names", None) or (
        node if hasattr(node, "keys") else ())
    found = [field for field in fields if field in _WANTED]
    if not all(set(names) & set(found) for names in SPELLINGS.values()):
        return {}
    if hasattr(node, "dtype"):
        records = containers.h5_part(file, node)
        return {field: records[field] for field in found}
    nodes = {field: containers.h5_node(file, f"{name}/{field}") for field in found}
    for field, node in nodes.items():
        for key in sorted(_CHANGES & {one.lower() for one in node.attrs}):
            raise EventError(f"{file.filename}: {name}/{field} has an attribute {key!r}, and no "
                             "attribute is applied here; store x, y, p and t in microseconds as "
                             "they are, without it")
    return {field: containers.h5_part(file, node) for field, node in nodes.items()}


_DECODE_AEDAT4 = """
import contextlib, resource, sys
with contextlib.suppress(OSError, ValueError):
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
import aedat, numpy as np
decoder = aedat.Decoder(sys.argv[1])
streams = [one for one in decoder.id_to_stream().values() if one["type"] == "events"]
packets = list(decoder)
events = [one["events"] for one in packets if "events" in one]
shots = [one["frame"] for one in packets if "frame" in one]
found = {"streams": len(streams), "frames": np.stack([one["pixels"] for one in shots] or [[]]),
         "times": [one["t"] for one in shots], "formats": [one["format"] for one in shots]}
if events:
    found["events"] = np.concatenate(events)
if streams:
    found |= {name: streams[0][name] for name in ("width", "height")}
np.savez(sys.argv[2], **found)
"""


def _read_aedat4(path: Path) -> Columns:
    """In a process of its own: on damaged files the decoder panics, or takes all the memory."""
    with reading(f"{path}: reading it needs the package aedat", EventError, "pip install aedat"):
        import aedat  # noqa: F401
    with tempfile.TemporaryDirectory() as place:
        arguments = [str(path.resolve()), f"{place}/a.npz"]
        done = subprocess.run([sys.executable, "-P", "-c", _DECODE_AEDAT4, *arguments], text=True,
                              capture_output=True, check=False, timeout=600)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it was ended"])[-1]
            raise ValueError(said.split(": ", 1)[-1])
        with np.load(f"{place}/a.npz", allow_pickle=False) as archive:
            found = dict(archive)
    if found["streams"] != 1:
        raise EventError(f"{path} holds {found['streams']} event streams; one is read")
    if "events" not in found:
        raise EventError(f"{path} is empty: its event stream holds no packet")
    events = found.pop("events")
    return {name: events[name] for name in ("x", "y", "t", "on")} | {
        name: found[name] for name in ("width", "height", "frames", "times", "formats")}


_READERS = {".npy": _read_npy, ".npz": lambda path: containers.read_npz(path, _WANTED),
            ".txt": _read_text, ".aedat4": _read_aedat4, ".h5": _read_h5, ".hdf5": _read_h5}
SUFFIXES = tuple(_READERS)
