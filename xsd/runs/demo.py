"""The main job, ``xsd demo`` or ``xsd run 01-06``: the notebooks one after the other with one set
of parameters on one run folder, then the report."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xsd.core import ParameterError
from xsd.files import FolderLock, atomic_write, provenance
from xsd.runs import demo_page, folder, listing, notebooks, profiles, report

STEPS = ("01_extract", "02_train", "03_hidden", "04_tokens", "05_live", "06_compare")


def steps_of(span: str) -> list[str]:
    """``"02-05"`` → the notebooks from 02 to 05; [] for what is no span. Raises: ParameterError for
    one that leaves 01 to 06."""
    if not (found := re.fullmatch(r"(\d\d)-(\d\d)", span)):
        return []
    if not (steps := [step for step in STEPS if found[1] <= step[:2] <= found[2]]) or (
            steps[0][:2], steps[-1][:2]) != found.groups():
        raise ParameterError(f"{span} is no part of the chain; it goes from 01 to 06")
    return steps


def given(steps: Sequence[str], profile: str, run_dir: Path, changes: Sequence[str] = (),
          ) -> dict[str, dict[str, Any]]:
    """The checked parameters of each notebook of a chain. Raises: as profiles.values; for a
    run_dir, which is that of the chain."""
    place, found = folder.shown(run_dir), profiles.values(profile, list(changes), *steps)
    for step, values in found.items():
        if "run_dir" in values:
            raise ParameterError(f"the notebooks of a chain share the run folder {place}; leave "
                                 "run_dir out, and choose where it stands with -o")
        values |= {"run_dir": place, "seed": values.get("seed", 0)}
        if step == "06_compare":
            values.setdefault("runs", [place])
    return found


def run(out_dir: str | Path, *, profile: str = "demo", changes: Sequence[str] = (),
        steps: Sequence[str] = STEPS, say: Any = print) -> Path:
    """Execute the notebooks into ``out_dir`` and build the report there; returns its index.html. A
    notebook that this revision has finished with the same parameters is not run again.

    profile, changes: what they are given (profiles.values). Raises: ParameterError before anything
    runs; NotebookError when a notebook stops (what ran before it is kept and found again).
    """
    out_dir = folder.resolve(out_dir)
    plan = given(steps, profile, out_dir / "run", changes)
    seconds: dict[str, float] = {}
    again = False
    with FolderLock(out_dir):
        for number, step in enumerate(steps, 1):
            # what follows a notebook that was run again is run again, too
            done = None if again else notebooks.finished(step, out_dir, plan[step])
            before = "" if done is None else " (finished before)"
            say(f"[{number}/{len(steps)}] {step}{before}", flush=True)
            began = time.perf_counter()
            if done is None:
                again = True
                notebooks.run_notebook(step, out_dir, plan[step])
            seconds[step] = done if done is not None else round(time.perf_counter() - began, 1)
        page = build(out_dir, profile=profile, seed=plan[steps[0]]["seed"], seconds=seconds)
    say(f"{sum(seconds.values()):.0f} s in all")
    return page


def build(out_dir: str | Path, *, profile: str, seed: int, seconds: Mapping[str, float]) -> Path:
    """The report of a finished run: index.html, results.json, executed notebooks as pages."""
    out_dir = folder.resolve(out_dir)
    results = folder.load_results(out_dir / "run")
    results["provenance"] = provenance(
        seed=seed, data_hash=results.get("extract", {}).get("data_hash"), profile=profile,
        seconds_of_notebooks=dict(seconds))
    executed = [path for step in STEPS if (path := out_dir / f"{step}.ipynb").is_file()]
    return report.build_report(
        demo_page.template(), results, out_dir, title=demo_page.title(results), notebooks=executed,
        **demo_page.parts(out_dir / "run", results))


def site(roots: Iterable[Path], out: Path) -> Path:
    """A page of every run in ``roots`` that holds results, and ``index.html`` of all runs; returns
    its path. The same runs give the same bytes. Raises: ParameterError where there is no run."""
    found = listing.listing(roots)
    found = found[[folder.resolve(run) != out.resolve() for run in found.get("run", ())]]
    if found.empty:
        raise ParameterError("there is no run yet; xsd run NB makes one")
    shown, rows = listing.shown(found), []
    for one, cells in zip(found.to_dict("records"), shown.itertuples(index=False), strict=True):
        row = {"cells": list(map(str, cells)), "page": "", "tokens": []}
        run, place = one["run"], folder.resolve(one["run"])
        whole = not isinstance(one.get("problem"), str)
        if whole and "results" in one["holds"].split(", "):
            results = folder.load_results(place)
            results["provenance"] = next((one["provenance"] for one in results.values()
                                          if "provenance" in one), {})
            parts = demo_page.parts(place, results)
            row["page"] = re.sub(r"[^\w-]+", "-", run).strip("-") + ".html"
            row["tokens"] = [(f"{level} ({data})", demo_page.anchor(data, level))
                             for data, levels in parts["strips"].items() for level in levels]
            executed = sorted(place.parent.glob("*.ipynb")) if place.name == "run" else []
            atomic_write(out / row["page"], report.page(
                demo_page.template(), results, title=demo_page.title(results) + f": {run}",
                notebooks=executed, **parts))
        rows.append(row)
    index = report.page((report.TEMPLATES / "site.html.j2").read_text(encoding="utf-8"),
                        {"runs": found.to_dict("records")}, title="Runs", rows=rows,
                        columns=list(shown))
    atomic_write(out / "index.html", index)
    return out / "index.html"
