"""Extracting again just what is damaged in a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xsd.core import PairedStates, ShardError
from xsd.extract import pairs, plan, run
from xsd.models.batched import LAST
from xsd.models.loading import Pair
from xsd.shards import format as layout
from xsd.shards import store
from xsd.shards.writer import ShardWriter


def repair(pair: Pair, samples: Sequence[plan.Item], folder: str | Path, *,
           verifier_from: str | Path | None = None,
           problems: Sequence[store.Problem] | None = None) -> list[store.Problem]:
    """Extract the damaged shards of a run again, and nothing else. Returns what was mended.
    samples, verifier_from: as given to extract(). problems: as store.verify or checks.verify found
    them (default: store.verify now). Raises: ShardError if the models or samples are not those of
    the run (naming the difference), or for a damaged manifest; StorageError for a second writer."""
    folder = Path(folder)
    found = store.verify(folder) if problems is None else problems
    others = (layout.TIMES, *map(layout.head_name, layout.ROLES))
    found = [one for one in found if one.shard is not None or one.file.name in others]
    if not found:
        return []
    manifest = layout.read_manifest(folder)
    config = manifest["config"]
    if "samples_hash" not in config:
        raise ShardError(
            f"{folder} was not written by an extraction; restore {found[0].file.name} from a copy")
    items = plan.order(samples, max_samples=config["max_samples"],
                       max_scenes=config.get("max_scenes"), seed=config["seed"])
    now = {"samples_hash": plan.plan_hash(items), "drafter": run.identity(pair.drafter),
           "verifier": run.identity(pair.verifier)}
    answers = None
    if "verifier_from" in config:
        if verifier_from is None:
            raise ShardError(f"{folder} took the verifier's answers from another run; give that "
                             "run too (verifier_from, --reuse-verifier)")
        answers = pairs.StoredAnswers(
            verifier_from, verifier=config["verifier"], max_new_tokens=config["max_new_tokens"],
            layers=[config["layer"]] if "layer" in config else [])
        now["verifier_from"] = answers.dataset.manifest["digest"]
    if difference := layout.first_difference({key: config[key] for key in now}, now):
        raise ShardError(f"{folder} cannot be repaired with these models and samples: "
                         f"{difference}; give those it was extracted with")
    settings = ("mode", "tap", "dtype", "config", "samples_per_shard")
    writer = ShardWriter(folder, **{key: manifest[key] for key in settings})
    try:
        for number in sorted({problem.shard for problem in found if problem.shard is not None}):
            entry = manifest["shards"][number]
            writer.rewrite_shard(number, _again(pair, items, manifest, entry, answers))
        names = {problem.file.name for problem in found}
        for handle in (pair.drafter, pair.verifier):
            if layout.head_name(handle.role) in names:
                writer.save_head(handle.role, handle.head.weight, pair.draft_vocab_size)
        if layout.TIMES in names:
            writer.forget_times()
    finally:
        writer.close(finished=False)
    return found


def _again(pair: Pair, items: Sequence[plan.Item], manifest: Mapping[str, Any],
           entry: Mapping[str, Any], answers: pairs.StoredAnswers | None) -> list[PairedStates]:
    """One shard's samples, in the batches of the original run so that the bytes are the same."""
    config = manifest["config"]
    size, layer = config["batch_size"], config.get("layer", LAST)
    first = entry["first"] + config.get("part", {}).get("first", 0)
    end = first + entry["n_samples"]
    begin, states = first - first % size, []
    for start in range(begin, end, size):
        loaded = plan.load(items[start:start + size])
        verifier = None if answers is None else answers(loaded)
        states += pairs.by_layer(manifest["mode"], pair, loaded, config["max_new_tokens"], size,
                                 verifier=verifier, layers=[layer])[layer]
    return states[first - begin:end - begin]
