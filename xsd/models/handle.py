"""A model behind the decoder-handle protocol: prefill, extend, rollback, lm_head over a KV cache;
batched generate and force.

``hidden`` is always after the final norm and read at the position *before* its token:
argmax(lm_head(hidden[t])) == ids[t].

    prompt (L positions)            answer
    [ . . . . . . . . . p ]         [ a    b    c ]
                        hidden[0] predicts a; the position of a holds hidden[1], which predicts b
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from xsd.core import DatasetError, Sample, VideoError
from xsd.models import layers as layer_states
from xsd.models import prompts, small_steps
from xsd.models.pixels import PixelSpec

Role = Literal["drafter", "verifier"]


@dataclass
class DecoderState:
    """core.State. length: cached positions. hidden [D], logits [V]: what the last position said.
    cache: keys and values."""

    length: int
    hidden: Tensor
    logits: Tensor
    cache: DynamicCache | small_steps.GrowingCache


@dataclass(frozen=True)
class Continuation:
    """A greedy answer. ids: int64 [n], cut after the first EOS (EOS kept). hidden: [n, D],
    post-norm, hidden[t] predicts ids[t].

    layers: the same positions in other layers (models.layers), [n, D] each.
    """

    ids: Tensor
    hidden: Tensor
    finish: Literal["eos", "length"]
    layers: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Forced:
    """A teacher-forced answer. hidden: [n, D] before each forced token. top_ids: int64 [n], the
    model's own choice there.

    layers: the same positions in other layers (models.layers), [n, D] each.
    """

    hidden: Tensor
    top_ids: Tensor
    layers: Mapping[int, Tensor] = field(default_factory=dict)


class ModelHandle:
    """One loaded model (core.DecoderHandle). Build it with loading.load_drafter / load_verifier /
    load_pair.

    draft_vocab_size: ids below it exist in the text vocabulary; ids above are padding or added
    tokens and are never drafted.
    """
    def __init__(self, model: Any, tokenizer: Any, role: Role, pixels: PixelSpec, *,
                 draft_vocab_size: int, name: str = "", vision_entries: int = 64) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.role, self.pixels, self.name = tokenizer, role, pixels, name
        self.decoder = getattr(model.model, "language_model", model.model)
        text = model.config.get_text_config()
        self.hidden_size: int = text.hidden_size
        self.head = model.get_output_embeddings()
        self.vocab_size: int = self.head.weight.shape[0]
        self.draft_vocab_size = draft_vocab_size
        self.eos_token_ids = _eos(model, tokenizer)
        self.device = self.head.weight.device
        self._embed = model.get_input_embeddings()
        self._vision: OrderedDict[str, Tensor] = OrderedDict()
        self._vision_entries = vision_entries
        self._hash: str | None = None
        self._small_steps: small_steps.Steps | None = None
        self._steps_fit = small_steps.fits(self.decoder)

    # --- the prompt
    # --------------------------------------------------------------------------------------------

    def visual_tokens(self, sample: Sample, *, reuse: bool = True) -> Tensor:
        """[E, D] tokens of the sample's own sensor: F + P event tokens, or frames × P video tokens.

        With ``reuse`` they are remembered by the images' content, so that ten questions on a clip
        run the tower once.
        Raises: DatasetError without event frames, VideoError without video frames.
        """
        images = self._images(sample)
        if not reuse:
            return self._encode_images(images)
        key = _content(images)
        if key not in self._vision:
            self._vision[key] = self._encode_images(images)
            while len(self._vision) > self._vision_entries:
                self._vision.popitem(last=False)
        self._vision.move_to_end(key)
        return self._vision[key]

    def _images(self, sample: Sample) -> list[Any]:
        images = list(sample.event_frames if self.role == "drafter" else sample.video)
        if not images:
            error, what = (DatasetError,
                           "event frame") if self.role == "drafter" else (VideoError, "video frame")
            raise error(
                f"{sample.sequence}/{sample.clip} has no {what}; check the clip's files and read "
                "the dataset folder again"
            )
        return images

    @torch.no_grad()
    def _encode_images(self, images: Sequence[Any]) -> Tensor:
        pixels = self.pixels(images).to(self.device)
        if self.role == "drafter":
            return self.model.event_tokens(pixels)
        tower = getattr(self.model.model, "video_tower", None) or self.model.model.vision_tower
        features = self.model.model.get_video_features(pixels[None].to(tower.dtype),
                                                       return_dict=True).pooler_output
        if isinstance(features, (tuple, list)):
            features = torch.cat(list(features))
        return features.reshape(-1, self.hidden_size)

    def prompt_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before (BOS first) and after the visual tokens."""
        split = prompts.drafter_prompt_ids if self.role == "drafter" else prompts.verifier_prompt_ids
        return split(self.tokenizer, question)

    @torch.no_grad()
    def prompt_embeddings(self, sample: Sample, *, reuse_vision: bool = True) -> Tensor:
        """[L, D] input embeddings of the whole prompt; the drafter's is cut at its
        ``tokenizer_model_max_length``."""
        before, after = self.prompt_ids(sample.question)
        visual = self.visual_tokens(sample, reuse=reuse_vision)
        embeds = torch.cat(
            [self._lookup(before),
             visual.to(self._embed.weight.dtype),
             self._lookup(after)])
        return embeds[:getattr(self.model.config, "tokenizer_model_max_length", None)]

    def _lookup(self, ids: Sequence[int] | Tensor) -> Tensor:
        return self._embed(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    # --- core.DecoderHandle: a batch of one
    # ------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, sample: Sample, *, reuse_vision: bool = False) -> DecoderState:
        """Run the prompt. By default nothing is remembered from earlier calls, so its time is the
        request's real prefill."""
        embeds = self.prompt_embeddings(sample, reuse_vision=reuse_vision)
        cache = DynamicCache(config=self.decoder.config)
        output = self.decoder(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
        hidden = output.last_hidden_state[0, -1]
        logits = self.lm_head(hidden)
        if not self._steps_fit:
            return DecoderState(len(embeds), hidden, logits, cache)
        if self._small_steps is None or not self._small_steps.current():
            self._small_steps = small_steps.Steps(self.decoder)
        return DecoderState(len(embeds), hidden, logits, small_steps.GrowingCache(cache))

    @torch.no_grad()
    def extend(self, state: DecoderState, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Append ids int64 [n] (n ≥ 1) in place; hidden [n, D] and logits [n, V], row i predicting
        the token after ids[i]."""
        if isinstance(state.cache, small_steps.GrowingCache):
            hidden = self._small_steps(self._lookup(ids), state.cache)
        else:
            hidden = self.decoder(inputs_embeds=self._lookup(ids)[None],
                                  past_key_values=state.cache, use_cache=True).last_hidden_state[0]
        logits = self.lm_head(hidden)
        state.length += len(hidden)
        state.hidden, state.logits = hidden[-1], logits[-1]
        return hidden, logits

    def rollback(self, state: DecoderState, length: int) -> None:
        """Forget every position >= length, in place: ``[prompt | a b c] -> [prompt | a b]``.
        Raises: ValueError outside 0…state.length."""
        if not 0 <= length <= state.length:
            raise ValueError(
                f"cannot roll back to length {length}: the cache holds {state.length} positions")
        # DynamicCache.crop takes the number to remove as a negative count; crop(0) removes nothing.
        if length < state.length:
            state.cache.crop(length - state.length)
            state.length = length

    def lm_head(self, hidden: Tensor) -> Tensor:
        """[..., D] post-norm states to [..., V] logits, in the head's dtype."""
        return self.head(hidden.to(self.head.weight.device, self.head.weight.dtype))

    # --- many samples
    # --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int, *, batch_size: int = 16,
                 progress: Callable[[int], None] | None = None, layers: Sequence[int] = (),
                 ) -> list[Continuation]:
        """Greedy answers, the same ids as one at a time. progress(n): called with the number of
        samples just finished.

        layers: other layers to keep as well (models.layers; not -1, which is ``hidden``).

        Prompts are padded on the left; a row leaves the batch at its EOS; questions on one clip
        share its prefill when they stand in one batch. Results are on the CPU, in the order given.
        """
        results: list[Continuation] = []
        for start in range(0, len(samples), batch_size):
            chunk = samples[start:start + batch_size]
            cache, tails = self._shared_prefill(chunk)
            results += self._generate_batch(tails, max_new_tokens, cache, layers)
            if progress is not None:
                progress(len(chunk))
        return results

    def _shared_prefill(self, samples: Sequence[Sample]) -> tuple[DynamicCache, list[Tensor]]:
        """A cache that holds each row's prompt up to its visual tokens, and what is still to be
        fed: [L_i, D] a row.

            [ before | visual ]  once a clip, then copied to its rows       [ after | answer ]  by row

        The cache is empty, and the rows are whole prompts, where no two rows share a clip or
        prefixes differ in length.
        """
        cache = DynamicCache(config=self.decoder.config)
        contents = [_content(self._images(sample)) for sample in samples]
        first = {content: row for row, content in reversed(list(enumerate(contents)))}
        split = [self.prompt_ids(sample.question) for sample in samples]
        limit = getattr(self.model.config, "tokenizer_model_max_length", None)
        prefixes = {
            content: self._prefix(samples[row], split[row][0]) for content, row in first.items()
        }
        lengths = {len(prefix) for prefix in prefixes.values()}
        too_long = limit is not None and max(lengths) + max(len(after)
                                                            for _, after in split) > limit
        if len(first) == len(samples) or len(lengths) > 1 or too_long:
            return cache, [self.prompt_embeddings(sample) for sample in samples]
        self.decoder(inputs_embeds=torch.stack(list(prefixes.values())), past_key_values=cache,
                     use_cache=True)
        place = {content: index for index, content in enumerate(prefixes)}
        cache.batch_select_indices(
            torch.tensor([place[content] for content in contents], device=self.device))
        return cache, [self._lookup(after) for _, after in split]

    def _prefix(self, sample: Sample, before: list[int]) -> Tensor:
        return torch.cat(
            [self._lookup(before),
             self.visual_tokens(sample).to(self._embed.weight.dtype)])

    def _generate_batch(
        self, tails: list[Tensor], max_new_tokens: int, cache: DynamicCache | None = None,
        layers: Sequence[int] = ()) -> list[Continuation]:
        cache = DynamicCache(config=self.decoder.config) if cache is None else cache
        cached, batch = cache.get_seq_length(), len(tails)
        ids: list[list[int]] = [[] for _ in range(batch)]
        states: list[list[Tensor]] = [[] for _ in range(batch)]
        rows = list(range(batch))
        lengths = torch.tensor([len(tail) for tail in tails], device=self.device)
        longest = int(lengths.max())
        embeds = tails[0].new_zeros(batch, longest, self.hidden_size)
        for row, tail in enumerate(tails):
            embeds[row, longest - len(tail):] = tail
        columns = torch.arange(longest, device=self.device)
        positions = cached + (columns - (longest - lengths)[:, None]).clamp(min=0)
        mask = None
        if bool((lengths < longest).any()
                ):  # equal lengths need no mask, and attention without one takes the faster kernel
            real = (columns >= (longest - lengths)[:, None]).long()
            mask = torch.cat([real.new_ones(batch, cached), real], dim=1)
        for step in range(max_new_tokens):
            with layer_states.recorded(self.decoder, layers) as others:
                output = self.decoder(inputs_embeds=embeds, attention_mask=mask,
                                      position_ids=positions, past_key_values=cache, use_cache=True)
            hidden = output.last_hidden_state[:, -1]
            chosen = self.lm_head(hidden).argmax(-1)
            kept = torch.stack([hidden, *(other[:, -1].to(hidden.device) for other in others)],
                               dim=1)  # [B, 1 + layers, D]
            for row, token, state in zip(rows, chosen.tolist(), kept, strict=True):
                ids[row].append(token)
                states[row].append(state)
            going = [
                i for i, token in enumerate(chosen.tolist()) if token not in self.eos_token_ids
            ]
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
        empty = embeds.new_zeros(0, 1 + len(layers), self.hidden_size)
        stacked = [(torch.stack(states[row]) if states[row] else empty).cpu()
                   for row in range(batch)]
        return [
            Continuation(
                torch.tensor(ids[row], dtype=torch.long), stacked[row][:, 0].contiguous(),
                "eos" if ids[row] and ids[row][-1] in self.eos_token_ids else "length",
                {layer: stacked[row][:, 1 + i].contiguous() for i, layer in enumerate(layers)},
            ) for row in range(batch)
        ]

    @torch.no_grad()
    def force(self, samples: Sequence[Sample], ids: Sequence[Tensor], *, batch_size: int = 16,
              progress: Callable[[int], None] | None = None, layers: Sequence[int] = (),
              ) -> list[Forced]:
        """States before each forced token, the whole answer in one forward pass.

        The input is prompt + ids[:-1] and the states are read one position before their token. Rows
        are padded on the right, where a causal decoder's real positions never look. layers: as in
        :meth:`generate`.
        Raises: ValueError if the two lists differ in length.
        """
        if len(samples) != len(ids):
            raise ValueError(
                f"{len(samples)} samples but {len(ids)} answers to force; one answer for each "
                "sample is expected"
            )
        results: list[Forced] = []
        for start in range(0, len(samples), batch_size):
            chunk = samples[start:start + batch_size]
            answers = [
                torch.as_tensor(answer, dtype=torch.long)
                for answer in ids[start:start + batch_size]
            ]
            cache, tails = self._shared_prefill(chunk)
            lines = [
                torch.cat([tail, self._lookup(answer[:-1])])
                for tail, answer in zip(tails, answers, strict=True)
            ]
            embeds = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
            with layer_states.recorded(self.decoder, layers) as others:
                states = self.decoder(inputs_embeds=embeds, past_key_values=cache,
                                      use_cache=True).last_hidden_state
            for row, (tail, answer) in enumerate(zip(tails, answers, strict=True)):
                cut = slice(len(tail) - 1, len(tail) - 1 + len(answer))
                hidden = states[row, cut]
                more = {
                    layer: other[row, cut].clone().cpu()
                    for layer, other in zip(layers, others, strict=True)
                }
                results.append(
                    Forced(hidden.clone().cpu(),
                           self.lm_head(hidden).argmax(-1).cpu(), more))
            if progress is not None:
                progress(len(chunk))
        return results

    # --- text and identity
    # --------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text without BOS or EOS."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """One token as a token strip shows it: word starts carry their space, byte tokens their
        character."""
        token = self.tokenizer.convert_ids_to_tokens(int(token_id)) or f"<{int(token_id)}>"
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)]).decode("latin-1")
        return token.replace("▁", " ")

    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all weights as held in memory (so a
        quantised model has its own)."""
        if self._hash is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                if isinstance(tensor, Tensor):
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(
                        torch.uint8).numpy().data)
            self._hash = digest.hexdigest()
        return self._hash


def _content(images: Sequence[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(f"{image.shape} {image.dtype}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id,
                  tokenizer.eos_token_id):
        if value is not None and not found:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)
