"""``xsd sweep``: one notebook over a grid, resumable, several points at a time. Points share the
extraction and the trainings that they have in common; what they measured becomes one table."""

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd

from xsd import files, processes
from xsd.core import ParameterError, StorageError, XsdError
from xsd.evaluate import tables
from xsd.runs import folder, listing, notebooks, parameters, typed
from xsd.steps import ready, training

SHARES = ("02_train", "03_hidden", "04_tokens", "05_live", "13_truth")
"""Notebooks that begin with an extraction, and all but the first with trained adapters."""
UPSTREAM = ("seed", "data", "test_data", "pair", "device", "dtype", "quant")
"""What the extraction and the trainings depend on that such a notebook makes for itself."""
LINKED = ("data/*", "imported/*", "shards/*", "results/extract.json", "results/train.json")
METRICS = ("token_acceptance", "accepted_per_round", "cosine", "accept", "speedup")
TRAINED = ("validation_loss", "validation_token_acceptance", "epochs")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Task = tuple[Path, Path, dict[str, Any], Any, Path | None, list[Any]]


def points_of(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination, ``{"seed": [0, 1], "levels": [["L1"]]}`` → two, by the name of its folder,
    readable and distinct by a hash. Raises: ParameterError for an empty axis."""
    if not grid:
        raise ParameterError("nothing is varied; name it: xsd sweep 04 gamma=3,5")
    for name, values in grid.items():
        if not len(values):
            raise ParameterError(f"the grid gives no value for {name!r}; write {name}=a,b")
    found = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        text = "_".join(f"{name}={listing.text(value)}" for name, value in point.items())
        found[re.sub(r"[^\w=+.-]", "-", text)[:80] + f"_{_digest(point)}"] = point
    return found


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def run(notebook: str | Path, grid: Mapping[str, Sequence[Any]], out_dir: str | Path, *,
        fixed: Mapping[str, Any] | None = None, model: type[typed.NotebookParameters] | None = None,
        jobs: int = 1, say: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """Run every combination of ``grid``, each in a folder of its own, ``jobs`` at a time; finished
    ones are skipped, a failing one is recorded and the rest goes on.

    What points of ``SHARES`` need is taken from the run that ``fixed`` or the grid names as
    run_dir, else made once in ``<out_dir>/shared``. Returns, and writes to ``sweep.json`` beside
    those of earlier calls: name, parameters, run_dir, status (finished | failed), error and seconds
    of each. Raises: ParameterError, before anything runs, if a combination is not valid or the
    notebook changed since the sweep began; StorageError if another sweep is at work there."""
    source, out_dir, fixed = notebooks.find(notebook), Path(out_dir).resolve(), dict(fixed or {})
    model = model or parameters.model_of(source.stem)
    points = points_of(grid)
    if both := fixed.keys() & grid.keys():
        raise ParameterError(f"{', '.join(sorted(both))} is varied and fixed; give it once")
    checked = {name: model.checked({**fixed, **point}) for name, point in points.items()}
    with files.FolderLock(out_dir, "sweep.lock"):
        return _run(source, out_dir, fixed, points, checked, jobs, say)


def _run(source: Path, out_dir: Path, fixed: dict[str, Any], points: Mapping[str, dict[str, Any]],
         checked: Mapping[str, typed.NotebookParameters], jobs: int,
         say: Callable[[str], Any]) -> list[dict[str, Any]]:
    files.remove_leftovers(out_dir, "sweep.")
    record = out_dir / "sweep.json"
    identity = {"notebook": source.name, "notebook_sha256": files.sha256_of(source), "fixed": fixed}
    rows = _rows_before(record, json.loads(json.dumps(identity)))
    tasks: dict[str, Task] = {}
    for name, P in checked.items():
        if rows.get(name, {}).get("status") == "finished" and (
                out_dir / name / source.name).is_file():
            say(f"{name}: already finished")
            continue
        task = _task(source, out_dir / name, {**fixed, **points[name]}, P)
        if (seconds := notebooks.ended(*task[:2], task[3].checked(task[2]))) is None:
            tasks[name] = task
        else:  # and killed before it was on record
            rows[name] = _row(name, points[name], task, None, seconds)
            say(f"{name}: already finished")
    files.write_json(record, {**identity, "runs": list(rows.values())})
    shared: dict[Path, tuple[Any, list[Any]]] = {}
    for name, (*_, base, levels) in tasks.items():
        if base is not None and base.parent == out_dir / "shared":
            P = checked[name].model_copy(update={"run_dir": str(base)})
            shared[base] = P, [*dict.fromkeys([*shared.get(base, (P, []))[1], *levels])]
    if jobs > 1 and source.stem == "05_live":
        say("points that run together slow each other: their speed-ups will not hold")
    for base, (_, levels) in shared.items():
        say(f"making what points share, {folder.shown(base)}: an extraction" +
            "".join(f", {files.name_of(level)}" for level in levels))
    for base, error, seconds in _each(_make, shared, jobs):
        say(f"{folder.shown(base)}: made in {seconds:.0f} s" if error is None else
            f"{folder.shown(base)}: {error}; each point makes what it lacks")
    for name, error, seconds in _each(_point, tasks, jobs):
        rows[name] = _row(name, points[name], tasks[name], error, seconds)
        files.write_json(record, {**identity, "runs": list(rows.values())})
        say(f"[{len(points.keys() & rows)}/{len(points)}] {name}: {rows[name]['status']} in "
            f"{seconds:.0f} s" + (f": {error}" if error else ""))
    return [rows[name] for name in points]


def _row(name: str, point: Mapping[str, Any], task: Task, error: str | None,
         seconds: float) -> dict[str, Any]:
    return {"name": name, "parameters": point, "run_dir": task[2]["run_dir"], "error": error,
            "status": "failed" if error else "finished", "seconds": round(seconds, 2)}


def _rows_before(record: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier call by name. Raises: ParameterError when it was another sweep."""
    if not record.is_file():
        return {}
    stored = listing.sweep_of(record.parent)
    if {name: stored.get(name) for name in identity} != identity:
        raise ParameterError(f"{record.parent} holds a sweep of another notebook version or other "
                             "fixed parameters; choose another folder or remove it")
    with folder.as_written(record):
        return {row["name"]: {"parameters": dict(row["parameters"]), **row, "seconds": float(
            row["seconds"])} for row in stored["runs"]}


# --- one point, and what it shares with others


def _task(source: Path, target: Path, given: dict[str, Any], P: typed.NotebookParameters) -> Task:
    """What :func:`_point` is given: among it the run folder that the point reads pairs and adapters
    from, and which levels; None: it needs none."""
    own = folder.shown(target / "run")
    if P.notebook not in SHARES:
        return source, target, {"run_dir": own, **given}, type(P), None, []
    upstream = {name: getattr(P, name) for name in UPSTREAM if hasattr(P, name)}
    base = (folder.resolve(given["run_dir"]) if "run_dir" in given else
            target.parent / "shared" / _digest(upstream))
    if hasattr(P, "arms"):
        from xsd.bench import arms  # brings both models' libraries

        levels = arms.levels_of([*P.arms, *P.check_arms]) or ["L4"]
    else:
        levels = [] if P.notebook == "02_train" else list(P.levels)
    return source, target, {**given, "run_dir": own}, type(P), base, levels


def _make(P: typed.NotebookParameters, levels: Sequence[Any]) -> str | None:
    """Extract and train in P.run_dir what is not there; returns what went wrong."""
    try:
        ready.ensure(P, adapters=levels)
        levels = [level for level in levels if not files.is_path(level)]
        if set(map(files.name_of, levels)) - set(training.trained(P.run_dir)):
            given = {name: getattr(P, name) for name in ("run_dir", "seed", "data")
                     if hasattr(P, name)}
            training.run(parameters.TrainParameters.checked({**given, "levels": levels}))
    except XsdError as error:
        return str(error)
    return None


def _point(source: Path, target: Path, given: Mapping[str, Any],
           model: type[typed.NotebookParameters], base: Path | None,
           levels: Sequence[Any]) -> str | None:
    """Run it, on links to what ``base`` holds; returns what went wrong."""
    own = folder.resolve(given["run_dir"])
    found = [path for pattern in LINKED for path in base.glob(pattern)] if base else []
    for path in [*found, *(training.adapter_folder(base, level) for level in levels)]:
        link = own / path.relative_to(base)
        if path.exists() and not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(path, link.parent))
    try:
        notebooks.run_notebook(source, target, given, model=model)
    except (notebooks.NotebookError, StorageError) as error:
        return str(error)
    return None


def _each(work: Callable[..., str | None], tasks: Mapping[Any, Sequence[Any]],
          jobs: int) -> Iterator[tuple[Any, str | None, float]]:
    """Name, error and seconds of each task as it ends; with several jobs each in a process that
    computes on its share of the cores."""
    if jobs == 1:
        for name, given in tasks.items():
            yield name, *_timed(work, given)
        return
    cores = str(max(1, (os.cpu_count() or 1) // jobs))
    with mock.patch.dict(os.environ, dict.fromkeys(THREADS, cores)), processes.pool(jobs) as pool:
        running = {pool.submit(_timed, work, given): name for name, given in tasks.items()}
        for done in as_completed(running):
            yield running[done], *done.result()


def _timed(work: Callable[..., str | None], given: Sequence[Any]) -> tuple[str | None, float]:
    began = time.perf_counter()
    return work(*given), time.perf_counter() - began


# --- what came of it


def metrics(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per point, held-out set and level (or live arm): what was varied, each metric with
    its interval, seconds, status. rows: of :func:`run`; a point without metrics has one row."""
    found = []
    for row in rows:
        varied = {name: listing.text(value) for name, value in row["parameters"].items()}
        ended = {"seconds": row["seconds"], "status": row["status"]}
        own, place = [], folder.resolve(row["run_dir"])
        if row["status"] == "finished":
            with folder.as_written(place / "results"):
                own = _measured(place)
        found += [varied | one | ended for one in own or [{}]]
    return pd.DataFrame(found)


def _measured(place: Path) -> list[dict[str, Any]]:
    """By held-out set and level, what the point's own notebook wrote to its results."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(place.glob("results/*.json")):
        if path.is_symlink():
            continue
        results = files.read_json(path, ParameterError, folder.AGAIN)
        # a point of another notebook may have trained what it lacked
        for level, one in results.get("levels", {}).items() if not found else ():
            own = {name: one.get(name) for name in TRAINED}
            found["", level] = {"data": None, "level": level, **own}
        for data, part in results.get("test", {}).items():
            for level, one in next((part[name] for name in ("rows", "levels", "arms")
                                    if name in part), {}).items():
                if one.get("kind") in ("floor", "drafter") or one.get("baseline"):
                    continue
                own = found.setdefault((data, level), {"data": data, "level": level})
                for name in METRICS:
                    busy = name == "speedup" and part.get("busy")
                    own |= tables.sides(name, one[name]) if name in one and not busy else {}
                if "arms" in part:
                    own |= {"baseline": part["arms"][part["baseline"]]["label"],
                            "busy": part.get("busy")}
    return list(found.values())
