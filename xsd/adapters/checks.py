"""Is it an adapter? What a module of one's own must do before it is trained and judged, and every
level's size and speed on this machine."""

import dataclasses
import functools
import statistics
import tempfile
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xsd import files
from xsd.adapters import registry
from xsd.adapters.base import Adapter, alignment_loss
from xsd.core import Batch, CheckpointError, ParameterError


def check_adapter(adapter: Adapter, *, positions: int = 6, seed: int = 0) -> None:
    """Try what registry.create_adapter made on random states: shape, gradient, nothing read of what
    is not there yet, the same outputs after saving and loading. The caller's random stream stays as
    it was. Raises: ParameterError with one sentence that says what does not hold."""
    training = adapter.training
    where = next((p.device for p in adapter.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = torch.randn(2, positions, adapter.drafter_size, device=where)
        verifier = torch.randn(2, positions, adapter.hidden_size, device=where)
        ids = torch.zeros(2, positions, dtype=torch.int64, device=where)
        batch = Batch(drafter, verifier, ids, ids, torch.ones_like(ids, dtype=torch.bool),
                      ["a", "b"], [0, 1], "teacher_forced")
        _check_shape_and_gradient(adapter.train(), batch)
        with torch.no_grad():
            _check_causality(adapter.eval(), batch)
            _check_file(adapter, batch)
    adapter.zero_grad(set_to_none=True)
    adapter.train(training)


def _aligned(adapter: Adapter, batch: Batch) -> torch.Tensor:
    try:
        return adapter.align(batch).aligned
    except (TypeError, RuntimeError, IndexError) as error:
        what = "drafter [B, S, D_d], verifier [B, S, D_v]" if adapter.reads == "both" else (
            "one tensor [B, S, D]")
        raise ParameterError(
            f"{adapter.level}: forward does not run on {what} with drafter width "
            f"{adapter.drafter_size} and verifier width {adapter.hidden_size} ({error})") from error


def _check_shape_and_gradient(adapter: Adapter, batch: Batch) -> None:
    aligned, target = _aligned(adapter, batch), batch.verifier[:, adapter.shift:]
    if not isinstance(aligned, torch.Tensor) or aligned.shape != target.shape:
        shape = tuple(aligned.shape) if isinstance(aligned, torch.Tensor) else type(aligned)
        raise ParameterError(
            f"{adapter.level}: forward gives {shape} where {tuple(target.shape)} is expected, one "
            "verifier state [D_v] for each position that it reads")
    trained = [p for p in adapter.parameters() if p.requires_grad]
    if aligned.requires_grad:
        alignment_loss(aligned, target)["total_loss"].backward()
    if trained and all(p.grad is None or not p.grad.any() for p in trained):
        raise ParameterError(f"{adapter.level}: no gradient reaches a parameter, so it cannot "
                             "learn; look for no_grad, detach, or an output that does not use them")
    if any(p.grad is not None and not p.grad.isfinite().all() for p in trained):
        raise ParameterError(f"{adapter.level}: the gradient on random states is not finite")


def _check_causality(adapter: Adapter, batch: Batch) -> None:
    """Everything that does not exist yet when the first half is predicted becomes noise."""
    cut = batch.mask.shape[1] // 2
    drafter, verifier = batch.drafter.clone(), batch.verifier.clone()
    drafter[:, cut + adapter.drafter_lead:].normal_()
    verifier[:, cut:].normal_()
    later = dataclasses.replace(batch, drafter=drafter, verifier=verifier)
    before, after = (_aligned(adapter, one)[:, :cut] for one in (batch, later))
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise ParameterError(
            f"{adapter.level}: a prediction changes with states that come later, which do not "
            "exist while drafting; position t may use inputs 0…t only (a causal mask)")


def _check_file(adapter: Adapter, batch: Batch) -> None:
    level = adapter.level if adapter.level in registry.NAMES else adapter.made_from or adapter
    with tempfile.TemporaryDirectory() as folder:
        path = registry.save_adapter(adapter, Path(folder))
        try:
            again = registry.load_any_adapter(path, level=level, device=batch.mask.device)
        except CheckpointError as error:
            raise ParameterError(
                f"{adapter.level}: saved weights do not load again ({error})") from error
    if not torch.equal(_aligned(adapter, batch), _aligned(again, batch)):
        raise ParameterError(
            f"{adapter.level}: saved and loaded again it predicts something else; make what it "
            "remembers a parameter or a registered buffer, and its eval mode deterministic")


def self_test(hidden_size: int = 192, *, levels: Sequence[Any] = tuple(registry.LEVELS),
              positions: int = 50, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """One row per level or adapter file, for a DataFrame: level, reads, width, parameters,
    megabytes (float32) and latency_ms, the median of one forward pass over ``positions`` positions
    on this machine. hidden_size, options: of levels; a file has its own."""
    rows = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for level in levels:
            adapter = registry.load_any_adapter(level) if files.is_path(level) else (
                registry.create_adapter(level, hidden_size, **options).eval())
            drafter = torch.randn(1, positions, adapter.drafter_size)
            verifier = torch.randn(1, positions, adapter.hidden_size)
            states = {"drafter": (drafter,), "verifier": (verifier,), "both": (drafter, verifier)}
            said = torch.zeros(1, positions, dtype=torch.int64)
            run = functools.partial(adapter, *states[adapter.reads],
                                    **({"tokens": said} if adapter.fuses_tokens else {}))
            seconds = timeit.repeat(run, number=1, repeat=12)[2:]
            n = registry.count_parameters(adapter)
            rows.append({"level": files.name_of(level), "reads": adapter.reads,
                         "width": adapter.hidden_size, "parameters": n, "megabytes": 4 * n / 1e6,
                         "latency_ms": 1e3 * statistics.median(seconds)})
    return rows
