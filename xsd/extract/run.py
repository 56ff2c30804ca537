"""An extraction from beginning to end: Stage 0 (the LM heads) and Stage 1 (paired states),
resumable, one folder for each kind of pairs.

docs/extraction.md tells what survives what, how several processes share a run, and where layers go.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from xsd import __version__
from xsd.core import Mode, PairError, ParameterError, Sample, ShardError
from xsd.extract import monitor, pairs, plan, ranks
from xsd.models import layers as layer_states
from xsd.models.batched import Continuation
from xsd.models.handle import ModelHandle
from xsd.models.layers import LAST
from xsd.models.loading import Pair
from xsd.shards import writer as shard_writer
from xsd.shards.format import read_manifest, short_dtype


@dataclass(frozen=True)
class Progress:
    """Where a run stands. rate: samples a second of this run. eta_s: seconds left, infinite before
    the first batch. gb: on disk."""

    done: int
    total: int
    tokens: int
    rate: float
    eta_s: float
    gb: float

    def __str__(self) -> str:
        return (
            f"{self.done} of {self.total} samples ({100 * self.done / self.total:.0f} %), "
            f"{self.rate:.1f} samples/s, "
            f"{monitor.duration(self.eta_s)} left, {self.gb:.3f} GB")


@dataclass(frozen=True)
class ExtractReport:
    """What extract() did. n, tokens, gb: of this process's samples (tokens: the verifier's, in the
    mode with most). resumed: samples found done. seconds: of this call.

    finished: False after SIGINT or SIGTERM; the same call again continues. joined: the folders hold
    the whole run (with one process the
    same as finished; with several, False until the last one is done).
    """

    n: int
    tokens: int
    seconds: float
    gb: float
    resumed: int
    finished: bool
    folders: Mapping[str, Path]
    joined: bool = True


Kind = tuple[Mode, int]
"""Mode and layer: what one folder of a run holds."""


def extract(
    pair: Pair, samples: Sequence[plan.Item], folder: str | Path, *,
    modes: Sequence[Mode] = ("teacher_forced",), layers: Sequence[int] = (LAST,),
    max_new_tokens: int = 50, dtype: str = "fp16", batch_size: int = 16,
    samples_per_shard: int = 256, max_samples: int | None = None, seed: int = 0,
    config: Mapping[str, Any] | None = None, verifier_from: str | Path | None = None,
    rank: ranks.Rank | None = None, progress: Any = None,
) -> ExtractReport:
    """Write ``folder/<mode>`` for each mode; every finished batch survives a kill, and the same
    call again continues the run.

    samples: core.Sample, plan.LazySample or callables that give one (read a batch at a time).
    layers: which hidden states
    (models.layers); others than the last have folders of their own (``<mode>.layer-8``). dtype: how
    states are stored, fp16 | fp32 | bf16 | int8. max_samples: that many, whole clips drawn by
    ``seed``. config: what else belongs to the run (split, data_hash, quant …), compared on
    resuming. verifier_from: a finished run of the same verifier, whose answers are taken instead of
    generated (1 or 5 event frames, another drafter). rank: one of several processes that share the
    run (docs/extraction.md). progress: called with Progress after each batch, or anything with
    tqdm's ``update(n)``.

    Raises: ShardError if the folder was begun with other settings, StorageError (another writer,
    disk full: what was flushed stays),
    PairError if a saved LM head does not give the model's logits, ParameterError without samples or
    for a layer that is not there.
    """
    unknown = [mode for mode in modes if mode not in pairs.MODES]
    if unknown or not modes or not layers:
        raise ShardError(
            f"modes={tuple(modes)}, layers={tuple(layers)}; expected one or more of "
            f"{', '.join(pairs.MODES)}, and a layer"
        )
    if batch_size < 1 or max_new_tokens < 1:
        raise ParameterError(
            f"batch_size={batch_size} and max_new_tokens={max_new_tokens}; expected at least 1 of "
            "each"
        )
    started = time.perf_counter()
    others = [layer for layer in dict.fromkeys(layers) if layer != LAST]
    for layer in others:
        layer_states.place(pair.drafter.decoder,
                           layer), layer_states.place(pair.verifier.decoder, layer)
    items = plan.order(samples, max_samples=max_samples, seed=seed)
    settings = {
        **dict(config or {}), "pair": pair.name, "max_new_tokens": max_new_tokens,
        "batch_size": batch_size, "seed": seed, "max_samples": max_samples, "n_samples": len(items),
        "samples_hash": plan.plan_hash(items), "n_event_frames": pair.n_event_frames,
        "event_canvas": pair.event_canvas, "code_version": __version__,
        "drafter": identity(pair.drafter), "verifier": identity(pair.verifier),
    }  # fmt: skip
    stored = None
    if verifier_from is not None:
        stored = pairs.StoredAnswers(verifier_from, verifier=settings["verifier"],
                                     max_new_tokens=max_new_tokens, layers=others)
        settings["verifier_from"] = stored.dataset.manifest["digest"]

    def answers(loaded: list[Sample]) -> list[Continuation]:
        if stored is not None:
            return stored(loaded)
        return pair.verifier.generate(loaded, max_new_tokens, batch_size=batch_size, layers=others)

    rank = rank or ranks.Rank()
    share = rank.share(len(items), samples_per_shard)
    folders = {(mode, layer): Path(folder) / pairs.folder_name(mode, layer) for mode in modes
               for layer in dict.fromkeys(layers)}
    with contextlib.ExitStack() as stack, interruptible() as stop:
        writers: dict[Kind, shard_writer.ShardWriter] = {}
        for (mode, layer), place in folders.items():
            kind_settings = {**settings, "layer": layer} if layer != LAST else settings
            options = {
                "mode": mode, "tap": pairs.tap_of(layer), "dtype": short_dtype(dtype),
                "samples_per_shard": samples_per_shard, "config": kind_settings,
            }  # fmt: skip
            if ranks.check_begun(place, rank, options) or not share:
                continue
            if rank.world_size > 1:
                part = {
                    "rank": rank.rank, "world_size": rank.world_size, "first": share.start,
                    "n_samples": len(share)
                }
                place, options = rank.part(
                    place), {**options, "config": {**kind_settings, "part": part}}
            writers[mode, layer] = shard_writer.ShardWriter(place, **options)
            stack.callback(writers[mode, layer].close,
                           finished=False)  # whatever happens, what was taken is flushed
        resumed = min((writer.n_written for writer in writers.values()), default=len(share))
        stack.enter_context(
            monitor.recording(folder,
                              f"{rank.rank} of {rank.world_size}" if rank.world_size > 1 else ""))
        if not all(writer.finished for writer in writers.values()):
            _save_heads(pair, [
                writer
                for (_, layer), writer in writers.items() if layer == LAST and not writer.finished
            ])
            at = share.start + resumed
            for first in range(at - at % batch_size, share.stop, batch_size):
                if stop.is_set():
                    break
                batch = _Batch(first, items[first:first + batch_size], share, max_new_tokens)
                _extract(pair, batch, writers, answers, check=first <= share.start)
                done = min(first + batch_size, share.stop) - share.start
                before = max(first - share.start, resumed)
                _tell(progress, done, before, len(share), resumed,
                      time.perf_counter() - started, writers)
        finished = all(writer.n_written == len(share) for writer in writers.values())
        for writer in writers.values():
            writer.close(finished=finished)
        joined = finished
        if finished and rank.world_size > 1:
            joined = all([
                ranks.join(place, rank.world_size, len(items), samples_per_shard)
                for place in folders.values()
            ])
        return ExtractReport(
            min((writer.n_written for writer in writers.values()), default=len(share)),
            _tokens(writers) if writers or not joined else _stored_tokens(folders.values()),
            time.perf_counter() - started, _gigabytes(folders.values()), resumed, finished,
            {pairs.folder_name(*kind): place for kind, place in folders.items()}, joined,
        )


@dataclass(frozen=True)
class _Batch:
    """Samples ``first`` … of the common plan; only those in ``share`` are this process's to
    write."""

    first: int
    items: Sequence[plan.Item]
    share: range
    max_new_tokens: int

    def missing(self, writer: shard_writer.ShardWriter) -> slice:
        """Which of the batch's samples the writer still lacks."""
        have = self.share.start + writer.n_written
        return slice(have - self.first,
                     min(self.first + len(self.items), self.share.stop) - self.first)


def _extract(pair: Pair, batch: _Batch, writers: Mapping[Kind, shard_writer.ShardWriter],
             answers: Callable[[list[Sample]], list[Continuation]], *, check: bool,
             ) -> None:
    """Extract one batch; it is always computed whole, so that a resumed run, or one of several
    processes, gives the same bytes."""
    began = time.perf_counter()
    loaded: list[Sample] = [item if isinstance(item, Sample) else item() for item in batch.items]
    verifier = answers(loaded)
    if check:
        check_head(pair.verifier, verifier)
        check_head(pair.drafter, pair.drafter.generate(loaded[:1], batch.max_new_tokens))
    shared = time.perf_counter() - began
    for mode in dict.fromkeys(mode for mode, _ in writers):
        began = time.perf_counter()
        cuts = {
            layer: batch.missing(writer) for (own, layer), writer in writers.items() if own == mode
        }
        cuts = {layer: cut for layer, cut in cuts.items() if cut.start < cut.stop}
        if not cuts:
            continue
        found = pairs.by_layer(mode, pair, loaded, batch.max_new_tokens, len(loaded),
                               verifier=verifier, layers=list(cuts))
        for layer, cut in cuts.items():
            writer = writers[mode, layer]
            for states in found[layer][cut]:
                writer.write(states)
            writer.flush(seconds=shared + time.perf_counter() - began)


# --- Stage 0
# ------------------------------------------------------------------------------------------------


def _save_heads(pair: Pair, writers: Sequence[shard_writer.ShardWriter]) -> None:
    for handle in (pair.drafter, pair.verifier):
        weight = handle.head.weight
        if not weight.is_floating_point() or getattr(handle.head, "bias", None) is not None:
            raise PairError(
                f"the {handle.role}'s LM head is quantised or has a bias; load it with the head "
                "left out of quantisation"
            )
        for writer in writers:
            writer.save_head(handle.role, weight, pair.draft_vocab_size)


def check_head(handle: ModelHandle, answers: Sequence[Continuation]) -> None:
    """Compare ``states @ head.T`` in float32 with the model's own logits. Raises: PairError with
    the difference.

    The tolerance is the rounding of the model's dtype over a sum of D products.
    """
    weight = handle.head.weight
    hidden = torch.cat([answer.hidden for answer in answers]).to(weight.device)
    own = handle.lm_head(hidden).float()
    saved = hidden.float() @ weight.float().T
    off = float((own - saved).abs().max() / own.abs().max().clamp(min=1e-6))
    if not off <= 8 * torch.finfo(weight.dtype).eps * handle.hidden_size**0.5:
        raise PairError(
            f"the {handle.role}'s LM head does not give its logits (off by {off:.1e} of the "
            "largest); the model transforms its logits "
            "further, so stored states cannot be judged through the head alone")


# --- around a run
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that the batch at hand is finished; a second signal
    acts as usual.

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
    """What must be equal for two extractions to give the same states: weights (as held, so
    quantised ones differ) and dtype."""
    return {
        "name": handle.name, "weights": handle.weights_hash(),
        "dtype": str(handle.head.weight.dtype).removeprefix("torch.")
    }


def _tokens(writers: Mapping[Kind, shard_writer.ShardWriter]) -> int:
    return max((writer.n_tokens for writer in writers.values()), default=0)


def _stored_tokens(folders: Iterable[Path]) -> int:
    """As :func:`_tokens`, of runs that were finished before."""
    return max(
        sum(shard["n_tokens_verifier"] for shard in read_manifest(folder)["shards"])
        for folder in folders)


def _gigabytes(folders: Iterable[Path]) -> float:
    """Of all files; a file that another process removes meanwhile counts nothing."""
    total = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total / 1e9


def _tell(progress: Any, done: int, before: int, total: int, resumed: int, seconds: float,
          writers: Mapping[Kind, shard_writer.ShardWriter]) -> None:
    if progress is None:
        return
    if callable(getattr(progress, "update", None)):
        progress.update(done - before)
        return
    rate = (done - resumed) / seconds
    left = (total - done) / rate if rate else float("inf")
    progress(
        Progress(done, total, _tokens(writers), rate, left,
                 _gigabytes([writer.folder for writer in writers.values()])))
