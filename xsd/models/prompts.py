"""The two prompts as token ids, split at the visual tokens (docs/models.md, "Prompts")."""

from __future__ import annotations

from typing import Any

from xsd.core import CheckpointError, DatasetError

DRAFTER_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.")
VIDEO_TOKEN = "<video>"


def prompt_ids(role: str, tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """Ids before the visual tokens (BOS first) and after them. The drafter's sides are tokenised
    each by itself, as the official code does; the verifier's prompt whole, with ``<video>`` as one
    special token, and split there. Raises: DatasetError for an empty question; CheckpointError if
    the verifier's tokenizer has no ``<video>``."""
    if not question.strip():
        raise DatasetError(
            "a question has zero length; give each sample a question with at least one word")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if role == "drafter":
        after = ids(f"<ev_end>\n{question} ASSISTANT:")
        return bos + ids(f"{DRAFTER_SYSTEM} USER: <ev_start>"), after
    place = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    whole = ids(f"USER: {VIDEO_TOKEN}\n{question} ASSISTANT:")
    if place is None or whole.count(place) != 1:
        raise CheckpointError(f"the verifier's tokenizer does not know {VIDEO_TOKEN} as one token; "
                              "use the tokenizer saved with the video checkpoint")
    at = whole.index(place)
    return bos + whole[:at], whole[at + 1:]
