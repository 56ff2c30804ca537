"""Token strips: the words of draft and verifier as coloured boxes, facts on hover."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import numpy as np
import pandas as pd

from xsd.core import Generation, Round, depths
from xsd.evaluate import rounds as evaluated
from xsd.views import theme
from xsd.views.safe import Html

COLOURS = {
    "accepted": ("#C7E9DF", theme.ADAPTER),
    "rejected": ("#ECEDEF", theme.REJECTED),
    "bonus": ("#D6E7F3", theme.VERIFIER),
    "verifier": ("#FFFFFF", theme.rgba(theme.VERIFIER, 0.55)),
    "unused": ("#FFFFFF", theme.GRID),
}
"""What a box can be, with its ground and its edge."""
MEANING = {
    "accepted": "drafted, and the verifier agrees",
    "rejected": "drafted, but the verifier says otherwise",
    "bonus": "the verifier's own token after a draft",
    "verifier": "the verifier's token",
    "unused": "not drafted: the round was full, or the prefill gives it",
}
_BOX = ("display:inline-block;padding:1px 5px;border-radius:4px;border:1px solid;white-space:pre;"
        "font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;")


def visible(text: str) -> str:
    """A token's text: a leading word boundary dropped, other white space and nothing as signs."""
    shown = text.replace("\u2581", " ").replace("\n", "⏎").replace("\t", "⇥")
    return shown.strip(" ") or ("␣" if shown else "∅")


def box(text: str, state: str, hover: Sequence[str] = ()) -> Html:
    """One token as an HTML span. state: one of ``COLOURS``. hover: one fact per line."""
    hover, shown = Html.escape("\n".join(hover)), Html.escape(visible(text))
    return Html("".join((_opening(state), hover, '">', shown, "</span>")))


@cache
def _opening(state: str) -> str:
    """A box up to what its hover says: a strip has hundreds, and formatting takes its time."""
    ground, edge = COLOURS[state]
    ink = theme.SOFT_INK if state in ("rejected", "unused") else theme.INK
    struck = "text-decoration:line-through;" if state == "rejected" else ""
    style = f"{_BOX}background-color:{ground};border-color:{edge};color:{ink};{struck}"
    return Html('<span class="token {}" style="{}" title="').format(state, style)


def caption(text: str, tag: str = "div") -> Html:
    """A line of small grey text; nothing for an empty one."""
    style = f"font:13px {theme.FONT};opacity:.75;margin-right:6px"  # in any page's ink
    line = Html('<{0} data-plain="1" style="{1}">{2}</{0}>').format(tag, style, text)
    return line if text else Html()


def pairs(tokens: pd.DataFrame, tau: float | None = None, *, label: str = "",
          here: int | None = None, gamma: int = 5) -> Html:
    """Draft above verifier, one column per position, in the rounds of a greedy loop: each begins
    after the verifier's own token that ended the one before it. Wraps as text does.

    tokens: rows of one sample and level of the token table, with its texts. tau: None for the token
    truth, else the cosine threshold that colours the draft. here: a position to underline. gamma:
    drafts a round, where the table does not say what a round accepts."""
    rows = tokens.sort_values("position", kind="stable").to_dict("records")
    strips = []
    for number, part, n_accepted in _rounds(rows, tau, gamma):
        columns = []
        for place, row in enumerate(part):
            drafted = number > 0 and (place < n_accepted or n_accepted < gamma)
            state = "accepted" if place < n_accepted else "rejected" if drafted else "unused"
            line = "currentColor" if row["position"] == here else "transparent"
            said = "verifier" if place < n_accepted else "bonus"
            facts = _facts(row)
            columns += ['<span style="display:inline-block;text-align:left;margin:2px 3px 4px 0;'
                        f'vertical-align:top;border-bottom:3px solid {line}">',
                        box(str(row["draft_token"]), state, facts), "<br>",
                        box(str(row["verifier_token"]), said, facts), "</span>"]
        about = f"round {number}: {n_accepted} accepted" if number else "from the prefill"
        strips.append(Html(
            '<span class="token-round" title="{0}" style="display:inline-block;margin:2px 6px 4px '
            '0;padding-left:4px;border-left:2px solid {1}">{2}{3}</span>').format(
                about, theme.REJECTED, caption(about), Html("".join(columns))))
    return Html('<div class="token-pairs" data-plain="1">{}<div>{}</div></div>').format(
        caption(label), Html().join(strips))


def _rounds(rows: Sequence[dict], tau: float | None,
            gamma: int) -> Iterator[tuple[int, Sequence[dict], int]]:
    """Number, rows and accepted drafts of each round; number 0: what the prefill gives."""
    given = [row for row in rows if row["position"] < 0]
    rows = rows[len(given):]
    yield from [(0, given, 0)] * bool(given)
    if not rows:
        return
    right = [[bool(row["match"] if tau is None else row["cosine"] > tau) for row in rows]]
    known = tau is None and "accepted" in rows[0]
    runs = [[row["accepted"] for row in rows]] if known else evaluated.runs_of(right, gamma)
    found = evaluated.walk(runs, [len(rows)], max(gamma, int(np.max(runs))))
    start = 0
    for number, (accepted, bonus) in enumerate(zip(found.accepted, found.bonus, strict=True), 1):
        end = start + int(accepted + bonus)
        yield number, rows[start:end], int(accepted)
        start = end


def reason(level: str, row: dict, found: dict | None = None) -> Html:
    """Why a draft was accepted or not: a card of one row of the token table. found: the same row of
    drafting.alternatives, with draft_texts and verifier_texts; None: it is not at hand."""
    said = [visible(str(row[name])) for name in ("draft_token", "verifier_token")]
    facts = [f"position {row['position']}"]
    if not math.isnan(row.get("cosine", math.nan)):
        facts.append(f"cosine {row['cosine']:.3f}")
    if "kind" in row:
        facts.append(f"kind of word: {row['kind']}")
    head = f"{level}: {said[0]} is the verifier's token, too" if row["match"] else (
        f"{level}: {said[0]} drafted, {said[1]} said by the verifier")
    lists = caption("The two models' other choices are not at hand here.")
    if found is not None:
        n, behind = found["rank"], found["margin"]
        if not row["match"]:
            place = f"choice {n + 1}" if n >= 0 else "no choice"
            facts.append(f"the verifier's token is {place} of the draft" + (
                f", {behind:.2f} nats behind its best" if n >= 0 else ": not in its vocabulary"))
        facts.append(f"the verifier's own best leads its second by {found['certainty']:.2f} nats")
        lists = Html().join(
            _choices(title, found[f"{side}_texts"], found[f"{side}_probabilities"], colour)
            for side, title, colour in (("draft", f"{level} would draft", theme.ADAPTER),
                                        ("verifier", "the verifier would say", theme.VERIFIER)))
    return Html('<div class="reason" style="display:inline-block;vertical-align:top;max-width:'
                '480px;margin:4px 16px 8px 0;font:13px/1.6 {}"><b>{}</b>{}{}</div>').format(
                    theme.FONT, head, caption(" · ".join(facts)), lists)


def _choices(title: str, texts: Sequence[str], probabilities: Sequence[float],
             colour: str) -> Html:
    """Candidates, best first, each with a bar as long as its probability."""
    bar = Html('<div style="white-space:nowrap"><span style="display:inline-block;width:{}px;'
               'height:9px;margin-right:6px;background-color:{}"></span>{} {}</div>')
    bars = [bar.format(max(1, round(90 * p)), colour, f"{p:.1%}", box(text, "verifier"))
            for text, p in zip(texts, probabilities, strict=True)]
    return Html('<div style="display:inline-block;vertical-align:top;min-width:200px;'
                'margin-right:10px">{}{}</div>').format(caption(title), Html().join(bars))


def _facts(row: dict) -> list[str]:
    facts = [f"position {row['position']}", f"draft: {visible(str(row['draft_token']))}",
             f"verifier: {visible(str(row['verifier_token']))}"]
    for name, said in (("draft_probability", "draft probability"), ("cosine", "cosine")):
        if not math.isnan(row.get(name, math.nan)):
            facts.append(f"{said} {row[name]:.3f}")
    return [*facts, "same token" if row["match"] else "another token"]


def rounds(generation: Generation, token_text: Callable[[int], str]) -> Html:
    """A live run, one strip per round: accepted and rejected draft tokens, then the bonus; of a
    draft tree a row for each branch."""
    strips = [Html('<div class="token-strip" data-plain="1" style="line-height:2">{}{}</div>'
                   ).format(caption(str(number), "span"), one_round(one, token_text, number))
              for number, one in enumerate(generation.rounds)]
    return Html('<div class="token-rounds" data-plain="1">{}</div>').format(Html().join(strips))


def one_round(one: Round, token_text: Callable[[int], str], number: int) -> Html:
    """The boxes of a live round."""
    boxes = []
    for place, token in enumerate(one.drafted):
        state = "accepted" if place < one.n_accepted else "rejected"
        about = f"round {number} · draft token {place}", f"phase {one.phase}", MEANING[state]
        boxes.append(box(token_text(token), state, about))
    drawn = Html(" ").join(boxes)
    if one.parents is not None and max(depths(one.parents), default=0) < len(boxes):
        drawn = _tree(one.parents, boxes)
    if one.bonus is None:
        return drawn
    about = f"round {number}", MEANING["bonus"]
    return drawn + Html(" ") + box(token_text(one.bonus), "bonus", about)


def verified(generation: Generation, number: int) -> int:
    """How many tokens of the answer stand when a round begins."""
    return sum(one.n_accepted + (one.bonus is not None) for one in generation.rounds[:number])


def step(generation: Generation, number: int, token_text: Callable[[int], str]) -> Html:
    """A live answer at one of its rounds: what stands already, what is drafted, what it took."""
    if not generation.rounds:
        return caption("This arm drafts nothing; its answer:") + Html(" ").join(
            box(token_text(token), "verifier") for token in generation.ids)
    one, done = generation.rounds[number], generation.ids[:verified(generation, number)]
    facts = [f"round {number} of {len(generation.rounds) - 1}", one.phase.replace("_", " "),
             f"{one.n_accepted} of {one.depth} accepted"]
    for what, start, end in (("draft", one.draft_start_s, one.draft_end_s),
                             ("verify", one.verify_start_s, one.verify_end_s)):
        facts += [f"{what} {1e3 * (end - start):.1f} ms"] * (end > start)
    text = Html(" ").join(box(token_text(token), "verifier") for token in done)
    return Html('<div class="token-step" data-plain="1" style="line-height:2">{}{}{}<div>{}</div>'
                "</div>").format(caption("the answer so far"), text, caption(" · ".join(facts)),
                                 one_round(one, token_text, number))


def _tree(parents: Sequence[int], boxes: Sequence[Html]) -> Html:
    """Depth by depth to the right; what branches off begins a row of its own."""
    cell = Html('<span style="grid-column:{};grid-row:{}">{}</span>')
    cells, row = [], 1

    def grow(parent: int, depth: int) -> None:
        nonlocal row
        for n, node in enumerate(i for i, above in enumerate(parents) if above == parent):
            row += n > 0
            cells.append(cell.format(depth, row, boxes[node]))
            grow(node, depth + 1)

    grow(-1, 1)
    return Html('<span class="token-tree" style="display:inline-grid;grid-auto-columns:max-content;'
                'gap:2px 4px;vertical-align:top">{}</span>').format(Html().join(cells))


def legend(states: Iterable[str] = tuple(COLOURS)) -> Html:
    """What the colours mean."""
    part = Html('<span style="margin-right:14px;white-space:nowrap">{} {}</span>')
    parts = [part.format(box(state, state), MEANING[state]) for state in states]
    style = f"font:12px/2.1 {theme.FONT}"
    return Html('<div class="token-legend" data-plain="1" style="{}">{}</div>').format(
        style, Html(" ").join(parts))
