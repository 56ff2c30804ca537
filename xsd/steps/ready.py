"""Making what a run folder lacks, with the smoke parameters, so that each notebook runs alone.

One call in a notebook's set-up cell; the steps below only read, and say what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from xsd.runs import folder, parameters, typed
from xsd.steps import acceptance, extraction, training
from xsd.steps import data as datasets


def ensure(P: typed.NotebookParameters, *, pairs: bool = True,
           adapters: bool | Sequence[str] = False, tokens: bool = False) -> None:
    """Extract pairs and train adapters where the run ``P.run_dir`` holds none at all.

    Whatever P has of data, test_data and levels is what is made. adapters: True for P.levels, or
    the names of the levels. tokens: also the token table of notebook 04, when P.run_dir is among
    P.runs and holds none; a run made before keeps its own data sets. Raises: as the steps do.
    """
    if tokens:
        _ensure_tokens(P)
        return
    data = getattr(P, "data", None)
    if pairs or adapters:
        extraction.ensure(P.run_dir, P.seed, data=data or datasets.SIMULATED,
                          test_data=getattr(P, "test_data", ()))
    if adapters:
        levels = P.levels if adapters is True else adapters  # type: ignore[attr-defined]
        data = data or extraction.pair_file(P.run_dir).get("data", datasets.SIMULATED)
        training.ensure(P.run_dir, P.seed, levels, data=data)


def _ensure_tokens(P: parameters.CompareParameters | parameters.ExploreParameters) -> None:
    own = folder.resolve(P.run_dir)
    if own not in map(folder.resolve, P.runs) or (own / "tokens.parquet").is_file():
        return
    begun = (own / extraction.PAIR_FILE).is_file()
    about = extraction.pair_file(own) if begun else {}
    known = {name: about[name] for name in ("data", "test_data") if name in about}
    given = {"run_dir": P.run_dir, "seed": P.seed, **known}
    acceptance.tokens(parameters.TokenParameters.checked(given))
