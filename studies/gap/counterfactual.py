"""What the drafter is shown in place of the clip's own events, along the same answers: is it the
sensor? (docs/metrics.md, section 7) Only the drafter runs again, once for each arm."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from xsd.core import Batch, ParameterError
from xsd.evaluate.held_out import HeldOut
from xsd.models import loading
from xsd.models.batched import Continuation
from xsd.models.handle import ModelHandle
from xsd.runs import folder
from xsd.steps import extraction

REAL = "real events"
AGAIN = "real events again"
"""The stored states, and the same extracted anew: the A/A pair of the comparison."""


@dataclasses.dataclass(frozen=True)
class Shown(HeldOut):
    """A held-out set whose drafter saw something else. forced: its states and tokens after the
    verifier's, sample by sample."""

    forced: Sequence[Continuation] = ()

    def batches(self, batch_size: int,
                contexts: Mapping[str, Sequence[int]] | None = None) -> Iterator[Batch]:
        """The stored pairs with the drafter's side replaced. Raises: ParameterError where a block
        drafter reads the drafter's contexts, which are stored for the real events alone."""
        if "drafter" in (contexts or {}):
            raise ParameterError("D2 and D5F read the drafter's contexts, which are stored for the "
                                 "real events alone; leave them out of levels, or drafter_sees "
                                 "empty")
        for batch in super().batches(batch_size, contexts):
            states, ids = torch.zeros_like(batch.drafter), torch.zeros_like(batch.ids_by_drafter)
            lengths = batch.mask.sum(dim=1).tolist()
            for row, (place, length) in enumerate(zip(batch.index, lengths, strict=True)):
                states[row, :length] = self.forced[place].hidden[:length].to(states.dtype)
                ids[row, :length] = self.forced[place].ids[:length]
            yield dataclasses.replace(batch, drafter=states, ids_by_drafter=ids)


def arms(run_dir: str | Path, pairs: HeldOut, drafter_sees: Sequence[str], *,
         batch_size: int = 32) -> dict[str, HeldOut]:
    """The arms by name: the stored pairs, the same again, and those of ``drafter_sees``; the stored
    pairs alone where that is empty, or nobody knows the drafter (imported chunks), which is said.
    Raises: ParameterError as drafter_of and donors."""
    out, known = {REAL: pairs}, extraction.known(pairs.dataset)
    if drafter_sees and not known:
        warnings.warn(f"nobody knows the drafter of {pairs.name}, so what it is shown stays as it "
                      "was: drafter_sees is left out", stacklevel=2)
    elif drafter_sees:
        names = (AGAIN, *drafter_sees)
        forced = force(drafter_of(run_dir, pairs), pairs, names, batch_size)
        about = {field.name: getattr(pairs, field.name) for field in dataclasses.fields(HeldOut)}
        about["texts"] = None  # their words are the stored pairs'
        out |= {name: Shown(**about, forced=forced[name]) for name in names}
    return out


def drafter_of(run_dir: str | Path, pairs: HeldOut | None = None) -> ModelHandle:
    """The drafter that a run, or these pairs of elsewhere, were extracted with. Raises:
    ParameterError when its weights are others now, or nobody knows it (imported chunks)."""
    about = (extraction.known(pairs.dataset) if pairs else {}) or extraction.pair_file(run_dir)
    name = about["pair"]
    _, info = loading.pair_folder(name if name == "embedded" else folder.resolve(name))
    drafter = loading.load_drafter(info["drafter"], vision_tower=info.get("vision_tower"),
                                   **about.get("loads", {}))
    if pairs is None or pairs.dataset.folder.is_relative_to(folder.resolve(run_dir)):
        before = folder.load_results(run_dir).get("extract", {}).get("weights", {}).get("drafter")
    else:
        before = pairs.dataset.manifest["config"]["drafter"]["weights"]
    if before and before != drafter.weights_hash():
        raise ParameterError(
            f"the run {run_dir} was extracted with another drafter than its pair {name!r} holds "
            "now; extract again into another run_dir, or leave drafter_sees empty")
    return drafter


def force(drafter: ModelHandle, pairs: HeldOut, names: Sequence[str],
          batch_size: int) -> dict[str, list[Continuation]]:
    """The drafter's states along the answers in every arm; pictures are read once for all. Blank
    events are white, as an empty slice is painted."""
    out: dict[str, list[Continuation]] = {name: [] for name in names}
    blind = without_pictures(drafter)
    others = donors(pairs.scenes) if "other scene" in names else []
    for start in range(0, len(pairs), batch_size):
        places = range(start, min(start + batch_size, len(pairs)))
        samples = [pairs.load(i) for i in places]
        answers = [torch.tensor(pairs.answers[i]) for i in places]
        own = [one.event_frames for one in samples]
        for name in names:
            frames = own
            if name == "other scene":
                frames = [pairs.load(others[i]).event_frames for i in places]
            elif name == "blank events":
                frames = [[np.full_like(frame, 255) for frame in one] for one in own]
            seen = [dataclasses.replace(sample, event_frames=shown)
                    for sample, shown in zip(samples, frames, strict=True)]
            handle = blind if name == "text only" else drafter
            out[name] += handle.force(seen, answers, batch_size=batch_size)
    return out


def without_pictures(drafter: ModelHandle) -> ModelHandle:
    """The same model, sharing its weights, whose prompts hold no visual token."""
    blind = copy.copy(drafter)
    none = torch.zeros(0, drafter.hidden_size, device=drafter.device)
    blind.visual_tokens = lambda sample, *, reuse=True: none  # type: ignore[method-assign]
    return blind


def donors(clusters: Sequence[str]) -> list[int]:
    """For each sample the place of one from the next cluster (the first after the last), as far
    into it as this one is into its own. Raises: ParameterError when there is one cluster only.

    >>> donors(["a", "a", "b"])
    [2, 2, 0]
    """
    members: dict[str, list[int]] = {}
    turns = []
    for place, name in enumerate(clusters):
        turns.append(len(members.setdefault(name, [])))
        members[name].append(place)
    if len(members) < 2:
        raise ParameterError("another scene's events need two scenes, but the held-out set is of "
                             f"{clusters[0]!r} alone; leave that arm out")
    following = dict(zip(members, [*members][1:] + [*members][:1], strict=True))
    others = [members[following[name]] for name in clusters]
    return [other[turn % len(other)] for turn, other in zip(turns, others, strict=True)]
