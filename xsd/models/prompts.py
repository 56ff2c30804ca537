"""The two prompts as token ids, split at the visual tokens (docs/models.md, "Prompts")."""

from __future__ import annotations

from typing import Any

from xsd.core import CheckpointError, DatasetError

DRAFTER_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.")
VIDEO_TOKEN = "<video>"


def drafter_prompt_ids(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """Ids before the event tokens (BOS first) and after them, each side tokenised by itself, as
    the official code does. Raises: DatasetError for an empty question."""
    after = _ids(tokenizer, f"<ev_end>\n{_checked(question)} ASSISTANT:")
    return _bos(tokenizer) + _ids(tokenizer, f"{DRAFTER_SYSTEM} USER: <ev_start>"), after


def verifier_prompt_ids(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """Ids before the video tokens (BOS first) and after them: the prompt is tokenised whole with
    ``<video>`` as one special token, as the model's processor does, then split there. Raises:
    DatasetError for an empty question; CheckpointError if the tokenizer has no ``<video>``."""
    place = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    ids = _ids(tokenizer, f"USER: {VIDEO_TOKEN}\n{_checked(question)} ASSISTANT:")
    if place is None or ids.count(place) != 1:
        raise CheckpointError(f"the verifier's tokenizer does not know {VIDEO_TOKEN} as one token; "
                              "use the tokenizer saved with the video checkpoint")
    at = ids.index(place)
    return _bos(tokenizer) + ids[:at], ids[at + 1:]


def _checked(question: str) -> str:
    if not question.strip():
        raise DatasetError(
            "a question has zero length; give each sample a question with at least one word")
    return question


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
