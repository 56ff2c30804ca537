"""What the drafter is shown in place of the clip's own events, along the same answers: is it the
sensor? (docs/metrics.md, section 7)

    blank events    five pictures without an event (white, as an empty slice is painted)
    other scene     the events of another sequence, in a fixed turn
    text only       no picture at all: the prompt's visual tokens are left out

The verifier's answers are those of the run, so every arm is asked about the same tokens; only the
drafter runs again, once an arm.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from xsd.core import Batch, ParameterError, Sample
from xsd.models import loading
from xsd.models.batched import Forced
from xsd.models.handle import ModelHandle
from xsd.runs import folder, parameters
from xsd.steps import extraction, held_out
from xsd.steps.evaluation import HeldOut

REAL = "real events"
AGAIN = "real events again"
"""The stored states, and the same extracted anew: the A/A pair of the comparison."""


@dataclasses.dataclass(frozen=True)
class Shown(HeldOut):
    """A held-out set whose drafter saw something else. forced: its states and tokens after the
    verifier's, one a sample."""

    forced: Sequence[Forced] = ()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The stored pairs with the drafter's side replaced."""
        for batch in super().batches(batch_size):
            states, ids = torch.zeros_like(batch.drafter), torch.zeros_like(batch.ids_by_drafter)
            for row, (place, length) in enumerate(
                    zip(batch.index,
                        batch.mask.sum(dim=1).tolist(), strict=True)):
                states[row, :length] = self.forced[place].hidden[:length].to(states.dtype)
                ids[row, :length] = self.forced[place].top_ids[:length]
            yield dataclasses.replace(batch, drafter=states, ids_by_drafter=ids)


def shown(given: parameters.TruthParameters, data: str, own: HeldOut) -> dict[str, HeldOut]:
    """The arms by name: the stored pairs, the same again, and those of ``given.drafter_sees``.

    Raises: ParameterError when the run was extracted with other weights than its pair has now, or
    another scene is asked for and the set
    has one only.
    """
    pair = loading.load_pair(extraction.pair_file(given.run_dir)["pair"])
    before = folder.load_results(given.run_dir).get("extract", {}).get("weights", {}).get("drafter")
    if before and before != pair.drafter.weights_hash():
        raise ParameterError(
            f"the run {given.run_dir} was extracted with another drafter than its pair "
            f"{pair.name!r} holds now; extract again into "
            "another run_dir, or leave drafter_sees empty")
    samples = held_out.read(given.run_dir, data, n_event_frames=pair.n_event_frames)
    answers = [states.ids_by_verifier for states in own.dataset]
    arms: dict[str, HeldOut] = {REAL: own}
    for name in (AGAIN, *given.drafter_sees):
        forced = force(pair.drafter, name, samples, answers, own.clusters, given.batch_size)
        about = {field.name: getattr(own, field.name) for field in dataclasses.fields(HeldOut)}
        arms[name] = Shown(**about, forced=forced)
    return arms


def force(drafter: ModelHandle, arm: str, samples: Sequence[held_out.HeldOut],
          answers: Sequence[Tensor], clusters: Sequence[str], batch_size: int,
          ) -> list[Forced]:
    """The drafter's states along the answers, shown what ``arm`` says. Pictures are read a batch at
    a time."""
    if arm == "text only":
        drafter = without_pictures(drafter)
    others = donors(clusters) if arm == "other scene" else list(range(len(samples)))
    out = []
    for start in range(0, len(samples), batch_size):
        places = range(start, min(start + batch_size, len(samples)))
        seen = [
            dataclasses.replace(samples[i].load(),
                                event_frames=_frames(arm, samples[others[i]].load()))
            for i in places
        ]
        out += drafter.force(seen, [answers[i] for i in places], batch_size=batch_size)
    return out


def _frames(arm: str, sample: Sample) -> Sequence[np.ndarray]:
    if arm == "blank events":
        return [np.full_like(frame, 255) for frame in sample.event_frames]
    return sample.event_frames


def without_pictures(drafter: ModelHandle) -> ModelHandle:
    """The same model, sharing its weights, whose prompts hold no visual token."""
    blind = copy.copy(drafter)
    none = torch.zeros(0, drafter.hidden_size, device=drafter.device)
    blind.visual_tokens = lambda sample, *, reuse=True: none  # type: ignore[method-assign]
    return blind


def donors(clusters: Sequence[str]) -> list[int]:
    """For each sample the place of one from the next cluster (the first after the last), as far
    into it as this one is into its own.

    >>> donors(["a", "a", "b"])
    [2, 2, 0]

    Raises: ParameterError when there is one cluster only.
    """
    members: dict[str, list[int]] = {}
    for place, name in enumerate(clusters):
        members.setdefault(name, []).append(place)
    names = list(members)
    if len(names) < 2:
        raise ParameterError(
            f"another scene's events need two scenes, but the held-out set is of {names[0]!r} "
            "alone; leave that arm out"
        )
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    return [
        members[following[name]][members[name].index(place) % len(members[following[name]])]
        for place, name in enumerate(clusters)
    ]
