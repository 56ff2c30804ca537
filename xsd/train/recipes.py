"""How to train an adapter: the settings, and the profiles that fill them (docs/adapters.md, section
5)."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

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


def check_fields(config: Any, *, positive: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Raises: ParameterError naming the first field that is not of its type (whole numbers, finite
    ones, one of a Literal's words), or not above zero (below it, for ``not_negative``)."""
    for name, kind in get_type_hints(type(config)).items():
        value, allowed = getattr(config, name), get_args(kind) or (kind,)
        words = [word for one in allowed for word in get_args(one) if isinstance(word, str)]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if float in allowed:
            fits = (number and math.isfinite(value)) or (value is None and NoneType in allowed)
            expected = "a finite number"
        elif int in allowed:
            fits = (isinstance(value, int) and number) or (value is None and NoneType in allowed)
            expected = "a whole number"
        elif kind is bool:
            fits, expected = isinstance(value, bool), "true or false"
        elif words or get_origin(kind) is Literal:
            words = words or list(allowed)
            fits = value in words or (value is None and NoneType in allowed)
            expected = " or ".join(words)
        else:
            continue
        if not fits:
            raise ParameterError(f"{name} must be {expected}, not {reprlib.repr(value)}")
        if value is not None and name in positive and value <= 0:
            raise ParameterError(f"{name} must be positive, not {value}")
        if value is not None and name in not_negative and value < 0:
            raise ParameterError(f"{name} must be 0 or more, not {value}")


@dataclass(frozen=True)
class FitConfig:
    """How to train. Fields left at None take their profile's value; what was used is saved in
    config.json. What each is for: docs/adapters.md, section 5."""

    profile: Literal["reference", "converged", "tokens", "rollout"] = "reference"
    objective: str | None = None  # terms by name, see objectives.parse
    epochs: int | None = None
    batch_size: int | None = None  # answers a batch, over all processes together
    learning_rate: float | None = None
    minimum_learning_rate: float = 1e-6  # where the cosine ends
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    accumulation: int = 1  # batches a step, every position of which weighs the same
    patience: int | None = None  # epochs without a better validation before stopping
    validation_share: float = 0.1  # of the train split's samples, by whole sequences
    select_by: Literal["loss", "token_acceptance"] | None = None  # the latter needs a head
    prediction_weight: float | None = None  # of L5's loss against the next state
    rollout_steps: int | None = None  # shift 1: on own predictions in the loss
    rollout_decay: float = 0.8  # weight of each further step, or draft of a block
    schedule: Literal["step"] | None = None  # the cosine falls with every step; None: epochs
    anchors: int | None = None  # blocks: positions of an answer drawn each step; None: all
    warm_start: Literal["none", "ridge"] | None = None  # ridge: linear maps from the closed form
    alpha: float | None = None  # initial residual weight of L4, L5, B1, L5F
    noise: float = 0.0  # uniform, ± this × the standard deviation of the states that are read
    position_decay: float = 1.0  # weight of the loss at place t is this to the power t
    token_fusion: bool = False  # L5, B1, L5F: the token before joins the state; needs a head [V, D]
    draft_vocabulary: int | None = None  # only the k most frequent training tokens; None: all
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast of the forward pass
    adapter_options: dict[str, Any] = field(default_factory=dict)  # passed to create_adapter

    def __post_init__(self) -> None:
        if not isinstance(self.profile, str) or self.profile not in PROFILES:
            raise ParameterError(
                f"unknown training profile {self.profile!r}; choose one of {', '.join(PROFILES)}")
        for name, value in {**_DEFAULTS, **PROFILES[self.profile]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_fields(self, positive=("epochs", "batch_size", "accumulation", "rollout_steps",
                                     "learning_rate", "patience", "clip"),
                     not_negative=("minimum_learning_rate", "weight_decay", "noise",
                                   "prediction_weight", "rollout_decay"))
        if not 0 < self.position_decay <= 1:
            raise ParameterError(f"position_decay must lie in (0, 1], not {self.position_decay}; 1 "
                                 "weighs all positions the same")
        if self.anchors is not None and self.anchors < 1:
            raise ParameterError(f"anchors must be at least 1 position or None, not {self.anchors}")
        if self.draft_vocabulary is not None and self.draft_vocabulary < 1:
            raise ParameterError(
                f"draft_vocabulary must be at least 1 token or None, not {self.draft_vocabulary}")
        if not 0 < self.validation_share < 1:
            raise ParameterError(
                f"validation_share must lie between 0 and 1, not {self.validation_share}")
        sizes = {"level", "hidden_size", "drafter_size"}
        if not isinstance(self.adapter_options, dict) or sizes & self.adapter_options.keys():
            raise ParameterError("options of an adapter are name: value, not its level and widths: "
                                 f"{reprlib.repr(self.adapter_options)}; see docs/adapters.md")
        objectives.parse(self.objective)
