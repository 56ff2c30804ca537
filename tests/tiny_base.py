"""A small llama whose query heads share keys and whose head is its embeddings, with a byte-level
tokenizer, as a GGUF file and as the checkpoint folder that is made of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from studies.embedded_pair import prose
from xsd.models import gguf
from xsd.models.handle import DRAFTER_SYSTEM

WIDTH, INNER, LAYERS, HEADS, SHARED = 192, 256, 4, 6, 2
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SHAPES = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH),
           "attn_k": (WIDTH * SHARED // HEADS, WIDTH), "attn_v": (WIDTH * SHARED // HEADS, WIDTH),
           "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
           "ffn_down": (WIDTH, INNER)}


def _value(value) -> bytes:
    """A value with its kind before it."""
    kinds = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8 if isinstance(value[0], str) else 5, len(value)) + b"".join(
            struct.pack("<Q", len(one.encode())) + one.encode() if isinstance(one, str) else
            struct.pack("<i", one) for one in value)
    kind, form = kinds[type(value)]
    return struct.pack(f"<I{form}", kind, value)


def write(path: Path, about: dict, tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> None:
    """A GGUF file. tensors: name → kind, shape, bytes."""
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(about))
    for name, value in about.items():
        out += _value(name)[4:] + _value(value)
    at, blob = 0, b""
    for name, (kind, shape, data) in tensors.items():
        out += _value(name)[4:] + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind,
                                              at)
        blob += data + bytes(-len(data) % 32)
        at = len(blob)
    path.write_bytes(out + bytes(-len(out) % 32) + blob)


def make_gguf(path: Path) -> Path:
    """The llama, its products in Q4_1 and its embeddings in Q8_0, as the package has them."""
    rng = np.random.default_rng(0)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [DRAFTER_SYSTEM, *map(str, vars(prose).values()), "USER: ASSISTANT: <ev_start>"]
    words.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=640, special_tokens=_SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made = json.loads(words.to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    about = {
        "general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
        "llama.block_count": LAYERS, "llama.context_length": 1024, "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": SHARED, "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in _SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in made["merges"]],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0}

    def packed(kind: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], bytes]:
        if kind == 0:
            return 0, shape, np.ones(shape, np.float32).tobytes()
        blocks = int(np.prod(shape)) // 32
        scale = np.full((blocks, 1), 0.02 if kind == 3 else 0.004, np.float16).view(np.uint8)
        low = np.full((blocks, 1 if kind == 3 else 0), -0.15, np.float16).view(np.uint8)
        codes = rng.integers(0, 256, (blocks, 16 if kind == 3 else 32), dtype=np.uint8)
        return kind, shape, np.concatenate([scale, low, codes], axis=1).tobytes()

    tensors = {"token_embd.weight": packed(8, (len(tokens), WIDTH)),
               "output_norm.weight": packed(0, (WIDTH,))}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}.weight": packed(0 if "norm" in name else 3, shape)
                    for name, shape in _SHAPES.items()}
    write(path, about, tensors)
    return path


def make_base(folder: Path) -> Path:
    """The checkpoint folder of :func:`make_gguf`."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf.convert(make_gguf(folder / "made.gguf"), folder)
    (folder / "made.gguf").unlink()
    return folder
