"""The run folder: what the notebooks of one run leave for each other and for the report
(docs/architecture.md, The run folder)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from xsd import digests
from xsd.core import ROOT, Generation, ParameterError, reading
from xsd.files import read_json
from xsd.runs import numbers

if TYPE_CHECKING:
    import pandas as pd

AGAIN = "run the notebook that made it again"
MAX_VALUES = 500_000_000
"""Of a token table: 4 GB."""


def resolve(run_dir: str | Path) -> Path:
    """An absolute folder; relative names start at the checkout, wherever we are."""
    return ROOT / run_dir


def shown(path: Path) -> str:
    """A folder as parameters and results give it: relative where it is inside the checkout."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def save_results(run_dir: str | Path, name: str, values: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``: nested numbers and texts (``value``, ``low``, ``high``,
    ``n``, ``kind``)."""
    target = resolve(run_dir) / "results" / f"{name}.json"
    digests.write_sealed(target, numbers.plain(values))
    return target


def load_results(run_dir: str | Path) -> dict[str, Any]:
    """All results of a run by name. Raises: ParameterError when the run has none, or one that is
    not what our notebooks write."""
    files = sorted((resolve(run_dir) / "results").glob("*.json"))
    if not files:
        raise ParameterError(f"the run {run_dir} holds no results; run notebooks 01 to 05 with "
                             f"run_dir={run_dir} first")
    found = {path.stem: read_record(path) for path in files}
    for path in files:
        with as_written(path):
            found[path.stem].get("provenance", {}).get("parameters", {}).keys()
    return found


def read_record(path: Path, way_out: str = AGAIN) -> dict[str, Any]:
    """A JSON file of a run. Raises: ParameterError when it is missing, damaged, changed since it
    was written, or holds something else than fields."""
    digests.check(path, ParameterError, way_out)
    return read_json(path, ParameterError, way_out, dict)


@contextlib.contextmanager
def as_written(what: str | Path) -> Iterator[None]:
    """For reading results, tables and records as our notebooks write them: where ``what`` is not so
    (a damaged or edited file), a ParameterError says it in place of the error it led to."""
    with reading(f"{what} is not what our notebooks write", ParameterError, AGAIN):
        yield


def data_hash(run_dir: str | Path, split: str = "test") -> str | None:
    """Hashes of the data that a run extracted from, 16 digits each, joined by "+", or None."""
    path = resolve(run_dir) / "results" / "extract.json"
    if not path.exists():
        return None
    with as_written(path):
        found = read_record(path).get("data_hashes", {}).items()
        return "+".join(value[:16] for name, value in found if name.startswith(split)) or None


def save_tokens(run_dir: str | Path, tokens: pd.DataFrame) -> Path:
    """Write the token table."""
    target = resolve(run_dir) / "tokens.parquet"
    with digests.sealed_path(target) as temporary:
        tokens.to_parquet(temporary, index=False)
    return target


def load_tokens(run_dir: str | Path) -> pd.DataFrame:
    """The token table of a run, ``run`` its folder where absent. Raises: ParameterError."""
    import pyarrow.parquet

    path = resolve(run_dir) / "tokens.parquet"
    if not path.is_file():
        raise ParameterError(f"the run {run_dir} has no token table (tokens.parquet); run notebook "
                             f"04 with run_dir={run_dir} first")
    digests.check(path, ParameterError, AGAIN)
    with as_written(path):
        about = pyarrow.parquet.read_metadata(path)
        if about.num_rows * about.num_columns > MAX_VALUES:
            raise ValueError(f"it says that it holds {about.num_rows} rows")
        tokens = pyarrow.parquet.read_table(path).to_pandas()
        tokens[["data", "level", "sample", "sequence", "position"]]  # what every reader needs
    return tokens if "run" in tokens.columns else tokens.assign(run=path.parent.name)


def save_live(run_dir: str | Path, generations: Mapping[str, Generation],
              texts: Mapping[int, str], **about: Any) -> Path:
    """Write one sample's generations by arm. about: question, sequence, clip, data."""
    target = resolve(run_dir) / "live.json"
    runs = {arm: dataclasses.asdict(generation) for arm, generation in generations.items()}
    digests.write_sealed(target, {"generations": runs, "order": list(generations), "about": about,
                                  "texts": {str(key): text for key, text in texts.items()}})
    return target


def live_of(stored: Mapping[str, Any]) -> tuple[dict[str, Generation], dict[int, str], Any]:
    """generations by arm, texts by token id, and about, of what :func:`save_live` wrote; results
    hold it as ``live/timeline``."""
    read = TypeAdapter(Generation).validate_python
    with as_written("the stored answer of notebook 05"):
        generations = {arm: read(stored["generations"][arm]) for arm in stored["order"]}
        texts = {int(key): text for key, text in stored["texts"].items()}
        return generations, texts, stored["about"]
