"""The pictures of the demo's page, of a run's results and its token table. The words are in
``templates/demo.html.j2``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.evaluate import what_if
from xsd.files import import_object
from xsd.runs import folder, report
from xsd.views import figures, safe, timeline, tokens
from xsd.views.safe import Html

NAMES = {"simulated": "held-out simulated drives",
         "davis_road": "a real road, recorded by an event camera"}
STRIPS, LEAST = 2, 5
"""Samples of a level whose tokens are shown; tokens that a kind of word must have to be drawn."""
REFERENCE = pd.DataFrame(what_if.reference_table()).set_axis(
    ["hidden drafts accepted", "the reference's arithmetic", "this model"], axis=1)
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
    live, judged = results.get("live", {}), results.get("tokens", {})
    tests, shown = judged.get("test", {}), strips(run_dir, judged.get("gamma") or 5)
    return {"name": _marked, "sets": sets, "pictures": pictures(results), "strips": shown,
            "legend": tokens.legend(), "anchor": anchor, "best_level": {
                data: tests.get(data, {}).get("best_adapter") or next(iter(levels))
                for data, levels in shown.items()},
            "rounds": rounds(live.get("timeline")),
            "what_if": _sliders(what_if.points(live)),
            "reference": safe.table(REFERENCE, precision=2, index=False),
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
    drawn: dict[str, Any] = {kind: {} for kind in ("accepted", "survival", "marginal", "kinds",
                                                   "reliability", "waterfall", "sensor", "speedup")}
    judged = results.get("tokens", {})
    for data, found in sets(judged.get("test")):
        drawn["accepted"][data] = figures.accepted_per_round_dots(
            _rows(found["rows"], "accepted_per_round"),
            title=f"Accepted drafts per round on {name(data)}")
        if "by_position" in found:
            frame = pd.DataFrame(found["by_position"]).astype(dict.fromkeys(BOUNDS, float))
            for curve in ("survival", "marginal"):
                drawn[curve][data] = figures.panels(
                    figures.acceptance_by_position(frame, curve=curve))
        if found.get("reliability"):
            bands = pd.DataFrame(found["reliability"]).astype({"low": float, "high": float})
            drawn["reliability"][data] = figures.panels(figures.reliability_curve(bands))
        kinds = judged.get("words", {}).get(data, {})
        shown = {found.get("best_adapter"), "drafter_tokens", "B1"}
        rows = [{"level": level, "kind": kind, **one} for level, of in kinds.items()
                if level in shown for kind, one in of.items()]
        if rows and max(row["n"] for row in rows) >= LEAST:
            drawn["kinds"][data] = figures.acceptance_by_kind(
                pd.DataFrame(rows).astype({"low": float, "high": float}), least=LEAST)
    gaps = results.get("truth", {})
    for data, found in sets(gaps.get("test")):  # of notebook 13, whose study draws them
        for kind in ("waterfall", "sensor"):
            drawn[kind][data] = import_object(f"studies.gap.truth_figures:{kind}_of")(
                found, gaps["waterfall"], name(data))
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


def strips(run_dir: str | Path, gamma: int = 5) -> dict[str, dict[str, Html]]:
    """Held-out set → level → its first samples; nothing where no texts are known."""
    if not (folder.resolve(run_dir) / "tokens.parquet").is_file():
        return {}
    table, made = folder.load_tokens(run_dir), {}
    if "draft_token" not in table.columns:
        return {}
    for (data, level), part in table.groupby(["data", "level"], sort=False, observed=True):
        few = islice(part.groupby("sample", sort=False, observed=True), STRIPS)
        made.setdefault(str(data), {})[str(level)] = Html().join(
            tokens.pairs(rows, gamma=gamma,
                         label=f"{rows['question'].iloc[0]} · draft above, verifier below")
            for _, rows in few)
    return made


def anchor(data: str, level: str) -> str:
    """Where the tokens of a level stand on the page."""
    return "tokens-" + re.sub(r"[^\w-]+", "-", f"{data}-{level}")


def _sliders(points: Mapping[str, Any]) -> Html:
    """What templates/what_if.js reads; nothing for a run without prices."""
    if not points:
        return Html()
    presets = {**points, "the reference (quoted)": {"given": what_if.reference()}}
    stored = json.dumps({
        "presets": presets, "inputs": what_if.INPUTS, "config": report.PLOT_CONFIG,
        "ranges": what_if.ranges(one["given"] for one in presets.values())}, sort_keys=False)
    return Html('<script type="application/json" id="what-if-data">{}</script>').format(
        Html(stored.replace("<", "\\u003c")))


def rounds(stored: Mapping[str, Any] | None) -> list[Html]:
    """The rounds of the timeline's speculative answer, and the question."""
    if not stored:
        return []
    generations, texts, about = folder.live_of(stored)
    made = [tokens.legend(("accepted", "rejected", "bonus")) +
            tokens.rounds(one, lambda token: texts.get(token, "?"))
            for one in generations.values() if one.rounds][:1]
    return made + [tokens.caption(f"question: {about['question']}")] * bool(about.get("question"))
