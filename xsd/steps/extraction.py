"""Step 01: paired hidden states of the training set and of every held-out set, into the run folder;
and reading them there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from xsd import digests
from xsd.core import ParameterError, ShardError
from xsd.evaluate import floors, statistics
from xsd.extract import plan
from xsd.extract.pairs import MODES
from xsd.files import is_path, provenance
from xsd.runs import folder, parameters
from xsd.sensors import folder as dataset_folder
from xsd.shards import chunks
from xsd.shards.format import MANIFEST
from xsd.shards.store import ShardDataset
from xsd.steps import data as datasets
from xsd.steps import extract_request
from xsd.steps.extract_request import Request, here, load_request

if TYPE_CHECKING:
    from xsd.models import loading

PAIR_FILE = f"shards/{extract_request.PAIR}"
"""What later steps need of the pair without loading it: its name, every token's text, the prompts'
ids."""
Key = tuple[str, str]
"""A data set of a run: its split, and its name as it was given."""


def shard_folder(run_dir: str | os.PathLike[str], split: str, data: str, mode: str) -> Path:
    """Where the pairs of one data set and mode stand in a run."""
    return folder.resolve(run_dir) / "shards" / f"{split}_{datasets.name_of(data)}" / mode


# --- extracting


def run(given: parameters.ExtractParameters, *, progress: Any = None) -> dict[str, Any]:
    """Extract what is missing and write ``results/extract.json``; a finished run is found again.

    progress: as in extract.run.extract. Returns the results. Raises: ShardError when the run folder
    was begun with other settings or another pair, MetricError when a sequence is in training and in
    test, and as the rooms below.
    """
    from xsd.models import loading  # three seconds that only who extracts should wait for

    given = given.as_used()
    pair = loading.load_pair(given.pair, **given.loads)
    asked = requests(given)
    samples = {key: request.samples(pair) for key, request in asked.items()}
    check_apart(samples)
    modes = {"train": given.train_modes, "test": given.test_modes}
    counts = {(split, name): extract(
        given.run_dir, name, request, pair, samples[split, name], modes=modes[split],
        max_new_tokens=given.max_new_tokens, dtype=given.stored, batch_size=given.batch_size,
        contexts=given.contexts, seed=given.seed, progress=progress)
        for (split, name), request in asked.items()}
    return save(given, pair, samples, counts)


def requests(given: parameters.ExtractParameters) -> dict[Key, Request]:
    """What is asked of the training set, if any, and of each held-out one. Simulated drives are
    made here, once."""
    sizes = {"train": given.n_train_sequences, "test": given.n_test_sequences}
    names = [("train", given.data)] if given.n_train_sequences else []
    found = {}
    for split, name in (*names, *(("test", name) for name in given.test_data)):
        root = datasets.prepare(given.run_dir, name, split, n_sequences=sizes[split],
                                seed=given.seed, workers=given.workers)
        own = name not in (datasets.SIMULATED, datasets.RECORDED)  # clips of many lengths
        spread = given.questions_per_sequence if given.sampling == "spread" else 0
        found[split, name] = Request(
            here(root), split, here(given.pair), n_sequences=sizes[split],
            questions_per_sequence=spread, questions_file=given.questions_file if own else "",
            max_questions=given.max_questions, duration=given.duration if own else "",
            **given.loads)
    return found


def check_apart(samples: Mapping[Key, Sequence[plan.LazySample]]) -> None:
    """Refuse a sequence that is in training and held out. Raises: MetricError naming it."""
    sequences: dict[str, list[str]] = {"train": [], "test": []}
    for (split, _), some in samples.items():
        sequences[split] += [sample.sequence for sample in some]
    if sequences["train"]:
        statistics.check_disjoint(sequences["train"], sequences["test"])


def extract(run_dir: str | os.PathLike[str], data: str, request: Request,
            pair: loading.Pair, samples: Sequence[plan.LazySample], *, modes: Sequence[str],
            contexts: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """The pairs of one data set, named as given, into the run folder. contexts: models whose
    contexts are stored beside the teacher-forced ones (extract/contexts.py). options: of
    extract.run.extract.

    Returns what was extracted: sequences, clips, event_frames (stored and painted), pairs, tokens,
    gb, modes. Raises: ParameterError when it was interrupted, and as extract.run.extract.
    """
    from xsd.extract import contexts as contexts_of
    from xsd.extract import run as extraction

    root, split = request.root(), request.split
    place = shard_folder(run_dir, split, data, modes[0]).parent
    config = {"split": split, "data": datasets.name_of(data),
              "data_hash": dataset_folder.data_hash(root)}
    request.save(place, first=True)
    report = extraction.extract(pair, samples, place, modes=modes, config=config,
                                about=request.about(), **options)
    if not report.finished:
        raise ParameterError(f"the extraction of {split} {data} was interrupted after {report.n} "
                             "samples; run it again to continue")
    request.save(place)
    if contexts and "teacher_forced" in modes:
        contexts_of.extract(pair, samples, ShardDataset(place / "teacher_forced"), roles=contexts)
    clips = {(sample.sequence, sample.clip) for sample in samples}
    frames = datasets.event_frames_of(root, split, clips, pair.n_event_frames, pair.event_canvas)
    return {"sequences": len({sequence for sequence, _ in clips}), "clips": len(clips),
            "event_frames": frames, "pairs": report.n, "tokens": report.tokens, "gb": report.gb,
            "batch_size": report.batch_size, "modes": list(modes), "data_hash": config["data_hash"]}


def save(given: parameters.ExtractParameters, pair: loading.Pair,
         samples: Mapping[Key, Sequence[plan.LazySample]],
         counts: Mapping[Key, Mapping[str, Any]]) -> dict[str, Any]:
    """Write ``shards/pair.json`` and ``results/extract.json``. counts: of :func:`extract`. Returns
    the results, with how templated the answers are."""
    extract_request.save_pair(folder.resolve(given.run_dir) / "shards", pair, given.pair,
                              {one.question for some in samples.values() for one in some},
                   # as given: a dataset folder is found again by its path
                   data=given.data, test_data=list(given.test_data), loads=given.loads)
    training: list[list[int]] | None = None
    tests, hashes = {}, {}
    results: dict[str, Any] = {"pair": pair.name, "modes": list(given.test_modes), "test": tests}
    for (split, name), counted in counts.items():
        found, short = dict(counted), datasets.name_of(name)
        hashes[f"{split}_{short}"] = found.pop("data_hash")
        stored = open_pairs(given.run_dir, split, name, found["modes"][0])
        own = [ids.tolist() for ids in stored.ids("verifier")]
        if split == "train":
            results["train"], training = found, own
            continue
        rate = floors.duplicate_rate(own, training)
        tests[short] = {**found, "duplicate_rate": rate.shared,
                        "answers_in_training": rate.in_training}
    data_hash = next(iter(hashes.values()))  # the training set's, where there is one
    results |= {
        "duplicate_rate": next(iter(tests.values()))["duplicate_rate"], "data_hash": data_hash,
        "data_hashes": hashes,
        "weights": {handle.role: handle.weights_hash() for handle in (pair.drafter, pair.verifier)},
        "provenance": provenance(seed=given.seed, data_hash=data_hash, device=given.device,
                                 parameters=given.model_dump())
    }
    folder.save_results(given.run_dir, "extract", results)
    return results


# --- reading


def pair_file(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """pair, eos, prompt_ids by question, token_texts by id. Raises: ParameterError when nothing was
    extracted here."""
    path = folder.resolve(run_dir) / PAIR_FILE
    if not path.exists():
        raise ParameterError(
            f"the run {run_dir} holds no extraction; run notebook 01 with run_dir={run_dir} first")
    return extract_request.read_pair(path)


def stored(data: str, split: str) -> Path | None:
    """What stands behind a path to pairs that exist already: a finished extraction, a shard folder,
    the set of another run, or .pt chunks; None for clips (a name, a dataset folder). Raises:
    ParameterError for a run that holds no, or more than one, set of the split."""
    path = folder.resolve(data)
    if data in (datasets.SIMULATED, datasets.RECORDED):
        return None
    shards = (path / MANIFEST).is_file() or any(path.glob(f"*/{MANIFEST}"))
    if shards or path.suffix == ".pt" or (path / "index.json").is_file():
        return path
    if not (path / "shards").is_dir():
        return None
    sets = sorted(path.glob(f"shards/{split}_*/"))
    if len(sets) != 1:
        held = ", ".join(place.name for place in sets) or "none"
        raise ParameterError(f"the run {data} holds {len(sets)} {split} sets ({held}); name the "
                             f"folder of one, such as {data}/shards/{split}_simulated")
    return sets[0]


def pairs_folder(run_dir: str | os.PathLike[str], split: str, data: str,
                 mode: str | None = None) -> Path:
    """The folder of shards of a data set: in the run, or behind its path (chunks are imported into
    the run, once). mode: None is the one that is there, teacher_forced before free_running; behind
    a path also where there is but another one. Raises: ParameterError saying what is there."""
    path = stored(data, split)
    if path is None:
        place = shard_folder(run_dir, split, data, "")
    elif path.suffix == ".pt" or (path / "index.json").is_file():
        place = folder.resolve(run_dir) / "imported" / datasets.name_of(data)
        chunks.import_chunks(path, place)
    else:
        place = path
    if (place / MANIFEST).is_file():
        return place
    held = [one for one in MODES if (place / one / MANIFEST).is_file()]
    if mode in held:
        return place / mode
    if held and (mode is None or (path is not None and len(held) == 1)):
        return place / held[0]
    what = f"{mode} pairs" if mode else "pairs"
    if path is not None:
        raise ParameterError(f"{data} holds no {what} after the last layer (it holds: "
                             f"{', '.join(held) or 'none'}); give one of its modes")
    if is_path(data) and not folder.resolve(data).exists():
        raise ParameterError(f"there is nothing at {folder.resolve(data)}; give an extraction, a "
                             "folder of shards or of .pt chunks, another run, or a dataset folder")
    others = sorted(f"{one.parent.name}/{one.name}" for one in place.parent.glob("*/*/"))
    raise ParameterError(
        f"the run {run_dir} holds no {what} of {split} {datasets.name_of(data)} (it holds: "
        f"{', '.join(others) or 'none'}); run notebook 01 with this data set and mode first")


def open_pairs(run_dir: str | os.PathLike[str], split: str, data: str,
               mode: str | None = None) -> ShardDataset:
    """The stored pairs of a data set, by name or path (:func:`pairs_folder`, :func:`stored`).
    Raises: ShardError when they are damaged or unfinished."""
    return ShardDataset(pairs_folder(run_dir, split, data, mode))


def known(pairs: ShardDataset) -> dict[str, Any]:
    """What is known of the models behind stored pairs, from the ``pair.json`` beside them: pair,
    eos, prompt_ids, token_texts; {} of imported chunks."""
    beside = [pairs.folder, *pairs.folder.resolve().parents[:2]]
    found = (place / extract_request.PAIR for place in beside)
    path = next((one for one in found if one.exists()), None)
    return extract_request.read_pair(path) if path else {}


def clips_of(run_dir: str | os.PathLike[str], split: str, data: str,
             pairs: ShardDataset) -> list[dataset_folder.ClipRecord]:
    """The clips that stored pairs were extracted from. Raises: ParameterError of imported chunks,
    which do not know them, and for a folder that has moved."""
    if stored(data, split) is None:
        return dataset_folder.open_folder(datasets.root_of(run_dir, data, split), split)
    try:
        request = load_request(pairs.folder)
    except ShardError:
        raise ParameterError(f"{data} does not say of which clips its pairs are, so nobody knows "
                             "their pictures; name what xsd data extract wrote, or leave it out "
                             "here") from None
    return dataset_folder.open_folder(request.root(), request.split)


def remember(run_dir: str | os.PathLike[str], split: str, sets: Iterable[ShardDataset]) -> None:
    """Note in the run which sets from elsewhere it trained on or was judged on."""
    own, before = folder.resolve(run_dir) / "shards", named(run_dir)
    places = [str(one.folder.resolve()) for one in sets if not one.folder.is_relative_to(own)]
    after = {**before, split: list(dict.fromkeys([*before.get(split, ()), *places]))}
    if places and after != before:
        digests.write_sealed(own / "named.json", after)


def named(run_dir: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Folders of the sets from elsewhere that a run used, by split."""
    path = folder.resolve(run_dir) / "shards" / "named.json"
    if not path.exists():
        return {}
    again = "delete it and run notebooks 02 and 04 again"
    with folder.as_written(path):
        found = folder.read_record(path, again)
        return TypeAdapter(dict[str, list[str]]).validate_python(found)


def held_out_names(run_dir: str | os.PathLike[str]) -> list[str]:
    """What a run was judged on: sets as notebook 01 was given them, and paths."""
    begun = (folder.resolve(run_dir) / PAIR_FILE).is_file()
    return [*(pair_file(run_dir)["test_data"] if begun else ()), *named(run_dir).get("test", ())]


def training_sequences(run_dir: str | os.PathLike[str]) -> set[str]:
    """The sequences of every training set of a run, its own and those from elsewhere."""
    own = (folder.resolve(run_dir) / "shards").glob(f"train_*/*/{MANIFEST}")
    places = [*(path.parent for path in own), *map(Path, named(run_dir).get("train", ()))]
    return {name for place in places
            for name in ShardDataset(place, unfinished=True).table()["sequence"]}
