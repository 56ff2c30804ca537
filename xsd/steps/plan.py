"""What a full-size run will take, before anything starts: memory, disk and hours from the models'
sizes alone.

Everything here is *predicted*, by the formulas in the docstrings, from counted parameters
(models.full_size) and a stated machine speed. docs/models.md, "Planning", says how far the
predictions were checked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from xsd.adapters import registry
from xsd.core import ParameterError
from xsd.models.full_size import ModelSize
from xsd.models.quantization import dtype_of

STATE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""A stored number; int8 rows carry one float32 scale each."""
PROMPT_TOKENS = {"drafter": 59, "verifier": 22}
"""Text positions of a prompt with a question of nine words (EventGPT: 641 positions in all)."""
TEXT_BYTES_PER_SAMPLE = 700
"""Question, both answers and names in the parquet file beside a shard, roughly."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A 4-bit weight with its share of the quantised block constants (blocks of 64, second level of
256)."""

# --- the machine
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Speed as used in the predictions. tflops: matrix products in half precision; tflops32: in
    float32; gb_s: memory bandwidth.

    compute_share, bandwidth_share: how much of it plain transformers code reaches. memory_gb: of
    the device; None if unknown.
    source: "data sheet" (quoted), "given", or "measured" on this machine.
    """

    name: str
    tflops: float
    tflops32: float
    gb_s: float
    memory_gb: float | None = None
    compute_share: float = 0.4
    bandwidth_share: float = 0.35
    source: str = "data sheet"

    def __post_init__(self) -> None:
        for name in ("tflops", "tflops32", "gb_s", "compute_share", "bandwidth_share"):
            if getattr(self, name) <= 0:
                raise ParameterError(f"{name} must be above 0, not {getattr(self, name)}")

    def flops(self, dtype: str) -> float:
        """Floating-point operations a second that are reckoned with."""
        return 1e12 * self.compute_share * (self.tflops32
                                            if dtype_of(dtype) == torch.float32 else self.tflops)

    @property
    def bytes_s(self) -> float:
        """Bytes a second from device memory that are reckoned with."""
        return 1e9 * self.bandwidth_share * self.gb_s


MACHINES = {
    machine.name: machine
    for machine in (Machine("t4", 65, 8.1, 300, 16), Machine("l4", 121, 30.3, 300, 24),
                    Machine("rtx3090", 71, 35.6, 936, 24), Machine("rtx4090", 165, 82.6, 1008, 24),
                    Machine("a100-40", 312, 19.5, 1555, 40),
                    Machine("a100-80", 312, 19.5, 2039, 80), Machine("h100", 989, 67, 3350, 80),
                    Machine("h200", 989, 67, 4800, 141),
                    )
}
"""Quoted from the makers' data sheets (dense matrix products)."""

MEASURED_SHARES = (0.75, 0.6)
"""What a plain Llama reached of the measured products and reads (docs/models.md, "Planning")."""


def measure_machine(device: str = "cpu", *, size: int = 768, repeats: int = 3) -> Machine:
    """Time square matrix products, and a matrix times a vector for the bandwidth, on this machine:
    a second or two.

    size: side of the products on a CPU (8 times that on a GPU); the bandwidth's matrix has 10 times
    the side, 240 MB, so that no cache
    holds it. memory_gb: what is free now.
    """
    place = torch.device(device)

    def best(run: object, work: float) -> float:
        times = []
        for _ in range(repeats + 1):  # the first is a warm-up
            _wait(place)
            start = time.perf_counter()
            run()  # type: ignore[operator]
            _wait(place)
            times.append(time.perf_counter() - start)
        return work / min(times[1:])

    side = size if place.type == "cpu" else 8 * size
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(side, side, dtype=dtype, device=place)
        found[dtype] = best(lambda a=a: a @ a, 2 * side**3) / 1e12
    wide = 10 * size if place.type == "cpu" else 3 * side
    block, vector = torch.ones(wide, wide, device=place), torch.ones(wide, device=place)
    gb_s = best(lambda: block @ vector, block.numel() * 4) / 1e9
    free = free_bytes(device)
    name = torch.cuda.get_device_name(
        place) if place.type == "cuda" else f"this CPU, {torch.get_num_threads()} threads"
    return Machine(name, found[torch.bfloat16], found[torch.float32], gb_s, free and free / 1e9,
                   *MEASURED_SHARES, "measured")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: str = "cpu") -> int | None:
    """Bytes that can be allocated now on a CUDA device or in main memory; None where the system
    does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(
                int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


# --- memory
# ------------------------------------------------------------------------------------------------


def number_bytes(dtype: str) -> int:
    """Bytes of one number of a dtype name."""
    return dtype_of(dtype).itemsize


def weight_bytes(size: ModelSize, dtype: str, quant: str | None = None) -> float:
    """Σ parameters · bytes; with quant only the decoder's linear layers shrink (4bit: NF4_BYTES;
    8bit: 1, and 4 bytes a row)."""
    linear = size.parameters["linear"]
    whole = (size.total - linear) * number_bytes(dtype)
    if quant is None:
        return whole + linear * number_bytes(dtype)
    if quant not in ("4bit", "8bit"):
        raise ParameterError(f"quantisation {quant!r} is unknown; choose '4bit', '8bit' or none")
    return whole + (linear * NF4_BYTES if quant == "4bit" else linear + 4 * size.linear_rows)


def prompt_positions(size: ModelSize) -> int:
    """Visual and text positions of one prompt."""
    return size.visual_tokens + PROMPT_TOKENS[size.role]


def kv_bytes(size: ModelSize, positions: int, batch: int, dtype: str) -> int:
    """2 (key, value) · layers · kv_width · bytes · positions · batch."""
    return 2 * size.layers * size.kv_width * number_bytes(dtype) * positions * batch


def activation_bytes(size: ModelSize, batch: int, dtype: str, quant: str | None = None) -> int:
    """The widest moment of a forward pass without gradients: the tower over one clip's pictures, or
    the decoder's gated layer.

    (2·width + 3·inner) numbers a position: residual, normed input, gate, up, product. Prompts that
    share their clip are run once, yet the bound takes ``batch`` of them. Attention is taken to be
    fused (no L × L matrix). 4-bit adds one unpacked weight.
    """
    number = number_bytes(dtype)
    tower = size.n_frames * size.frame_tokens * (2 * size.tower_hidden +
                                                 3 * size.tower_intermediate) * number
    decoder = batch * prompt_positions(size) * (2 * size.hidden + 3 * size.intermediate) * number
    return max(tower, decoder) + (size.largest_linear * number if quant == "4bit" else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: of both models. working: cache and activations of the one that needs more;
    they do not run at the same time."""

    weights: dict[str, float]
    kv: dict[str, int]
    activations: dict[str, int]

    @property
    def working(self) -> int:
        return max(self.kv[role] + self.activations[role] for role in self.kv)

    @property
    def peak(self) -> float:
        return sum(self.weights.values()) + self.working


def memory(pair: tuple[ModelSize, ModelSize], dtype: str, quant: str | None, *, batch: int,
           new_tokens: int) -> Memory:
    """Both models on one device, ``batch`` answers of ``new_tokens`` at a time."""
    return Memory({size.role: weight_bytes(size, dtype, quant) for size in pair}, {
        size.role: kv_bytes(size,
                            prompt_positions(size) + new_tokens, batch, dtype) for size in pair
    }, {size.role: activation_bytes(size, batch, dtype, quant) for size in pair},
                  )


# --- disk
# ------------------------------------------------------------------------------------------------


def shard_bytes(pair: tuple[ModelSize, ModelSize], *, samples: int, tokens: int, modes: int,
                stored: str, dtype: str) -> int:
    """Paired states, ids and texts of ``modes`` run folders, each with both LM heads.

    A position of one model is D numbers and an 8-byte id (int8: and a 4-byte scale).
    """
    if stored not in STATE_BYTES:
        raise ParameterError(
            f"states cannot be stored as {stored!r}; choose one of {', '.join(STATE_BYTES)}")
    extra = 8 + (4 if stored == "int8" else 0)
    position = sum(size.hidden * STATE_BYTES[stored] + extra for size in pair)
    heads = sum(size.vocab * size.hidden * number_bytes(dtype) for size in pair)
    return modes * (samples * (tokens * position + 16 + TEXT_BYTES_PER_SAMPLE) + heads)


# --- hours
# ------------------------------------------------------------------------------------------------


def prefill_flops(size: ModelSize, positions: int) -> float:
    """2 · linear parameters · positions, and 2 · layers · width · positions² of causal
    attention."""
    return 2.0 * size.parameters[
        "linear"] * positions + 2.0 * size.layers * size.hidden * positions**2


def vision_flops(size: ModelSize) -> float:
    """Tower over every picture of a clip (2 · parameters · states, and attention), and the
    projector."""
    states = size.n_frames * size.frame_tokens
    attention = 4.0 * size.tower_layers * size.tower_hidden * size.n_frames * size.frame_tokens**2
    return 2.0 * (size.tower_parameters_run + size.parameters["projector"]) * states + attention


def prompt_seconds(size: ModelSize, machine: Machine, dtype: str) -> float:
    """Tower and prefill of one clip, compute-bound."""
    return (vision_flops(size) + prefill_flops(size, prompt_positions(size))) / machine.flops(dtype)


def step_seconds(size: ModelSize, machine: Machine, dtype: str, quant: str | None, *, batch: int,
                 positions: int) -> float:
    """One decode step of ``batch`` rows: the longer of reading (linear weights, head, caches) and
    computing."""
    not_read = size.total - size.parameters["linear"] - size.parameters.get("head", 0)
    read = weight_bytes(size, dtype, quant) - not_read * number_bytes(dtype)
    read += kv_bytes(size, positions, batch, dtype)
    compute = 2.0 * batch * (size.parameters["linear"] + size.vocab * size.hidden)
    return max(read / machine.bytes_s, compute / machine.flops(dtype))


@dataclass(frozen=True)
class Hours:
    """Seconds of an extraction by what is done."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def extraction(pair: tuple[ModelSize, ModelSize], machine: Machine, *, dtype: str,
               quant: str | None, clips: int, questions: int, new_tokens: int, batch: int,
               modes: tuple[str, ...] = ("teacher_forced", "free_running"),
               ) -> Hours:
    """A clip's pictures and the prompt up to its questions run once a batch; then ``new_tokens``
    steps a batch of answers.

    teacher_forced: the verifier generates, the drafter is forced in one pass. free_running: the
    drafter generates too.
    """
    drafter, verifier = pair
    samples = clips * questions
    prompts = clips * -(-questions // batch)
    batches = -(-samples // batch)
    rows = min(batch, samples)

    def generate(size: ModelSize) -> float:
        middle = prompt_positions(size) + new_tokens // 2
        return batches * new_tokens * step_seconds(size, machine, dtype, quant, batch=rows,
                                                   positions=middle)

    parts = {
        "verifier prefill": prompts * prompt_seconds(verifier, machine, dtype),
        "verifier answers": generate(verifier),
        "drafter prefill": prompts * prompt_seconds(drafter, machine, dtype),
    }
    if "teacher_forced" in modes:
        parts["drafter forced"] = samples * prefill_flops(drafter,
                                                          new_tokens) / machine.flops(dtype)
    if "free_running" in modes:
        parts["drafter answers"] = generate(drafter)
    return Hours(parts)


# --- adapters
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One level. parameters: counted on the meta device. seconds: of all epochs. peak: bytes of
    device memory."""

    level: str
    parameters: int
    seconds: float
    peak: float


def training(pair: tuple[ModelSize, ModelSize], level: str, machine: Machine, *, samples: int,
             tokens: int, epochs: int, batch: int) -> Training:
    """Float32 AdamW: 6 · parameters a position forward and backward, 4 · V · D for the frozen head
    under a token loss.

    Memory: 16 bytes a parameter (weight, gradient, two moments), the head, and per position 3 rows
    of logits and 24 states.
    """
    drafter, verifier = pair
    with torch.device("meta"):
        adapter = registry.create_adapter(level, verifier.hidden, drafter_size=drafter.hidden)
    parameters = registry.count_parameters(adapter)
    head = verifier.vocab * verifier.hidden
    positions = samples * tokens * epochs
    seconds = positions * (6.0 * parameters + 4.0 * head) / machine.flops("float32")
    peak = 16 * parameters + 4 * head + 4 * batch * tokens * (3 * verifier.vocab +
                                                              24 * verifier.hidden)
    return Training(level, parameters, seconds, peak)


def with_speed(machine: Machine, *, tflops: float | None, gb_s: float | None,
               memory_gb: float | None) -> Machine:
    """The machine with what the user knows better; a given speed is what is reached, so no share is
    taken off it."""
    if tflops is not None:
        machine = replace(machine, tflops=tflops, tflops32=min(tflops, machine.tflops32),
                          compute_share=1.0, source="given")
    if gb_s is not None:
        machine = replace(machine, gb_s=gb_s, bandwidth_share=1.0, source="given")
    return machine if memory_gb is None else replace(machine, memory_gb=memory_gb)
