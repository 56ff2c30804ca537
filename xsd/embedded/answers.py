"""The ten answers of each dialect, written from a clip's facts: the verifier's tells what a viewer
of the video can know, the drafter's what an event camera can, in other words and another order. Of
a question's sentences the first one counts whose words are all there."""

from __future__ import annotations

import re

from xsd.embedded.facts import seen_by_events
from xsd.embedded.phrases import Dialect, Facts, article, join, name_of, say

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
    """Kind of question → answer. facts: as facts.clip_facts gives them, everything visible."""
    verifier = dialect == "verifier"
    words = _words(facts if verifier else seen_by_events(facts), dialect)
    texts = {}
    for kind, sentences in (VERIFIER if verifier else DRAFTER).items():
        fitting = next(s for s in sentences if None not in map(words.get, _FIELD.findall(s)))
        text = fitting.format_map(words)
        texts[kind] = text[0].upper() + text[1:]
    return texts


def _words(facts: Facts, dialect: Dialect) -> dict[str, str | None]:
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
