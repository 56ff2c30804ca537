"""The one form in which a notebook is committed, and what nbval can compare: refresh executes and
normalises, problems says what is wrong.

Cells are tagged ``nbval-ignore-output`` where a picture, a widget or a time is shown; of their
outputs only pictures are kept, as small PNGs. Every other cell with an output is *golden*: nbval
compares it.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat

from tools import pictures
from xsd.core import ParameterError, XsdError
from xsd.files import atomic_write
from xsd.runs import folder, notebooks, parameters

IGNORED = frozenset({"nbval-ignore-output", "nbval-skip"})
COMPARABLE = frozenset({"text/plain", "text/markdown"})
PICTURE = {"image/png", "text/plain"}
MAX_BYTES = 200_000
PICTURE_BYTES = 150_000
"""Of a notebook's pictures together."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def _ignored(cell: nbformat.NotebookNode) -> bool:
    return bool(IGNORED & set(cell.metadata.get("tags", [])))


def normalised(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy with plain metadata, only tags on cells, execution counts in order; in ignored cells
    only stored pictures (without any, a null count: run, not compared)."""
    clean = nbformat.from_dict(notebook)
    clean.metadata = nbformat.from_dict(METADATA)
    clean.nbformat, clean.nbformat_minor = 4, 5
    count = 0
    for index, cell in enumerate(clean.cells):
        tags = list(cell.metadata.get("tags", []))
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell["id"] = f"cell-{index:02d}"
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        if _ignored(cell):
            cell.outputs = [one for one in cell.outputs if set(one.get("data", ())) == PICTURE]
            cell.execution_count = count if cell.outputs else None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if output.get("metadata"):
                output.metadata = nbformat.from_dict({})
    return clean


def text_of(notebook: nbformat.NotebookNode) -> str:
    """The bytes a normalised notebook has on disk."""
    return nbformat.writes(normalised(notebook)) + "\n"


def refresh(path: str | os.PathLike[str], *, timeout_s: int = 900, say: Any = print) -> None:
    """Execute in the notebook's folder, with default parameters and a quiet environment, and store
    the normalised result with its pictures.

    Raises: notebooks.NotebookError when a cell fails; the file is then left as it was.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    path = Path(path)
    notebook = nbformat.read(path, 4)
    before = _pictures_of(notebook)
    client = NotebookClient(notebook, timeout=timeout_s, kernel_name="python3", record_timing=False,
                            extra_arguments=["--log-level=CRITICAL"],  # as runs/notebooks.py
                            resources={"metadata": {"path": str(path.parent.resolve())}})
    try:
        client.execute(env={**os.environ, **notebooks.QUIET})
    except CellExecutionError as error:
        raise notebooks.NotebookError(
            f"notebook {path.name} does not run: {error.ename}: {error.evalue}; {path} was left as "
            "it was") from error
    _keep_pictures(notebook, before, say)
    atomic_write(path, text_of(notebook))


def normalise(path: str | os.PathLike[str], *, say: Any = print) -> None:
    """Store the normalised form, with the pictures of what was executed, without executing."""
    notebook = nbformat.read(path, 4)
    _keep_pictures(notebook, _pictures_of(notebook), say)
    atomic_write(path, text_of(notebook))


def _pictures_of(notebook: nbformat.NotebookNode) -> dict[str, list[Any]]:
    """The stored pictures by their cell's code."""
    return {cell.source: found for cell in notebook.cells
            if (found := [one for one in cell.get("outputs", ())
                          if set(one.get("data", ())) == PICTURE])}


def _keep_pictures(notebook: nbformat.NotebookNode, before: Mapping[str, list[Any]],
                   say: Any) -> None:
    """Put small PNGs in place of the figures of ignored cells, as many as fit into the file; where
    none can be drawn, those of before stay."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and _ignored(cell)]
    try:
        drawn = pictures.to_png([cell.outputs for cell in cells])
    except (RuntimeError, OSError, ValueError) as error:
        say(f"the browser drew no picture ({type(error).__name__}: {str(error)[:120]})")
        drawn = [[] for _ in cells]
    room = PICTURE_BYTES
    for cell, new in zip(cells, drawn, strict=True):
        cell.outputs = []
        for output in new or before.get(cell.source, []):
            size = len(output.data["image/png"])
            if size <= room:
                cell.outputs.append(output)
                room -= size
    if room == PICTURE_BYTES:
        say("no picture is stored: figures need a Chromium (BROWSER_PATH names one)")


def parameters_cell(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Names and literal values of the one cell tagged ``parameters``.

    Raises: ParameterError when there is not exactly one such cell or it holds more than ``name:
    type = literal`` lines.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(
            f"a notebook has exactly one cell tagged 'parameters', this one has {len(cells)}")
    values = {}
    for line in ast.parse(cells[0].source).body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        if not isinstance(target, ast.Name) or line.value is None:
            raise ParameterError("the parameters cell holds only lines such as seed: int = 0, not "
                                 f"{ast.unparse(line)!r}")
        try:
            values[target.id] = ast.literal_eval(line.value)
        except ValueError:
            raise ParameterError(
                f"the parameters cell holds plain literals, not {ast.unparse(line)!r}") from None
    return values


def problems(path: str | os.PathLike[str]) -> list[str]:
    """What keeps a notebook from being committed, a sentence each; empty when clean."""
    path = Path(path)
    notebook = nbformat.read(path, 4)
    size = path.stat().st_size
    found = [f"is {size / 1000:.0f} kB, at most {MAX_BYTES / 1000:.0f} kB are allowed"
             ] * (size > MAX_BYTES)
    try:
        values = parameters_cell(notebook)
        model = parameters.model_of(path.stem)
        defaults = model.checked({}).model_dump()
        found += [f"parameter {name!r} is in only one of the parameters cell and {model.__name__}"
                  for name in sorted(set(values) ^ set(defaults))]
        found += [f"parameter {name!r} is {values[name]!r} in the cell but {defaults[name]!r} in "
                  f"{model.__name__}" for name in sorted(set(values) & set(defaults))
                  if values[name] != defaults[name]]
    except (ParameterError, SyntaxError) as error:
        found.append(str(error))
    golden = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.get("outputs")
              and not _ignored(cell)]
    if not any(cell.execution_count for cell in golden):
        found.append("has no compared cell, so nbval would check nothing")
    for cell in golden:
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {cell.id} stores an error or stderr")
            if rich := sorted(set(output.get("data", {})) - COMPARABLE):
                found.append(f"cell {cell.id} stores {', '.join(rich)}; tag it nbval-ignore-output")
    if not _pictures_of(notebook):
        found.append("stores no picture for GitHub to show; run xsd notebooks refresh where a "
                     "Chromium is installed")
    if text_of(notebook) != path.read_text(encoding="utf-8"):
        found.append("is not in its committed form; run xsd notebooks refresh")
    return found


def committed() -> list[Path]:
    """The project's numbered notebooks, in order."""
    return sorted(notebooks.NOTEBOOK_FOLDER.glob("[0-9][0-9]_*.ipynb"))


def check(paths: Iterable[str | os.PathLike[str]] | None = None) -> None:
    """Raises: HygieneError listing every problem of every notebook."""
    lines = [f"{folder.shown(path)} {problem}" for path in map(Path, paths or committed())
             for problem in problems(path)]
    if lines:
        raise HygieneError("; ".join(lines))


class HygieneError(XsdError):
    """A committed notebook is not in the form that git and nbval need."""
