"""Hidden states of several layers of a decoder, numbered as in transformers' ``hidden_states`` from
either end of its L layers: 0 … L-1 or -(L+1) … -2 enter a layer (the residual stream, to which the
LM head does not apply), -1 is after the final norm."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from xsd.core import ParameterError

LAST = -1


def place(decoder: nn.Module, layer: int) -> int:
    """The decoder layer that ``layer`` enters. Raises: ParameterError for -1, which enters none,
    and outside the stack."""
    depth = len(decoder.layers)
    if layer == LAST or not -depth - 1 <= layer < depth:
        raise ParameterError(
            f"there is no hidden layer {layer} in a decoder of {depth} layers: give -1 (after the "
            f"final norm), or -{depth + 1} … -2 or 0 … {depth - 1} (the state that enters a layer)")
    return layer % (depth + 1)


@contextlib.contextmanager
def recorded(decoder: nn.Module, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """While open, the list holds the states [B, S, D] of the decoder's latest call in the layers
    given (not -1, which the decoder returns). Raises: as :func:`place`."""
    states: list[Any] = [None] * len(layers)

    def keep(index: int, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states[index] = given[0] if given else named["hidden_states"]

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            entered = decoder.layers[place(decoder, layer)]
            stack.callback(entered.register_forward_pre_hook(
                functools.partial(keep, index), with_kwargs=True).remove)
        yield states
