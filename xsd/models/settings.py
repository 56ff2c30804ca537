"""What a checkpoint's settings ask of the engine: what it cannot do is refused when the model is
loaded (docs/models.md, "What the engine cannot do"); what it does not use is said."""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import logging as hf_logging

from xsd.core import CheckpointError
from xsd.models import checkpoint_files

DECODERS = ("EventChat_llama", "llama", "mistral", "qwen2", "qwen3")
POSITIONS = ("default", "linear", "llama3", "yarn")
"""Rotations that a position keeps however long the text grows."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "layer_types")
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "num_beams": 1,
            "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1.0,
            "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0}
_NO_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length",
              "max_new_tokens", "use_cache", "output_attentions", "output_hidden_states",
              "return_dict_in_generate", "_from_model_config", "cache_implementation")
"""Settings of generation_config.json that change no greedy token, or that the caller gives."""

MOST_ADDED = 20_000
"""Tokens added to a vocabulary."""
_LONGEST_TOKEN, _LONGEST_RULES, _MOST_GROWTH = 1000, 20_000, 64
"""Characters of a token and of a tokenizer's rules; how much longer these may make a text."""
_RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_KINDS = {"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents",
          "Prepend", "Replace", "ByteLevel", "BertNormalizer", "Split", "Metaspace", "Whitespace",
          "WhitespaceSplit", "Punctuation", "Digits", "BertPreTokenizer", "CharDelimiterSplit",
          "UnicodeScripts", "FixedLength", "TemplateProcessing", "BertProcessing",
          "RobertaProcessing", "ByteFallback", "Fuse", "WordPiece", "BPEDecoder", "CTC"}
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERNS = {_WORDS % "{1,3}", _WORDS % "",  # Llama 3; Qwen 2 and 3; Mistral
             "|".join((rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
                       rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*", r"\p{N}",
                       r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"))}
"""Patterns of the decoders read here; others must be plain."""
_PLAIN = re.compile(r"\\[sSdDwWnrt]|\\[pP]\{\^?\w+\}|\\\W|\[\^?(?:\\.|[^\]\[\\])+\]"
                    r"|[^\\()\[\]{}*+?]")


def check_decoder(config: Any, folder: Path) -> None:
    """Raises: CheckpointError for a decoder that cannot be rolled back or whose positions change
    with the length of the text, naming the setting."""
    text, file = config.get_text_config(), folder / "config.json"
    if text.model_type not in DECODERS:
        raise CheckpointError(
            f"{folder} has a decoder of type {text.model_type!r}; caches are rolled back and grown "
            f"here as {', '.join(DECODERS[1:])} allow, and others have not been tried")
    with checkpoint_files.answered(file):
        kinds = {type(layer).__name__ for layer in DynamicCache(config=text).layers}
    if kinds - {"DynamicLayer"}:
        said = [f"{name}={value!r}" for name in _WINDOWS if (value := getattr(text, name, None))]
        raise CheckpointError(f"{file} sets {', '.join(said)[:200]}: layers that see a window of "
                              "the text forget what a rollback must bring back; give a model with "
                              "full attention, or set them to null")
    rope = dict(getattr(text, "rope_parameters", None) or {})
    rope.setdefault("partial_rotary_factor", getattr(text, "partial_rotary_factor", None) or 1.0)
    for each in (one for one in (rope, *rope.values()) if isinstance(one, dict)):
        kind, theta = each.get("rope_type", "default"), each.get("rope_theta", 1.0)
        part = each.get("partial_rotary_factor", 1.0)
        if kind not in POSITIONS or part != 1 or not (isinstance(theta, (int, float)) and
                                                      theta > 0):
            raise CheckpointError(f"{file} sets rope_type={kind!r}, rope_theta={theta!r}, "
                                  f"partial_rotary_factor={part!r}; whole rotations of "
                                  f"{', '.join(POSITIONS)} with a base above 0 stay as they are "
                                  "when the text grows, and only those can be rolled back")


def neutral(folder: Path, model: Any, tokenizer: Any) -> str:
    """Give the model greedy decoding without settings, and the first end-of-answer ids that
    generation_config.json, config.json or the tokenizer name. Returns: what of the file is not
    used, in a sentence, or nothing. Raises: CheckpointError for ids that are none."""
    path, text = folder / "generation_config.json", model.config.get_text_config()
    given = checkpoint_files.read_json(path) if path.is_file() else {}
    named = [given.get("eos_token_id"), text.eos_token_id, tokenizer.eos_token_id]
    found = next((value for value in named if value not in (None, [])), None)
    ids, size = found if isinstance(found, list) else [found], text.vocab_size
    if any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < size for one in ids):
        raise CheckpointError(f"{folder}: the end of an answer is {found!r}, but an id from 0 to "
                              f"{size - 1} (or several) is expected; write eos_token_id into "
                              "generation_config.json")
    model.generation_config = GenerationConfig(
        eos_token_id=ids if len(ids) > 1 else ids[0], bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    unused = [f"{name}={str(value)[:40]}" for name, value in given.items()
              if name not in _NO_TOKENS and value not in (None, 0, [], {}, _NEUTRAL.get(name))]
    return (f"{path} sets {', '.join(unused)}: not used, every answer here is the model's plain "
            "greedy one" if unused else "")


def read_tokenizer(folder: Path, config: Any) -> Any:
    """The folder's tokenizer, without running code of it. config: the model's own, lest the file be
    read again, unchecked. Raises: CheckpointError."""
    there = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if not there:
        raise CheckpointError(f"{folder} holds no tokenizer.json or tokenizer.model; copy the "
                              "tokenizer files of the original checkpoint there")
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        found = checkpoint_files.read_json(path) if path.is_file() else {}
        added = found.get("added_tokens_decoder") or found.get("added_tokens") or ()
        if not isinstance(added, (dict, list, tuple)) or len(added) > MOST_ADDED:
            raise CheckpointError(f"{path} adds tokens without a bound; up to {MOST_ADDED} are "
                                  "expected, copy it again from the original checkpoint")
        check_rules(found, path)
        if found.get("init_inputs") or found.get("fast_tokenizer_files"):
            raise CheckpointError(f"{path} names files of its own choice (init_inputs or "
                                  "fast_tokenizer_files); delete these, tokenizer.json is read")
    with quiet(), checkpoint_files.answered(folder / there[0]):
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False,
                                             local_files_only=True)


def check_rules(found: dict[str, Any], path: Path) -> None:
    """What a tokenizer.json does to a text, bounded before it is compiled. Raises: CheckpointError
    for rules that could take for ever, make a text grow without end, or draw at random."""
    def refused(why: str) -> CheckpointError:
        return CheckpointError(f"{path} {why}; copy it again from the original checkpoint, or give "
                               "a tokenizer as those of Llama, Mistral and Qwen are written")

    model = found.get("model") if isinstance(found.get("model"), dict) else {}
    vocab = model.get("vocab") or ()
    texts = vocab if isinstance(vocab, dict) else [one[0] for one in vocab if one and isinstance(
        one, list)]
    added = [one.get("content") for one in found.get("added_tokens") or () if isinstance(one, dict)]
    longest = max((len(text) for text in (*texts, *added) if isinstance(text, str)), default=0)
    if longest > _LONGEST_TOKEN:
        raise refused(f"has a token of {longest} characters, and one may have {_LONGEST_TOKEN}")
    if model.get("dropout"):
        raise refused(f"draws its tokens at random (dropout {model['dropout']!r})")
    rules, growth = [found.get(name) for name in _RULES], 1.0
    if (size := len(json.dumps(rules))) > _LONGEST_RULES:
        raise refused(f"has rules of {size} characters, and {_LONGEST_RULES} are read")
    while rules:
        rule = rules.pop()
        rules += rule.values() if isinstance(rule, dict) else rule if isinstance(rule, list) else ()
        if not isinstance(rule, dict):
            continue
        kind, pattern, content = rule.get("type"), rule.get("Regex"), rule.get("content")
        if isinstance(kind, str) and kind not in _KINDS:
            raise refused(f"has a rule of the kind {kind[:40]!r}, which is not read")
        if isinstance(pattern, str) and pattern not in _PATTERNS and not _is_plain(pattern):
            raise refused(f"splits by the pattern {pattern[:80]!r}, which some texts could keep "
                          "busy for ever")
        if isinstance(content, str):
            before = rule.get("pattern")
            plain = before.get("String") if isinstance(before, dict) else None
            growth *= max(1.0, (len(content) + 1) / (len(plain or "") + 1))
    if growth > _MOST_GROWTH:
        raise refused(f"may make a text {growth:.3g} times as long")


def _is_plain(pattern: str) -> bool:
    """No group, nothing to look back at, and one repetition at most: quadratic at the worst."""
    left = _PLAIN.sub("", pattern)
    return len(left) <= 2 and set(left) <= set("*+?") and len(left.replace("?", "")) <= 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars and notes off for a while: loading checks by itself."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
