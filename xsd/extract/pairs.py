"""Paired hidden states of one batch of samples: free-running (each model after its own tokens;
lengths may differ) and teacher-forced (both after the verifier's). The verifier's greedy answer is
generated once for both; its states there equal a forced pass's up to rounding."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from xsd.core import Mode, PairedStates, Sample, ShardError, Tap
from xsd.models.batched import LAST, Continuation
from xsd.models.handle import ModelHandle, Role
from xsd.models.loading import Pair
from xsd.shards.format import first_difference
from xsd.shards.store import ShardDataset

Done = TypeVar("Done")
GAIN = 1.1
MODES: tuple[Mode, ...] = ("teacher_forced", "free_running")


def tap_of(layer: int) -> Tap:
    """Which side of the final norm a layer's states are on."""
    return "post_norm" if layer == LAST else "pre_norm"


def folder_name(mode: Mode, layer: int = LAST) -> str:
    """Folder of one kind of pairs in a run: ``teacher_forced``, ``teacher_forced.layer-8``."""
    return mode if layer == LAST else f"{mode}.layer{layer}"


def free_running_pairs(pair: Pair, samples: Sequence[Sample], max_new_tokens: int,
                       batch_size: int = 16, *,
                       verifier: Sequence[Continuation] | None = None) -> list[PairedStates]:
    """Both models answer greedily. verifier: its continuations where they are known."""
    return by_layer("free_running", pair, samples, max_new_tokens, batch_size,
                    verifier=verifier)[LAST]


def teacher_forced_pairs(pair: Pair, samples: Sequence[Sample], max_new_tokens: int,
                         batch_size: int = 16, *,
                         verifier: Sequence[Continuation] | None = None) -> list[PairedStates]:
    """The verifier answers greedily; the drafter is forced along that answer in one pass a batch.
    ids_by_drafter[t] is what the drafter's own head says after the verifier's tokens 0…t-1. A token
    outside the shared vocabulary (such as ``<image>``) cannot be given to the drafter: the pair
    ends with the position that predicts it."""
    return by_layer("teacher_forced", pair, samples, max_new_tokens, batch_size,
                    verifier=verifier)[LAST]


def awake(pair: Pair, role: Role) -> ModelHandle:
    """The model of a role, on its device; where both do not fit, the other one leaves it."""
    one, other = (pair.drafter, pair.verifier)[::1 if role == "drafter" else -1]
    if pair.turns and one.device.type == "cpu":
        other.model.to("cpu")
        one.model.to(pair.turns)
    return one


def fitting(work: Callable[[int], Done], size: list[int]) -> Done:
    """``work(size[0])``, a number of answers at a time; where the memory does not do for them, half
    as many, from then on. Raises: torch.OutOfMemoryError where it does not do for one."""
    while True:
        try:
            return work(size[0])
        except torch.OutOfMemoryError:
            if size[0] == 1:
                raise
        size[0] //= 2  # here, where the failed pass is no longer kept by its traceback
        torch.cuda.empty_cache()


def fastest(work: Callable[[int], Any], most: int) -> int:
    """How many at a time: doubled as long as memory does and the rate grows by a tenth."""
    best, rate, size = 1, 0.0, 1
    while size <= most:
        began = time.perf_counter()
        with contextlib.suppress(torch.OutOfMemoryError):
            work(size)
            if (now := size / (time.perf_counter() - began)) > GAIN * rate:
                best, rate, size = size, now, 2 * size
                continue
        break
    torch.cuda.empty_cache()
    return best


def by_layer(mode: Mode, pair: Pair, samples: Sequence[Sample], max_new_tokens: int,
             batch_size: int = 16, *, verifier: Sequence[Continuation] | None = None,
             layers: Sequence[int] = (LAST,)) -> dict[int, list[PairedStates]]:
    """The pairs of one mode, once for each layer (batched.LAST); ids and texts are the same in all
    of them. Raises: ParameterError for a layer that one of the models does not have."""
    options = {"batch_size": batch_size, "layers": [layer for layer in layers if layer != LAST]}
    if verifier is None:
        verifier = awake(pair, "verifier").generate(samples, max_new_tokens, **options)
    if mode == "teacher_forced":
        verifier = [_within(answer, pair.draft_vocab_size) for answer in verifier]
        forced = [answer.ids for answer in verifier]
        drafter = awake(pair, "drafter").force(samples, forced, **options)
    else:
        drafter = awake(pair, "drafter").generate(samples, max_new_tokens, **options)
    found: dict[int, list[PairedStates]] = {layer: [] for layer in layers}
    for sample, ours, theirs in zip(samples, drafter, verifier, strict=True):
        about = {"finish_by_verifier": theirs.finish, "source": sample.source, "t_us": sample.t_us}
        if mode == "free_running":
            about["finish_by_drafter"] = ours.finish
        texts = pair.drafter.text(ours.ids), pair.verifier.text(theirs.ids)
        for layer in layers:
            states = (one.hidden if layer == LAST else one.layers[layer] for one in (ours, theirs))
            found[layer].append(
                PairedStates(sample.sequence, sample.clip, sample.question, *states, ours.ids,
                             theirs.ids, mode, tap_of(layer), *texts, sample.split or "", about))
    return found


def _within(answer: Continuation, vocabulary: int) -> Continuation:
    """The answer up to the first token outside the shared vocabulary, which is kept."""
    foreign = (answer.ids >= vocabulary).nonzero()
    if not len(foreign):
        return answer
    end = int(foreign[0]) + 1
    return Continuation(answer.ids[:end], answer.hidden[:end], "length",
                        {layer: states[:end] for layer, states in answer.layers.items()})


class StoredAnswers:
    """The verifier's answers of a finished run, by sample, for another drafter or number of event
    frames. folder: a run, or its folder of one mode. layers: others than the last that are needed
    too. Raises: ShardError if it is none, was written by another verifier or with another maximum
    length, or lacks a layer; and when asked for a sample it does not hold."""

    def __init__(self, folder: str | Path, *, verifier: Mapping[str, Any], max_new_tokens: int,
                 layers: Sequence[int] = ()) -> None:
        # A free-running run holds the whole answers; a teacher-forced one may have cut some at a
        # token the drafter does not know.
        places = [Path(folder) / mode for mode in ("free_running", "teacher_forced")]
        self.folder = next((place for place in places if place.is_dir()), Path(folder))
        self.dataset = ShardDataset(self.folder, expected_tap="post_norm")
        beside, mode = self.folder.parent, self.dataset.mode
        self._layers = {layer: ShardDataset(beside / folder_name(mode, layer)) for layer in layers}
        wanted = {"verifier": dict(verifier), "max_new_tokens": max_new_tokens,
                  "samples_hash": self.dataset.manifest["config"].get("samples_hash")}
        for dataset in (self.dataset, *self._layers.values()):
            config = dataset.manifest["config"]
            if difference := first_difference({key: config.get(key) for key in wanted}, wanted):
                raise ShardError(f"the verifier's answers in {dataset.folder} cannot be used: "
                                 f"{difference}; extract without them")
        self._places = {key: i for i, key in enumerate(self.dataset.names())}

    def __call__(self, samples: Sequence[Sample]) -> list[Continuation]:
        """One continuation per sample; states in float32, as rounded in the stored run."""
        found = []
        for sample in samples:
            place = self._places.get((sample.sequence, sample.clip, sample.question))
            if place is None:
                raise ShardError(
                    f"{self.folder} holds no answer for {sample.sequence}/{sample.clip} "
                    f"{sample.question!r}; extract without it")
            states = self.dataset[place]
            others = {layer: dataset[place].hidden_by_verifier
                      for layer, dataset in self._layers.items()}
            found.append(Continuation(states.ids_by_verifier, states.hidden_by_verifier,
                                      states.extra["finish_by_verifier"], others))
        return found
