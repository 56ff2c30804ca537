"""Notebooks without a screen. A run, also a failed one, leaves ``<stem>.ipynb`` (executed) and
``<stem>.provenance.json``."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from xsd.core import ROOT, ParameterError, StorageError, XsdError
from xsd.files import provenance, sha256_of, write_json
from xsd.runs import parameters, typed

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

    # It reads no annotation such as ``int | None`` and warns of them; ours are checked above.
    logging.getLogger("papermill").setLevel(logging.ERROR)
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
