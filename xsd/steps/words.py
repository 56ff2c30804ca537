"""Which words are rejected: acceptance by what a word states, for an event camera cannot know a
colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from xsd.embedded import language
from xsd.evaluate import decomposition
from xsd.steps import extraction
from xsd.steps.drafts import Drafts
from xsd.steps.evaluation_old import HeldOut


def token_kinds(token_texts: Sequence[str]) -> list[str]:
    """The kind of word that each token of an answer belongs to: colour, object, motion, …,
    function; "end" for the end of the answer.

    token_texts: texts that join to the answer, word starts carrying their space.
    """
    text, spans = "".join(token_texts), []
    at = 0
    for word, kind in language.word_kinds(text):
        start = text.index(word, at)
        at = start + len(word)
        spans.append((start, at, kind))
    kinds, begin = [], 0
    for token in token_texts:
        end = begin + len(token)
        overlaps = [(min(end, stop) - max(begin, start), kind) for start, stop, kind in spans
                    if start < end and stop > begin]
        kinds.append(max(overlaps, key=lambda pair: pair[0])[1] if overlaps else "function")
        begin = end
    return [
        "end" if token == "</s>" else kind for token, kind in zip(token_texts, kinds, strict=True)
    ]


def by_word_kind(held_out: HeldOut, arms: Mapping[str, Drafts], texts: Sequence[str], *,
                 n_resamples: int, seed: int) -> pd.DataFrame:
    """Acceptance within each kind of word: level, kind, value, low, high, n (tokens), most frequent
    kinds first."""
    answers = extraction.answers(held_out.dataset)
    used = [i for i, ids in enumerate(answers) if len(ids) > 1]
    groups = [
        kind for i in used for kind in token_kinds([texts[token] for token in answers[i]])[1:]
    ]
    clusters = np.repeat([held_out.clusters[i] for i in used], [len(answers[i]) - 1 for i in used])
    matches = {
        level: np.concatenate([drafts.match[i] for i in used]) for level, drafts in arms.items()
    }
    rows = decomposition.gap_by_group(matches, groups, clusters, n_resamples=n_resamples, seed=seed)
    table = pd.DataFrame(rows).rename(columns={"arm": "level", "group": "kind"})
    order = table.groupby("kind")["n"].max().sort_values(ascending=False, kind="stable").index
    table["kind"] = pd.Categorical(table["kind"], categories=list(order), ordered=True)
    table = table.sort_values(["level", "kind"], kind="stable").astype({"kind": str})
    return table[["level", "kind", "value", "low", "high", "n",
                  "n_clusters"]].reset_index(drop=True)
