"""``pair.json`` beside extracted pairs: what later steps need of the models, unloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, StrictInt

from xsd import digests
from xsd.runs import folder

if TYPE_CHECKING:
    from xsd.models import loading

NAME = "pair.json"


def save(place: Path, pair: loading.Pair, name: str, questions: set[str], **more: Any) -> None:
    """Write ``pair.json`` beside extracted pairs: what later steps need of the models."""
    verifier = pair.verifier
    prompts = {question: [token for part in verifier.prompt_ids(question) for token in part]
               for question in questions}
    digests.write_sealed(place / NAME, {
        "pair": name, "eos": sorted(verifier.eos_token_ids), "prompt_ids": prompts,
        "token_texts": [verifier.token_text(token) for token in range(verifier.vocab_size)],
        "event_canvas": pair.event_canvas, **more
    })


class _Pair(BaseModel):
    """The fields of ``pair.json`` that all of them have."""

    pair: str
    eos: list[StrictInt]
    prompt_ids: dict[str, list[StrictInt]]
    token_texts: list[str]
    test_data: list[str] = []
    data: str = ""


def read(path: Path) -> dict[str, Any]:
    """Raises: ParameterError where it is damaged, or of another form."""
    again = "run notebook 01 (or xsd data extract) again, which writes it anew"
    found = folder.read_record(path, again)
    with folder.as_written(path):  # pydantic's error is a ValueError
        _Pair.model_validate(found)
    return found
