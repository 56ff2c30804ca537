"""``xsd plan``: the predictions of :mod:`xsd.steps.plan` as rows and text, with every assumption,
and what to do where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xsd.core import ParameterError
from xsd.models import full_size
from xsd.models.full_size import ModelSize
from xsd.steps import plan

GB = 1e9


@dataclass(frozen=True)
class Request:
    """What is to be planned. batch: answers at a time; clips and questions: of the whole
    extraction; stored: dtype of the shards."""

    pair: str = full_size.FULL
    dtype: str = "bfloat16"
    quant: str | None = None
    clips: int = 5000
    questions: int = 10
    new_tokens: int = 50
    batch: int = 10
    stored: str = "fp16"
    modes: tuple[str, ...] = ("teacher_forced", "free_running")
    levels: tuple[str, ...] = ("L1", "L4", "L5F", "B1")
    epochs: int = 50
    train_batch: int = 64

    def __post_init__(self) -> None:
        for name in ("clips", "questions", "new_tokens", "batch", "epochs", "train_batch"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """One line. kind: counted (from the classes), predicted, or input. unit: GB, h, or nothing."""

    what: str
    value: float
    unit: str
    kind: str

    def __str__(self) -> str:
        shown = f"{self.value:,.0f}".replace(
            ",", " ") if self.unit == "" else f"{self.value:.2f} {self.unit}"
        return f"  {self.what:<46} {shown:>16}   {self.kind}"


@dataclass(frozen=True)
class Plan:
    """rows by section; verdicts: what fits and what to do; assumptions: everything the figures rest
    on."""

    request: Request
    machine: plan.Machine
    sections: dict[str, list[Row]]
    verdicts: list[str]
    assumptions: list[str]

    def __str__(self) -> str:
        lines = []
        for title, rows in self.sections.items():
            lines += [title, *(str(row) for row in rows), ""]
        lines += ["What to do", *(f"  - {line}" for line in self.verdicts), ""]
        lines += ["Assumptions", *(f"  - {line}" for line in self.assumptions)]
        return "\n".join(lines)

    def value(self, section: str, what: str) -> float:
        """One figure. Raises: ParameterError when it is not in the plan."""
        for title, rows in self.sections.items():
            for row in rows:
                if title.startswith(section) and row.what == what:
                    return row.value
        raise ParameterError(
            f"the plan holds no {what!r} under {section!r}; print it to see what it holds")


def make(request: Request, machine: plan.Machine, *, disk_free: float | None = None) -> Plan:
    """Plan a request on a machine. disk_free: bytes free where the shards go. Raises:
    ParameterError, CheckpointError."""
    pair = full_size.sizes(Path(request.pair) if Path(request.pair).is_dir() else request.pair)
    samples = request.clips * request.questions
    need = plan.memory(pair, request.dtype, request.quant, batch=request.batch,
                       new_tokens=request.new_tokens)
    disk = plan.shard_bytes(pair, samples=samples, tokens=request.new_tokens,
                            modes=len(request.modes), stored=request.stored, dtype=request.dtype)
    hours = plan.extraction(pair, machine, dtype=request.dtype, quant=request.quant,
                            clips=request.clips, questions=request.questions,
                            new_tokens=request.new_tokens, batch=request.batch, modes=request.modes,
                            )  # fmt: skip
    trained = [
        plan.training(pair, level, machine, samples=samples, tokens=request.new_tokens,
                      epochs=request.epochs, batch=request.train_batch) for level in request.levels
    ]
    form = request.dtype + (f", {request.quant}" if request.quant else "")
    sections = {
        "Models (parameters)": [row for size in pair for row in _parameters(size)],
        f"Memory on the device ({form}, {request.batch} answers at a time)": _memory(pair, need),
        f"Extraction ({request.clips} clips x {request.questions} questions, {request.new_tokens} "
        f"tokens) on {machine.name}":
            [
                Row("disk: shards and heads", disk / GB, "GB", "predicted"),
                *(Row(f"time: {what}", seconds / 3600, "h", "predicted")
                  for what, seconds in hours.parts.items()),
                Row("time: in all", hours.total / 3600, "h", "predicted"),
            ],
        f"Training (at most {request.epochs} epochs, batch {request.train_batch}) on "
        f"{machine.name}":
            [
                row for each in trained
                for row in (Row(f"{each.level}: parameters", each.parameters, "", "counted"),
                            Row(f"{each.level}: peak memory", each.peak / GB, "GB", "predicted"),
                            Row(f"{each.level}: time", each.seconds / 3600, "h", "predicted"),
                            )
            ],
    }
    return Plan(request, machine, sections, _verdicts(request, machine, pair, need, disk,
                                                      disk_free), _assumptions(request, machine))


def _parameters(size: ModelSize) -> list[Row]:
    rows = [Row(f"{size.name} ({size.role})", size.total, "", "counted")]
    rows += [Row(f"   {part}", count, "", "counted") for part, count in size.parameters.items()]
    return [
        *rows,
        Row("   positions of a prompt", plan.prompt_positions(size), "", "counted, text assumed")
    ]


def _memory(pair: tuple[ModelSize, ModelSize], need: plan.Memory) -> list[Row]:
    rows = []
    for size in pair:
        rows.append(Row(f"{size.role}: weights", need.weights[size.role] / GB, "GB", "predicted"))
        rows.append(Row(f"{size.role}: KV cache", need.kv[size.role] / GB, "GB", "predicted"))
        rows.append(
            Row(f"{size.role}: activations", need.activations[size.role] / GB, "GB", "predicted"))
    return [
        *rows,
        Row("peak: both weights, larger cache + activations", need.peak / GB, "GB", "predicted")
    ]


def _verdicts(request: Request, machine: plan.Machine, pair: tuple[ModelSize, ModelSize],
              need: plan.Memory, disk: float, disk_free: float | None) -> list[str]:
    lines = []
    if machine.memory_gb is None:
        lines.append(
            f"the device's memory is unknown: it needs {need.peak / GB:.1f} GB (--memory-gb says "
            "how much it has)"
        )
    elif need.peak / GB <= 0.92 * machine.memory_gb:
        lines.append(
            f"{need.peak / GB:.1f} GB fit into the {machine.memory_gb:.0f} GB of {machine.name}, "
            "with room for fragmentation"
        )
    else:
        ways = []
        for quant in (None, "8bit", "4bit"):
            for batch in sorted({request.batch, 1}, reverse=True):
                less = plan.memory(pair, request.dtype, quant, batch=batch,
                                   new_tokens=request.new_tokens).peak / GB
                if less <= 0.92 * machine.memory_gb and less < need.peak / GB:
                    ways.append(
                        f"{f'--quant {quant}' if quant else 'no quantisation'} with --batch "
                        f"{batch} needs {less:.1f} GB"
                    )
        hint = "; ".join(ways) or "no number format fits: use a larger device"
        lines.append(
            f"{need.peak / GB:.1f} GB do not fit into the {machine.memory_gb:.0f} GB of "
            f"{machine.name}: {hint}"
        )
    if disk_free is not None:
        fits = disk <= 0.95 * disk_free
        lines.append(
            f"{disk / GB:.1f} GB of shards " + ("fit onto" if fits else "do not fit onto") +
            f" the {disk_free / GB:.1f} GB free here" +
            ("" if fits else
             "; store int8, extract one mode, or choose fewer questions (--stored, --modes, "
             "--questions)"
             ))
    return lines


def _assumptions(request: Request, machine: plan.Machine) -> list[str]:
    memory_text = "unknown" if machine.memory_gb is None else f"{machine.memory_gb:.0f} GB"
    lines = [
        f"{machine.name}: {machine.tflops:.3g} TFLOP/s half, {machine.tflops32:.3g} float32, "
        f"{machine.gb_s:.4g} GB/s, {memory_text} "
        f"({machine.source}); reckoned with {machine.compute_share:.0%} of the compute and "
        f"{machine.bandwidth_share:.0%} of the bandwidth",
        f"prompts hold {plan.PROMPT_TOKENS['drafter']} (drafter) and "
        f"{plan.PROMPT_TOKENS['verifier']} (verifier) tokens of text",
        f"every answer takes all {request.new_tokens} tokens (no early EOS); {request.batch} at a "
        "time, questions of a clip together",
        "a clip's pictures and the prompt before its question are run once per batch",
        "prefill is bound by compute, decode steps by the larger of reading (weights, caches) and "
        "compute; reading files is not counted",
        "attention is fused (no L x L matrix); vision towers, projectors, embeddings and heads are "
        "never quantised",
        "4-bit is NF4 with double quantisation, read at full bandwidth: bitsandbytes' kernels are "
        "slower than that in one-row steps",
        "adapters train in float32 with AdamW and the verifier's frozen head, all "
        f"{request.epochs} epochs (early stopping makes it less)",
        "GB are 10^9 bytes; activations are an upper bound of one layer, without the allocator's "
        "fragmentation and CUDA's own 0.5 GB",
    ]
    if machine.source == "data sheet":
        lines.append(
            "the speed is quoted, not measured: --measure times this machine, --tflops and --gb-s "
            "give your own figures"
        )
    return lines
