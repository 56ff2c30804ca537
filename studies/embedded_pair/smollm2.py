"""The pair on SmolLM2: the two architectures around a public decoder, with towers and projectors
that begin as the embedded pair's, and LoRA beside every product of the layers. Only these are
trained and kept (xsd.models.base)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, VideoLlavaConfig

from studies.embedded_pair import models
from studies.embedded_pair.models import Parts
from xsd.files import write_json
from xsd.models import base, checkpoint_files, loading
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.pixels import PixelSpec
from xsd.models.pooled import PooledVideoLlava
from xsd.models.settings import quiet

POOL = 2
"""Of 6 x 6 patches, 3 x 3 remain: 8 frames are 72 visual tokens."""
RANKS = {"verifier": 24, "drafter": 64}
"""Of LoRA: the drafter has few layers to learn in."""
_SPARE = 64
"""Rows of the verifier's embeddings behind its text tokens, as in the real pair."""
_TARGETS = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def new_model(role: str, *, seed: int, layers: int, embedded: Path = loading.EMBEDDED
              ) -> tuple[nn.Module, Parts]:
    """A model at the beginning of its training, and its parts. layers: of the drafter; the verifier
    has all there are. embedded: the pair whose towers and projectors it begins with."""
    torch.manual_seed(seed)
    folder = base.decoder_folder()
    raw = checkpoint_files.read_config(folder)
    tower = checkpoint_files.read_json(embedded / role / "config.json")["vision_config"]
    text = LlamaConfig.from_dict(raw).to_dict() | {"tie_word_embeddings": True}
    if role == "drafter":
        config = EventGPTConfig(**text | {"num_hidden_layers": layers}, vision_config=tower)
        make, body_of, prefix = EventGPTForCausalLM, lambda model: model.model, "model."
    else:
        at = text["vocab_size"]
        n_visual = models.N_VIDEO_FRAMES * (tower["image_size"] // tower["patch_size"] // POOL)**2
        config = VideoLlavaConfig(
            vision_config=tower, text_config=text | {"vocab_size": at + _SPARE},
            image_token_index=at + 1, video_token_index=at + 2, vision_feature_layer=-2,
            vision_feature_select_strategy="default", video_seq_length=n_visual,
            projector_hidden_act="gelu", tie_word_embeddings=True, video_pool=POOL)
        make, body_of = PooledVideoLlava, lambda model: model.model.language_model
        prefix = "model.language_model."
    with quiet():
        model = make(config)
    text = config.get_text_config()
    words = base.decoder_tensors(folder, text.num_hidden_layers, text.vocab_size, prefix)
    model.load_state_dict(words, strict=False)
    model.tie_weights()
    _begin_as(model, role, embedded, words[f"{prefix}embed_tokens.weight"])
    model.requires_grad_(False)
    body = body_of(model)
    rank = RANKS[role]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS),
                                 body)
    return model, _parts(model, body, role)


def _begin_as(model: nn.Module, role: str, embedded: Path, words: Tensor) -> None:
    """The tower of the embedded pair's model, and its projector, whose results are turned into the
    wider space and moved to where words are, at their length."""
    with quiet():
        old = getattr(loading, f"load_{role}")(embedded / role).model.state_dict()
    own = model.state_dict()
    shared = {name: value for name, value in old.items() if "_tower." in name}
    first, *inner, last = (("model.visual_projector.0", "model.visual_projector.2",
                            "model.feature_adaptor") if role == "drafter" else
                           ("model.multi_modal_projector.linear_1",
                            "model.multi_modal_projector.linear_2"))
    narrow, wide = old[f"{last}.weight"].shape[0], own[f"{last}.weight"].shape[0]
    turn = torch.linalg.qr(torch.randn(wide, narrow)).Q * words.norm(dim=1).mean() / narrow**0.5
    for name in (first, *inner):
        for kind in ("weight", "bias"):
            value, given = own[f"{name}.{kind}"].clone(), old[f"{name}.{kind}"]
            value[tuple(slice(size) for size in given.shape)] = given
            shared[f"{name}.{kind}"] = value
    value = own[f"{last}.weight"].clone()
    value[:, :narrow] = turn @ old[f"{last}.weight"]
    shared |= {f"{last}.weight": value,
               f"{last}.bias": turn @ old[f"{last}.bias"] + words.mean(0)}
    model.load_state_dict(shared, strict=False)


def _parts(model: nn.Module, body: nn.Module, role: str) -> Parts:
    """As models.drafter_parts and models.verifier_parts, but trained beside the decoder: LoRA and
    the norms."""
    parts = (models.drafter_parts if role == "drafter" else models.verifier_parts)(model)
    model.set_attn_implementation("sdpa")  # rows of 600 positions: the scores would fill memory
    beside = [part for name, part in body.named_modules() if name == "norm" or (
        name.startswith("layers.") and name.endswith((".lora_A", ".lora_B", "layernorm")))]
    parts = replace(parts, decoder=nn.ModuleList(beside))
    if role == "verifier":
        projector, frames = model.model.multi_modal_projector, models.N_VIDEO_FRAMES

        def project(states: Tensor) -> Tensor:
            return projector(states.flatten(0, 1)).unflatten(0, states.shape[:2]).flatten(1, 2)

        parts = replace(parts, project=project,
                        patches=lambda tokens: tokens.unflatten(1, (frames, -1)))
    for part in (parts.tower, parts.projector, parts.decoder):
        part.requires_grad_(True)
    return parts


def tuned(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, float16, as xsd.models.base puts it together."""
    found = {}
    for name, tensor in model.state_dict().items():
        plain, _, kind = name.partition(".lora_")
        if kind:
            found[f"{plain}.weight.lora_{kind[0]}"] = tensor
        elif "_tower." in name or "projector" in name or "adaptor" in name or (
                "norm" in name.rsplit(".", 2)[-2]):
            found[name] = tensor
    return {name: tensor.to(torch.float16).contiguous().cpu() for name, tensor in found.items()
            if "image_tower." not in name}


def save(folder: Path, trained: Mapping[str, nn.Module]) -> None:
    """Write what was trained of both models, their configurations and pair.json, for
    loading.load_pair."""
    for role, model in trained.items():
        (folder / role).mkdir(parents=True, exist_ok=True)
        save_file(tuned(model), folder / role / base.TUNED, metadata={"format": "pt"})
        config = json.loads(model.config.to_json_string(use_diff=False))
        kind = type(model).__mro__[role == "verifier"].__name__
        write_json(folder / role / "config.json", config | {"architectures": [kind]})
        PixelSpec(models.IMAGE_SIZE, models.IMAGE_SIZE).write(folder / role)
    write_json(folder / "pair.json", {
        "name": "smollm2", "base": base.SMOLLM2, "event_canvas": "sensor",
        "n_event_frames": models.N_EVENT_FRAMES})
