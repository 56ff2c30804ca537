"""The embedded pair: its training from scratch, how often its answers are right, and the card that
says so (notebook 00)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from studies.embedded_pair import corpus as corpora
from studies.embedded_pair import models as embedded
from studies.embedded_pair import side_by_side, views
from studies.embedded_pair import stages as training
from studies.embedded_pair.grounding import GroundingConfig
from studies.embedded_pair.language import LanguageConfig
from studies.embedded_pair.reading import ReadingConfig
from xsd.core import ROOT, ParameterError, Sample
from xsd.embedded import drive, language
from xsd.evaluate import statistics
from xsd.files import atomic_write, provenance, write_json
from xsd.models import loading, pixels
from xsd.sensors import frames

ROLES = ("verifier", "drafter")


@dataclass(frozen=True)
class PairProfile:
    """How long and on how much the pair is trained. view_share: views by other cameras, a clip of
    the verifier's (world/views.py)."""

    n_sequences: int
    grounding: dict[str, GroundingConfig]
    reading: dict[str, ReadingConfig]
    language: dict[str, LanguageConfig]
    view_share: float = 0.1


PROFILES = {
    "smoke": PairProfile(
        8, {role: GroundingConfig(epochs=0.5, batch_size=8) for role in ROLES},
        {role: ReadingConfig(steps=3, batch_size=2, warmup_steps=1) for role in ROLES},
        {role: LanguageConfig(steps=3, batch_size=2, warmup_steps=1) for role in ROLES},
    ), "quick": PairProfile(
        300, {"verifier": GroundingConfig(epochs=6), "drafter": GroundingConfig(epochs=5)}, {
            "verifier": ReadingConfig(steps=600, batch_size=12), "drafter": ReadingConfig(
                steps=1200, batch_size=16)
        }, {
            "verifier": LanguageConfig(steps=300, batch_size=6), "drafter": LanguageConfig(
                steps=400, batch_size=8)
        },
    ),
    "full": PairProfile(2800, {role: GroundingConfig(epochs=4, batch_size=16) for role in ROLES}, {
        "verifier": ReadingConfig(steps=4500, batch_size=6), "drafter": ReadingConfig(
            steps=7000, batch_size=8)
    }, {
        "verifier": LanguageConfig(steps=2400, batch_size=4), "drafter": LanguageConfig(
            steps=4500, batch_size=6)
    },
                        ),
}

FIRST_HELD_OUT_SEED = 1000
"""Seeds from here on belong to notebooks 01 to 07 (steps/data.py) and to the card."""


def default_folder(profile: str, seed: int) -> Path:
    """Where a training stands unless another folder is named: it outlives the smoke runs, which the
    tests delete."""
    return ROOT / "runs" / f"pair_{profile}_{seed}"


def train(folder: str | Path, profile: str = "full", *, seed: int = 0, device: str = "cpu",
          workers: int = 2, progress: training.Progress | None = None,
          ) -> Path:
    """Train both models from scratch into ``folder`` (resumes there) and write the pair to
    ``folder/pair``.

    workers: processes that simulate; with two or more on a CPU the two models are trained side by
    side, which wastes less of two cores than
    one model on both.

    Raises: ParameterError for an unknown profile; TrainingError when a loss is not finite.
    """
    if not 0 <= seed < FIRST_HELD_OUT_SEED:
        raise ParameterError(
            f"the pair cannot be trained with seed {seed}: seeds from {FIRST_HELD_OUT_SEED} on "
            "draw the drives adapters are "
            f"trained and judged on; choose one from 0 to {FIRST_HELD_OUT_SEED - 1}")
    if profile not in PROFILES:
        raise ParameterError(
            f"there is no training profile {profile!r}; choose one of {sorted(PROFILES)}")
    plan, folder = PROFILES[profile], Path(folder)
    _corpus(folder, plan, seed, workers, progress)
    if workers > 1 and device == "cpu":
        side_by_side.run(_role, [(role, folder, profile, seed, device) for role in ROLES],
                         threads=workers // len(ROLES), progress=progress)
    models = {role: _role(role, folder, profile, seed, device, progress)
              for role in ROLES}  # reopens what is finished
    tokenizer = embedded.train_tokenizer(training_texts(_corpus(folder, plan, seed)))
    embedded.save_pair(folder / "pair", models["drafter"].to("cpu"), models["verifier"].to("cpu"),
                       tokenizer)
    stages = {
        role: {
            "tower": asdict(plan.grounding[role]), "reading": asdict(plan.reading[role]),
            "language": asdict(plan.language[role])
        } for role in models
    }
    about = provenance(seed=seed, device=device, profile=profile, n_sequences=plan.n_sequences,
                       view_share=plan.view_share, stages=stages)
    write_json(folder / "pair" / "provenance.json", about)
    return folder / "pair"


def _corpus(folder: Path, plan: PairProfile, seed: int, workers: int = 1,
            progress: training.Progress | None = None) -> corpora.Corpus:
    return corpora.build(
        folder / "corpus", split="train", n_sequences=plan.n_sequences, seed=seed,
        size=embedded.IMAGE_SIZE, workers=workers, progress=progress
        and (lambda n: progress("simulated drives", n, plan.n_sequences, float("nan"))),
    )  # fmt: skip


def _role(role: str, folder: Path, profile: str, seed: int, device: str,
          progress: training.Progress | None) -> torch.nn.Module:
    """One model from scratch to the end of its plan, or from its last checkpoint; at once when that
    is the end."""
    plan = PROFILES[profile]
    drives = _corpus(folder, plan, seed)
    tokenizer = embedded.train_tokenizer(training_texts(drives))
    verifier = role == "verifier"
    material = views.with_views(drives, share=plan.view_share,
                                seed=seed) if verifier else views.events(drives)
    model = (embedded.new_verifier if verifier else embedded.new_drafter)(len(tokenizer),
                                                                          seed=seed).to(device)
    training.train_model(
        (embedded.verifier_parts if verifier else embedded.drafter_parts)(model),
        tokenizer=embedded.verifier_tokenizer(tokenizer) if verifier else tokenizer,
        images=material.images, labels=material.labels, layout=material.layout,
        colour_known=material.colour_known, dialogues=material.dialogues,
        other_dialogues=None if verifier else drives.dialogues("verifier"),
        classes={name: len(values) for name, values in corpora.LABELS.items()},
        n_kinds=len(corpora.LAYOUT_KINDS), n_colours=6, n_motions=len(corpora.LAYOUT_MOTIONS) - 1,
        mean=pixels.CLIP_MEAN, std=pixels.CLIP_STD, folder=folder, grounding_config=replace(
            plan.grounding[role], seed=seed), reading_config=replace(plan.reading[role], seed=seed),
        language_config=replace(plan.language[role], seed=seed), device=device, progress=progress,
    )
    return model


def training_texts(drives: corpora.Corpus) -> list[str]:
    """What the tokenizer is trained on: every different answer of both dialects, and the
    questions."""
    answers = {
        text for dialect in ("verifier", "drafter") for row in drives.answers(dialect)
        for text in row
    }
    return sorted(answers) + [question.text for question in language.questions()] * 50


# --- how often the answers are right
# ------------------------------------------------------------------------------------


def held_out(n_sequences: int, *, seed: int,
             first: int = 0) -> list[tuple[Sample, dict[str, Any], str]]:
    """(sample, facts, kind of question): question i is asked of clip i mod 4 of its drive: near
    twins are never asked the same."""
    rows = []
    for simulated in drive.simulate(seed, "test", n_sequences, first=first):
        for i, question in enumerate(language.questions()):
            clip = simulated.clips[i % len(simulated.clips)]
            sample = Sample(simulated.sequence, clip.name, question.text, clip.event_frames,
                            clip.video, clip.t_us, "test", "simulated")
            rows.append((sample, clip.facts, question.kind))
    return sorted(rows, key=lambda row: row[0].key)


def answer_table(
    pair: Any, rows: Sequence[tuple[Sample, dict[str, Any], str]], *, max_new_tokens: int = 64,
    roles: Sequence[str] = ("verifier", "drafter"), progress: Callable | None = None,
) -> pd.DataFrame:
    """The models' answers to the rows, with the facts they state rightly.

    Returns: one row an answer and fact: role, sequence, clip, kind (of question), answer, truth,
    fact, right, expected.
    """
    table = []
    for role in roles:
        handle = getattr(pair, role)
        with torch.inference_mode():
            answers = handle.generate([sample for sample, _, _ in rows], max_new_tokens,
                                      progress=progress)
        for (sample, facts, kind), continuation in zip(rows, answers, strict=True):
            text = handle.text(continuation.ids.tolist())
            about = {
                "role": role, "sequence": sample.sequence, "clip": sample.clip, "kind": kind,
                "answer": text.strip()
            }
            about["truth"] = language.answer(facts, kind, role)
            about["finish"] = continuation.finish
            scores = language.score(text, facts, kind, role) or {"nothing": (0, 0)}
            table += [{**about, "fact": fact, "right": right, "expected": expected}
                      for fact, (right, expected) in scores.items()]
    return pd.DataFrame(table)


def spoken(table: pd.DataFrame, *, sequence: str,
           questions: int = 10) -> list[tuple[str, str, str, list[tuple[str, bool]]]]:
    """Rows for views.tokens.transcript: (question, role, note, [(word, right?)]) of one drive's
    first questions."""
    order = [question.kind for question in language.questions()][:questions]
    texts = {question.kind: question.text for question in language.questions()}
    chosen = table[(table["sequence"] == sequence) & table["kind"].isin(order)].drop_duplicates(
        ["role", "kind"])
    rows = []
    for row in sorted(chosen.to_dict("records"), key=lambda r: (order.index(r["kind"]), r["role"])):
        words, truth = row["answer"].split(), row["truth"].split()
        kept = {
            j
            for block in SequenceMatcher(None, words, truth, autojunk=False).get_matching_blocks()
            for j in range(block.a, block.a + block.size)
        }
        rows.append((texts[row["kind"]], row["role"], "", [(word, j in kept)
                                                           for j, word in enumerate(words)]))
    return rows


def accuracy(table: pd.DataFrame, by: str | None = None, *, resamples: int = 2000,
             seed: int = 0) -> pd.DataFrame:
    """Share of facts right per role (and per ``by``: kind or fact) with an interval over sequences,
    and of answers wholly right."""
    out = []
    for group, rows in table.groupby(["role"] if by is None else ["role", by], sort=True):
        sums = rows.groupby("sequence")[["right", "expected"]].sum()
        interval = statistics.bootstrap_ratio(sums["right"].to_numpy(), sums["expected"].to_numpy(),
                                              list(sums.index), n_resamples=resamples, seed=seed)
        wholly = rows.groupby(["sequence", "clip", "kind"])[["right", "expected"]].sum()
        out.append(
            dict(zip(["role", by] if by else ["role"], group, strict=True))
            | {
                "right": interval.value, "low": interval.low, "high": interval.high, "facts": int(
                    sums["expected"].sum())
            }
            | {
                "wholly_right": float((
                    wholly["right"] == wholly["expected"]).mean()), "answers": len(wholly)
            })
    return pd.DataFrame(out)


def duplicate_rate(table: pd.DataFrame, role: str = "verifier") -> float:
    """Share of a role's answers that equal another one in the table."""
    answers = table[table["role"] == role].drop_duplicates(["sequence", "clip", "kind"])["answer"]
    return float(answers.duplicated(keep=False).mean())


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """The numbers of notebook 00: facts right per role with interval, and the verifier's duplicate
    answers."""
    roles = {
        row["role"]: {
            "facts_right": {
                "value": row["right"], "low": row["low"], "high": row["high"], "n": row["facts"]
            }
        } for row in accuracy(table).to_dict("records")
    }
    return roles | {"verifier_duplicates": duplicate_rate(table)}


def model_card(table: pd.DataFrame, about: dict[str, Any]) -> str:
    """The card shipped beside the weights, in Markdown: data, seed, command, accuracy per question
    kind, limits."""
    lines = [
        "# The embedded pair", "", *_CARD.format(**about).strip().splitlines(), "",
        "## Accuracy on held-out drives", ""
    ]
    lines += [
        f"{about['sequences']} simulated sequences the pair was not trained on, one clip per "
        f"sequence and question (seed {about['seed']}).",
        "",
    ]
    lines += [
        "| model | question | facts right | 95 % interval | answers wholly right | facts |",
        "|---|---|---|---|---|---|"
    ]
    overall = accuracy(table).assign(kind="**all**")
    for row in pd.concat([overall, accuracy(table, "kind")]).to_dict("records"):
        lines.append(
            f"| {row['role']} | {row['kind']} | {100 * row['right']:.1f} % | "
            f"{100 * row['low']:.1f}–{100 * row['high']:.1f} % "
            f"| {100 * row['wholly_right']:.1f} % | {row['facts']} |")
    lines += [
        "", f"Duplicate answers of the verifier: {100 * duplicate_rate(table):.1f} %.", "",
        f"Command: {about['command']}", ""
    ]
    return "\n".join(lines)


def score(folder: str | Path, *, n_sequences: int, command: str, seed: int = 2000) -> Path:
    """Ask a trained pair the ten questions on held-out drives and write its card beside the
    weights. Returns the card's path."""
    pair = loading.load_pair(str(folder))
    table = answer_table(pair, held_out(n_sequences, seed=seed))
    trained = json.loads((Path(folder) / "provenance.json").read_text())
    about = {
        "sequences": n_sequences, "seed": seed, "command": command,
        "n_sequences": trained["n_sequences"]
    }
    return write_card(folder, table,
                      {**about, "training_seed": trained["seed"], "profile": trained["profile"]})


def write_card(folder: str | Path, table: pd.DataFrame, about: dict[str, Any]) -> Path:
    """Write README.md (the card) and accuracy.json beside the weights."""
    folder = Path(folder)
    atomic_write(folder / "README.md", model_card(table, about))
    write_json(
        folder / "accuracy.json", {
            "about": about, "overall": accuracy(table).to_dict("records"), "by_question": accuracy(
                table, "kind").to_dict("records"), "by_fact": accuracy(
                    table, "fact").to_dict("records"), "verifier_duplicates": duplicate_rate(table),
        },
    )
    return folder / "README.md"


_CARD = """
Two small models that see one simulated road through different sensors, shipped so that everything can be tried without a GPU.
They are trained from scratch on simulated drives only; they know ten questions and nothing else.

- **Drafter**: EventGPT's architecture (`EventChat_llama`), 5 event frames, 70 event tokens, 4 decoder layers, width 192.
- **Verifier**: transformers' `VideoLlavaForConditionalGeneration`, 8 RGB frames, 296 video tokens, 12 decoder layers, width 192.
- **Data**: {n_sequences} simulated sequences of four overlapping one-second clips (`xsd.embedded`, split train, seed {training_seed}), ten
  questions a clip, one dialect of answers for each model. The verifier also sees some clips as another camera would take them: grey,
  exposed otherwise, nearer, aslant (`studies/embedded_pair/views.py`). One in seven of the drafter's training answers is in the verifier's
  dialect, as both real models share a language-model ancestor that knows either style.
- **Training**: towers on scene facts and patches; then the decoders' lower halves on the same and on what moves; then language under a
  block mask, with the readers of the second stage still asking and the tower following at a lower rate (`studies/embedded_pair/stages.py`).
  Settings: profile {profile} (`provenance.json`). Weights are stored as float16.
- **Licence**: Apache-2.0, as the project.

## Limits

Only what the simulator draws: cars, vans, trucks, buses, pedestrians, cyclists, one kind of traffic light, four kinds of roadside.
On a real recording the answers keep their form; how much of their truth, notebook 00 counts. The drafter cannot know colours, time of
day or what stands still before a static camera: that is the modality gap the workbench studies, not a defect.
"""


def show_sample(sample: Sample) -> list[np.ndarray]:
    """Event frames and video frames of a sample as one row of pictures each, for a notebook's
    figure."""
    return [
        np.concatenate(list(sample.event_frames), axis=1),
        np.concatenate([sample.video[i] for i in frames.uniform_indices(8, 5)], axis=1),
    ]
