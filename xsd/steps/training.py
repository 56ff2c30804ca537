"""Step 02: one adapter for each level from the training pairs of a run, each by its recipe."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from xsd import files
from xsd.adapters import heads, registry
from xsd.adapters.base import Adapter
from xsd.core import CheckpointError, ParameterError, XsdError, as_used
from xsd.runs import folder, parameters
from xsd.shards.store import ShardDataset
from xsd.steps import extraction
from xsd.train import epochs, fit, folders, guards, recipes, source

FULL_SIZE, FULL_LAYERS = 4096, 32  # hidden size of the 7B pair, and its drafter's layers
L6 = "L6"  # the drafter's own LoRA (xsd.steps.drafter_tuning)


def train(pairs: ShardDataset, configs: Mapping[Any, Any], *, run_dir: str | os.PathLike[str],
          data: str = "simulated", seed: int = 0, validation: Any = None, head: str = "",
          device: str = "auto", progress: Callable[[str, dict[str, Any]], None] | None = None,
          ) -> dict[str, Any]:
    """Train the levels that the run lacks into ``<run_dir>/adapters``; finished ones are found
    again. Another training of a level that stands there is set aside (:func:`trainings`).

    Args: pairs: of the train split. configs: level (by name, as module:Class, a class or an object)
    → its FitConfig, for L6 a LoraFitConfig (:func:`config_of`). data: the data set of the pairs,
    which L6 reads its prompts from. validation: other pairs that choose the best epoch; None: whole
    sequences of ``pairs``. head: a file or folder (heads.read); empty: that of the pairs. progress:
    called with the level's name and each epoch's row.
    Returns: pairs, hidden_size, data_hash, of each of ``levels`` what it reads, its size and its
    best epoch, and its recipe. Raises: TrainingError when anything of the run's held-out sets is in
    the pairs.
    """
    extraction.remember(run_dir, "train", [pairs])
    states, weight = source.open_states(pairs), None
    if head:
        weight = heads.read(folder.resolve(head), states.hidden_size)
    elif pairs.manifest["heads"]:
        weight = pairs.head("verifier")
    judged, on, lines = guards.marks_of(held_out_sets(run_dir)), as_used(device)[0], {}
    for level, config in configs.items():
        name, place = files.name_of(level), adapter_folder(run_dir, level)
        report = None if progress is None else lambda row, name=name: progress(name, row)
        given = {"folder": place, "config": config, "head": weight, "seed": seed,
                 "validation": validation, "held_out": judged, "device": on, "progress": report}
        try:
            lines[name] = _train(level, pairs, states, run_dir, data, given)
        except epochs.OtherTraining as other:
            folders.set_aside(place, other.asked)
            lines[name] = _train(level, pairs, states, run_dir, data, given)
    return {"pairs": len(states), "hidden_size": states.hidden_size,
            "data_hash": states.fingerprint(), "levels": lines,
            "recipes": {files.name_of(level): dataclasses.asdict(config)
                        for level, config in configs.items()}}


def _train(level: Any, pairs: ShardDataset, states: source.States, run_dir: Any, data: str,
           given: dict[str, Any]) -> dict[str, Any]:
    if level == L6:
        from xsd.steps import drafter_tuning  # peft takes seconds to import, only L6 needs it

        result, held_out = drafter_tuning.train(pairs, run_dir=run_dir, data=data, **given)
        return _line(result, "drafter") | {"held_out": held_out}
    result = fit.fit_adapter(level, states, **given)
    return _line(result, registry.load_any_adapter(result.best_path, level=level).reads)


def _line(result: fit.FitResult, reads: str) -> dict[str, Any]:
    """A level's line in results/train.json."""
    best = result.history[result.best_epoch - 1]
    return {"reads": reads, "parameters": result.parameters, "seconds": result.seconds,
            "epochs": len(result.history), "best_epoch": result.best_epoch,
            "validation_loss": best["validation_total"],
            "validation_token_acceptance": best.get("token_acceptance"),
            "validation_cosine": best["cosine_similarity"]}


def config_of(given: parameters.TrainParameters, level: Any) -> Any:
    """The recipe of a level with what the parameters change; None changes nothing."""
    def changed(names: str, prefix: str = "") -> dict[str, Any]:
        return {name: value for name in names.split()
                if (value := getattr(given, prefix + name)) not in (None, "")}

    recipe = recipes.settings(given.recipe, level) | changed("epochs objective validation_share")
    if level == L6:
        from xsd.train import lora

        if given.batch_size is not None:  # answers a step, four a forward pass
            recipe |= {"batch_size": 4, "accumulation": max(1, given.batch_size // 4)}
        recipe |= changed("learning_rate rank alpha dropout accumulation patience", "lora_")
        return lora.LoraFitConfig(**recipe, gradient_checkpointing=given.lora_checkpointing)
    recipe |= changed("batch_size learning_rate patience position_decay noise")
    recipe["dtype"] = as_used(given.device, given.dtype)[1]
    if given.token_fusion and level in fit.FUSING:
        recipe["token_fusion"] = True
    own = {name: value for name, value in given.options.items()
           if name not in (*registry.TRAINED, *map(files.name_of, given.levels))}
    of_level = given.options.get(files.name_of(level), {})
    if not isinstance(of_level, Mapping):
        raise ParameterError(f"options of {files.name_of(level)} are name: value, not "
                             f"{of_level!r}; write e.g. L4: {{layers: 2}}")
    return fit.FitConfig(**recipe, draft_vocabulary=given.draft_vocabulary or None,
                         adapter_options={**own, **of_level})


def validation_pairs(given: parameters.TrainParameters) -> ShardDataset | None:
    """The pairs that choose the best epoch where they are named, else None."""
    name = given.validation_data
    return extraction.open_pairs(given.run_dir, "train", name, given.mode) if name else None


def save(given: parameters.TrainParameters, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``results/train.json`` from what :func:`train` returned."""
    results = {"profile": given.recipe, "mode": given.mode, **trained}
    results["provenance"] = files.provenance(
        seed=given.seed, data_hash=results.pop("data_hash"), device=given.device,
        parameters=given.model_dump())
    folder.save_results(given.run_dir, "train", results)
    return results


def run(given: parameters.TrainParameters, *,
        progress: Callable[[str, dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Notebook 02 in one call: open the pairs, train, write the results."""
    given = given.as_used()
    pairs = extraction.open_pairs(given.run_dir, "train", given.data, given.mode)
    configs = {level: config_of(given, level) for level in given.levels}
    return save(given, train(pairs, configs, run_dir=given.run_dir, data=given.data,
                             validation=validation_pairs(given), head=given.head, seed=given.seed,
                             device=given.device, progress=progress))


# --- what a run holds


def adapter_folder(run_dir: str | os.PathLike[str], level: Any) -> Path:
    """Where a level's training stands in a run; my_levels:Mine in adapters/my_levels.Mine."""
    return folder.resolve(run_dir) / "adapters" / re.sub(r"[:/\\]", ".", files.name_of(level))


def held_out_sets(run_dir: str | os.PathLike[str]) -> list[ShardDataset]:
    """Every finished extraction of a held-out set in a run."""
    shards = folder.resolve(run_dir) / "shards"
    return [one for path in sorted(shards.glob("test_*/*/manifest.json"))
            if (one := ShardDataset(path.parent, unfinished=True)).manifest["finished"]]


def trained(run_dir: str | os.PathLike[str]) -> list[str]:
    """The levels that a run holds: ours in the registry's order, then researchers' own."""
    names = sorted(registry.read_config(path)["level"] for path in (
        folder.resolve(run_dir) / "adapters").glob("*/best.safetensors"))
    ours = [level for level in registry.TRAINED if level in names]
    return ours + [name for name in names if name not in registry.TRAINED]


def load(run_dir: str | os.PathLike[str], levels: Sequence[Any],
         device: str = "cpu") -> dict[str, Adapter]:
    """The best checkpoint of each level of the run, and adapters by path, in eval mode on a device,
    by their short names. levels: as create_adapter takes them, or an adapter's file or folder.
    Raises: ParameterError naming the trained levels when one is missing."""
    names = [files.name_of(level) for level in levels]
    if missing := [
            name for name, level in zip(names, levels, strict=True) if not files.is_path(level)
            and not (adapter_folder(run_dir, level) / "best.safetensors").exists()]:
        raise ParameterError(
            f"the run {run_dir} holds no adapter {', '.join(missing)} (trained: "
            f"{', '.join(trained(run_dir)) or 'none'}); train with notebook 02 and "
            f"levels={','.join(missing)}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ParameterError(f"two of the levels are called {twice[0]!r}; name each once, and copy "
                             "or rename the folder of one")
    place = as_used(device)[0]
    return {name: (registry.load_any_adapter(folder.resolve(level)) if files.is_path(level) else
                   registry.load_any_adapter(adapter_folder(run_dir, level), level=level)).to(place)
            for name, level in zip(names, levels, strict=True)}


def problems(run_dir: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the trainings and adapters of a run, the earlier ones, too, a sentence
    each (folders.problems), and trainings that are not those of results/train.json."""
    run = folder.resolve(run_dir)
    places = {place for one in ("*", f"*/{folders.EARLIER}/*", "*/map")
              for place in (run / "adapters").glob(one) if place.is_dir()}
    found = [sentence for place in sorted(places) for sentence in folders.problems(place)]
    with contextlib.suppress(XsdError, KeyError, TypeError):  # whoever checks results says so
        told = files.read_json(run / "results" / "train.json", CheckpointError, "train again")
        asked = {"data": told["provenance"]["data_hash"], "seed": told["provenance"]["seed"]}
        for place in (adapter_folder(run, level) for level in told["levels"]):
            held = folders.read_config(place)
            found += [f"{place} is of another training than results/train.json: {name} is "
                      f"{held[name]!r} there and {value!r} here; put its own back, or train again"
                      for name, value in asked.items() if held.get(name) != value]
    return found


# --- tables


def trainings(run_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Every training in a run, one row each: level, training ("current", or the folder it was set
    aside in), ended, profile, epochs, best epoch, validation token acceptance, cosine and loss, and
    a star in ``best`` for the best of each level (by token acceptance where all have it, else by
    loss)."""
    rows = []
    for path in sorted((folder.resolve(run_dir) / "adapters").glob(f"**/{folders.HISTORY}")):
        if not (path.parent / folders.CONFIG).exists():  # P0's, of notebook 11
            continue
        about, rows_of = folders.read_config(path.parent), folders.read_history(path.parent)
        best = max(rows_of, key=lambda row: (row.get("token_acceptance", 0.0),
                                             -row["validation_total"]))
        current = path.parent.parent.name != folders.EARLIER
        rows.append({
            "level": about["level"], "training": "current" if current else path.parent.name,
            "ended": datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds"),
            "profile": about["config"].get("profile", "L6"), "epochs": len(rows_of),
            "best_epoch": best["epoch"], "token_acceptance": best.get("token_acceptance"),
            "cosine": best["cosine_similarity"], "loss": best["validation_total"]})
    frame = pd.DataFrame(rows)
    if len(frame):
        score = frame["token_acceptance"].astype(float)
        score = -frame["loss"] if score.isna().any() else score
        frame["best"] = score.groupby(frame["level"]).transform("max").eq(score).map(
            {True: "★", False: ""})
    return frame


def history(run_dir: str | os.PathLike[str], levels: Sequence[Any]) -> pd.DataFrame:
    """The epochs as ``views.figures.training_curves`` reads them: level, epoch, kept, split, loss,
    each term as ``<term> loss``, and for validation token_acceptance, cosine and accept_0.90 …"""
    rows = []
    for level in levels:
        place = adapter_folder(run_dir, level)
        if files.is_path(level):
            place = folder.resolve(level)
            place = place if place.is_dir() else place.parent
            if not (place / folders.HISTORY).is_file():  # an adapter alone, without its training
                continue
        best = place / "best.json"
        about = files.read_json(best, ParameterError, folder.AGAIN) if best.is_file() else {}
        for row in folders.read_history(place):
            line = {"level": files.name_of(level), "epoch": row["epoch"],
                    "kept": row["epoch"] == about.get("info", {}).get("epoch")}
            judged = {name: value for name, value in row.items() if name.startswith("accept_")}
            judged |= {"token_acceptance": row.get("token_acceptance"),
                       "cosine": row["cosine_similarity"]}
            rows.append({**line, "split": "train", **_losses(row, "train")})
            rows.append({**line, "split": "validation", **_losses(row, "validation"), **judged})
    return pd.DataFrame(rows or {"level": [], "epoch": [], "split": [], "loss": []})


def _losses(row: Mapping[str, Any], split: str) -> dict[str, float]:
    terms = {name.removeprefix(f"{split}_"): value for name, value in row.items()
             if name.startswith(f"{split}_") and name != "train_seconds"}
    return {"loss" if name == "total" else f"{name} loss": value for name, value in terms.items()}


def most_terms(history: pd.DataFrame) -> str:
    """The level whose loss is the sum of the most terms; the first of several."""
    losses = [name for name in history if name.endswith(" loss")]
    return history.set_index("level")[losses].notna().sum(axis=1).idxmax()


def terms(history: pd.DataFrame, level: str) -> pd.DataFrame:
    """The terms of one level's loss over its epochs, each divided by its first value in that split,
    as ``training_curves`` reads them."""
    rows = history[history["level"] == level].dropna(axis=1, how="all")
    losses = [name for name in rows if name.endswith(" loss")]
    first = rows.groupby("split")[losses].transform("first")
    long = rows.assign(**(rows[losses] / first)).melt(
        ["epoch", "split"], losses, "level", "loss against the first epoch")
    return long.assign(level=long["level"].str.removesuffix(" loss"))


def table(levels: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The trained levels (results["levels"]): what they read, parameters here and at the full size
    of 4096, epochs, best epoch, validation figures, seconds."""
    frame = pd.DataFrame([{"level": level, **found, "parameters at 4096": _full_size(level)}
                          for level, found in levels.items()])
    return frame.drop(columns="held_out", errors="ignore").astype({"parameters at 4096": "Int64"})


def _full_size(level: str) -> int | None:
    if level == L6:
        from xsd.train import lora

        return lora.size_of(FULL_SIZE, FULL_LAYERS)
    if level not in registry.TRAINED and ":" not in level:
        return None  # an object has the one size it was made with
    with torch.device("meta"):  # counted, not filled
        return registry.count_parameters(registry.create_adapter(level, FULL_SIZE))
