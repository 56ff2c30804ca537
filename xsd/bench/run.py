"""Measure arms side by side, interleaved sample by sample, so that a machine that warms up or slows
down does so for all alike; then say what was measured."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from xsd.bench import speedups
from xsd.bench.arms import BASELINES, Arm, available_cores, label_of
from xsd.bench.records import Record, open_records
from xsd.core import Generation, ParameterError, Sample
from xsd.decode import autoregressive, certificate
from xsd.evaluate import statistics

SLOW_BASELINE = 1.05
"""Own greedy loop over any of transformers': above this the report carries an alarm, for a slow
baseline flatters every arm."""
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
            began = _clocks()
            made = [(arm, k, arm.run(sample, max_new_tokens))
                    for k in range(repeats) for arm in _in_turn(order, number, k)
                    if (arm.name, sample.key, k) not in done]
            if not made:
                continue
            wall, own_cpu, busy = (now - then for now, then in zip(_clocks(), began, strict=True))
            # a system that does not even count this process (NaN, or some sandboxes) says nothing
            others = round(max(0.0, busy - own_cpu) / wall, 3) if busy > own_cpu / 2 else None
            reference = own.get(sample.key) or next(
                (list(g.ids) for arm, _, g in made if arm.name == "ar"), None)
            if reference is None:
                reference = list(autoregressive.generate(verifier, sample, max_new_tokens).ids)
            fresh = [_record(arm, sample, k, generation, reference) | {"others": others}
                     for arm, k, generation in made]
            append(fresh)
            records += fresh
            if progress is not None:
                progress(len(fresh))
    return records


def _in_turn(order: Sequence[Arm], turn: int, repeat: int) -> list[Arm]:
    """Zigzag from another arm in every turn, backwards in every second repeat, so that each arm
    follows every other about equally often (Williams 1949)."""
    first = turn + repeat * (len(order) // 2)
    steps = [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(len(order))]
    row = [order[(first + step) % len(order)] for step in steps]
    return row[::-1] if repeat % 2 else row


def _clocks() -> tuple[float, float, float]:
    """Seconds on the clock, CPU seconds of this process and of everybody, both divided by the
    number of cores that this process may use (everybody's on these; NaN where nobody says)."""
    cores, everybody = available_cores(), float("nan")
    with contextlib.suppress(OSError, AttributeError):
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [list(map(int, line[1:9])) for line in lines if line[0] in names]
        everybody = sum(sum(row) - row[3] - row[4] for row in ticks) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), time.process_time() / cores, everybody / cores


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
                    "bonus": r.bonus, **({"parents": list(r.parents)} if r.parents else {})}
                   for r in rounds],
        "n_drafted": sum(len(r.drafted) for r in rounds),
        "n_accepted": sum(r.n_accepted for r in rounds),
        "identical_to_ar": ids == list(reference),
        **({} if arm.lossless else {"changed": sum(
            a != b for a, b in itertools.zip_longest(ids, reference))}),
        "verdict": {key: value for key, value in verdict.items() if value not in (None, "")},
    }


def ids_hash(ids: Iterable[int]) -> str:
    """First 16 hex digits of SHA-256 over the ids as decimal text."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


# --- what the records say ---


def summarise(records: Sequence[Record], *, allow_near_ties: bool = False,
              n_resamples: int = statistics.N_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Figures per arm over the samples that every arm has run; times are medians over repeats.

    Returns: baseline, n_samples, n_clusters, alarms, and arms by name: ``speedup`` (of
    :func:`speedups.of`); total_ms, its first_token_ms and decode_ms, decode_ms_per_token; identical
    (samples) and tokens; changed (share of ids) of a lossy arm; accepted drafts per round and
    drafts per round, apart for the rounds (accepted_per_round) and the prefill phase
    (hidden_accepted), over rounds that drafted something.

    Raises: LosslessError for a lossless arm whose ids differ from the verifier's own; MetricError
    without a baseline or a common sample.
    """
    certificate.require_lossless(
        ((f"{r['arm']} on {r['sample']}", certificate.Verdict(**r["verdict"]))
         for r in records if r["lossless"]), allow_near_ties=allow_near_ties)
    speed = speedups.of(records, n_resamples=n_resamples, seed=seed)
    times, baseline, clusters = speedups.seconds(records)
    runs = {arm: [] for arm in times}
    for record in records:
        if record["sample"] in times.index:
            runs[record["arm"]].append(record)
    options = {"n_resamples": n_resamples, "seed": seed}
    rows = {arm: {"speedup": speed[arm], **_summary(pd.DataFrame(some), clusters, options)}
            for arm, some in runs.items()}
    total = times.sum()
    own = min((total[arm] for arm in ("ar", "ar_all_cores") if arm in total), default=None)
    alarms = [f"the own greedy loop takes {own / total[arm]:.2f}× the time of {label_of(arm)}; "
              "speed-ups against it would flatter"
              for arm in BASELINES[2:] if own is not None and arm in total
              and own > SLOW_BASELINE * total[arm]]
    return {"baseline": baseline, "n_samples": len(times), "n_clusters": clusters.nunique(),
            "arms": rows, "alarms": alarms}


def _summary(runs: pd.DataFrame, clusters: pd.Series, options: dict[str, int]) -> dict[str, Any]:
    """One arm's records, all repeats of the samples in ``clusters``."""
    def ratio(above: pd.Series, below: pd.Series | int = 1) -> dict[str, Any]:
        one = pd.DataFrame({"above": above, "below": below}, index=clusters.index)
        found = statistics.bootstrap_ratio(one["above"], one["below"], clusters, **options)
        return {name: None if value != value else value
                for name, value in dataclasses.asdict(found).items()}

    runs = runs.assign(later_s=runs["total_s"] - runs["first_token_s"])
    each = runs.groupby("sample")
    ms = 1e3 * each[["total_s", "first_token_s", "later_s"]].median()
    tokens = each["n_tokens"].first()
    steps = int(tokens.sum()) - len(tokens)
    row = {
        "baseline": bool(runs["baseline"].iloc[0]), "total_ms": ratio(ms["total_s"]),
        "first_token_ms": float(ms["first_token_s"].mean()),
        "decode_ms": float(ms["later_s"].mean()),
        "decode_ms_per_token": float(ms["later_s"].sum()) / steps if steps else None,
        "identical": int(each["identical_to_ar"].all().sum()), "tokens": int(tokens.sum()),
    }
    if "changed" in runs:  # of a lossy arm: the share of ids that are not the verifier's own
        row["changed"] = float(each["changed"].first().sum() / tokens.sum())
    for phase, word in PHASES.items():
        rounds = pd.DataFrame([
            (record.sample, r["accepted"], len(r["drafted"])) for record in runs.itertuples()
            for r in record.rounds if r["phase"] == phase and r["drafted"]
        ], columns=["sample", "accepted", "drafted"]).groupby("sample")
        if len(rounds):
            n = rounds.size().reindex(clusters.index, fill_value=0)
            accepted = rounds["accepted"].sum().reindex(clusters.index, fill_value=0)
            row[word] = ratio(accepted, n)
            row[f"{word}_drafted"] = float(rounds["drafted"].sum().sum() / n.sum())
    return row
