"""Step 04: which draft tokens are the verifier's own, against floors that need no adapter, on
exactly the same tokens.

The first token of each answer is the verifier's own, from its prefill; every later position is
drafted (xsd/steps/drafts.py), by the floors too. Token acceptance: the share of drafts that are the
verifier's token. Accepted length: accepted draft tokens a round at gamma, the bonus token not
counted. Both stand beside their paired distance above the best floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from xsd.adapters.base import Adapter
from xsd.core import ParameterError
from xsd.evaluate import curves, evaluate, floors
from xsd.evaluate import reliability as bands
from xsd.evaluate.counterfactual import Counts, compare_with_floors
from xsd.files import provenance
from xsd.runs import folder, parameters
from xsd.steps import drafts, extraction, words
from xsd.steps import evaluation_old as evaluation
from xsd.steps.evaluation_old import HeldOut, interval

POSITIONS = 24
"""Positions of an answer that the report draws."""
DRAFTER = "drafter_tokens"
FLOORS = {
    "position mode": "position_mode", "4-gram": "ngram", "prompt lookup": "prompt_lookup",
    "drafter tokens": DRAFTER
}
"""A floor's own name → its row in the results."""


@dataclass(frozen=True)
class Tokens:
    """What step 04 found. results: as written. table: the token table. by_kind: acceptance by kind
    of word, a row a level and kind."""

    results: dict[str, Any]
    table: pd.DataFrame
    by_kind: pd.DataFrame
    reliability: Mapping[tuple[str, str], Any]

    def rows(self, data: str) -> pd.DataFrame:
        """The acceptance table of a held-out set: row, kind, token acceptance, accepted length and
        distance above the best floor."""
        lines = []
        for found in self.results["test"][data]["rows"].values():
            line: dict[str, Any] = {"row": found["label"], "kind": found["kind"]}
            for name in ("token_acceptance", "accepted_per_round", "above_floor"):
                line |= {
                    name: found[name]["value"], f"{name} low": found[name]["low"],
                    f"{name} high": found[name]["high"]
                }
            lines.append({**line, "n": found["accepted_per_round"]["n"]})
        return pd.DataFrame(lines)

    def dots(self, data: str) -> pd.DataFrame:
        """The accepted lengths as ``views.figures.accepted_per_round_dots`` reads them."""
        rows = self.results["test"][data]["rows"].values()
        return pd.DataFrame([{"name": row["label"], "kind": row["kind"], **row["accepted_per_round"]}
                             for row in rows])


def tokens(given: parameters.TokenParameters) -> Tokens:
    """Token acceptance of every level, the drafter alone and the floors, on every held-out set.

    Writes ``results/tokens.json`` and the run's token table. Accepted length: accepted draft tokens
    a round at gamma, without the bonus.
    """
    sets, adapters = evaluation.pairs_and_adapters(given)
    training = extraction.answers(
        extraction.open_pairs(given.run_dir, "train", given.data, "teacher_forced"))
    about = extraction.pair_file(given.run_dir)
    results: dict[str, Any] = {"mode": given.mode, "gamma": given.gamma, "test": {}}
    pieces, kinds, reliability = [], [], {}
    for one in sets:
        arms = {
            level: drafts.drafts_of(adapter, one, gamma=given.gamma, batch_size=given.batch_size)
            for level, adapter in adapters.items()
        }
        arms[DRAFTER] = drafts.drafter_drafts(one, given.batch_size)
        answers = extraction.answers(one.dataset)
        prompts = [about["prompt_ids"][question] for question in one.dataset.table()["question"]]
        used = drafted_samples(one.name, answers)
        options = {"n_resamples": given.resamples, "seed": given.seed}
        counted = floor_counts(training, [answers[i] for i in used], [prompts[i] for i in used],
                               given.gamma)
        counted[DRAFTER] = arms[DRAFTER].of(used).counts(given.gamma)
        clusters = [one.clusters[i] for i in used]
        rows: dict[str, Any] = {}
        for name in [*adapters, DRAFTER, *[row for row in FLOORS.values() if row != DRAFTER]]:
            counts = arms[name].of(used).counts(given.gamma) if name in adapters else counted[name]
            matched = compare_with_floors(counts[0],
                                          {key: value[0] for key, value in counted.items()},
                                          clusters, **options)
            length = compare_with_floors(counts[1],
                                         {key: value[1] for key, value in counted.items()}, clusters,
                                         **options)
            rows[name] = {
                "label": label_of(name, adapters), "kind": kind_of(name, adapters),
                "token_acceptance": interval(matched.arm),
                "token_acceptance_above_floor": interval(matched.above_best),
                "accepted_per_round": interval(length.arm), "above_floor": interval(length.above_best),
            }
            best_floor = length.best
        for level, adapter in adapters.items():
            found = evaluate.evaluate(adapter, one.batches(given.batch_size), one.head,
                                      thresholds=(given.threshold,), top_k=(1, given.top_k),
                                      gamma=given.gamma)
            one_step, certain = found.tokens.result(**options), found.reliability.result(**options)
            at = certain.thresholds[given.threshold]
            rows[level]["one_step"] = interval(one_step.acceptance)
            rows[level]["top_k"] = interval(one_step.top_k[given.top_k])
            rows[level]["cosine_overstates"] = {
                "threshold": given.threshold, **interval(at.difference)
            }
            reliability[one.name, level] = certain
        reading = [level for level in adapters if kind_of(level, adapters) == "adapter"]
        results["test"][one.name] = {
            "rows": rows, "best_floor": best_floor,
            "best_adapter": max(reading or adapters,
                                key=lambda level: rows[level]["accepted_per_round"]["value"]),
            "n_samples": len(used), "n_clusters": len(set(clusters)), "cluster":
                "sequence" if set(clusters) <= set(one.dataset.table()["sequence"]) else "clip",
        }
        pieces.append(token_table(one, arms, about["token_texts"]).assign(data=one.name))
        kinds.append(
            words.by_word_kind(one, arms, about["token_texts"], **options).assign(data=one.name))
    table, by_kind = pd.concat(pieces, ignore_index=True), pd.concat(kinds, ignore_index=True)
    results["words"] = _nested(by_kind)
    for name, part in table.groupby("data", sort=False):
        results["test"][name] |= drawn(part)
    results["provenance"] = provenance(seed=given.seed, data_hash=evaluation.pairs_hash(sets),
                                       parameters=given.model_dump())
    folder.save_tokens(given.run_dir, table)
    folder.save_results(given.run_dir, "tokens", results)
    return Tokens(results, table, by_kind, reliability)


def drafted_samples(name: str, answers: Sequence[Sequence[int]]) -> list[int]:
    """Samples whose answer has a position to draft, beyond the first token. Raises: ParameterError
    when there is none."""
    used = [i for i, ids in enumerate(answers) if len(ids) > 1]
    if not used:
        raise ParameterError(
            f"every answer held out of {name} is a single token, so nothing is drafted and there "
            "is no acceptance to measure; "
            "extract with a larger max_new_tokens in notebook 01, or other test_data")
    return used


def drawn(table: pd.DataFrame) -> dict[str, dict[str, list[Any]]]:
    """What the report draws of one data set's token table, as columns: ``by_position`` and
    ``reliability`` of xsd/evaluate/table.py.

    reliability is empty where no row has a cosine.
    """
    kept = ["level", "cosine", "cosine_low", "cosine_high", "n", "rate", "low", "high"]
    found = bands.curve(table)
    return {
        "by_position": curves.by_position(table, max_positions=POSITIONS).to_dict("list"),
        "reliability": found.get(kept, found).to_dict("list"),
    }


def kind_of(row: str, adapters: Mapping[str, Adapter]) -> str:
    """adapter, ceiling (reads the verifier's own states alone), drafter or floor."""
    if row in adapters:
        return "ceiling" if adapters[row].reads == "verifier" else "adapter"
    return "drafter" if row == DRAFTER else "floor"


def label_of(row: str, adapters: Mapping[str, Adapter]) -> str:
    """How a row is called in tables."""
    if row in adapters:
        return f"{row} (reads the verifier)" if adapters[row].reads == "verifier" else row
    return next(name for name, key in FLOORS.items() if key == row)


def floor_counts(training: Sequence[list[int]], answers: Sequence[list[int]],
                 prompts: Sequence[list[int]], gamma: int) -> dict[str, tuple[Counts, Counts]]:
    """Counts of the floors on positions 1 … n-1 of each answer, the drafter's own left to the
    caller."""
    counted = {}
    for floor in (floors.PositionMode(training), floors.NGram(training,
                                                              4), floors.PromptLookup(prompts)):
        matches = [hit[1:] for hit in floor.match(answers)]
        each = floor.rounds(answers, gamma, start=1).per_request()
        matched = np.array([hit.sum() for hit in matches]), np.array([len(hit) for hit in matches])
        counted[FLOORS[floor.name]] = matched, (each["accepted"], each["rounds"])
    return counted


def token_table(held_out: HeldOut, arms: Mapping[str, drafts.Drafts],
                texts: Sequence[str]) -> pd.DataFrame:
    """The token table of xsd/evaluate/table.py: every level and the drafter alone, a row a drafted
    position (the first is position 0)."""
    stored = held_out.dataset.table()
    answers = extraction.answers(held_out.dataset)
    pieces = []
    for level, arm in arms.items():
        for i, (key, ids) in enumerate(zip(held_out.keys, answers, strict=True)):
            if len(ids) < 2:
                continue
            pieces.append(
                pd.DataFrame({
                    "level": level, "sample": key, "sequence": held_out.clusters[i],
                    "clip": stored["clip"].iloc[i], "question": stored["question"].iloc[i],
                    "position": np.arange(len(ids) - 1), "cosine": arm.cosine[i].astype(np.float64),
                    "match": arm.match[i],
                    "draft_token": [texts[token] for token in arm.ids[i].tolist()
                                    ], "verifier_token": [texts[token] for token in ids[1:]],
                    "draft_probability": arm.probability[i].astype(np.float64),
                }))
    return pd.concat(pieces, ignore_index=True)


def _nested(by_kind: pd.DataFrame) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for row in by_kind.to_dict("records"):
        figure = {key: row[key] for key in ("value", "low", "high", "n", "n_clusters")}
        out.setdefault(row["data"], {}).setdefault(row["level"], {})[row["kind"]] = figure
    return out
