"""What the acceptance explorer of notebook 07 shows of a selection: plain functions. The widgets
that choose it: xsd/views/controls.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from xsd.core import MetricError, Sample, printable
from xsd.evaluate import curves
from xsd.evaluate import table as token_table
from xsd.views import images, tokens
from xsd.views.safe import Html

PAGE = 50
"""Samples on a page of the list."""
SEARCHED = ("question", "sample", "kind", "draft_token", "verifier_token")
"""Columns that a search reads; a sample's name holds its sequence and clip."""


SHOWN = ("position", "match", "cosine", "accepted", "draft_token", "verifier_token", "kind",
         "draft_probability")
"""Columns of a sample's strips and cards."""


@dataclass(frozen=True, eq=False)
class ExplorerData:
    """What there is to explore: the token table with ``run``, ``draft_token`` and
    ``verifier_token``; what loads the clip behind a sample key (None: not at hand); and what finds
    of run, level and sample key what both models would have said (drafting.alternatives, with
    texts). gammas: of each run, drafts a round, 5 where it is not named."""

    tokens: pd.DataFrame
    sample: Callable[[str], Sample | None] = lambda key: None
    why: Callable[[str, str, str], pd.DataFrame | None] = lambda run, level, key: None
    gammas: Mapping[str, int] = field(default_factory=dict)
    _grids: dict[tuple[str, str], curves.Level] = field(default_factory=dict)

    def __post_init__(self) -> None:
        token_table.check(self.tokens, "cosine", "match")
        missing = {"run", "draft_token", "verifier_token"} - set(self.tokens.columns)
        if missing:
            raise MetricError(
                f"the explorer's token table lacks the column(s) {', '.join(sorted(missing))}; "
                "write them when evaluating (notebook 04 does)")
        texts = {"run", "level", *SEARCHED} & set(self.tokens.columns)
        texts = [name for name in texts if self.tokens[name].dtype != "category"]
        found = self.tokens.astype(dict.fromkeys(texts, "category"))
        names = found["sample"].cat.categories
        if not names.is_monotonic_increasing:  # so that codes sort as names do
            found["sample"] = found["sample"].cat.reorder_categories(sorted(names))
        object.__setattr__(self, "tokens", found)
        codes = [found[name].cat.codes.to_numpy() for name in ("run", "level")]
        begins = np.append(True, np.any([one[1:] != one[:-1] for one in codes], axis=0))
        places = found[["run", "level"]].iloc[np.flatnonzero(begins)].drop_duplicates().astype(str)
        held = {run: part.tolist() for run, part in places.groupby("run", sort=False)["level"]}
        object.__setattr__(self, "_held", held)

    @property
    def runs(self) -> list[str]:
        """Names of the runs, as they come."""
        return list(self._held)

    def levels(self, run: str) -> list[str]:
        """Levels evaluated in a run, as they come."""
        return list(self._held[run])

    def grid(self, run: str, level: str) -> curves.Level:
        """The answers of one level of a run as arrays, made once."""
        if (run, level) not in self._grids:
            own = np.flatnonzero((self.tokens["run"] == run) & (self.tokens["level"] == level))
            columns = self.tokens[["run", "level", "sample", "sequence", "position", "match",
                                   "cosine"]]
            block = slice(own[0], own[-1] + 1)  # a level's rows mostly are one: nothing is copied
            part = columns.iloc[block if block.stop - block.start == len(own) else own]
            part = part.assign(_row=own)
            self._grids[run, level] = curves.Level(level, part, "match", "cosine", "_row")
        return self._grids[run, level]


@dataclass(frozen=True)
class Selection:
    """What is being looked at. tau: None for the token truth, else a cosine threshold. listed: the
    level whose samples are listed (None: the first), of them only those that hold every word of
    ``search``, of one ``kind`` of word here, and rejected here (``rejected``)."""

    run: str
    levels: tuple[str, ...]
    tau: float | None = None
    curve: str = "marginal"
    position: int = 0
    sample: str | None = None
    listed: str | None = None
    search: str = ""
    kind: str = ""
    rejected: bool = False
    page: int = 0


def grids(data: ExplorerData, selection: Selection) -> list[curves.Level]:
    """The chosen levels of the chosen run. Raises: MetricError when one is not there."""
    if selection.run not in data.runs:
        raise MetricError(
            f"there is no run named {selection.run!r} here; choose from {', '.join(data.runs)}")
    known = data.levels(selection.run)
    unknown = [level for level in selection.levels if level not in known]
    if unknown or not selection.levels:
        raise MetricError(
            f"run {selection.run!r} has no level {', '.join(unknown) or '(none chosen)'}; choose "
            f"from {', '.join(known)}")
    return [data.grid(selection.run, level) for level in selection.levels]


def curve(data: ExplorerData, selection: Selection) -> pd.DataFrame:
    """Acceptance by position (``curves.by_position``), levels in the order chosen."""
    return pd.concat([one.by_position(selection.tau, n_resamples=curves.RESAMPLES)
                      for one in grids(data, selection)], ignore_index=True)


def headline(data: ExplorerData, selection: Selection) -> str:
    """One line: the rule, and the unbroken prefix of each level with its interval."""
    rule = "same token" if selection.tau is None else f"cosine > {selection.tau:.2f}"
    found = {one.name: one.unbroken_prefix(selection.tau, n_resamples=curves.RESAMPLES)
             for one in grids(data, selection)}
    parts = ", ".join(f"{level} {one.text(percent=False)}" for level, one in found.items())
    n = max(one.n for one in found.values())
    return f"{rule} · unbroken prefix: {parts} · n = {n}"


def samples_at(data: ExplorerData, selection: Selection) -> pd.DataFrame:
    """Samples of the listed level that have the chosen position and are searched for, with their
    texts there; the rejected first, then by cosine."""
    level = selection.listed if selection.listed in selection.levels else selection.levels[0]
    (grid,) = grids(data, replace(selection, levels=(level,)))
    at = selection.position - grid.first
    there = np.flatnonzero(grid.inside[:, at]) if 0 <= at < grid.inside.shape[1] else []
    rows = grid.columns["_row"][there, at]
    columns = ("sample", "question", "kind", "draft_token", "verifier_token", "cosine")
    here = data.tokens[[name for name in columns if name in data.tokens]].iloc[rows]
    here = here.assign(accepted=grid.right(selection.tau)[there, at])
    keep = ~here["accepted"].to_numpy() | (not selection.rejected)
    if selection.kind and "kind" in here:
        keep &= (here["kind"] == selection.kind).to_numpy()
    for word in selection.search.split():
        keep &= np.any([_holding(here[name], word) for name in SEARCHED if name in here], axis=0)
    order = np.lexsort((here["sample"].cat.codes, here["cosine"], here["accepted"]))
    return here.iloc[order[keep[order]]].reset_index(drop=True)


def _holding(texts: pd.Series, word: str) -> np.ndarray:
    """bool [rows]: which hold a word; every different text is read once."""
    found = texts.cat.categories.str.contains(word, case=False, regex=False)
    return np.append(found, False)[texts.cat.codes]  # code -1, of no text, is the last one


def line_of(row: dict) -> str:
    """A row of :func:`samples_at` as the list shows it."""
    sign = "✓" if row["accepted"] else "✗"
    question = f" · {row['question']}" if "question" in row else ""
    said = (f"{tokens.visible(str(row['draft_token']))} → "
            f"{tokens.visible(str(row['verifier_token']))}")
    return printable(f"{sign} {row['cosine']:.3f}  {said}  · {row['sample']}{question}")


@lru_cache(maxsize=32)
def _of_sample(data: ExplorerData, run: str, level: str, sample: str) -> pd.DataFrame:
    """The rows of a sample and level, by position."""
    grid = data.grid(run, level)
    at = np.flatnonzero((grid.about["sample"] == sample).to_numpy())
    rows = grid.columns["_row"][at][grid.inside[at]]
    return data.tokens[[name for name in SHOWN if name in data.tokens]].iloc[rows]


def strips(data: ExplorerData, selection: Selection) -> Html:
    """Draft over verifier of the chosen sample, round by round, one strip per chosen level."""
    rows = {level: _of_sample(data, selection.run, level, selection.sample)
            for level in selection.levels}
    gamma = data.gammas.get(selection.run, 5)
    parts = [tokens.pairs(own, selection.tau, here=selection.position, gamma=gamma,
                          label=f"{level}: draft above, verifier below")
             for level, own in rows.items() if len(own)]
    if not parts:
        return tokens.caption(f"No sample has position {selection.position} here.")
    return Html().join(parts) + tokens.legend()


def pictures(data: ExplorerData, selection: Selection) -> Html:
    """Event frames and video frames of the chosen sample, or why not."""
    sample = data.sample(selection.sample) if selection.sample else None
    if sample is None:
        return tokens.caption(f"The pictures of {selection.sample} are not at hand.")
    return images.sensors(sample, side=112, large=480)


def reasons(data: ExplorerData, selection: Selection) -> Html:
    """Why the drafts at the chosen position were accepted or not: what each level and the verifier
    held for likeliest there, and how near they were."""
    cards = []
    for level in selection.levels:
        own = _of_sample(data, selection.run, level, selection.sample)
        here = own[own["position"] == selection.position]
        if here.empty:
            continue
        known = data.why(selection.run, level, selection.sample)
        at = known[known["position"] == selection.position] if known is not None else None
        cards.append(tokens.reason(level, here.iloc[0].to_dict(),
                                   at.iloc[0].to_dict() if at is not None and len(at) else None))
    return Html('<div class="reasons" data-plain="1">{}</div>').format(Html().join(cards))
