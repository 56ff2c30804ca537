"""Step 07: what the explorer shows of runs: their token tables, the clips behind them, and what
both models would have said of a chosen answer."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import pandas as pd

from xsd import files
from xsd.adapters.base import Adapter
from xsd.bench import records
from xsd.core import Generation, ParameterError, Round, Sample, XsdError
from xsd.evaluate import drafting, table
from xsd.evaluate.held_out import HeldOut
from xsd.runs import folder, listing
from xsd.steps import data as datasets
from xsd.steps import evaluation, extraction, training
from xsd.views import controls, explorers


def pictures(runs: Sequence[str]) -> Callable[[str], Sample | None]:
    """Sample key → Sample of any of the runs, read when asked for; None for an unknown key."""
    @cache
    def places() -> dict[str, tuple[HeldOut, int]]:
        sets = [evaluation.held_out(run, data) for run in runs
                for data in extraction.held_out_names(run)]
        return {name: (one, i) for one in sets for i, name in enumerate(one.keys)}

    @cache
    def read(key: str) -> Sample | None:
        pairs, index = places().get(key, (None, 0))
        try:
            return pairs and pairs.load(index)
        except ParameterError:  # of imported chunks nobody knows the clips
            return None

    return read


def alternatives(runs: Sequence[str]) -> Callable[[str, str, str], pd.DataFrame | None]:
    """Run and set (as the explorer names them), level and sample key → drafting.alternatives of
    that answer as notebook 04 measured it, with the tokens' texts, worked out when asked for; None
    where states or adapters are no longer at hand."""
    places = {f"{name} · {datasets.name_of(data)}": (run, data)
              for name, run in zip(listing.names(runs), runs, strict=True)
              for data in extraction.held_out_names(run)}

    @cache
    def held(place: str) -> tuple[dict[str, Any], HeldOut]:
        run, data = places[place]
        made = folder.load_results(run)["tokens"]
        given = made["provenance"]["parameters"]
        return made, evaluation.held_out(run, data, given["mode"], given["head"])

    @cache
    def adapter(place: str, level: str) -> Adapter | None:
        named = {files.name_of(one): one
                 for one in held(place)[0]["provenance"]["parameters"]["levels"]}
        return None if level == table.DRAFTER else training.load(places[place][0], [named[level]])[
            level]

    @lru_cache(maxsize=64)
    def found(place: str, level: str, key: str) -> pd.DataFrame | None:
        try:
            (made, pairs), own = held(place), adapter(place, level)
            one = pairs.dataset.subset(indices=[pairs.keys.index(key)])
            one = dataclasses.replace(pairs, dataset=one, keys=[key])
            batch = next(one.batches(1, getattr(own, "context_layers", None)))
            head = pairs.dataset.head("drafter") if own is None else None
            why = drafting.alternatives(own, batch, pairs.head, gamma=made["gamma"],
                                        drafter_head=head)
        except (XsdError, LookupError, ValueError):
            return None
        return why.assign(**{
            f"{side}_texts": [[pairs.texts[token] for token in ids] for ids in why[f"{side}_ids"]]
            for side in ("draft", "verifier")})

    return found


def explorer(runs: Sequence[str], *, levels: Sequence[str],
             threshold: float) -> controls.AcceptanceExplorer:
    """The explorer, opened on ``levels`` as far as the first run holds them. In it, a run is a run
    folder and one of its held-out sets."""
    tables, gammas = [], {}
    for name, run in zip(listing.names(runs), runs, strict=True):
        own = folder.load_tokens(run)
        named = own["data"].astype("category").cat.rename_categories(
            lambda data, name=name: f"{name} · {data}")
        gamma = folder.load_results(run).get("tokens", {}).get("gamma", 5)
        gammas |= dict.fromkeys(named.cat.categories, gamma)
        tables.append(own.assign(run=named))
    found = explorers.ExplorerData(pd.concat(tables, ignore_index=True), pictures(runs),
                                   alternatives(runs), gammas)
    held = found.levels(found.runs[0])
    chosen = [name for name in map(files.name_of, levels) if name in held] or held[:2]
    return controls.AcceptanceExplorer(found, levels=chosen, tau=threshold)


def of_records(run: str) -> controls.LiveExplorer:
    """The answers that notebook 05 timed in a run, round by round; no model is loaded. Raises:
    StorageError without records."""
    rows = records.read_records(folder.resolve(run) / "records.jsonl")
    known = {(row["sample"], row["arm"]): row for row in rows[::-1]}
    texts, clips = extraction.pair_file(run)["token_texts"], pictures([run])

    def trace(key: str, arm: str) -> Generation:
        row, times = known[key, arm], (0.0, ) * 4
        return Generation(tuple(row["ids"]), row["finish"], tuple(
            Round(tuple(one["drafted"]), one["accepted"], one["bonus"], *times, one["phase"],
                  tuple(one["parents"]) if "parents" in one else None) for one in row["rounds"]))

    with folder.as_written(folder.resolve(run) / "records.jsonl"):
        arms = dict.fromkeys(row["arm"] for row in rows if any(one["drafted"]
                                                              for one in row["rounds"]))
        samples = {row["sample"]: f"{row['sample']} · {row['question']}" for row in rows}
        return controls.LiveExplorer(samples, list(arms), trace, texts.__getitem__, sample=clips,
                                     why=_at_position(run))


def of_bench(opened: Any, names: Sequence[str]) -> controls.LiveExplorer:
    """Every held-out sample of an opened bench (steps/live.py), decoded by an arm when both are
    chosen."""
    places = {key: (one, i) for one in opened.samples.values() for i, key in enumerate(one.keys)}
    made = {arm.name: arm for arm in opened.arms(names)}
    samples = {key: f"{key} · {one.samples['question'].iloc[i]}"
               for key, (one, i) in places.items()}
    load = lru_cache(maxsize=8)(lambda key: places[key][0].load(places[key][1]))
    return controls.LiveExplorer(
        samples, list(made), lambda key, arm: made[arm].run(load(key), opened.given.max_new_tokens),
        opened.pair.verifier.token_text, sample=load, why=_at_position(opened.given.run_dir))


def _at_position(run: str) -> Callable[[str, str, int], dict[str, Any] | None]:
    """Arm, sample key and position → the row of :func:`alternatives`, for arms of one level."""
    found, (name, ) = alternatives([run]), listing.names([run])

    def row(arm: str, key: str, position: int) -> dict[str, Any] | None:
        level = table.DRAFTER if arm == "drafter" else arm.partition("@")[0]
        for data in extraction.held_out_names(run):
            known = found(f"{name} · {datasets.name_of(data)}", level, key)
            at = None if known is None else known[known["position"] == position]
            if at is not None and len(at):
                return at.iloc[0].to_dict()
        return None

    return row
