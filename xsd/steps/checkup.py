"""What ``xsd doctor --pair`` looks at beyond the machine: does the pair fit, load, agree, run one
request, and in which number formats."""

from __future__ import annotations

import numpy as np
import torch

from xsd.core import Sample, XsdError
from xsd.models import full_size, loading, quantization
from xsd.models.handle import ModelHandle
from xsd.runs.doctor import Finding
from xsd.steps import plan

GB = 1e9
QUESTION = "What is in the scene?"
PROBE_TOKENS = 2


def examine(pair: str, *, dtype: str = "float32", quant: str | None = None,
            device: str = "cpu") -> list[Finding]:
    """Findings about a pair, the cheap ones first; it is not loaded where its predicted memory is
    more than what is free.

    Raises: ParameterError for an unknown dtype or quant.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return [
            Finding("bad", "no GPU is visible to torch",
                    "use --device cpu, or install a CUDA build of torch and its driver")
        ]
    try:
        sizes = full_size.sizes(pair)
    except XsdError as error:
        return [Finding("bad", "the pair does not load", str(error))]
    found = [fits(sizes, plan.free_bytes(device), dtype=dtype, quant=quant, device=device)]
    if found[0].state == "bad":
        return found
    try:
        loaded = loading.load_pair(pair, dtype=dtype, quant=quant, device=device)
        found += [
            agreement(loaded),
            *(weights(getattr(loaded, size.role), size, dtype, quant) for size in sizes)
        ]
        return [*found, request(loaded), peak(device)]
    except XsdError as error:
        return [*found, Finding("bad", "the pair does not load or run", str(error))]


def fits(sizes: tuple[full_size.ModelSize, full_size.ModelSize], free: int | None, *, dtype: str,
         quant: str | None, device: str) -> Finding:
    """Predicted peak of one answer at a time against what is free. free: bytes, None if the system
    does not say."""
    need = plan.memory(sizes, dtype, quant, batch=1, new_tokens=64).peak
    what = (f"predicted memory {need / GB:.2f} GB ({dtype}{', ' + quant if quant else ''}, one "
            "answer at a time)")
    if free is None:
        return Finding("note", what, f"how much {device} has free is not known here")
    if need <= free:
        return Finding("ok", f"{what}, {free / GB:.1f} GB free on {device}")
    ways = [
        f"--dtype bfloat16{f' --quant {form}' if form else ''} needs {less / GB:.1f} GB"
        for form in (None, "8bit", "4bit")
        if (less := plan.memory(sizes, "bfloat16", form, batch=1, new_tokens=64).peak) <= free
    ]
    return Finding("bad", f"{what}, but only {free / GB:.1f} GB are free on {device}",
                   "; ".join(ways) or "use a larger device (xsd plan)")


def agreement(pair: loading.Pair) -> Finding:
    """What load_pair has checked, in one line."""
    widths = f"{pair.drafter.hidden_size} and {pair.verifier.hidden_size} wide"
    return Finding(
        "ok",
        f"pair {pair.name}: {widths}, {pair.draft_vocab_size} ids are the same text to both and "
        "may be drafted "
        f"(heads of {pair.drafter.vocab_size} and {pair.verifier.vocab_size} rows), end of answer "
        f"{sorted(pair.verifier.eos_token_ids)}",
    )


def weights(handle: ModelHandle, size: full_size.ModelSize, dtype: str,
            quant: str | None) -> Finding:
    """dtype map by top module, and the bytes the weights take against the prediction."""
    forms = "; ".join(
        f"{module} "
        f"{' + '.join(f'{kind} {count:,}'.replace(',', ' ') for kind, count in counts.items())}"
        for module, counts in quantization.dtype_map(handle.model).items())
    taken, predicted = quantization.weight_bytes(handle.model) / GB, plan.weight_bytes(
        size, dtype, quant) / GB
    return Finding(
        "ok",
        f"{handle.role}: weights take {taken:.3f} GB (predicted {predicted:.3f}); stored numbers: "
        f"{forms}"
    )


def request(pair: loading.Pair) -> Finding:
    """One answer of two tokens about blank pictures: are the numbers finite, and does the head
    reproduce the logits?"""
    side = 32
    blank = [np.full((side, side, 3), 255, np.uint8)] * pair.n_event_frames
    sample = Sample("doctor", "blank", QUESTION, blank,
                    np.zeros((full_size.N_VIDEO_FRAMES, side, side, 3), np.uint8))
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
    return Finding(
        "ok",
        f"both models answered a question about blank pictures with finite numbers ({PROBE_TOKENS} "
        "tokens)"
    )


def peak(device: str) -> Finding:
    """Highest memory since this process began (on a GPU: of torch's allocator)."""
    where = "process" if torch.device(device).type == "cpu" else device
    return Finding(
        "ok",
        f"measured peak memory of the {where}: {quantization.peak_memory_bytes(device) / GB:.2f} "
        "GB, libraries included"
    )
