"""A random-weight pair of the real classes, small enough to write and load in a second, and random
samples for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from xsd import core, files
from xsd.models import loading
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import DRAFTER_SYSTEM
from xsd.models.pixels import PixelSpec

QUESTIONS = ("What is on the road?", "What colour is the car?", "How does the car move?",
             "Describe the scene in detail.")
_SENTENCES = (*QUESTIONS, DRAFTER_SYSTEM, "USER: ASSISTANT: <ev_start> <ev_end>",
              "A red car drives ahead of the camera on the left lane.",
              "The bus stands at the traffic light while two people cross the road.",
              "It is night and the street is empty except for a cyclist.",
              )
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "projection_dim": 16,
}


def tiny_tokenizer(*added: str) -> LlamaTokenizer:
    """A Llama tokenizer of a few hundred pieces: specials, the 256 bytes, letters and merges of a
    few sentences; then ``added``."""
    core_tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first",
                                                            split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>",
                        *(f"<0x{i:02X}>" for i in range(256))], show_progress=False)
    core_tokenizer.train_from_iterator(_SENTENCES, trainer)
    model = json.loads(core_tokenizer.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=model["vocab"],
                               merges=[tuple(pair) for pair in model["merges"]], legacy=False)
    if added:
        tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def make_tiny_pair(folder: str | Path, seed: int = 0, *, hidden_size: int = 32,
                   drafter_layers: int = 2, verifier_layers: int = 3) -> Path:
    """Write drafter/, verifier/ and pair.json into ``folder`` (random weights from ``seed``) for
    loading.load_pair. Returns the folder."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        text = len(tokenizer)
        llama = {
            "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size,
            "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.3,
            "max_position_embeddings": 512, "pad_token_id": 0,
        }
        drafter = EventGPTForCausalLM(
            EventGPTConfig(vocab_size=text, num_hidden_layers=drafter_layers,
                           vision_config=dict(VISION), **llama))
        verifier = VideoLlavaForConditionalGeneration(
            VideoLlavaConfig(
                vision_config=CLIPVisionConfig(**VISION),
                text_config=LlamaConfig(vocab_size=text + 64, num_hidden_layers=verifier_layers,
                                        **llama), image_token_index=text,
                video_token_index=text + 1,
            ))
        pixels = PixelSpec(28, 28)
        loading.save_checkpoint(folder / "drafter", drafter, tokenizer, pixels)
        loading.save_checkpoint(folder / "verifier", verifier,
                                tiny_tokenizer("<image>", "<video>", "<pad>"), pixels)
    files.write_json(folder / "pair.json",
                    {"name": "tiny", "n_event_frames": 5, "event_canvas": "sensor"})
    return folder


def make_samples(n: int, seed: int = 0, *, n_event_frames: int = 5,
                 sequences: int = 2) -> list[core.Sample]:
    """n samples of random images, four questions a clip, clips spread over ``sequences``
    sequences."""
    generator = np.random.default_rng(seed)
    samples: list[core.Sample] = []
    for clip in range(-(-n // len(QUESTIONS))):
        frames = [
            generator.integers(0, 256, (36, 48, 3), dtype=np.uint8) for _ in range(n_event_frames)
        ]
        video = generator.integers(0, 256, (8, 36, 48, 3), dtype=np.uint8)
        for question in QUESTIONS:
            samples.append(
                core.Sample(f"seq{clip % sequences:02d}", f"{clip:06d}", question, frames, video,
                            (clip * 500_000, clip * 500_000 + 1_000_000), "test", "random",
                            ))
    return samples[:n]
