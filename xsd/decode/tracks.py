"""What decoding remembers along an answer: the states of every position, and the drafter's cache
(docs/decoding.md draws it), which catches up no sooner than at the next ``propose``."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xsd.core import DecoderHandle
from xsd.decode.overlap import Timeline


def n_common(one: Sequence[int | None], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


class History:
    """States of positions 0…n-1 in one growing buffer: a step reads a view and copies nothing.
    place: the device of the buffer, where it is another than that of the first rows."""
    def __init__(self, place: torch.device | None = None) -> None:
        self._place = place
        self._buffer: Tensor | None = None
        self.length = 0

    def replace(self, length: int, rows: Tensor) -> None:
        """Positions from ``length`` (at most the present one) on are now these rows [k, D]."""
        end = length + rows.shape[0]
        if self._buffer is None or end > self._buffer.shape[0]:
            grown = rows.new_empty(max(64, 2 * end), rows.shape[1], device=self._place)
            if self._buffer is not None:
                grown[:length] = self._buffer[:length]
            self._buffer = grown
        self._buffer[length:end] = rows
        self.length = end

    def rows(self) -> Tensor | None:
        """[n, D], a view; None before the first append."""
        return None if self._buffer is None else self._buffer[:self.length]


class DrafterTrack:
    """The drafter's cache along the answer; two proposers of one request may share it. layers: of
    the drafter, recorded for who reads them."""

    layers: Sequence[int] = ()

    def __init__(self, drafter: DecoderHandle) -> None:
        self.drafter = drafter
        self._timeline: Timeline | None = None

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        """Prefill, once for a request's timeline: ``history`` predicts token 0."""
        if timeline is not None and timeline is self._timeline:
            return  # the request's other proposer has done it
        self._timeline = timeline or Timeline()
        self.state = None  # its keys and values make room for the new ones
        self.cached: list[int] = []
        self.history = History()
        with self._timeline.span("drafter", "prefill"):
            recorded = {"layers": self.layers} if self.layers else {}
            self.state = self.drafter.prefill(sample, **recorded)
            self.prompt_length = self.state.length
            self.logits = self.state.logits
            self.history.replace(0, self.state.hidden[None])

    def has_room(self, n: int) -> bool:
        """Whether the drafter has positions for ``n`` tokens of the answer."""
        return self.prompt_length + n <= getattr(self.drafter, "max_positions", sys.maxsize)

    def follow(self, known: Sequence[int]) -> None:
        """Make the cache hold prompt + known: roll back to what is common, extend with the rest."""
        same = n_common(self.cached, known)
        missing = list(known[same:])
        if same == len(self.cached) and not missing:
            return
        with self._timeline.span("drafter", "draft"):
            if same < len(self.cached):
                self.drafter.rollback(self.state, self.prompt_length + same)
                self.history.length = same + 1
                self.cached = self.cached[:same]
            if missing:
                # The verifier may say ids that the drafter has no embedding for (padding of a wider
                # vocabulary): it reads id 0 there.
                readable = [token if token < self.drafter.vocab_size else 0 for token in missing]
                hidden, logits = self.drafter.extend(
                    self.state, torch.tensor(readable, device=self.logits.device))
                self.history.replace(same + 1, hidden)
                self.logits = logits[-1]
                self.cached += missing
            else:
                self.logits = self.drafter.lm_head(self.states()[-1:])[0]

    def states(self) -> Tensor:
        """[len(cached) + 1, D_d]; the last row predicts the next token."""
        return self.history.rows()
