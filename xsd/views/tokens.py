"""Token strips: the words of draft and verifier as coloured boxes. Plain HTML with a title on
hover: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from xsd.core import Generation
from xsd.views import theme

State = Literal["accepted", "rejected", "bonus", "verifier", "unused"]
COLOURS: dict[str, tuple[str, str]] = {
    "accepted": (theme.rgba(theme.ADAPTER, 0.22), theme.ADAPTER), "rejected":
        ("#ECEDEF", theme.REJECTED), "bonus": (theme.rgba(theme.VERIFIER, 0.16), theme.VERIFIER),
    "verifier": ("#FFFFFF", theme.rgba(theme.VERIFIER, 0.55)), "unused": ("#FFFFFF", theme.GRID),
}
MEANING = {
    "accepted": "drafted, and the verifier agrees",
    "rejected": "drafted, but the verifier says otherwise",
    "bonus": "the verifier's own token after a draft", "verifier": "the verifier's token",
    "unused": "agrees, but stands after a rejection: lost",
}
_BOX = ("display:inline-block;padding:1px 5px;border-radius:4px;border:1px solid;white-space:pre;"
        "font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;")


@dataclass(frozen=True)
class Token:
    """One box. text: as the tokenizer says it; hover: what the title shows, one fact a line."""

    text: str
    state: State
    hover: Sequence[str] = ()


def visible(text: str) -> str:
    """A token's text with its white space shown: a leading word boundary is dropped, newlines, tabs
    and empty tokens get a sign."""
    shown = text.replace("\u2581", " ").replace("\n", "⏎").replace("\t", "⇥")
    return shown.strip(" ") or ("␣" if shown else "∅")


def box(token: Token) -> str:
    """One token as an HTML span; text and hover are escaped."""
    ground, edge = COLOURS[token.state]
    ink = theme.SOFT_INK if token.state in ("rejected", "unused") else theme.INK
    struck = "text-decoration:line-through;" if token.state == "rejected" else ""
    title = html.escape("\n".join(token.hover), quote=True)
    style = f"{_BOX}background:{ground};border-color:{edge};color:{ink};{struck}"
    return (f'<span class="token {token.state}" style="{style}" '
            f'title="{title}">{html.escape(visible(token.text))}</span>')


def strip(tokens: Iterable[Token], label: str = "") -> str:
    """One row of boxes with an optional label before it."""
    head = f'<span style="font:13px {theme.FONT};color:{theme.SOFT_INK};margin-right:6px">{html.escape(label)}</span>' if label else ""
    return ('<div class="token-strip" data-plain="1" '
            f'style="line-height:2">{head}{" ".join(box(token) for token in tokens)}</div>')


def pairs(tokens: pd.DataFrame, tau: float | None = None, *, label: str = "",
          here: int | None = None) -> str:
    """Draft above verifier, a column a position, wrapping as text does.

    tokens: rows of one sample and level of the token table (``position``, ``cosine``, ``match``,
    ``draft_token``,
    ``verifier_token``, optional ``draft_probability``). tau: None for the token truth, else the
    cosine threshold that colours the draft.
    here: a position to underline.
    """
    ordered = tokens.sort_values("position", kind="stable")
    accepted = ordered["match"].to_numpy(bool) if tau is None else ordered["cosine"].to_numpy(
        float) > tau
    columns, unbroken = [], True
    for ok, row in zip(accepted, ordered.to_dict("records"), strict=True):
        state: State = "accepted" if ok and unbroken else "unused" if ok else "rejected"
        unbroken &= bool(ok)
        facts = _facts(row)
        draft = box(Token(str(row["draft_token"]), state, facts))
        verifier = box(Token(str(row["verifier_token"]), "verifier", facts))
        line = theme.INK if row["position"] == here else "transparent"
        style = ("display:inline-block;text-align:left;margin:2px 3px 6px "
                 f"0;vertical-align:top;border-bottom:3px solid {line}")
        columns.append(f'<span style="{style}">{draft}<br>{verifier}</span>')
    head = f'<div style="font:13px {theme.FONT};color:{theme.SOFT_INK}">{html.escape(label)}</div>' if label else ""
    return f'<div class="token-pairs" data-plain="1">{head}<div>{"".join(columns)}</div></div>'


def _facts(row: dict) -> list[str]:
    facts = [
        f"position {row['position']}", f"draft: {visible(str(row['draft_token']))}",
        f"verifier: {visible(str(row['verifier_token']))}",
    ]
    probability = row.get("draft_probability")
    if probability is not None and not math.isnan(float(probability)):
        facts.append(f"draft probability {float(probability):.3f}")
    if "cosine" in row and not math.isnan(float(row["cosine"])):
        facts.append(f"cosine {float(row['cosine']):.3f}")
    facts.append("same token" if row["match"] else "another token")
    return facts


def rounds(generation: Generation, token_text: Callable[[int], str]) -> str:
    """A live run as it happened: one strip a round: accepted and rejected draft tokens, then the
    verifier's bonus token."""
    rows = []
    for number, one in enumerate(generation.rounds):
        boxes = []
        for place, token in enumerate(one.drafted):
            state: State = "accepted" if place < one.n_accepted else "rejected"
            boxes.append(
                Token(
                    token_text(token), state,
                    [f"round {number} · draft token {place}", f"phase {one.phase}", MEANING[state]
                     ]))
        if one.bonus is not None:
            boxes.append(
                Token(token_text(one.bonus), "bonus", [f"round {number}", MEANING["bonus"]]))
        rows.append(strip(boxes, f"{number}"))
    return f'<div class="token-rounds" data-plain="1">{"".join(rows)}</div>'


def legend(states: Iterable[State] = ("accepted", "rejected", "unused", "bonus",
                                      "verifier")) -> str:
    """What the colours mean."""
    parts = [
        f'<span style="margin-right:14px;white-space:nowrap">{box(Token(state, state))} '
        f'{html.escape(MEANING[state])}</span>'
        for state in states
    ]
    return ('<div class="token-legend" data-plain="1" style="font:12px/2.1 '
            f'{theme.FONT};color:{theme.SOFT_INK}">{" ".join(parts)}</div>')
