"""Memory, disk and hours of a run, *predicted* (docs/models.md, "Planning")."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.benchmark import Timer

from xsd.core import ParameterError
from xsd.models.full_size import ModelSize
from xsd.models.quantization import dtype_of

Sizes = tuple[ModelSize, ModelSize]
STATE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Of a stored number; int8 rows carry one float32 scale each."""
PROMPT_TOKENS = {"drafter": 59, "verifier": 22}
"""Text positions of a prompt with a question of nine words (EventGPT: 641 positions in all)."""
TEXT_BYTES_PER_SAMPLE = 700
"""Question, answers and names in the parquet file beside a shard, roughly."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A 4-bit weight with its share of the quantised constants (blocks of 64, second level of 256)."""
INT4_BYTES = 0.5 + 4 / 128
"""The same of torchao's int4: a scale and a zero in bfloat16 for 128 weights."""
PEAK = "peak: both weights, larger cache + activations"

# --- the machine


@dataclass(frozen=True)
class Machine:
    """Speed of matrix products (half precision, float32) and memory, and the shares that plain
    transformers code reaches. source: "data sheet" (quoted), "given", or "measured" here."""

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
        """Operations a second that are reckoned with."""
        peak = self.tflops32 if dtype_of(dtype) == torch.float32 else self.tflops
        return 1e12 * self.compute_share * peak

    def reaching(self, *, tflops: float | None = None, gb_s: float | None = None,
                 memory_gb: float | None = None) -> Machine:
        """With what the user knows better; a given speed is reached, no share is taken off it."""
        known: dict[str, float | str] = {} if memory_gb is None else {"memory_gb": memory_gb}
        if tflops is not None:
            known |= {"tflops": tflops, "tflops32": min(tflops, self.tflops32),
                      "compute_share": 1.0, "source": "given"}
        if gb_s is not None:
            known |= {"gb_s": gb_s, "bandwidth_share": 1.0, "source": "given"}
        return replace(self, **known)


MACHINES = {machine.name: machine for machine in (
    Machine("t4", 65, 8.1, 300, 16), Machine("l4", 121, 30.3, 300, 24),
    Machine("rtx3090", 71, 35.6, 936, 24), Machine("rtx4090", 165, 82.6, 1008, 24),
    Machine("a100-40", 312, 19.5, 1555, 40), Machine("a100-80", 312, 19.5, 2039, 80),
    Machine("h100", 989, 67, 3350, 80), Machine("h200", 989, 67, 4800, 141))}
"""Quoted from the makers' data sheets (dense matrix products)."""

MEASURED_SHARES = (0.75, 0.6)
"""What a plain Llama reached of the measured products and reads (docs/models.md, "Planning")."""


def measure_machine(device: str = "cpu", *, size: int = 768, repeats: int = 3) -> Machine:
    """Time square matrix products (``size`` a side on a CPU, 8 times that on a GPU), and for the
    bandwidth a matrix larger than a cache times a vector: a second or two."""
    place, threads = torch.device(device), torch.get_num_threads()

    def seconds(left: torch.Tensor, right: torch.Tensor) -> float:
        timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=threads)
        return min(timer.timeit(1).median for _ in range(repeats))

    on_cpu = place.type == "cpu"
    side, wide = (size, 10 * size) if on_cpu else (8 * size, 24 * size)
    tflops = []
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.ones(side, side, dtype=dtype, device=place)
        tflops.append(2 * side**3 / seconds(square, square) / 1e12)
    block, vector = torch.ones(wide, wide, device=place), torch.ones(wide, device=place)
    gb_s = block.nbytes / seconds(block, vector) / 1e9
    free = free_bytes(device)
    name = f"this CPU, {threads} threads" if on_cpu else torch.cuda.get_device_name(place)
    return Machine(name, *tflops, gb_s, free and free / 1e9, *MEASURED_SHARES, "measured")


def free_bytes(device: str = "cpu") -> int | None:
    """Free on a CUDA device or in main memory; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(free.split()[1]) * 1024


# --- memory and disk, in bytes


def weight_bytes(size: ModelSize, dtype: str, quant: str | None = None) -> float:
    """Σ parameters · bytes; quant shrinks the decoder's linear layers alone (4bit: NF4_BYTES; 8bit:
    1, and 4 bytes a row)."""
    linear, number = size.parameters["linear"], dtype_of(dtype).itemsize
    in_linear = {None: linear * number, "4bit": linear * NF4_BYTES,
                 "int4": linear * INT4_BYTES, "8bit": linear + 4 * size.linear_rows}
    if quant not in in_linear:
        raise ParameterError(f"quantisation {quant!r} is unknown; choose '4bit', '8bit', "
                             "'int4' or none")
    return (size.total - linear) * number + in_linear[quant]


def prompt_positions(size: ModelSize) -> int:
    """Visual and text positions of one prompt."""
    return size.visual_tokens + PROMPT_TOKENS[size.role]


def kv_bytes(size: ModelSize, positions: int, batch: int, dtype: str) -> int:
    """2 (key, value) · layers · kv_width · bytes · positions · batch."""
    return 2 * size.layers * size.kv_width * dtype_of(dtype).itemsize * positions * batch


def activation_bytes(size: ModelSize, batch: int, dtype: str, quant: str | None = None) -> int:
    """The widest moment of a forward pass: the tower over one clip's pictures, or the decoder's
    gated layer over ``batch`` prompts, (2·width + 3·inner) numbers a position (residual, normed
    input, gate, up, product). 4-bit adds one unpacked weight."""
    in_tower = 2 * size.vision.hidden_size + 3 * size.vision.intermediate_size
    in_decoder = 2 * size.hidden + 3 * size.intermediate
    widest = max(size.n_frames * size.frame_tokens * in_tower,
                 batch * prompt_positions(size) * in_decoder)
    return (widest + (size.largest_linear if quant == "4bit" else 0)) * dtype_of(dtype).itemsize


def memory(pair: Sizes, *, dtype: str, quant: str | None, batch: int,
           new_tokens: int) -> dict[str, float]:
    """Bytes of weights, KV cache and activations, and their PEAK (one model runs at a time)."""
    found: dict[str, float] = {}
    weights, working = 0.0, 0
    for size in pair:
        own = weight_bytes(size, dtype, quant)
        cache = kv_bytes(size, prompt_positions(size) + new_tokens, batch, dtype)
        activations = activation_bytes(size, batch, dtype, quant)
        found |= {f"{size.role}: weights": own, f"{size.role}: KV cache": cache,
                  f"{size.role}: activations": activations}
        weights, working = weights + own, max(working, cache + activations)
    return {**found, PEAK: weights + working}


def shard_bytes(pair: Sizes, *, samples: int, tokens: int, modes: int, stored: str,
                dtype: str) -> int:
    """Paired states, ids and texts of ``modes`` run folders with both LM heads: D numbers and an
    8-byte id (int8: and a 4-byte scale) a position and model."""
    if stored not in STATE_BYTES:
        raise ParameterError(
            f"states cannot be stored as {stored!r}; choose one of {', '.join(STATE_BYTES)}")
    extra = 8 + (4 if stored == "int8" else 0)
    position = sum(size.hidden * STATE_BYTES[stored] + extra for size in pair)
    heads = sum(size.vocab * size.hidden * dtype_of(dtype).itemsize for size in pair)
    return modes * (samples * (tokens * position + 16 + TEXT_BYTES_PER_SAMPLE) + heads)


# --- time, in seconds


def prefill_flops(size: ModelSize, positions: int) -> float:
    """2 · linear parameters · positions, and 2 · layers · width · positions² (causal attention)."""
    attention = 2.0 * size.layers * size.hidden * positions**2
    return 2.0 * size.parameters["linear"] * positions + attention


def prompt_seconds(size: ModelSize, machine: Machine, dtype: str) -> float:
    """Tower over every picture of a clip, projector, and prefill, bound by compute."""
    states, tower = size.n_frames * size.frame_tokens, size.vision
    attention = 4.0 * tower.num_hidden_layers * tower.hidden_size * states * size.frame_tokens
    vision = 2.0 * (size.tower_parameters + size.parameters["projector"]) * states + attention
    return (vision + prefill_flops(size, prompt_positions(size))) / machine.flops(dtype)


def step_seconds(size: ModelSize, machine: Machine, dtype: str, quant: str | None, *, batch: int,
                 positions: int) -> float:
    """Of ``batch`` rows: the longer of reading (linear, head, caches) and computing."""
    not_read = size.total - size.parameters["linear"] - size.parameters.get("head", 0)
    read = weight_bytes(size, dtype, quant) - not_read * dtype_of(dtype).itemsize
    read += kv_bytes(size, positions, batch, dtype)
    compute = 2.0 * batch * (size.parameters["linear"] + size.vocab * size.hidden)
    bytes_s = 1e9 * machine.bandwidth_share * machine.gb_s
    return max(read / bytes_s, compute / machine.flops(dtype))


def extraction_seconds(pair: Sizes, machine: Machine, *, dtype: str, quant: str | None, clips: int,
                       questions: int, new_tokens: int, batch: int,
                       modes: tuple[str, ...]) -> dict[str, float]:
    """By what is done: a clip's prompt up to its questions once a batch, then ``new_tokens`` steps
    for each batch of answers; the drafter is forced in one pass or generates, by mode."""
    drafter, verifier = pair
    samples, prompts = clips * questions, clips * -(-questions // batch)
    steps = -(-samples // batch) * new_tokens

    def answers(size: ModelSize) -> float:
        middle = prompt_positions(size) + new_tokens // 2
        return steps * step_seconds(size, machine, dtype, quant, batch=min(batch, samples),
                                    positions=middle)

    found = {"verifier prefill": prompts * prompt_seconds(verifier, machine, dtype),
             "verifier answers": answers(verifier),
             "drafter prefill": prompts * prompt_seconds(drafter, machine, dtype)}
    if "teacher_forced" in modes:
        forced = samples * prefill_flops(drafter, new_tokens)
        found["drafter forced"] = forced / machine.flops(dtype)
    if "free_running" in modes:
        found["drafter answers"] = answers(drafter)
    return found


TRAINED_BYTES = 16
"""Of a trained parameter: weight, gradient and AdamW's two moments, float32."""


def training(parameters: int, verifier: ModelSize, machine: Machine, *, samples: int, tokens: int,
             epochs: int, batch: int, dtype: str = "float32") -> tuple[float, float]:
    """Seconds and peak bytes of an adapter under AdamW: 6 · parameters operations, 4 · V · D for
    the frozen head, 3 rows of logits and 24 states a position; TRAINED_BYTES a parameter. dtype: of
    the forward pass; bfloat16 keeps copies of weights and head beside the float32 ones. The states
    are streamed: no more than a few batches of them are anywhere."""
    head, half = verifier.vocab * verifier.hidden, dtype_of(dtype) != torch.float32
    seconds = samples * tokens * epochs * (6.0 * parameters + 4.0 * head) / machine.flops(dtype)
    rows = 3 * verifier.vocab + 24 * verifier.hidden
    copies = 2 * (parameters + head) * half
    return seconds, TRAINED_BYTES * parameters + 4 * head + copies + 4 * batch * tokens * rows


def evaluation_bytes(parameters: int, verifier: ModelSize, *, tokens: int, batch: int) -> int:
    """Peak of the token table on one batch, in float32: an adapter, the head, 2 rows of logits and
    12 states a position."""
    rows = 2 * verifier.vocab + 12 * verifier.hidden
    return 4 * (parameters + verifier.vocab * verifier.hidden + batch * tokens * rows)


def live_bytes(pair: Sizes, parameters: int, *, dtype: str, quant: str | None,
               new_tokens: int) -> float:
    """Peak of live decoding: both weights, both caches of one answer, the adapters of
    ``parameters`` in all, and the activations of both prefills, which may run at once."""
    need = memory(pair, dtype=dtype, quant=quant, batch=1, new_tokens=new_tokens)
    del need[PEAK]
    return sum(need.values()) + parameters * dtype_of(dtype).itemsize
