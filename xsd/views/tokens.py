"""Token strips: the words of draft and verifier as coloured boxes, facts on hover."""

import math
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from xsd.core import Generation
from xsd.views import theme
from xsd.views.safe import Html

COLOURS = {
    "accepted": (theme.rgba(theme.ADAPTER, 0.22), theme.ADAPTER),
    "rejected": ("#ECEDEF", theme.REJECTED),
    "bonus": (theme.rgba(theme.VERIFIER, 0.16), theme.VERIFIER),
    "verifier": ("#FFFFFF", theme.rgba(theme.VERIFIER, 0.55)),
    "unused": ("#FFFFFF", theme.GRID),
}
"""What a box can be, with its ground and its edge."""
MEANING = {
    "accepted": "drafted, and the verifier agrees",
    "rejected": "drafted, but the verifier says otherwise",
    "bonus": "the verifier's own token after a draft",
    "verifier": "the verifier's token",
    "unused": "agrees, but stands after a rejection: lost",
}
_BOX = ("display:inline-block;padding:1px 5px;border-radius:4px;border:1px solid;white-space:pre;"
        "font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;")


def visible(text: str) -> str:
    """A token's text: a leading word boundary dropped, other white space and nothing as signs."""
    shown = text.replace("\u2581", " ").replace("\n", "⏎").replace("\t", "⇥")
    return shown.strip(" ") or ("␣" if shown else "∅")


def box(text: str, state: str, hover: Sequence[str] = ()) -> Html:
    """One token as an HTML span. state: one of ``COLOURS``. hover: one fact per line."""
    ground, edge = COLOURS[state]
    ink = theme.SOFT_INK if state in ("rejected", "unused") else theme.INK
    struck = "text-decoration:line-through;" if state == "rejected" else ""
    style = f"{_BOX}background-color:{ground};border-color:{edge};color:{ink};{struck}"
    return Html('<span class="token {}" style="{}" title="{}">{}</span>').format(
        state, style, "\n".join(hover), visible(text))


def caption(text: str, tag: str = "div") -> Html:
    """A line of small grey text; nothing for an empty one."""
    style = f"font:13px {theme.FONT};color:{theme.SOFT_INK};margin-right:6px"
    line = Html('<{0} data-plain="1" style="{1}">{2}</{0}>').format(tag, style, text)
    return line if text else Html()


def pairs(tokens: pd.DataFrame, tau: float | None = None, *, label: str = "",
          here: int | None = None) -> Html:
    """Draft above verifier, one column per position, wrapping as text does.

    tokens: rows of one sample and level of the token table, with its texts. tau: None for the
    token truth, else the cosine threshold that colours the draft. here: a position to underline."""
    columns, unbroken = [], True
    for row in tokens.sort_values("position", kind="stable").to_dict("records"):
        right = bool(row["match"] if tau is None else row["cosine"] > tau)
        unbroken = unbroken and right
        state = "accepted" if unbroken else "unused" if right else "rejected"
        facts = _facts(row)
        line = theme.INK if row["position"] == here else "transparent"
        columns.append(Html(
            '<span style="display:inline-block;text-align:left;margin:2px 3px 6px 0;'
            'vertical-align:top;border-bottom:3px solid {}">{}<br>{}</span>').format(
                line, box(str(row["draft_token"]), state, facts),
                box(str(row["verifier_token"]), "verifier", facts)))
    return Html('<div class="token-pairs" data-plain="1">{}<div>{}</div></div>').format(
        caption(label), Html().join(columns))


def _facts(row: dict) -> list[str]:
    facts = [f"position {row['position']}", f"draft: {visible(str(row['draft_token']))}",
             f"verifier: {visible(str(row['verifier_token']))}"]
    for name, said in (("draft_probability", "draft probability"), ("cosine", "cosine")):
        if not math.isnan(row.get(name, math.nan)):
            facts.append(f"{said} {row[name]:.3f}")
    return [*facts, "same token" if row["match"] else "another token"]


def rounds(generation: Generation, token_text: Callable[[int], str]) -> Html:
    """A live run, one strip per round: accepted and rejected draft tokens, then the bonus."""
    strips = []
    for number, one in enumerate(generation.rounds):
        boxes = []
        for place, token in enumerate(one.drafted):
            state = "accepted" if place < one.n_accepted else "rejected"
            about = f"round {number} · draft token {place}", f"phase {one.phase}", MEANING[state]
            boxes.append(box(token_text(token), state, about))
        if one.bonus is not None:
            about = f"round {number}", MEANING["bonus"]
            boxes.append(box(token_text(one.bonus), "bonus", about))
        strips.append(Html('<div class="token-strip" data-plain="1" style="line-height:2">{}{}'
                           "</div>").format(caption(str(number), "span"), Html(" ").join(boxes)))
    return Html('<div class="token-rounds" data-plain="1">{}</div>').format(Html().join(strips))


def legend(states: Iterable[str] = tuple(COLOURS)) -> Html:
    """What the colours mean."""
    part = Html('<span style="margin-right:14px;white-space:nowrap">{} {}</span>')
    parts = [part.format(box(state, state), MEANING[state]) for state in states]
    style = f"font:12px/2.1 {theme.FONT};color:{theme.SOFT_INK}"
    return Html('<div class="token-legend" data-plain="1" style="{}">{}</div>').format(
        style, Html(" ").join(parts))
