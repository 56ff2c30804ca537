"""What decoding remembers along an answer: the states of every position, and the drafter's cache.

The drafter's cache (:class:`DrafterTrack`) holds the prompt and the tokens the drafter was given;
its own drafts are among them until the verifier has spoken. With m tokens verified and gamma = 3:

    [prompt | 0 .. m-1]            state m drafts token x; the cache holds what is known
    [prompt | 0 .. m-1 | x]        state m+1 drafts y
    [prompt | 0 .. m-1 | x y]      state m+2 drafts z; z is never fed: nobody would read its state
    observe: x accepted, y refused for b
    [prompt | 0 .. m-1 | x]        rollback to the common prefix of the cache and what is known ...
    [prompt | 0 .. m-1 | x b]      ... then one extend with what is missing (after full acceptance
                                   z and the bonus)

The rollback and the extend happen at the next ``propose``, so that the last round of a request does
not pay for a round that never comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xsd.core import DecoderHandle
from xsd.decode.overlap import Timeline


class History:
    """States of positions 0…n-1 in one growing buffer, so that a step reads a view and copies
    nothing."""
    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.length = 0

    def append(self, rows: Tensor) -> None:
        """rows: [k, D]."""
        end = self.length + rows.shape[0]
        if self._buffer is None or end > self._buffer.shape[0]:
            grown = rows.new_empty(max(64, 2 * end), rows.shape[1])
            if self._buffer is not None:
                grown[:self.length] = self._buffer[:self.length]
            self._buffer = grown
        self._buffer[self.length:end] = rows
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget positions >= length."""
        self.length = min(self.length, length)

    def replace(self, length: int, rows: Tensor) -> None:
        """Positions from ``length`` on are now these rows [k, D]."""
        self.truncate(length)
        self.append(rows)

    def rows(self) -> Tensor | None:
        """[n, D], a view; None before the first append."""
        return None if self._buffer is None else self._buffer[:self.length]


class DrafterTrack:
    """The drafter's cache along the answer, with the state of every position; two proposers of one
    request may share it."""
    def __init__(self, drafter: DecoderHandle) -> None:
        self.drafter = drafter

    def begin(self, sample: Any, timeline: Timeline | None = None) -> None:
        """Prefill the prompt: ``cached`` is empty, ``history`` holds the state that predicts token
        0."""
        self._timeline = timeline or Timeline()
        self.cached: list[int] = []
        self.history = History()
        with self._timeline.span("drafter", "prefill"):
            self.state = self.drafter.prefill(sample)
            self.prompt_length = self.state.length
            self.logits = self.state.logits
            self.history.append(self.state.hidden[None])

    def follow(self, known: Sequence[int]) -> None:
        """Make the cache hold exactly prompt + known: roll back to the common prefix, extend with
        the rest."""
        differ = (i for i, (mine, own) in enumerate(zip(self.cached, known, strict=False))
                  if mine != own)
        same = next(differ, min(len(self.cached), len(known)))
        missing = list(known[same:])
        if same == len(self.cached) and not missing:
            return
        with self._timeline.span("drafter", "draft"):
            if same < len(self.cached):
                self.drafter.rollback(self.state, self.prompt_length + same)
                self.history.truncate(same + 1)
                self.cached = self.cached[:same]
            if missing:
                # The verifier may say ids that the drafter has no embedding for (padding of a wider
                # vocabulary): it reads id 0 there.
                readable = [token if token < self.drafter.vocab_size else 0 for token in missing]
                hidden, logits = self.drafter.extend(
                    self.state, torch.tensor(readable, device=self.logits.device))
                self.history.append(hidden)
                self.logits = logits[-1]
                self.cached += missing
            else:
                self.logits = self.drafter.lm_head(self.states()[-1:])[0]

    def states(self) -> Tensor:
        """[len(cached) + 1, D_d]; the last row predicts the next token."""
        return self.history.rows()
