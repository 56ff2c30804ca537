"""A llama in one GGUF file, as some packages carry it, written out as a checkpoint folder: numbers
unpacked from their blocks, names, rotation and byte-level tokenizer as transformers has them."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xsd.core import CheckpointError
from xsd.files import write_json

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Kinds of a value, as struct writes them; besides them a text and a list."""
_TEXT, _LIST = 8, 9
_BLOCKS = {0: (1, 4), 1: (1, 2), 3: (32, 20), 8: (32, 34)}
"""Kind of a tensor (F32, F16, Q4_1, Q8_0) → numbers and bytes of a block."""
_PLACES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
           "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
           "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL = 3


def convert(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (float16) and the tokenizer of a GGUF file into
    ``folder``. Raises: CheckpointError for a damaged file, and for what is no llama with a
    byte-level tokenizer in the kinds of numbers read here."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        about, tensors = _read(path, data)
        said = about.get("general.architecture"), about.get("tokenizer.ggml.model")
        if said != ("llama", "gpt2"):
            raise CheckpointError(f"{path} holds a {said[0]} with the tokenizer {said[1]}; a llama "
                                  "with a byte-level one (gpt2) is expected")
        try:
            config = _config(about, tied="output.weight" not in tensors)
            heads = {"attn_q": config["num_attention_heads"],
                     "attn_k": config["num_key_value_heads"]}
            found = {}
            for name, values in tensors.items():
                _, _, place = name.removesuffix(".weight").rpartition(".")
                numbers = torch.from_numpy(values())
                if place in heads:  # rows of a head: pairs beside each other → halves
                    numbers = numbers.unflatten(0, (heads[place], -1, 2)).transpose(1, 2)
                    numbers = numbers.flatten(0, 2)
                found[_named(name)] = numbers.to(torch.float16).contiguous()
            tokenizer = _tokenizer(about, config["max_position_embeddings"])
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{path} is no llama as llama.cpp writes it ({error!r:.100}); "
                                  "fetch it again") from error
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", config)


def _named(name: str) -> str:
    first, _, rest = name.removesuffix(".weight").partition(".")
    if first == "blk":
        number, _, place = rest.partition(".")
        return f"model.layers.{int(number)}.{_PLACES[place]}.weight"
    return f"{_OUTSIDE[first]}.weight"


def _config(about: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    def of(name: str) -> Any:
        return about[f"llama.{name}"]

    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": of("embedding_length"), "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"), "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"), "tie_word_embeddings": tied,
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": of("rope.freq_base")},
        "vocab_size": len(about["tokenizer.ggml.tokens"]),
        "bos_token_id": about["tokenizer.ggml.bos_token_id"],
        "eos_token_id": about["tokenizer.ggml.eos_token_id"],
    }


def _tokenizer(about: dict[str, Any], longest: int) -> PreTrainedTokenizerFast:
    words = about["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    kinds = about["tokenizer.ggml.token_type"]
    core.add_special_tokens([w for w, kind in zip(words, kinds, strict=True) if kind == _CONTROL])
    named = {f"{role}_token": words[about[f"tokenizer.ggml.{key}_token_id"]]
             for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=longest,
                                   clean_up_tokenization_spaces=False, **named)


def _read(path: Path, data: mmap.mmap
          ) -> tuple[dict[str, Any], dict[str, Callable[[], np.ndarray]]]:
    """What the file says of itself, and its tensors, unpacked when they are called."""
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        at += (size := struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, data, at - size)[0]

    def text() -> str:
        return take(f"{take('Q')}s").decode()

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return text()
        if kind != _LIST:
            return take(_NUMBERS[kind])
        inner, n = take("I"), take("Q")
        if inner == _LIST or n > len(data):
            raise ValueError("a list of lists, or longer than the file")
        return [value(inner) for _ in range(n)]

    try:
        if (magic := take("4s"), version := take("I")) != (b"GGUF", 3):
            raise CheckpointError(f"{path} begins with {magic!r}, version {version}; a GGUF file "
                                  "of version 3 is expected")
        n_tensors, n_about = take("Q"), take("Q")
        about = {text(): value(take("I")) for _ in range(n_about)}
        rows = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q"))
                for _ in range(n_tensors)]
        start = -(-at // (step := about.get("general.alignment", 32))) * step
        return about, {name: _tensor(data, start + offset, shape[::-1], kind)
                       for name, shape, kind, offset in rows}
    except (struct.error, KeyError, ValueError, TypeError, OverflowError, MemoryError,
            ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is a damaged GGUF file, or of numbers not read here (F32, "
                              f"F16, Q4_1, Q8_0): {error!r:.100}; fetch it again") from error


def _tensor(data: mmap.mmap, start: int, shape: list[int], kind: int) -> Callable[[], np.ndarray]:
    numbers, size = _BLOCKS[kind]
    count = int(np.prod(shape, dtype=object))
    if count % numbers or start + count // numbers * size > len(data):
        raise ValueError(f"a tensor of shape {shape} reaches beyond the end")

    def values() -> np.ndarray:
        raw = np.frombuffer(data, np.uint8, count // numbers * size, start)
        return _unpacked(raw.reshape(-1, size).copy(), kind).reshape(shape)

    return values


def _unpacked(blocks: np.ndarray, kind: int) -> np.ndarray:
    """float32 of blocks uint8 [n, bytes]."""
    if kind == 0:
        return blocks.view(np.float32)
    if kind == 1:
        return blocks.view(np.float16).astype(np.float32)
    if kind == 8:  # a scale, then 32 whole numbers
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return scale * blocks[:, 2:].view(np.int8)
    scale, low = np.split(blocks[:, :4].copy().view(np.float16).astype(np.float32), 2, axis=1)
    fours = blocks[:, 4:]  # Q4_1: the first 16 numbers in the lower halves
    return scale * np.concatenate([fours & 15, fours >> 4], axis=1) + low
