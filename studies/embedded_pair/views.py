"""The same drives as another camera would take them: grey, exposed otherwise, nearer, aslant
(domain randomisation of the training).

A model that has only ever seen the simulator's own camera takes a dark grey picture for the evening
and a road that runs aslant for a turn (docs/log.md). A view teaches what does not depend on the
camera, and asks for nothing else: the time of day, and whether the camera stands or turns. What is
held out, the demo and the card keep the simulator's own camera.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studies.embedded_pair.corpus import LABELS, Corpus, Dialogue
from xsd.embedded import language
from xsd.sensors.timed_video import luminance

_EGO = ("stopped", "left", "right")
"""Camera motions that a nearer view keeps; slow and fast change places."""


@dataclass(frozen=True)
class View:
    """zoom: 1 is the whole picture. roll_degrees: of the camera. right, down: of the view's centre,
    as shares of the room that is left. gain: of the grey values."""

    zoom: float
    roll_degrees: float
    right: float
    down: float
    gain: float

    def places(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) float [size, size]: where in the picture each pixel of the view lies,
        always inside it."""
        angle, half = np.radians(self.roll_degrees), (size - 1) / 2
        reach = half / self.zoom
        room = max(0.0, half - reach * (np.cos(angle) + abs(np.sin(angle))))
        y, x = np.meshgrid(*[np.linspace(-reach, reach, size)] * 2, indexing="ij")
        row = half + room * self.down + x * np.sin(angle) + y * np.cos(angle)
        column = half + room * self.right + x * np.cos(angle) - y * np.sin(angle)
        return np.clip(row, 0, size - 1), np.clip(column, 0, size - 1)

    def of_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [F, s, s, 3] → the same, grey, between four neighbours each."""
        grey = luminance(pictures)
        row, column = self.places(grey.shape[-1])
        top, left = (np.minimum(place.astype(int), grey.shape[-1] - 2) for place in (row, column))
        below, aside = (row - top).astype(np.float32), (column - left).astype(np.float32)
        upper = grey[:, top, left] * (1 - aside) + grey[:, top, left + 1] * aside
        lower = grey[:, top + 1, left] * (1 - aside) + grey[:, top + 1, left + 1] * aside
        seen = (upper * (1 - below) + lower * below) * self.gain + 0.5
        return np.repeat(np.clip(seen, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)

    def of_layout(self, codes: np.ndarray) -> np.ndarray:
        """uint16 [F, c, c] → the same: what stands in each cell of the view."""
        row, column = (np.rint(place).astype(int) for place in self.places(codes.shape[-1]))
        return codes[:, row, column]


def random_view(rng: np.random.Generator) -> View:
    """Up to 1.8 times nearer, rolled by up to eight degrees, from half as bright to a little
    brighter."""
    return View(rng.uniform(1.15, 1.8), rng.uniform(-8, 8), rng.uniform(-1, 1), rng.uniform(-1, 1),
                rng.uniform(0.5, 1.05))


class Viewed:
    """An array [N, …] that goes on behind its end with views of some of its own rows, made when
    they are asked for."""
    def __init__(self, array: np.ndarray, of: Sequence[int], seed: int,
                 see: Callable[[View, np.ndarray], np.ndarray]) -> None:
        self._array, self._of = array, np.asarray(of, dtype=np.int64)
        self._seed, self._see = seed, see
        self.shape = (len(array) + len(self._of), *array.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """rows: int64 [n] → [n, …]."""
        rows = np.asarray(rows)
        n = len(self._array)
        behind = np.flatnonzero(rows >= n)
        source = rows.copy()
        source[behind] = self._of[rows[behind] - n]
        out = np.array(self._array[source])
        for at in behind:
            view = random_view(np.random.default_rng([self._seed, int(rows[at])]))
            out[at] = self._see(view, out[at])
        return out


@dataclass(frozen=True)
class Material:
    """What one model's training reads of N clips (and of the views behind them). images: uint8 [N,
    F, s, s, 3]. layout: uint16 [N, F, c, c]. labels: int64 [N, n_facts], -1 not asked.
    colour_known: bool [N]. dialogues: a list a clip."""

    images: np.ndarray | Viewed
    layout: np.ndarray | Viewed
    labels: np.ndarray
    colour_known: np.ndarray
    dialogues: list[list[Dialogue]]


def events(drives: Corpus) -> Material:
    """The drafter's training material: event frames, which no view is made of (what leaves events
    depends on the camera)."""
    colours = np.array([not facts["grey"] for facts in drives.facts])
    return Material(drives.event_frames, drives.layout[:, 8:], drives.label_matrix("drafter"),
                    colours, drives.dialogues("drafter"))


def with_views(drives: Corpus, *, share: float, seed: int) -> Material:
    """The verifier's training material: every clip of the drives, and behind them views of
    ``share`` as many."""
    n = len(drives)
    of = np.random.default_rng([seed, n]).choice(n, size=round(share * n), replace=False)
    labels = drives.label_matrix("verifier")
    kept = np.full((len(of), len(LABELS)), -1, np.int64)
    names = list(LABELS)
    kept[:, names.index("time")] = labels[of, names.index("time")]
    turns = np.array([drives.facts[i]["ego"] in _EGO for i in of], dtype=bool)
    kept[:, names.index("ego")] = np.where(turns, labels[of, names.index("ego")], -1)
    colours = np.array([not facts["grey"] for facts in drives.facts] + [False] * len(of))
    dialogues = drives.dialogues("verifier") + [_asked_of_a_view(drives.facts[i]) for i in of]
    return Material(Viewed(drives.video, of, seed, View.of_pictures),
                    Viewed(drives.layout[:, :8], of, seed, View.of_layout),
                    np.concatenate([labels, kept]), colours, dialogues)


def _asked_of_a_view(facts: dict[str, Any]) -> list[Dialogue]:
    """The time of day and, where a view keeps it, the camera's motion: each answer up to the first
    fact it states."""
    asked = []
    for question in language.questions():
        turns = question.kind == "ego_motion" and facts["ego"] in _EGO
        if question.kind == "time_of_day" or turns:
            text = language.answer(facts, question.kind, "verifier")
            start, end, *_ = language.spans(text)[0]
            asked.append(Dialogue(question.text, text[:end], ((start, end),), whole=False))
    return asked
