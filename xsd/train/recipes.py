"""How to train: settings, and the profiles that fill them (docs/adapters.md, section 5)."""

import functools
import reprlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from xsd.core import ParameterError
from xsd.train import objectives

_TOKENS = {
    "objective": "tokens", "batch_size": 16, "learning_rate": 2e-3, "select_by": "token_acceptance",
    "warm_start": "ridge", "prediction_weight": 0.0, "alpha": 1.0,
}
_REFERENCE = {"objective": "mse_cosine", "batch_size": 64, "select_by": "loss"}
PROFILES: dict[str, dict[str, Any]] = {
    "reference": _REFERENCE,
    "converged": {**_REFERENCE, "epochs": 300, "patience": 50},
    "tokens": _TOKENS,
    "rollout": {**_TOKENS, "rollout_steps": 3},
}
_BLOCK = {"objective": "cross_entropy", "learning_rate": 1e-3, "warm_start": "none",
          "batch_size": 12, "schedule": "step", "anchors": 12}
_DEFAULTS = {"epochs": 50, "patience": 10, "rollout_steps": 1, "warm_start": "none",
             "learning_rate": 1e-3}
BEST_BY_LEVEL: dict[str, dict[str, Any]] = {
    "L1": {"objective": "cross_entropy"}, "L2": {"objective": "cross_entropy"},
    "L3": {"objective": "cross_entropy"}, "B1": {"token_fusion": True},
    "D1": _BLOCK, "D2": _BLOCK, "D5F": _BLOCK,
}
"""Where a level's best known recipe differs from "tokens" (docs/recipes.md). What never reads its
own predictions need not stay near the verifier's states; B1, which reads nothing else, is told
which token its prediction became."""


NAMES = ("smoke", "best", *PROFILES)
"""What notebook 02 offers: "best" is what is known to be best for each level, "smoke" that in eight
epochs."""
_LORA = {"batch_size": 4, "accumulation": 4, "learning_rate": 1e-3}


def settings(profile: str, level: Any) -> dict[str, Any]:
    """The arguments of FitConfig for a level, of LoraFitConfig for L6, with one of NAMES."""
    short = {"epochs": 8} if profile == "smoke" else {}
    if level == "L6":
        return {} if profile in ("reference", "converged") else _LORA | short
    if profile in PROFILES:
        return {"profile": profile}
    return {"profile": "tokens", **BEST_BY_LEVEL.get(level, {}), **short}


Count = Annotated[int, Field(gt=0)]
Above0, From0 = Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


@functools.cache
def _types_of(config: type) -> dict[str, TypeAdapter[Any]]:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return {name: TypeAdapter(kind, config=strict)
            for name, kind in get_type_hints(config, include_extras=True).items()}


def check_fields(config: Any) -> None:
    """Raises: ParameterError naming the first field that is not as its annotation says."""
    for name, kind in _types_of(type(config)).items():
        try:
            kind.validate_python(getattr(config, name))
        except ValidationError as error:
            expected = error.errors()[0]["msg"].removeprefix("Input should be ")
            expected = expected.replace("greater than 0", "positive")
            raise ParameterError(f"{name} must be {expected}, not "
                                 f"{reprlib.repr(getattr(config, name))}") from error


@dataclass(frozen=True)
class FitConfig:
    """How to train. Fields left at None take their profile's value; what was used is saved in
    config.json. What each is for: docs/adapters.md, section 5."""

    profile: Literal["reference", "converged", "tokens", "rollout"] = "reference"
    objective: str | None = None  # terms by name, see objectives.parse
    epochs: Count | None = None
    batch_size: Count | None = None  # answers a batch, over all processes together
    learning_rate: Above0 | None = None
    minimum_learning_rate: From0 = 1e-6  # where the cosine ends
    weight_decay: From0 = 0.01
    clip: Above0 = 1.0  # largest gradient norm
    accumulation: Count = 1  # batches a step, every position of which weighs the same
    patience: Count | None = None  # epochs without a better validation before stopping
    validation_share: Share = 0.1  # of the train split's samples, by whole sequences
    select_by: Literal["loss", "token_acceptance"] | None = None  # the latter needs a head
    prediction_weight: From0 | None = None  # of L5's loss against the next state
    rollout_steps: Count | None = None  # shift 1: on own predictions in the loss
    rollout_decay: From0 = 0.8  # weight of each further step, or draft of a block
    schedule: Literal["step"] | None = None  # the cosine falls with every step; None: epochs
    anchors: Count | None = None  # blocks: positions of an answer drawn each step; None: all
    warm_start: Literal["none", "ridge"] | None = None  # ridge: linear maps from the closed form
    alpha: float | None = None  # initial residual weight of L4, L5, B1, L5F
    noise: From0 = 0.0  # uniform, ± this × the standard deviation of the states that are read
    # weight of the loss at place t is this to the power t
    position_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    token_fusion: bool = False  # L5, B1, L5F: the token before joins the state; needs a head [V, D]
    draft_vocabulary: Count | None = None  # only the k most frequent training tokens; None: all
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast of the forward pass
    adapter_options: dict[str, Any] = field(default_factory=dict)  # passed to create_adapter

    def __post_init__(self) -> None:
        if not isinstance(self.profile, str) or self.profile not in PROFILES:
            raise ParameterError(
                f"unknown training profile {self.profile!r}; choose one of {', '.join(PROFILES)}")
        for name, value in {**_DEFAULTS, **PROFILES[self.profile]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_fields(self)
        sizes = {"level", "hidden_size", "drafter_size"}
        if sizes & self.adapter_options.keys():
            raise ParameterError("options of an adapter are name: value, not its level and widths: "
                                 f"{reprlib.repr(self.adapter_options)}; see docs/adapters.md")
        objectives.parse(self.objective)
