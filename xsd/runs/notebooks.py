"""Notebooks without a screen: run one with checked parameters, or a grid of them that resumes and
survives a failing cell.

A run leaves ``<stem>.ipynb`` (executed), ``<stem>.provenance.json`` and whatever the notebook
itself writes. Failed runs keep the executed copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xsd.core import ROOT, ParameterError, StorageError, XsdError
from xsd.files import atomic_write, provenance, write_json
from xsd.runs import parameters, typed

NOTEBOOK_FOLDER = ROOT / "notebooks"
QUIET = {
    "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0",
}
"""Environment of an executed notebook: no bars and no network, so that outputs depend on parameters
alone."""


class NotebookError(XsdError):
    """A cell of an executed notebook failed; the executed copy is kept."""


def find(notebook: str | os.PathLike[str]) -> Path:
    """A notebook by path, file stem or number.

    Raises: ParameterError when there is none of that name.
    """
    path = Path(notebook)
    if path.suffix == ".ipynb":
        if path.is_file():
            return path.resolve()
        raise ParameterError(
            f"there is no notebook at {path}; the project's own are in {NOTEBOOK_FOLDER.name}/")
    path = NOTEBOOK_FOLDER / f"{parameters.model_of(str(notebook)).notebook}.ipynb"
    if not path.is_file():
        raise ParameterError(
            f"the notebook {path.name} is missing from {NOTEBOOK_FOLDER}; restore it from the "
            "repository"
        )
    return path


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_notebook(notebook: str | os.PathLike[str], out_dir: str | os.PathLike[str],
                 params: Mapping[str, Any] | None = None, *,
                 model: type[typed.NotebookParameters] | None = None, name: str | None = None,
                 progress: bool = False,
                 ) -> Path:
    """Execute a notebook with ``params`` over its defaults; cwd is the checkout. Returns the
    executed copy, ``out_dir/<name or stem>.ipynb``.

    model: the parameters' model, by default the one registered for the file's stem.
    Raises: ParameterError before anything runs; NotebookError naming notebook, cell and error, or
    that its kernel died or a cell took
    too long; StorageError when the disk refuses.
    """
    source, out_dir, given = find(notebook), Path(out_dir).resolve(), dict(params or {})
    checked = (model or parameters.model_of(source.stem)).checked(given)
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the folder {out_dir} cannot be made ({error.strerror or error}); choose another one"
        ) from error
    target = out_dir / f"{name or source.stem}.ipynb"
    began, failed = time.perf_counter(), None
    with _environment({**QUIET, "XSD_NOTEBOOK": source.name}):
        try:
            papermill.execute_notebook(str(source), str(target), parameters=given,
                                       kernel_name="python3", language="python", cwd=str(ROOT),
                                       progress_bar=progress, log_output=False,
                                       )
        except PapermillExecutionError as error:
            failed = error
        except (DeadKernelError, CellTimeoutError) as error:
            stopped = "its kernel died (often: not enough memory)" if isinstance(
                error, DeadKernelError) else "a cell took too long"
            raise NotebookError(
                f"notebook {source.name} stopped: {stopped}: {_first_line(str(error))}") from error
        except OSError as error:
            raise StorageError(
                f"notebook {source.name} could not be run into {out_dir} "
                f"({error.strerror or error}); free space or choose another folder"
            ) from error
    strip_widgets(target)
    record = provenance(seed=checked.seed, notebook=source.name,
                        notebook_sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
                        parameters=checked.model_dump(),
                        seconds=round(time.perf_counter() - began,
                                      2), status="failed" if failed else "finished",
                        )
    write_json(target.with_suffix(".provenance.json"), record)
    if failed:
        raise NotebookError(
            f"notebook {source.name} stopped in code cell [{failed.exec_count}]: {failed.ename}: "
            f"{_first_line(failed.evalue)}; "
            f"the executed copy is {target}")
    return target


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def strip_widgets(path: str | os.PathLike[str]) -> None:
    """Remove stored widget state: each FigureWidget would leave 5 MB of plotly.js in the file's
    metadata."""
    import nbformat

    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)
    atomic_write(path, nbformat.writes(notebook) + "\n")


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, in the order given: ``{"seed": [0, 1], "levels": [["L1"]]}`` → two dicts.
    Raises: ParameterError for an empty axis."""
    for name, values in grid.items():
        if not len(values):
            raise ParameterError(f"the grid gives no value for {name!r}; write {name}=a,b")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def point_name(point: Mapping[str, Any]) -> str:
    """A folder name for one combination: readable, and distinct by a hash of all values."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
    text = "_".join(f"{name}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
                    for name, value in point.items())
    return "".join(sign if sign.isalnum() or sign in "=+-_." else "-"
                   for sign in text)[:80] + f"_{digest}"


def _shown(path: Path) -> str:
    """A folder as parameters give it: relative inside the checkout, where notebooks run."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def sweep(notebook: str | os.PathLike[str], grid: Mapping[str, Sequence[Any]],
          out_dir: str | os.PathLike[str], *, fixed: Mapping[str, Any] | None = None,
          model: type[typed.NotebookParameters] | None = None, say: Any = print,
          ) -> list[dict[str, Any]]:
    """Run every combination of ``grid``; finished ones are skipped, a failing one is recorded and
    the rest goes on.

    Each combination has a folder under ``out_dir``, and its ``run_dir`` is ``run`` in there unless
    ``fixed`` or the grid gives one. Writes ``sweep.json``, a row a combination: name, parameters,
    status (finished | failed), error, seconds.
    Raises: ParameterError, before anything runs, if any combination is not valid or the notebook
    changed since the sweep began.
    """
    source, out_dir = find(notebook), Path(out_dir).resolve()
    model = model or parameters.model_of(source.stem)
    points = grid_points(grid)
    for point in points:
        model.checked({**(fixed or {}), **point})
    identity = {
        "notebook": source.name, "notebook_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "fixed": dict(fixed or {})
    }
    record_path = out_dir / "sweep.json"
    before: dict[str, dict[str, Any]] = {}
    if record_path.is_file():
        stored = json.loads(record_path.read_text())
        if {name: stored.get(name) for name in identity} != json.loads(json.dumps(identity)):
            raise ParameterError(
                f"{out_dir} holds a sweep of another notebook version or other fixed parameters; "
                "choose another folder or remove it"
            )
        before = {row["name"]: row for row in stored["runs"]}
    rows: list[dict[str, Any]] = []
    for number, point in enumerate(points, 1):
        name = point_name(point)
        if before.get(name, {}).get("status") == "finished" and (out_dir / name /
                                                                 f"{source.stem}.ipynb").is_file():
            rows.append(before[name])
            say(f"[{number}/{len(points)}] {name}: already finished")
            continue
        began, row = time.perf_counter(), {
            "name": name, "parameters": point, "status": "finished", "error": None
        }
        try:
            own = {"run_dir": _shown(out_dir / name /
                                     "run")} if "run_dir" in model.model_fields else {}
            run_notebook(source, out_dir / name, {**own, **(fixed or {}), **point}, model=model)
        except (NotebookError, StorageError) as error:
            row |= {"status": "failed", "error": str(error)}
        row["seconds"] = round(time.perf_counter() - began, 2)
        rows.append(row)
        rest = [before[other] for other in map(point_name, points[number:]) if other in before]
        write_json(record_path, {**identity, "runs": rows + rest})
        say(f"[{number}/{len(points)}] {name}: {row['status']} in {row['seconds']:.0f} s" +
            (f": {row['error']}" if row["error"] else ""))
    write_json(record_path, {**identity, "runs": rows})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a sweep as aligned text for a terminal."""
    import pandas as pd

    lines = [{name: "+".join(map(str, value)) if isinstance(value, list) else value
              for name, value in row["parameters"].items()} |
             {"status": row["status"], "seconds": row["seconds"]} for row in rows]
    return pd.DataFrame(lines).to_string(index=False)
