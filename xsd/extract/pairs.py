"""Paired hidden states of one batch of samples, of both kinds.

    free_running     drafter:  a' b' c'        verifier:  a b c d      each after its own tokens; lengths may differ
    teacher_forced   drafter:  . a b c         verifier:  . a b c      both after the verifier's tokens; position t predicts the same token

The verifier's greedy answer is the same in both, so it is generated once. Its teacher-forced states are those of its own generation:
the same numbers as a forced pass, up to rounding (tests/test_extract_pairs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from xsd.core import Mode, PairedStates, Sample, ShardError
from xsd.models.handle import Continuation
from xsd.models.loading import Pair
from xsd.shards.format import first_difference
from xsd.shards.store import ShardDataset


def free_running_pairs(
    pair: Pair, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 16, *, verifier: Sequence[Continuation] | None = None
) -> list[PairedStates]:
    """Both models answer greedily. verifier: its continuations where they are known already, else generated here."""
    verifier = _answers(pair, samples, max_new_tokens, batch_size, verifier)
    drafter = pair.drafter.generate(samples, max_new_tokens, batch_size=batch_size)
    return [
        _paired(pair, sample, "free_running", own.hidden, own.ids, theirs, finish_by_drafter=own.finish)
        for sample, own, theirs in zip(samples, drafter, verifier, strict=True)
    ]


def teacher_forced_pairs(
    pair: Pair, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 16, *, verifier: Sequence[Continuation] | None = None
) -> list[PairedStates]:
    """The verifier answers greedily and the drafter is forced along that answer, in one forward pass a batch.

    ids_by_drafter[t] is what the drafter's own head says after the verifier's tokens 0…t-1. A token outside the shared vocabulary
    (an added one, such as ``<image>``) cannot be given to the drafter: the pair ends with the position that predicts it.
    """
    verifier = [_within(answer, pair.draft_vocab_size) for answer in _answers(pair, samples, max_new_tokens, batch_size, verifier)]
    drafter = pair.drafter.force(samples, [answer.ids for answer in verifier], batch_size=batch_size)
    return [
        _paired(pair, sample, "teacher_forced", own.hidden, own.top_ids, theirs)
        for sample, own, theirs in zip(samples, drafter, verifier, strict=True)
    ]


PAIRS: dict[Mode, Callable[..., list[PairedStates]]] = {"teacher_forced": teacher_forced_pairs, "free_running": free_running_pairs}


class StoredAnswers:
    """The verifier's answers of a finished run, by sample: another drafter, or another number of event frames, needs no new ones.

    folder: a run of one mode (``run/free_running``). Raises: ShardError if it is none, or was written by another verifier or with
    another maximum length; and when asked for a sample it does not hold.
    """

    def __init__(self, folder: str | Path, *, verifier: Mapping[str, Any], max_new_tokens: int) -> None:
        self.dataset = ShardDataset(folder)
        wanted = {"verifier": dict(verifier), "max_new_tokens": max_new_tokens}
        difference = first_difference({key: self.dataset.manifest["config"].get(key) for key in wanted}, wanted)
        if difference:
            raise ShardError(f"the verifier's answers in {folder} cannot be used: {difference}; extract without them")
        table = self.dataset.table()
        self._places = {key: i for i, key in enumerate(zip(table["sequence"], table["clip"], table["question"], strict=True))}

    def __call__(self, samples: Sequence[Sample]) -> list[Continuation]:
        """One continuation a sample; states in float32, as rounded in the stored run."""
        found = []
        for sample in samples:
            place = self._places.get((sample.sequence, sample.clip, sample.question))
            if place is None:
                raise ShardError(
                    f"{self.dataset.folder} holds no answer for {sample.sequence}/{sample.clip} {sample.question!r}; extract without it"
                )
            states = self.dataset[place]
            found.append(Continuation(states.ids_by_verifier, states.hidden_by_verifier, states.extra["finish_by_verifier"]))
        return found


def _answers(
    pair: Pair, samples: Sequence[Sample], max_new_tokens: int, batch_size: int, known: Sequence[Continuation] | None
) -> Sequence[Continuation]:
    return pair.verifier.generate(samples, max_new_tokens, batch_size=batch_size) if known is None else known


def _within(answer: Continuation, vocabulary: int) -> Continuation:
    foreign = (answer.ids >= vocabulary).nonzero()
    if not len(foreign):
        return answer
    end = int(foreign[0]) + 1
    return Continuation(answer.ids[:end], answer.hidden[:end], "length")


def _paired(pair: Pair, sample: Sample, mode: Mode, hidden: Tensor, ids: Tensor, verifier: Continuation, **extra: Any) -> PairedStates:
    return PairedStates(
        sample.sequence,
        sample.clip,
        sample.question,
        hidden,
        verifier.hidden,
        ids,
        verifier.ids,
        mode,
        "post_norm",
        pair.drafter.text(ids),
        pair.verifier.text(verifier.ids),
        sample.split or "",
        {"finish_by_verifier": verifier.finish, "source": sample.source, "t_us": sample.t_us, **extra},
    )
