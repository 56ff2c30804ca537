"""``xsd plan``: what a run will take, with every assumption (the arithmetic: models.planning), and
``xsd doctor --pair``: does a pair fit, load, agree and answer here."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch

from xsd.adapters import registry
from xsd.core import ParameterError, Sample, XsdError, as_used
from xsd.models import full_size, loading, planning, quantization
from xsd.models.planning import PEAK, Machine, Sizes
from xsd.models.quantization import dtype_of
from xsd.runs.doctor import Finding

GB, HOUR = 1e9, 3600
BOTH_MODES = ("teacher_forced", "free_running")
MOST_OF_MEMORY, MOST_OF_DISK = 0.92, 0.95
"""What may be filled: the rest is the allocator's fragmentation and everything else on the disk."""
QUANTS = (None, "8bit", "4bit")


def make(machine: Machine, *, pair: str = full_size.FULL, dtype: str = "bfloat16",
         quant: str | None = None, clips: int = 5000, questions: int = 10, new_tokens: int = 50,
         batch: int = 10, stored: str = "fp16", modes: tuple[str, ...] = BOTH_MODES,
         levels: tuple[str, ...] = ("L1", "L4", "L5F", "B1"), epochs: int = 50,
         train_batch: int = 64, disk_free: float | None = None) -> dict[str, Any]:
    """Plan extraction and training of a pair ("full", "embedded" or a folder) on a machine. batch:
    answers at a time. stored: dtype of the shards. disk_free: bytes free where the shards go.

    Returns: {table: section, what, value, unit (GB, h or empty), kind (counted | predicted);
    advice: what fits and what to do; assumptions}. Raises: ParameterError for a number below 1, an
    unknown format or level; CheckpointError for a folder that is no pair.
    """
    counts = {"clips": clips, "questions": questions, "new_tokens": new_tokens, "batch": batch,
              "epochs": epochs, "train_batch": train_batch}
    for name, number in counts.items():
        if number < 1:
            raise ParameterError(f"{name} must be at least 1, not {number}")
    sizes, samples = full_size.sizes(pair), clips * questions
    form = {"dtype": dtype, "quant": quant, "new_tokens": new_tokens}
    need = planning.memory(sizes, batch=batch, **form)
    disk = planning.shard_bytes(sizes, samples=samples, tokens=new_tokens, modes=len(modes),
                                stored=stored, dtype=dtype)
    seconds = planning.extraction_seconds(sizes, machine, clips=clips, questions=questions,
                                          batch=batch, modes=modes, **form)
    seconds["in all"] = sum(seconds.values())
    adapters = {level: _parameters_of(level, sizes) for level in levels}
    half = "float32" if dtype_of(dtype).itemsize == 4 else "bfloat16"
    training = {level: planning.training(count, sizes[1], machine, samples=samples, epochs=epochs,
                                         tokens=new_tokens, batch=train_batch, dtype=half)
                for level, count in adapters.items()}
    # no model is loaded while adapters are trained and evaluated
    stages = {
        "01 extraction: both models": need[PEAK],
        **{f"02 training: {level}": peak for level, (_, peak) in training.items()},
        "03, 04 evaluation: the largest adapter": planning.evaluation_bytes(
            max(adapters.values(), default=0), sizes[1], tokens=new_tokens, batch=train_batch),
        "05 live decoding: both models, all adapters": planning.live_bytes(
            sizes, sum(adapters.values()), **form)}
    rows = [(title, *row) for title, some in {
        "Models (parameters)": _counted(sizes),
        f"Memory on the device ({_form(dtype, quant)}, {batch} answers at a time)": _gb(need),
        f"Extraction ({clips} clips x {questions} questions, {new_tokens} tokens) on "
        f"{machine.name}":
            _gb({"disk: shards and heads": disk}) +
            [(f"time: {what}", took / HOUR, "h", "predicted") for what, took in seconds.items()],
        f"Training (at most {epochs} epochs, batch {train_batch}, {half}) on {machine.name}":
            [row for level, (took, peak) in training.items() for row in (
                (f"{level}: parameters", adapters[level], "", "counted"),
                *_gb({f"{level}: peak memory": peak}),
                (f"{level}: time", took / HOUR, "h", "predicted"))],
        "Memory on the device by stage": _gb(stages)}.items() for row in some]
    advice = [_fit(sizes, machine, need[PEAK] / GB, dtype, batch, new_tokens),
              *_fitting(sizes, stages, machine, form)]
    if disk_free is not None:
        shards, free = f"{disk / GB:.1f} GB of shards", f"the {disk_free / GB:.1f} GB free here"
        advice.append(f"{shards} fit onto {free}" if disk <= MOST_OF_DISK * disk_free else
                      f"{shards} do not fit onto {free}; store int8, extract one mode, or choose "
                      "fewer questions (--stored, --modes, --questions)")
    return {"table": pd.DataFrame(rows, columns=["section", "what", "value", "unit", "kind"]),
            "advice": advice, "assumptions": _assumptions(machine, new_tokens, batch, epochs)}


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


def _form(dtype: str, quant: str | None) -> str:
    return dtype + (f", {quant}" if quant else "")


def _gb(need: dict[str, float]) -> list[tuple[str, float, str, str]]:
    return [(what, number / GB, "GB", "predicted") for what, number in need.items()]


def _counted(sizes: Sizes) -> list[tuple[str, float, str, str]]:
    return [row for size in sizes for row in (
        (f"{size.name} ({size.role})", size.total, "", "counted"),
        *((f"   {part}", count, "", "counted") for part, count in size.parameters.items()),
        ("   positions of a prompt", planning.prompt_positions(size), "", "counted, text assumed"))]


def _parameters_of(level: str, sizes: Sizes) -> int:
    with torch.device("meta"):  # counted, not filled
        return registry.count_parameters(registry.create_adapter(
            level, sizes[1].hidden, drafter_size=sizes[0].hidden))


def _fitting(sizes: Sizes, stages: dict[str, float], machine: Machine,
             form: dict[str, Any]) -> list[str]:
    """Which stages do not fit, and whether one model at a time would."""
    if machine.memory_gb is None:
        return []
    most = MOST_OF_MEMORY * machine.memory_gb
    if not (over := [f"{what} ({number / GB:.1f} GB)" for what, number in stages.items()
                     if number / GB > most]):
        return [f"every stage of 01 to 05 fits into the {machine.memory_gb:.0f} GB, the largest "
                f"with {max(stages.values()) / GB:.1f} GB"]
    both = _peak(sizes, **form)
    alone = max(_peak((size,), **form) for size in sizes)
    way = (f"one answer at a time extraction needs {both:.1f} GB, and batch_size=auto finds how "
           "many fit" if both <= most else
           f"extraction goes on with one model at a time there, {alone:.1f} GB, and with their "
           "moving to and fro" if alone <= most else f"not even one model does, {alone:.1f} GB")
    return [f"these stages do not fit: {'; '.join(over)}; {way}"]


def _peak(sizes: Sizes, dtype: str, quant: str | None, batch: int = 1,
          new_tokens: int = 64) -> float:
    """Predicted GB of both models."""
    return planning.memory(sizes, dtype=dtype, quant=quant, batch=batch,
                           new_tokens=new_tokens)[PEAK] / GB


def _ways(sizes: Sizes, most: float, tries: dict[str, tuple[Any, ...]]) -> str:
    """Which settings (arguments of :func:`_peak` by what they are called) need at most ``most``."""
    return "; ".join(f"{what} needs {need:.1f} GB" for what, settings in tries.items()
                     if (need := _peak(sizes, *settings)) <= most)


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
    tries = {f"{f'--quant {quant}' if quant else 'no quantisation'} with --batch {fewer}":
             (dtype, quant, fewer, new_tokens)
             for quant in QUANTS for fewer in sorted({batch, 1}, reverse=True)}
    hint = _ways(sizes, most, tries) or "no number format fits: use a larger device"
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
        f"adapters train with AdamW ({planning.TRAINED_BYTES} bytes a parameter), their states "
        f"streamed, and the verifier's frozen head, all {epochs} epochs (early stopping makes it "
        "less); beside them no model is loaded",
        "GB are 10^9 bytes; activations are an upper bound of one layer, without the allocator's "
        "fragmentation and CUDA's own 0.5 GB",
    ]
    if machine.source == "data sheet":
        lines.append("the speed is quoted, not measured: --measure times this machine, --tflops "
                     "and --gb-s give your own figures")
    return lines


# --- doctor


def examine(pair: str, *, dtype: str = "auto", quant: str | None = None,
            device: str = "auto") -> list[Finding]:
    """Findings about a pair, the cheap ones first; it is not loaded where its predicted memory is
    more than what is free. Raises: ParameterError for an unknown dtype or quant."""
    found: list[Finding] = []
    device, dtype = as_used(device, dtype)
    try:
        loading.check_device(device)
        sizes = full_size.sizes(pair)
        found = [fits(sizes, planning.free_bytes(device), dtype=dtype, quant=quant, device=device)]
        if found[0].state == "bad":
            return found
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # said below
            loaded = loading.load_pair(pair, dtype=dtype, quant=quant, device=device)
        ours, theirs = loaded.drafter, loaded.verifier
        found.append(Finding(
            "ok", f"pair {loaded.name}: {ours.hidden_size} and {theirs.hidden_size} wide, "
            f"{loaded.draft_vocab_size} ids are the same text to both and may be drafted (heads of "
            f"{ours.vocab_size} and {theirs.vocab_size} rows), end of answer "
            f"{sorted(theirs.eos_token_ids)}"))
        for size in sizes:
            model, parts = getattr(loaded, size.role).model, []
            for module, counts in quantization.dtype_map(model).items():
                kinds = [f"{kind} {count:,}".replace(",", " ") for kind, count in counts.items()]
                parts.append(f"{module} {' + '.join(kinds)}")
            taken = quantization.weight_bytes(model) / GB
            predicted = planning.weight_bytes(size, dtype, quant) / GB
            found.append(Finding("ok", f"{size.role}: weights take {taken:.3f} GB (predicted "
                                 f"{predicted:.3f}); stored numbers: {'; '.join(parts)}"))
        found += [Finding("note", handle.unused_settings) for handle in (ours, theirs)
                  if handle.unused_settings]
        found.append(_request(loaded))
    except XsdError as error:
        return [*found, Finding("bad", "the pair does not load or run", str(error))]
    where = "process" if torch.device(device).type == "cpu" else device
    taken = quantization.peak_memory_bytes(device) / GB  # since this process began
    return [*found, Finding("ok", f"measured peak memory of the {where}: {taken:.2f} GB, libraries "
                            "included")]


def fits(sizes: Sizes, free: int | None, *, dtype: str, quant: str | None, device: str) -> Finding:
    """Predicted peak of one answer at a time against free bytes (None: the system does not say)."""
    need = _peak(sizes, dtype, quant)
    what = f"predicted memory {need:.2f} GB ({_form(dtype, quant)}, one answer at a time)"
    if free is None:
        return Finding("note", what, f"how much {device} has free is not known here")
    there = free / GB
    if need <= there:
        return Finding("ok", f"{what}, {there:.1f} GB free on {device}")
    tries = {"--dtype bfloat16" + (f" --quant {less}" if less else ""): ("bfloat16", less)
             for less in QUANTS}
    return Finding("bad", f"{what}, but only {there:.1f} GB are free on {device}",
                   _ways(sizes, there, tries) or "use a larger device (xsd plan)")


def _request(pair: loading.Pair) -> Finding:
    """An answer of two tokens about blank pictures: are its numbers finite?"""
    blank = np.full((full_size.N_VIDEO_FRAMES, 32, 32, 3), 255, np.uint8)
    sample = Sample("doctor", "blank", "What is in the scene?",
                    list(blank[:1]) * pair.n_event_frames, 0 * blank)
    for handle in (pair.drafter, pair.verifier):
        handle.generate([sample], 2)  # raises where they are not
    return Finding("ok", "both models answered a question about blank pictures with finite numbers "
                   "(2 tokens)")
