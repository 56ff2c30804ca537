"""Training of the embedded pair from scratch, and of the pair on SmolLM2: how much, and in which
order (``xsd pair train``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from studies.embedded_pair import corpus as corpora
from studies.embedded_pair import models, prose, side_by_side, smollm2, stages, views
from studies.embedded_pair.card import ROLES
from studies.embedded_pair.grounding import GroundingConfig
from studies.embedded_pair.language import LanguageConfig
from studies.embedded_pair.reading import ReadingConfig
from studies.embedded_pair.stages import Progress
from xsd.core import ROOT, ParameterError
from xsd.embedded import language
from xsd.files import provenance, write_json
from xsd.models import base
from xsd.runs.progress import tqdm


@dataclass(frozen=True)
class PairProfile:
    """How long and on how much the pair is trained. view_share: views by other cameras per clip of
    the verifier's (views.py). drafter_layers: of SmolLM2, where the pair stands on that, each model
    with answers of its own dialect alone; the stage without a configuration is left out."""

    n_sequences: int
    grounding: dict[str, GroundingConfig]
    reading: dict[str, ReadingConfig]
    language: dict[str, LanguageConfig]
    view_share: float = 0.1
    drafter_layers: int = 0


PROFILES = {
    "smoke": PairProfile(
        8,
        {role: GroundingConfig(epochs=0.5, batch_size=8) for role in ROLES},
        {role: ReadingConfig(steps=3, batch_size=2, warmup_steps=1) for role in ROLES},
        {role: LanguageConfig(steps=3, batch_size=2, warmup_steps=1) for role in ROLES},
    ),
    "quick": PairProfile(
        300,
        {"verifier": GroundingConfig(epochs=6), "drafter": GroundingConfig(epochs=5)},
        {"verifier": ReadingConfig(steps=600, batch_size=12),
         "drafter": ReadingConfig(steps=1200, batch_size=16)},
        {"verifier": LanguageConfig(steps=300, batch_size=6),
         "drafter": LanguageConfig(steps=400, batch_size=8)},
    ),
    "full": PairProfile(
        2800,
        {role: GroundingConfig(epochs=4, batch_size=16) for role in ROLES},
        {"verifier": ReadingConfig(steps=4500, batch_size=6),
         "drafter": ReadingConfig(steps=7000, batch_size=8)},
        {"verifier": LanguageConfig(steps=2400, batch_size=4),
         "drafter": LanguageConfig(steps=4500, batch_size=6)},
    ),
    "smollm2": PairProfile(
        600,
        dict.fromkeys(ROLES),
        {role: ReadingConfig(steps=steps, batch_size=8, learning_rate=6e-4, tower_rate=0.2,
                             save_every=20) for role, steps in (("verifier", 700),
                                                                ("drafter", 1500))},
        {role: LanguageConfig(steps=steps, batch_size=2, learning_rate=6e-4, tower_rate=0.2,
                              warmup_steps=30, questions_per_clip=4, save_every=20)
         for role, steps in (("verifier", 600), ("drafter", 1500))},
        view_share=0.0, drafter_layers=6,
    ),
}
FIRST_HELD_OUT_SEED = 1000
"""Seeds from here on belong to notebooks 01 to 07 (xsd/steps/data.py) and to the card."""


def bars() -> Progress:
    """One bar per stage, for the ``progress`` of :func:`train`."""
    shown: dict[str, Any] = {}

    def show(stage: str, done: int, total: int, loss: float) -> None:
        if stage not in shown:
            shown[stage] = tqdm(total=total, desc=stage, mininterval=5)
        shown[stage].set_postfix(loss=f"{loss:.3f}", refresh=False)
        shown[stage].update(done - shown[stage].n)

    return show


def default_folder(profile: str, seed: int) -> Path:
    """Where a training stands unless another folder is named: it outlives the smoke runs, which the
    tests delete."""
    return ROOT / "runs" / f"pair_{profile}_{seed}"


def train(folder: str | Path, profile: str = "full", *, seed: int = 0, device: str = "cpu",
          workers: int = 2, progress: Progress | None = None) -> Path:
    """Train both models from scratch into ``folder`` (resumes there) and write the pair to
    ``folder/pair``.

    workers: processes that simulate; with two or more on a CPU the two models are trained side by
    side, which wastes less of two cores than one model on both.

    Raises: ParameterError for an unknown profile or a held-out seed; TrainingError when a loss is
    not finite.
    """
    if not 0 <= seed < FIRST_HELD_OUT_SEED:
        raise ParameterError(
            f"the pair cannot be trained with seed {seed}: seeds from {FIRST_HELD_OUT_SEED} on "
            "draw the drives adapters are trained and judged on; choose one from 0 to "
            f"{FIRST_HELD_OUT_SEED - 1}")
    if profile not in PROFILES:
        raise ParameterError(
            f"there is no training profile {profile!r}; choose one of {sorted(PROFILES)}")
    plan, folder = PROFILES[profile], Path(folder)
    drives = _corpus(folder, plan, seed, workers, progress)
    if workers > 1 and device == "cpu":
        side_by_side.run(_role, [(role, folder, profile, seed, device) for role in ROLES],
                         threads=workers // len(ROLES), progress=progress)
    # what is finished is reopened
    trained = {role: _role(role, folder, profile, seed, device, progress) for role in ROLES}
    if plan.drafter_layers:
        smollm2.save(folder / "pair", trained)
    else:
        models.save_pair(folder / "pair", trained["drafter"].to("cpu"),
                         trained["verifier"].to("cpu"),
                         models.train_tokenizer(training_texts(drives)))
    stages_of = {"tower": plan.grounding, "reading": plan.reading, "language": plan.language}
    configs = {role: {stage: asdict(of[role]) for stage, of in stages_of.items() if of[role]}
               for role in ROLES}
    about = provenance(seed=seed, device=device, profile=profile, n_sequences=plan.n_sequences,
                       view_share=plan.view_share, stages=configs)
    write_json(folder / "pair" / "provenance.json", about)
    return folder / "pair"


def _corpus(folder: Path, plan: PairProfile, seed: int, workers: int = 1,
            progress: Progress | None = None) -> corpora.Corpus:
    def report(n: int) -> None:
        progress("simulated drives", n, plan.n_sequences, float("nan"))

    return corpora.build(folder / "corpus", split="train", n_sequences=plan.n_sequences, seed=seed,
                         size=models.IMAGE_SIZE, workers=workers,
                         progress=None if progress is None else report)


def _role(role: str, folder: Path, profile: str, seed: int, device: str,
          progress: Progress | None) -> torch.nn.Module:
    """One model from scratch to the end of its plan, or from its last checkpoint; at once when that
    is the end."""
    plan, mixed_in = PROFILES[profile], None
    drives = _corpus(folder, plan, seed)
    material = views.events(drives) if role == "drafter" else views.with_views(
        drives, share=plan.view_share, seed=seed)
    if plan.drafter_layers:
        model, parts = smollm2.new_model(role, seed=seed, layers=plan.drafter_layers)
        tokenizer = base.tokenizer(base.decoder_folder(), role)
        material = replace(material, dialogues=drives.dialogues(role, prose.answers))
    elif role == "verifier":
        tokenizer = models.train_tokenizer(training_texts(drives))
        model = models.new_verifier(len(tokenizer), seed=seed)
        parts, tokenizer = models.verifier_parts(model), models.verifier_tokenizer(tokenizer)
    else:
        tokenizer = models.train_tokenizer(training_texts(drives))
        model = models.new_drafter(len(tokenizer), seed=seed)
        parts = models.drafter_parts(model)
        # as both real models share a language-model ancestor that knows either style
        mixed_in = drives.dialogues("verifier")
    model.to(device)  # in place: the parts are its own modules
    configs = (plan.grounding[role], plan.reading[role], plan.language[role])
    stages.train_model(parts, material, tokenizer, folder, mixed_in=mixed_in, device=device,
                       configs=tuple(config and replace(config, seed=seed) for config in configs),
                       progress=progress)
    return model


def training_texts(drives: corpora.Corpus) -> list[str]:
    """What the tokenizer is trained on: every different answer of both dialects, and the
    questions."""
    answers = {
        text
        for dialect in ("verifier", "drafter") for row in drives.answers(dialect) for text in row
    }
    return sorted(answers) + [question.text for question in language.questions()] * 50
