"""The pictures of the demo's page, of a run's results and its token table. The words are in
``templates/demo.html.j2``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.runs import folder, report
from xsd.views import figures, timeline, tokens
from xsd.views.safe import Html

NAMES = {"simulated": "held-out simulated drives",
         "davis_road": "a real road, recorded by an event camera"}
BOUNDS = ("marginal_low", "marginal_high", "survival_low", "survival_high")


def template() -> str:
    """The words of the page."""
    return (report.TEMPLATES / "demo.html.j2").read_text(encoding="utf-8")


def title(results: Mapping[str, Any]) -> str:
    """The page's title, which says which pair it is about."""
    pair = results.get("extract", {}).get("pair", "embedded")
    own = "the embedded pair" if pair == "embedded" else f"the pair {pair}"
    return f"Cross-modal speculative decoding on {own}"


def parts(run_dir: str | Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is given besides the results of a finished run."""
    extract = results.get("extract", {})
    given = extract.get("provenance", {}).get("parameters", {})
    return {"name": _marked, "sets": sets, "pictures": pictures(results), "strips": strips(run_dir),
            "rounds": rounds(results.get("live", {}).get("timeline")),
            "embedded": extract.get("pair", "embedded") == "embedded",
            "drives": given.get("data", "simulated") == "simulated"}


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
    made, gamma = [tokens.legend()], folder.load_results(run_dir).get("tokens", {}).get("gamma", 5)
    for data, part in table.groupby("data", sort=False, observed=True):
        levels = list(part["level"].unique())
        level = "L4" if "L4" in levels else levels[0]
        part = part[part["level"] == level]
        for _, rows in islice(part.groupby("sample", sort=False, observed=True), 3):
            about = f"{rows['question'].iloc[0]} · {level}, draft above, verifier below"
            made.append(tokens.pairs(rows, label=f"{name(data)} · {about}", gamma=gamma))
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
