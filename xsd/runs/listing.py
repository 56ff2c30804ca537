"""Which runs there are, what they were made with, and what came of them: ``xsd runs``, and the
first table of notebook 06."""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.core import ParameterError
from xsd.evaluate import tables
from xsd.files import read_json
from xsd.runs import folder
from xsd.runs.parameters import NOTEBOOKS

HOLDS = {"results/*.json": "results", "tokens.parquet": "tokens", "live.json": "live",
         "shards/*/*/manifest.json": "shards", "*/manifest.json": "pairs", "adapters/*": "adapters",
         "sweep.json": "sweep", "index.html": "page", "*.provenance.json": "notebooks"}
"""Files that make a folder a run or a report, and what ``xsd runs`` says of them."""
PLACES = ("*", "*/run", "*/*/run")
"""Where runs stand: in a folder, in a report (which is one with its run), in a point of a sweep."""


def listing(roots: Iterable[Path]) -> pd.DataFrame:
    """One row per run or report in ``roots``: where it is, when it was last written to, what it
    holds, the parameters that differ among the rows, and its :func:`headline`. Of results that
    cannot be read the row says why (``problem``)."""
    places = {one for root in roots for pattern in PLACES for one in root.glob(pattern)}
    rows, made, came = [], [], []
    for place in sorted(places):
        holds = [what for pattern, what in HOLDS.items() if any(place.glob(pattern)) or (
            place.name == "run" and any(place.parent.glob(pattern)))]
        if not holds or (place / "run" / "results").is_dir():
            continue
        files = []
        for path in place.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # of a run that is being written
                files += [path.lstat()] * path.is_file()
        last = datetime.fromtimestamp(max((file.st_mtime for file in files), default=0))
        problem = ""
        try:
            results = folder.load_results(place) if "results" in holds else {}
            with folder.as_written(place / "results"):
                made.append(parameters(results))
                came.append(headline(results))
        except ParameterError as error:
            problem, made, came = str(error), [*made[:len(rows)], {}], [*came[:len(rows)], {}]
        rows.append({"run": folder.shown(place), "date": f"{last:%Y-%m-%d %H:%M}",
                     "MB": round(sum(file.st_size for file in files) / 1e6, 1),
                     "holds": ", ".join(holds), "notebooks": " ".join(sorted(made[-1])),
                     **({"problem": problem} if problem else {})})
    return pd.concat(map(pd.DataFrame, (rows, differing(made), came)), axis="columns")


def parameters(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Number of a notebook, or the name of its results → the parameters it was given."""
    numbers = {stem.split("_")[1]: stem.split("_")[0] for stem in NOTEBOOKS}
    return {numbers.get(name, name): one["provenance"]["parameters"]
            for name, one in results.items() if "parameters" in one.get("provenance", {})}


def differing(made: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """For each run, the parameters that differ among the runs, as text. made: of
    :func:`parameters`. A name stands once per notebook, which is written in front, where those of
    one run were given different values."""
    known: dict[tuple[str, str], dict[int, str]] = {}
    for index, run in enumerate(made):
        for notebook, given in run.items():
            for name in given.keys() - {"run_dir", "runs"}:
                known.setdefault((name, notebook), {})[index] = text(given[name])
    differ = {key: values for key, values in known.items() if len(set(values.values())) > 1}
    rows: list[dict[str, str]] = [{} for _ in made]
    for name, notebook in sorted(differ):
        same = [values.items() for (other, _), values in differ.items() if other == name]
        alike = len({index for one in same for index, _ in one}) == len(set().union(*same))
        for index, value in differ[name, notebook].items():
            rows[index][name if alike else f"{notebook} {name}"] = value
    return rows


def text(value: Any) -> str:
    """A parameter's value as a table and a folder's name show it."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """Accepted drafts per round of the best adapter on the first held-out set (the simulated one
    where there is one), and the best live arm's speed-up with its baseline; None for what is not
    known, nor claimed of a busy machine."""
    tests, live = results.get("tokens", {}).get("test", {}), results.get("live", {})
    data = "simulated" if "simulated" in tests else next(iter(tests), None)
    found = tests.get(data, {})
    adapter = found.get("rows", {}).get(found.get("best_adapter"), {})
    arms = live.get("arms", {})
    arm = {"label": "(busy machine)"} if live.get("busy") else arms.get(live.get("best_arm"), {})
    unknown = dict.fromkeys(("value", "low", "high"))
    return {"data": data, "best adapter": adapter.get("label"),
            **tables.sides("accepted per round", adapter.get("accepted_per_round", unknown)),
            "best arm": arm.get("label"), **tables.sides("speed-up", arm.get("speedup", unknown)),
            "baseline": arms.get(live.get("baseline"), {}).get("label")}


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """For reading: numbers with their intervals, no column that is empty throughout."""
    known = {name for name in frame if frame[name].notna().any()}
    kept = [name for name in frame if name.removesuffix(" low").removesuffix(" high") in known]
    found = tables.with_intervals(frame[kept]).fillna("")
    # a name may come from a folder that somebody sent, and a terminal obeys what it is shown
    return found.map(lambda value: re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", value) if isinstance(
        value, str) else value)


# --- side by side


def sweep_of(place: Path) -> dict[str, Any]:
    """What a sweep keeps in its folder: notebook, notebook_sha256, fixed, runs (name, parameters,
    run_dir, status, error and seconds of each point). Raises: ParameterError."""
    way_out = "run the sweep into another folder"
    stored = read_json(place / "sweep.json", ParameterError, way_out)
    rows = stored.get("runs") if isinstance(stored, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(
        row.get("run_dir"), str) and row.get("status") in ("finished", "failed") for row in rows):
        raise ParameterError(f"{place / 'sweep.json'} is not what a sweep writes; {way_out}")
    return stored


def runs_of(runs: Sequence[str]) -> list[str]:
    """The run folders; a sweep's folder stands for its finished points, which stand in it (also
    where it was moved). Raises: ParameterError, too where a point's run is another's folder."""
    found = []
    for run in runs:
        place = folder.resolve(run)
        if not (place / "sweep.json").is_file():
            found.append(run)
            continue
        for row in sweep_of(place)["runs"]:
            own = place / Path(str(row.get("name", ""))).name / "run"
            own = own if own.is_dir() else folder.resolve(row["run_dir"])
            if row["status"] == "finished" and not own.resolve().is_relative_to(place.resolve()):
                raise ParameterError(f"the points of {run} are not in its folder but in {own}; "
                                     f"give that run: runs={own}")
            found += [folder.shown(own)] * (row["status"] == "finished")
    if not found:
        raise ParameterError(f"no point of {', '.join(runs)} has finished; run the sweep again")
    return found


def names(runs: Sequence[str]) -> list[str]:
    """A name for each run folder: as many last parts of its path as tell the runs apart, without
    those they all share. Raises: ParameterError when one folder is given twice."""
    places = [folder.resolve(run) for run in runs]
    if len(set(places)) < len(places):
        raise ParameterError(f"a run is given twice among {', '.join(runs)}; give each folder once")
    while len(places) > 1 and len({place.name for place in places}) == 1:
        places = [place.parent for place in places]
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def overview(runs: Sequence[str]) -> pd.DataFrame:
    """One row per run: what it was made with, the parameters that differ among the runs, its
    headlines. Raises: ParameterError."""
    rows = []
    results = [folder.load_results(run) for run in runs]
    differ = differing([parameters(found) for found in results])
    for run, name, found, own in zip(runs, names(runs), results, differ, strict=True):
        with folder.as_written(folder.resolve(run) / "results"):
            rows.append(_overview(name, found) | own | headline(found))
    return shown(pd.DataFrame(rows))


def _overview(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    made, trained, tokens = (found.get(step, {}) for step in ("extract", "train", "tokens"))
    origin = next((one["provenance"] for one in (tokens, made) if "provenance" in one), {})
    return {"run": name, "pair": made.get("pair"),
            "revision": str(origin.get("git_revision", ""))[:10], "seed": origin.get("seed"),
            "training pairs": made.get("train", {}).get("pairs"), "recipe": trained.get("profile"),
            "levels": ", ".join(trained.get("levels", {})), "gamma": tokens.get("gamma")}
