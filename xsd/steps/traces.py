"""Token ids of two models as a run, without any model: agreement, duplicates, floors, replayed
schedules. Of models that ran elsewhere the file is::

    {"question": "…", "eos": [2], "rows": [
        {"clip": 0, "drafter_ids": [512, …], "verifier_ids": [450, …, 2]}, …]}

``eos``: the ids that end an answer (2, of Llama, where the file names none). A row may name its own
``question`` and ``sequence``; without sequences the rows are cut, in file order, into blocks of
neighbouring clips, which intervals draw. The drafter's ids come from its *own* text (free-running),
so "agreement" compares the same place in two texts."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xsd.adapters.base import Adapter
from xsd.core import DatasetError, ParameterError
from xsd.decode import replay, rules
from xsd.decode.prices import Prices
from xsd.evaluate import floors, rounds, statistics, table
from xsd.evaluate.held_out import HeldOut
from xsd.files import FolderLock, provenance, read_json, remove_leftovers, sha256_of, write_json
from xsd.runs import folder
from xsd.steps import evaluation, extraction, judge

EOS = frozenset({2})
"""Of the Llama vocabulary, which both 7B models use: taken where a file names none."""


@dataclass(frozen=True)
class Trace:
    """One answer of each model to the same question about the same clip."""

    clip: str
    sequence: str
    question: str
    drafter_ids: tuple[int, ...]
    verifier_ids: tuple[int, ...]
    unseen: str = ""  # what the tables never see, where that is a part of the sequence


def read(path: str | Path, *, blocks: int = 10) -> tuple[list[Trace], frozenset[int]]:
    """A trace file's rows, each with a sequence (its own, or ``block NN``), and the ids that end an
    answer. Raises: DatasetError naming the row, when the file is missing or none, a row lacks a
    field, has ids that are no token ids, no verifier token, or goes on behind its end; also when
    there is no row."""
    path, form = Path(path), "{question, eos, rows: [{clip, drafter_ids, verifier_ids}]}"
    if not path.is_file():
        held = "is a folder, and holds no stored pairs" if path.is_dir() else "is not there"
        raise DatasetError(f"there is no trace file {path} (it {held}); give a trace file or what "
                           "xsd data extract wrote")
    loaded = read_json(path, DatasetError, f"it is no trace file; expected {form}")
    if not isinstance(loaded, dict) or "rows" not in loaded:
        raise DatasetError(f"{path} is no trace file; expected {form}")
    rows, question, eos = (loaded.get(name) for name in ("rows", "question", "eos"))
    if not isinstance(rows, list):
        raise DatasetError(f"{path}: rows must be a list of objects, not {type(rows).__name__}")
    if not rows:
        raise DatasetError(f"{path} holds no row; export the answers again")
    ends = [eos] if type(eos) is int else sorted(EOS) if eos is None else eos
    if not _are_ids(ends):
        raise DatasetError(f"{path}: eos must be the token id that ends an answer, or a list of "
                           f"them, not {str(eos)[:60]}")
    found, count = [], min(blocks, len(rows))
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {"clip", "drafter_ids", "verifier_ids"} <= row.keys():
            raise DatasetError(f"{path}: row {i} lacks clip, drafter_ids or verifier_ids")
        about = {"sequence": f"block {i * count // len(rows):02d}", "question": question or "",
                 "unseen": "", **row}
        names = [about[name] for name in ("clip", "sequence", "question", "unseen")]
        if not all(isinstance(one, (str, int, float)) and len(str(one)) < 10_000 for one in names):
            raise DatasetError(f"{path}: clip, sequence, question and unseen of row {i} must be "
                               "texts or numbers")
        for name in ("drafter_ids", "verifier_ids"):
            if not _are_ids(row[name]):
                raise DatasetError(f"{path}: {name} of row {i} must be a list of token ids (whole "
                                   "numbers from 0 on, below 2^31)")
        own = row["verifier_ids"]
        if not own:
            raise DatasetError(f"{path}: row {i} has no verifier token; drop it")
        if inside := set(own[:-1]) & set(ends):
            whose = "Llama's: the file names no eos" if eos is None else "the file's eos"
            raise DatasetError(f"{path}: the verifier's answer of row {i} goes on behind "
                               f"{min(inside)}, which ends answers ({whose}); cut the answers "
                               "there, or name the right id in the file's eos")
        clip, sequence, asked, unseen = map(str, names)
        found.append(Trace(clip, sequence, asked, tuple(row["drafter_ids"]), tuple(own), unseen))
    return found, frozenset(ends)


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(one) is int and 0 <= one < 1 << 31 for one in ids)


def of(pairs: HeldOut) -> list[Trace]:
    """Stored answers as traces, empty ones left out; of imported chunks the drafter's ids are not
    known."""
    theirs = pairs.ids_by_drafter if pairs.has_ids else [[]] * len(pairs)
    rows = zip(pairs.samples.itertuples(), theirs, pairs.answers, pairs.scenes, strict=True)
    return [Trace(row.clip, row.sequence, row.question, tuple(drafter), tuple(own), unseen=scene)
            for row, drafter, own, scene in rows if own]


def write(path: str | Path, traces: Sequence[Trace], eos: Iterable[int] = EOS) -> None:
    """The same file format, so that a run of this project can be handed on."""
    write_json(path, {"question": "", "eos": sorted(eos),
                      "rows": [dataclasses.asdict(one) for one in traces]})


def arms(traces: Sequence[Trace], *, ngram: int = 4) -> dict[str, floors.Floor]:
    """What is tried on every answer: drafter tokens (the token at the same place), position mode
    and n-gram. The two tables never see the sequence they are tried on, so one sequence alone has
    none."""
    found = {"drafter tokens": floors.drafter_tokens([trace.drafter_ids for trace in traces])}
    unseen = [trace.unseen or trace.sequence for trace in traces]
    others = {one: [trace.verifier_ids for trace, own in zip(traces, unseen, strict=True)
                    if own != one] for one in dict.fromkeys(unseen)}
    if len(others) < 2:
        return found
    for build in (floors.position_mode, lambda answers: floors.ngram(answers, ngram)):
        tables = {one: build(answers) for one, answers in others.items()}
        name = tables[unseen[0]].name
        found[name] = floors.Floor(name, [tables[one].rule(0) for one in unseen])
    return found


def stored_arms(pairs: HeldOut, adapters: Mapping[str, Adapter],
                gamma: int) -> dict[str, floors.Floor]:
    """What adapters draft from stored states (the greedy loop at gamma), one rule for each answer
    that is not empty."""
    tokens = table.measure(adapters, pairs, gamma=gamma, drafter=False)
    found = {}
    for level, part in tokens.groupby("level", sort=False, observed=True):
        drafts = {key: [None] * len(ids) for key, ids in zip(pairs.keys, pairs.answers, strict=True)
                  if ids}
        for key, at, token in zip(part["sample"], part["position"], part["draft_id"], strict=True):
            drafts[key][at + 1] = int(token)
        found[level] = floors.Floor(level, [rules.stored(ids) for ids in drafts.values()])
    return found


def token_table(traces: Sequence[Trace], tried: Mapping[str, floors.Floor], *,
                data: str) -> pd.DataFrame:
    """The project's token table (evaluate/table.py), ``level`` being the arm; tokens are shown by
    their ids, states were not kept (NaN)."""
    rows = [(level, f"{trace.sequence}/{trace.clip}/{i:05d}", trace.sequence, trace.question,
             position, floor.rule(i)(trace.verifier_ids[:position]), token)
            for level, floor in tried.items() for i, trace in enumerate(traces)
            for position, token in enumerate(trace.verifier_ids)]
    found = pd.DataFrame(rows, columns=["level", "sample", "sequence", "question", "position",
                                        "draft_token", "verifier_token"])
    drafted = ["" if token is None else str(token) for token in (row[5] for row in rows)]
    return found.assign(data=data, cosine=np.nan, match=[row[5] == row[6] for row in rows],
                        draft_token=drafted, verifier_token=found["verifier_token"].astype(str))


def schedule(traces: Sequence[Trace], floor: floors.Floor, *, gamma: int, gamma_prefill: int,
             eos: frozenset[int] = EOS, prices: Prices | None = None) -> dict[str, Any]:
    """What decoding with this arm would have done, walked by decode.replay: passes (verifier calls
    after the prefill) and tokens_per_pass, 1 for the verifier alone; seconds with prices. The
    longest answer is taken for the run's maximum length."""
    longest = max(len(trace.verifier_ids) for trace in traces)
    walked = [replay.replay(trace.verifier_ids, lambda prefix, n, i=i: floor.draft(prefix, n, i),
                            gamma=gamma, gamma_prefill=gamma_prefill, eos_token_ids=eos,
                            max_new_tokens=longest) for i, trace in enumerate(traces)]
    passes = sum(each.rows > 0 for rounds_ in walked for each in rounds_)
    plain = sum(len(trace.verifier_ids) - 1 for trace in traces)
    found = {"passes": passes, "passes_alone": plain,
             "tokens_per_pass": plain / passes if passes else float(plain)}
    if prices is not None:
        seconds = sum(replay.predicted_seconds(rounds_, prices) for rounds_ in walked)
        alone = len(traces) * prices.verifier_prefill_s + plain * prices.verify_s(1)
        found |= {"predicted_s": seconds, "predicted_alone_s": alone,
                  "predicted_speedup": alone / seconds}
    return found


def run(path: str | Path, run_dir: str | Path, *, adapters: Mapping[str, Adapter] | None = None,
        gamma: int = 5, gamma_prefill: int = 0, ngram: int = 4, blocks: int = 10,
        prices: str | Path | None = None, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Import a trace file, or a folder of stored pairs, on whose states ``adapters`` draft, too:
    writes ``tokens.parquet`` and ``results/traces.json`` into the run folder and returns the
    results. prices: as :func:`judge.read_prices`.

    Raises: DatasetError for a bad file, ShardError for a bad folder, ParameterError for gamma below
    1, adapters without states or unreadable prices."""
    path, adapters = Path(path).absolute(), adapters or {}
    stored = extraction.stored(str(path), "test") is not None
    if gamma < 1 or gamma_prefill < 0 or blocks < 2:
        raise ParameterError(f"gamma {gamma}, gamma_prefill {gamma_prefill} and blocks {blocks} "
                             "must be at least 1, 0 and 2")
    if stored:
        pairs = evaluation.held_out(run_dir, str(path))
        traces, eos = of(pairs), frozenset(pairs.eos) or EOS
        origin = pairs.dataset.manifest["config"].get("data_hash", ""), pairs.dataset.mode
    elif adapters:
        raise ParameterError(f"{path} holds no states for adapters to read; give a folder of "
                             "stored pairs, or no adapters")
    else:
        traces, eos = read(path, blocks=blocks)
        origin = sha256_of(path), "free_running"
    clusters = [trace.sequence for trace in traces]
    answers = [trace.verifier_ids for trace in traces]
    tried = arms(traces, ngram=ngram)
    if stored and not pairs.has_ids:
        del tried["drafter tokens"]
    if adapters:
        tried = {**stored_arms(pairs, adapters, gamma), **tried}
    found: dict[str, Any] = {
        "n": len(traces), "n_sequences": len(set(clusters)), "mode": origin[1], "gamma": gamma,
        "gamma_prefill": gamma_prefill,
        "duplicates": {"drafter": duplicates([trace.drafter_ids for trace in traces]),
                       "verifier": duplicates(answers)},
        "provenance": provenance(seed=seed, data_hash=origin[0], source=path.name), "arms": {},
    }
    for name, floor in tried.items():
        one = adapters.get(name)
        priced = None if prices is None else judge.read_prices(
            prices, drafter=one.reads != "verifier" if one else name == "drafter tokens",
            level=getattr(one, "level", ""))
        # of our own pairs the first token is the verifier's, from its prefill: nobody drafts it
        matches = [match[int(stored):] for match in floor.match(answers)]
        found["arms"][name] = {
            **acceptance(matches, clusters, gamma, n_resamples=resamples, seed=seed),
            "schedule": schedule(traces, floor, gamma=gamma, gamma_prefill=gamma_prefill,
                                 eos=eos, prices=priced),
        }
    found["eos"] = sorted(eos)
    found["ended"] = sum(trace.verifier_ids[-1] in eos for trace in traces)
    with FolderLock(folder.resolve(run_dir), "traces.lock"):
        remove_leftovers(folder.resolve(run_dir))
        folder.save_tokens(run_dir, token_table(traces, tried, data=path.stem))
        folder.save_results(run_dir, "traces", found)
    return found


def acceptance(matches: Sequence[np.ndarray], clusters: Sequence[str], gamma: int,
               **options: int) -> dict[str, Any]:
    """token_acceptance and mean_accepted (per round), with intervals; marginal; by_position, the
    share of right tokens at each position among the answers that are that long."""
    walked = rounds.from_matches(matches, gamma)
    each = walked.per_request()
    ratios = {"token_acceptance": ([match.sum() for match in matches], list(map(len, matches))),
              "mean_accepted": (each["accepted"], each["rounds"])}
    shares = pd.DataFrame([pd.Series(match, dtype=float) for match in matches])
    return {name: dataclasses.asdict(statistics.bootstrap_ratio(*both, clusters, **options))
            for name, both in ratios.items()} | {
        "by_position": [{"position": t, "share": float(column.mean()), "n": int(column.count())}
                        for t, column in shares.items()],
        "marginal": list(walked.marginal)}


def duplicates(answers: Sequence[Sequence[int]]) -> dict[str, float]:
    """shared: share of answers that another one equals; repeated: share that could go without
    losing a text. Empty answers are left out."""
    said = [ids for ids in answers if ids]
    rate = floors.duplicate_rate(said) if said else floors.DuplicateRate(0, 0, 0.0, 0.0, None)
    return {"shared": rate.shared, "repeated": rate.repeated, "n": rate.n}


def text(found: Mapping[str, Any]) -> str:
    """The results for a terminal: a line about the set, and one row per arm: right tokens and
    accepted drafts per round with their intervals, tokens per verifier pass, predicted speed-up
    where there are prices, % right at the first positions."""
    n = found["n_sequences"]
    drawn = f"{n} sequences or blocks" if n > 1 else "one sequence: no interval"
    lines = [f"{found['n']} pairs of answers in {drawn}"]
    if found["mode"] == "free_running":
        lines.append("free-running: the drafter's tokens, and states, follow its own text")
    lines += [f"{role}: {rate['shared']:.1%} of the answers equal another one, "
              f"{rate['repeated']:.1%} repeat an earlier one"
              for role, rate in found["duplicates"].items()]
    if not found["ended"]:
        lines.append(f"no answer ends with {', '.join(map(str, found['eos']))}: all are taken as "
                     "cut short; name the models' end of answer in the file's eos")
    if len(found["arms"]) == 1:
        lines.append("one sequence alone: there is nothing to train the tables on")
    table = pd.DataFrame([{
        "drafted by": name,
        "right tokens": statistics.Interval(**arm["token_acceptance"]).text(),
        f"accepted per round (γ={found['gamma']})":
            statistics.Interval(**arm["mean_accepted"]).text(percent=False),
        "tokens per pass": f"{arm['schedule']['tokens_per_pass']:.2f}",
        **({"predicted ms per answer":
                f"{1e3 * arm['schedule']['predicted_s'] / found['n']:.0f}",
            "predicted speed-up": f"{arm['schedule']['predicted_speedup']:.2f}x"}
           if "predicted_speedup" in arm["schedule"] else {}),
        "% right at position 0, 1, …": " ".join(f"{100 * each['share']:.0f}"
                                                for each in arm["by_position"][:9]),
    } for name, arm in found["arms"].items()])
    return "\n".join([*lines, table.to_string(index=False)])
