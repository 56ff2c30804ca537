"""``xsd verify``: everything in a run folder, a report or an extraction held against what was
written: shards, heads, adapters, results, tables, records, notebooks."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from xsd import digests
from xsd.core import ParameterError, XsdError
from xsd.extract import checks
from xsd.runs import folder
from xsd.shards.format import MANIFEST
from xsd.shards.store import Problem
from xsd.steps import training
from xsd.train import folders

NOT_OURS = {"data", "dsec", "raw_dsec", ".ipynb_checkpoints"}
"""Folders of a run that hold what was given, not what came of it."""
RECORDED = {"results": ("*.json",), "tables": ("*.csv", "*.md", "*.tex"), "": (
    "tokens.parquet", "live.json", "pair.json", "extract.json", "named.json", "*.provenance.json")}
"""Files that are on their folder's record, by the folder's name ("": any)."""
AGAIN = "run the notebook again that writes it, or restore it from a copy"


def verify(run: str | Path) -> dict[Path, list[Problem]]:
    """Every folder of a run that holds something → what is wrong there; [] where all is well.
    Raises: ParameterError when nothing there came of a run."""
    run = Path(run)
    if not run.is_dir():
        raise ParameterError(f"there is no folder {run}; give a run, a report or an extraction")
    places = list(_folders(run))
    found = checks.verify(run, [one for one in places if (one / MANIFEST).is_file()])
    for place in places:
        problems = list(_of_files(place))
        if problems or digests.on_record(place) or (place / "records.jsonl").is_file():
            found.setdefault(place, []).extend(problems)
        if place.name == "adapters":
            said = training.problems(place.absolute().parent)
            found.setdefault(place, []).extend(map(_problem, said))
        elif (place / folders.CONFIG).exists() and "adapters" not in place.relative_to(run).parts:
            # one that stands by itself, as those of a study do
            found.setdefault(place, []).extend(map(_problem, folders.problems(place)))
        if (place / "results").is_dir():
            found.setdefault(place, []).extend(_absent(place))
    if not found:
        raise ParameterError(f"{run} is empty: it holds no pairs, adapters, results or notebooks; "
                             "give a folder that a run wrote")
    return found


def in_words(place: Path, problems: list[Problem]) -> str:
    """What is said of one folder that :func:`verify` found."""
    if problems:
        return f"{len(problems)} problem(s)"
    pairs = (place / MANIFEST).is_file()
    return "nothing extracted yet" if pairs and not any(place.glob("shard-*")) else "all well"


def _folders(run: Path) -> Iterator[Path]:
    """The run and all below it, links left out."""
    for place, inside, _ in os.walk(run):
        inside[:] = sorted(set(inside) - NOT_OURS)
        yield Path(place)


def _of_files(place: Path) -> Iterator[Problem]:
    """One folder's files: on record, as recorded, readable."""
    on_record = digests.on_record(place)
    for path, what in digests.problems(place).items():
        yield Problem(path, what, AGAIN)
    patterns = (*RECORDED[""], *RECORDED.get(place.name, ()))
    expected = {path for pattern in patterns for path in place.glob(pattern)}
    expected |= {one.with_name(one.name.replace(".provenance.json", ".ipynb"))
                 for one in expected if one.name.endswith(".provenance.json")}
    unknown = sorted(path.name for path in expected if path.name not in on_record)
    if unknown:
        yield Problem(place / digests.RECORD, "is missing or lacks a line: nothing says whether "
                      f"{', '.join(unknown[:3])}{' …' * (len(unknown) > 3)} ({len(unknown)} in "
                      "all) are as they were written", AGAIN)
    if any(place.glob("shard-*.*")) and not (place / MANIFEST).is_file():
        yield Problem(place / MANIFEST, "is missing", "restore it from a copy or extract again "
                      "into a new folder")
    if (place / "records.jsonl").exists():
        from xsd.bench import records

        try:
            records.read_records(place / "records.jsonl")
            if not (place / "records.jsonl").read_bytes().endswith(b"\n"):
                yield Problem(place / "records.jsonl", "ends inside a line", "run notebook 05 "
                              "again, it goes on there")
        except XsdError as error:
            what, _, way_out = str(error).partition("records.jsonl")[2].rpartition("; ")
            yield Problem(place / "records.jsonl", what.strip(": ") or "cannot be read", way_out)


def _problem(sentence: str) -> Problem:
    said, _, way_out = sentence.rpartition("; ")
    file, _, what = said.partition(" ")
    return Problem(Path(file), what, way_out)


def _absent(run: Path) -> Iterator[Problem]:
    """What a run's own results name and is not there."""
    known, expected = {}, []
    for name in ("extract", "train", "tokens"):
        known[name] = {}
        with contextlib.suppress(XsdError):  # a damaged one is named already
            known[name] = folder.read_record(run / "results" / f"{name}.json")
    with folder.as_written(run / "results"):
        extracted = known["extract"]
        for name in extracted.get("data_hashes", ()):
            split, _, data = name.partition("_")
            modes = (extracted["train"] if split == "train" else extracted["test"][data])["modes"]
            expected += [run / "shards" / name / mode / MANIFEST for mode in modes]
        expected += [run / "shards" / "pair.json"] * bool(extracted)
        expected += [run / "tokens.parquet"] * bool(known["tokens"])
        expected += [run / "adapters" / level for level in known["train"].get("levels", ())]
        for path in expected:
            if not path.exists():
                yield Problem(path, "is missing, though the results name it", AGAIN)
