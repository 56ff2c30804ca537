"""What the embedded pair says about a real road that it was never shown: its answers about the
recording against what a person sees there.

The recording looks down on a street from a window, by day, with parked and passing cars before
houses and trees: another camera, another height, grey pictures. So this asks for sense, not for
accuracy: of the few facts that can be told from the video by eye.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch

from xsd.embedded import language
from xsd.steps import data

SEEN = {"time": ("day",), "ego": ("stopped",), "scenery": ("houses", "trees"), "vehicle": ("car",)}
"""fact → what a person sees in ``data/davis_road`` (both kinds of scenery are there)."""
_VEHICLES = ("car", "van", "truck", "bus")


def stated(text: str) -> list[tuple[str, str]]:
    """The (fact, value) of an answer that SEEN can judge, in the order of mention."""
    named = [("vehicle" if fact == "kind" and value in _VEHICLES else fact, value)
             for fact, value in language.mentions(text)]
    return [(fact, value) for fact, value in named if fact in SEEN and value != "static"]


def judge(pair: Any, simulated: Iterable[tuple[Any, dict[str, Any], str]], *,
          max_new_tokens: int = 64) -> pd.DataFrame:
    """Both models' ten answers about each of the recording's three clips.

    simulated: of simulated drives, as card.held_out gives them: how often the right answers there
    state the same values is what a model that ignores its sensor would reach (``by_chance``).

    Returns: one row per role and fact: role, fact, right, stated, share, by_chance (NaN where never
    stated). 30 answers of three overlapping clips of one scene: too few for an interval.
    """
    rows = list(simulated)
    asked = [lazy.load() for lazy in data.samples(data.root_of("", data.RECORDED, "test"), "test")]
    lines = []
    for role in ("verifier", "drafter"):
        handle = getattr(pair, role)
        with torch.inference_mode():
            answers = handle.generate(asked, max_new_tokens)
        said = [one for answer in answers for one in stated(handle.text(answer.ids.tolist()))]
        usual = [one for _, facts, kind in rows
                 for one in stated(language.answer(facts, kind, role))]
        for fact, values in SEEN.items():
            own, there = (pd.Series([value in values for name, value in some if name == fact],
                                    dtype=float) for some in (said, usual))
            lines.append({"role": role, "fact": fact, "right": int(own.sum()), "stated": len(own),
                          "share": own.mean(), "by_chance": there.mean()})
    return pd.DataFrame(lines)
