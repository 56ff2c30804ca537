"""``xsd evaluate``: any adapters on any stored pairs, with any head, all by path; no run folder is
needed. What notebook 13 prints of one held-out set, without its arms (docs/metrics.md, section 9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from xsd.core import MetricError
from xsd.evaluate import reliability, table, tables
from xsd.files import atomic_write, provenance
from xsd.runs import folder
from xsd.steps import evaluation, extraction, full_report, predictions, training, truth


def judge(adapters: Sequence[str], pairs: str, out: str | Path, *, head: str = "", train: str = "",
          mode: str | None = None, gamma: int = 5, gamma_prefill: int = 10, top_k: int = 5,
          thresholds: Sequence[float] = (0.8, 0.85, 0.9, 0.95), batch_size: int = 64,
          device: str = "auto",
          timing: str | Mapping[str, float] = "reference", n_resamples: int = 400,
          seed: int = 0) -> str:
    """Write ``report.txt``, ``tokens.parquet``, ``tables/*.{csv,md,tex}`` and
    ``results/evaluate.json`` into ``out`` and return the report.

    pairs, train: as notebooks take data by path. Without ``train`` there are no floors of training
    answers and nothing is compared with its sequences. Raises: as the steps of 04 and 13.
    """
    draws = {"n_resamples": n_resamples, "seed": seed}
    levels, answers = training.load(out, adapters, device), []
    held_out = evaluation.held_out(out, pairs, mode, head)
    if train:
        trained_on = extraction.open_pairs(out, "train", train)
        extraction.remember(out, "train", [trained_on])
        evaluation.check_leakage(out, [held_out])
        answers = evaluation.training_answers(out, train)
    tokens = table.measure(levels, held_out, gamma=gamma, top_k=top_k, batch_size=batch_size,
                           kinds=evaluation.token_kinds)
    floors = evaluation.floor_rows(held_out, answers, gamma)
    own = tokens[tokens["level"] != table.DRAFTER]
    counted = pd.concat([table.counts(one, gamma) for one in (floors, tokens) if len(one)])
    counted = counted.assign(arm=truth.LOOP).astype({"level": str, "sequence": str})
    reliable = reliability.figures(own, thresholds=thresholds, **draws)
    found = {"metrics": truth.metrics(own, reliable, thresholds=thresholds, top_k=top_k,
                                      gamma=gamma, **draws)}
    if set(counted["level"]) == set(levels):
        raise MetricError(f"{pairs} holds neither prompts nor tokens of the drafter, so there is "
                          "no floor to compare with; name the training set too (--train)")
    found["headline"], found["floors"] = truth.headline(counted, **draws)
    timed = predictions.timings(timing, levels, held_out, run_dir=out, gamma=gamma,
                                gamma_prefill=gamma_prefill)
    found |= predictions.speedups(counted, timed)
    place = folder.resolve(out)
    for name, rows in found.items():
        tables.write(rows, place / "tables" / name)
    text = "\n".join(full_report.text_of(held_out.name, level, found, gamma, timed.get(level))
                     for level in levels)
    atomic_write(place / "report.txt", text)
    folder.save_tokens(out, table.join({held_out.name: table.drafted(tokens)}))
    given = {"adapters": list(adapters), "pairs": pairs, "head": head, "train": train}
    data_hash = str(held_out.dataset.manifest["config"].get("data_hash", ""))
    rows = {name: frame.to_dict("records") for name, frame in found.items()}
    folder.save_results(out, "evaluate", rows | {"provenance": provenance(
        seed=seed, data_hash=data_hash, parameters=given)})
    return text
