"""Step 05: live decoding. Every arm answers the same few held-out samples in one interleaved run,
timed against the best baseline; that every answer is the verifier's own is checked apart
(xsd/steps/lossless.py), and what the parts cost is measured by xsd/bench/costs.py."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from xsd.adapters.base import Adapter
from xsd.bench import arms, costs, records, speedups
from xsd.bench import run as bench
from xsd.core import DatasetError, Generation, ParameterError, Sample
from xsd.decode import rules
from xsd.evaluate import tables
from xsd.evaluate.held_out import HeldOut
from xsd.files import provenance, read_json
from xsd.models import loading
from xsd.runs import folder, parameters
from xsd.steps import evaluation, training

FEW = 5
"""Of fewer sequences nothing is claimed: a bootstrap of two draws almost no interval."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What live decoding works on. given: what it was opened with, for another process to open it,
    too. table: the n-gram table of the training answers, where an arm wants one. By data set:
    samples, all held-out ones; timed, the few on the clock; left_out, why it has no pictures."""

    given: parameters.LiveParameters
    pair: loading.Pair
    adapters: Mapping[str, Adapter]
    table: rules.NGramTable | None
    samples: Mapping[str, HeldOut]
    timed: Mapping[str, list[Sample]]
    left_out: Mapping[str, str]

    def arms(self, names: Sequence[str], *, pair: loading.Pair | None = None,
             **options: Any) -> list[arms.Arm]:
        """Arms on these models, with these adapters and the gammas given. options: of arms.build;
        pair: the models in another handle. Raises: as arms.build."""
        options = {"gamma": self.given.gamma, "gamma_prefill": self.given.gamma_prefill,
                   "hide_prefill": self.hiding["hide_prefill"], "overlap": self.hiding["overlap"],
                   "ngram": self.table, "one_frame": self.one_frame, **options,
                   "prices": costs.pricing(self.pair, self.adapters, self.timed)}
        return [arms.build(name, pair or self.pair, self.adapters, **options) for name in names]

    @functools.cached_property
    def hiding(self) -> dict[str, Any]:
        """Whether drafts are made behind the verifier's prefill, and why (costs.hiding)."""
        given, sample = self.given, next(iter(self.timed.values()))[0]
        able = [name for name, one in self.adapters.items() if one.reads == "drafter"]
        proposer = arms.proposer_of([*able, "drafter"][0], self.pair, self.adapters)
        return costs.hiding(given.hide_prefill, self.pair.verifier, proposer, sample,
                            folder.resolve(given.run_dir) / "hiding.json", given.gamma,
                            {**given.loads, "drafter_device": given.drafter_device})

    def one_frame(self, sample: Sample) -> Sample:
        """The held-out sample with all its events in one frame (``event_image_1f``)."""
        some = next(some for some in self.samples.values() if sample.key in some.keys)
        frames = some.load(some.keys.index(sample.key), 1).event_frames
        return dataclasses.replace(sample, event_frames=frames)


def open_bench(given: parameters.LiveParameters) -> Bench:
    """Pair, adapters, table and samples of a run; torch is set to ``threads`` cores.

    Raises: ParameterError when a set was extracted with another pair, none has pictures, a level is
    missing, or no baseline is among the arms.
    """
    if not set(given.arms) & set(arms.BASELINES):
        raise ParameterError(f"none of the arms {', '.join(given.arms)} is a baseline; add ar, "
                             "something to be faster than")
    given, named = given.as_used(), [*given.arms, *given.check_arms]
    torch.set_num_threads(given.threads)
    pair = loading.load_pair(given.pair, **given.loads, drafter_device=given.drafter_device)
    if pair.turns:
        raise ParameterError(f"live decoding needs both models on {pair.turns} at once, and they "
                             "do not fit; give quant=4bit, or drafter_device")
    samples, timed, left_out = {}, {}, {}
    for one in (evaluation.held_out(given.run_dir, name) for name in given.test_data):
        _check_pair(given, pair, one)
        n = (timed and given.n_samples_others) or given.n_samples
        try:
            timed[one.name] = [one.load(index) for index in one.choose(n, given.seed)]
            samples[one.name] = one
        except (ParameterError, DatasetError) as error:
            left_out[one.name] = str(error)
    if not samples:
        raise ParameterError("live decoding needs pictures: " + "; ".join(left_out.values()))
    table = rules.NGramTable(evaluation.training_answers(given.run_dir, given.data)) if any(
        "ngram" in name for name in named) else None
    # adapters compute in the models' numbers, where the drafter does if they read it
    adapters = {level: adapter.to(getattr(pair, "verifier" if adapter.reads == "verifier" else
                                          "drafter").device, pair.verifier.head.weight.dtype)
                for level, adapter in training.load(given.run_dir, arms.levels_of(named)).items()}
    return Bench(given, pair, adapters, table, samples, timed, left_out)


def _check_pair(given: parameters.LiveParameters, pair: loading.Pair, pairs: HeldOut) -> None:
    config = pairs.dataset.manifest["config"]
    if other := [role for role in ("verifier", "drafter") if config.get(role, {}).get(
            "weights", "") not in ("", getattr(pair, role).weights_hash())]:
        raise ParameterError(
            f"{pairs.name} was extracted with other weights ({' and '.join(other)}) than the pair "
            f"{given.pair!r} has; give that pair, or another held-out set")


def measure(opened: Bench, made: Sequence[arms.Arm], *,
            progress: Callable[[int], None] | None = None) -> list[records.Record]:
    """The timed run of these arms over all data sets, into the run's ``records.jsonl`` (a finished
    one is found again; records of another configuration become ``records.before.jsonl``). Returns:
    the records of the timed samples, with their data set. Raises: as bench.run.measure."""
    given = opened.given
    path = folder.resolve(given.run_dir) / "records.jsonl"
    data_of = {sample.key: name for name, some in opened.timed.items() for sample in some}
    samples = [sample for some in opened.timed.values() for sample in some]
    about = {"threads": given.threads, "data_hash": folder.data_hash(given.run_dir),
             "parameters": given.model_dump()}

    def run() -> list[records.Record]:
        return bench.measure(made, samples, path=path, max_new_tokens=given.max_new_tokens,
                             repeats=given.repeats, seed=given.seed, about=about, progress=progress)

    try:
        found = run()
    except records.OtherConfiguration:
        os.replace(path, path.with_name("records.before.jsonl"))
        found = run()
    return [{**one, "data": data_of[one["sample"]]} for one in found if one["sample"] in data_of]


def summary(found: Sequence[records.Record], levels: Collection[str], *, resamples: int, seed: int,
            allow_near_ties: bool = False) -> dict[str, dict[str, Any]]:
    """data set → what bench.run.summarise says of it, baselines first, and which arms are best: of
    all that draft (best_arm), of those with an adapter (best_adapter_arm), and to be shown.

    levels: the adapters that arms may name. allow_near_ties: where the models compute in less than
    float32; in float32 a tie is no excuse. Raises: LosslessError for any answer of a lossless arm
    that differs.
    """
    out = {}
    for data in dict.fromkeys(record["data"] for record in found):
        own = [record for record in found if record["data"] == data]
        one = bench.summarise(own, n_resamples=resamples, seed=seed,
                              allow_near_ties=allow_near_ties)
        rows = {name: {"label": arms.label_of(name), "kind": "measured", **row}
                for name, row in sorted(one["arms"].items(),
                                        key=lambda item: (not item[1]["baseline"], item[0]))}
        for row in rows.values():
            row["speedup"]["baseline"] = arms.label_of(one["baseline"])
        speed = {name: row["speedup"]["value"] for name, row in rows.items()}
        drafting = [name for name, row in rows.items() if not (row["baseline"] or "changed" in row)]
        used = {name: set(arms.kinds_of(name)) & set(levels) for name in drafting}
        adapted = [name for name in drafting if used[name]]
        # B1 reads the verifier alone and would be shown idle behind the prefill
        crossing = [name for name in adapted if used[name] != {"B1"}]
        best = max(drafting or rows, key=speed.get)
        out[data] = {
            "baseline": one["baseline"], "n_timed": one["n_samples"],
            "n_clusters": one["n_clusters"], "n_drafting": len(drafting),
            "busy": rows[best]["speedup"]["busy"], "alarms": one["alarms"], "best_arm": best,
            "best_adapter_arm": max(adapted, key=speed.get, default=None),
            "shown_arm": max(crossing or adapted or rows, key=speed.get), "arms": rows,
        }
    return out


def table(found: Mapping[str, Any]) -> pd.DataFrame:
    """One data set of :func:`summary`, one row per arm. Speed-ups over the named baseline are left
    empty where the machine was busy."""
    rows, against = [], f"speed-up over {found['arms'][found['baseline']]['label']}"
    for row in found["arms"].values():
        said = dict.fromkeys(speed) if (speed := row["speedup"])["busy"] else speed
        rows.append({
            "arm": row["label"], against: said["value"], "low": said["low"], "high": said["high"],
            "in total time": said["total"], "slower samples": said["slower"],
            "ms per answer": row["total_ms"]["value"], "prefill ms": row["first_token_ms"],
            "decode ms": row["decode_ms"], "spread of repeats": speed["spread"],
            "accepted per round": row.get("accepted_per_round", {}).get("value"),
            "accepted behind the prefill": row.get("hidden_accepted", {}).get("value"),
            "drafts behind the prefill": row.get("hidden_accepted_drafted"),
            "identical": f"{row['identical']}/{found['n_timed']}" + (
                f", {row['changed']:.1%} of ids changed" if "changed" in row else ""),
        })
    numbers = [name for name in rows[0] if name not in ("arm", "identical")]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))


def one_frame_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of :func:`table` of each arm that was run with the pair's event frames and with one
    (``L4@1f``), side by side; empty where none was."""
    made = found["arms"]
    both = [(name.replace("@1f", ""), name) for name in made if "@1f" in name]
    labels = [made[one]["label"] for pair in both if pair[0] in made for one in pair]
    return table(found).set_index("arm").loc[labels].reset_index()


def bars(found: Mapping[str, Any]) -> pd.DataFrame:
    """What ``views.figures.speedup_bars`` draws of one data set."""
    return pd.DataFrame([{**row["speedup"], "name": row["label"], "kind": row["kind"]}
                         for row in found["arms"].values()]).astype({"low": float, "high": float})


def sentence(found: Mapping[str, Any]) -> str:
    """One honest sentence on a data set of :func:`summary`: faster, slower, not told apart, or
    nothing at all where the machine was busy."""
    best, n = found["arms"][found["best_arm"]], found["n_timed"]
    speed, baseline = best["speedup"], found["arms"][found["baseline"]]["label"]
    low, high, others = speed["low"], speed["high"], speed["others"] or 0.0
    if speed["busy"]:
        apart = max(one["speedup"]["spread"] or 0.0
                    for one in (best, found["arms"][found["baseline"]]))
        word = "busy" if others > speedups.OTHERS else "unsteady"
        return (f"the machine was {word} (other processes took {others:.0%}, repeats spread by "
                f"{apart:.0%}); no speed-up over the best baseline, {baseline}, is claimed")
    if low is None or high is None:
        verdict = "one sequence gives no interval"
    elif speed["n_clusters"] < FEW:
        verdict = f"{speed['n_clusters']} sequences are too few to claim anything"
    elif low > 1:
        verdict = "faster, and its interval lies above 1"
    elif high < 1:
        verdict = "slower: drafting costs more than it saves on this machine"
    else:
        verdict = f"not told apart from the baseline by {n} samples"
    adapted = found["arms"].get(found.get("best_adapter_arm"))
    with_adapter = "" if adapted is None or adapted is best else (
        f"; the fastest with an adapter, {adapted['label']}, at {_ratio(adapted['speedup'])}")
    return (f"the fastest arm that drafts (best of {found['n_drafting']} on "
            f"{'this one sample' if n == 1 else f'these {n} samples'}), "
            f"{best['label']}, runs at {_ratio(speed)} the speed of the best baseline, {baseline} "
            f"(median of paired ratios; {speed['total']:.2f}× in total time): {verdict}; "
            f"{speed['slower']:.0%} of its samples are slower{with_adapter}")


def _ratio(speedup: Mapping[str, Any]) -> str:
    value, low, high = (speedup[name] for name in ("value", "low", "high"))
    return f"{value:.2f}×" + ("" if None in (low, high) else f" [{low:.2f}, {high:.2f}]")


def widths(given: parameters.LiveParameters) -> list[int]:
    """The rows K at which v(K) is measured: a few, and the widest pass of any of the arms."""
    longest = max(max(arms.parts_of(name)[1::2]) or given.gamma for name in given.arms)
    return sorted({1, 2, 4, given.gamma + 1, 2 * given.gamma, given.gamma_prefill, longest + 1})


def save_one(opened: Bench, data: str, sample: Sample, generations: Mapping[str, Generation],
             arm: str) -> None:
    """Keep the generations of one sample of a data set, by label, in the run's ``live.json``: every
    bar measured, with the texts of their tokens."""
    texts = {token: opened.pair.verifier.token_text(token) for token in sorted({
        token for g in generations.values() for token in (*g.ids, *(
            drafted for r in g.rounds for drafted in r.drafted))})}
    folder.save_live(opened.given.run_dir, generations, texts, question=sample.question,
                     sequence=sample.sequence, clip=sample.clip, data=data, arm=arm)


def save(given: parameters.LiveParameters, found: Mapping[str, Mapping[str, Any]],
         checked: Mapping[str, Any], parts: pd.DataFrame, predicted: pd.DataFrame, *,
         hidden_share: float | None = None, hiding: Any = None) -> dict[str, Any]:
    """Write ``results/live.json`` and return it. The first data set's arms stand at the top, all
    data sets under ``test``.

    found: of :func:`summary`. checked: of lossless.counts. parts, predicted: of costs.table and
    costs.predictions; hiding: Bench.hiding. ``provenance`` is the timed run's, from when its file
    was begun; ``checked_with`` is where the check and the parts were run, which may be later.
    """
    first, place = next(iter(found.values())), folder.resolve(given.run_dir)
    *others, last = [arms.label_of(arm) for arm in checked["arms"]]
    shown, here = place / "live.json", provenance()
    results = {
        **{key: first[key] for key in ("arms", "best_arm", "best_adapter_arm", "baseline",
                                       "n_timed", "n_drafting", "busy")},
        "n_answers": checked["n_answers"], "n_identical": checked["n_identical"],
        "check": {**checked, "in_turns": given.check_in_turns, "n_checked": given.n_checked,
                  "labels": " and ".join([", ".join(others), last][not others:])},
        "test": {data: {**one, "sentence": sentence(one)} for data, one in found.items()},
        "sentence": sentence(first),
        "costs": parts.set_index("what")[["ms", "low", "high"]].to_dict("index"),
        "hidden_share": hidden_share, "hiding": hiding,
        "predicted": {row["arm"]: row for row in predicted.to_dict("records")},
        "mean_residual": float(predicted["residual"].abs().mean()) if len(predicted) else None,
        "timeline": read_json(shown, ParameterError, folder.AGAIN) if shown.is_file() else None,
        "loads": given.as_used().loads,
        "provenance": records.read_provenance(place / "records.jsonl"),
        "checked_with": {key: here[key] for key in ("git_revision", "git_dirty", "machine")},
    }
    for data, one in found.items():
        tables.write(table(one), place / "tables" / f"live_{data}", kinds=("csv",))
    folder.save_results(given.run_dir, "live", results)
    return results
