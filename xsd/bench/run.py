"""Measure arms side by side, interleaved sample by sample, so that a machine that warms up or slows
down does so for all alike; then say what was measured."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from xsd.bench.arms import Arm, available_cores
from xsd.bench.records import Record, open_records
from xsd.core import Generation, MetricError, ParameterError, Sample
from xsd.decode import autoregressive, certificate
from xsd.evaluate import statistics

SLOW_BASELINE = 1.05
"""Own AR loop over HF generate: above this the report carries an alarm, for a slow baseline
flatters every arm."""
PHASES = {"decode": "accepted_per_round", "prefill_hiding": "hidden_accepted"}
"""The phases of a round, and what the accepted drafts of each are called in a summary."""


def measure(arms: Sequence[Arm], samples: Sequence[Sample], *, path: str | os.PathLike[str],
            max_new_tokens: int, repeats: int = 1, warmup: int = 1, seed: int = 0,
            about: Mapping[str, Any] | None = None,
            progress: Callable[[int], None] | None = None) -> list[Record]:
    """Run every arm on every sample ``repeats`` times; append to ``path`` (JSON lines, a header
    first) and return all its records.

    What the file already holds is not run again. warmup: samples that every arm runs first, without
    a record. seed: the arms' first order. about: as records.open_records. progress(n): n records
    were just made. Raises: ParameterError for two arms of one name or no arm; as open_records.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ParameterError(
            f"arms are {names}; give at least one, each with a name of its own (label=)")
    verifier = arms[0].verifier
    header = {
        "max_new_tokens": max_new_tokens, "repeats": repeats, "seed": seed,
        "arms": {arm.name: dict(arm.info) for arm in arms},
        "verifier": verifier.weights_hash() if hasattr(verifier, "weights_hash") else "",
        "threads": torch.get_num_threads(), "cores": available_cores(),
    }
    order = list(arms)
    random.Random(seed).shuffle(order)
    with open_records(Path(path), header, about) as (records, append):
        done = {(r["arm"], r["sample"], r["repeat"]) for r in records}
        own = {r["sample"]: r["ids"] for r in records if r["arm"] == "ar"}
        todo = (sample for sample in samples
                if any((name, sample.key, k) not in done
                       for name in names for k in range(repeats)))
        for sample in itertools.islice(todo, warmup):
            for arm in order:
                arm.run(sample, max_new_tokens)
        for number, sample in enumerate(samples):
            made = [(arm, k, arm.run(sample, max_new_tokens))
                    for k in range(repeats) for arm in _rotated(order, number + k)
                    if (arm.name, sample.key, k) not in done]
            if not made:
                continue
            reference = own.get(sample.key) or next(
                (list(g.ids) for arm, _, g in made if arm.name == "ar"), None)
            if reference is None:
                reference = list(autoregressive.generate(verifier, sample, max_new_tokens).ids)
            fresh = [_record(arm, sample, k, generation, reference) for arm, k, generation in made]
            append(fresh)
            records += fresh
            if progress is not None:
                progress(len(fresh))
    return records


def _rotated(order: Sequence[Arm], turn: int) -> list[Arm]:
    turn %= len(order)
    return [*order[turn:], *order[:turn]]


def _record(arm: Arm, sample: Sample, repeat: int, generation: Generation,
            reference: Sequence[int]) -> Record:
    ids, rounds = list(generation.ids), generation.rounds
    verdict = dataclasses.asdict(certificate.certify(arm.verifier, sample, reference, ids))
    return {
        "arm": arm.name, "lossless": arm.lossless, "baseline": arm.baseline, "sample": sample.key,
        "sequence": sample.sequence, "clip": sample.clip, "question": sample.question,
        "repeat": repeat, "ids": ids, "ids_hash": ids_hash(ids), "n_tokens": len(ids),
        "finish": generation.finish, "first_token_s": generation.first_token_s,
        "total_s": generation.total_s,
        "rounds": [{"phase": r.phase, "drafted": list(r.drafted), "accepted": r.n_accepted,
                    "bonus": r.bonus} for r in rounds],
        "n_drafted": sum(len(r.drafted) for r in rounds),
        "n_accepted": sum(r.n_accepted for r in rounds),
        "identical_to_ar": ids == list(reference),
        "verdict": {key: value for key, value in verdict.items() if value not in (None, "")},
    }


def ids_hash(ids: Iterable[int]) -> str:
    """First 16 hex digits of SHA-256 over the ids as decimal text."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


# --- what the records say ---


def summarise(records: Sequence[Record], *, allow_near_ties: bool = False,
              n_resamples: int = statistics.N_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Figures per arm over the samples that every arm has run; intervals are cluster bootstraps by
    sequence, paired by sample. Times are medians over repeats.

    Returns: baseline (the fastest in total), n_samples, n_clusters, alarms, and arms by name:
    ``speedup``, Σ baseline time / Σ arm time; ``speedup_of_samples``, the mean over samples of
    baseline time / arm time (the two differ); slower_share; total_ms, first_token_ms,
    decode_ms_per_token; identical (samples) and tokens; accepted drafts per round and drafts per
    round, apart for the rounds (accepted_per_round) and the prefill phase (hidden_accepted), over
    rounds that drafted something.

    Raises: LosslessError for a lossless arm whose ids differ from the verifier's own; MetricError
    without a baseline or a common sample.
    """
    certificate.require_lossless(
        ((f"{r['arm']} on {r['sample']}", certificate.Verdict(**r["verdict"]))
         for r in records if r["lossless"]), allow_near_ties=allow_near_ties)
    by_arm: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_arm[record["arm"]][record["sample"]].append(record)
    common = sorted(set.intersection(*(set(runs) for runs in by_arm.values()))) if by_arm else []
    baselines = sorted({r["arm"] for r in records if r["baseline"]})
    if not common or not baselines:
        raise MetricError(
            f"{len(by_arm)} arms share {len(common)} samples and {len(baselines)} of them are "
            "baselines; measure 'ar' beside the others")
    seconds = {arm: [median(r["total_s"] for r in runs[key]) for key in common]
               for arm, runs in by_arm.items()}
    fastest = min(baselines, key=lambda arm: sum(seconds[arm]))
    clusters = [by_arm[fastest][key][0]["sequence"] for key in common]
    rows = {arm: _summary([runs[key] for key in common], seconds[arm], seconds[fastest], clusters,
                          {"n_resamples": n_resamples, "seed": seed})
            for arm, runs in by_arm.items()}
    alarms = []
    if "ar" in seconds and "hf_generate" in seconds:
        ratio = sum(seconds["ar"]) / sum(seconds["hf_generate"])
        if ratio > SLOW_BASELINE:
            alarms = [f"the own AR loop takes {ratio:.2f}× the time of HF generate; speed-ups "
                      "against it would flatter"]
    return {"baseline": fastest, "n_samples": len(common), "n_clusters": len(set(clusters)),
            "arms": rows, "alarms": alarms}


def _summary(runs: Sequence[Sequence[Record]], own: Sequence[float], baseline: Sequence[float],
             clusters: Sequence[str], options: dict[str, int]) -> dict[str, Any]:
    """One arm. runs: the repeats of each sample. own, baseline: seconds of each sample."""
    def average(values: Sequence[float]) -> dict[str, Any]:
        return _plain(statistics.bootstrap_mean(values, clusters, **options))

    def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
        return _plain(statistics.bootstrap_ratio(above, below, clusters, **options))

    ratios = [base / one for base, one in zip(baseline, own, strict=True)]
    tokens = [repeats[0]["n_tokens"] for repeats in runs]
    later = [median(r["total_s"] - r["first_token_s"] for r in repeats) for repeats in runs]
    steps = sum(tokens) - len(tokens)
    row = {
        "baseline": runs[0][0]["baseline"], "speedup": ratio(baseline, own),
        "speedup_of_samples": average(ratios),
        "slower_share": average([float(one < 1) for one in ratios]),
        "total_ms": average([1e3 * one for one in own]),
        "first_token_ms": 1e3 * mean(median(r["first_token_s"] for r in one) for one in runs),
        "decode_ms_per_token": 1e3 * sum(later) / steps if steps else None,
        "identical": sum(all(r["identical_to_ar"] for r in repeats) for repeats in runs),
        "tokens": sum(tokens),
    }
    for phase, word in PHASES.items():
        rounds = [[r for record in repeats for r in record["rounds"]
                   if r["phase"] == phase and r["drafted"]] for repeats in runs]
        n_rounds = [len(each) for each in rounds]
        if sum(n_rounds):
            row[word] = ratio([sum(r["accepted"] for r in each) for each in rounds], n_rounds)
            drafted = sum(len(r["drafted"]) for each in rounds for r in each)
            row[f"{word}_drafted"] = drafted / sum(n_rounds)
    return row


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    """JSON has no NaN: an unknown bound is null."""
    return {name: None if value != value else value
            for name, value in dataclasses.asdict(interval).items()}
