"""EventGPT as a transformers model: a Llama decoder that reads event frames through CLIP, a
projector and an adaptor.

Token layout (docs/models.md, "The drafter"): F event frames, each P = (side / patch)² + 1 CLIP
states, CLS kept.

    frames [F,3,h,w] -> CLIP, last layer, no post_layernorm [F,P,C] -> projector -> adaptor (once)
    [F,P,D]
                     -> F temporal tokens (mean over a frame's P) + P spatial tokens (mean over
                     frames) = [F+P, D]

The event tokens take the place of id -200 in the prompt. Tensor names on disk are the official ones
(``model_type`` ``EventChat_llama``), so official checkpoints load here and ours carry the same
names. Importing this module registers both classes with transformers' Auto classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

from xsd.files import atomic_write

EVENT_TOKEN_ID = -200
"""Placeholder id in the prompt; never looked up in the embedding table."""
OFFICIAL_ARCHITECTURE = "EventChatModel"
"""Name the official code writes into ``architectures``; kept so that both read each other's
config.json."""
CLIP_VIT_L_14_336: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    "hidden_act": "quick_gelu",
}  # fmt: skip
"""The tower of the released models; used where a configuration names none."""


class EventGPTConfig(LlamaConfig):
    """LlamaConfig plus the vision side.

    mm_visual_tower: path or name of the CLIP directory (in released files a path of somebody else's
    machine).
    event_feature_adaptor: its presence counts, the value is ignored. vision_config:
    CLIPVisionConfig fields, written by us and
    absent from official files. tokenizer_model_max_length: the spliced prompt is cut there.
    """

    model_type = "EventChat_llama"

    mm_visual_tower: str | None = None
    event_feature_adaptor: Any = True
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    tokenizer_model_max_length: int = 2048
    vision_config: dict | None = None

    def tower_config(self) -> CLIPVisionConfig:
        """The CLIP configuration to build: ``vision_config``, or ViT-L/14-336 where the file names
        none."""
        return CLIPVisionConfig(**(self.vision_config or CLIP_VIT_L_14_336))

    @property
    def n_frame_tokens(self) -> int:
        """P: CLIP states of one frame, CLS included."""
        tower = self.tower_config()
        return (tower.image_size // tower.patch_size)**2 + 1


class _Tower(nn.Module):
    """Gives the CLIP model its official name ``visual_tower.visual_tower.vision_model``."""
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.visual_tower = nn.ModuleDict({"vision_model": CLIPVisionModel(config)})

    @property
    def clip(self) -> CLIPVisionModel:
        """The CLIP vision model itself."""
        return self.visual_tower["vision_model"]

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,h,w] pixels to [N,P,C] states of the last layer, CLS kept, before post_layernorm."""
        return self.clip(pixel_values=pixels).last_hidden_state


class EventGPTModel(LlamaModel):
    """The Llama decoder with tower, projector and adaptor beside it (names as in the official
    files)."""

    config_class = EventGPTConfig

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        tower = config.tower_config()
        self.visual_tower = _Tower(tower)
        self.visual_projector = nn.Sequential(nn.Linear(tower.hidden_size, config.hidden_size),
                                              nn.GELU(),
                                              nn.Linear(config.hidden_size, config.hidden_size))
        self.feature_adaptor = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def event_features(self, pixels: Tensor) -> Tensor:
        """[N,3,h,w] pixels to [N,P,D]: tower, projector, and the adaptor exactly once."""
        return self.feature_adaptor(self.visual_projector(self.visual_tower(pixels)))

    def event_tokens(self, pixels: Tensor) -> Tensor:
        """[..., F,3,h,w] pixels to [..., F+P, D]: temporal tokens, then spatial tokens."""
        *batch, n_frames = pixels.shape[:-3]
        features = self.event_features(pixels.flatten(0, -4)).unflatten(0, (*batch, n_frames))
        return torch.cat([features.mean(dim=-2), features.mean(dim=-3)], dim=-2)


class EventGPTForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """EventGPT with its language-model head; ``hidden_states[-1]`` is after the final norm and
    ``lm_head`` of it the logits."""

    config_class = EventGPTConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"position_ids$", r"rotary_emb\.inv_freq$"]
    _no_split_modules: ClassVar = ["LlamaDecoderLayer", "CLIPEncoderLayer"]

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        self.model = EventGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def event_tokens(self, pixels: Tensor) -> Tensor:
        """[F,3,h,w] (or [B,F,3,h,w]) pixels to [F+P, D] (or [B,F+P,D]) event tokens."""
        return self.model.event_tokens(pixels.to(self.device, self.dtype_of_vision))

    @property
    def dtype_of_vision(self) -> torch.dtype:
        """dtype of the tower's weights: the model's own dtype, also where the decoder is
        quantised."""
        return self.model.feature_adaptor.weight.dtype

    def embed_prompt(self, ids: Tensor, event_tokens: Tensor | None) -> Tensor:
        """Embeddings of a prompt with the event tokens spliced in at id -200.

        Args: ids: int64 [L] or [B,L], exactly one -200 a row (none when event_tokens is None).
        event_tokens: [E,D] or [B,E,D].
        Returns: [L-1+E, D] or [B, L-1+E, D], cut at ``tokenizer_model_max_length``. Raises:
        ValueError for another number of -200.
        """
        if event_tokens is None:
            return self.get_input_embeddings()(ids)
        if ids.dim() == 2:
            return torch.stack([
                self.embed_prompt(row, tokens)
                for row, tokens in zip(ids, event_tokens, strict=True)
            ])
        at = self._placeholder(ids)
        embed = self.get_input_embeddings()
        spliced = torch.cat(
            [embed(ids[:at]),
             event_tokens.to(embed.weight.dtype),
             embed(ids[at + 1:])])
        return spliced[:self.config.tokenizer_model_max_length]

    def _placeholder(self, ids: Tensor) -> int:
        places = (ids == EVENT_TOKEN_ID).nonzero().flatten().tolist()
        if len(places) != 1:
            raise ValueError(
                f"a prompt holds {len(places)} event placeholders (id {EVENT_TOKEN_ID}); exactly "
                "one is expected"
            )
        return places[0]

    def _splice(self, ids: Tensor, beside: Tensor, n_events: int, value: int) -> Tensor:
        """[B,L] values that run beside the ids (mask, labels) to [B, L-1+E], ``value`` at the event
        tokens."""
        rows = []
        for row, other in zip(ids, beside, strict=True):
            at = self._placeholder(row)
            rows.append(torch.cat([other[:at], other.new_full((n_events,), value), other[at + 1:]]))
        return torch.stack(rows)[:, :self.config.tokenizer_model_max_length]

    def forward(self, input_ids: Tensor | None = None, event_pixels: Tensor | None = None,
                attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: Any = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, **kwargs: Any,
                ) -> CausalLMOutputWithPast:
        """Logits [B,S,V]; with event_pixels [B,F,3,h,w], S = L-1+F+P and mask and labels [B,L] are
        widened the same way."""
        if event_pixels is not None:
            tokens = self.event_tokens(event_pixels)
            if attention_mask is not None:
                attention_mask = self._splice(input_ids, attention_mask, tokens.shape[1], 1)
            if labels is not None:
                labels = self._splice(input_ids, labels, tokens.shape[1], -100)
            inputs_embeds, input_ids = self.embed_prompt(input_ids, tokens), None
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask,
                             position_ids=position_ids, past_key_values=past_key_values,
                             inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
                             )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels,
                                                              vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits,
                                      past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states,
                                      attentions=outputs.attentions,
                                      )  # fmt: skip

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, event_pixels: Tensor | None = None,
                 **kwargs: Any) -> Any:
        """transformers' ``generate``; with event_pixels [B,F,3,h,w] the result holds the new ids
        only, without the prompt."""
        if event_pixels is None:
            return super().generate(input_ids, **kwargs)
        embeds = self.embed_prompt(input_ids, self.event_tokens(event_pixels))
        mask = kwargs.pop("attention_mask", None)
        kwargs["attention_mask"] = (torch.ones(embeds.shape[:2], dtype=torch.long,
                                               device=embeds.device) if mask is None else
                                    self._splice(input_ids, mask, embeds.shape[1] -
                                                 input_ids.shape[1] + 1, 1))
        return super().generate(inputs_embeds=embeds, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers', with the tower's configuration inside and the official architecture
        name."""
        if self.config.vision_config is None:
            self.config.vision_config = dict(CLIP_VIT_L_14_336)
        # The names in memory are the official ones; transformers' own renaming for CLIP would add a
        # second "vision_model.".
        kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "config.json"
        written = json.loads(path.read_text())
        written["architectures"] = [OFFICIAL_ARCHITECTURE]
        atomic_write(path, json.dumps(written, indent=2, sort_keys=True) + "\n")


AutoConfig.register(EventGPTConfig.model_type, EventGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(EventGPTConfig, EventGPTForCausalLM, exist_ok=True)
