"""The training of one embedded model from scratch: tower on what is in the picture, the decoder's
lower half on what moves, then language.

Every stage keeps a checkpoint in the run folder, so an interrupted training continues where it
stopped; what a stage loses step by step stands in its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studies.embedded_pair import grounding, language, reading
from studies.embedded_pair.corpus import LABELS, LAYOUT_KINDS, LAYOUT_MOTIONS, Dialogue
from studies.embedded_pair.grounding import GroundingConfig
from studies.embedded_pair.language import LanguageConfig, Segment
from studies.embedded_pair.models import Parts
from studies.embedded_pair.reading import ReadingConfig
from studies.embedded_pair.views import Material
from xsd.embedded.scenes import COLOURS

Progress = Callable[[str, int, int, float], None]
"""Called with (stage, step, total, loss)."""
CLASSES = {name: len(values) for name, values in LABELS.items()}
PATCH_CLASSES = (len(LAYOUT_KINDS), len(COLOURS), len(LAYOUT_MOTIONS) - 1)
"""Kinds, colours and motions of what stands in a patch; what does not move has no motion class."""


def segments_of(tokenizer: Any, prompt_ids: Callable, dialogues: Sequence[Sequence[Dialogue]], *,
                eos: int, fact_weight: float) -> list[list[Segment]]:
    """Per clip its dialogues as ids; tokens inside a fact's characters weigh ``fact_weight``. Only
    a whole answer ends in EOS."""
    known: dict[tuple[str, str, bool], Segment] = {}

    def segment(asked: Dialogue) -> Segment:
        key = (asked.question, asked.answer, asked.whole)
        if key not in known:
            encoded = tokenizer(asked.answer, add_special_tokens=False, return_offsets_mapping=True)
            weights = []
            for a, b in encoded.offset_mapping:
                states = any(a < end and b > start for start, end in asked.fact_spans)
                weights.append(fact_weight if states else 1.0)
            last = [eos] if asked.whole else []
            known[key] = Segment(prompt_ids(tokenizer, asked.question)[1], encoded.input_ids + last,
                                 weights + [1.0] * len(last))
        return known[key]

    return [[segment(asked) for asked in clip] for clip in dialogues]


def train_model(parts: Parts, material: Material, tokenizer: Any, folder: Path, *,
                configs: tuple[GroundingConfig | None, ReadingConfig, LanguageConfig],
                mixed_in: Sequence[Sequence[Dialogue]] | None = None, device: str = "cpu",
                progress: Progress | None = None) -> None:
    """Train one model in place, with checkpoints in ``folder``.

    configs: without the first, of a model whose tower has learnt to see. mixed_in: per clip the
    other model's dialogues; one such answer is asked per clip and step, beside the model's own.
    Raises: TrainingError as stage.run.
    """
    tower_config, reading_config, language_config = configs
    torch.manual_seed(language_config.seed)
    width, n_frames = parts.embed.embedding_dim, material.images.shape[1]
    n_tokens = parts.n_visual * len(parts.grounding_frames) // n_frames
    def kept(stage: str) -> dict[str, Any]:
        report = None if progress is None else (
            lambda step, total, loss: progress(f"{parts.role} {stage}", step, total, loss))
        return {"checkpoint": folder / f"{parts.role}-{stage}.pt", "progress": report}

    if tower_config:
        patches = grounding.PatchReader(parts.tower_width, *PATCH_CLASSES)
        head = grounding.GroundingHead(width, n_tokens, CLASSES, patches).to(device)
        grounding.train_tower(parts, material, head, tower_config, **kept("tower"))
    eos = tokenizer.eos_token_id
    own = segments_of(tokenizer, parts.prompt_ids, material.dialogues, eos=eos,
                      fact_weight=language_config.fact_weight)
    other = mixed_in and segments_of(tokenizer, parts.prompt_ids, mixed_in, eos=eos,
                                     fact_weight=1.0)

    def choose(clip: int, rng: np.random.Generator) -> list[Segment]:
        picked = rng.permutation(len(own[clip]))[:language_config.questions_per_clip]
        extra = [other[clip][int(rng.integers(len(other[clip])))]] if other else []
        return [own[clip][int(i)] for i in picked] + extra

    def visual(clips: np.ndarray) -> Tensor:
        pixels = grounding.normalise(material.images[clips]).to(device)
        return parts.project(parts.features(pixels))

    def codes(clips: np.ndarray, grid: int) -> np.ndarray:
        return grounding.patch_codes(material.layout[clips][:, list(parts.patch_frames)], grid)

    ego = material.labels[:, list(CLASSES).index("ego")]
    readers = reading.Readers(
        reading.FactRegisters(width, CLASSES),
        reading.SceneReader(width, grounding.PatchReader(width, *PATCH_CLASSES), CLASSES["ego"]),
        reading.ClipTruths(material.labels, ego, material.colour_known, codes),
        middle=parts.middle, early=parts.early, patches=parts.patches,
    ).to(device)
    common = {
        "embed": parts.embed, "visual": visual, "tower": parts.tower, "readers": readers,
        "trained": nn.ModuleList([parts.decoder, parts.projector]),
        "before": parts.prompt_ids(tokenizer, "?")[0], "n_visual": parts.n_visual,
        "n_clips": len(material.images), "device": device,
    }
    reading.train_lower_half(**common, decode=parts.decode_lower, config=reading_config,
                             **kept("reading"))
    language.train_decoder(**common, decode=parts.decode, lm_head=parts.lm_head, segments=choose,
                           config=language_config, **kept("language"))
