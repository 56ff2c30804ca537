"""Steps 03 and 04: what knows the run folder of an evaluation: its held-out sets, its training
answers, the floors, and what it keeps of the figures that :mod:`xsd.evaluate` measures. The first
token of each answer is the verifier's own; every later position is drafted, by the floors too.
"""

import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from xsd.adapters import heads
from xsd.adapters.base import Adapter
from xsd.core import ParameterError
from xsd.embedded import language
from xsd.evaluate import curves, floors, reliability, statistics, table, tables
from xsd.evaluate import held_out as pairs_of
from xsd.evaluate.comparison import UNITS, above_floors
from xsd.evaluate.held_out import HeldOut
from xsd.files import provenance
from xsd.runs import folder
from xsd.shards import chunks
from xsd.steps import data as datasets
from xsd.steps import extraction

POSITIONS = 24
"""Positions of an answer that the report draws."""
FLOORS = {"position_mode": "position mode", "ngram": "4-gram", "prompt_lookup": "prompt lookup"}
"""Floors that look at nothing: a row of the results → the floor's own name."""

# --- what a run holds


def held_out(run_dir: str | os.PathLike[str], data: str, mode: str | None = None,
             head: str = "") -> HeldOut:
    """A held-out set, by name or path, with all that is known of it (of imported chunks: neither
    texts, prompts nor pictures). head: of the verifier, by path; empty: the one stored with the
    pairs. mode, Raises: as extraction.open_pairs, and as adapters.heads.read."""
    dataset = extraction.open_pairs(run_dir, "test", data, mode)
    about = extraction.known(dataset)
    load = datasets.pictures(dataset, lambda: extraction.clips_of(run_dir, "test", data, dataset))
    own = heads.read(folder.resolve(head)) if head else None
    found = pairs_of.of(datasets.name_of(data), dataset, own, prompt_ids=about.get("prompt_ids"),
                        eos=about.get("eos", ()), load=load)
    if not about:
        warnings.warn(f"nobody knows the words and prompts of {found.name} (imported chunks): word "
                      "kinds and the prompt-lookup floor are left out", stacklevel=2)
    texts = about.get("token_texts") or [f"#{token}" for token in range(len(found.head))]
    asked = set(found.samples["question"])
    unknown = asked - set(about.get("prompt_ids", asked))
    if len(texts) < len(found.head) or unknown:
        raise ParameterError(
            f"the pair.json beside {dataset.folder} does not fit these pairs ({len(texts)} texts "
            f"for {len(found.head)} tokens, {len(unknown)} questions without a prompt); run "
            "notebook 01 (or xsd data extract) again, which writes it anew")
    return dataclasses.replace(found, texts=texts)


def held_out_sets(run_dir: str | os.PathLike[str], names: Sequence[str], mode: str | None = None,
                  head: str = "") -> dict[str, HeldOut]:
    """The held-out sets by their short names. Raises: ParameterError for a set that was not
    extracted, or two of one name; MetricError as check_leakage."""
    found = [held_out(run_dir, name, mode, head) for name in names]
    check_leakage(run_dir, found)
    if len({one.name for one in found}) < len(found):
        raise ParameterError(f"two of the held-out sets {', '.join(names)} share a name; rename "
                             "one of the folders")
    return {one.name: one for one in found}


def check_leakage(run_dir: str | os.PathLike[str], sets: Iterable[HeldOut]) -> dict[str, int]:
    """Compare the sequences of every training set of the run with those of the held-out sets.
    Returns the numbers of sequences whose names are known, training and held_out; with none on one
    side nothing was compared. Raises: MetricError naming shared sequences, or when the run trained
    here and holds no training set to compare with."""
    train = extraction.training_sequences(run_dir)
    test = {name for one in sets for name in one.samples["sequence"]}
    trained_here = any((folder.resolve(run_dir) / "adapters").glob("*/best.safetensors"))
    sides = train - {chunks.UNKNOWN}, test - {chunks.UNKNOWN}
    if all(sides) or (trained_here and chunks.UNKNOWN not in train | test):
        statistics.check_disjoint(*sides)
    else:
        warnings.warn("whether training and held-out sequences differ was not checked: imported "
                      "chunks do not name theirs, and adapters by path not what they were trained "
                      "on", stacklevel=2)
    return dict(zip(("training", "held_out"), map(len, sides), strict=True))


def training_answers(run_dir: str | os.PathLike[str], data: str) -> list[list[int]]:
    """The verifier's answers of the training set, which make the floors."""
    pairs = extraction.open_pairs(run_dir, "train", data)
    if not pairs.has_token_ids:
        return pairs_of.of(data, pairs).answers
    return [ids.tolist() for ids in pairs.ids("verifier")]


def save(run_dir: str | os.PathLike[str], name: str, results: Mapping[str, Any],
         pairs: Mapping[str, HeldOut], given: Mapping[str, Any],
         figures: Mapping[str, pd.DataFrame] | None = None) -> dict[str, Any]:
    """Write ``results/<name>.json`` with its provenance and return it; ``tables/<name>_<data>.csv``
    of long tables by held-out set. given: the notebook's parameters."""
    data_hash = "+".join(str(one.dataset.manifest["config"].get("data_hash", ""))[:16]
                         for one in pairs.values())
    about = provenance(seed=given["seed"], data_hash=data_hash, device=given["device"],
                       parameters=dict(given))
    found = {**results, "provenance": about}
    folder.save_results(run_dir, name, found)
    extraction.remember(run_dir, "test", [one.dataset for one in pairs.values()])
    for data, rows in (figures or {}).items():
        tables.write(rows, folder.resolve(run_dir) / "tables" / f"{name}_{data}", kinds=("csv",))
    return found


# --- 03: states


def hidden(figures: Mapping[str, pd.DataFrame], adapters: Mapping[str, Adapter],
           pairs: Mapping[str, HeldOut], *, threshold: float) -> dict[str, Any]:
    """What ``results/hidden.json`` keeps of metrics.state_figures of each held-out set."""
    found: dict[str, Any] = {}
    for name, rows in figures.items():
        levels = {}
        for level, part in rows[rows["position"].isna()].groupby("level", sort=False):
            by_metric = {key: some.set_index("threshold") for key, some in part.groupby("metric")}
            accept = by_metric["accept_at"]
            levels[level] = {
                "reads": adapters[level].reads,
                "cosine": figure(by_metric["cosine_mean"].iloc[0]),
                "accept": figure(accept.loc[threshold]),
                "accept_at": {f"{tau:.2f}": figure(accept.loc[tau]) for tau in accept.index},
                "unbroken_prefix": figure(by_metric["unbroken_prefix_mean"].loc[threshold]),
            }
        clusters = len(set(pairs[name].clusters))
        found[name] = {"threshold": threshold, "n_clusters": clusters, "levels": levels}
    return {"threshold": threshold, "test": found}


def figure(value: statistics.Interval | Mapping[str, Any]) -> dict[str, Any]:
    """value, low, high, n and n_clusters, as the results hold a figure."""
    known = vars(value) if isinstance(value, statistics.Interval) else value
    counts = {name: int(known[name]) for name in ("n", "n_clusters")}
    return {name: None if pd.isna(known[name]) else float(known[name])
            for name in ("value", "low", "high")} | counts


def hidden_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """For reading: level, mean cosine, share above τ and mean unbroken prefix of one held-out set
    in the results of 03."""
    return pd.DataFrame([{
        "level": level, "reads": one["reads"], **tables.sides("cosine", one["cosine"]),
        **tables.sides("accept", one["accept"]), "unbroken": one["unbroken_prefix"]["value"],
        "tokens": one["cosine"]["n"],
    } for level, one in found["levels"].items()])


# --- 04: tokens


def token_kinds(token_texts: Sequence[str]) -> list[str]:
    """The kind of word that each token of an answer belongs to: colour, object, motion, …,
    function; "end" for its end. token_texts: join to the answer, word starts carry their space;
    ids ("#17") where nobody knows the texts."""
    text, of_characters = "".join(token_texts), []
    if re.fullmatch(r"(#\d+)+", text):
        return ["unknown"] * len(token_texts)
    for word, kind in language.word_kinds(text):
        space = text.index(word, len(of_characters)) - len(of_characters)
        of_characters += [""] * space + [kind] * len(word)
    kinds, at = [], 0
    for token in token_texts:
        most = Counter(filter(None, of_characters[at:at + len(token)])).most_common(1)
        kinds.append("end" if token == "</s>" else most[0][0] if most else "function")
        at += len(token)
    return kinds


def floor_rows(pairs: HeldOut, training: Sequence[Sequence[int]], gamma: int) -> pd.DataFrame:
    """The floors that look at nothing, as rows of a token table; those that nothing is known for
    are left out. training: the answers of the training set. Raises: ParameterError when no answer
    of the set has a second token."""
    if not any(len(ids) > 1 for ids in pairs.answers):
        raise ParameterError(
            f"every answer held out of {pairs.name} is a single token, so nothing is drafted and "
            "there is no acceptance to measure; extract with a larger max_new_tokens in notebook "
            "01, or other test_data")
    tried = [floors.position_mode(training), floors.ngram(training, 4)] if training else []
    if pairs.prompts is not None:
        tried.append(floors.prompt_lookup(pairs.prompts))
    return pd.concat([pd.DataFrame(), *(
        table.answers_as_rows(floor.match(pairs.answers), gamma, level=floor.name, first=-1,
                              clusters=pairs.clusters) for floor in tried
    )], ignore_index=True)


def acceptance(tokens: pd.DataFrame, floor_tokens: pd.DataFrame, adapters: Mapping[str, Adapter],
               *, gamma: int, top_k: int, threshold: float, n_resamples: int,
               seed: int) -> dict[str, Any]:
    """What ``results/tokens.json`` keeps of one held-out set: token acceptance and accepted drafts
    per round of every level, the drafter alone and the floors, each above the best floor; of the
    levels also, after the verified prefix, top k and what cosine > threshold overstates."""
    options = {"n_resamples": n_resamples, "seed": seed}
    counted = pd.concat([table.counts(one, gamma) for one in (tokens, floor_tokens)])
    there, rows = set(counted["level"]), {}
    below = {name: level for name, level in {**FLOORS, table.DRAFTER: table.DRAFTER}.items()
             if level in there}  # of imported chunks neither prompts nor drafter tokens are known
    found = above_floors(counted, below, **options)
    for name in [*adapters, *(one for one in (table.DRAFTER, *FLOORS) if one in below)]:
        matched, accepted = (found[unit][below.get(name, name)] for unit in UNITS)
        rows[name] = {
            **about(name, adapters), "token_acceptance": figure(matched.arm),
            "token_acceptance_above_floor": figure(matched.above_best),
            "accepted_per_round": figure(accepted.arm), "above_floor": figure(accepted.above_best),
        }
    for level in adapters:
        part = tokens[tokens["level"] == level]
        rank, right = part["one_step_rank"], part["one_step_match"].to_numpy(int)
        above = part["one_step_cosine"].to_numpy(np.float32) > np.float32(threshold)
        one_step, best, overstates = statistics.bootstrap_columns(
            np.stack([rank == 0, rank < top_k, above - right], axis=1), np.ones((len(part), 1)),
            part["sequence"], **options)
        rows[level] |= {"one_step": figure(one_step), "top_k": figure(best), "cosine_overstates":
                        {"threshold": threshold, **figure(overstates)}}
    reading = [level for level in adapters if rows[level]["kind"] == "adapter"]
    return {
        "rows": rows, "best_floor": accepted.best,
        "best_adapter": max(reading or adapters,
                            key=lambda level: rows[level]["accepted_per_round"]["value"]),
        "n_samples": int((counted["level"] == counted["level"].iloc[0]).sum()),
        "n_clusters": accepted.arm.n_clusters,
        **drawn(table.drafted(tokens)),
    }


def drawn(tokens: pd.DataFrame) -> dict[str, dict[str, list[Any]]]:
    """What the report draws of one token table, as columns; reliability is empty where no row has a
    cosine."""
    bands = reliability.curve(tokens)
    kept = ["level", "cosine", "cosine_low", "cosine_high", "n", "rate", "low", "high"]
    return {
        "by_position": curves.by_position(tokens, max_positions=POSITIONS).to_dict("list"),
        "reliability": bands[kept].to_dict("list") if len(bands) else {},
    }


def about(row: str, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """label: how a row is called in tables. kind: adapter, ceiling (reads the verifier's own states
    alone), drafter or floor."""
    if row in FLOORS:
        return {"label": FLOORS[row], "kind": "floor"}
    if row == table.DRAFTER:
        return {"label": "drafter tokens", "kind": "drafter"}
    if adapters[row].reads == "verifier":
        return {"label": f"{row} (reads the verifier)", "kind": "ceiling"}
    return {"label": row, "kind": "adapter"}


def token_results(found: Mapping[str, Mapping[str, Any]], kinds: pd.DataFrame) -> dict[str, Any]:
    """``results/tokens.json`` from the sets' :func:`acceptance` and their kinds of words (a column
    ``data`` says which)."""
    words: dict[str, Any] = {}
    for row in kinds.to_dict("records"):
        words.setdefault(row["data"], {}).setdefault(row["level"], {})[row["kind"]] = figure(row)
    return {"test": dict(found), "words": words}


def acceptance_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """For reading: row, kind, token acceptance, accepted drafts per round and distance above the
    best floor of one held-out set in the results of 04."""
    return pd.DataFrame([{
        "row": one["label"], "kind": one["kind"],
        **tables.sides("token_acceptance", one["token_acceptance"]),
        **tables.sides("accepted_per_round", one["accepted_per_round"]),
        **tables.sides("above_floor", one["above_floor"]), "n": one["accepted_per_round"]["n"],
    } for one in found["rows"].values()])
