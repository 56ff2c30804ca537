"""Every adapter by name: create, save, load, count. A dict one can read (docs/adapters.md).

An adapter file is a safetensors file that carries its configuration and a digest of all it holds in
its own header, and the configuration beside it as JSON; the published reference code's .pt is read
too. No code in a file is ever run.
"""

import copy
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xsd import files
from xsd.adapters import linear, reference_files, tensor_files
from xsd.adapters.attention import AttentionAdapter
from xsd.adapters.base import Adapter
from xsd.adapters.block import BlockAdapter
from xsd.adapters.bottleneck import BottleneckAdapter, WideBottleneckAdapter
from xsd.adapters.eagle import CrossAdapter, EagleAdapter, FusedEagleAdapter
from xsd.adapters.own import OwnAdapter
from xsd.core import CheckpointError, ParameterError

LEVELS: dict[str, type[Adapter]] = {
    "L1": BottleneckAdapter, "L2": BottleneckAdapter, "L3": WideBottleneckAdapter,
    "L4": AttentionAdapter, "L5": EagleAdapter, "B1": EagleAdapter, "L5F": FusedEagleAdapter,
    "X1": CrossAdapter,
}
"""Adapters of the pairs' states."""
BLOCKS: dict[str, type[Adapter]] = dict.fromkeys(("D1", "D2", "D5F"), BlockAdapter)
"""Block drafters, which read contexts besides (adapters/block.py)."""
TRAINED = (*LEVELS, *BLOCKS)
"""The levels that fit_adapter trains."""
CLOSED_FORMS: dict[str, type[Adapter]] = dict.fromkeys(linear.KINDS, linear.LinearAdapter)
NAMES = (*TRAINED, *CLOSED_FORMS)
LORA = "adapter_model.safetensors"
"""What peft calls the weights of L6."""
FORMAT = "xsd-adapter-2"  # the first had no digest
COUNTS = ("layers", "n_blocks")
"""Options that say how many of something an adapter has; each has tensors of its own."""


def create_adapter(level: Any, hidden_size: int = 4096, *, drafter_size: int | None = None,
                   **options: Any) -> Adapter:
    """The adapter that a researcher means by ``levels=[…]``; a new one has weights from torch's
    current seed.

    Args: level: one of NAMES, "module:Class" or your own class, which is called with hidden_size,
    drafter_size and the options by name; or an object: an Adapter comes back as it is, another
    module with reads, shift and forward in an OwnAdapter. hidden_size: D_v. drafter_size: D_d where
    it differs. options: saved with the weights.
    Raises: ParameterError naming the known levels, or the option that the level does not have.
    """
    reduced = options.pop("draft_vocabulary", None)
    adapter = level
    if not isinstance(level, nn.Module):
        adapter = _build(level, hidden_size, drafter_size, options)
    elif options:
        raise ParameterError(f"{files.name_of(level)} is made already; give its class, or make it "
                             f"with {', '.join(options)}")
    if not isinstance(adapter, Adapter):
        adapter = OwnAdapter(adapter, hidden_size, drafter_size)
        adapter.level = files.name_of(adapter.module)
        if adapter.level in NAMES:
            raise ParameterError(f"{type(adapter.module).__name__} calls itself {adapter.level}, "
                                 "which is one of our levels; give its level another name")
    if level not in NAMES and not isinstance(level, nn.Module):
        adapter.level, adapter.options = files.name_of(level), options
        adapter.made_from = files.import_object(level) if isinstance(level, str) else level
    adapter.level = adapter.level or files.name_of(adapter)
    if reduced is not None:  # the ids come from the file, or from set_draft_vocabulary
        adapter.set_draft_vocabulary(torch.arange(reduced))
    return adapter


def _build(level: Any, hidden_size: int, drafter_size: int | None,
           options: dict[str, Any]) -> nn.Module:
    sizes = {"hidden_size": hidden_size, "drafter_size": drafter_size}
    try:
        if level in NAMES:
            return {**LEVELS, **BLOCKS, **CLOSED_FORMS}[level](level=level, **sizes, **options)
        if isinstance(level, str) and ":" not in level:
            raise ParameterError(f"unknown adapter level {level!r}; choose one of "
                                 f"{', '.join(NAMES)}, or name a class of your own as module:Class")
        build = files.import_object(level) if isinstance(level, str) else level
        return build(**sizes | {"drafter_size": drafter_size or hidden_size}, **options)
    except ParameterError:
        raise
    except Exception as error:  # torch's for a size of 0, 10¹², -1 or "x", and a class's own
        raise ParameterError(
            f"adapter {files.name_of(level)} cannot be made ({tensor_files.short(error)}); see "
            "docs/adapters.md for the options of ours, docs/extending.md for what your own class "
            "must take") from error


def count_parameters(adapter: nn.Module) -> int:
    """Number of parameters (closed forms' frozen weights included, buffers not)."""
    return sum(parameter.numel() for parameter in adapter.parameters())


# --- files


def save_adapter(adapter: nn.Module, path: str | Path, **info: Any) -> Path:
    """Write weights and configuration, atomically; returns the safetensors path.

    path: a name ending in .safetensors, or a folder (then adapter.safetensors in it). info: JSON
    values kept in the configuration under "info".
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / "adapter.safetensors"
    config = {"format": FORMAT, **adapter.config(), "parameters": count_parameters(adapter),
              "info": info}
    tensor_files.write(path, adapter.state_dict(), config)
    files.write_json(path.with_suffix(".json"), config)
    return path


def load_any_adapter(path: str | Path, *, device: str | torch.device = "cpu",
                     level: Any = None) -> Adapter:
    """The adapter in a file or run folder, whatever its level, in eval mode.

    path: a .safetensors file; a folder holding best.safetensors, adapter.safetensors or
    final.safetensors; or a reference .pt. level: what it is to be, as :func:`create_adapter` takes
    it (of an object a copy is filled); needed for a class of your own, which no file may name for
    you, and to tell B1 from L5 in a reference .pt.
    Raises: CheckpointError when it is missing, damaged, exchanged for another
    (:func:`check_place`), no adapter, or does not fit its own configuration.
    """
    path = _resolve(Path(path))
    config, tensors = _read(path, level)
    check_place(path, config)
    held = config["level"]
    if level is None and held is not None and held not in NAMES:
        raise CheckpointError(
            f"{path} holds {held!r}, a class of your own: name it with level={held!r} (or pass "
            "the class), since nothing that only a file names is imported")
    if isinstance(level, str) and level != held and (level in NAMES or held in NAMES):
        raise CheckpointError(
            f"{path} holds {held!r}, not the {level} asked for; give another file or level")
    wanted = held if level is None else level
    if not isinstance(level, nn.Module):
        _check_room(path, config, tensors, wanted)
    adapter = _empty(path, config, wanted)
    _check_shapes(path, adapter.state_dict(), tensors, held)
    adapter.load_state_dict(tensors)
    return adapter.to(device).eval()


def _check_room(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor],
                wanted: Any) -> None:
    """Nothing is made larger than the file is: no width above the number of its values, not more
    layers than tensors, and the shapes agree before a weight is allocated."""
    room = sum(tensor.numel() for tensor in tensors.values())
    own = wanted not in NAMES
    named = {**{key: config.get(key) for key in ("hidden_size", "drafter_size")},
             **({} if own else config["options"])}
    for name, value in named.items():
        most = len(tensors) if name in COUNTS else max(room, 1)
        if isinstance(value, (int, float)) and value > most:
            raise CheckpointError(f"{path} says {name}={reprlib.repr(value)} and holds {room} "
                                  f"values in {len(tensors)} tensors; save it again")
    reduced = {"draft_vocabulary": None}
    try:
        with torch.device("meta"):
            empty = _empty(path, {**config, "options": config["options"] | reduced}, wanted)
    except CheckpointError:
        if not own:  # a class of one's own may need real numbers
            raise
        return
    found = {name: tensor for name, tensor in tensors.items() if name != "draft_ids"}
    _check_shapes(path, empty.state_dict(), found, config["level"])


def _empty(path: Path, config: Mapping[str, Any], wanted: Any) -> Adapter:
    """The adapter that a configuration describes, its initial values drawn and thrown away; the
    caller's random stream stays as it was."""
    sizes = {key: config[key] for key in ("hidden_size", "drafter_size") if config.get(key)}
    options = config["options"]
    if isinstance(wanted, nn.Module):  # it has all its options but this one
        options = {key: options[key] for key in ("draft_vocabulary",) if key in options}
    try:
        with torch.random.fork_rng(devices=[]):
            return create_adapter(copy.deepcopy(wanted), **sizes, **options)
    except (TypeError, ValueError, RuntimeError, ParameterError) as error:
        raise CheckpointError(f"{path} does not say which adapter it is "
                              f"({tensor_files.short(error)}); save it with save_adapter"
                              ) from error


def _check_shapes(path: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor],
                  held: str) -> None:
    missing, unexpected = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise CheckpointError(f"{path} is no whole {held}: missing {missing[:3] or 'nothing'}, "
                              f"unexpected {unexpected[:3] or 'nothing'}; save it again")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, {held} expects "
                                  f"{tuple(expected[name].shape)}; was it saved at another width?")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype}, {held} expects "
                                  f"{expected[name].dtype}; save it again")


def read_config(path: str | Path) -> dict[str, Any]:
    """Level, widths, options, parameters and info of an adapter file, its weights unread and its
    digest not compared."""
    return _read(_resolve(Path(path)), weights=False)[0]


def check(path: Path) -> None:
    """Raises: CheckpointError when an adapter's file, or a folder of L6's weights, is damaged or
    stands in another training's place; no class that it names is imported."""
    if not path.is_dir():
        return check_place(path, _read(path)[0])
    config, _ = tensor_files.read(path / LORA)
    settings = path / "adapter_config.json"
    digest = files.sha256_of(settings) if settings.is_file() else ""
    if config.get("settings", digest) != digest:
        raise CheckpointError(f"{settings} does not match its checksum; {tensor_files.AGAIN}")
    if config:
        check_place(path, {"level": "L6", "info": {}, **config})


def check_place(path: Path, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError when an adapter is not of the training whose folder it stands in:
    by its level's folder, by its own name (best or final) and by the config.json beside it."""
    info, folder = config.get("info", {}), path.parent
    if folder.parent.name == "adapters" and folder.name in NAMES and folder.name != config["level"]:
        raise CheckpointError(f"{path} holds an {config['level']}, and its folder is that of "
                              f"{folder.name}; put each back, or train {folder.name} again")
    if info.get("file", path.stem) != path.stem and path.stem in ("best", "final"):
        raise CheckpointError(f"{path} is the {info['file']}.safetensors of a training; put it "
                              "back under its name, or train again")
    if not (folder / "config.json").is_file():
        return
    asked = tensor_files.read_signed(folder / "config.json", tensor_files.AGAIN)
    held = {"level": config["level"], **info}
    other = [f"{name} {held[name]!r} where config.json says {asked[name]!r}"
             for name in ("level", "seed", "data", "training")
             if name in held and name in asked and held[name] != asked[name]]
    if other:
        raise CheckpointError(f"{path} is of another training than its folder: "
                              f"{', '.join(other)}; put its own back, or train again")


def _resolve(path: Path) -> Path:
    names = ("best.safetensors", "adapter.safetensors", "final.safetensors")
    try:
        found = [path]
        if path.is_dir():
            found = [path / name for name in names if (path / name).exists()]
        there = bool(found) and found[0].is_file()
    except (OSError, ValueError) as error:  # too long, or a character that no name has
        raise CheckpointError(f"{str(path)[:80]!r} is no path ({tensor_files.short(error)[:80]}); "
                              "give an adapter's .safetensors file or its run folder") from error
    if not found:
        raise CheckpointError(f"{path} holds no adapter (best.safetensors, adapter.safetensors or "
                              "final.safetensors); train one or give the file itself")
    if not there:
        raise CheckpointError(
            f"{path} does not exist; give an adapter's .safetensors file or its run folder")
    return found[0]


def _read(path: Path, level: Any = None, *,
          weights: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.suffix in (".pt", ".pth"):
        return reference_files.read(path, level=level)
    config, tensors = tensor_files.read(path, weights=weights)
    if not config:
        raise CheckpointError(
            f"{path} holds tensors but no adapter configuration; save it with save_adapter")
    sizes = [config.get(key) for key in ("hidden_size", "drafter_size") if key in config]
    whole = [isinstance(one, int) and one > 0 for one in sizes]
    kinds = {"level": str, "options": dict, "info": dict}
    if not all(whole) or not all(isinstance(config.get(name), kind)
                                 for name, kind in kinds.items()):
        raise CheckpointError(f"{path} does not say which adapter it is (level, hidden_size, "
                              "options, info); save it with save_adapter")
    return config, tensors
