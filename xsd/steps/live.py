"""Step 05: live decoding. Every arm answers the same held-out samples in one interleaved run, timed
against the fastest baseline.

Speed is measured here on a few samples; that every held-out answer is the verifier's own is checked
apart (xsd/steps/lossless.py), and so is what the parts cost (xsd/steps/costs.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch

from xsd.adapters.base import Adapter
from xsd.bench import arms
from xsd.bench import run as bench
from xsd.core import Generation, ParameterError, Sample
from xsd.decode import rules
from xsd.evaluate import statistics
from xsd.files import provenance
from xsd.models import loading
from xsd.runs import folder, parameters
from xsd.steps import data as datasets
from xsd.steps import extraction, held_out, training

ALL_CORES = "ar_all_cores"
LABELS = {
    "ar": "own greedy loop", ALL_CORES: "own greedy loop, all cores",
    "hf_generate": "transformers generate", "hf_prompt_lookup": "transformers prompt lookup",
    "drafter": "drafter tokens", "ngram": "4-gram table", "prompt_lookup": "prompt lookup",
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Everything that step 05 works on. samples: data set → its held-out samples; timed: the few of
    them that are put on the clock.
    answers_hash: of the training answers that fill the table.
    """

    given: parameters.LiveParameters
    pair: loading.Pair
    adapters: Mapping[str, Adapter]
    table: rules.NGramTable | None
    samples: Mapping[str, list[held_out.HeldOut]]
    timed: Mapping[str, list[held_out.HeldOut]]
    answers_hash: str = ""


def parts_of(name: str) -> tuple[str, int, float]:
    """An arm's name as (kind, drafts a round, least probability): ``L4@3~0.6`` is L4 with at most 3
    drafts a round in place of ``gamma``, stopping at the first draft less likely than 0.6. 0 where
    the name does not say. Raises: ParameterError for another form.
    """
    found = re.fullmatch(r"([\w+]+)(?:@([1-9]\d*))?(?:~(0?\.\d+))?", name)
    if not found:
        raise ParameterError(
            f"no arm is called {name!r}; the form is L4, L4@3 (3 drafts a round) or L4~0.6 (stops "
            "at less likely drafts)"
        )
    return found[1], int(found[2] or 0), float(found[3] or 0)


def levels_of(names: Sequence[str]) -> list[str]:
    """The adapter levels that arms need, in order of appearance: ``["ar", "L1+L5F"]`` → ``["L1",
    "L5F"]``."""
    kinds = [parts_of(name)[0] for name in names]
    levels = [level for kind in kinds for level in kind.split("+")]
    return list(dict.fromkeys(level for level in levels if level not in (*arms.PLAIN, ALL_CORES)))


def open_bench(given: parameters.LiveParameters) -> Bench:
    """Pair, adapters, table and samples of a run; what the run lacks is made with the smoke
    parameters.

    Raises: ParameterError when the run was extracted with another pair, a level was not trained, or
    no baseline is among the arms.
    """
    if not set(given.arms) & {*arms.BASELINES, ALL_CORES}:
        raise ParameterError(
            f"none of the arms {', '.join(given.arms)} is a baseline; add ar, something to be "
            "faster than"
        )
    wanted = levels_of([*given.arms, *given.check_arms])
    extraction.ensure(given.run_dir, given.seed, data=given.data, test_data=given.test_data)
    training.ensure(given.run_dir, given.seed, wanted or ["L4"], data=given.data)
    torch.set_num_threads(given.threads)
    pair = loading.load_pair(given.pair)
    _check_pair(given, pair)
    samples = {
        datasets.name_of(name): held_out.read(given.run_dir, name,
                                              max_new_tokens=given.max_new_tokens,
                                              n_event_frames=pair.n_event_frames)
        for name in given.test_data
    }
    wanted_of = {
        name: given.n_samples_others if place and given.n_samples_others else given.n_samples
        for place, name in enumerate(samples)
    }
    timed = {
        name: held_out.chosen(some, wanted_of[name], given.seed) for name, some in samples.items()
    }
    table, answers_hash = None, ""
    if any("ngram" in name for name in [*given.arms, *given.check_arms]):
        stored = extraction.open_pairs(given.run_dir, "train", given.data,
                                       held_out.mode_of(given.run_dir, "train", given.data))
        answers = extraction.answers(stored)
        table = rules.NGramTable(answers)
        answers_hash = bench.ids_hash(token for ids in answers for token in (*ids, -1))
    return Bench(given, pair, training.load(given.run_dir, wanted), table, samples, timed,
                 answers_hash)


def _check_pair(given: parameters.LiveParameters, pair: loading.Pair) -> None:
    extracted = folder.load_results(given.run_dir).get("extract", {}).get("weights", {})
    loaded = {"verifier": pair.verifier.weights_hash(), "drafter": pair.drafter.weights_hash()}
    other = [role for role, found in loaded.items() if extracted and extracted.get(role) != found]
    if other:
        raise ParameterError(
            f"the run {given.run_dir} was extracted with other weights ({' and '.join(other)}) "
            f"than the pair {given.pair!r} has; "
            "give that pair, or another run_dir")


# --- the arms
# ------------------------------------------------------------------------------------------------


def build(bench_: Bench, names: Sequence[str], *, pair: loading.Pair | None = None,
          overlap: Literal["threads", "serial"] = "threads") -> list[arms.Arm]:
    """The arms by name. ``ar_all_cores``: the own loop on every core that this process may use; the
    others have ``threads`` cores a model.
    overlap: "serial" makes every draft behind the prefill that ``gamma_prefill`` allows, whatever
    the clock says.

    Raises: ParameterError for a name that is no arm.
    """
    given, pair = bench_.given, pair or bench_.pair
    made = []
    for name in names:
        if name == ALL_CORES:
            arm = arms.build("ar", pair, label=name)
            n = arms.available_cores()
            made.append(
                dataclasses.replace(arm, run=_with_threads(arm.run, n, given.threads),
                                    info={"kind": name, "cores": n}))
        else:
            kind, gamma, least = parts_of(name)
            made.append(
                arms.build(kind, pair, bench_.adapters, gamma=gamma or given.gamma,
                           gamma_prefill=given.gamma_prefill, overlap=overlap,
                           min_probability=least, ngram=bench_.table,
                           ngram_hash=bench_.answers_hash, label=name,
                           ))
    return made


def _with_threads(run: Callable[[Sample, int], Generation], n: int,
                  after: int) -> Callable[[Sample, int], Generation]:
    def counted(sample: Sample, max_new_tokens: int) -> Generation:
        torch.set_num_threads(n)
        try:
            return run(sample, max_new_tokens)
        finally:
            torch.set_num_threads(after)

    return counted


def measure(bench_: Bench, *, progress: Callable[[int], None] | None = None) -> list[bench.Record]:
    """The timed run of all arms over all data sets, into ``records.jsonl`` (a finished one is found
    again).

    Records of another configuration are put aside as ``records.before.jsonl``. Raises: as
    bench.run.measure.
    """
    given = bench_.given
    path = folder.resolve(given.run_dir) / "records.jsonl"
    timed = [one for some in bench_.timed.values() for one in some]
    options = {
        "max_new_tokens": given.max_new_tokens, "repeats": given.repeats, "seed": given.seed,
        "progress": progress
    }
    options["about"] = {
        "threads": given.threads, "parameters": given.model_dump(),
        "data_hash": folder.data_hash(given.run_dir)
    }
    made, samples = build(bench_, given.arms), [one.load() for one in timed]
    try:
        records = bench.measure(made, samples, path=path, **options)
    except ParameterError as error:
        if "another configuration" not in str(error):
            raise
        os.replace(path, path.with_name("records.before.jsonl"))
        records = bench.measure(made, samples, path=path, **options)
    where = {one.key: one for one in timed}
    kept = [record for record in records if record["sample"] in where]
    return [{
        **record, "data": where[record["sample"]].data, "sequence": where[record["sample"]].cluster
    } for record in kept]


def summary(records: Sequence[bench.Record], resamples: int,
            seed: int) -> dict[str, dict[str, Any]]:
    """data set → baseline, n_timed, alarms, best_arm and arms; every speed-up against the fastest
    baseline of that data set.

    The pair runs in float32 here, where a near-tie is no excuse. Raises: LosslessError for any
    answer of a lossless arm that differs.
    """
    out = {}
    for data in dict.fromkeys(record["data"] for record in records):
        own = [record for record in records if record["data"] == data]
        found = bench.summarise(own, n_resamples=resamples, seed=seed)
        rows = {
            name: _row(name, found["arms"][name], own, resamples, seed)
            for name in dict.fromkeys(r["arm"] for r in own)
        }
        speculative = [name for name in rows if not rows[name]["baseline"]]
        adapted = [name for name in speculative if levels_of([name])]
        out[data] = {
            "baseline": found["baseline"], "n_timed": found["n_samples"],
            "n_clusters": found["n_sequences"], "n_drafting": len(speculative),
            "alarms": found["alarms"],
            "best_arm": max(speculative or rows, key=lambda name: rows[name]["speedup"]["value"]),
            "best_adapter_arm": max(adapted, key=lambda name: rows[name]["speedup"]["value"],
                                    default=None),
            "shown_arm": max(
                adapted or rows, key=lambda name:
                (levels_of([name]) != ["B1"], rows[name]["speedup"]["value"])), "arms": {
                    name: rows[name]
                    for name in sorted(rows, key=lambda name: (not rows[name]["baseline"], name))
                },
        }
    return out


def _row(name: str, found: Mapping[str, Any], records: Sequence[bench.Record], resamples: int,
         seed: int) -> dict[str, Any]:
    own = [record for record in records if record["arm"] == name]
    clusters = [record["sequence"] for record in own]
    options = {"n_resamples": resamples, "seed": seed}
    row = {
        "label": label_of(name), "kind": "measured", "baseline": own[0]["baseline"],
        "speedup": found["speedup_total"], "speedup_of_samples": found["speedup_mean"],
        "slower_share": found["slower_share"], "total_ms": dataclasses.asdict(
            statistics.bootstrap_mean([1e3 * record["total_s"] for record in own], clusters,
                                      **options)), "first_token_ms": found["first_token_ms"],
        "identical": found["identical"], "tokens": found["n_tokens"],
    }
    for phase, word in (("decode", "accepted_per_round"), ("prefill_hiding", "hidden_accepted")):
        rounds = [[r for r in record["rounds"] if r["phase"] == phase and r["drafted"]]
                  for record in own]
        if any(rounds):
            accepted, count = [sum(r["accepted"] for r in each)
                               for each in rounds], [len(each) for each in rounds]
            row[word] = dataclasses.asdict(
                statistics.bootstrap_ratio(accepted, count, clusters, **options))
            row[f"{word}_drafted"] = sum(len(r["drafted"]) for each in rounds
                                         for r in each) / sum(count)
    return row


def label_of(name: str) -> str:
    """How an arm is called in tables and pictures."""
    kind, gamma, least = parts_of(name)
    return (" + ".join(LABELS.get(one, one) for one in kind.split("+")) +
            (f", {gamma} drafts a round" if gamma else "") +
            (f", only above {least:.0%}" if least else ""))


def table(found: Mapping[str, Any]) -> pd.DataFrame:
    """One data set of :func:`summary`: arm, speed-up, share of samples slower than the baseline,
    ms, accepted drafts a round."""
    rows = []
    for row in found["arms"].values():
        rows.append({
            "arm": row["label"], "speed-up": row["speedup"]["value"], "low": row["speedup"]["low"],
            "high": row["speedup"]["high"], "slower samples": row["slower_share"]["value"],
            "ms an answer": row["total_ms"]
                            ["value"], "accepted a round": row.get("accepted_per_round",
                                                                   {}).get("value"),
            "accepted behind the prefill": row.get("hidden_accepted", {}).get("value"),
            "identical": f"{row['identical']}/{found['n_timed']}",
        })
    return pd.DataFrame(rows)


def shown(rows: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """A table for reading: rounded, – where there is no value."""
    rounded = rows.round(digits).astype(object)
    return rounded.where(rounded.notna(), "–")


def bars(found: Mapping[str, Any]) -> pd.DataFrame:
    """What ``views.figures.speedup_bars`` draws of one data set."""
    return pd.DataFrame([{
        "name": row["label"], "kind": row["kind"],
        **{k: row["speedup"][k] for k in ("value", "low", "high", "n")}
    } for row in found["arms"].values()]).astype({"low": float, "high": float})


# --- one sample, and what is kept
# ------------------------------------------------------------------------------------------------
def show_one(
        bench_: Bench, arm: str, *,
        number: int = 0) -> tuple[dict[str, Generation], Callable[[int], str], held_out.HeldOut]:
    """The first timed sample decoded once more by ``arm`` and by the own loop, with every bar
    measured; kept in ``live.json``.

    Returns: generations by label, the text of a token, the sample.
    """
    one = next(iter(bench_.timed.values()))[number]
    sample = one.load()
    made = {label_of(each.name): each for each in build(bench_, list(dict.fromkeys([arm, "ar"])))}
    generations = {
        label: each.run(sample, bench_.given.max_new_tokens) for label, each in made.items()
    }
    said = bench_.pair.verifier.token_text
    seen = {
        token for g in generations.values()
        for token in (*g.ids, *(t for r in g.rounds for t in r.drafted))
    }
    folder.save_live(bench_.given.run_dir, generations,
                     {token: said(token) for token in sorted(seen)}, question=one.question,
                     sequence=one.sequence, clip=sample.clip, data=one.data, arm=arm,
                     )
    return generations, said, one


def sentence(found: Mapping[str, Any]) -> str:
    """One honest sentence on a data set of :func:`summary`: faster, slower, or not to be told
    apart, whichever it is."""
    best = found["arms"][found["best_arm"]]
    low, high = best["speedup"]["low"], best["speedup"]["high"]
    base = found["arms"][found["baseline"]]["label"]
    if low is None or high is None:
        verdict = "one cluster gives no interval"
    elif low > 1:
        verdict = "faster, and its interval lies above 1"
    elif high < 1:
        verdict = "slower: drafting costs more than it saves on this machine"
    else:
        verdict = f"not told apart from the baseline by {found['n_timed']} samples"
    adapted = found["arms"].get(found.get("best_adapter_arm"))
    with_adapter = ""
    if adapted is not None and adapted is not best:
        with_adapter = (f"; the fastest with an adapter, {adapted['label']}, at "
                        f"{_ratio(adapted['speedup'])}")
    return (
        f"the fastest arm that drafts (best of {found['n_drafting']} on "
        f"{_samples(found['n_timed'])}), {best['label']}, "
        f"runs at {_ratio(best['speedup'])} the speed of the fastest baseline, {base}: "
        f"{verdict}; {best['slower_share']['value']:.0%} of its samples are slower{with_adapter}")


def _samples(n: int) -> str:
    return "this one sample" if n == 1 else f"these {n} samples"


def _listed(words: Sequence[str]) -> str:
    """``["L4", "B1", "L1 + L5F"]`` → ``"L4, B1 and L1 + L5F"``."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _ratio(speedup: Mapping[str, Any]) -> str:
    low, high = speedup["low"], speedup["high"]
    return f"{speedup['value']:.2f}×" + ("" if low is None or high is None else
                                         f" [{low:.2f}, {high:.2f}]")


def save(bench_: Bench, found: Mapping[str, Mapping[str, Any]], checked: Mapping[str, Any],
         parts: pd.DataFrame, predicted: pd.DataFrame, *, hidden_share: float | None = None,
         ) -> dict[str, Any]:
    """Write ``results/live.json`` and return it. The first data set's arms stand at the top, all
    data sets under ``test``.

    found: of :func:`summary`. checked: of lossless.counts. ``provenance`` is the timed run's, from
    when its file was begun;
    ``checked_with`` is where the check and the parts were run, which may be later. parts,
    predicted: the tables of xsd/steps/costs.py.
    """
    given, first = bench_.given, next(iter(found.values()))
    results = {
        "arms": first["arms"], "best_arm": first["best_arm"],
        "best_adapter_arm": first["best_adapter_arm"], "baseline": first["baseline"],
        "n_timed": first["n_timed"], "n_drafting": first["n_drafting"],
        "n_answers": checked["n_answers"], "n_identical": checked["n_identical"], "check": {
            **checked, "in_turns": given.check_in_turns,
            "labels": _listed([label_of(arm) for arm in checked["arms"]])
        }, "test": {data: {**one, "sentence": sentence(one)}
                    for data, one in found.items()}, "sentence": sentence(first), "costs": {
                        row["what"]: {name: row[name] for name in ("ms", "low", "high")}
                        for row in parts.to_dict("records")
                    }, "hidden_share": hidden_share,
        "predicted": {row["arm"]: row for row in predicted.to_dict("records")},
        "mean_residual": float(predicted["residual"].abs().mean()) if len(predicted) else None,
        "timeline": _timeline(given.run_dir), "provenance": bench.read_provenance(
            folder.resolve(given.run_dir) / "records.jsonl"), "checked_with": {
                name: value for name, value in provenance().items()
                if name in ("git_revision", "git_dirty", "machine")
            },
    }
    folder.save_results(given.run_dir, "live", _without_nan(results))
    return results


def _timeline(run_dir: str) -> dict[str, Any] | None:
    """What :func:`show_one` kept, seconds since the request began; None where no sample was
    shown."""
    path = folder.resolve(run_dir) / "live.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value
