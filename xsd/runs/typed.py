"""What a notebook's parameters may be: the base of their models, kinds of values that several
notebooks take, reading from a command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from xsd import files
from xsd.core import ParameterError


class NotebookParameters(BaseModel):
    """What every notebook takes. Strict types (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    notebook: ClassVar[str] = ""

    run_dir: str = Field("runs/smoke", min_length=1,
                         description="folder of the run, which its notebooks share")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything that draws")

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters among a notebook's globals. Raises: ParameterError."""
        return cls.checked({name: namespace[name]
                            for name in cls.model_fields if name in namespace})

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """A model of ``values``. Raises: ParameterError naming the notebook, the parameter, what
        was given and what is expected."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first, known = error.errors()[0], cls.model_fields
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ParameterError(f"notebook {cls.notebook} has no parameter {name!r}: "
                                 f"{hint(name, known)}it takes {', '.join(known)}")
        why = first["msg"].removeprefix("Value error, ")
        raise ParameterError(
            f"parameter {name!r} of notebook {cls.notebook} cannot be {first['input']!r}: "
            f"{why[0].lower()}{why[1:]} ({known[first['loc'][0]].description})")


def hint(name: str, known: Iterable[str]) -> str:
    """``"did you mean …? "`` where a known name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


# --- one's own parts, by name: known here by their form alone, imported where they are used

LEVELS = ("L1", "L2", "L3", "L4", "L5", "L5F", "X1", "B1")
ARMS = ("ar", "ar_all_cores", "hf_generate", "hf_prompt_lookup", "drafter", "ngram",
        "prompt_lookup")
SPELLINGS = {"vl_baseline": "ar", "VL": "ar"}
"""The reference's names of arms, and ours; the verifier alone is also what may follow a prefill."""


def _own(value: Any) -> bool:
    return isinstance(value, str) and ":" in value.strip(":")


def _level(value: Any, *more: str) -> Any:
    """A level of ours by name, an adapter's file or folder, "module:Class", or a class or module
    with reads, shift and forward."""
    if value in (*LEVELS, *more) or files.is_path(value) or _own(value) or all(
            hasattr(value, name) for name in ("reads", "shift", "forward")):
        return value
    raise ValueError(f"input should be one of {', '.join((*LEVELS, *more))}, an adapter's file or "
                     "folder, or a class of your own as module:Class (docs/extending.md)")


def _trained_level(value: Any) -> Any:
    if files.is_path(value):
        raise ValueError("an adapter's file is trained already; name a level to train")
    return _level(value, "L6")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else files.name_of(value)


def _arm(value: Any) -> str:
    """An arm of ours, a level, an adapter's file or folder, one of your own as "module:Class", or
    two of them joined by +; settings behind @ or ~ are read where the arm is made. The reference's
    spellings (vl_baseline, L4+VL) become ours."""
    kind, *settings = re.split("(?=[@~])", value if isinstance(value, str) else "", maxsplit=1)
    parts = [SPELLINGS.get(part, part) for part in kind.split("+")]
    if len(parts) <= 2 and all(part in (*ARMS, *LEVELS) or files.is_path(part) or _own(part)
                               for part in parts):
        return "+".join(parts) + "".join(settings)
    raise ValueError(f"input should be one of {', '.join(ARMS)}, a level ({', '.join(LEVELS)}), an "
                     "adapter's file or folder, a proposer of your own as module:Class "
                     "(docs/extending.md), or two joined by +, such as L1+ngram (vl_baseline and "
                     "L4+VL are understood)")


def _column(value: Any) -> Any:
    """A metric column of one's own: "module:function", or the function."""
    if _own(value) or callable(value):
        return value
    raise ValueError("input should be a function of the token table, as module:function "
                     "(docs/extending.md)")


Level = Annotated[Any, PlainValidator(_level), PlainSerializer(_plain)]
TrainedLevel = Annotated[Any, PlainValidator(_trained_level), PlainSerializer(_plain)]
Arm = Annotated[str, PlainValidator(_arm)]
Column = Annotated[Any, PlainValidator(_column), PlainSerializer(files.name_of)]
Timing = Annotated[str | dict[str, float], Field(
    description="times that speed-ups are predicted from: reference (its quoted RTX 4090), "
    "measured (by notebook 05 of this run), or own ones in ms as a mapping or a JSON file")]
Mode = Literal["free_running", "teacher_forced"]
Dtype = Literal["fp32", "fp16", "bf16", "int8"]
Quant = Annotated[Literal["", "8bit", "4bit"],
                  BeforeValidator(lambda given: {"int8": "8bit", "int4": "4bit"}.get(
                      given, given) if isinstance(given, str) else given),
                  Field(description="quantise the decoders' linear layers: 8bit, 4bit; empty: "
                        "not at all")]

# --- what several notebooks take


def whole(default: int, low: int, high: int, text: str) -> Any:
    """The Field of a whole number from low to high."""
    return Field(default, ge=low, le=high, description=text)


def _count(low: int, high: int, text: str) -> Any:
    """The type of a whole number from low to high."""
    return Annotated[int, Field(ge=low, le=high, description=text)]


Levels = Annotated[list[Level], Field(min_length=1, description="trained levels to evaluate")]
PairName = Annotated[str, Field(min_length=1, description="embedded (the shipped pair), or a "
                                "folder with drafter/ and verifier/")]
TrainData = Annotated[str, Field(min_length=1, description="training set, from notebook 01")]
TestData = Annotated[list[str], Field(min_length=1, description="held-out sets, from notebook 01")]
Head = Annotated[str, Field(description="LM head of the verifier by path (a file, or a folder "
                            "whose shards hold one); empty: the one stored with the pairs")]
HeldOutMode = Annotated[Mode, Field(description="which held-out pairs to evaluate on")]
Threshold = Annotated[float, Field(gt=-1, lt=1, description="cosine threshold τ")]
Thresholds = Annotated[list[float], Field(min_length=1,
                                          description="all cosine thresholds that are counted")]
Rate = Annotated[float, Field(gt=0, lt=1,
                              description="AdamW's peak rate; lower it for wide models")]
Gamma = _count(1, 64, "draft tokens a round")
GammaPrefill = _count(1, 4096, "most draft tokens behind the verifier's prefill")
TopK = _count(1, 254, "how many of the head's best tokens count as top-k")
Positions = _count(1, 4096, "positions shown by the per-position curve")
Resamples = _count(50, 100_000, "bootstrap resamples, drawn by sequence")
AtATime = _count(1, 65_536, "answers at a time")
AStep = _count(1, 65_536, "answers a step")
Epochs = _count(1, 10_000, "longest training, in epochs")
NewTokens = _count(1, 4096, "longest answer, in tokens")
Simulators = _count(1, 256, "processes that simulate drives")
Asked = _count(1, 50, "questions a sequence is asked, each on one of its clips")
ClipMs = _count(1, 3_600_000, "length of a clip")
HopMs = _count(1, 3_600_000, "from one clip's start to the next one's")


# --- from a command line


def read_values(pairs: list[str], model: type[NotebookParameters]) -> dict[str, Any]:
    """``["levels=L1,L4", "seed=3"]`` as typed values: text for text fields, otherwise YAML; a comma
    makes a list where one is expected. Raises: ParameterError."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not (name and sign):
            raise ParameterError(f"a parameter is written name=value, not {pair!r}")
        kind = model.model_fields[name].annotation if name in model.model_fields else None
        number = float in (kind, *(getattr(one, "__origin__", one) for one in get_args(kind)))
        if str(kind).startswith("list") and not text.lstrip().startswith("["):
            text = f"[{text}]"
        try:
            values[name] = text if kind is str else yaml.safe_load(text)
            if number and isinstance(values[name], str):
                values[name] = float(text)  # YAML reads 1e-3 as text
        except yaml.YAMLError:
            raise ParameterError(f"the value of {name!r} cannot be read: {text!r}; lists are "
                                 "written a,b or [a, b]") from None
        except ValueError:
            raise ParameterError(
                f"the value of {name!r} must be a number, not {text!r}") from None
    return values


def read_grid(axes: list[str], model: type[NotebookParameters]) -> dict[str, list[Any]]:
    """``["seed=0,1", "levels=L1|L4,B1"]`` as typed axes of a grid, split at | where there is one;
    ``level``: ``levels`` with one each. Raises: ParameterError."""
    grid = {}
    for axis in axes:
        name, sign, text = axis.partition("=")
        if not sign:
            raise ParameterError(f"a grid axis is written name=value,value, not {axis!r}")
        name = "levels" if name == "level" and "levels" in model.model_fields else name
        given = [one for one in text.split("|" if "|" in text else ",") if one]
        grid[name] = [read_values([f"{name}={one}"], model)[name] for one in given]
    return grid
