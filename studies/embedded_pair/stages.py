"""The training of one embedded model from scratch: tower on what is in the picture, the decoder's
lower half on what moves, then language.

Models and data come in as arguments (a model taken apart by ``studies.embedded_pair.models``, a
corpus from ``studies.embedded_pair.corpus``). Every stage keeps a checkpoint in the run folder, so
an interrupted training continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studies.embedded_pair import grounding, language, reading
from studies.embedded_pair.grounding import GroundingConfig
from studies.embedded_pair.language import LanguageConfig, Segment
from studies.embedded_pair.reading import ReadingConfig

Progress = Callable[[str, int, int, float], None]
"""Called with (stage, step, total, loss)."""


def segments_of(tokenizer: Any, prompt_ids: Callable, dialogues: Sequence[Sequence[Any]], *,
                eos: int, fact_weight: float) -> list[list[Segment]]:
    """Dialogues (question, answer, fact_spans, whole) as ids; tokens inside a fact's characters
    weigh ``fact_weight``. Only a whole answer ends in EOS."""
    known: dict[tuple[str, str, bool], Segment] = {}
    rows = []
    for clip in dialogues:
        row = []
        for d in clip:
            key = (d.question, d.answer, d.whole)
            if key not in known:
                encoded = tokenizer(d.answer, add_special_tokens=False, return_offsets_mapping=True)
                facts = [
                    any(a < end and b > start for start, end in d.fact_spans)
                    for a, b in encoded.offset_mapping
                ]
                weight, end = [fact_weight if f else 1.0 for f in facts], [eos] if d.whole else []
                known[key] = Segment(
                    prompt_ids(tokenizer, d.question)[1], encoded.input_ids + end,
                    weight + [1.0] * len(end))
            row.append(known[key])
        rows.append(row)
    return rows


def train_model(parts: Any, *, tokenizer: Any, images: Any, labels: np.ndarray, layout: Any,
                colour_known: np.ndarray, dialogues: Sequence[Sequence[Any]],
                other_dialogues: Sequence[Sequence[Any]] | None, classes: dict[str, int],
                n_kinds: int, n_colours: int, n_motions: int, mean: Sequence[float],
                std: Sequence[float], folder: Path, grounding_config: GroundingConfig,
                reading_config: ReadingConfig, language_config: LanguageConfig, device: str = "cpu",
                progress: Progress | None = None,
                ) -> None:
    """Train one model in place.

    Args:
        parts: features, project, decode, decode_lower, tower, projector, decoder, early, middle,
        patches, patch_frames, embed, lm_head,
            n_visual, tower_width, grounding_frames, prompt_ids, role, model
            (models.embedded.Parts).
        images: uint8 [N, F, s, s, 3]. labels: int64 [N, n_facts]. layout: uint16 [N, F, c, c].
        colour_known: bool [N]. images and layout:
            arrays, or what gives rows as an array does (views.Viewed).
        dialogues: per clip its questions and answers. other_dialogues: the other model's answers;
        one such segment a clip and step is
            mixed in, as both real models share a language-model ancestor that knows either style.
        classes: facts and their number of classes; n_kinds, n_colours, n_motions: patch classes.

    Raises: TrainingError as stage.run. What the stages lose step by step stands in their
    checkpoints.
    """
    def report(stage: str) -> Callable[[int, int, float], None] | None:
        return None if progress is None else lambda step, total, loss: progress(
            f"{parts.role} {stage}", step, total, loss)

    frames = list(parts.grounding_frames)
    torch.manual_seed(grounding_config.seed)
    tokens_per_frame = parts.n_visual * len(frames) // images.shape[1] if len(
        frames) != images.shape[1] else parts.n_visual
    width, kinds = parts.embed.embedding_dim, (n_kinds, n_colours, n_motions)
    head = grounding.GroundingHead(width, tokens_per_frame, classes,
                                   grounding.PatchReader(parts.tower_width, *kinds)).to(device)
    grounding.train_tower(parts.features, parts.project, [parts.tower, parts.projector], head,
                          images, labels, layout, colour_known, frames=frames, mean=mean, std=std,
                          config=grounding_config, checkpoint=folder / f"{parts.role}-tower.pt",
                          progress=report("tower"),
                          )  # fmt: skip
    own = segments_of(tokenizer, parts.prompt_ids, dialogues, eos=tokenizer.eos_token_id,
                      fact_weight=language_config.fact_weight)
    other = other_dialogues and segments_of(tokenizer, parts.prompt_ids, other_dialogues,
                                            eos=tokenizer.eos_token_id, fact_weight=1.0)

    def choose(clip: int, rng: np.random.Generator) -> list[Segment]:
        picked = rng.permutation(len(own[clip]))[:language_config.questions_per_clip]
        extra = [other[clip][int(rng.integers(len(other[clip])))]] if other else []
        return [own[clip][int(i)] for i in picked] + extra

    def visual(clips: np.ndarray) -> Tensor:
        return parts.project(
            parts.features(grounding.normalise(images[clips], mean, std).to(device)))

    def codes(clips: np.ndarray, grid: int) -> np.ndarray:
        return grounding.patch_codes(layout[clips][:, list(parts.patch_frames)], grid)

    truths = reading.ClipTruths(labels, labels[:, list(classes).index("ego")], colour_known, codes)
    readers = reading.Readers(
        reading.FactRegisters(width, classes),
        reading.SceneReader(width, grounding.PatchReader(width, *kinds), classes["ego"]), truths,
        middle=parts.middle, early=parts.early, patches=parts.patches,
    ).to(device)  # fmt: skip
    common = {
        "embed": parts.embed, "visual": visual,
        "trained": nn.ModuleList([parts.decoder,
                                  parts.projector]), "tower": parts.tower, "readers": readers,
        "before": parts.prompt_ids(tokenizer, "?")
                  [0], "n_visual": parts.n_visual, "n_clips": len(images), "device": device,
    }  # fmt: skip
    reading.train_lower_half(**common, decode=parts.decode_lower, config=reading_config,
                             checkpoint=folder / f"{parts.role}-reading.pt",
                             progress=report("reading"),
                             )  # fmt: skip
    language.train_decoder(**common, decode=parts.decode, lm_head=parts.lm_head, segments=choose,
                           config=language_config, checkpoint=folder / f"{parts.role}-language.pt",
                           progress=report("language"),
                           )  # fmt: skip
