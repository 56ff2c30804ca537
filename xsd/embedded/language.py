"""Ten questions and two dialects of answers, grounded in a clip's facts.

The verifier's dialect tells everything a viewer of the video can know; the drafter's tells what an
event camera can know, in other words and another order ("The key elements are …" against "Key
features include …"). Wording follows the facts (time of day, who is there, who moves), so that
neither dialect is one template.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from xsd.core import DatasetError
from xsd.embedded.facts import seen_by_events
from xsd.embedded.phrases import (
    PHRASES,
    WORD_KINDS,
    Dialect,
    Facts,
    article,
    count,
    join,
    name_of,
    say,
)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str


_QUESTIONS = (("key_elements", "What are the key elements in this scene?"),
              ("happening", "What is happening in this scene?"), ("vehicles",
                                                                  "Which vehicles are visible?"),
              ("movement",
               "How are the vehicles moving?"), ("people",
                                                 "Are there any pedestrians or cyclists?"),
              ("traffic_light", "What is the state of the traffic light?"),
              ("time_of_day", "What time of day is it?"), ("ego_motion",
                                                           "How is the camera moving?"),
              ("surroundings", "What are the surroundings of the road?"),
              ("hazard", "What should the driver pay attention to?"),
              )


def questions() -> list[Question]:
    """The ten questions, most frequent first."""
    return [Question(kind, text) for kind, text in _QUESTIONS]


def kind_of(question: str) -> str:
    """The kind of a known question. Raises: DatasetError when the text is none of the ten."""
    for kind, text in _QUESTIONS:
        if text == question:
            return kind
    raise DatasetError(
        f"{question!r} is none of the ten questions of the simulated world; ask one of "
        f"{[text for _, text in _QUESTIONS]}"
    )


def answer(facts: Facts, kind: str, dialect: Dialect = "verifier") -> str:
    """The answer of one dialect to one kind of question.

    facts: as facts.clip_facts gives them (everything visible); the drafter's dialect drops by
    itself what events cannot show.
    Raises: DatasetError for an unknown kind.
    """
    writers = _VERIFIER if dialect == "verifier" else _DRAFTER
    if kind not in writers:
        raise DatasetError(f"unknown kind of question {kind!r}; the world knows {sorted(writers)}")
    text = writers[kind](facts if dialect == "verifier" else seen_by_events(facts))
    return text[0].upper() + text[1:]


# --- the verifier's dialect
# ------------------------------------------------------------------------------------------------


def _v(fact: str, value: str) -> str:
    return say(fact, value, "verifier")


def _v_opening(f: Facts) -> str:
    return {"night": "at night, ", "dusk": "in the evening, ", "day": ""}[f["time"]]


def _v_thing(thing: Facts, *, motion: bool = False, distance: bool = False) -> str:
    words = article(name_of(thing, "verifier"))
    if motion:
        words += " " + _v("motion", thing["motion"])
    if distance and thing["kind"] not in ("pedestrian", "cyclist"):
        words += " " + _v("distance", thing["distance"])
    return words + " " + _v("place", thing["place"])


def _v_scenery(f: Facts) -> str:
    left, right = _v("scenery", f["left"]), _v("scenery", f["right"])
    return f"{left} on both sides" if left == right else f"{left} on the left and {right} on the right"


def _v_key(f: Facts) -> str:
    things = [_v_thing(v, distance=True)
              for v in f["vehicles"]] + [_v_thing(p) for p in f["people"]]
    if f["light"]:
        things.append("a traffic light that " + _v("light", f["light"]))
    if not things:
        return f"{_v_opening(f)}the key elements are an empty road and {_v_scenery(f)}."
    return f"{_v_opening(f)}the key elements are {join(things[:4])}."


def _v_happening(f: Facts) -> str:
    events = [
        f"{article(name_of(t, 'verifier'))} is {_v('motion', t['motion'])} "
        f"{_v('place', t['place'])}"
        for t in (f["vehicles"] + f["people"])[:2]
    ]
    if not events:
        return f"{_v_opening(f)}{_v('ego', f['ego'])} along an empty road with {_v_scenery(f)}."
    return f"{_v_opening(f)}{join(events)} while {_v('ego', f['ego'])}."


def _v_vehicles(f: Facts) -> str:
    if not f["vehicles"]:
        return (f"there are no vehicles on the road, only {_v_scenery(f)} under "
                f"{_v('sky', f['sky'])}.")
    verb = "is one vehicle" if len(
        f["vehicles"]) == 1 else f"are {count(len(f['vehicles']))} vehicles"
    return f"there {verb}: {join([_v_thing(v, distance=True) for v in f['vehicles']])}."


def _v_movement(f: Facts) -> str:
    if not f["vehicles"]:
        return f"no vehicle is moving here, and {_v('ego', f['ego'])} past {_v_scenery(f)}."
    parts = [
        f"the {name_of(v, 'verifier')} {_v('place', v['place'])} is {_v('motion', v['motion'])} "
        f"{_v('distance', v['distance'])}"
        for v in f["vehicles"]
    ]
    return join(parts) + "."


def _v_people(f: Facts) -> str:
    if not f["people"]:
        other = _v_thing(f["vehicles"][0], motion=True) if f["vehicles"] else _v_scenery(f)
        return f"no, there are no pedestrians or cyclists, only {other}."
    return f"yes, there is {join([_v_thing(p, motion=True) for p in f['people']])}."


def _v_light(f: Facts) -> str:
    rest = f"{_v_thing(f['vehicles'][-1], motion=True)}" if f["vehicles"] else _v_scenery(f)
    if not f["light"]:
        return (f"there is no traffic light in view, but there is {rest}."
                if f["vehicles"] else f"there is no traffic light in view, just {rest}.")
    return f"the traffic light {_v('light', f['light'])}, and {_v('ego', f['ego'])} with {rest}."


def _v_time(f: Facts) -> str:
    rest = _v_thing(f["vehicles"][0]) if f["vehicles"] else (
        _v_thing(f["people"][0]) if f["people"] else "an empty road")
    return (f"it is {_v('time', f['time'])} under {_v('sky', f['sky'])}, with {_v_scenery(f)} and "
            f"{rest}.")


def _v_ego(f: Facts) -> str:
    behind = f" behind {_v_thing(f['vehicles'][0], distance=True)}" if f["vehicles"] and f[
        "vehicles"][0]["place"] == "ahead" else ""
    if not behind and f["vehicles"]:
        behind = f" with {_v_thing(f['vehicles'][0], motion=True)}"
    return f"{_v('ego', f['ego'])} past {_v_scenery(f)}{behind}."


def _v_surroundings(f: Facts) -> str:
    end = f", and {_v_thing(f['people'][0])}" if f["people"] else (
        f", and {_v_thing(f['vehicles'][-1])}" if f["vehicles"] else "")
    return f"{_v_opening(f)}there are {_v_scenery(f)} under {_v('sky', f['sky'])}{end}."


def _v_hazard(f: Facts) -> str:
    crossing = [t for t in f["people"] + f["vehicles"] if t["motion"].startswith("crossing")]
    if crossing:
        t = crossing[0]
        return (
            f"the driver must brake for {article(name_of(t, 'verifier'))} "
            f"{_v('motion', t['motion'])}, while {_v('ego', f['ego'])}"
            + _v_then(f, t))
    if f["light"]:
        return f"the driver should obey the traffic light that {_v('light', f['light'])}, as {_v('ego', f['ego'])}" + _v_then(
            f, None)
    if f["people"]:
        t = f["people"][0]
        return f"the driver should give room to {_v_thing(t, motion=True)}" + _v_then(f, t)
    if f["vehicles"]:
        near = min(f["vehicles"], key=lambda v: v["distance"] != "near")
        return f"the driver should keep a distance from {_v_thing(near, motion=True)}" + _v_then(
            f, near)
    return (f"{_v_opening(f)}nothing special: the road is empty and {_v('ego', f['ego'])} past "
            f"{_v_scenery(f)}.")


def _v_then(f: Facts, done: Facts | None) -> str:
    rest = [t for t in f["vehicles"] + f["people"] if t is not done]
    return f", and mind {_v_thing(rest[0])}." if rest else f" past {_v_scenery(f)}."


_VERIFIER = {
    "key_elements": _v_key, "happening": _v_happening, "vehicles": _v_vehicles,
    "movement": _v_movement, "people": _v_people, "traffic_light": _v_light, "time_of_day": _v_time,
    "ego_motion": _v_ego, "surroundings": _v_surroundings, "hazard": _v_hazard,
}  # fmt: skip

# --- the drafter's dialect
# ------------------------------------------------------------------------------------------------


def _d(fact: str, value: str) -> str:
    return say(fact, value, "drafter")


def _d_thing(thing: Facts, *, motion: bool = False, distance: bool = False) -> str:
    words = article(thing["kind"]) + " " + _d("place", thing["place"])
    if motion:
        words += " " + _d("motion", thing["motion"])
    if distance and thing["kind"] not in ("pedestrian", "cyclist"):
        words += ", " + _d("distance", thing["distance"])
    return words


def _d_scenery(f: Facts) -> str:
    if f["left"] is None:
        return "a static background"
    left, right = _d("scenery", f["left"]), _d("scenery", f["right"])
    return f"{left} along both edges" if left == right else f"{left} at the left edge and {right} at the right edge"


def _d_key(f: Facts) -> str:
    things = [_d_thing(v, distance=True)
              for v in f["vehicles"]] + [_d_thing(p) for p in f["people"]]
    if f["light"]:
        things.append("a " + _d("light", "unknown"))
    return f"key features include {join(things[:4])}." if things else f"key features include {_d_scenery(f)}, and nothing else moves."


def _d_happening(f: Facts) -> str:
    events = [
        f"{article(t['kind'])} is {_d('motion', t['motion'])} {_d('place', t['place'])}"
        for t in (f["vehicles"] + f["people"])[:2]
    ]
    return (f"here {_d('ego', f['ego'])}; {join(events)}." if events else
            f"here {_d('ego', f['ego'])}; nothing else moves before {_d_scenery(f)}.")


def _d_vehicles(f: Facts) -> str:
    if not f["vehicles"]:
        return f"nothing like a vehicle moves; one sees {_d_scenery(f)}."
    return f"one sees {join([_d_thing(v, distance=True) for v in f['vehicles']])}."


def _d_movement(f: Facts) -> str:
    if not f["vehicles"]:
        return f"nothing drives, and {_d('ego', f['ego'])}."
    return (join([
        f"the {v['kind']} {_d('place', v['place'])} is {_d('motion', v['motion'])}, "
        f"{_d('distance', v['distance'])}"
        for v in f["vehicles"]
    ]) + ".")


def _d_people(f: Facts) -> str:
    if not f["people"]:
        return "nothing like a person moves" + (
            f", but {_d_thing(f['vehicles'][0], motion=True)} does." if f["vehicles"] else ".")
    return f"one can make out {join([_d_thing(p, motion=True) for p in f['people']])}."


def _d_light(f: Facts) -> str:
    return f"events show a {_d('light', 'unknown')} but not its lamp." if f[
        "light"] else "nothing like a signal fires events."


def _d_time(f: Facts) -> str:
    return f"events do not tell the hour; {_d('ego', f['ego'])}" + (
        f" with {_d_thing(f['vehicles'][0])}." if f["vehicles"] else ".")


def _d_ego(f: Facts) -> str:
    return f"{_d('ego', f['ego'])} before {_d_scenery(f)}."


def _d_surroundings(f: Facts) -> str:
    return f"the edges show {_d_scenery(f)}" + (f" and {_d_thing(f['people'][0])}."
                                                if f["people"] else ".")


def _d_hazard(f: Facts) -> str:
    things = [t for t in f["people"] + f["vehicles"] if t["motion"].startswith("crossing")
              ] or f["people"] or f["vehicles"]
    return (f"watch {_d_thing(things[0], motion=True)}, as {_d('ego', f['ego'])}."
            if things else f"nothing to watch, as {_d('ego', f['ego'])}.")


_DRAFTER = {
    "key_elements": _d_key, "happening": _d_happening, "vehicles": _d_vehicles,
    "movement": _d_movement, "people": _d_people, "traffic_light": _d_light, "time_of_day": _d_time,
    "ego_motion": _d_ego, "surroundings": _d_surroundings, "hazard": _d_hazard,
}  # fmt: skip

# --- reading answers back
# ------------------------------------------------------------------------------------------------


def _lexicon() -> list[tuple[str, str, str]]:
    rows = {(words, fact, value) for fact, values in PHRASES.items()
            for value, pair in values.items() for words in pair if words}
    rows |= {
        ("on the left", "place", "left"), ("on the right", "place", "right"),
        ("on both sides", "place", "both"), ("along both edges", "place", "both"),
    }
    rows |= {("at the left edge", "place", "left"), ("at the right edge", "place", "right"),
             ("static background", "scenery", "static")}
    return sorted(rows, key=lambda row: (-len(row[0]), row))


_LEXICON = _lexicon()
_PATTERN = re.compile(r"\b(" + "|".join(
    re.escape(words) for words in dict.fromkeys(row[0] for row in _LEXICON)) + r")\b")
_MEANING: dict[str, tuple[str, str]] = {}
for _words, _fact, _value in _LEXICON:
    _MEANING.setdefault(_words, (_fact, _value))


def mentions(text: str) -> list[tuple[str, str]]:
    """The facts an answer states, in order: [('colour', 'red'), ('kind', 'van'), ('place', 'left'),
    …]; longest phrases first."""
    return [_MEANING[match.group(1)] for match in _PATTERN.finditer(text.lower())]


def fact_spans(text: str) -> tuple[tuple[int, int], ...]:
    """(start, end) characters of every phrase that states a fact."""
    return tuple(match.span() for match in _PATTERN.finditer(text.lower()))


def score(text: str, facts: Facts, kind: str, dialect: Dialect) -> dict[str, tuple[int, int]]:
    """Facts stated rightly: {fact: (right, expected)}.

    Facts of one kind are compared in the order of mention; one that is missing, wrong or invented
    counts against the answer (expected is the larger of both counts).
    """
    truth, said = mentions(answer(facts, kind, dialect)), mentions(text)
    result = {}
    for fact in sorted({fact for fact, _ in truth} | {fact for fact, _ in said}):
        expected, got = [v for k, v in truth if k == fact], [v for k, v in said if k == fact]
        result[fact] = (sum(a == b for a, b in zip(expected, got, strict=False)),
                        max(len(expected), len(got)))
    return result


def word_kinds(text: str) -> list[tuple[str, str]]:
    """(word, kind) for every word: the fact it states, or ``function``. It tells which rejected
    tokens events could not show."""
    kinds, end = [], 0
    for match in _PATTERN.finditer(text.lower()):
        kinds += [(word, "function") for word in text[end:match.start()].split()]
        kinds += [(word, WORD_KINDS.get(_MEANING[match.group(1)][0], _MEANING[match.group(1)][0]))
                  for word in text[match.start():match.end()].split()]
        end = match.end()
    return kinds + [(word, "function") for word in text[end:].split()]


def duplicate_rate(answers: list[str]) -> float:
    """Share of answers that equal another one in the list exactly."""
    counts = Counter(answers)
    return sum(n for n in counts.values() if n > 1) / len(answers) if answers else 0.0
