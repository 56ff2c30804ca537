"""Drafting a block in one pass (docs/decoding.md, "Blocks"): the context's keys and values grow by
what is verified alone, so a rejection takes nothing back."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xsd.core import ParameterError
from xsd.decode.acceptance import greedy
from xsd.decode.overlap import Stop, Timeline
from xsd.decode.proposers import never
from xsd.decode.tracks import DrafterTrack
from xsd.decode.trees import Children, by_position


class BlockProposer:
    """adapter: a block drafter (adapters/block.py). track: the drafter's, for one that reads it.
    lm_head: [..., D_v] → [..., V]; of a draft vocabulary its k logits alone. min_probability: the
    block is cut before its first less likely draft."""

    role = "block drafter"
    min_probability = 0.0
    steps = False  # a block costs the same whatever is asked of it

    def __init__(self, track: DrafterTrack | None, adapter: Any,
                 lm_head: Callable[[Tensor], Tensor], draft_vocab_size: int,
                 eos_token_ids: frozenset[int] = frozenset()) -> None:
        """Raises: ParameterError for one that reads the drafter and has no track."""
        self.roles = tuple(adapter.context_layers)
        if "drafter" in self.roles and track is None:
            raise ParameterError(f"{adapter.level} reads the drafter's states; pass its "
                                 "DrafterTrack")
        self.track = track if "drafter" in self.roles else None
        if self.track is not None:
            self.track.layers = adapter.context_layers["drafter"]
        self.adapter, self.lm_head = adapter, lm_head
        self.draft_vocab_size, self.eos_token_ids = draft_vocab_size, eos_token_ids
        self.context_layers = adapter.context_layers.get("verifier", ())
        self.needs_verifier = True

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        """A new request: the drafter, where it is read, prefills with its layers recorded."""
        self.known: list[int] = []
        self._block: Children | None = None
        self.timeline = timeline or Timeline()
        self.kept, self.read = self.adapter.keep(), dict.fromkeys(self.roles, 0)
        if self.track is not None:
            self.track.begin(sample, timeline)

    def read_context(self, context: Any, length: int) -> None:
        """The verifier's recorded states of its first ``length`` positions, all verified."""
        self.context, self.length = context, length

    def observe(self, tokens: Sequence[int], hidden: Tensor) -> None:
        self.known += tokens
        self._block = None

    def propose(self, gamma: int, stop: Stop = never) -> list[int]:
        logits = self.logits(gamma)
        drafts = greedy(logits, self)
        if self.min_probability > 0:
            sure = logits.softmax(-1).amax(-1) >= self.min_probability
            drafts = drafts[:int(sure.int().cumprod(0).sum())]
        ids = self.adapter.draft_ids
        drafts = drafts if ids is None else ids[drafts].tolist()
        end = (i + 1 for i, token in enumerate(drafts) if token in self.eos_token_ids)
        return drafts[:next(end, len(drafts))]

    def children(self, path: Sequence[int], k: int) -> list[tuple[int, float]]:
        """The likeliest ids of the path's next place, whatever stands before it."""
        if self._block is None:
            logits = self.logits(sys.maxsize)
            greedy(logits, self)  # refuses what is no number
            logs, ids = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))
            if self.adapter.draft_ids is not None:
                ids = self.adapter.draft_ids[ids]
            self._block = by_position(ids.tolist(), logs.tolist())
        return list(self._block(tuple(path)))

    def logits(self, gamma: int) -> Tensor:
        """Of the block's first ``gamma`` places [n ≤ gamma, V], over what may be drafted: what a
        tree takes its best ids from. Raises: ParameterError before anything is verified."""
        if not self.known:
            raise ParameterError("a block is drafted after a verified token and none is known yet; "
                                 "in the prefill another proposer may draft (TwoPhase)")
        place = len(self.known) - 1
        if self.track is not None:
            self.track.follow(self.known)
        with self.timeline.span("adapter", "adapter"):
            if "verifier" in self.roles:
                self._read("verifier", self.context, self.length, place)
            if self.track is not None:
                state = self.track.state
                self._read("drafter", state.context, state.length, place + 1)
            states = self.adapter.step_block(self.kept, self.known[-1], place)
            logits = self.lm_head(states[:gamma])
        if self.adapter.draft_ids is None:
            return logits[:, :self.draft_vocab_size]
        return logits

    def _read(self, role: str, context: Any, length: int, end: int) -> None:
        """Add what is new of a context of ``length`` positions, the last of which is place ``end``
        - 1 of the answer."""
        before, self.read[role] = self.read[role], length
        if length > before:
            first = before - length + end
            self.adapter.read(self.kept, role, context.rows(before, length), first)
