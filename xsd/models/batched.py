"""Greedy answers and teacher-forced states of many samples, a batch at a time. ``hidden`` is after
the final norm, read at the position *before* its token: argmax(lm_head(hidden[t])) == ids[t]."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from xsd.core import ParameterError, Sample, not_finite

LAST = -1
"""The state after the final norm. Other layers are numbered as in transformers' ``hidden_states``:
0 … L-1 or -(L+1) … -2 enter one of L decoder layers, where the LM head does not apply."""


@dataclass(frozen=True)
class Continuation:
    """An answer of n tokens. ids: int64 [n], the model's own choices: its greedy answer up to and
    with the first EOS, or what it would have said before each forced token. hidden: [n, D]. layers:
    the same positions in other layers (``LAST``)."""

    ids: Tensor
    hidden: Tensor
    finish: Literal["eos", "length", "forced"]
    layers: Mapping[int, Tensor] = field(default_factory=dict)


class Context:
    """States that enter some layers, side by side, at every cached position, in a buffer that grows
    by doubling: what block drafters read. rows: [n, L · D] of the prompt."""

    def __init__(self, layers: Sequence[int], rows: Tensor) -> None:
        self.layers, self._buffer = [int(one) for one in layers], rows

    def put(self, start: int, rows: Tensor) -> None:
        """Positions from ``start`` on are these."""
        end = start + len(rows)
        if end > len(self._buffer):
            grown = rows.new_empty(2 * end, rows.shape[1])
            grown[:start] = self._buffer[:start]
            self._buffer = grown
        self._buffer[start:end] = rows

    def rows(self, start: int, end: int) -> Tensor:
        """[end - start, L · D] of these positions, a view."""
        return self._buffer[start:end]


class BatchedAnswers:
    """What a ModelHandle does with many samples; results on the CPU, in the order given."""

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int, *, batch_size: int = 16,
                 progress: Callable[[int], None] | None = None,
                 layers: Sequence[int] = ()) -> list[Continuation]:
        """Greedy answers, the same ids as one at a time; a batch's questions on one clip share its
        prefill. progress(n): n samples just finished. layers: others to keep (see ``LAST``)."""
        results: list[Continuation] = []
        for chunk in _chunks(samples, batch_size, progress):
            cache, tails = self._shared_prefill(chunk)
            results += self._generate_batch(tails, max_new_tokens, cache, layers)
        return results

    @torch.no_grad()
    def force(self, samples: Sequence[Sample], ids: Sequence[Tensor], *, batch_size: int = 16,
              progress: Callable[[int], None] | None = None,
              layers: Sequence[int] = ()) -> list[Continuation]:
        """States before each forced token, in one pass (padded on the right, where a causal decoder
        never looks); else as :meth:`generate`. Raises: ValueError for lists of other lengths."""
        if len(samples) != len(ids):
            raise ValueError(f"{len(samples)} samples but {len(ids)} answers to force; one answer "
                             "for each sample is expected")
        results: list[Continuation] = []
        for chunk in _chunks(samples, batch_size, progress):
            cache, tails = self._shared_prefill(chunk)
            rows = list(zip(tails, ids[len(results):len(results) + len(chunk)], strict=True))
            self.check_length(cache.get_seq_length() - 1 +
                              max(len(tail) + len(answer) for tail, answer in rows))
            lines = [torch.cat([tail, self._lookup(answer[:-1])]) for tail, answer in rows]
            embeds = pad_sequence(lines, batch_first=True)
            with recorded(self.decoder, layers) as others:
                states = self.decoder(inputs_embeds=embeds, past_key_values=cache,
                                      use_cache=True).last_hidden_state
            for row, (tail, answer) in enumerate(rows):
                cut = slice(len(tail) - 1, len(tail) - 1 + len(answer))
                hidden, *kept = (one[row, cut].clone().cpu() for one in (states, *others))
                top_ids = greedy(self.lm_head(states[row, cut]), self.role).cpu()
                results.append(Continuation(top_ids, hidden, "forced",
                                            dict(zip(layers, kept, strict=True))))
        return results

    @torch.no_grad()
    def contexts(self, samples: Sequence[Sample], ids: Sequence[Tensor],
                 layers: Sequence[int]) -> tuple[Tensor, list[Tensor], list[int]]:
        """What a block drafter reads of answers about *one* clip: states of ``layers`` side by
        side, [P, L · D] of what the prompts begin with (pictures included), of each sample [n_i, L
        · D] of the rest of its prompt and of its forced ids but the last; and each sample's number
        of prompt positions. Raises: ValueError for samples of several clips."""
        if len({content(self.images(sample)) for sample in samples}) != 1:
            raise ValueError("contexts are of one clip at a time")
        after = [self.prompt_ids(sample.question)[1] for sample in samples]
        prefix = self._join(self.prompt_ids(samples[0].question)[0], self.visual_tokens(samples[0]))
        lines = [self._lookup([*rest, *answer[:-1].tolist()])
                 for rest, answer in zip(after, ids, strict=True)]
        self.check_length(len(prefix) + max(map(len, lines)))
        cache = DynamicCache(config=self.decoder.config)
        with recorded(self.decoder, layers) as states:
            self.decoder(inputs_embeds=prefix[None], past_key_values=cache, use_cache=True)
            shared = torch.cat(list(states), dim=-1)[0].cpu()
            cache.batch_repeat_interleave(len(lines))
            self.decoder(inputs_embeds=pad_sequence(lines, batch_first=True),
                         past_key_values=cache, use_cache=True)
            own = torch.cat(list(states), dim=-1).cpu()
        return (shared, [row[:len(line)].clone() for row, line in zip(own, lines, strict=True)],
                [len(prefix) + len(rest) for rest in after])

    def _shared_prefill(self, samples: Sequence[Sample]) -> tuple[DynamicCache, list[Tensor]]:
        """A cache with each row's prompt up to its visual tokens and the rest of it [L_i, D]; or an
        empty one and whole prompts, where none share a clip or prompts differ in length."""
        cache = DynamicCache(config=self.decoder.config)
        contents = [content(self.images(sample)) for sample in samples]
        split = [self.prompt_ids(sample.question) for sample in samples]
        prefixes: dict[str, Tensor] = {}
        for sample, name, (before, _) in zip(samples, contents, split, strict=True):
            if name not in prefixes:
                prefixes[name] = self._join(before, self.visual_tokens(sample))
        lengths = {len(prefix) for prefix in prefixes.values()}
        self.check_length(max(lengths) + max(len(after) for _, after in split))
        if len(prefixes) == len(samples) or len(lengths) > 1:
            return cache, [self.prompt_embeddings(sample) for sample in samples]
        self.decoder(inputs_embeds=torch.stack(list(prefixes.values())), past_key_values=cache,
                     use_cache=True)
        clips = list(prefixes)
        cache.batch_select_indices(
            torch.tensor([clips.index(name) for name in contents], device=self.device))
        return cache, [self._lookup(after) for _, after in split]

    def _generate_batch(self, tails: list[Tensor], max_new_tokens: int, cache: DynamicCache,
                        layers: Sequence[int] = ()) -> list[Continuation]:
        embeds, positions, mask = _left_padded(tails, cache.get_seq_length())
        ids: list[list[int]] = [[] for _ in tails]
        states: list[list[Tensor]] = [[] for _ in tails]
        rows = list(range(len(tails)))  # the answer that each row of the batch belongs to
        cached = cache.get_seq_length()
        for step in range(max_new_tokens):
            self.check_length(cached + max(len(tails[row]) for row in rows) + step)
            with recorded(self.decoder, layers) as others:
                output = self.decoder(inputs_embeds=embeds, attention_mask=mask,
                                      position_ids=positions, past_key_values=cache, use_cache=True)
            hidden = output.last_hidden_state[:, -1]
            chosen = greedy(self.lm_head(hidden), self.role)
            tokens = chosen.tolist()
            others = [other[:, -1].to(hidden.device) for other in others]
            kept = torch.stack([hidden, *others], dim=1)  # [B, 1 + layers, D]
            for row, token, state in zip(rows, tokens, kept, strict=True):
                ids[row].append(token)
                states[row].append(state)
            going = [i for i, token in enumerate(tokens) if token not in self.eos_token_ids]
            if not going or step + 1 == max_new_tokens:
                break
            positions = positions[:, -1:] + 1
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if len(going) < len(rows):
                index = torch.tensor(going, device=self.device)
                cache.batch_select_indices(index)
                chosen, positions = chosen[index], positions[index]
                mask = None if mask is None else mask[index]
                rows = [rows[i] for i in going]
            embeds = self._embed(chosen)[:, None]
        found = []
        for answer, at in zip(ids, states, strict=True):
            hidden, *others = (one.contiguous() for one in torch.stack(at).cpu().unbind(1))
            finish = "eos" if answer[-1] in self.eos_token_ids else "length"
            found.append(Continuation(torch.tensor(answer, dtype=torch.long), hidden, finish,
                                      dict(zip(layers, others, strict=True))))
        return found


def greedy(logits: Tensor, role: str) -> Tensor:
    """The best id of each row of logits [n, V]. Raises: CheckpointError where they are no
    numbers."""
    best = logits.argmax(-1)  # of a row with NaN: the NaN
    if not bool(logits.gather(-1, best[:, None]).isfinite().all()):
        raise not_finite(role)
    return best


def _chunks(samples: Sequence[Sample], size: int,
            progress: Callable[[int], None] | None) -> Iterator[Sequence[Sample]]:
    """``size`` at a time; progress hears of a chunk when the next one is asked for."""
    for start in range(0, len(samples), size):
        chunk = samples[start:start + size]
        yield chunk
        if progress is not None:
            progress(len(chunk))


def _left_padded(tails: list[Tensor], cached: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings [B, L, D], positions [B, L] and mask [B, cached + L]; none for equal lengths."""
    lengths = torch.tensor([len(tail) for tail in tails], device=tails[0].device)
    longest = int(lengths.max())
    padding = (longest - lengths)[:, None]
    embeds = pad_sequence(tails, batch_first=True, padding_side="left")
    columns = torch.arange(longest, device=lengths.device)
    positions = cached + (columns - padding).clamp(min=0)
    if not padding.any():
        return embeds, positions, None
    real = (columns >= padding).long()
    return embeds, positions, torch.cat([real.new_ones(len(tails), cached), real], dim=1)


def content(images: Sequence[Any]) -> str:
    """A name for what images (uint8 arrays) show: the same pixels have the same name."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(f"{image.shape} {image.dtype}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def entering(decoder: Any, layers: Sequence[int], embeds: Tensor) -> dict[int, Tensor]:
    """For own steps to fill: what enters each of ``layers``, by its place; at first the stack's."""
    return dict.fromkeys((place(decoder, layer) for layer in layers), embeds)


def place(decoder: nn.Module, layer: int) -> int:
    """The decoder layer that ``layer`` enters. Raises: ParameterError for one that enters none."""
    depth = len(decoder.layers)
    if layer == LAST or not -depth - 1 <= layer < depth:
        raise ParameterError(
            f"there is no hidden layer {layer} in a decoder of {depth} layers: give -1 (after the "
            f"final norm), or -{depth + 1} … -2 or 0 … {depth - 1} (the state that enters a layer)")
    return layer % (depth + 1)


@contextlib.contextmanager
def recorded(decoder: nn.Module, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """The list holds, while open, the states [B, S, D] of the decoder's latest call by layer."""
    states: list[Any] = [None] * len(layers)

    def keep(index: int, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states[index] = given[0] if given else named["hidden_states"]

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            entered = decoder.layers[place(decoder, layer)]
            stack.callback(entered.register_forward_pre_hook(
                functools.partial(keep, index), with_kwargs=True).remove)
        yield states
