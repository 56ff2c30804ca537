"""Measure arms side by side, sample by sample, into a file that survives an interruption; then say
what was measured.

Arms are interleaved (each sample runs through all of them, the order rotating) so that a machine
that warms up or slows down does so for all alike. Every record carries the ids' equality with the
verifier's own output; a speed-up of a lossless arm that is not is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from xsd.bench.arms import Arm, available_cores
from xsd.core import Generation, LosslessError, MetricError, ParameterError, Sample, StorageError
from xsd.decode import autoregressive, certificate
from xsd.evaluate import statistics
from xsd.files import provenance

Record = dict[str, Any]
SLOW_BASELINE = 1.05
"""Own AR loop over HF generate: above this the report carries an alarm, for a slow baseline
flatters every arm."""


def measure(arms: Sequence[Arm], samples: Sequence[Sample], *, path: str | os.PathLike[str],
            max_new_tokens: int, repeats: int = 1, warmup: int = 1, seed: int = 0,
            about: Mapping[str, Any] | None = None, progress: Callable[[int], None] | None = None,
            ) -> list[Record]:
    """Run every arm on every sample ``repeats`` times; append to ``path`` (JSON lines, a header
    first) and return all its records.

    What the file already holds is not run again; a half-written last line is dropped. warmup:
    samples that every arm runs first, without a record. seed: the arms' first order. about: goes
    into the provenance that the file is begun with. progress(n): called with the number of records
    just made.

    Raises: ParameterError for two arms of one name, no arm, or a file of another configuration;
    StorageError when the file is being written
    by another run or cannot be written.
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
    with _open_records(Path(path), header, about) as (records, append):
        done = {(r["arm"], r["sample"], r["repeat"]) for r in records}
        own = {r["sample"]: r["ids"] for r in records if r["arm"] == "ar"}
        todo = [
            s for s in samples
            if any((name, s.key, k) not in done for name in names for k in range(repeats))
        ]
        for sample in todo[:warmup]:
            for arm in order:
                arm.run(sample, max_new_tokens)
        for number, sample in enumerate(samples):
            made: list[tuple[Arm, int, Generation]] = []
            for repeat in range(repeats):
                turn = (number + repeat) % len(order)
                for arm in order[turn:] + order[:turn]:
                    if (arm.name, sample.key, repeat) not in done:
                        made.append((arm, repeat, arm.run(sample, max_new_tokens)))
            if not made:
                continue
            reference = own.get(sample.key) or next(
                (list(g.ids) for arm, _, g in made if arm.name == "ar"), None)
            if reference is None:
                reference = list(autoregressive.generate(verifier, sample, max_new_tokens).ids)
            fresh = [
                _record(arm, sample, repeat, generation, reference)
                for arm, repeat, generation in made
            ]
            append(fresh)
            records += fresh
            if progress is not None:
                progress(len(fresh))
    return records


def _record(arm: Arm, sample: Sample, repeat: int, generation: Generation,
            reference: Sequence[int]) -> Record:
    ids = list(generation.ids)
    verdict = certificate.certify(arm.verifier, sample, reference, ids)
    return {
        "arm": arm.name, "lossless": arm.lossless, "baseline": arm.baseline, "sample": sample.key,
        "sequence": sample.sequence, "clip": sample.clip, "question": sample.question,
        "repeat": repeat, "ids": ids, "ids_hash": ids_hash(ids), "n_tokens": len(ids),
        "finish": generation.finish, "first_token_s": generation.first_token_s,
        "total_s": generation.total_s, "rounds": [{
            "phase": r.phase, "drafted": list(r.drafted), "accepted": r.n_accepted, "bonus": r.bonus
        } for r in generation.rounds], "n_drafted": sum(len(r.drafted) for r in generation.rounds),
        "n_accepted": sum(r.n_accepted for r in generation.rounds),
        "identical_to_ar": ids == list(reference), "verdict": {
            k: v for k, v in dataclasses.asdict(verdict).items() if v is not None and v != ""
        },
    }


def ids_hash(ids: Iterable[int]) -> str:
    """First 16 hex digits of SHA-256 over the ids as decimal text."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """All whole records of a file, without its header. Raises: StorageError when the file is
    missing or has no header."""
    return _read(Path(path))[1]


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Where the records come from: files.provenance as it was when the file was begun. Raises:
    StorageError as :func:`read_records`."""
    return _lines(Path(path))[0][0].get("provenance", {})


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Record], int]:
    """Header, records, and the number of bytes that are whole lines."""
    lines, whole = _lines(path)
    return (lines[0]["header"] if whole else None), lines[1:], whole


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}; run the benchmark first") from error
    whole = data[:data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise StorageError(
            f"{path} is damaged ({error}); move it away and measure again") from error
    if not lines:
        return [{}], 0
    if "header" not in lines[0]:
        raise StorageError(
            f"{path} is no record file of this benchmark (its first line is no header); choose "
            "another path"
        )
    return lines, len(whole)


@contextlib.contextmanager
def _open_records(
    path: Path, header: dict[str, Any], about: Mapping[str, Any] | None = None
) -> Iterator[tuple[list[Record], Callable[[Sequence[Record]], None]]]:
    """Lock the file, check or write its header, drop a half-written line; yield the records and a
    durable append."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; check the folder or choose another "
            "one"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"{path} is being written by another run; wait for it or choose another path"
            ) from error
        found, records, whole = _read(path)
        file.truncate(whole)

        def append(rows: Sequence[Any]) -> None:
            try:
                file.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise StorageError(
                    f"cannot write {path}: {error.strerror or error}; free space and run again, it "
                    "continues there"
                ) from error

        if found is None:
            append([{
                "header": header,
                "provenance": provenance(**{"seed": header.get("seed"), **(about or {})})
            }])
        elif found != json.loads(json.dumps(header)):
            other = ", ".join(key for key in header
                              if found.get(key) != json.loads(json.dumps(header[key])))
            raise ParameterError(
                f"{path} was measured with another configuration ({other} differ); choose another "
                "path or the same settings"
            )
        yield records, append


# --- what the records say
# ------------------------------------------------------------------------------------------------


def summarise(records: Sequence[Record], *, allow_near_ties: bool = False,
              n_resamples: int = statistics.N_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Figures per arm over the samples that every arm has run; intervals are cluster bootstraps by
    sequence, paired by sample.

    ``speedup_total``: Σ baseline time / Σ arm time. ``speedup_mean``: mean over samples of baseline
    time / arm time; the two differ, both are given. The baseline is the fastest of the baseline
    arms in total. Times are medians over repeats.

    Raises: LosslessError for a lossless arm whose ids differ from the verifier's own; MetricError
    without a baseline or a common sample.
    """
    _require_lossless(records, allow_near_ties)
    by_arm: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_arm[record["arm"]][record["sample"]].append(record)
    common = sorted(set.intersection(*(set(runs) for runs in by_arm.values()))) if by_arm else []
    baselines = sorted({r["arm"] for r in records if r["baseline"]})
    if not common or not baselines:
        raise MetricError(
            f"{len(by_arm)} arms share {len(common)} samples and {len(baselines)} of them are "
            "baselines; measure 'ar' beside the others"
        )
    clusters = [by_arm[baselines[0]][key][0]["sequence"] for key in common]
    seconds = {
        arm: [median(r["total_s"] for r in runs[key]) for key in common]
        for arm, runs in by_arm.items()
    }
    fastest = min(baselines, key=lambda arm: sum(seconds[arm]))
    options = {"n_resamples": n_resamples, "seed": seed}
    out: dict[str, Any] = {
        "baseline": fastest, "n_samples": len(common), "n_sequences": len(set(clusters)),
        "arms": {}, "alarms": []
    }
    for arm, runs in by_arm.items():
        ratios = [base / own for base, own in zip(seconds[fastest], seconds[arm], strict=True)]
        row = {
            "lossless": runs[common[0]][0]["lossless"],
            "identical": sum(all(r["identical_to_ar"] for r in runs[key])
                             for key in common), "speedup_total": _plain(
                                 statistics.bootstrap_ratio(seconds[fastest], seconds[arm],
                                                            clusters, **options)),
            "speedup_mean": _plain(statistics.bootstrap_mean(ratios, clusters, **options)),
            "slower_share": _plain(
                statistics.bootstrap_mean([float(ratio < 1) for ratio in ratios], clusters,
                                          **options)), "total_ms": 1e3 * mean(seconds[arm]),
            "first_token_ms": 1e3 *
                              mean(median(r["first_token_s"] for r in runs[key]) for key in common),
            "n_tokens": sum(runs[key][0]["n_tokens"] for key in common),
        }
        further = [(median(r["total_s"] - r["first_token_s"]
                           for r in runs[key]), runs[key][0]["n_tokens"] - 1) for key in common]
        steps = sum(n for _, n in further)
        row["decode_ms_per_token"] = 1e3 * sum(s for s, _ in further) / steps if steps else None
        row |= _acceptance([runs[key][0] for key in common], clusters, options)
        out["arms"][arm] = row
    if "ar" in seconds and "hf_generate" in seconds:
        ratio = sum(seconds["ar"]) / sum(seconds["hf_generate"])
        if ratio > SLOW_BASELINE:
            out["alarms"].append(
                f"the own AR loop takes {ratio:.2f}× the time of HF generate; speed-ups against it "
                "would flatter"
            )
    return out


def _acceptance(runs: Sequence[Record], clusters: Sequence[str],
                options: dict[str, Any]) -> dict[str, Any]:
    """Rounds that drafted something; the prefill phase apart from the rounds after it. Tokens a
    verification include its bonus."""
    out: dict[str, Any] = {}
    for phase in ("prefill_hiding", "decode"):
        rounds = [[r for r in run["rounds"] if r["phase"] == phase and r["drafted"]]
                  for run in runs]
        n_rounds = [len(each) for each in rounds]
        if not sum(n_rounds):
            continue
        accepted = [sum(r["accepted"] for r in each) for each in rounds]
        drafted = [sum(len(r["drafted"]) for r in each) for each in rounds]
        tokens = [sum(r["accepted"] + (r["bonus"] is not None) for r in each) for each in rounds]
        out[phase] = {
            "rounds": sum(n_rounds), "drafted": sum(drafted), "accepted": sum(accepted),
            "acceptance_rate": _plain(
                statistics.bootstrap_ratio(accepted, drafted, clusters, **options)),
            "mean_accepted_per_round": _plain(
                statistics.bootstrap_ratio(tokens, n_rounds, clusters, **options)),
        }
    return out


def _require_lossless(records: Sequence[Record], allow_near_ties: bool) -> None:
    bad = [r for r in records if r["lossless"] and not r["identical_to_ar"]]
    if allow_near_ties:
        bad = [r for r in bad if r["verdict"]["outcome"] != "near-tie"]
    if bad:
        first = bad[0]
        why = first["verdict"]
        raise LosslessError(
            f"{len(bad)} outputs of lossless arms differ from the verifier's own, first "
            f"{first['arm']} on {first['sample']} at token "
            f"{why.get('position')} ({why['outcome']}: {why.get('reason', '')}); no speed-up is "
            "reported for them"
        )


def _plain(interval: statistics.Interval) -> dict[str, Any]:
    """JSON has no NaN: an unknown bound is null."""
    return {
        k: None if isinstance(v, float) and v != v else v
        for k, v in dataclasses.asdict(interval).items()
    }
