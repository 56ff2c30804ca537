"""The two 7B models as configurations, and what any pair's configurations say about its size:
nothing is loaded, nothing allocated.

Parameters are counted on a skeleton on the meta device, so the counts are those of the classes that
will be loaded. The counts are
those of the published files: 688 tensors and 7 079 684 096 parameters (EventGPT-7B), 7 366 279 168
(Video-LLaVA-7B-hf, 14.7 GB in half
precision).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
)

from xsd.core import CheckpointError
from xsd.models import keymap, loading
from xsd.models.eventgpt import CLIP_VIT_L_14_336, EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import Role

FULL = "full"
"""Name of the pair EventGPT-7B and Video-LLaVA-7B."""
N_EVENT_FRAMES, N_VIDEO_FRAMES = 5, 8
_VISION = ("visual_tower", "video_tower", "image_tower", "vision_tower")
_PROJECTORS = ("visual_projector", "feature_adaptor", "multi_modal_projector")


def drafter_config() -> EventGPTConfig:
    """EventGPT-7B: a Llama decoder of 32 layers and width 4096 over 32 000 ids, CLIP ViT-L/14 at
    336 px."""
    return EventGPTConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008,
                          num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                          max_position_embeddings=4096, rms_norm_eps=1e-5,
                          tie_word_embeddings=False, vision_config=dict(CLIP_VIT_L_14_336),
                          )  # fmt: skip


def verifier_config() -> VideoLlavaConfig:
    """Video-LLaVA-7B-hf: the same decoder over 32 064 ids, two CLIP ViT-L/14 towers at 224 px
    (image and video)."""
    return VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**{**CLIP_VIT_L_14_336, "image_size": 224}),
        text_config=LlamaConfig(vocab_size=32_064, hidden_size=4096, intermediate_size=11_008,
                                num_hidden_layers=32, num_attention_heads=32,
                                num_key_value_heads=32, max_position_embeddings=4096,
                                rms_norm_eps=1e-5, tie_word_embeddings=False,
                                ), image_token_index=32_000, video_token_index=32_001,
        vision_feature_layer=-2, video_seq_length=2056, tie_word_embeddings=False,
    )  # fmt: skip


@dataclass(frozen=True)
class ModelSize:
    """What a plan needs of one model. parameters: by part (tower, projector, embeddings, linear,
    norms, head), each counted once.

    linear: the decoder's linear layers, the only part that quantisation changes; linear_rows: their
    output rows together, largest_linear:
    the most parameters in one of them. kv_width: key (or value) numbers a position and layer.
    frame_tokens: tower states of one picture, CLS included; tower_layers: layers that run.
    visual_tokens: positions of the prompt that the pictures take.
    """

    name: str
    role: Role
    parameters: dict[str, int]
    n_tensors: int
    linear_rows: int
    largest_linear: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocab: int
    n_frames: int
    frame_tokens: int
    tower_parameters_run: int
    tower_layers: int
    tower_hidden: int
    tower_intermediate: int
    visual_tokens: int

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(self.parameters.values())


def size_of(config: Any, role: Role, name: str, *,
            n_event_frames: int = N_EVENT_FRAMES) -> ModelSize:
    """Sizes from a configuration. Raises: CheckpointError for a verifier that transformers does not
    know as an image-text model."""
    with torch.device("meta"):
        model = EventGPTForCausalLM(config) if role == "drafter" else _verifier_class(config,
                                                                                      name)(config)
    decoder = getattr(model.model, "language_model", model.model)
    in_decoder = {id(layer) for layer in decoder.layers.modules() if isinstance(layer, nn.Linear)}
    linear = [layer for layer in decoder.layers.modules() if id(layer) in in_decoder]
    text = config.get_text_config()
    vision = config.tower_config() if role == "drafter" else config.vision_config
    frame_tokens = (vision.image_size // vision.patch_size)**2 + 1
    n_frames = n_event_frames if role == "drafter" else N_VIDEO_FRAMES
    tower = next(module for key, module in model.model.named_children()
                 if key in ("visual_tower", "video_tower", "vision_tower"))
    visual = n_frames + frame_tokens if role == "drafter" else getattr(
        config, "video_seq_length", n_frames * frame_tokens)
    heads = text.num_attention_heads
    return ModelSize(name=name, role=role, parameters=dict(_by_part(model, linear)),
                     n_tensors=len(list(model.parameters())), linear_rows=sum(layer.out_features
                                                                              for layer in linear),
                     largest_linear=max(layer.weight.numel()
                                        for layer in linear), layers=text.num_hidden_layers,
                     hidden=text.hidden_size, intermediate=text.intermediate_size,
                     kv_width=(getattr(text, "num_key_value_heads", None) or heads) *
                     (getattr(text, "head_dim", None) or text.hidden_size // heads),
                     vocab=model.get_output_embeddings().weight.shape[0], n_frames=n_frames,
                     frame_tokens=frame_tokens,
                     tower_parameters_run=sum(p.numel() for p in tower.parameters()),
                     tower_layers=vision.num_hidden_layers, tower_hidden=vision.hidden_size,
                     tower_intermediate=vision.intermediate_size, visual_tokens=int(visual),
                     )  # fmt: skip


def _verifier_class(config: Any, name: str) -> Any:
    try:
        return AutoModelForImageTextToText._model_mapping[type(config)]
    except KeyError as error:
        raise CheckpointError(
            f"{name} is of model type {config.model_type!r}, which transformers does not know as "
            "an image-text model; give a video model"
        ) from error


def _by_part(model: nn.Module, linear: list[nn.Linear]) -> Counter[str]:
    own = {id(parameter) for layer in linear for parameter in layer.parameters()}
    embeddings, head = id(model.get_input_embeddings().weight), id(
        model.get_output_embeddings().weight)
    counts: Counter[str] = Counter()
    for key, parameter in model.named_parameters():  # a tied head is named once, as embeddings
        path = key.split(".")
        if id(parameter) in own:
            part = "linear"
        elif id(parameter) == embeddings:
            part = "embeddings"
        elif id(parameter) == head:
            part = "head"
        elif any(name in path for name in _VISION):
            part = "tower"
        elif any(name in path for name in _PROJECTORS):
            part = "projector"
        else:
            part = "norms"
        counts[part] += parameter.numel()
    return counts


def sizes(pair: str | Path = FULL) -> tuple[ModelSize, ModelSize]:
    """Drafter and verifier of ``"full"`` (both 7B models), ``"embedded"``, or a pair folder, from
    their config.json alone.

    Raises: CheckpointError for a folder that is no pair.
    """
    if str(pair) == FULL:
        return size_of(drafter_config(), "drafter",
                       "EventGPT-7B"), size_of(verifier_config(), "verifier", "Video-LLaVA-7B")
    folder = loading.EMBEDDED if str(pair) == "embedded" else Path(pair)
    if not folder.is_dir():
        raise CheckpointError(
            f"no pair at {folder}; give 'full', 'embedded' or a folder with drafter/ and verifier/")
    info = keymap.read_json(folder / "pair.json") if (folder / "pair.json").is_file() else {}
    frames = int(info.get("n_event_frames", N_EVENT_FRAMES))
    found = []
    for role in ("drafter", "verifier"):
        place = folder / info.get(role, role)
        if not (place / "config.json").is_file():
            raise CheckpointError(
                f"{place} holds no config.json; give the directory of a downloaded checkpoint")
        config = EventGPTConfig.from_pretrained(
            place) if role == "drafter" else AutoConfig.from_pretrained(place)
        found.append(size_of(config, role, place.name, n_event_frames=frames))
    return found[0], found[1]
