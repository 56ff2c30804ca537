"""The recipes of the study, and the job that a training is: which level, how, which seed, on which
share of the drives (docs/recipes.md).

``documented`` is the reference's training to the letter: on the few hundred answers of the embedded
pair its batch of 64 makes few steps. ``reference`` is the same with a batch of 16, four times the
steps, so that it does not lose for want of them; ``converged`` has the length of the reference's
retrained L4. ``best`` was chosen on drives of the *train* split that no training of the exploration
saw, never on the held-out ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from xsd.adapters import registry
from xsd.core import ParameterError
from xsd.train import recipes
from xsd.train.recipes import FitConfig

CLOSED_FORM = "closed form"
"""Recipe of the levels that are solved, not trained."""
FLOORS: dict[str, tuple[str, str]] = {
    "identity": ("identity", "drafter"),
    "procrustes": ("procrustes", "drafter"),
    "ridge": ("ridge", "drafter"),
    "ridge, verifier": ("ridge", "verifier"),
    "ridge, both": ("ridge", "both"),
}
"""Row of the table → (closed form, what it reads). Under B1 stands the ridge map of the verifier's
state, under L5F that of both."""

_SETTINGS: dict[str, dict[str, Any]] = {
    "documented": {"profile": "reference"},
    "reference": {"profile": "reference", "batch_size": 16},
    "converged": {"profile": "converged"},
    "best": {"epochs": 10},
}
RECIPES = tuple(_SETTINGS)
BUDGETS = ("documented", "converged")
"""What the reference's training gains with time, for the levels that are asked for it."""


def config_of(recipe: str, level: str, *, max_epochs: int = 0, share: float = 1.0) -> FitConfig:
    """How a recipe trains a level.

    max_epochs: no training is longer (0: the recipe's own length). share: of the training drives;
    epochs and patience grow by 1 / share, so that a point of the learning curve has less data and
    not less training. Raises: ParameterError for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ParameterError(f"unknown recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    best = recipes.settings("best", level) if recipe == "best" else {}
    config = FitConfig(**_SETTINGS[recipe], **best)
    epochs, patience = math.ceil(config.epochs / share), math.ceil(config.patience / share)
    return dataclasses.replace(config, epochs=min(epochs, max_epochs or epochs), patience=patience)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training, or one closed form. share: of the training drives, 1 for all."""

    level: str
    recipe: str
    seed: int
    share: float = 1.0

    @property
    def place(self) -> str:
        """Where it stands below ``<run_dir>/study``."""
        part = "" if self.share == 1 else f"_share{round(100 * self.share):02d}"
        name = f"{self.recipe}/{self.level}/seed{self.seed}{part}"
        return name.replace(" ", "_").replace(",", "")


def recipes_of(level: str, recipes: Sequence[str], budget_levels: Sequence[str]) -> list[str]:
    """The recipes that a level is trained with, in the order of RECIPES."""
    wanted = {*recipes, *(BUDGETS if level in budget_levels else ())}
    return [recipe for recipe in RECIPES if recipe in wanted]


def curve_jobs(level: str, seeds: Sequence[int], share: float) -> list[Job]:
    """One point of the learning curve: a closed form, or a level with the best recipe."""
    if level in FLOORS:
        return [Job(level, CLOSED_FORM, 0, share)]
    return [Job(level, "best", seed, share) for seed in seeds]


def jobs(levels: Sequence[str], recipes: Sequence[str], seeds: Sequence[int], *,
         budget_levels: Sequence[str] = (), shares: Sequence[float] = (),
         curve: Sequence[str] = ()) -> list[Job]:
    """Everything the study needs, longest trainings first so that no worker waits at the end; a
    point that two parts share stands once."""
    wanted = [
        Job(level, recipe, seed) for level in levels
        for recipe in recipes_of(level, recipes, budget_levels) for seed in seeds
    ]
    wanted += [Job(name, CLOSED_FORM, 0) for name in FLOORS]
    wanted += [job for share in shares for level in curve
               for job in curve_jobs(level, seeds, share)]
    own = [job.level for job in wanted if job.level not in FLOORS]
    by_size = [*FLOORS, *sorted(dict.fromkeys([*registry.LEVELS, *own]), key=_weight)]
    length = {"converged": 0, "documented": 1, "reference": 1, "best": 2, CLOSED_FORM: 3}

    def longest_first(job: Job) -> tuple[int, int, int]:
        long = length[job.recipe]
        return min(1, long), -by_size.index(job.level), long

    return sorted(dict.fromkeys(wanted), key=longest_first)


def _weight(level: str) -> int:
    """Parameters at a common width: the order of training times."""
    with torch.device("meta"):
        return registry.count_parameters(registry.create_adapter(level, 1024))


def sequences_of(sequences: Sequence[str], share: float) -> list[str]:
    """The first drives of one fixed shuffled order, at least two: a larger share holds the smaller
    one. sequences: of every training sample. share: 0 … 1."""
    names = sorted(set(sequences))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    kept = {names[index] for index in order[:max(2, math.ceil(share * len(names)))]}
    return [name for name in names if name in kept]
