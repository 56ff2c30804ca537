"""EventGPT as a transformers model: a Llama decoder that reads F event frames of P CLIP states as
F + P event tokens in the place of id -200 (docs/models.md, "The drafter"), with the official tensor
names. Importing this module registers it with transformers' Auto classes."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from xsd.files import atomic_write

EVENT_TOKEN_ID = -200
"""Placeholder id in the prompt; never looked up in the embedding table."""
CLIP_VIT_L_14_336: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
"""The tower of the released models; used where a configuration names none."""


class EventGPTConfig(LlamaConfig):
    """LlamaConfig plus the vision side. mm_visual_tower: path or name of the CLIP folder.
    event_feature_adaptor: only its presence counts. vision_config: CLIPVisionConfig fields, absent
    from official files. tokenizer_model_max_length: where a prompt with its event tokens is cut."""

    model_type = "EventChat_llama"

    mm_visual_tower: str | None = None
    event_feature_adaptor: Any = True
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    tokenizer_model_max_length: int = 2048
    vision_config: dict | None = None

    def tower_config(self) -> CLIPVisionConfig:
        """``vision_config``, or ViT-L/14-336 where the file names none."""
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
        return self.visual_tower["vision_model"]

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,h,w] pixels to [N,P,C] states of the last layer, CLS kept, before post_layernorm."""
        return self.clip(pixel_values=pixels).last_hidden_state


class EventGPTModel(LlamaModel):
    """The Llama decoder with tower, projector and adaptor beside it."""

    config_class = EventGPTConfig

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        tower, width = config.tower_config(), config.hidden_size
        self.visual_tower = _Tower(tower)
        self.visual_projector = nn.Sequential(nn.Linear(tower.hidden_size, width), nn.GELU(),
                                              nn.Linear(width, width))
        self.feature_adaptor = nn.Linear(width, width)
        self.post_init()

    def event_features(self, pixels: Tensor) -> Tensor:
        """[N,3,h,w] pixels to [N,P,D]: tower, projector, adaptor."""
        return self.feature_adaptor(self.visual_projector(self.visual_tower(pixels)))


class EventGPTForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """EventGPT with its language-model head; ``hidden_states[-1]`` is after the final norm."""

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
        """[(B,)F,3,h,w] pixels to [(B,)F+P,D]: means over a frame's P, then means over frames."""
        weight = self.model.feature_adaptor.weight  # never quantised: its dtype is the model's own
        frames = pixels.to(weight.device, weight.dtype).flatten(0, -4)
        features = self.model.event_features(frames).unflatten(0, pixels.shape[:-3])
        return torch.cat([features.mean(dim=-2), features.mean(dim=-3)], dim=-2)

    def embed_prompt(self, ids: Tensor, event_tokens: Tensor) -> Tensor:
        """Prompts int64 [(B,)L] with event_tokens [(B,)E,D] in place of their one -200 (else
        ValueError), as embeddings [(B,)L-1+E,D], cut at the maximum."""
        if ids.dim() == 1:
            return self.embed_prompt(ids[None], event_tokens[None])[0]
        words = self.get_input_embeddings()(ids.clamp(min=0))
        return self._splice(ids, words, event_tokens.to(words.dtype))

    def _splice(self, ids: Tensor, beside: Tensor, events: Tensor) -> Tensor:
        """Values [B,L,...] with ``events`` [B,E,...] at the ids' placeholder: [B,L-1+E,...]."""
        rows = []
        for row, values, inserted in zip(ids.tolist(), beside, events, strict=True):
            if (found := row.count(EVENT_TOKEN_ID)) != 1:
                raise ValueError(f"a prompt holds {found} event placeholders (id "
                                 f"{EVENT_TOKEN_ID}); exactly one is expected")
            at = row.index(EVENT_TOKEN_ID)
            rows.append(torch.cat([values[:at], inserted, values[at + 1:]]))
        return torch.stack(rows)[:, :self.config.tokenizer_model_max_length]

    def forward(self, input_ids: Tensor | None = None, event_pixels: Tensor | None = None,
                attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: Any = None, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits [B,S,V]; event_pixels [B,F,3,h,w] widen mask and labels [B,L] to S = L-1+F+P."""
        if event_pixels is not None:
            tokens = self.event_tokens(event_pixels)
            shape, mask = tokens.shape[:2], attention_mask
            if mask is not None:
                attention_mask = self._splice(input_ids, mask, mask.new_ones(shape))
            if labels is not None:
                labels = self._splice(input_ids, labels, labels.new_full(shape, -100))
            inputs_embeds, input_ids = self.embed_prompt(input_ids, tokens), None
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask,
                             position_ids=position_ids, past_key_values=past_key_values,
                             inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        vocabulary = self.config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, vocabulary)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states,
                                      outputs.attentions)

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, event_pixels: Tensor | None = None,
                 attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' own; with event_pixels [B,F,3,h,w] the result holds the new ids only."""
        if event_pixels is None:
            return super().generate(input_ids, attention_mask=attention_mask, **kwargs)
        tokens = self.event_tokens(event_pixels)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = self._splice(input_ids, mask, mask.new_ones(tokens.shape[:2]))
        return super().generate(inputs_embeds=self.embed_prompt(input_ids, tokens),
                                attention_mask=mask, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers', with the tower's configuration and the official architecture name."""
        if self.config.vision_config is None:
            self.config.vision_config = dict(CLIP_VIT_L_14_336)
        # transformers' renaming for CLIP would add a second "vision_model." to the official names.
        super().save_pretrained(save_directory, **{**kwargs, "save_original_format": False})
        path = Path(save_directory) / "config.json"
        written = json.loads(path.read_text())
        written["architectures"] = ["EventChatModel"]
        atomic_write(path, json.dumps(written, indent=2, sort_keys=True) + "\n")


AutoConfig.register(EventGPTConfig.model_type, EventGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(EventGPTConfig, EventGPTForCausalLM, exist_ok=True)
