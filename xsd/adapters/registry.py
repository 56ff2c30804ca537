"""Every adapter by name: create, save, load, count. A dict one can read (docs/adapters.md).

An adapter file is a safetensors file that carries its configuration in its own header, and beside
it as JSON; the published reference code's .pt is read too. No code in a file is ever run.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xsd import files
from xsd.adapters import linear, reference_files
from xsd.adapters.attention import AttentionAdapter
from xsd.adapters.base import Adapter
from xsd.adapters.bottleneck import BottleneckAdapter, PixelAlignment, WideBottleneckAdapter
from xsd.adapters.eagle import CrossAdapter, EagleAdapter, FusedEagleAdapter
from xsd.core import CheckpointError, ParameterError

LEVELS: dict[str, type[Adapter]] = {
    "L1": BottleneckAdapter, "L2": BottleneckAdapter, "L3": WideBottleneckAdapter,
    "L4": AttentionAdapter, "L5": EagleAdapter, "B1": EagleAdapter, "L5F": FusedEagleAdapter,
    "X1": CrossAdapter,
}
"""The levels that fit_adapter trains."""
CLOSED_FORMS: dict[str, type[Adapter]] = dict.fromkeys(linear.KINDS, linear.LinearAdapter)
NAMES = (*LEVELS, "P0", *CLOSED_FORMS)
FORMAT = "xsd-adapter-1"


class OwnAdapter(Adapter):
    """What every adapter can do (shift, steps, unrolling, files), around a researcher's plain
    module (docs/extending.md).

    The module says ``reads`` and ``shift``, and where they differ from the defaults ``causal``,
    ``pointwise``, ``fuses_tokens`` and ``drafter_lead`` (1 for reads == "both"). Its forward takes
    the states that it reads, and ``mask`` if it wants one.
    """

    def __init__(self, module: nn.Module, hidden_size: int,
                 drafter_size: int | None = None) -> None:
        reads, shift = getattr(module, "reads", None), getattr(module, "shift", None)
        who = type(module).__name__
        if reads not in ("drafter", "verifier", "both"):
            raise ParameterError(f"{who}.reads is {reads!r}; say what forward takes: drafter, "
                                 "verifier, both")
        if shift != (0 if reads == "drafter" else 1):
            raise ParameterError(
                f"{who} reads {reads} with shift {shift!r}: shift is 0 where the drafter's states "
                "alone are read and 1 where the verifier's are, or it would see what it predicts")
        self.reads, self.shift = reads, shift
        super().__init__(hidden_size)
        self.drafter_size = drafter_size or hidden_size
        self.drafter_lead = getattr(module, "drafter_lead", 1 if reads == "both" else 0)
        for name in ("causal", "pointwise", "fuses_tokens"):
            setattr(self, name, getattr(module, name, getattr(self, name)))
        self._takes_mask = "mask" in inspect.signature(module.forward).parameters
        self.module = module

    def forward(self, *inputs: Tensor, mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """What the module says: [B, S, D] (or drafter and verifier) → [B, S, D_v]."""
        if self._takes_mask:
            keywords["mask"] = mask
        return self.module(*inputs, **keywords)


def create_adapter(level: Any, hidden_size: int = 4096, *, drafter_size: int | None = None,
                   **options: Any) -> Adapter:
    """The adapter that a researcher means by ``levels=[…]``; a new one has weights from torch's
    current seed.

    Args: level: a key of LEVELS or CLOSED_FORMS, "P0" (options image_size, channels, width,
    dropout), "module:Class" or your own class, which is called with hidden_size, drafter_size and
    the options by name; or an object: an Adapter comes back as it is, another module with reads,
    shift and forward in an OwnAdapter. hidden_size: D_v. drafter_size: D_d where it differs.
    options: saved with the weights.
    Raises: ParameterError naming the known levels, or the option that the level does not have.
    """
    reduced = options.pop("draft_vocabulary", None)
    adapter = level
    if not isinstance(level, nn.Module):
        adapter = _build(level, hidden_size, drafter_size, options)
    elif options:
        raise ParameterError(f"{files.name_of(level)} is made already; give its class, or make it "
                             f"with {', '.join(options)}")
    if not isinstance(adapter, (Adapter, PixelAlignment)):
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
        if level == "P0":
            return PixelAlignment(**options)
        if level in NAMES:
            return {**LEVELS, **CLOSED_FORMS}[level](level=level, **sizes, **options)
        if isinstance(level, str) and ":" not in level:
            raise ParameterError(f"unknown adapter level {level!r}; choose one of "
                                 f"{', '.join(NAMES)}, or name a class of your own as module:Class")
        build = files.import_object(level) if isinstance(level, str) else level
        return build(**sizes | {"drafter_size": drafter_size or hidden_size}, **options)
    except TypeError as error:
        raise ParameterError(
            f"adapter {files.name_of(level)} cannot be made ({error}); see docs/adapters.md for "
            "the options of ours, docs/extending.md for what your own class must take") from error


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
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, tensor in adapter.state_dict().items()}
    text = json.dumps(config, sort_keys=True, default=str)
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"config": text})
    files.write_json(path.with_suffix(".json"), config)
    return path


def load_any_adapter(path: str | Path, *, device: str | torch.device = "cpu",
                     level: Any = None) -> Adapter:
    """The adapter in a file or run folder, whatever its level, in eval mode.

    path: a .safetensors file; a folder holding best.safetensors, adapter.safetensors or
    final.safetensors; or a reference .pt. level: what it is to be, as :func:`create_adapter` takes
    it (of an object a copy is filled); needed for a class of your own, which no file may name for
    you, and to tell B1 from L5 in a reference .pt.
    Raises: CheckpointError when it is missing, damaged, no adapter, or does not fit its own
    configuration.
    """
    path = _resolve(Path(path))
    config, tensors = _read(path, level)
    held = config.get("level")
    if level is None and held is not None and held not in NAMES:
        raise CheckpointError(
            f"{path} holds {held!r}, a class of your own: name it with level={held!r} (or pass "
            "the class), since nothing that only a file names is imported")
    if isinstance(level, str) and level != held and (level in NAMES or held in NAMES):
        raise CheckpointError(
            f"{path} holds {held!r}, not the {level} asked for; give another file or level")
    sizes = {key: config[key] for key in ("hidden_size", "drafter_size") if config.get(key)}
    options = config.get("options", {})
    if isinstance(level, nn.Module):  # it has all its options but this one
        options = {key: options[key] for key in ("draft_vocabulary",) if key in options}
    try:
        # initial values are drawn and thrown away; the caller's random stream stays as it was
        with torch.random.fork_rng(devices=[]):
            wanted = held if level is None else copy.deepcopy(level)
            adapter = create_adapter(wanted, **sizes, **options)
    except (TypeError, ParameterError) as error:
        raise CheckpointError(f"{path} does not say which adapter it is ({error}); save it with "
                              "save_adapter") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    missing, unexpected = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or unexpected:
        raise CheckpointError(f"{path} is no whole {held}: missing {missing[:3] or 'nothing'}, "
                              f"unexpected {unexpected[:3] or 'nothing'}; save it again")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, {held} expects "
                                  f"{shapes[name]}; was it saved at another width?")
    adapter.load_state_dict(tensors)
    return adapter.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """Level, widths, options, parameters and info of an adapter file, its weights unread."""
    return _read(_resolve(Path(path)), weights=False)[0]


def _resolve(path: Path) -> Path:
    names = ("best.safetensors", "adapter.safetensors", "final.safetensors")
    found = [path / name for name in names if (path / name).exists()] if path.is_dir() else [path]
    if not found:
        raise CheckpointError(f"{path} holds no adapter (best.safetensors, adapter.safetensors or "
                              "final.safetensors); train one or give the file itself")
    if not found[0].exists():
        raise CheckpointError(
            f"{path} does not exist; give an adapter's .safetensors file or its run folder")
    return found[0]


def _read(path: Path, level: Any = None, *,
          weights: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.suffix in (".pt", ".pth"):
        return reference_files.read(path, level=level)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if weights else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); copy it again "
                              "or retrain") from error
    if "config" not in metadata:
        raise CheckpointError(
            f"{path} holds tensors but no adapter configuration; save it with save_adapter")
    return json.loads(metadata["config"]), tensors
