"""The main job, ``xsd demo``: notebooks 01 to 06 with one set of parameters, then the report."""

import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.files import FolderLock, provenance
from xsd.runs import folder, notebooks, parameters, report
from xsd.views import figures, timeline, tokens
from xsd.views.safe import Html

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
    return report.build_report(template(), results, out_dir, title=TITLE,
                               notebooks=executed, **parts(out_dir / "run", results))


TITLE = "Cross-modal speculative decoding on the embedded pair"
NAMES = {"simulated": "held-out simulated drives",
         "davis_road": "a real road, recorded by an event camera"}
BOUNDS = ("marginal_low", "marginal_high", "survival_low", "survival_high")


def template() -> str:
    """The words of the page."""
    return (report.TEMPLATES / "demo.html.j2").read_text(encoding="utf-8")


def parts(run_dir: str | Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is given besides the results of a finished run."""
    return {"name": _marked, "sets": sets, "pictures": pictures(results), "strips": strips(run_dir),
            "rounds": rounds(results.get("live", {}).get("timeline"))}


def name(data: str) -> str:
    """What a held-out set is called."""
    return NAMES.get(data, data)


def _marked(data: str) -> Html:
    """A name in the words of the page: its digits are no numbers of the results."""
    return Html('<span data-plain="1">{}</span>').format(name(data))


def sets(found: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """The held-out sets in reading order: the simulated drives first."""
    return sorted((found or {}).items(), key=lambda item: item[0] != "simulated")


def pictures(results: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the page by kind and held-out set; ``timeline`` is one figure."""
    drawn: dict[str, Any] = {kind: {} for kind in ("accepted", "survival", "marginal",
                                                   "reliability", "speedup")}
    for data, found in sets(results.get("tokens", {}).get("test")):
        drawn["accepted"][data] = figures.accepted_per_round_dots(
            _rows(found["rows"], "accepted_per_round"),
            title=f"Accepted drafts per round on {name(data)}")
        if "by_position" in found:
            frame = pd.DataFrame(found["by_position"]).astype(dict.fromkeys(BOUNDS, float))
            for curve in ("survival", "marginal"):
                drawn[curve][data] = figures.acceptance_by_position(frame, curve=curve)
        if found.get("reliability"):
            bands = pd.DataFrame(found["reliability"]).astype({"low": float, "high": float})
            drawn["reliability"][data] = figures.reliability_curve(bands)
    live = results.get("live", {})
    for data, found in sets(live.get("test")):
        drawn["speedup"][data] = figures.speedup_bars(_rows(found["arms"], "speedup"))
    if live.get("timeline"):
        generations, texts, _ = folder.live_of(live["timeline"])
        drawn["timeline"] = timeline.scrubber(
            generations, lambda ids: "".join(texts.get(token, "?") for token in ids),
            title="One answer, step by step")
    return drawn


def _rows(rows: Mapping[str, Any], metric: str) -> pd.DataFrame:
    """Label, kind and interval of each row or arm, as the figures take them."""
    found = pd.DataFrame([{**row[metric], "name": row["label"], "kind": row.get("kind", "measured")}
                          for row in rows.values()])
    return found.astype(dict.fromkeys(("value", "low", "high"), float))


def strips(run_dir: str | Path) -> list[Html]:
    """The legend and three samples of each held-out set; nothing where no texts are known."""
    if not (folder.resolve(run_dir) / "tokens.parquet").is_file():
        return []
    table = folder.load_tokens(run_dir)
    if "draft_token" not in table.columns:
        return []
    made = [tokens.legend(("accepted", "rejected", "unused", "verifier"))]
    for data, part in table.groupby("data", sort=False, observed=True):
        levels = list(part["level"].unique())
        level = "L4" if "L4" in levels else levels[0]
        part = part[part["level"] == level]
        for _, rows in islice(part.groupby("sample", sort=False, observed=True), 3):
            about = f"{rows['question'].iloc[0]} · {level}, draft above, verifier below"
            made.append(tokens.pairs(rows, label=f"{name(data)} · {about}"))
    return made


def rounds(stored: Mapping[str, Any] | None) -> list[Html]:
    """The rounds of the timeline's speculative answer, and the question."""
    if not stored:
        return []
    generations, texts, about = folder.live_of(stored)
    made = [tokens.legend(("accepted", "rejected", "bonus")) +
            tokens.rounds(one, lambda token: texts.get(token, "?"))
            for one in generations.values() if one.rounds][:1]
    return made + [tokens.caption(f"question: {about['question']}")] * bool(about.get("question"))
