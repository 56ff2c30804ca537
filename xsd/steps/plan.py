"""``xsd plan``: what a run will take, with every assumption, and what to do where it does not fit
(the arithmetic: models.planning)."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from xsd.adapters import registry
from xsd.core import ParameterError
from xsd.models import full_size, planning
from xsd.models.full_size import ModelSize
from xsd.models.planning import PEAK, Machine, Sizes

GB, HOUR = 1e9, 3600
BOTH_MODES = ("teacher_forced", "free_running")
MOST_OF_MEMORY, MOST_OF_DISK = 0.92, 0.95
"""What may be filled: the rest is the allocator's fragmentation and everything else on the disk."""


def make(machine: Machine, *, pair: str = full_size.FULL, dtype: str = "bfloat16",
         quant: str | None = None, clips: int = 5000, questions: int = 10, new_tokens: int = 50,
         batch: int = 10, stored: str = "fp16", modes: tuple[str, ...] = BOTH_MODES,
         levels: tuple[str, ...] = ("L1", "L4", "L5F", "B1"), epochs: int = 50,
         train_batch: int = 64, disk_free: float | None = None) -> dict[str, Any]:
    """Plan extraction and training of a pair on a machine.

    pair: "full", "embedded" or a folder. batch: answers at a time. stored: dtype of the shards.
    disk_free: bytes free where the shards go. Returns: {table: section, what, value, unit (GB, h or
    empty), kind (counted | predicted); advice: what fits and what to do; assumptions}. Raises:
    ParameterError for a number below 1, an unknown format or level; CheckpointError for a folder
    that is no pair.
    """
    counts = {"clips": clips, "questions": questions, "new_tokens": new_tokens, "batch": batch,
              "epochs": epochs, "train_batch": train_batch}
    for name, number in counts.items():
        if number < 1:
            raise ParameterError(f"{name} must be at least 1, not {number}")
    sizes, samples = full_size.sizes(pair), clips * questions
    need = planning.memory(sizes, dtype=dtype, quant=quant, batch=batch, new_tokens=new_tokens)
    disk = planning.shard_bytes(sizes, samples=samples, tokens=new_tokens, modes=len(modes),
                                stored=stored, dtype=dtype)
    seconds = planning.extraction_seconds(sizes, machine, dtype=dtype, quant=quant, clips=clips,
                                          questions=questions, new_tokens=new_tokens, batch=batch,
                                          modes=modes)
    seconds["in all"] = sum(seconds.values())
    times = [(f"time: {what}", took / HOUR, "h", "predicted") for what, took in seconds.items()]
    form = dtype + (f", {quant}" if quant else "")
    asked = f"{clips} clips x {questions} questions, {new_tokens} tokens"
    sections = {
        "Models (parameters)": [row for size in sizes for row in _parameters(size)],
        f"Memory on the device ({form}, {batch} answers at a time)":
            [(what, number / GB, "GB", "predicted") for what, number in need.items()],
        f"Extraction ({asked}) on {machine.name}":
            [("disk: shards and heads", disk / GB, "GB", "predicted"), *times],
        f"Training (at most {epochs} epochs, batch {train_batch}) on {machine.name}":
            [row for level in levels
             for row in _training(level, sizes, machine, samples=samples, tokens=new_tokens,
                                  epochs=epochs, batch=train_batch)]}
    table = pd.DataFrame([(section, *row) for section, rows in sections.items() for row in rows],
                         columns=["section", "what", "value", "unit", "kind"])
    advice = [_fit(sizes, machine, need[PEAK] / GB, dtype, batch, new_tokens)]
    if disk_free is not None:
        shards, free = f"{disk / GB:.1f} GB of shards", f"the {disk_free / GB:.1f} GB free here"
        advice.append(f"{shards} fit onto {free}" if disk <= MOST_OF_DISK * disk_free else
                      f"{shards} do not fit onto {free}; store int8, extract one mode, or choose "
                      "fewer questions (--stored, --modes, --questions)")
    return {"table": table, "advice": advice,
            "assumptions": _assumptions(machine, new_tokens, batch, epochs)}


def text(plan: dict[str, Any]) -> str:
    """The plan as ``xsd plan`` prints it."""
    lines = []
    for section, rows in plan["table"].groupby("section", sort=False):
        lines.append(section)
        for row in rows.itertuples():
            value = f"{row.value:.2f} {row.unit}" if row.unit else f"{row.value:,.0f}"
            lines.append(f"  {row.what:<46} {value.replace(',', ' '):>16}   {row.kind}")
        lines.append("")
    for title, said in (("What to do", plan["advice"]), ("Assumptions", plan["assumptions"])):
        lines += [title, *(f"  - {line}" for line in said), ""]
    return "\n".join(lines[:-1])


def _parameters(size: ModelSize) -> list[tuple[str, float, str, str]]:
    parts = [(f"   {part}", count, "", "counted") for part, count in size.parameters.items()]
    positions = planning.prompt_positions(size)
    return [(f"{size.name} ({size.role})", size.total, "", "counted"), *parts,
            ("   positions of a prompt", positions, "", "counted, text assumed")]


def _training(level: str, sizes: Sizes, machine: Machine,
              **options: int) -> list[tuple[str, float, str, str]]:
    drafter, verifier = sizes
    with torch.device("meta"):
        adapter = registry.create_adapter(level, verifier.hidden, drafter_size=drafter.hidden)
    parameters = registry.count_parameters(adapter)
    seconds, peak = planning.training(parameters, verifier, machine, **options)
    return [(f"{level}: parameters", parameters, "", "counted"),
            (f"{level}: peak memory", peak / GB, "GB", "predicted"),
            (f"{level}: time", seconds / HOUR, "h", "predicted")]


def _fit(sizes: Sizes, machine: Machine, need: float, dtype: str, batch: int,
         new_tokens: int) -> str:
    """Whether ``need`` GB fit, and with which settings less would."""
    if machine.memory_gb is None:
        return (f"the device's memory is unknown: it needs {need:.1f} GB (--memory-gb says how "
                "much it has)")
    most = MOST_OF_MEMORY * machine.memory_gb
    place = f"the {machine.memory_gb:.0f} GB of {machine.name}"
    if need <= most:
        return f"{need:.1f} GB fit into {place}, with room for fragmentation"
    ways = []
    for quant in (None, "8bit", "4bit"):
        for fewer in sorted({batch, 1}, reverse=True):
            less = planning.memory(sizes, dtype=dtype, quant=quant, batch=fewer,
                                   new_tokens=new_tokens)[PEAK] / GB
            if less <= most and less < need:
                form = f"--quant {quant}" if quant else "no quantisation"
                ways.append(f"{form} with --batch {fewer} needs {less:.1f} GB")
    hint = "; ".join(ways) or "no number format fits: use a larger device"
    return f"{need:.1f} GB do not fit into {place}: {hint}"


def _assumptions(machine: Machine, new_tokens: int, batch: int, epochs: int) -> list[str]:
    memory = "unknown" if machine.memory_gb is None else f"{machine.memory_gb:.0f} GB"
    prompts = planning.PROMPT_TOKENS
    lines = [
        f"{machine.name}: {machine.tflops:.3g} TFLOP/s half, {machine.tflops32:.3g} float32, "
        f"{machine.gb_s:.4g} GB/s, {memory} ({machine.source}); reckoned with "
        f"{machine.compute_share:.0%} of the compute and {machine.bandwidth_share:.0%} of the "
        "bandwidth",
        f"prompts hold {prompts['drafter']} (drafter) and {prompts['verifier']} (verifier) tokens "
        "of text",
        f"every answer takes all {new_tokens} tokens (no early EOS); {batch} at a time, questions "
        "of a clip together",
        "a clip's pictures and the prompt before its question are run once per batch",
        "prefill is bound by compute, decode steps by the larger of reading (weights, caches) and "
        "compute; reading files is not counted",
        "attention is fused (no L x L matrix); vision towers, projectors, embeddings and heads are "
        "never quantised",
        "4-bit is NF4 with double quantisation, read at full bandwidth: bitsandbytes' kernels are "
        "slower than that in one-row steps",
        f"adapters train in float32 with AdamW and the verifier's frozen head, all {epochs} epochs "
        "(early stopping makes it less)",
        "GB are 10^9 bytes; activations are an upper bound of one layer, without the allocator's "
        "fragmentation and CUDA's own 0.5 GB",
    ]
    if machine.source == "data sheet":
        lines.append("the speed is quoted, not measured: --measure times this machine, --tflops "
                     "and --gb-s give your own figures")
    return lines
