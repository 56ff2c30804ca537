"""Ten questions, and two dialects of answers written from a clip's facts and read back: the
verifier's tells what a viewer of the video can know, the drafter's what an event camera can, in
other words and another order. Of a question's sentences the first counts whose words are all there.
"""

import re
from typing import Any, Literal, NamedTuple

from xsd.core import DatasetError

Dialect = Literal["verifier", "drafter"]
Facts = dict[str, Any]
PEOPLE = ("pedestrian", "cyclist")

# fact -> value -> (verifier's words, drafter's words)
PHRASES: dict[str, dict[str, tuple[str, str]]] = {
    "place": {"left": ("on the left side", "to the left"), "ahead": ("straight ahead", "in front"),
              "right": ("on the right side", "to the right")},
    "distance": {"near": ("close by", "nearby"), "far": ("farther away", "in the distance")},
    "motion": {
        "parked": ("parked", "standing still"),
        "approaching": ("coming towards us", "moving closer"),
        "away": ("driving away", "moving off"),
        "waiting": ("waiting", "at rest"),
        "crossing_right": ("crossing from left to right", "passing rightwards"),
        "crossing_left": ("crossing from right to left", "passing leftwards"),
        "standing": ("standing on the kerb", "hardly moving"),
    },
    "ego": {
        "stopped": ("we are standing", "the camera is static"),
        "slow": ("we are rolling slowly", "the camera moves slowly"),
        "fast": ("we are driving fast", "the camera moves fast"),
        "left": ("we are turning left", "the camera turns left"),
        "right": ("we are turning right", "the camera turns right"),
    },
    "scenery": {
        "towers": ("tall buildings", "high facades"),
        "houses": ("low houses", "small houses"),
        "trees": ("green trees", "trees"),
        "fields": ("open fields", "open ground"),
    },
    "time": {"day": ("day", "day"), "dusk": ("evening", "evening"), "night": ("night", "night")},
    "sky": {"clear": ("a clear sky",) * 2, "overcast": ("an overcast sky",) * 2},
    "kind": {k: (k, k) for k in ("car", "van", "truck", "bus", *PEOPLE)},
    "colour": {k: (k, k) for k in ("red", "blue", "white", "black", "yellow", "green")},
    "light": {"red": ("shows red", ""), "yellow": ("shows yellow", ""),
              "green": ("shows green", ""), "unknown": ("is lit", "signal post")},
    "nothing": {"none": ("no", "nothing")},
}


def say(fact: str, value: str | None, dialect: Dialect) -> str | None:
    """Words of one value of one fact; None for a value that is not known."""
    return value and PHRASES[fact][value][0 if dialect == "verifier" else 1]


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def name_of(thing: Facts) -> str:
    """'red van', 'pedestrian in a yellow coat', or 'van' where nobody can know the colour."""
    kind, colour = thing["kind"], thing["colour"]
    if not colour:
        return kind
    return f"{kind} in a {colour} coat" if kind in PEOPLE else f"{colour} {kind}"


def join(parts: list[str]) -> str | None:
    """'a, b and c'; None for no part."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return ", ".join(parts[:-1]) + " and " + parts[-1]


VERIFIER = {
    "key_elements": ("{opening}the key elements are {elements}.",
                     "{opening}the key elements are an empty road and {scenery}."),
    "happening": ("{opening}{events} while {ego}.",
                  "{opening}{ego} along an empty road with {scenery}."),
    "vehicles": ("there {number}: {visible}.",
                 "there are no vehicles on the road, only {scenery} under {sky}."),
    "movement": ("{driving}.", "no vehicle is moving here, and {ego} past {scenery}."),
    "people": ("yes, there is {walking}.",
               "no, there are no pedestrians or cyclists, only {first_moving}.",
               "no, there are no pedestrians or cyclists, only {scenery}."),
    "traffic_light": ("the traffic light {light}, and {ego} with {last_moving}.",
                      "the traffic light {light}, and {ego} with {scenery}.",
                      "there is no traffic light in view, but there is {last_moving}.",
                      "there is no traffic light in view, just {scenery}."),
    "time_of_day": ("it is {time} under {sky}, with {scenery} and {first}.",
                    "it is {time} under {sky}, with {scenery} and {person}.",
                    "it is {time} under {sky}, with {scenery} and an empty road."),
    "ego_motion": ("{ego} past {scenery} behind {ahead}.",
                   "{ego} past {scenery} with {first_moving}.",
                   "{ego} past {scenery}."),
    "surroundings": ("{opening}there are {scenery} under {sky}, and {person}.",
                     "{opening}there are {scenery} under {sky}, and {last}.",
                     "{opening}there are {scenery} under {sky}."),
    "hazard": ("the driver must brake for {crossing}, while {ego}, and mind {besides_crossing}.",
               "the driver must brake for {crossing}, while {ego} past {scenery}.",
               "the driver should obey {signal}, as {ego}, and mind {any}.",
               "the driver should obey {signal}, as {ego} past {scenery}.",
               "the driver should give room to {person_moving}, and mind {besides_person}.",
               "the driver should give room to {person_moving} past {scenery}.",
               "the driver should keep a distance from {nearest}, and mind {besides_nearest}.",
               "the driver should keep a distance from {nearest} past {scenery}.",
               "{opening}nothing special: the road is empty and {ego} past {scenery}."),
}
DRAFTER = {
    "key_elements": ("key features include {elements}.",
                     "key features include {scenery}, and nothing else moves."),
    "happening": ("here {ego}; {events}.", "here {ego}; nothing else moves before {scenery}."),
    "vehicles": ("one sees {visible}.", "nothing like a vehicle moves; one sees {scenery}."),
    "movement": ("{driving}.", "nothing drives, and {ego}."),
    "people": ("one can make out {walking}.",
               "nothing like a person moves, but {first_moving} does.",
               "nothing like a person moves."),
    "traffic_light": ("events show a {light} but not its lamp.",
                      "nothing like a signal fires events."),
    "time_of_day": ("events do not tell the hour; {ego} with {first}.",
                    "events do not tell the hour; {ego}."),
    "ego_motion": ("{ego} before {scenery}.",),
    "surroundings": ("the edges show {scenery} and {person}.", "the edges show {scenery}."),
    "hazard": ("watch {crossing}, as {ego}.",
               "watch {person_moving}, as {ego}.",
               "watch {first_moving}, as {ego}.",
               "nothing to watch, as {ego}."),
}
_EDGES = {"verifier": ("on both sides", "on the left", "on the right"),
          "drafter": ("along both edges", "at the left edge", "at the right edge")}
_OPENING = {"night": "at night, ", "dusk": "in the evening, "}
_FIELD = re.compile(r"{(\w+)}")
_NUMBER = {1: "is one vehicle", 2: "are two vehicles", 3: "are three vehicles"}


def answers(facts: Facts, dialect: Dialect) -> dict[str, str]:
    """Kind of question → answer. facts: as render.clip_facts gives them, everything visible."""
    verifier = dialect == "verifier"
    words = words_of(facts if verifier else seen_by_events(facts), dialect)
    texts = {}
    for kind, sentences in (VERIFIER if verifier else DRAFTER).items():
        fitting = next(s for s in sentences if None not in map(words.get, _FIELD.findall(s)))
        text = fitting.format_map(words)
        texts[kind] = text[0].upper() + text[1:]
    return texts


def seen_by_events(facts: Facts) -> Facts:
    """The facts without what an event camera cannot know: colours, time, sky, what stands still."""
    moving = facts["moving"]
    return {**facts, "time": None, "sky": None, "left": facts["left"] if moving else None,
            "right": facts["right"] if moving else None,
            "light": "unknown" if facts["light"] and facts["light_events"] else None,
            "vehicles": [{**v, "colour": None} for v in facts["vehicles"] if v["events"]],
            "people": [{**v, "colour": None} for v in facts["people"] if v["events"]]}


def words_of(facts: Facts, dialect: Dialect) -> dict[str, str | None]:
    """What the sentences are filled with; None where there is nothing of the kind."""
    drafter = dialect == "drafter"
    traffic, persons = facts["vehicles"], facts["people"]
    both, light = traffic + persons, say("light", facts["light"], dialect)

    def of(thing: Facts, fact: str) -> str:
        return say(fact, thing[fact], dialect)

    def distance(thing: Facts) -> str:
        return (", " if drafter else " ") + of(thing, "distance")

    def told(thing: Facts, motion: bool = False, far: bool = False) -> str:
        how = f" {of(thing, 'motion')}" if motion else ""
        how += distance(thing) if far and thing in traffic else ""
        noun, where = article(name_of(thing)), f" {of(thing, 'place')}"
        return noun + where + how if drafter else noun + how + where

    def first(things: list[Facts], **how: bool) -> str | None:
        return told(things[0], **how) if things else None

    def besides(things: list[Facts]) -> str | None:
        return first([thing for thing in both if thing is not things[0]]) if things else None

    elements = [told(v, far=True) for v in traffic] + [told(p) for p in persons]
    if light:
        elements.append(f"a {light}" if drafter else f"a traffic light that {light}")
    crossing = [thing for thing in persons + traffic if thing["motion"].startswith("crossing")]
    brake = crossing and f"{article(name_of(crossing[0]))} {of(crossing[0], 'motion')}"
    nearest = sorted(traffic, key=lambda vehicle: vehicle["distance"] != "near")
    return {
        **{fact: say(fact, facts[fact], dialect) for fact in ("ego", "time", "sky")},
        "opening": _OPENING.get(facts["time"], ""),
        "scenery": _scenery(facts, dialect),
        "light": light,
        "signal": light and f"the traffic light that {light}",
        "elements": join(elements[:4]),
        "events": join([f"{article(name_of(thing))} is {of(thing, 'motion')} {of(thing, 'place')}"
                        for thing in both[:2]]),
        "number": _NUMBER.get(len(traffic)),
        "visible": join([told(vehicle, far=True) for vehicle in traffic]),
        "driving": join([f"the {name_of(v)} {of(v, 'place')} is {of(v, 'motion')}{distance(v)}"
                         for v in traffic]),
        "walking": join([told(person, motion=True) for person in persons]),
        "first": first(traffic),
        "first_moving": first(traffic, motion=True),
        "last": first(traffic[-1:]),
        "last_moving": first(traffic[-1:], motion=True),
        "ahead": first([v for v in traffic[:1] if v["place"] == "ahead"], far=True),
        "person": first(persons),
        "person_moving": first(persons, motion=True),
        "any": first(both),
        "crossing": first(crossing, motion=True) if drafter else brake or None,
        "nearest": first(nearest, motion=True),
        "besides_crossing": besides(crossing),
        "besides_person": besides(persons),
        "besides_nearest": besides(nearest),
    }


def _scenery(facts: Facts, dialect: Dialect) -> str:
    left, right = (say("scenery", facts[side], dialect) for side in ("left", "right"))
    on_both, on_left, on_right = _EDGES[dialect]
    if left is None:  # before a camera that stands still, the roadside leaves no events
        return "a static background"
    return f"{left} {on_both}" if left == right else f"{left} {on_left} and {right} {on_right}"


class Question(NamedTuple):
    """kind: short name. text: as it is asked."""

    kind: str
    text: str


def questions() -> list[Question]:
    """The ten questions, most frequent first."""
    return [Question("key_elements", "What are the key elements in this scene?"),
            Question("happening", "What is happening in this scene?"),
            Question("vehicles", "Which vehicles are visible?"),
            Question("movement", "How are the vehicles moving?"),
            Question("people", "Are there any pedestrians or cyclists?"),
            Question("traffic_light", "What is the state of the traffic light?"),
            Question("time_of_day", "What time of day is it?"),
            Question("ego_motion", "How is the camera moving?"),
            Question("surroundings", "What are the surroundings of the road?"),
            Question("hazard", "What should the driver pay attention to?")]


def answer(facts: Facts, kind: str, dialect: Dialect = "verifier") -> str:
    """One of :func:`answers`. Raises: DatasetError for an unknown kind of question."""
    texts = answers(facts, dialect)
    if kind not in texts:
        raise DatasetError(f"unknown kind of question {kind!r}; the world knows {sorted(texts)}")
    return texts[kind]


def _meanings() -> dict[str, tuple[str, str]]:
    """Phrase → (fact, value), longest phrases first, so that "on both sides" wins over "sides"."""
    rows = {(words, fact, value) for fact, values in PHRASES.items()
            for value, pair in values.items() for words in pair if words}
    rows |= {("on the left", "place", "left"), ("at the left edge", "place", "left"),
             ("on the right", "place", "right"), ("at the right edge", "place", "right"),
             ("on both sides", "place", "both"), ("along both edges", "place", "both"),
             ("static background", "scenery", "static")}
    found: dict[str, tuple[str, str]] = {}
    for words, fact, value in sorted(rows, key=lambda row: (-len(row[0]), row)):
        found.setdefault(words, (fact, value))
    return found


_MEANINGS = _meanings()
_PATTERN = re.compile(r"\b(" + "|".join(map(re.escape, _MEANINGS)) + r")\b")


def spans(text: str) -> list[tuple[int, int, str, str]]:
    """(start, end, fact, value) of every phrase that states a fact, in characters of the text."""
    return [(*match.span(), *_MEANINGS[match[1]]) for match in _PATTERN.finditer(text.lower())]


def mentions(text: str) -> list[tuple[str, str]]:
    """The facts an answer states, in order: [('colour', 'red'), ('kind', 'van'), …]."""
    return [(fact, value) for _, _, fact, value in spans(text)]


def word_kinds(text: str) -> list[tuple[str, str]]:
    """(word, kind) for every word: the fact it states, or ``function``."""
    kinds, end = [], 0
    for start, stop, fact, _ in spans(text):
        kind = {"kind": "object", "ego": "ego motion"}.get(fact, fact)
        kinds += [(word, "function") for word in text[end:start].split()]
        kinds += [(word, kind) for word in text[start:stop].split()]
        end = stop
    return kinds + [(word, "function") for word in text[end:].split()]
