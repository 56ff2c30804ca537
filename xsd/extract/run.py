"""An extraction from beginning to end: Stage 0 (the LM heads) and Stage 1 (paired states), resumable, one folder for each mode."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from xsd import __version__
from xsd.core import Mode, PairError, ParameterError, Sample, ShardError
from xsd.extract import pairs, plan
from xsd.models.handle import Continuation, ModelHandle
from xsd.models.loading import Pair
from xsd.shards import writer as shard_writer


@dataclass(frozen=True)
class Progress:
    """Where a run stands. rate: samples a second of this run. eta_s: seconds left, infinite before the first batch. gb: on disk."""

    done: int
    total: int
    tokens: int
    rate: float
    eta_s: float
    gb: float


@dataclass(frozen=True)
class ExtractReport:
    """What extract() did. n, tokens, gb: of the whole run (tokens: the verifier's, in the mode with most). resumed: samples found done.

    seconds: of this call. finished: False after SIGINT or SIGTERM; the same call again continues.
    """

    n: int
    tokens: int
    seconds: float
    gb: float
    resumed: int
    finished: bool
    folders: Mapping[str, Path]


def extract(
    pair: Pair,
    samples: Sequence[plan.Item],
    folder: str | Path,
    *,
    modes: Sequence[Mode] = ("teacher_forced",),
    max_new_tokens: int = 50,
    dtype: str = "fp16",
    batch_size: int = 16,
    samples_per_shard: int = 256,
    max_samples: int | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    verifier_from: str | Path | None = None,
    progress: Any = None,
) -> ExtractReport:
    """Write ``folder/<mode>`` for each mode; every finished batch survives a kill, and the same call again continues the run.

    samples: core.Sample, plan.LazySample or callables that give one (read a batch at a time). dtype: how states are stored, fp16 |
    fp32 | bf16 | int8. max_samples: that many, whole clips drawn by ``seed``. config: what else belongs to the run (split, data_hash,
    quant …), compared on resuming. verifier_from: a finished run of the same verifier, whose answers are taken instead of generated
    (1 or 5 event frames, another drafter). progress: called with Progress after each batch, or anything with tqdm's ``update(n)``.

    Raises: ShardError if the folder was begun with other settings, StorageError (another writer, disk full: what was flushed stays),
    PairError if a saved LM head does not give the model's logits, ParameterError without samples.
    """
    unknown = [mode for mode in modes if mode not in pairs.PAIRS]
    if unknown or not modes:
        raise ShardError(f"modes={tuple(modes)}; expected one or more of {', '.join(pairs.PAIRS)}")
    if batch_size < 1 or max_new_tokens < 1:
        raise ParameterError(f"batch_size={batch_size} and max_new_tokens={max_new_tokens}; expected at least 1 of each")
    started = time.perf_counter()
    items = plan.order(samples, max_samples=max_samples, seed=seed)
    settings = {
        **dict(config or {}), "pair": pair.name, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed,
        "max_samples": max_samples, "n_samples": len(items), "samples_hash": plan.plan_hash(items), "n_event_frames": pair.n_event_frames,
        "event_canvas": pair.event_canvas, "code_version": __version__,
        "drafter": identity(pair.drafter), "verifier": identity(pair.verifier),
    }  # fmt: skip

    def answers(loaded: list[Sample]) -> list[Continuation]:
        if stored is not None:
            return stored(loaded)
        return pair.verifier.generate(loaded, max_new_tokens, batch_size=batch_size)

    stored = None
    if verifier_from is not None:
        stored = pairs.StoredAnswers(verifier_from, verifier=settings["verifier"], max_new_tokens=max_new_tokens)
        settings["verifier_from"] = stored.dataset.manifest["digest"]
    folders = {mode: Path(folder) / mode for mode in modes}
    with contextlib.ExitStack() as stack, interruptible() as stop:
        writers: dict[Mode, shard_writer.ShardWriter] = {}
        for mode, place in folders.items():
            options = {"mode": mode, "dtype": dtype, "config": settings, "samples_per_shard": samples_per_shard}
            writers[mode] = shard_writer.ShardWriter(place, **options)
            stack.callback(writers[mode].close, finished=False)  # whatever happens, what was taken is flushed and the folder given free
        resumed = min(writer.n_written for writer in writers.values())
        if not all(writer.finished for writer in writers.values()):
            _save_heads(pair, writers.values())
            for first in range(resumed - resumed % batch_size, len(items), batch_size):
                if stop.is_set():
                    break
                _batch(pair, items[first : first + batch_size], first, writers, answers, max_new_tokens, batch_size, check=first == 0)
                done = min(first + batch_size, len(items))
                _tell(progress, done, max(first, resumed), len(items), resumed, time.perf_counter() - started, writers)
        finished = all(writer.n_written == len(items) for writer in writers.values())
        for writer in writers.values():
            writer.close(finished=finished)
        return ExtractReport(
            min(writer.n_written for writer in writers.values()),
            _tokens(writers),
            time.perf_counter() - started,
            _gigabytes(folders.values()),
            resumed,
            finished,
            folders,
        )


def _batch(
    pair: Pair,
    items: Sequence[plan.Item],
    first: int,
    writers: Mapping[Mode, shard_writer.ShardWriter],
    answers: Callable[[list[Sample]], list[Continuation]],
    max_new_tokens: int,
    batch_size: int,
    *,
    check: bool,
) -> None:
    """Extract samples first … first + len(items) - 1; a batch is always computed whole, so that a resumed run gives the same bytes."""
    began = time.perf_counter()
    loaded: list[Sample] = [item if isinstance(item, Sample) else item() for item in items]
    verifier = answers(loaded)
    if check:
        check_head(pair.verifier, verifier)
        check_head(pair.drafter, pair.drafter.generate(loaded[:1], max_new_tokens))
    shared = time.perf_counter() - began
    for mode, writer in writers.items():
        began = time.perf_counter()
        missing = first + len(items) - writer.n_written
        if missing <= 0:
            continue
        for states in pairs.PAIRS[mode](pair, loaded, max_new_tokens, batch_size, verifier=verifier)[-missing:]:
            writer.write(states)
        writer.flush(seconds=shared + time.perf_counter() - began)


# --- Stage 0 -----------------------------------------------------------------------------------------------------------------


def _save_heads(pair: Pair, writers: Any) -> None:
    for handle in (pair.drafter, pair.verifier):
        weight = handle.head.weight
        if not weight.is_floating_point() or getattr(handle.head, "bias", None) is not None:
            raise PairError(f"the {handle.role}'s LM head is quantised or has a bias; load it with the head left out of quantisation")
        for writer in writers:
            if not writer.finished:
                writer.save_head(handle.role, weight, pair.draft_vocab_size)


def check_head(handle: ModelHandle, answers: Sequence[Continuation]) -> None:
    """Compare ``states @ head.T`` in float32 with the model's own logits. Raises: PairError with the difference.

    The tolerance is the rounding of the model's dtype over a sum of D products.
    """
    weight = handle.head.weight
    hidden = torch.cat([answer.hidden for answer in answers]).to(weight.device)
    own = handle.lm_head(hidden).float()
    saved = hidden.float() @ weight.float().T
    off = float((own - saved).abs().max() / own.abs().max().clamp(min=1e-6))
    if not off <= 8 * torch.finfo(weight.dtype).eps * handle.hidden_size**0.5:
        raise PairError(
            f"the {handle.role}'s LM head does not give its logits (off by {off:.1e} of the largest); the model transforms its logits "
            "further, so stored states cannot be judged through the head alone"
        )


# --- around a run --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that the batch at hand is finished; a second signal acts as usual.

    Outside the main thread signals are left alone and the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


def identity(handle: ModelHandle) -> dict[str, Any]:
    """What must be equal for two extractions to give the same states: weights (as held, so quantised ones differ) and dtype."""
    return {"name": handle.name, "weights": handle.weights_hash(), "dtype": str(handle.head.weight.dtype).removeprefix("torch.")}


def _tokens(writers: Mapping[Mode, shard_writer.ShardWriter]) -> int:
    return max(writer.n_tokens for writer in writers.values())


def _gigabytes(folders: Any) -> float:
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file()) / 1e9


def _tell(
    progress: Any, done: int, before: int, total: int, resumed: int, seconds: float, writers: Mapping[Mode, shard_writer.ShardWriter]
) -> None:
    if progress is None:
        return
    if callable(getattr(progress, "update", None)):
        progress.update(done - before)
        return
    rate = (done - resumed) / seconds
    left = (total - done) / rate if rate else float("inf")
    progress(Progress(done, total, _tokens(writers), rate, left, _gigabytes([writer.folder for writer in writers.values()])))
