"""The embedded pair's bodies: tokenizer, drafter and verifier at a size that two CPU cores can
train.

The classes are the real ones (EventGPT's architecture, transformers' Video-LLaVA); only widths and
depths are small. Both share hidden size and tokenizer; the verifier has three times the drafter's
layers and four times its visual tokens, as the 7B pair has 3.5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from xsd.files import write_json
from xsd.models import handle as handles
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.pixels import PixelSpec

IMAGE_SIZE = 96
HIDDEN_SIZE = 192
N_EVENT_FRAMES, N_VIDEO_FRAMES = 5, 8
_HEADS, _INTERMEDIATE = 3, 512
_TOWER = {
    "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
    "image_size": IMAGE_SIZE, "projection_dim": 128, "hidden_act": "gelu",
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A Llama-style BPE tokenizer (<unk> 0, <s> 1, </s> 2, word starts marked ▁) trained on the
    texts and both prompts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("\n"), "isolated"),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.Punctuation("isolated"),
    ])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = [chr(c) for c in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"],
                                  initial_alphabet=alphabet, show_progress=False)
    fixed = [f"{handles.DRAFTER_SYSTEM} USER: <ev_start>", "<ev_end>\n", " ASSISTANT:", "USER: "]
    tokenizer.train_from_iterator([*fixed * 50, *texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                             special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", pad_token="<unk>", model_max_length=2048,
                                   clean_up_tokenization_spaces=False)


def _llama(vocab_size: int, layers: int, pad: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size, "hidden_size": HIDDEN_SIZE, "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": layers, "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": pad, "tie_word_embeddings": False,
    }


def new_drafter(vocab_size: int, *, seed: int, layers: int = 4) -> EventGPTForCausalLM:
    """A drafter with random weights: 5 event frames of 65 patches → 70 event tokens, ``layers``
    decoder layers."""
    torch.manual_seed(seed)
    tower = {**_TOWER, "patch_size": 12, "num_hidden_layers": 4}
    return EventGPTForCausalLM(EventGPTConfig(**_llama(vocab_size, layers, 0),
                                              vision_config=tower))


def new_verifier(text_vocab_size: int, *, seed: int,
                 layers: int = 12) -> VideoLlavaForConditionalGeneration:
    """A verifier with random weights: 8 frames of 37 states → 296 video tokens; ids text_vocab_size
    … +2 are padding, image and video, as :func:`verifier_tokenizer` numbers them."""
    torch.manual_seed(seed)
    text = LlamaConfig(**_llama(text_vocab_size + 64, layers, text_vocab_size))
    tower = CLIPVisionConfig(**_TOWER, patch_size=16, num_hidden_layers=5)
    return VideoLlavaForConditionalGeneration(VideoLlavaConfig(
        vision_config=tower, text_config=text, image_token_index=text_vocab_size + 1,
        video_token_index=text_vocab_size + 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=36,
        video_seq_length=N_VIDEO_FRAMES * 37, projector_hidden_act="gelu",
        tie_word_embeddings=False))


@dataclass(frozen=True)
class Parts:
    """A model taken apart for its training (studies.embedded_pair.stages).

    features: pixels [B, F, 3, s, s] → tower states [B, F, P, C]. project: those → visual tokens [B,
    n_visual, D]. decode: embeddings [B, L, D], additive mask [B, 1, L, L], positions [B, L] →
    post-norm states [B, L, D]. decode_lower: the same, through the layers up to ``middle`` only and
    without the norm. middle, early: the decoder layers half and a third of the way up.
    patches: visual tokens [B, n_visual, D] → [B, F, P, D], one per patch, CLS left out;
    patch_frames: which frames those F are. grounding_frames: which frames the tower's pretraining
    looks at (neighbouring video frames teach a per-frame tower little).
    """

    role: str
    tower: nn.Module
    features: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    projector: nn.ModuleList
    decode: Callable[[Tensor, Tensor, Tensor], Tensor]
    decode_lower: Callable[[Tensor, Tensor, Tensor], Tensor]
    decoder: nn.ModuleList
    embed: nn.Embedding
    lm_head: nn.Linear
    middle: nn.Module
    early: nn.Module
    patches: Callable[[Tensor], Tensor]
    patch_frames: tuple[int, ...]
    grounding_frames: tuple[int, ...]
    n_visual: int
    tower_width: int
    prompt_ids: Callable[[Any, str], tuple[list[int], list[int]]]


def _decoder_parts(body: nn.Module, lm_head: nn.Linear) -> dict[str, Any]:
    """The fields of Parts that any decoder has. The lower half shares the body's parameters."""
    lower, n_layers = copy.copy(body), len(body.layers)
    lower._modules = dict(body._modules) | {"layers": body.layers[:n_layers // 2],
                                            "norm": nn.Identity()}

    def through(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, mask, positions: module(
            inputs_embeds=x, attention_mask=mask, position_ids=positions,
            use_cache=False).last_hidden_state

    return {
        "decode": through(body), "decode_lower": through(lower), "lm_head": lm_head,
        "embed": body.embed_tokens, "middle": body.layers[n_layers // 2 - 1],
        "early": body.layers[max(0, n_layers // 3 - 1)],
        "decoder": nn.ModuleList([body.embed_tokens, body.layers, body.norm, lm_head]),
    }


def drafter_parts(model: EventGPTForCausalLM) -> Parts:
    """EventGPT taken apart; plain attention, because fused attention is slower to train at these
    sizes on a CPU."""
    body = model.model
    tower = body.visual_tower
    tower.visual_tower["vision_model"].set_attn_implementation("eager")
    model.set_attn_implementation("eager")

    def project(states: Tensor) -> Tensor:
        tokens = body.feature_adaptor(body.visual_projector(states))
        return torch.cat([tokens.mean(dim=-2), tokens.mean(dim=-3)], dim=-2)

    return Parts(
        role="drafter", tower=tower, project=project,
        features=lambda pixels: tower(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]),
        projector=nn.ModuleList([body.visual_projector, body.feature_adaptor]),
        patches=lambda tokens: tokens[:, None, N_EVENT_FRAMES + 1:],
        patch_frames=(N_EVENT_FRAMES // 2,),  # its patch tokens are averages over the frames
        n_visual=N_EVENT_FRAMES + body.config.n_frame_tokens, tower_width=_TOWER["hidden_size"],
        grounding_frames=tuple(range(N_EVENT_FRAMES)),
        prompt_ids=partial(handles.prompt_ids, "drafter"),
        **_decoder_parts(body, model.lm_head))


def verifier_parts(model: VideoLlavaForConditionalGeneration) -> Parts:
    """Video-LLaVA taken apart; its image tower is not trained: save_pair gives it the video tower's
    weights."""
    tower, projector = model.model.video_tower, model.model.multi_modal_projector
    model.set_attn_implementation("eager")
    layer = model.config.vision_feature_layer

    def features(pixels: Tensor) -> Tensor:
        seen = tower(pixel_values=pixels.flatten(0, 1), output_hidden_states=True)
        return seen.hidden_states[layer].unflatten(0, pixels.shape[:2])

    return Parts(
        role="verifier", tower=tower, features=features,
        project=lambda states: projector(states).flatten(1, 2),
        projector=nn.ModuleList([projector]),
        patches=lambda tokens: tokens.unflatten(1, (N_VIDEO_FRAMES, -1))[:, :, 1:],
        patch_frames=tuple(range(N_VIDEO_FRAMES)),
        n_visual=model.config.video_seq_length, tower_width=_TOWER["hidden_size"],
        grounding_frames=(0, 2, 5, 7), prompt_ids=partial(handles.prompt_ids, "verifier"),
        **_decoder_parts(model.model.language_model, model.lm_head))


def verifier_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The shared tokenizer with the verifier's own special tokens <pad>, <image> and <video> after
    the text vocabulary."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens(
        {"additional_special_tokens": ["<image>", "<video>"], "pad_token": "<pad>"})
    own.padding_side = "left"
    return own


def save_pair(folder: str | Path, drafter: EventGPTForCausalLM,
              verifier: VideoLlavaForConditionalGeneration,
              tokenizer: PreTrainedTokenizerFast) -> None:
    """Write both models (weights as float16), tokenizers, pixel preprocessing and pair.json in the
    layout load_pair reads."""
    folder = Path(folder)
    # a picture is read as a frame is
    verifier.model.image_tower.load_state_dict(verifier.model.video_tower.state_dict())
    for name, model, words in (("drafter", drafter, tokenizer),
                               ("verifier", verifier, verifier_tokenizer(tokenizer))):
        model.to(torch.float16).save_pretrained(folder / name)
        model.to(torch.float32)
        words.save_pretrained(folder / name)
        PixelSpec(IMAGE_SIZE, IMAGE_SIZE).write(folder / name)
    write_json(folder / "pair.json",
               {"name": "embedded", "n_event_frames": N_EVENT_FRAMES, "event_canvas": "sensor"})
