"""Notebooks without a screen. A run, also a failed one, leaves ``<stem>.ipynb`` (executed) and
``<stem>.provenance.json``."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from xsd import digests, files
from xsd.core import ROOT, ParameterError, XsdError
from xsd.runs import folder, parameters, typed

NOTEBOOK_FOLDER = ROOT / "notebooks"
QUIET = {
    "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
"""Environment of an executed notebook: no bars, no network, nothing about a debugger; outputs
depend on parameters alone."""
KERNELS = "xsd-kernel-"


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


def read(path: str | os.PathLike[str]) -> Any:
    """A notebook file as nbformat has it; nothing of it runs. Raises: ParameterError when it is no
    notebook of Python that JupyterLab would open."""
    import nbformat

    def refused(why: str) -> ParameterError:
        return ParameterError(f"{path} {why}; give a notebook that JupyterLab has saved")

    stored = files.read_json(path, ParameterError, "give a notebook that JupyterLab has saved")
    known = stored if isinstance(stored, dict) else {}
    if known.get("nbformat") != 4:
        raise refused("is no notebook of format 4 (its nbformat is "
                      f"{typed.shortened(known.get('nbformat'))})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without ids, or with the same, are given some
            nbformat.validate(stored, relax_add_props=True)
            notebook = nbformat.reads(Path(path).read_text(encoding="utf-8-sig"), 4)
        nbformat.writes(notebook).encode()
    except (nbformat.ValidationError, RecursionError, LookupError, TypeError, AttributeError,
            ValueError) as error:
        raise refused(f"is a damaged notebook ({_first_line(str(error))[:120]})") from error
    about = notebook.metadata
    language = about.get("language_info", {}).get("name") or about.get("kernelspec", {}).get(
        "language", "python")
    if language not in ("python", "ipython"):
        raise refused(f"is a notebook of {str(language)[:40]!r}, and these are run by Python")
    if not all(isinstance(one.metadata.get("papermill", {}), dict)
               for one in (notebook, *notebook.cells)):
        raise refused("is a damaged notebook (what papermill noted in it is no mapping)")
    return notebook


def run_notebook(notebook: str | os.PathLike[str], out_dir: str | os.PathLike[str],
                 params: Mapping[str, Any] | None = None, *,
                 model: type[typed.NotebookParameters] | None = None) -> Path:
    """Execute a notebook with ``params`` over its defaults, in the checkout. Returns the executed
    copy, ``out_dir/<stem>.ipynb``, which takes the place of an earlier one when it is whole.
    model: of the parameters; by default the stem's.

    Raises: ParameterError before anything runs; NotebookError naming notebook, cell and error, or
    that its kernel died or a cell took too long; StorageError when the disk refuses, or the same
    notebook is at work on this folder or run.
    """
    source, out_dir, given = find(notebook), Path(out_dir).resolve(), dict(params or {})
    checked = (model or parameters.model_of(source.stem)).checked(given)
    book = read(source)
    tags = [cell.metadata.get("tags", ()) for cell in book.cells]
    if given and not any("parameters" in some for some in tags):
        raise ParameterError(f"{source} has no cell tagged 'parameters', so that none can be given "
                             "to it; tag the cell that sets them")
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = out_dir / source.name
    began, failed, cause = time.perf_counter(), "", None
    with _alone(source.stem, out_dir, folder.resolve(checked.run_dir)), _kernel_folder() as kernel:
        known = {"XSD_NOTEBOOK": source.name, "XSD_STARTED_IN": os.getcwd(),
                 "JUPYTER_RUNTIME_DIR": str(kernel)}
        with (mock.patch.dict(os.environ, {**QUIET, **known}),
              digests.sealed_path(target) as written):
            try:
                _execute(book, kernel / source.name, written, given)
            except PapermillExecutionError as error:
                failed, cause = (f" in code cell [{error.exec_count}]: {error.ename}: "
                                 f"{_first_line(error.evalue)}"), error
            except CellTimeoutError as error:
                failed, cause = f": a cell took too long: {_first_line(str(error))}", error
            except (DeadKernelError, RuntimeError) as error:  # the latter before it is ready
                failed, cause = (": its kernel died (often: not enough memory): "
                                 f"{_first_line(str(error))}"), error
            record = files.provenance(
                seed=checked.seed, **_identity(source, checked),
                parameters=checked.as_used().model_dump(), copy_sha256=files.sha256_of(written),
                seconds=round(time.perf_counter() - began, 2),
                status="failed" if failed else "finished")
            # before the copy has its name: a kill in between leaves no copy without its record
            digests.write_sealed(target.with_suffix(".provenance.json"), record)
    if failed:
        raise NotebookError(f"notebook {source.name} stopped{failed}; the executed copy is "
                            f"{target}") from cause
    return target


def _identity(source: Path, checked: typed.NotebookParameters) -> dict[str, str]:
    """What a run is known by, besides the revision."""
    given = checked.as_used().model_dump_json().encode()
    return {"notebook": source.name, "notebook_sha256": files.sha256_of(source),
            "parameters_sha256": hashlib.sha256(given).hexdigest()}


def ended(source: Path, out_dir: Path, checked: typed.NotebookParameters,
          **same: Any) -> float | None:
    """The seconds of the finished run with these parameters whose executed copy stands in
    ``out_dir``; None where there is none. same: what else its record has to say."""
    copy = out_dir / source.name
    with contextlib.suppress(XsdError, OSError, TypeError, KeyError):
        told = files.read_json(copy.with_suffix(".provenance.json"), NotebookError, "run it again")
        same |= {**_identity(source, checked), "status": "finished",
                 "copy_sha256": files.sha256_of(copy)}
        if {name: told[name] for name in same} == same:
            return float(told["seconds"])
    return None


def finished(notebook: str, out_dir: Path, params: Mapping[str, Any]) -> float | None:
    """The seconds of a run with these parameters that this very revision has finished there, its
    results in place; None where there is none, or the checkout holds changes."""
    source, checked = find(notebook), parameters.model_of(notebook).checked(params)
    results = folder.resolve(checked.run_dir) / "results" / f"{source.stem.partition('_')[2]}.json"
    now = files.provenance()
    if now["git_dirty"] or not results.is_file():
        return None
    return ended(source, out_dir, checked, git_dirty=False, git_revision=now["git_revision"])


def _execute(book: Any, copy: Path, written: Path, given: Mapping[str, Any]) -> None:
    """Run what was checked, from a copy of it, and no other content of the file."""
    import nbformat
    import papermill

    nbformat.write(book, copy)

    # It reads no annotation such as ``int | None`` and warns of them; ours are checked. What went
    # wrong, or was interrupted, is an error here and no line of a log.
    for name in ("papermill", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not end in one")  # written ends in .part
        papermill.execute_notebook(
            # it takes braces in a path for parameters
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (copy, written)),
            parameters=dict(given), kernel_name="python3", language="python", cwd=str(ROOT),
            progress_bar=False, log_output=False, start_timeout=300,  # s: a machine may be busy
            # what it logs when it is told to end is no error of the notebook's
            extra_arguments=["--log-level=CRITICAL"],
            # each FigureWidget's state holds 5 MB of plotly.js
            store_widget_state=False)


@contextlib.contextmanager
def _alone(stem: str, out_dir: Path, run_dir: Path) -> Iterator[None]:
    """One process runs this notebook into these folders; what a killed one left half-written there
    goes. A run that may only be read is not locked."""
    writable = {run_dir} if os.access(run_dir, os.W_OK) else set()
    with contextlib.ExitStack() as held:
        for place in {out_dir, *writable}:
            held.enter_context(files.FolderLock(place, f".{stem}.lock"))
        for place, name in ((out_dir, stem), *((one / part, stem.partition("_")[2]) for one in
                                               writable for part in ("", "results"))):
            files.remove_leftovers(place, f"{name}.")
        yield


@contextlib.contextmanager
def _kernel_folder() -> Iterator[Path]:
    """A folder for the file that says how to reach the kernel; those of killed runs go."""
    base = Path(tempfile.gettempdir())
    for left in base.glob(f"{KERNELS}*"):
        if files.lock_holder(left) is None:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
            prefix=KERNELS, ignore_cleanup_errors=True) as made, files.FolderLock(made):
        yield Path(made)


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
