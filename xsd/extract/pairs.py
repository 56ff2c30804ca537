"""Paired hidden states of one batch of samples, of both kinds.

    free_running     drafter:  a' b' c'    verifier:  a b c d    each after its own tokens; lengths
                                                                 may differ
    teacher_forced   drafter:  . a b c     verifier:  . a b c    both after the verifier's tokens;
                                                                 position t predicts the same token

The verifier's greedy answer is the same in both, so it is generated once. Its teacher-forced states
are those of its own generation: the same numbers as a forced pass, up to rounding
(tests/test_extract_pairs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xsd.core import Mode, PairedStates, Sample, ShardError, Tap
from xsd.models.batched import Continuation
from xsd.models.layers import LAST
from xsd.models.loading import Pair
from xsd.shards.format import first_difference
from xsd.shards.store import ShardDataset

MODES: tuple[Mode, ...] = ("teacher_forced", "free_running")


def tap_of(layer: int) -> Tap:
    """Which side of the final norm a layer's states are on."""
    return "post_norm" if layer == LAST else "pre_norm"


def folder_name(mode: Mode, layer: int = LAST) -> str:
    """Name of the folder of one kind of pairs in a run: ``teacher_forced``, or
    ``teacher_forced.layer-8`` beside it."""
    return mode if layer == LAST else f"{mode}.layer{layer}"


def free_running_pairs(pair: Pair, samples: Sequence[Sample], max_new_tokens: int,
                       batch_size: int = 16, *,
                       verifier: Sequence[Continuation] | None = None) -> list[PairedStates]:
    """Both models answer greedily. verifier: its continuations where they are known already, else
    generated here."""
    return by_layer("free_running", pair, samples, max_new_tokens, batch_size,
                    verifier=verifier)[LAST]


def teacher_forced_pairs(pair: Pair, samples: Sequence[Sample], max_new_tokens: int,
                         batch_size: int = 16, *,
                         verifier: Sequence[Continuation] | None = None) -> list[PairedStates]:
    """The verifier answers greedily and the drafter is forced along that answer, in one forward
    pass per batch.

    ids_by_drafter[t] is what the drafter's own head says after the verifier's tokens 0…t-1. A token
    outside the shared vocabulary (an added one, such as ``<image>``) cannot be given to the
    drafter: the pair ends with the position that predicts it.
    """
    return by_layer("teacher_forced", pair, samples, max_new_tokens, batch_size,
                    verifier=verifier)[LAST]


def by_layer(mode: Mode, pair: Pair, samples: Sequence[Sample], max_new_tokens: int,
             batch_size: int = 16, *, verifier: Sequence[Continuation] | None = None,
             layers: Sequence[int] = (LAST,)) -> dict[int, list[PairedStates]]:
    """The pairs of one mode, once for each layer; ids and texts are the same in all of them.

    layers: as in models.layers; the last (-1) is post_norm, all others pre_norm. verifier: its
    continuations where they are known, with these layers. Raises: ParameterError for a layer that
    one of the models does not have.
    """
    options = {"batch_size": batch_size, "layers": [layer for layer in layers if layer != LAST]}
    if verifier is None:
        verifier = pair.verifier.generate(samples, max_new_tokens, **options)
    if mode == "teacher_forced":
        verifier = [_within(answer, pair.draft_vocab_size) for answer in verifier]
        drafter = pair.drafter.force(samples, [answer.ids for answer in verifier], **options)
    else:
        drafter = pair.drafter.generate(samples, max_new_tokens, **options)
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
    """The verifier's answers of a finished run, by sample: another drafter, or another number of
    event frames, needs no new ones.

    folder: a run, or its folder of one mode (``run/free_running``). layers: other layers than the
    last that are needed too, from the folders beside it. Raises: ShardError if it is none, or was
    written by another verifier or with another maximum length, or lacks a layer; and when asked for
    a sample it does not hold.
    """

    def __init__(self, folder: str | Path, *, verifier: Mapping[str, Any], max_new_tokens: int,
                 layers: Sequence[int] = ()) -> None:
        # A free-running run holds the whole answers; a teacher-forced one may have cut some at a
        # token the drafter does not know.
        places = [Path(folder) / mode for mode in ("free_running", "teacher_forced")]
        self.folder = next((place for place in places if place.is_dir()), Path(folder))
        self.dataset = ShardDataset(self.folder, expected_tap="post_norm")
        self._layers = {
            layer: ShardDataset(self.folder.parent / folder_name(self.dataset.mode, layer))
            for layer in layers}
        samples_hash = self.dataset.manifest["config"].get("samples_hash")
        wanted = {"verifier": dict(verifier), "max_new_tokens": max_new_tokens,
                  "samples_hash": samples_hash}
        for dataset in (self.dataset, *self._layers.values()):
            config = dataset.manifest["config"]
            now = {key: config.get(key) for key in wanted}
            if difference := first_difference(now, wanted):
                raise ShardError(f"the verifier's answers in {dataset.folder} cannot be used: "
                                 f"{difference}; extract without them")
        table = self.dataset.table()
        names = zip(table["sequence"], table["clip"], table["question"], strict=True)
        self._places = {key: i for i, key in enumerate(names)}

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
