"""The main job, ``xsd demo``: notebooks 01 to 06 with one set of parameters, then the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xsd.files import FolderLock, provenance
from xsd.runs import demo_page, folder, notebooks, parameters, report

STEPS = ("01_extract", "02_train", "03_hidden", "04_tokens", "05_live", "06_compare")
LEVELS = ["L1", "L2", "L3", "L4", "L5", "L5F", "B1"]
TEST_DATA = ["simulated", "davis_road"]
SMOKE: dict[str, dict[str, Any]] = {step: {} for step in STEPS}
DEMO: dict[str, dict[str, Any]] = {
    "01_extract": {
        "n_train_sequences": 50, "n_test_sequences": 30, "questions_per_sequence": 10,
        "max_new_tokens": 48, "test_data": TEST_DATA, "batch_size": 64,
    },
    "02_train": {"levels": LEVELS, "recipe": "best", "epochs": 9},
    "03_hidden": {"levels": LEVELS, "test_data": TEST_DATA, "resamples": 1000},
    "04_tokens": {"levels": LEVELS, "test_data": TEST_DATA, "resamples": 1000},
    "05_live": {
        "arms": ["ar", "ar_all_cores", "hf_generate", "hf_prompt_lookup", "drafter", "ngram",
                 "L1", "L4", "B1", "L1+L5F"],
        "test_data": TEST_DATA, "check_arms": ["L4", "B1", "L1+L5F"], "check_in_turns": True,
        "n_samples": 10, "n_samples_others": 3, "workers": 2, "resamples": 1000,
    },
    "06_compare": {"resamples": 1000},
}
PROFILES = {"smoke": SMOKE, "demo": DEMO}
"""What each notebook is given besides ``run_dir`` and ``seed``; smoke: the notebooks' defaults."""


def given(step: str, profile: str, run_dir: Path, seed: int) -> dict[str, Any]:
    """The parameters of one notebook in a demo, checked. Raises: ParameterError."""
    place = folder.shown(run_dir)
    values = {**PROFILES[profile][step], "run_dir": place, "seed": seed}
    if step == "06_compare":
        values["runs"] = [place]
    parameters.model_of(step).checked(values)
    return values


def run(out_dir: str | Path, *, profile: str = "demo", seed: int = 0, say: Any = print) -> Path:
    """Execute the notebooks into ``out_dir`` and build the report there; returns its index.html.
    Raises: ParameterError before anything runs; NotebookError when a notebook stops (what ran
    before it is kept and found again)."""
    out_dir = folder.resolve(out_dir)
    plan = {step: given(step, profile, out_dir / "run", seed) for step in STEPS}
    seconds: dict[str, float] = {}
    with FolderLock(out_dir):
        for number, step in enumerate(STEPS, 1):
            say(f"[{number}/{len(STEPS)}] {step}", flush=True)
            began = time.perf_counter()
            notebooks.run_notebook(step, out_dir, plan[step])
            seconds[step] = round(time.perf_counter() - began, 1)
        page = build(out_dir, profile=profile, seed=seed, seconds=seconds)
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
    return report.build_report(demo_page.template(), results, out_dir, title=demo_page.TITLE,
                               notebooks=executed, **demo_page.parts(out_dir / "run", results))
