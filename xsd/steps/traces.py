"""Token ids of two models that ran elsewhere, imported as a run: agreement, duplicates, floors,
replayed schedules. No model is loaded.

::

    {"question": "…", "rows": [{"clip": 0, "drafter_ids": [512, …], "verifier_ids": [450, …]}, …]}

A row may name its own ``question`` and ``sequence``. Without sequences the rows are cut, in file
order, into blocks of neighbouring clips (overlapping clips are near duplicates). A floor is trained
on the other blocks only, and blocks are what intervals draw.

The drafter's ids come from its *own* text (free-running), so "agreement" compares the same place in
two texts; what the drafter would have said after the verifier's prefix cannot be known from such a
file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xsd.core import DatasetError, ParameterError
from xsd.decode import replay
from xsd.decode.prices import Prices
from xsd.evaluate import floors, statistics
from xsd.evaluate.acceptance import Acceptance, Rounds
from xsd.files import provenance, sha256_of, write_json
from xsd.runs import folder

EOS = 2
"""Of the Llama vocabulary, which both 7B models use."""


@dataclass(frozen=True)
class Trace:
    """One answer of each model to the same question about the same clip."""

    clip: str
    sequence: str
    question: str
    drafter_ids: tuple[int, ...]
    verifier_ids: tuple[int, ...]


def read(path: str | Path, *, blocks: int = 10) -> list[Trace]:
    """The rows of a trace file, each with a sequence (its own, or ``block NN``).

    Raises: DatasetError naming the row when the file is missing, is no such JSON, or a row lacks a
    field, has ids that are not whole
    numbers from 0 on, or no verifier token; also when there is no row.
    """
    path = Path(path)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        rows, question = loaded["rows"], loaded.get("question", "")
    except FileNotFoundError as error:
        raise DatasetError(f"there is no trace file {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = "{question, rows: [{clip, drafter_ids, verifier_ids}]}"
        raise DatasetError(f"{path} is no trace file ({error}); expected {form}") from error
    if not isinstance(rows, list):
        raise DatasetError(f"{path}: rows must be a list of objects, not {type(rows).__name__}")
    count = min(blocks, len(rows))
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {"clip", "drafter_ids", "verifier_ids"} <= row.keys():
            raise DatasetError(f"{path}: row {i} lacks clip, drafter_ids or verifier_ids")
        ids = {}
        for name in ("drafter_ids", "verifier_ids"):
            values = row[name]
            if not isinstance(values, list) or not all(
                    isinstance(value, int) and value >= 0 for value in values):
                raise DatasetError(
                    f"{path}: {name} of row {i} must be a list of token ids (whole numbers from 0 "
                    "on)"
                )
            ids[name] = tuple(values)
        if not ids["verifier_ids"]:
            raise DatasetError(f"{path}: row {i} has no verifier token; drop it")
        sequence = str(row.get("sequence", f"block {i * count // len(rows):02d}"))
        found.append(Trace(str(row["clip"]), sequence, str(row.get("question", question)), **ids))
    if not found:
        raise DatasetError(f"{path} holds no row; export the answers again")
    return found


def write(path: str | Path, traces: Sequence[Trace]) -> None:
    """The same file format, so that a run of this project can be handed on."""
    rows = [{
        "clip": t.clip, "sequence": t.sequence, "question": t.question,
        "drafter_ids": t.drafter_ids, "verifier_ids": t.verifier_ids
    } for t in traces]
    write_json(path, {"question": "", "rows": rows})


@dataclass(frozen=True)
class Arm:
    """One way of drafting, tried on every answer. match: per answer bool [n], next token after the
    verifier's prefix (drafter tokens: the token at the same place). rounds: draft–verify rounds at
    gamma. draft: answer number → what would be drafted after a prefix."""

    name: str
    match: list[np.ndarray]
    rounds: Rounds
    draft: Callable[[int], Callable[[Sequence[int], int], Sequence[int]]]


def arms(traces: Sequence[Trace], *, gamma: int = 5, ngram: int = 4) -> list[Arm]:
    """Drafter tokens, position mode and n-gram; the two tables never see the sequence they are
    tried on, so one sequence alone has none."""
    answers = [list(trace.verifier_ids) for trace in traces]
    made = [
        _whole("drafter tokens", floors.DrafterTokens([trace.drafter_ids for trace in traces]),
               answers, gamma)
    ]
    sequences = list(dict.fromkeys(trace.sequence for trace in traces))
    if len(sequences) < 2:
        return made
    for name, build in (("position mode", floors.PositionMode),
                        (f"{ngram}-gram", lambda known: floors.NGram(known, ngram))):
        tables = {}
        for held_out in sequences:
            tables[held_out] = build([
                answer for answer, trace in zip(answers, traces, strict=True)
                if trace.sequence != held_out
            ])
        made.append(
            _whole(name, floors.Floor(name, [tables[trace.sequence].rule(0) for trace in traces]),
                   answers, gamma))
    return made


def _whole(name: str, floor: floors.Floor, answers: list[list[int]], gamma: int) -> Arm:
    def draft(sample: int) -> Callable[[Sequence[int], int], Sequence[int]]:
        return lambda prefix, room: floor.draft(prefix, room, sample)

    return Arm(name, floor.match(answers), floor.rounds(answers, gamma), draft)


def token_table(traces: Sequence[Trace], tried: Sequence[Arm], *, data: str) -> pd.DataFrame:
    """The project's token table (evaluate/table.py), ``level`` being the arm; tokens are shown by
    their ids, states were not kept (NaN)."""
    rows = []
    for arm in tried:
        for i, (trace, hits) in enumerate(zip(traces, arm.match, strict=True)):
            ids, say = list(trace.verifier_ids), arm.draft(i)
            for position, hit in enumerate(hits):
                drafted = say(ids[:position], 1)
                rows.append(
                    (arm.name, f"{trace.sequence}/{trace.clip}/{i:05d}",
                     trace.sequence, position, np.nan, bool(hit), data, trace.question,
                     str(drafted[0]) if len(drafted) else "", str(ids[position])))  # fmt: skip
    names = [
        "level", "sample", "sequence", "position", "cosine", "match", "data", "question",
        "draft_token", "verifier_token"
    ]
    return pd.DataFrame(rows, columns=names)


def schedule(traces: Sequence[Trace], arm: Arm, *, gamma: int, gamma_prefill: int, eos: int = EOS,
             prices: Prices | None = None) -> dict[str, Any]:
    """What decoding with this arm would have done, walked by decode.replay: rounds, verifier passes
    and tokens; seconds with prices.

    passes: verifier calls after the prefill. tokens_per_pass: 1 is the verifier alone.
    """
    plain, passes, seconds, alone = 0, 0, 0.0, 0.0
    limit = max(len(trace.verifier_ids)
                for trace in traces)  # the longest answer is taken for the run's maximum length
    for i, trace in enumerate(traces):
        answer = list(trace.verifier_ids)
        walked = replay.replay(answer, arm.draft(i), gamma=gamma, gamma_prefill=gamma_prefill,
                               eos_token_ids=frozenset({eos}), max_new_tokens=limit)
        passes += sum(each.rows > 0 for each in walked)
        plain += len(answer) - 1
        if prices is not None:
            seconds += replay.predicted_seconds(walked, prices)
            alone += prices.verifier_prefill_s + (len(answer) - 1) * prices.verify_s(1)
    found: dict[str, Any] = {
        "passes": passes, "passes_alone": plain,
        "tokens_per_pass": plain / passes if passes else float(plain)
    }
    if prices is not None:
        found["predicted_s"], found["predicted_alone_s"], found[
            "predicted_speedup"] = seconds, alone, alone / seconds
    return found


def read_prices(path: str | Path) -> Prices:
    """``{verifier_prefill_s, drafter_prefill_s, draft_s, verify: {"1": s, "6": s, …}}``. Raises:
    ParameterError naming what is wrong."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        verify = {int(rows): float(seconds) for rows, seconds in stored["verify"].items()}
        return Prices(float(stored["verifier_prefill_s"]),
                             float(stored["drafter_prefill_s"]), float(stored["draft_s"]), verify)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParameterError(
            f"{path} holds no prices ({type(error).__name__}: {error}); expected "
            "verifier_prefill_s, drafter_prefill_s, draft_s and verify "
            "(rows → seconds)") from error


def run(path: str | Path, run_dir: str | Path, *, gamma: int = 5, gamma_prefill: int = 0,
        ngram: int = 4, blocks: int = 10, prices: str | Path | None = None, resamples: int = 2000,
        seed: int = 0,
        ) -> dict[str, Any]:
    """Import a trace file: writes ``tokens.parquet`` and ``results/traces.json`` into the run
    folder and returns the results.

    Raises: DatasetError for a bad file, ParameterError for gamma below 1 or unreadable prices.
    """
    if gamma < 1 or gamma_prefill < 0 or blocks < 2:
        raise ParameterError(
            f"gamma {gamma}, gamma_prefill {gamma_prefill} and blocks {blocks} must be at least 1, "
            "0 and 2"
        )
    traces = read(path, blocks=blocks)
    priced = None if prices is None else read_prices(prices)
    clusters = [trace.sequence for trace in traces]
    tried = arms(traces, gamma=gamma, ngram=ngram)
    results: dict[str, Any] = {
        "n": len(traces), "n_sequences": len(set(clusters)), "gamma": gamma,
        "gamma_prefill": gamma_prefill, "duplicates": {
            role: duplicates([getattr(trace, f"{role}_ids") for trace in traces])
            for role in ("drafter", "verifier")
        }, "arms": {}, "provenance": provenance(seed=seed, data_hash=sha256_of(path),
                                                source=Path(path).name),
    }
    for arm in tried:
        hits, lengths = [int(match.sum())
                         for match in arm.match], [len(match) for match in arm.match]
        each = arm.rounds.per_request()
        rate = statistics.bootstrap_ratio(hits, lengths, clusters, n_resamples=resamples, seed=seed)
        mean = statistics.bootstrap_ratio(each["accepted"], each["rounds"], clusters,
                                          n_resamples=resamples, seed=seed)
        results["arms"][arm.name] = {
            "token_acceptance": _figure(rate), "mean_accepted": _figure(mean),
            "marginal": list(Acceptance.of(arm.rounds).marginal), "by_position": by_position(arm),
            "schedule": schedule(traces, arm, gamma=gamma, gamma_prefill=gamma_prefill,
                                 prices=priced),
        }
    folder.save_tokens(run_dir, token_table(traces, tried, data=Path(path).stem))
    folder.save_results(run_dir, "traces", results)
    return results


def duplicates(answers: Sequence[Sequence[int]]) -> dict[str, float]:
    """shared: share of answers that another one equals; repeated: share that could go without
    losing a text. Empty answers are left out."""
    said = [ids for ids in answers if ids]
    if not said:
        return {"shared": 0.0, "repeated": 0.0, "n": 0}
    rate = floors.duplicate_rate(said)
    return {"shared": rate.shared, "repeated": rate.repeated, "n": rate.n}


def by_position(arm: Arm) -> list[dict[str, float]]:
    """Share of answers whose token at each position is the arm's, over the answers that are that
    long."""
    longest = max(len(match) for match in arm.match)
    columns = [[bool(match[t]) for match in arm.match if len(match) > t] for t in range(longest)]
    return [{"position": t, "share": float(np.mean(column)), "n": len(column)}
            for t, column in enumerate(columns)]


def _figure(interval: statistics.Interval) -> dict[str, Any]:
    low, high = (None if bound != bound else bound for bound in (interval.low, interval.high))
    return {
        "value": interval.value, "low": low, "high": high, "n": interval.n,
        "n_clusters": interval.n_clusters
    }


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row an arm: share of right tokens and mean accepted length with intervals, verifier
    passes, tokens a pass, first positions."""
    rows = []
    for name, arm in results["arms"].items():
        row = {"arm": name}
        for key in ("token_acceptance", "mean_accepted"):
            row |= {
                key: arm[key]["value"], f"{key}_low": arm[key]["low"], f"{key}_high": arm[key]
                                                                                      ["high"]
            }
        row["tokens_per_pass"] = arm["schedule"]["tokens_per_pass"]
        if "predicted_speedup" in arm["schedule"]:
            row["predicted_speedup"] = arm["schedule"]["predicted_speedup"]
        row["first_positions"] = " ".join(f"{100 * each['share']:.0f}"
                                          for each in arm["by_position"][:9])
        rows.append(row)
    return pd.DataFrame(rows)


def text(results: Mapping[str, Any]) -> str:
    """The results for a terminal."""
    alone = results["n_sequences"] < 2
    rounds = f"accepted a round (γ={results['gamma']})"
    lines = [
        f"{results['n']} pairs of answers in {results['n_sequences']} sequences or blocks",
        *(f"{role}: {rate['shared']:.1%} of the answers equal another one, {rate['repeated']:.1%} "
          "repeat an earlier one"
          for role, rate in results["duplicates"].items()),
        *(["one sequence alone: there is nothing to train the tables on"] if alone else []),
        f"{'drafted by':<16}{'right tokens':>26}{rounds:>32}{'tokens a pass':>15}   % right at "
        "position 0, 1, …",
    ]
    for row in table(results).to_dict("records"):
        shown = [
            _bounded(row, "token_acceptance", 100, ".1f"),
            _bounded(row, "mean_accepted", 1, ".2f")
        ]
        speed = f"  predicted speed-up {row['predicted_speedup']:.2f}x" if "predicted_speedup" in row else ""
        lines.append(
            f"{row['arm']:<16}{shown[0]:>26}{shown[1]:>32}{row['tokens_per_pass']:>15.2f}   "
            f"{row['first_positions']}{speed}"
        )
    return "\n".join(lines)


def _bounded(row: Mapping[str, Any], key: str, scale: float, form: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    bounds = "" if low is None or high is None or low != low or high != high else f" [{scale * low:{form}}, {scale * high:{form}}]"
    return f"{scale * row[key]:{form}}{' %' if scale == 100 else ''}{bounds}"
