"""What a notebook's parameters may be: the base of their models, and kinds of values that several
notebooks take."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

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
from xsd.core import ParameterError, as_used


class NotebookParameters(BaseModel):
    """What every notebook takes. Strict types (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    notebook: ClassVar[str] = ""

    run_dir: str = Field("runs/smoke", min_length=1,
                         description="folder of the run, which its notebooks share")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything that draws")

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters among a notebook's globals, as used. Raises: ParameterError."""
        return cls.checked({name: namespace[name]
                            for name in cls.model_fields if name in namespace}).as_used()

    def as_used(self) -> Self:
        """The same with what "auto" of device and dtype stands for on this machine."""
        own = [name for name in ("device", "dtype") if hasattr(self, name)]
        found = as_used(*(getattr(self, name) for name in own)) if own else ()
        return self.model_copy(update=dict(zip(own, found, strict=False)))

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """A model of ``values``. Raises: ParameterError naming the notebook, the parameter, what
        was given and what is expected."""
        for name, value in values.items():
            cls.field(name)
            if why := unusual(value):
                raise cls.refusal(name, value, why)
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
        why = first["msg"].removeprefix("Value error, ")
        raise cls.refusal(".".join(map(str, first["loc"])), first["input"], why)

    @classmethod
    def field(cls, name: str) -> Any:
        """The pydantic field of a parameter. Raises: ParameterError where there is none."""
        if name not in (known := cls.model_fields):
            raise ParameterError(f"notebook {cls.notebook} has no parameter {shortened(name)}: "
                                 f"{hint(name, known)}it takes {', '.join(known)}")
        return known[name]

    @classmethod
    def refusal(cls, name: str, value: Any, why: str) -> ParameterError:
        """The error for a value that the parameter ``name`` (``levels.0``: of a list) cannot be."""
        about = cls.model_fields[name.partition(".")[0]].description
        return ParameterError(f"parameter {name!r} of notebook {cls.notebook} cannot be "
                              f"{shortened(value)}: {why[0].lower()}{why[1:]} ({about})")


MAX_TEXT, MAX_LIST, MAX_DEPTH = 10_000, 1000, 8


def unusual(value: Any, depth: int = 0) -> str:
    """Why no parameter may hold this, of whatever type (control characters, numbers that no file
    can hold, sizes that nobody meant, an entry twice); empty where it may."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            return f"it has {len(value)} characters, and a text may have {MAX_TEXT}"
        return "it holds a line break or another character that cannot be printed" if re.search(
            "[\\x00-\\x1f\\x7f\ud800-\udfff]", value) else ""
    if isinstance(value, (int, float)):
        return "" if -2**63 < value < 2**63 else "expected a finite number below 2^63"
    if not isinstance(value, (list, tuple, dict)):
        return ""
    if len(value) > MAX_LIST or depth > MAX_DEPTH:
        return f"a list may have {MAX_LIST} entries, and {MAX_DEPTH} lists in each other"
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return "names in braces must be texts"
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    texts = [one for one in value if isinstance(one, (str, float))]
    if twice := next((one for place, one in enumerate(texts) if one in texts[:place]), None):
        return f"{shortened(twice)} stands in it twice"
    return next(filter(None, (unusual(one, depth + 1) for one in parts)), "")


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value[:200] if isinstance(value, (str, list)) else value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:100]} …"


def hint(name: str, known: Iterable[str]) -> str:
    """``"did you mean …? "`` where a known name is close, or differs in its capitals alone."""
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"did you mean {lower[close[0]]!r}? " if close else ""


# --- one's own parts, by name: known here by their form alone, imported where they are used

LEVELS = ("L1", "L2", "L3", "L4", "L5", "L5F", "X1", "B1", "D1", "D2", "D5F")
BASELINES = ("ar", "ar_all_cores", "hf_generate", "hf_static", "hf_prompt_lookup")
ARMS = (*BASELINES, "drafter", "ngram", "prompt_lookup")
SETTINGS = (r"(@1f)?(@([1-9]|[1-5]\d|6[0-4])(x([1-9]|[1-5]\d|6[0-4]))?)?(~0?\.\d+)?"
            r"(~(cos0?\.\d+|typical))?")
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
    raise ValueError(f"{hint(str(value), (*LEVELS, *more))}input should be one of "
                     f"{', '.join((*LEVELS, *more))}, an adapter's file or "
                     "folder, or a class of your own as module:Class (docs/extending.md)")


def _trained_level(value: Any) -> Any:
    if files.is_path(value):
        raise ValueError("an adapter's file is trained already; name a level to train")
    return _level(value, "L6")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else files.name_of(value)


def _arm(value: Any) -> str:
    """An arm of ours, a level, an adapter's file or folder, one of your own as "module:Class", or
    two of them joined by +, with settings behind @ or ~ where a model or rule drafts. The
    reference's spellings (vl_baseline, L4+VL) become ours."""
    kind, *settings = re.split("(?=[@~])", value if isinstance(value, str) else "", maxsplit=1)
    phases, said = [SPELLINGS.get(part, part) for part in kind.split("+")], "".join(settings)
    parts = [part for phase in phases for part in phase.split("^")]
    alone = [part for part in (parts[:-1] if len(phases) == 2 and phases[1] == "ar" else parts)
             if part in BASELINES]
    if len(phases) <= 2 and re.fullmatch(SETTINGS, said) and (not alone or (len(parts) == 1 and (
            not said or re.fullmatch(r"hf_prompt_lookup@\d+", value)))) and all(
            part in (*ARMS, *LEVELS) or files.is_path(part) or _own(part) for part in parts):
        return "+".join(phases) + said
    guess = next(filter(None, (hint(part, (*ARMS, *LEVELS)) for part in parts
                               if part not in (*ARMS, *LEVELS))), "")
    raise ValueError(f"{guess}input should be one of {', '.join(ARMS)}, a level "
                     f"({', '.join(LEVELS)}), an adapter's file or folder, a proposer of your own "
                     "as module:Class (docs/extending.md), or two that draft joined by +, such as "
                     "L1+ngram (vl_baseline and L4+VL are understood), or several in one tree "
                     "joined by ^, such as ngram^L5F; what drafts may have settings: L4@3, L4@1f, "
                     "L4~0.6, L4@5x16 for trees of 16 nodes, and lossy L4~cos.9 or L4~typical")


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
Arms = Annotated[list[Arm], Field(
    min_length=1, description="arms of one interleaved run, named as in docs/decoding.md; ar is "
    "our own loop, L1+L5F has L1 behind the prefill")]
CheckArms = Annotated[list[Arm], Field(
    min_length=1, description="arms whose ids are compared on every held-out sample")]
Hiding = Annotated[Literal["yes", "no", "auto"], Field(
    description="draft behind the verifier's prefill; auto: where a measurement here says that it "
    "pays")]
Timing = Annotated[str | dict[str, float], Field(
    description="times that speed-ups are predicted from: reference (its quoted RTX 4090), "
    "measured (by notebook 05 of this run), or own ones in ms as a mapping or a JSON file")]
Device = Annotated[str, Field(min_length=1, description="where it is computed: cpu, cuda, cuda:1, "
                              "…; auto: on a GPU if there is one")]
ModelDtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], Field(
    description="numbers the models compute in; auto: bfloat16 on a GPU, float32 on a CPU")]
Mode = Literal["free_running", "teacher_forced"]
Dtype = Literal["fp32", "fp16", "bf16", "int8"]
Contexts = Annotated[list[Literal["verifier", "drafter"]], Field(
    default_factory=list,
    description="all positions of these, for block drafters (D1: verifier, D5F: both)")]
Quant = Annotated[Literal["", "8bit", "4bit", "int4"],
                  BeforeValidator(lambda given: "8bit" if given == "int8" else given),
                  Field(description="quantise the decoders' linear layers: 8bit, 4bit "
                        "(bitsandbytes), int4 (torchao, several rows a pass); empty: not at all")]

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
FloorsData = Annotated[str, Field(
    min_length=1, description="training set, whose answers make the floors")]
TestData = Annotated[list[str], Field(min_length=1, description="held-out sets, from notebook 01")]
Head = Annotated[str, Field(description="LM head of the verifier by path (a file, or a folder "
                            "whose shards hold one); empty: the one stored with the pairs")]
HeldOutMode = Annotated[Mode, Field(description="which held-out pairs to evaluate on")]
Threshold = Annotated[float, Field(gt=-1, lt=1, description="cosine threshold τ")]
TruthThreshold = Annotated[float, Field(
    gt=-1, lt=1, description="cosine threshold τ compared with the token truth")]
Thresholds = Annotated[list[Threshold], Field(
    min_length=1, description="all cosine thresholds that are counted")]
Rate = Annotated[float, Field(gt=0, lt=1,
                              description="AdamW's peak rate; lower it for wide models")]
Gamma = _count(1, 64, "draft tokens a round")
GammaPrefill = _count(1, 4096, "most draft tokens behind the verifier's prefill")
TopK = _count(1, 254, "how many of the head's best tokens count as top-k")
Positions = _count(1, 4096, "positions shown by the per-position curve")
Resamples = _count(50, 100_000, "bootstrap resamples, drawn by sequence")
AtATime = _count(1, 65_536, "answers at a time")
Batch = Annotated[Annotated[int, Field(ge=1, le=1024)] | Literal["auto"], Field(
    description="samples answered at a time; auto: as many as memory and speed allow here")]
AStep = _count(1, 65_536, "answers a step")
Epochs = _count(1, 10_000, "longest training, in epochs")
NewTokens = _count(1, 4096, "longest answer, in tokens")
Simulators = _count(1, 256, "processes that simulate drives")
Asked = _count(1, 50, "questions a sequence is asked, each on one of its clips")
ClipMs = _count(1, 3_600_000, "length of a clip")
HopMs = _count(1, 3_600_000, "from one clip's start to the next one's")
