"""The two 7B models as configurations, and any pair's size, counted without loading it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.video_llava import VideoLlavaConfig, VideoLlavaForConditionalGeneration

from xsd.models import checkpoint_files, loading, settings
from xsd.models.eventgpt import CLIP_VIT_L_14_336, EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import Role
from xsd.models.quantization import PROJECTORS, TOWERS

FULL = "full"
"""Name of the pair EventGPT-7B and Video-LLaVA-7B."""
N_EVENT_FRAMES, N_VIDEO_FRAMES = 5, 8
_DECODER_7B = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
               "num_attention_heads": 32, "num_key_value_heads": 32,
               "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def drafter_config() -> EventGPTConfig:
    """EventGPT-7B: a Llama decoder over 32 000 ids, CLIP ViT-L/14 at 336 px."""
    return EventGPTConfig(vocab_size=32_000, vision_config=dict(CLIP_VIT_L_14_336), **_DECODER_7B)


def verifier_config() -> VideoLlavaConfig:
    """Video-LLaVA-7B-hf: the same decoder over 32 064 ids, an image and a video tower at 224 px."""
    return VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**{**CLIP_VIT_L_14_336, "image_size": 224}),
        text_config=LlamaConfig(vocab_size=32_064, **_DECODER_7B),
        image_token_index=32_000, video_token_index=32_001, vision_feature_layer=-2,
        video_seq_length=2056, tie_word_embeddings=False)


@dataclass(frozen=True)
class ModelSize:
    """What a plan needs of one model. parameters: by part (tower, projector, embeddings, linear,
    norms, head); linear are the decoder's layers that are quantised, with linear_rows output rows,
    largest_linear parameters in the largest. kv_width: key (or value) numbers a position and layer.
    frame_tokens: tower states of one picture. visual_tokens: prompt positions of them all."""

    name: str
    role: Role
    parameters: dict[str, int]
    linear_rows: int
    largest_linear: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocab: int
    n_frames: int
    frame_tokens: int
    tower_parameters: int
    vision: CLIPVisionConfig
    visual_tokens: int

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(self.parameters.values())


def sizes(pair: str | Path = FULL) -> tuple[ModelSize, ModelSize]:
    """Drafter and verifier of ``"full"``, ``"embedded"`` or a pair folder, from their config.json
    alone. Raises: CheckpointError for a folder that is no pair."""
    if str(pair) == FULL:
        return (_size_of(EventGPTForCausalLM, drafter_config(), "drafter", "EventGPT-7B"),
                _size_of(VideoLlavaForConditionalGeneration, verifier_config(), "verifier",
                         "Video-LLaVA-7B"))
    _, info = loading.pair_folder(pair, names="'full', 'embedded'")
    drafter, raw = loading.open_checkpoint(info["drafter"], "4bit")  # quantised or not
    config = loading.drafter_config(drafter, raw)
    verifier, raw = loading.open_checkpoint(info["verifier"], "4bit")
    theirs, model_class = loading.verifier_class(verifier, raw)
    settings.check_decoder(theirs, verifier)
    return (_size_of(EventGPTForCausalLM, config, "drafter", drafter.name,
                     info.get("n_event_frames", N_EVENT_FRAMES)),
            _size_of(model_class, theirs, "verifier", verifier.name))


def _size_of(model_class: type, config: Any, role: Role, name: str,
             n_event_frames: int = N_EVENT_FRAMES) -> ModelSize:
    with torch.device("meta"), checkpoint_files.answered(name):
        model = model_class(config)
    decoder = getattr(model.model, "language_model", model.model)
    linear = [layer for layer in decoder.layers.modules() if isinstance(layer, nn.Linear)]
    tower = next(module for key, module in model.model.named_children()
                 if key in TOWERS and key != "image_tower")  # a video runs through its own alone
    text, drafts = config.get_text_config(), role == "drafter"
    vision = config.tower_config() if drafts else config.vision_config
    frame_tokens = (vision.image_size // vision.patch_size)**2 + 1
    n_frames = n_event_frames if drafts else N_VIDEO_FRAMES
    visual_tokens = n_frames + frame_tokens if drafts else getattr(config, "video_seq_length",
                                                                   n_frames * frame_tokens)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        name=name, role=role, parameters=_by_part(model),
        linear_rows=sum(layer.out_features for layer in linear),
        largest_linear=max(layer.weight.numel() for layer in linear),
        layers=text.num_hidden_layers, hidden=text.hidden_size,
        intermediate=text.intermediate_size, kv_width=heads * head_width,
        vocab=model.get_output_embeddings().weight.shape[0], n_frames=n_frames,
        frame_tokens=frame_tokens, tower_parameters=sum(p.numel() for p in tower.parameters()),
        vision=vision, visual_tokens=int(visual_tokens))


_PARTS = {"tower": set(TOWERS), "projector": set(PROJECTORS), "head": {"lm_head"},
          "embeddings": {"embed_tokens"}, "linear": {"self_attn", "mlp"}}


def _by_part(model: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for key, parameter in model.named_parameters():  # a tied head counts as the embeddings
        path = set(key.split("."))
        part = next((part for part, names in _PARTS.items() if path & names), "norms")
        counts[part] += parameter.numel()
    return dict(counts)
