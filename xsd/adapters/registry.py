"""Every adapter by name: create, save, load, count. A dict one can read (docs/adapters.md).

An adapter file is a safetensors file that carries its configuration in its own header; the same
configuration lies beside it as JSON. Files of the published reference code (.pt) are read too
(:mod:`xsd.adapters.reference_files`): no code in a file is ever run.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xsd import files
from xsd.adapters import reference_files
from xsd.adapters.attention import AttentionAdapter
from xsd.adapters.base import Adapter
from xsd.adapters.bottleneck import BottleneckAdapter, WideBottleneckAdapter
from xsd.adapters.eagle import EagleAdapter, FusedEagleAdapter
from xsd.adapters.linear import LinearAdapter
from xsd.adapters.pixel import PixelAlignment
from xsd.core import CheckpointError, ParameterError

LEVELS: dict[str, type[Adapter]] = {
    "L1": BottleneckAdapter, "L2": BottleneckAdapter, "L3": WideBottleneckAdapter,
    "L4": AttentionAdapter, "L5": EagleAdapter, "B1": EagleAdapter, "L5F": FusedEagleAdapter,
}
"""The levels that fit_adapter trains."""
CLOSED_FORMS: dict[str, type[Adapter]] = {
    "identity": LinearAdapter, "ridge": LinearAdapter, "procrustes": LinearAdapter
}
FORMAT = "xsd-adapter-1"


def create_adapter(level: str, hidden_size: int = 4096, *, drafter_size: int | None = None,
                   **options: Any) -> Adapter:
    """A new adapter of a level, weights from torch's current seed.

    Args: level: a key of LEVELS or CLOSED_FORMS, or "P0" (whose options are image_size, channels,
    width, dropout). hidden_size: D_v.
        drafter_size: D_d where it differs. options: see the class (docs/adapters.md); they are
        saved with the weights.
    Raises: ParameterError naming the known levels, or the option that the level does not have.
    """
    if level == "P0":
        build, keywords = PixelAlignment, dict(options)
    elif level in LEVELS or level in CLOSED_FORMS:
        build = {**LEVELS, **CLOSED_FORMS}[level]
        keywords = {
            "hidden_size": hidden_size, "level": level, "drafter_size": drafter_size, **options
        }
    else:
        raise ParameterError(
            f"unknown adapter level {level!r}; choose one of "
            f"{', '.join([*LEVELS, 'P0', *CLOSED_FORMS])}"
        )
    reduced = keywords.pop("draft_vocabulary", None) if level != "P0" else None
    try:
        adapter = build(**keywords)
        if reduced is not None:  # the ids come from the file, or from set_draft_vocabulary
            adapter.set_draft_vocabulary(torch.arange(reduced))
        return adapter
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        raise ParameterError(
            f"adapter {level} has no option {unknown.group(1) if unknown else error!s}; see "
            "docs/adapters.md for its options"
        ) from error


def count_parameters(adapter: nn.Module) -> int:
    """Number of parameters (closed forms' frozen weights included, buffers not)."""
    return sum(parameter.numel() for parameter in adapter.parameters())


# --- files
# ------------------------------------------------------------------------------------------------


def save_adapter(adapter: nn.Module, path: str | Path, **info: Any) -> Path:
    """Write weights and configuration; returns the safetensors path.

    path: a name ending in .safetensors, or a folder (then adapter.safetensors in it). info: JSON
    values kept in the configuration under
    "info".
    Written atomically: weights first, then ``<name>.json`` beside them.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / "adapter.safetensors"
    config = {
        "format": FORMAT, **adapter.config(), "parameters": count_parameters(adapter), "info": info
    }
    tensors = {
        name: tensor.detach().contiguous().cpu() for name, tensor in adapter.state_dict().items()
    }
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary,
                  metadata={"config": json.dumps(config, sort_keys=True, default=str)})
    files.write_json(path.with_suffix(".json"), config)
    return path


def load_any_adapter(path: str | Path, *, device: str | torch.device = "cpu",
                     level: str | None = None) -> Adapter:
    """The adapter in a file or run folder, whatever its level, in eval mode.

    path: a .safetensors file; a folder holding best.safetensors, adapter.safetensors or
    final.safetensors; or a reference .pt.
    level: "B1" or "L5" of a .pt whose own words do not tell the two apart (reference_files.read).
    Raises: CheckpointError when it is missing, damaged, no adapter, or does not fit its own
    configuration.
    """
    path = _resolve(Path(path))
    config, tensors = reference_files.read(
        path, level=level) if _is_reference(path) else _read_safetensors(path)
    try:
        keywords = {
            key: config[key] for key in ("hidden_size", "drafter_size")
            if config.get(key) is not None
        }
        with torch.random.fork_rng(
                devices=[]
        ):  # initial values are drawn and thrown away; the caller's random stream stays as it was
            adapter = create_adapter(config["level"], **keywords, **config.get("options", {}))
    except (KeyError, TypeError, ParameterError) as error:
        raise CheckpointError(
            f"{path} does not say which adapter it is ({error}); save it with save_adapter"
        ) from error
    wanted = adapter.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() -
                                                                         wanted.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path} is no whole {config['level']}: missing {missing[:3] or 'nothing'}, unexpected "
            f"{unexpected[:3] or 'nothing'}; "
            "save it again")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, {config['level']} expects "
                f"{tuple(wanted[name].shape)}; was it saved at "
                "another width?")
    adapter.load_state_dict(tensors)
    return adapter.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """Level, widths, options, parameters and info of an adapter file, without loading its
    weights."""
    path = _resolve(Path(path))
    return reference_files.read(path)[0] if _is_reference(path) else _header(path)


def _is_reference(path: Path) -> bool:
    return path.suffix in (".pt", ".pth")


def _resolve(path: Path) -> Path:
    if path.is_dir():
        for name in ("best.safetensors", "adapter.safetensors", "final.safetensors"):
            if (path / name).exists():
                return path / name
        raise CheckpointError(
            f"{path} holds no adapter (best.safetensors, adapter.safetensors or "
            "final.safetensors); train one or give the file itself"
        )
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give an adapter's .safetensors file or its run folder")
    return path


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({error}); copy it again or retrain"
        ) from error
    if "config" not in metadata:
        raise CheckpointError(
            f"{path} holds tensors but no adapter configuration; save it with save_adapter")
    return json.loads(metadata["config"])


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = _header(path)
    with safe_open(path, framework="pt") as file:
        return config, {name: file.get_tensor(name)
                        for name in file.keys()}  # noqa: SIM118 - not a mapping


def self_test(hidden_size: int = 192, *, levels: tuple[str, ...] = tuple(LEVELS),
              positions: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """One row a level: level, parameters, megabytes (float32) and median latency of one forward
    over ``positions`` positions, ms, on this machine."""
    rows = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        states = torch.randn(1, positions, hidden_size)
        for level in levels:
            adapter = create_adapter(level, hidden_size).eval()
            inputs = (states, states) if adapter.reads == "both" else (states,)
            times = []
            for _ in range(12):
                start = time.perf_counter()
                adapter(*inputs)
                times.append(time.perf_counter() - start)
            n = count_parameters(adapter)
            rows.append({
                "level": level, "parameters": n, "megabytes": 4 * n / 1e6,
                "latency_ms": 1e3 * sorted(times[2:])[5]
            })
    return rows


def self_test_table(rows: list[dict[str, Any]]) -> str:
    """The rows of :func:`self_test` as a Markdown table."""
    lines = ["| level | parameters | MB (float32) | ms a forward |", "|---|---|---|---|"]
    lines += [
        f"| {row['level']} | {row['parameters']:,} | {row['megabytes']:.1f} | "
        f"{row['latency_ms']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
