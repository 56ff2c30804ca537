"""``xsd doctor --pair``: does the pair fit, load, agree, run one request, in which formats."""

from __future__ import annotations

import numpy as np
import torch

from xsd.core import Sample, XsdError
from xsd.models import full_size, loading, planning, quantization
from xsd.models.full_size import ModelSize
from xsd.models.handle import ModelHandle
from xsd.runs.doctor import Finding

GB = 1e9
QUESTION = "What is in the scene?"
PROBE_TOKENS = 2


def examine(pair: str, *, dtype: str = "float32", quant: str | None = None,
            device: str = "cpu") -> list[Finding]:
    """Findings about a pair, the cheap ones first; it is not loaded where its predicted memory is
    more than what is free. Raises: ParameterError for an unknown dtype or quant."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return [Finding("bad", "no GPU is visible to torch",
                        "use --device cpu, or install a CUDA build of torch and its driver")]
    found: list[Finding] = []
    try:
        sizes = full_size.sizes(pair)
        found = [fits(sizes, planning.free_bytes(device), dtype=dtype, quant=quant, device=device)]
        if found[0].state == "bad":
            return found
        loaded = loading.load_pair(pair, dtype=dtype, quant=quant, device=device)
        stored = [weights(getattr(loaded, size.role), size, dtype, quant) for size in sizes]
        found += [agreement(loaded), *stored, request(loaded)]
    except XsdError as error:
        return [*found, Finding("bad", "the pair does not load or run", str(error))]
    where = "process" if torch.device(device).type == "cpu" else device
    taken = quantization.peak_memory_bytes(device) / GB  # since this process began
    return [*found, Finding("ok", f"measured peak memory of the {where}: {taken:.2f} GB, libraries "
                            "included")]


def fits(sizes: planning.Sizes, free: int | None, *, dtype: str, quant: str | None,
         device: str) -> Finding:
    """Predicted peak of one answer at a time against free bytes (None: the system does not say)."""

    def gb(dtype: str, quant: str | None) -> float:
        need = planning.memory(sizes, dtype=dtype, quant=quant, batch=1, new_tokens=64)
        return need[planning.PEAK] / GB

    form = dtype + (f", {quant}" if quant else "")
    what = f"predicted memory {gb(dtype, quant):.2f} GB ({form}, one answer at a time)"
    if free is None:
        return Finding("note", what, f"how much {device} has free is not known here")
    there = free / GB
    if gb(dtype, quant) <= there:
        return Finding("ok", f"{what}, {there:.1f} GB free on {device}")
    forms = {"": None, " --quant 8bit": "8bit", " --quant 4bit": "4bit"}
    ways = [f"--dtype bfloat16{option} needs {gb('bfloat16', less):.1f} GB"
            for option, less in forms.items() if gb("bfloat16", less) <= there]
    return Finding("bad", f"{what}, but only {there:.1f} GB are free on {device}",
                   "; ".join(ways) or "use a larger device (xsd plan)")


def agreement(pair: loading.Pair) -> Finding:
    """What load_pair has checked, in one line."""
    ours, theirs = pair.drafter, pair.verifier
    return Finding("ok", f"pair {pair.name}: {ours.hidden_size} and {theirs.hidden_size} wide, "
                   f"{pair.draft_vocab_size} ids are the same text to both and may be drafted "
                   f"(heads of {ours.vocab_size} and {theirs.vocab_size} rows), end of answer "
                   f"{sorted(theirs.eos_token_ids)}")


def weights(handle: ModelHandle, size: ModelSize, dtype: str, quant: str | None) -> Finding:
    """Stored numbers by dtype and top module, and the weights' bytes against the prediction."""
    forms = []
    for module, counts in quantization.dtype_map(handle.model).items():
        kinds = [f"{kind} {count:,}".replace(",", " ") for kind, count in counts.items()]
        forms.append(f"{module} {' + '.join(kinds)}")
    taken = quantization.weight_bytes(handle.model) / GB
    predicted = planning.weight_bytes(size, dtype, quant) / GB
    return Finding("ok", f"{handle.role}: weights take {taken:.3f} GB (predicted {predicted:.3f}); "
                   f"stored numbers: {'; '.join(forms)}")


def request(pair: loading.Pair) -> Finding:
    """One answer of two tokens about blank pictures: are the numbers finite, and does the head
    reproduce the logits?"""
    blank = np.full((full_size.N_VIDEO_FRAMES, 32, 32, 3), 255, np.uint8)
    sample = Sample("doctor", "blank", QUESTION, list(blank[:1]) * pair.n_event_frames, 0 * blank)
    for handle in (pair.drafter, pair.verifier):
        state = handle.prefill(sample)
        for _ in range(PROBE_TOKENS - 1):
            handle.extend(state, state.logits.argmax()[None])
        if not bool(torch.isfinite(state.logits).all()):
            return Finding("bad", f"the {handle.role} gives NaN or infinity",
                           "load it with --dtype float32 or bfloat16")
        off = float((handle.lm_head(state.hidden).float() - state.logits.float()).abs().max())
        if off > 0.02 * max(1.0, float(state.logits.abs().max())):
            return Finding("bad", f"the {handle.role}'s head and its logits differ by {off:.3g}",
                           "its states are not those after the norm")
    return Finding("ok", "both models answered a question about blank pictures with finite numbers "
                   f"({PROBE_TOKENS} tokens)")
