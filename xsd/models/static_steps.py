"""Decode steps over keys and values that stay where they are: transformers' own decoder over its
StaticCache, so that a pass of n rows is the same work every time, and on CUDA one captured graph
(docs/decoding.md)."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from xsd.core import ParameterError
from xsd.models import batched, small_steps

ROWS = (1, 2, 4, 6, 8, 16, 32, 64)
"""Widths of a pass: fewer rows are filled up to the next, as a row more costs next to nothing."""
_ROOM = 256
"""Positions for an answer at first; also what the size of a room is a multiple of."""
_ROOMS = 2
"""Sequences whose keys and values stay in place; of more, the longest unused one is set aside."""


def kind_for(decoder: nn.Module, steps: str) -> str:
    """The kind of steps of a decoder for which ``steps`` are asked: "plain" (transformers' own),
    "small" (models.small_steps), "static" (here), or "auto": small where they fit, static where
    CUDA may capture them, else plain. Raises: ParameterError for what there is not or does not fit.
    """
    why = {"plain": "", "static": why_not(decoder), "small": "" if small_steps.fits(decoder) else
           "it is no small Llama in float32 or bfloat16 on the CPU"}
    if steps == "auto":
        capturable = not why["static"] and not why_not_captured(decoder)
        return "small" if not why["small"] else "static" if capturable else "plain"
    if steps not in why or why[steps]:
        raise ParameterError(f"steps={steps!r} do not fit this decoder: "
                             f"{why.get(steps, 'there are auto, plain, small and static')}; "
                             "give 'auto'")
    return steps


def why_not(decoder: nn.Module) -> str:
    """Why a decoder cannot take these steps, or nothing."""
    if decoder.config._attn_implementation != "sdpa":
        return f"its attention is {decoder.config._attn_implementation!r}, not sdpa"
    kinds = {type(layer).__name__ for layer in StaticCache(decoder.config, 1).layers}
    return "" if kinds == {"StaticLayer"} else f"its cache has layers of {', '.join(sorted(kinds))}"


def why_not_captured(decoder: nn.Module) -> str:
    """Why CUDA cannot capture a decoder's passes, as far as is known beforehand, or nothing."""
    if next(decoder.parameters()).device.type != "cuda":
        return "there are graphs on CUDA only"
    if any(getattr(getattr(one, "state", None), "threshold", 0) for one in decoder.modules()):
        return "8-bit layers look for outliers on the processor in every pass"
    return ""


class Held:
    """Keys and values of one sequence of ``length`` positions: in a room of the steps, or set
    aside while others use it."""
    def __init__(self, length: int, aside: list[tuple[Tensor, Tensor]]) -> None:
        self.length, self.aside = length, aside
        self.room: _Room | None = None

    def get_seq_length(self) -> int:
        """Cached positions (transformers' name)."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; a negative count, as transformers' caches take it."""
        self.length += tokens_to_remove

    def move(self, rows: Tensor, start: int) -> None:
        """Positions ``rows`` [k] come to stand at start … start + k - 1."""
        both = self.aside if self.room is None else self.room.both
        both[..., start:start + len(rows), :] = both[..., rows, :]


class Steps:
    """Passes over a decoder that may take them (:func:`why_not`). A graph per width is captured
    once and serves every request."""
    def __init__(self, decoder: nn.Module) -> None:
        self._decoder, self._weights = decoder, _addresses(decoder)
        self._rooms: list[_Room] = []
        self._size = 0
        self.uncaptured = why_not_captured(decoder)
        """Why the passes are not captured, or nothing."""
        self._stream = self._pool = None
        if not self.uncaptured:  # a stream of its own: cuBLAS has one workspace for each
            self._stream = torch.cuda.Stream(next(decoder.parameters()).device)
            self._pool = torch.cuda.graph_pool_handle()

    def current(self) -> bool:
        """False once a weight of the model is another tensor; changes in place are seen anyway."""
        return self._weights == _addresses(self._decoder)

    def take(self, prompt: DynamicCache) -> Held:
        """What a prefill of one sequence left, in a room."""
        held = Held(prompt.get_seq_length(), prompt)
        self._enter(held, held.length + _ROOM)
        return held

    def __call__(self, embeds: Tensor, held: Held, parents: Sequence[int] | None = None,
                 record: dict[int, Tensor] | None = None) -> Tensor:
        """Append embeds [n, D] to the cache; returns post-norm states [n, D]. parents: as
        small_steps.tree_rows takes them. record: filled with what enters the layers it names."""
        n, layers = len(embeds), tuple(record or ())
        width = next((rows for rows in ROWS if rows >= n), n)
        self._enter(held, held.length + width)
        # not in the drafter's lane: nothing may wait for the whole device during a capture
        if width in ROWS and threading.current_thread() is threading.main_thread():
            for rows in ROWS[:ROWS.index(width) + 1]:  # shorter rounds end every answer
                self._capture(held.room.pass_of(rows, layers), held.length)
        one = held.room.pass_of(width, layers)
        hidden = one(embeds, held.length, parents)[:n]
        if record is not None:
            record |= {layer: states[0, :n].clone()
                       for layer, states in zip(layers, one.entered, strict=True)}
        held.length += n
        return hidden

    def _enter(self, held: Held, length: int) -> None:
        """Bring a sequence into a room of at least ``length`` positions."""
        if held.room is not None and length <= self._size:
            return
        if length > self._size:  # every room grows: their graphs are of no use any more
            for room in self._rooms:
                room.set_aside()
            self._rooms.clear()
            self._size = -(-length // _ROOM) * _ROOM
        room = next((room for room in self._rooms if room.owner() is None), None)
        if room is None and len(self._rooms) < _ROOMS:
            like = held.aside if isinstance(held.aside, Tensor) else held.aside.layers[0].keys
            room = _Room(self._decoder, self._size, like.reshape(-1, *like.shape[-3:]))
        elif room is None:
            room = self._rooms[0]
            room.set_aside()
        self._rooms = [*(one for one in self._rooms if one is not room), room]  # the latest last
        room.fill(held)

    def _capture(self, one: _Pass, length: int) -> None:
        if self.uncaptured or one.graph is not None:
            return
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):  # which a failure would lose
                one.capture(length, self._stream, self._pool)
        except RuntimeError as error:  # out of memory is one, too
            self.uncaptured = str(error).partition("\n")[0][:200]
            warnings.warn(
                "the passes of this model cannot be captured in CUDA graphs "
                f"({self.uncaptured}); they run one kernel at a time, as before, and "
                "slower", stacklevel=2)


class _Room:
    """Buffers for one sequence, and the passes over them by width."""
    @torch.inference_mode(False)  # else nobody could write into them outside of it
    def __init__(self, decoder: nn.Module, size: int, like: Tensor) -> None:
        self.decoder = decoder
        self.cache = StaticCache(decoder.config, max_cache_len=size)
        self.both = like.new_zeros(2, len(self.cache.layers), 1, like.shape[1], size, like.shape[3])
        for layer, keys, values in zip(self.cache.layers, *self.both, strict=True):
            layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values = keys, values  # views: what is done to all is done at once
        self.columns = torch.arange(size, device=like.device)
        self.owner: Any = lambda: None
        self._passes: dict[tuple[int, tuple[int, ...]], _Pass] = {}

    def fill(self, held: Held) -> None:
        """Move a sequence in. What lies behind it is cleared: what a mask hides counts nothing,
        unless it is NaN."""
        end = held.length
        if isinstance(held.aside, Tensor):
            self.both[..., :end, :] = held.aside[..., :end, :]
        else:
            for index, layer in enumerate(held.aside.layers):
                self.both[0, index, :, :, :end] = layer.keys
                self.both[1, index, :, :, :end] = layer.values
        self.both[1, ..., end:, :] = 0
        held.aside, held.room, self.owner = None, self, weakref.ref(held)

    def set_aside(self) -> None:
        """Move the sequence out, if anyone still holds it."""
        held = self.owner()
        if held is not None:
            held.aside, held.room = self.both[..., :held.length, :].clone(), None
        self.owner = lambda: None

    def pass_of(self, rows: int, layers: tuple[int, ...] = ()) -> _Pass:
        """The pass of so many rows that records what enters ``layers``; one for each of ``ROWS`` is
        kept."""
        found = self._passes.get((rows, layers)) or _Pass(self, rows, layers)
        if rows in ROWS:
            self._passes[rows, layers] = found
        return found


class _Pass:
    """``rows`` rows through the decoder. What it reads stands in tensors of its own, the number of
    cached positions among them: a captured pass sees every change of them, and nothing else."""
    @torch.inference_mode(False)
    def __init__(self, room: _Room, rows: int, layers: tuple[int, ...] = ()) -> None:
        self.layers, self.entered = layers, ()
        weight = room.decoder.norm.weight
        self._room, self.rows = weakref.ref(room), rows
        self._embeds = weight.new_zeros(1, rows, weight.shape[0])
        self._length = torch.zeros((), dtype=torch.long, device=weight.device)
        self._chain = [
            one.to(weight.device) for one in small_steps.tree_rows(range(-1, rows - 1), 0)
        ]
        self._places, self._seen = (one.clone() for one in self._chain)
        self._is_chain = True
        self.graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None

    def __call__(self, embeds: Tensor, length: int, parents: Sequence[int] | None) -> Tensor:
        """Embeds [n ≤ rows, D] behind ``length`` positions to states [rows, D]."""
        self._length.fill_(length)
        self._embeds[0, :len(embeds)] = embeds
        self._embeds[0, len(embeds):] = 0
        if parents is not None:  # a row too many hangs on the one before it: nobody sees it
            form = small_steps.tree_rows([*parents, *range(len(parents) - 1, self.rows - 1)], 0)
        if parents is not None or not self._is_chain:
            for own, given in zip((self._places, self._seen), form if parents else self._chain,
                                  strict=True):
                own.copy_(given)
        self._is_chain = parents is None
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        return self._hidden.clone()

    def _forward(self) -> Tensor:
        room = self._room()
        for layer in room.cache.layers:
            layer.cumulative_length.copy_(self._length)
        behind = room.columns - self._length
        seen = self._seen[:, behind.clamp(0, self.rows - 1)] & (behind < self.rows) | (behind < 0)
        with batched.recorded(room.decoder, self.layers) as states:
            output = room.decoder(inputs_embeds=self._embeds, past_key_values=room.cache,
                                  use_cache=True, position_ids=(self._length + self._places)[None],
                                  attention_mask=seen[None, None])
        self.entered = tuple(states)
        return output.last_hidden_state[0]

    @torch.no_grad()
    def capture(self, length: int, stream: Any, pool: Any) -> None:
        """Record the pass as a CUDA graph; the rows behind ``length`` are written, none else."""
        self._length.fill_(length)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries set themselves up, which a graph may not hold
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._hidden = self._forward()
        self.graph = graph


def _addresses(decoder: nn.Module) -> list[tuple[int, ...]]:
    """Where the weights stand; torchao's packed ones say no address."""
    return [(id(weight), weight.data_ptr()) if type(weight.data) is Tensor else (id(weight),)
            for weight in decoder.parameters()]
