"""An extraction from beginning to end: Stage 0 (the LM heads) and Stage 1 (paired states),
resumable, one folder for each kind of pairs (docs/extraction.md)."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from xsd import __version__
from xsd.core import Mode, PairError, ParameterError, Sample, ShardError, at_least_one
from xsd.extract import monitor, pairs, plan, ranks, supervise
from xsd.models import batched
from xsd.models.batched import LAST, Continuation
from xsd.models.handle import ModelHandle
from xsd.models.loading import Pair
from xsd.shards.format import MANIFEST, read_manifest, short_dtype
from xsd.shards.writer import ShardWriter


@dataclass(frozen=True)
class Progress:
    """Where a run stands. rate: samples a second. eta_s: seconds left, at first infinite."""

    done: int
    total: int
    rate: float
    eta_s: float
    gb: float

    def __str__(self) -> str:
        return (f"{self.done} of {self.total} samples ({100 * self.done / self.total:.0f} %), "
                f"{self.rate:.1f} samples/s, {monitor.duration(self.eta_s)} left, {self.gb:.3f} GB")


@dataclass(frozen=True)
class ExtractReport:
    """What extract() did. n, tokens, gb: of this process's samples (tokens: the verifier's, in the
    mode with most). resumed: samples found done. seconds: of this call. finished: False after
    SIGINT or SIGTERM. joined: the folders hold the whole run, of all processes. batch_size: what
    was computed at a time, in the end."""

    n: int
    tokens: int
    seconds: float
    gb: float
    resumed: int
    finished: bool
    folders: Mapping[str, Path]
    joined: bool = True
    batch_size: int = 0

    def __str__(self) -> str:
        counted = (f"{self.n} samples, {self.tokens} tokens, {self.gb:.3f} GB in "
                   f"{self.seconds:.0f} s ({self.resumed} were done before)")
        if not self.finished:
            return f"interrupted after {counted}; the same command continues"
        missing = "; the other parts are still missing, the last one joins them"
        return f"finished: {counted}" + ("" if self.joined else missing)


Kind = tuple[Mode, int]
"""Mode and layer: what one folder of a run holds."""
Answers = Callable[[list[Sample]], list[Continuation]]
"""The verifier's: generated, or taken from another run."""
MOST_AT_A_TIME = 64
"""As far as batch_size="auto" goes."""


def extract(
    pair: Pair, samples: Sequence[plan.Item], folder: str | Path, *,
    modes: Sequence[Mode] = ("teacher_forced",), layers: Sequence[int] = (LAST,),
    max_new_tokens: int = 50, dtype: str = "fp16", batch_size: int | Literal["auto"] = 16,
    samples_per_shard: int = 256, max_samples: int | None = None, max_scenes: int | None = None,
    seed: int = 0, config: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None, verifier_from: str | Path | None = None,
    save_every: int = 0, save_every_s: float = 0.0, rank: ranks.Rank | None = None,
    progress: Any = None,
) -> ExtractReport:
    """Write ``folder/<mode>`` for each mode; every finished batch survives a kill, and the same
    call again continues the run, with another batch_size too. samples: core.Sample, or
    plan.LazySample (read a batch at a time). layers: which hidden states (batched.LAST); others
    than the last have folders of their own. dtype: how states are stored. batch_size: "auto"
    doubles it on the first samples until memory or the rate stops; in any case one that memory does
    not do for is computed in halves. max_samples, max_scenes: so many samples or clips, whole clips
    drawn by ``seed``. config: what else belongs to the run (split, data_hash, quant …), compared on
    resuming; about: what only the manifest's provenance says. verifier_from: a finished run of the
    same verifier, whose answers are taken instead of generated. save_every, save_every_s: write to
    disk once so many samples or seconds have gathered (0: each batch). rank: one of several
    processes that share the run. progress: called with Progress after each batch, or anything with
    tqdm's ``update(n)``. Raises: ShardError if the folder was begun with other settings,
    StorageError (another writer, disk full: what was flushed stays), PairError if a saved LM head
    does not give the model's logits, ParameterError without samples or for a layer that is not
    there."""
    started, rank, folder = time.perf_counter(), rank or ranks.Rank(), Path(folder)
    layers = list(dict.fromkeys(layers))
    _check(pair, modes, layers, 1 if batch_size == "auto" else batch_size, max_new_tokens)
    items = plan.order(samples, max_samples=max_samples, max_scenes=max_scenes, seed=seed)
    folders = {(mode, layer): folder / pairs.folder_name(mode, layer)
               for mode in modes for layer in layers}
    if batch_size == "auto":
        batch_size = _batch_size(pair, items, folders.values(), max_new_tokens, rank)
    settings = {**dict(config or {}), "max_new_tokens": max_new_tokens, "batch_size": batch_size,
                "seed": seed, "max_samples": max_samples, "pair": pair.name,
                "n_samples": len(items), "samples_hash": plan.plan_hash(items),
                "n_event_frames": pair.n_event_frames, "event_canvas": pair.event_canvas,
                "code_version": __version__, "drafter": identity(pair.drafter),
                "verifier": identity(pair.verifier)}
    if max_scenes is not None:
        settings["max_scenes"] = max_scenes
    share, at_a_time = rank.share(len(items), samples_per_shard), [batch_size]
    answers = _answers(pair, layers, settings, verifier_from, at_a_time)
    options = {"dtype": short_dtype(dtype), "samples_per_shard": samples_per_shard}
    with contextlib.ExitStack() as stack, supervise.interruptible() as stop:
        writers = _open_writers(stack, folders, settings, options, about, rank, share)
        resumed = min((writer.n_written for writer in writers.values()), default=len(share))
        stack.enter_context(monitor.recording(folder, rank.part_name))
        if not all(writer.finished for writer in writers.values()):
            _save_heads(pair, writers)
            done, at = resumed, share.start + resumed
            for first in range(at - at % batch_size, share.stop, batch_size):
                if stop.is_set():
                    break
                _extract(pair, items, first, share, writers, answers, settings,
                         (save_every, save_every_s), at_a_time)
                before, done = done, min(first + batch_size, share.stop) - share.start
                rate = (done - resumed) / (time.perf_counter() - started)
                if hasattr(progress, "update"):
                    progress.update(done - before)
                elif progress is not None:
                    left = (len(share) - done) / rate if rate else float("inf")
                    progress(Progress(done, len(share), rate, left, _gigabytes(folders.values())))
        finished = joined = all(writer.n_written == len(share) for writer in writers.values())
        for writer in writers.values():
            writer.close(finished=finished)
        if finished and rank.world_size > 1:
            joined = all([ranks.join(place, rank.world_size, len(items), samples_per_shard)
                          for place in folders.values()])
    n = min((writer.n_written for writer in writers.values()), default=len(share))
    tokens = [writer.n_tokens for writer in writers.values()] or [
        sum(shard["n_tokens_verifier"] for shard in read_manifest(place)["shards"])
        for place in folders.values() if joined]
    names = {pairs.folder_name(*kind): place for kind, place in folders.items()}
    return ExtractReport(n, max(tokens, default=0), time.perf_counter() - started,
                         _gigabytes(folders.values()), resumed, finished, names, joined,
                         at_a_time[0])


def _check(pair: Pair, modes: Sequence[Mode], layers: Sequence[int], batch_size: int,
           max_new_tokens: int) -> None:
    if not modes or not layers or set(modes) - set(pairs.MODES):
        raise ShardError(f"modes={tuple(modes)}, layers={tuple(layers)}; expected one or more of "
                         f"{', '.join(pairs.MODES)}, and a layer")
    at_least_one(ParameterError, batch_size=batch_size, max_new_tokens=max_new_tokens)
    for layer in layers:
        for handle in (pair.drafter, pair.verifier) if layer != LAST else ():
            batched.place(handle.decoder, layer)


def _batch_size(pair: Pair, items: Sequence[plan.Item], folders: Iterable[Path], longest: int,
                rank: ranks.Rank) -> int:
    """What "auto" is: the batch that this run was begun with, else the fastest one here. Raises:
    ParameterError for several processes, which must all cut the samples alike."""
    if rank.world_size > 1:
        raise ParameterError("batch_size=auto is for one process; give several of them a number")
    for place in folders:
        if (place / MANIFEST).is_file():
            return int(read_manifest(place)["config"]["batch_size"])
    some = plan.load(items[:MOST_AT_A_TIME])
    return pairs.fastest(lambda n: pairs.awake(pair, "verifier").generate(
        some[:n], longest, batch_size=n), len(some))


def _answers(pair: Pair, layers: Sequence[int], settings: dict[str, Any],
             verifier_from: str | Path | None, at_a_time: list[int]) -> Answers:
    """Where the verifier's answers come from; another run is noted in the settings."""
    others = [layer for layer in layers if layer != LAST]
    if verifier_from is None:
        return lambda samples: pairs.fitting(lambda size: pairs.awake(pair, "verifier").generate(
            samples, settings["max_new_tokens"], batch_size=size, layers=others), at_a_time)
    stored = pairs.StoredAnswers(verifier_from, verifier=settings["verifier"],
                                 max_new_tokens=settings["max_new_tokens"], layers=others)
    settings["verifier_from"] = stored.dataset.manifest["digest"]
    return stored


def _open_writers(stack: contextlib.ExitStack, folders: Mapping[Kind, Path],
                  settings: Mapping[str, Any], options: Mapping[str, Any],
                  about: Mapping[str, Any] | None, rank: ranks.Rank,
                  share: range) -> dict[Kind, ShardWriter]:
    """Writers of what is not finished yet; whatever happens, the stack flushes what they took."""
    writers = {}
    for (mode, layer), place in folders.items():
        config = {**settings, "layer": layer} if layer != LAST else settings
        kind = {**options, "mode": mode, "tap": pairs.tap_of(layer), "config": config}
        if ranks.check_begun(place, rank, kind) or not share:
            continue
        if rank.world_size > 1:
            part = {"rank": rank.rank, "world_size": rank.world_size, "first": share.start,
                    "n_samples": len(share)}
            place, kind = rank.part(place), {**kind, "config": {**config, "part": part}}
        writers[mode, layer] = ShardWriter(place, **kind, about=about)
        stack.callback(writers[mode, layer].close, finished=False)
    return writers


def _extract(pair: Pair, items: Sequence[plan.Item], first: int, share: range,
             writers: Mapping[Kind, ShardWriter], answers: Answers, settings: Mapping[str, Any],
             save: tuple[int, float], at_a_time: list[int]) -> None:
    """The batch that begins at sample ``first`` of the common plan: always computed whole, so that
    a resumed run, or one of several processes, gives the same bytes; ``share`` of it is written."""
    began, longest = time.perf_counter(), settings["max_new_tokens"]
    loaded = plan.load(items[first:first + settings["batch_size"]])
    verifier = answers(loaded)
    if first <= share.start:
        check_head(pair.verifier, verifier)
        check_head(pair.drafter, pairs.awake(pair, "drafter").generate(loaded[:1], longest))
    shared = time.perf_counter() - began
    end = min(len(loaded), share.stop - first)
    for mode in dict.fromkeys(mode for mode, _ in writers):
        began = time.perf_counter()
        begins = {layer: begin for (own, layer), writer in writers.items() if own == mode
                  and (begin := share.start + writer.n_written - first) < end}
        if not begins:
            continue
        found = pairs.fitting(lambda size, mode=mode, begins=begins: pairs.by_layer(
            mode, pair, loaded, longest, size, verifier=verifier, layers=list(begins)), at_a_time)
        for layer, begin in begins.items():
            writer = writers[mode, layer]
            for states in found[layer][begin:end]:
                writer.write(states)
            writer.took(shared + time.perf_counter() - began, *save)


def _save_heads(pair: Pair, writers: Mapping[Kind, ShardWriter]) -> None:
    for handle in (pair.drafter, pair.verifier):
        weight = handle.head.weight
        if not weight.is_floating_point() or getattr(handle.head, "bias", None) is not None:
            raise PairError(f"the {handle.role}'s LM head is quantised or has a bias; load it with "
                            "the head left out of quantisation")
        for (_, layer), writer in writers.items():
            if layer == LAST and not writer.finished:
                writer.save_head(handle.role, weight, pair.draft_vocab_size)


def check_head(handle: ModelHandle, answers: Sequence[Continuation]) -> None:
    """Compare ``states @ head.T`` with the model's logits, up to the rounding of its dtype over a
    sum of D products. Raises: PairError with the difference."""
    weight = handle.head.weight
    hidden = torch.cat([answer.hidden for answer in answers]).to(weight.device)
    own = handle.lm_head(hidden).float()
    saved = hidden.float() @ weight.float().T
    off = float((own - saved).abs().max() / own.abs().max().clamp(min=1e-6))
    if not off <= 8 * torch.finfo(weight.dtype).eps * handle.hidden_size**0.5:
        raise PairError(
            f"the {handle.role}'s LM head does not give its logits (off by {off:.1e} of the "
            "largest); the model transforms its logits further, so stored states cannot be judged "
            "through the head alone")


def identity(handle: ModelHandle) -> dict[str, Any]:
    """What must be equal for the same states to come out: weights (as held, so quantised ones
    differ) and dtype."""
    return {"name": handle.name, "weights": handle.weights_hash(),
            "dtype": str(handle.head.weight.dtype).removeprefix("torch.")}


def _gigabytes(folders: Iterable[Path]) -> float:
    """Of all files; one that another process removes meanwhile counts nothing."""
    total = 0
    for path in (path for folder in folders for path in folder.rglob("*.*")):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total / 1e9
