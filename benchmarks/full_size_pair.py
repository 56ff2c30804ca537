"""EventGPT-7B and Video-LLaVA-7B made in memory, with random weights whose next token is certain
(docs/benchmarks/README.md, "Full size"); and the same two in tiny, for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaForConditionalGeneration
from transformers.models.video_llava import VideoLlavaConfig

from xsd.core import Sample
from xsd.models import full_size, loading, quantization, settings
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import ModelHandle, Role
from xsd.models.pixels import PixelSpec

FIRST_ID = 3
"""Ids below it are special, the end of an answer among them."""
QUIET = 1e-3
"""What a layer adds, as a share of a common initialisation: the embedding stays the strongest."""


@dataclass(frozen=True)
class Size:
    """configs: of drafter and verifier. shared: ids of both. pictures: height and width of what the
    sensors see. tokens: of an answer. rows, batches: what is measured. answers: of a training, of
    how many positions. adapters: levels."""

    configs: Mapping[Role, Any]
    shared: int
    pictures: tuple[int, int]
    tokens: int
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    answers: tuple[int, int]
    repeats: int


def tiny_configs() -> dict[Role, Any]:
    """Both models, 64 wide."""
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "projection_dim": 16
    }
    llama = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024
    }
    verifier = VideoLlavaConfig(vision_config=CLIPVisionConfig(**vision),
                                text_config=LlamaConfig(vocab_size=664, **llama),
                                image_token_index=600, video_token_index=601, video_seq_length=40)
    return {
        "drafter": EventGPTConfig(vocab_size=600, vision_config=vision, **llama),
        "verifier": verifier
    }


def size_of(name: str) -> Size:
    """``"full"`` or ``"tiny"``."""
    if name == "full":
        configs = {"drafter": full_size.drafter_config(), "verifier": full_size.verifier_config()}
        return Size(configs, 32_000, (480, 640), 80, (1, 2, 4, 6, 8, 16, 32), (1, 4, 8, 16, 32),
                    (64, 50), 7)
    return Size(tiny_configs(), 600, (36, 48), 12, (1, 2, 6), (1, 4), (8, 12), 2)


def sample(size: Size, number: int = 0) -> Sample:
    """Random pictures and a question."""
    draw = np.random.default_rng(number)
    frames, video = (draw.integers(0, 256, (n, *size.pictures, 3), dtype=np.uint8)
                     for n in (full_size.N_EVENT_FRAMES, full_size.N_VIDEO_FRAMES))
    return Sample("made", f"{number:06d}", "What is the car ahead doing?", list(frames), video)


def make(size: Size, role: Role, dtype: torch.dtype, device: str) -> nn.Module:
    """A model with margins: row π(i) of the head is the embedding of id i (π: the next id), and
    what attention and MLP add is small. So the next token is π of the last one by a wide margin, in
    every number format and row count, at the cost of any other weights of this shape."""
    model_class = EventGPTForCausalLM if role == "drafter" else VideoLlavaForConditionalGeneration
    with torch.device(device), settings.quiet():
        model = model_class._from_config(size.configs[role], dtype=dtype,
                                         attn_implementation="sdpa").eval()
    decoder = getattr(model.model, "language_model", model.model)
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for layer in decoder.layers:
            layer.self_attn.o_proj.weight.mul_(QUIET)
            layer.mlp.down_proj.weight.mul_(QUIET)
        head.zero_()
        head[FIRST_ID + 1:size.shared] = words[FIRST_ID:size.shared - 1]
        head[FIRST_ID] = words[size.shared - 1]
    return model


def quantised(model: nn.Module, quant: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The same weights in fewer bits."""
    options = {
        "quantization_config": quantization.quantization_config(quant, dtype, device),
        "device_map": {"": device}, "dtype": dtype, "attn_implementation": "sdpa"
    }
    with settings.quiet():
        return type(model).from_pretrained(None, config=model.config, local_files_only=True,
                                           state_dict=dict(model.state_dict()), **options).eval()


def handle_of(size: Size, role: Role, model: nn.Module) -> ModelHandle:
    """A handle with the embedded pair's words, whose ids are the first of these models, too. On a
    CPU it takes the steps that a GPU captures."""
    config = size.configs[role]
    vision = config.tower_config() if role == "drafter" else config.vision_config
    tokenizer = settings.read_tokenizer(loading.EMBEDDED / role, config)
    return ModelHandle(model, tokenizer, role, PixelSpec(vision.image_size, vision.image_size),
                       draft_vocab_size=size.shared, name=f"made {role}",
                       steps="static" if model.device.type == "cpu" else "auto")
