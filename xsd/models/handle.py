"""A model behind the decoder-handle protocol: prefill, extend, rollback, lm_head, a KV cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from xsd.core import CheckpointError, DatasetError, ParameterError, Sample, VideoError
from xsd.models import batched, quantization, small_steps, static_steps
from xsd.models.pixels import PixelSpec

Role = Literal["drafter", "verifier"]
_REMEMBERED_CLIPS = 64
_LONGEST_TOKEN = 64  # characters; more to a position than this is no question
DRAFTER_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.")
VIDEO_TOKEN = "<video>"
_NO_QUESTION = re.compile("<video>|<image>|<ev_[a-z]+>|[\ud800-\udfff]")


@dataclass
class DecoderState:
    """core.State over a cache of keys and values. context: where layers are recorded."""

    length: int
    hidden: Tensor
    logits: Tensor
    cache: DynamicCache | small_steps.GrowingCache | static_steps.Held
    context: batched.Context | None = None


class ModelHandle(batched.BatchedAnswers):
    """One loaded model (core.DecoderHandle). draft_vocab_size: ids from it on are padding or added
    tokens, never drafted. max_positions: of prompt and answer together. unused_settings: what of
    generation_config.json is not used, in a sentence. steps: as static_steps.kind_for."""

    def __init__(self, model: Any, tokenizer: Any, role: Role, pixels: PixelSpec, *,
                 draft_vocab_size: int, name: str = "", unused_settings: str = "",
                 steps: str = "auto") -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.role, self.pixels, self.name = tokenizer, role, pixels, name
        self.decoder = getattr(model.model, "language_model", model.model)
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.head = model.get_output_embeddings()
        self.vocab_size: int = self.head.weight.shape[0]
        self.draft_vocab_size, self.unused_settings = draft_vocab_size, unused_settings
        self.eos_token_ids = _eos(model, tokenizer)
        self.max_positions: int = model.config.get_text_config().max_position_embeddings
        self.device = self.head.weight.device
        self._embed = model.get_input_embeddings()
        self._vision: dict[str, Tensor] = {}
        self._hash: str | None = None
        self.steps = static_steps.kind_for(self.decoder, steps)
        self._arranged: small_steps.Steps | static_steps.Steps | None = None

    # --- the prompt

    def images(self, sample: Sample) -> list[Any]:
        """The pictures of the model's own sensor. Raises: DatasetError or VideoError for none."""
        images, what, error = ((sample.event_frames, "event", DatasetError)
                               if self.role == "drafter" else (sample.video, "video", VideoError))
        if len(images) == 0:
            raise error(f"{sample.sequence}/{sample.clip} has no {what} frame; check the clip's "
                        "files and read the dataset folder again")
        return list(images)

    def visual_tokens(self, sample: Sample, *, reuse: bool = True) -> Tensor:
        """[E, D] event or video tokens; with ``reuse`` remembered by what the images show."""
        images = self.images(sample)
        if not reuse:
            return self._encode_images(images)
        key = batched.content(images)
        if key not in self._vision:
            if len(self._vision) == _REMEMBERED_CLIPS:
                del self._vision[next(iter(self._vision))]  # the oldest
            self._vision[key] = self._encode_images(images)
        return self._vision[key]

    @torch.no_grad()
    def _encode_images(self, images: Sequence[Any]) -> Tensor:
        pixels, model = self.pixels(images).to(self.device), self.model.model
        if self.role == "drafter":
            return self.model.event_tokens(pixels)
        tower = getattr(model, "video_tower", None) or model.vision_tower
        features = model.get_video_features(pixels[None].to(tower.dtype),
                                            return_dict=True).pooler_output
        features = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features
        return features.reshape(-1, self.hidden_size)

    def prompt_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before (BOS first) and after the visual tokens. Raises: ParameterError for a question
        beyond the positions there are; as :func:`prompt_ids`."""
        most = min(self.max_positions,
                   getattr(self.model.config, "tokenizer_model_max_length", self.max_positions))
        if len(question) > _LONGEST_TOKEN * most:  # not worth tokenising
            raise ParameterError(f"a question of {len(question)} characters is longer than the "
                                 f"{most} positions of the {self.role}; ask a shorter one")
        before, after = prompt_ids(self.role, self.tokenizer, question)
        self.check_length(len(before) + len(after), most, question)
        if (largest := max(*before, *after)) >= (rows := self._embed.weight.shape[0]):
            raise CheckpointError(f"the {self.role}'s tokenizer says id {largest}, but the model "
                                  f"has {rows} words; use the tokenizer saved with these weights")
        return before, after

    def check_length(self, positions: int, most: int | None = None, question: str = "") -> None:
        """Raises: ParameterError where prompt and answer take more positions than there are. most:
        of the prompt alone, where the drafter would cut it. question: to name it."""
        if positions > (most or self.max_positions):
            raise ParameterError(
                f"prompt and answer need {positions} positions, but the {self.role} has "
                f"{most or self.max_positions} (config.json); ask a shorter question or for fewer "
                "new tokens (max_new_tokens)" + (question and f": {question[:60]!a} …"))

    @torch.no_grad()
    def prompt_embeddings(self, sample: Sample, *, reuse_vision: bool = True) -> Tensor:
        """[L, D] input embeddings of the whole prompt. Raises: ParameterError for one too long."""
        before, after = self.prompt_ids(sample.question)
        visual = self.visual_tokens(sample, reuse=reuse_vision)
        self.check_length(len(before) + len(visual) + len(after), question=sample.question)
        return torch.cat([self._join(before, visual), self._lookup(after)])

    def _join(self, before: Sequence[int], visual: Tensor) -> Tensor:
        return torch.cat([self._lookup(before), visual.to(self._embed.weight.dtype)])

    def _lookup(self, ids: Sequence[int] | Tensor) -> Tensor:
        return self._embed(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    # --- core.DecoderHandle: a batch of one

    @torch.no_grad()
    def prefill(self, sample: Sample, *, reuse_vision: bool = False,
                layers: Sequence[int] = ()) -> DecoderState:
        """Run the prompt; by default nothing is reused, so that its time is a request's. layers:
        recorded from here on (batched.LAST says how they are counted)."""
        embeds = self.prompt_embeddings(sample, reuse_vision=reuse_vision)
        if self.steps != "plain" and (self._arranged is None or not self._arranged.current()):
            kind = small_steps if self.steps == "small" else static_steps
            self._arranged = kind.Steps(self.decoder)
        if self.steps == "small":
            entered = batched.entering(self.decoder, layers, embeds)
            hidden, cache = self._arranged.prefill(embeds, entered)
            states = list(entered.values())
        else:
            cache = DynamicCache(config=self.decoder.config)
            with batched.recorded(self.decoder, layers) as found:
                hidden = self.decoder(inputs_embeds=embeds[None], past_key_values=cache,
                                      use_cache=True).last_hidden_state[0, -1]
            states = [one[0] for one in found]
            cache = self._arranged.take(cache) if self._arranged else cache
        context = batched.Context(layers, torch.cat(states, dim=-1)) if layers else None
        return DecoderState(len(embeds), hidden, self.lm_head(hidden), cache, context)

    @torch.no_grad()
    def extend(self, state: DecoderState, ids: Tensor,
               parents: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Append ids int64 [n] (n ≥ 1) in place: hidden [n, D] and logits [n, V] after each.
        parents: of a draft tree (core.DecoderHandle). Raises: ParameterError beyond
        ``max_positions``."""
        self.check_length(state.length + len(ids))
        embeds = self._lookup(ids)
        layers = state.context.layers if state.context else ()
        if isinstance(state.cache, DynamicCache):
            tree = {} if parents is None else self._tree_inputs(parents, state.length)
            with batched.recorded(self.decoder, layers) as states:
                hidden = self.decoder(inputs_embeds=embeds[None], past_key_values=state.cache,
                                      use_cache=True, **tree).last_hidden_state[0]
            states = [one[0] for one in states]
        else:
            entered = batched.entering(self.decoder, layers, embeds)
            hidden = self._arranged(embeds, state.cache, parents, entered)
            states = list(entered.values())
        if state.context:
            state.context.put(state.length, torch.cat(states, dim=-1))
        logits = self.lm_head(hidden)
        state.length += len(hidden)
        state.hidden, state.logits = hidden[-1], logits[-1]
        return hidden, logits

    def _tree_inputs(self, parents: Sequence[int], start: int) -> dict[str, Tensor]:
        """transformers' arguments for the rows of a tree: added to scores, 0 where a row sees."""
        places, seen = small_steps.tree_rows(parents, start, device=self.device)
        dtype = self._embed.weight.dtype
        hide = torch.zeros(seen.shape, dtype=dtype, device=self.device)
        hide = hide.masked_fill(~seen, torch.finfo(dtype).min)
        return {"position_ids": places[None], "attention_mask": hide[None, None]}

    def rollback(self, state: DecoderState, length: int, path: Sequence[int] = ()) -> None:
        """Forget every position >= length, in place; those of ``path`` (ascending) stay, moved
        together. Raises: ValueError outside 0…state.length."""
        if not 0 <= length <= state.length:
            raise ValueError(
                f"cannot roll back to length {length}: the cache holds {state.length} positions")
        if path:
            rows = torch.tensor(path, device=self.device)
            if state.context:
                state.context.put(length, state.context.rows(0, state.length)[rows])
            if list(path) == list(range(length, length + len(path))):
                pass  # they stand there already
            elif isinstance(state.cache, DynamicCache):
                for layer in state.cache.layers:
                    for cached in (layer.keys, layer.values):
                        cached[:, :, length:length + len(rows)] = cached[:, :, rows]
            else:
                state.cache.move(rows, length)
            length += len(path)
        if length < state.length:  # crop takes the number to remove, as a negative count
            state.cache.crop(length - state.length)
            state.length = length

    def lm_head(self, hidden: Tensor) -> Tensor:
        """[..., D] post-norm states to [..., V] logits, in the head's dtype."""
        return self.head(hidden.to(self.head.weight.device, self.head.weight.dtype))

    def plain(self, steps: str = "plain") -> ModelHandle:
        """A handle on the same weights whose every pass is transformers' own, or with other
        ``steps``. Raises: ParameterError where the decoder cannot take them."""
        return ModelHandle(self.model, self.tokenizer, self.role, self.pixels, name=self.name,
                           draft_vocab_size=self.draft_vocab_size, steps=steps)

    def steps_in_words(self) -> str:
        """What an extend runs on, and why not on a captured graph where that was the aim."""
        if self.steps != "static":
            return self.steps
        why = self._arranged.uncaptured if self._arranged else static_steps.why_not_captured(
            self.decoder)
        return f"static, uncaptured: {why}" if why else "static, captured"

    # --- text and identity

    def text(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """One token as a strip shows it: word starts with their space, bytes as characters."""
        token = self.tokenizer.convert_ids_to_tokens(int(token_id)) or f"<{int(token_id)}>"
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)]).decode("latin-1")
        if not token.isascii() and "▁" not in token:  # bytes as letters: Ġ is a space
            token = self.tokenizer.convert_tokens_to_string([token])
        return token.replace("▁", " ")

    def weights_hash(self) -> str:
        """:func:`tensors_hash` of the weights in memory (a quantised model has its own)."""
        self._hash = self._hash or tensors_hash(self.model.state_dict())
        return self._hash


def tensors_hash(state: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        for tensor in quantization.stored(value) if isinstance(value, Tensor) else ():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    """The first end-of-answer ids that a configuration or the tokenizer names."""
    for named in (model.generation_config, model.config.get_text_config(), tokenizer):
        if (value := named.eos_token_id) not in (None, []):
            return frozenset([value] if isinstance(value, int) else value)
    return frozenset()


def prompt_ids(role: str, tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """Ids before the visual tokens (BOS first) and after them: the drafter's sides tokenised each
    by itself, as the official code does; the verifier's prompt whole, and split at ``<video>``.
    Raises: DatasetError for an empty question, one that is no text or holds what stands for
    pictures; CheckpointError for a tokenizer without ``<video>``."""
    if not question.strip():
        raise DatasetError(
            "a question has zero length; give each sample a question with at least one word")
    if _NO_QUESTION.search(question):
        raise DatasetError(f"the question {question[:60]!a} holds a placeholder of pictures "
                           f"({VIDEO_TOKEN}, <image> …) or half a character; ask in words")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if role == "drafter":
        after = ids(f"<ev_end>\n{question} ASSISTANT:")
        return bos + ids(f"{DRAFTER_SYSTEM} USER: <ev_start>"), after
    place = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    whole = ids(f"USER: {VIDEO_TOKEN}\n{question} ASSISTANT:")
    if place is None or whole.count(place) != 1:
        raise CheckpointError(f"the verifier's tokenizer does not know {VIDEO_TOKEN} as one token; "
                              "use the tokenizer saved with the video checkpoint")
    at = whole.index(place)
    return bos + whole[:at], whole[at + 1:]
