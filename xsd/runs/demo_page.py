"""What the demo's report says, in reading order. Numbers are named by their path in the results; a
part whose data are absent is left out.

Results read here (``results/<name>.json`` of xsd/runs/folder.py; ``q`` stands for value, low, high,
n):

- extract: train/{sequences, pairs, tokens}, test/<data>/{sequences, pairs, tokens, duplicate_rate,
  answers_in_training}
- train: levels/<level>/{parameters, seconds, epochs, validation_loss}
- hidden: test/<data>/levels/<level>/{cosine q, accept q} and threshold
- tokens: test/<data>/rows/<row>/{label, kind, token_acceptance q, accepted_per_round q, above_floor
  q}, test/<data>/best_floor, test/<data>/{by_position, reliability} (columns of
  xsd/evaluate/table.py)
- live: test/<data>/arms/<arm>/{label, kind, speedup q, slower_share q, accepted_per_round q, total_ms
  q}, arms (of the first set), best_arm, n_timed, n_drafting, n_answers and n_identical (answers
  checked), check/{labels, n_answers, n_identical, n_near_ties, n_divergences}, timeline (one
  sample's generations, as live.json holds them)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from xsd.runs import folder, numbers, report
from xsd.views import figures, timeline, tokens

TITLE = "Cross-modal speculative decoding on the embedded pair"
NAMES = {
    "simulated": "held-out simulated drives",
    "davis_road": "a real road, recorded by an event camera"
}


def _there(results: Mapping[str, Any], *paths: str) -> bool:
    for path in paths:
        try:
            numbers.lookup(results, path)
        except numbers.ReportError:
            return False
    return True


def _gamma(results: Mapping[str, Any]) -> str:
    return " (at γ = {tokens/gamma:d})" if _there(results, "tokens/gamma") else ""


def _turns(results: Mapping[str, Any]) -> str:
    return ", one arm a sample in turn," if results["live"]["check"].get("in_turns") else ""


def lead(results: Mapping[str, Any]) -> str:
    """The summary under the title: the run's own sentences with the numbers filled in, good or
    bad."""
    parts = []
    for data in _ordered(results.get("tokens", {}).get("test", {})):
        at = f"tokens/test/{data}"
        if _there(results, f"{at}/best_adapter", f"{at}/best_floor"):
            best, floor = (f"{at}/rows/{numbers.lookup(results, f'{at}/{which}')}"
                           for which in ("best_adapter", "best_floor"))
            parts.append(
                f"On {NAMES.get(data, data)} the best adapter, **{{{best}/label}}**, has "
                f"{{{best}/accepted_per_round/value:.2f}} accepted drafts a round{_gamma(results)}; "
                "the best floor, "
                f"{{{floor}/label}}, has {{{floor}/accepted_per_round/value:.2f}}: a distance of "
                f"{{{best}/above_floor/value:+.2f}} [{{{best}/above_floor/low:+.2f}}, "
                f"{{{best}/above_floor/high:+.2f}}]."
            )
    if _there(results, "live/best_arm", "live/n_identical", "live/n_answers", "live/check/labels"):
        arm = f"live/arms/{results['live']['best_arm']}"
        there = _there(results, "live/n_drafting", "live/n_timed")
        chosen = " (best of {live/n_drafting:d} on these {live/n_timed:d} samples)" if there else ""
        adapted = results["live"].get("best_adapter_arm")
        with_adapter = ""
        if adapted and adapted != results["live"]["best_arm"]:
            at = f"live/arms/{adapted}"
            with_adapter = (
                f"The fastest arm with an adapter, **{{{at}/label}}**, runs at "
                f"{{{at}/speedup/value:.2fx}} "
                f"[{{{at}/speedup/low:.2f}}, {{{at}/speedup/high:.2f}}]. ")
        parts.append(
            f"Live, the fastest speculative arm{chosen}, **{{{arm}/label}}**, runs at "
            f"{{{arm}/speedup/value:.2fx}} [{{{arm}/speedup/low:.2f}}, {{{arm}/speedup/high:.2f}}] "
            "of the baseline's speed. "
            + with_adapter +
            f"{{live/n_identical}} of {{live/n_answers}} answers of {{live/check/labels}} on all "
            f"held-out samples{_turns(results)} "
            + "are the verifier's own, "
            "token for token.")
    return "\n\n".join(parts)


def sections(run_dir: str | Path, results: Mapping[str, Any]) -> list[report.Section]:
    """The page's sections for a finished run."""
    made = [
        _what_was_done(results),
        _acceptance(run_dir, results),
        _positions(results),
        _strips(run_dir),
        _live(results),
        _limits(),
    ]
    return [section for section in made if section is not None and section.parts]


def _what_was_done(results: Mapping[str, Any]) -> report.Section | None:
    if not _there(results, "extract/train/pairs", "extract/train/sequences"):
        return None
    parts: list[Any] = [
        report.Text(
            "A **drafter** that sees only an event camera writes draft tokens for a **verifier** "
            "that sees the video. Small "
            "**adapters** map the "
            "drafter's hidden states into the verifier's space, so that the verifier's own head "
            "can turn them into tokens. Both "
            "models are small "
            "and trained for this project (the embedded pair); everything on this page was "
            "measured on this machine."
            "\n\nHidden states of both were extracted for {extract/train/pairs:,d} question and "
            "answer pairs from "
            "{extract/train/sequences:,d} "
            "simulated drives, and the adapters trained on them. They are judged on sequences that "
            "no model and no adapter has seen:"
        )
    ]
    rows = [(NAMES.get(data, data), f"extract/test/{data}")
            for data in _ordered(results["extract"].get("test", {}))]
    columns = [
        report.Column("sequences", "sequences", ",d"),
        report.Column("pairs", "pairs", ",d"),
        report.Column("tokens", "tokens", ",d"),
        report.Column("duplicate answers", "duplicate_rate", ".1%"),
        report.Column("its answers found in training", "answers_in_training", ".1%"),
    ]
    parts.append(report.Table([("drives to train on", "extract/train"), *rows], columns))
    templated = [
        f"on {NAMES.get(data, data)} {{{at}/duplicate_rate:.1%}} of the verifier's held-out "
        "answers are given more than once, and a 4-gram "
        "table of the training answers has "
        f"{{tokens/test/{data}/rows/ngram/accepted_per_round/value:.2f}} accepted drafts a round"
        for data, at in ((data, f"extract/test/{data}")
                         for data in _ordered(results["extract"].get("test", {})))
        if _there(results, f"{at}/duplicate_rate",
                  f"tokens/test/{data}/rows/ngram/accepted_per_round/value")
    ]
    if templated:
        text = f"How templated the answers are: {'; '.join(templated)}."
        parts.append(report.Text(f"{text} What text alone predicts is no merit of an adapter."))
    if results.get("train", {}).get("levels"):
        columns = [
            report.Column("parameters", "parameters", ",d"),
            report.Column("epochs", "epochs", "d"),
            report.Column("validation loss", "validation_loss", ".4f"),
            report.Column("seconds", "seconds", ".1f"),
        ]
        parts.append(
            report.Table(
                [(level, f"train/levels/{level}") for level in results["train"]["levels"]], columns,
                "The trained adapters. A loss is only to be compared within one recipe: L1 to L3 "
                "are asked for tokens alone.",
            ))
    return report.Section("What was done", parts)


def _acceptance(run_dir: str | Path, results: Mapping[str, Any]) -> report.Section | None:
    parts: list[Any] = []
    for data, found in _ordered(results.get("tokens", {}).get("test", {})).items():
        rows = found["rows"]
        table = pd.DataFrame(
            [{"name": row["label"], "kind": row["kind"], **_q(row["accepted_per_round"])}
             for row in rows.values()])
        title = f"Mean accepted length on {NAMES.get(data, data)}"
        dots = figures.accepted_per_round_dots(table, title=title)
        parts.append(
            report.Figure(
                dots.update_xaxes(title_text="accepted drafts a round, mean and 95 % interval")))
        lines: list[Any] = []
        for kind, heading in (("ceiling", "Ceiling"), ("adapter", "Adapters"),
                              ("drafter", "Without an adapter"), ("floor", "Floors")):
            chosen = [(row["label"], f"tokens/test/{data}/rows/{name}")
                      for name, row in rows.items() if row["kind"] == kind]
            lines += [heading, *chosen] if chosen else []
        columns = [
            report.Column("same token", "token_acceptance", ".1%", interval=True),
            report.Column("accepted drafts a round", "accepted_per_round", ".2f", interval=True),
            report.Column("above the best floor", "above_floor", "+.2f", interval=True),
        ]
        parts.append(
            report.Table(lines, columns,
                         f"On {NAMES.get(data, data)}. {_intervals(results, data)}"))
        hidden = results.get("hidden", {}).get("test", {}).get(data, {}).get("levels", {})
        if hidden:
            columns = [
                report.Column("cosine", "cosine", ".3f", interval=True),
                report.Column("cosine above τ", "accept", ".1%", True),
            ]
            lines = [(level, f"hidden/test/{data}/levels/{level}") for level in hidden]
            parts.append(
                report.Table(
                    lines, columns,
                    "The same adapters by the cosine of hidden states, which is not what decides."))
    if parts:
        text = (
            "A draft token counts when it is the verifier's own. The floors need no adapter and no "
            "model: the most frequent token at each "
            "position, an n-gram table of the training answers, copying from the prompt. An "
            "adapter is worth its distance above "
            "the best of them.")
        parts.insert(0, report.Text(text))
    return report.Section("How many draft tokens are accepted", parts) if parts else None


def _intervals(results: Mapping[str, Any], data: str) -> str:
    """What the intervals of a held-out set draw, and how far to trust them."""
    at = f"tokens/test/{data}"
    if not _there(results,
                  f"{at}/cluster") or results["tokens"]["test"][data]["cluster"] == "sequence":
        return "Intervals draw whole sequences."
    count = f"{{{at}/n_clusters:d}} " if _there(results, f"{at}/n_clusters") else ""
    return (f"Intervals draw {count}overlapping clips of one sequence: they are weak here, and "
            "likely too narrow.")


def _q(node: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: float("nan") if (value := node.get(name)) is None else value
        for name in ("value", "low", "high", "n")
    }


def _tokens(run_dir: str | Path) -> pd.DataFrame | None:
    return folder.load_tokens(run_dir) if (folder.resolve(run_dir) /
                                           "tokens.parquet").is_file() else None


def _ordered(sets: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets in reading order: the simulated drives first."""
    return {data: sets[data] for data in sorted(sets, key=lambda data: data != "simulated")}


def _positions(results: Mapping[str, Any]) -> report.Section | None:
    parts: list[Any] = []
    for data, one in _ordered(results.get("tokens", {}).get("test", {})).items():
        if "by_position" not in one:
            continue
        bounds = [f"{name}_{end}" for name in ("marginal", "survival") for end in ("low", "high")]
        frame = pd.DataFrame(one["by_position"]).astype(dict.fromkeys(bounds, float))
        name = NAMES.get(data, data)
        caption = f"On {name}. A draft is useful as far as it is unbroken from its start."
        parts.append(report.Figure(figures.acceptance_by_position(frame, curve="survival"),
                                   caption))
        parts.append(
            report.Figure(figures.acceptance_by_position(frame, curve="marginal"), f"On {name}."))
        if one.get("reliability"):
            bands = pd.DataFrame(one["reliability"]).astype({"low": float, "high": float})
            parts.append(
                report.Figure(figures.reliability_curve(bands),
                              f"What a cosine says about the token, on {name}."))
    return report.Section("Position by position", parts) if parts else None


def _strips(run_dir: str | Path) -> report.Section | None:
    table = _tokens(run_dir)
    if table is None or "draft_token" not in table.columns:
        return None
    parts: list[Any] = [report.Html(tokens.legend(("accepted", "rejected", "unused", "verifier")))]
    group = "data" if "data" in table.columns else "run"
    for data, part in table.groupby(group, sort=False, observed=True):
        levels = list(dict.fromkeys(part["level"]))
        level = "L4" if "L4" in levels else levels[0]
        for sample in list(dict.fromkeys(part["sample"]))[:3]:
            rows = part[(part["level"] == level) & (part["sample"] == sample)]
            if len(rows):
                question = str(rows["question"].iloc[0]) if "question" in rows.columns else ""
                label = (f"{NAMES.get(str(data), str(data))} · {question} · {level}, draft above, "
                         "verifier below")
                parts.append(report.Html(tokens.pairs(rows, label=label)))
    return report.Section("Real samples, token by token", parts)


_LIVE_COLUMNS = [
    report.Column("speed-up", "speedup", ".2fx", interval=True),
    report.Column("slower samples", "slower_share/value", ".0%"),
    report.Column("milliseconds an answer", "total_ms", ".0f", interval=True),
    report.Column("accepted a round", "accepted_per_round", ".2f", interval=True),
]


def _live(results: Mapping[str, Any]) -> report.Section | None:
    arms = results.get("live", {}).get("arms", {})
    if not arms:
        return None
    by_set = _ordered(results["live"].get("test", {}))
    counted = ", ".join(f"{{live/test/{data}/n_timed}} on {NAMES.get(data, data)}"
                        for data in by_set)
    counted = f" ({counted})" if by_set else ""
    parts: list[Any] = [
        report.Text(
            f"All arms answer the same samples{counted} in one interleaved run, each against the "
            "fastest "
            "baseline of that set. The speculative arms draft while the verifier reads its video, "
            "then draft and verify in rounds."
        )
    ]
    sets = {data: (one["arms"], f"live/test/{data}")
            for data, one in by_set.items()} or {"": (arms, "live")}
    for data, (rows, at) in sets.items():
        table = pd.DataFrame(
            [{"name": arm["label"], "kind": arm.get("kind", "measured"), **_q(arm["speedup"])}
             for arm in rows.values()])
        caption = f"On {NAMES.get(data, data)}. Slower samples: the share on which the arm lost to the baseline." if data else ""
        parts.append(report.Figure(figures.speedup_bars(table)))
        parts.append(
            report.Table([(arm["label"], f"{at}/arms/{name}") for name, arm in rows.items()],
                         _LIVE_COLUMNS, caption))
    if "check" in results["live"]:
        parts.append(
            report.Text(
                "Lossless, checked with {live/check/labels} on every held-out sample" +
                _turns(results) + " and on a few at short length limits too: "
                "{live/check/n_identical} of {live/check/n_answers} answers "
                "are the verifier's own, token for token; {live/check/n_near_ties} near-ties, "
                "{live/check/n_divergences} divergences."))
    if results["live"].get("timeline"):
        generations, texts, about = folder.live_of(results["live"]["timeline"])

        def said(ids: tuple[int, ...]) -> str:
            return "".join(texts.get(token, "?") for token in ids)

        parts.append(
            report.Figure(timeline.scrubber(generations, said, title="One answer, step by step"),
                          "Move the slider."))
        speculative = next((one for one in generations.values() if one.rounds), None)
        if speculative is not None:
            legend = tokens.legend(("accepted", "rejected", "bonus"))
            parts.append(
                report.Html(legend +
                            tokens.rounds(speculative, lambda token: texts.get(token, "?"))))
        if about.get("question"):
            parts.append(report.Html(tokens.caption(f"question: {about['question']}")))
    return report.Section("Live: the measured timeline and the speed-up", parts)


def _limits() -> report.Section:
    text = (
        "These are models of a few million parameters on a small processor: their answers are "
        "short, their verifier is fast, and "
        "a saved token "
        "is worth less time than it would be at full size. The acceptance figures say how far an "
        "event camera can speak for a "
        "video camera in this "
        "world; they do not predict those of the full-size models. A speed-up here is a fact about "
        "this machine."
    )
    return report.Section("What this does not show", [report.Text(text, note=True)])
