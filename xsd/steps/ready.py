"""Making what a run folder lacks, with the smoke parameters, so that each notebook runs alone: one
call in a notebook's set-up cell. The steps below only read, and say what is missing."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from xsd import files
from xsd.evaluate import curves, table
from xsd.runs import folder, parameters, typed
from xsd.steps import data as datasets
from xsd.steps import evaluation, extraction, training


def ensure(P: typed.NotebookParameters, *, pairs: bool = True,
           adapters: bool | Sequence[str] = False, tokens: bool = False) -> None:
    """Extract pairs and train adapters where the run ``P.run_dir`` holds none at all, of P's data,
    test_data and levels.

    adapters: True for P.levels, or the names of the levels. tokens: the token table of notebook 04,
    when P.run_dir is among P.runs and holds none; a run made before keeps its own data sets."""
    if tokens:
        _ensure_tokens(P)
        return
    own = {"run_dir": P.run_dir, "seed": P.seed}
    if (pairs or adapters) and not (folder.resolve(P.run_dir) / extraction.PAIR_FILE).is_file():
        _extract(P, own)
    levels = P.levels if adapters is True else adapters or []  # type: ignore[attr-defined]
    levels = [level for level in levels if not files.is_path(level)]
    if levels and not training.trained(P.run_dir):
        data = P.data if hasattr(P, "data") else extraction.pair_file(P.run_dir).get(
            "data", datasets.SIMULATED)
        training.run(parameters.TrainParameters.checked({**own, "levels": levels, "data": data}))


def _extract(P: typed.NotebookParameters, own: dict[str, Any]) -> None:
    """The sets that P names, and training sequences to go with them; none of those given by path,
    and nothing where all are."""
    sets = {name: getattr(P, name) for name in (
        "data", "test_data", *parameters.ModelParameters.model_fields) if hasattr(P, name)}
    if "test_data" in sets:
        asked = sets["test_data"] or sets["data"]
        sets["test_data"] = [name for name in ([asked] if isinstance(asked, str) else asked)
                             if extraction.stored(name, "test") is None]
    by_path = extraction.stored(sets.get("data", datasets.SIMULATED), "train") is not None
    if by_path:
        sets["n_train_sequences"] = 0
    if sets.get("test_data", not by_path):
        extraction.run(parameters.ExtractParameters.checked({**own, **sets}))


def _ensure_tokens(P: parameters.CompareParameters | parameters.ExploreParameters) -> None:
    own = folder.resolve(P.run_dir)
    if own not in map(folder.resolve, P.runs) or (own / "tokens.parquet").is_file():
        return
    begun = (own / extraction.PAIR_FILE).is_file()
    if not begun and extraction.named(own):
        return  # its sets stand elsewhere and only their owner knows them: 06 says to run 04
    about = extraction.pair_file(own) if begun else {}
    known = {name: about[name] for name in ("data", "test_data") if name in about}
    given = {"run_dir": P.run_dir, "seed": P.seed, **known}
    token_table(parameters.TokenParameters.checked(given))


def token_table(P: parameters.TokenParameters) -> dict[str, Any]:
    """What notebook 04 measures and writes, without its pictures: the token table and
    ``results/tokens.json``, which are returned."""
    ensure(P, adapters=True)
    adapters = training.load(P.run_dir, P.levels, P.device)
    pairs = evaluation.held_out_sets(P.run_dir, P.test_data, P.mode, P.head)
    answers = evaluation.training_answers(P.run_dir, P.data)
    options = {"n_resamples": P.resamples, "seed": P.seed}
    found, kept, kinds = {}, {}, []
    for name, one in pairs.items():
        tokens = table.measure(adapters, one, gamma=P.gamma, top_k=P.top_k, columns=P.columns,
                               batch_size=P.batch_size, kinds=evaluation.token_kinds)
        floors = evaluation.floor_rows(one, answers, P.gamma)
        found[name] = evaluation.acceptance(tokens, floors, adapters, gamma=P.gamma, top_k=P.top_k,
                                            threshold=P.threshold, **options)
        kinds.append(curves.by_kind(tokens, **options).assign(data=name))
        kept[name] = table.drafted(tokens)
    folder.save_tokens(P.run_dir, table.join(kept))
    results = evaluation.token_results(found, pd.concat(kinds, ignore_index=True))
    return evaluation.save(P.run_dir, "tokens", {"mode": P.mode, "gamma": P.gamma, **results},
                           pairs, P.model_dump())
