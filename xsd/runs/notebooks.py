"""Notebooks without a screen: run one with checked parameters, or a grid of them that resumes and
survives a failing cell. A run, also a failed one, leaves ``<stem>.ipynb`` (executed) and
``<stem>.provenance.json``."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from xsd.core import ROOT, ParameterError, StorageError, XsdError
from xsd.files import provenance, sha256_of, write_json
from xsd.runs import folder, parameters, typed

NOTEBOOK_FOLDER = ROOT / "notebooks"
QUIET = {
    "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0",
}
"""Environment of an executed notebook: no bars, no network; outputs depend on parameters alone."""


class NotebookError(XsdError):
    """A cell of an executed notebook failed; the executed copy is kept."""


def find(notebook: str | os.PathLike[str]) -> Path:
    """A notebook by path, file stem or number. Raises: ParameterError when there is none."""
    path = Path(notebook)
    if path.suffix == ".ipynb":
        if path.is_file():
            return path.resolve()
        raise ParameterError(
            f"there is no notebook at {path}; the project's own are in {NOTEBOOK_FOLDER.name}/")
    path = NOTEBOOK_FOLDER / f"{parameters.model_of(str(notebook)).notebook}.ipynb"
    if not path.is_file():
        raise ParameterError(f"the notebook {path.name} is missing from {NOTEBOOK_FOLDER}; restore "
                             "it from the repository")
    return path


def run_notebook(notebook: str | os.PathLike[str], out_dir: str | os.PathLike[str],
                 params: Mapping[str, Any] | None = None, *,
                 model: type[typed.NotebookParameters] | None = None) -> Path:
    """Execute a notebook with ``params`` over its defaults, in the checkout. Returns the executed
    copy, ``out_dir/<stem>.ipynb``. model: of the parameters; by default the stem's.

    Raises: ParameterError before anything runs; NotebookError naming notebook, cell and error, or
    that its kernel died or a cell took too long; StorageError when the disk refuses.
    """
    source, out_dir, given = find(notebook), Path(out_dir).resolve(), dict(params or {})
    checked = (model or parameters.model_of(source.stem)).checked(given)
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = out_dir / source.name
    began, failed = time.perf_counter(), None
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        known = {"XSD_NOTEBOOK": source.name, "XSD_STARTED_IN": os.getcwd()}
        with mock.patch.dict(os.environ, {**QUIET, **known}):
            papermill.execute_notebook(str(source), str(target), parameters=given,
                                       kernel_name="python3", language="python", cwd=str(ROOT),
                                       progress_bar=False, log_output=False,
                                       # each FigureWidget's state holds 5 MB of plotly.js
                                       store_widget_state=False)
    except PapermillExecutionError as error:
        failed = error
    except (DeadKernelError, CellTimeoutError) as error:
        stopped = ("a cell took too long" if isinstance(error, CellTimeoutError) else
                   "its kernel died (often: not enough memory)")
        raise NotebookError(
            f"notebook {source.name} stopped: {stopped}: {_first_line(str(error))}") from error
    except OSError as error:
        raise StorageError(
            f"notebook {source.name} could not be run into {out_dir} ({error.strerror or error}); "
            "free space or choose another folder") from error
    record = provenance(seed=checked.seed, notebook=source.name, notebook_sha256=sha256_of(source),
                        parameters=checked.model_dump(),
                        seconds=round(time.perf_counter() - began, 2),
                        status="failed" if failed else "finished")
    write_json(target.with_suffix(".provenance.json"), record)
    if failed:
        raise NotebookError(
            f"notebook {source.name} stopped in code cell [{failed.exec_count}]: {failed.ename}: "
            f"{_first_line(failed.evalue)}; the executed copy is {target}")
    return target


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination: ``{"seed": [0, 1], "levels": [["L1"]]}`` → two dicts. Raises:
    ParameterError for an empty axis."""
    for name, values in grid.items():
        if not len(values):
            raise ParameterError(f"the grid gives no value for {name!r}; write {name}=a,b")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def point_name(point: Mapping[str, Any]) -> str:
    """A folder name for one combination: readable, and distinct by a hash."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
    text = "_".join(f"{name}={_text(value)}" for name, value in point.items())
    return re.sub(r"[^\w=+.-]", "-", text)[:80] + f"_{digest}"


def sweep(notebook: str | os.PathLike[str], grid: Mapping[str, Sequence[Any]],
          out_dir: str | os.PathLike[str], *, fixed: Mapping[str, Any] | None = None,
          model: type[typed.NotebookParameters] | None = None,
          say: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """Run every combination of ``grid``, each in a folder of its own; finished ones are skipped, a
    failing one is recorded and the rest goes on.

    Returns, and writes to ``sweep.json``: name, parameters, status (finished | failed), error and
    seconds of each. Raises: ParameterError, before anything runs, if a combination is not valid or
    the notebook changed since the sweep began.
    """
    source, out_dir, fixed = find(notebook), Path(out_dir).resolve(), dict(fixed or {})
    model = model or parameters.model_of(source.stem)
    points = {point_name(point): point for point in grid_points(grid)}
    for point in points.values():
        model.checked({**fixed, **point})
    record = out_dir / "sweep.json"
    identity = {"notebook": source.name, "notebook_sha256": sha256_of(source), "fixed": fixed}
    rows = _rows_before(record, json.loads(json.dumps(identity)))
    for number, (name, point) in enumerate(points.items(), 1):
        where = f"[{number}/{len(points)}] {name}"
        if (rows.get(name, {}).get("status") == "finished"
                and (out_dir / name / source.name).is_file()):
            say(f"{where}: already finished")
            continue
        began, error = time.perf_counter(), None
        given = {"run_dir": folder.shown(out_dir / name / "run"), **fixed, **point}
        try:
            run_notebook(source, out_dir / name, given, model=model)
        except (NotebookError, StorageError) as failure:
            error = str(failure)
        rows[name] = {"name": name, "parameters": point,
                      "status": "failed" if error else "finished", "error": error,
                      "seconds": round(time.perf_counter() - began, 2)}
        write_json(record, {**identity, "runs": list(rows.values())})
        say(f"{where}: {rows[name]['status']} in {rows[name]['seconds']:.0f} s" +
            (f": {error}" if error else ""))
    return [rows[name] for name in points]


def _rows_before(record: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier call by name. Raises: ParameterError when it was another sweep."""
    if not record.is_file():
        return {}
    stored = json.loads(record.read_text(encoding="utf-8"))
    if {name: stored.get(name) for name in identity} != identity:
        raise ParameterError(
            f"{record.parent} holds a sweep of another notebook version or other fixed "
            "parameters; choose another folder or remove it")
    return {row["name"]: row for row in stored["runs"]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a sweep as aligned text for a terminal."""
    import pandas as pd

    return pd.DataFrame([{**{name: _text(value) for name, value in row["parameters"].items()},
                          "status": row["status"], "seconds": row["seconds"]}
                         for row in rows]).to_string(index=False)
