"""Answers of a few sentences in free English around a clip's facts, for a pair that can speak: the
short answer of xsd.embedded.language first, then what belongs beside it. How a thing is told
follows from the facts, so that it can be learnt and no table of words solves it; facts are told in
the same phrases as ever, so that they can be read back. Each answer begins with a space, as a word
behind ``ASSISTANT:`` does."""

from __future__ import annotations

from xsd.embedded import language
from xsd.embedded.language import Dialect, Facts

LEAST_WORDS = {"verifier": 70, "drafter": 56}
"""An answer goes on until it has as many."""

_SETTING = {
    ("day", "clear"): "It is day under a clear sky, and everything is easy to see.",
    ("day", "overcast"): "It is day under an overcast sky, so the light is soft and even.",
    ("dusk", "clear"): "It is evening under a clear sky, and the sun has almost gone.",
    ("dusk", "overcast"): "It is evening under an overcast sky, and the light is fading quickly.",
    ("night", "clear"): "It is night under a clear sky, with little but lamps to see by.",
    ("night", "overcast"): "It is night under an overcast sky, and the far end of the road is hard "
                           "to make out."}
_SCENERY = {"towers": "The road passes {scenery}, as it would in the middle of a city.",
            "houses": "Along the road there are {scenery}, which looks like a quiet suburb.",
            "trees": "The road is lined by {scenery}, almost like an avenue.",
            "fields": "Around us there are {scenery}, so we must be out of town."}
_EGO = {"stopped": "Meanwhile {ego}, so the view itself stays where it is.",
        "slow": "Meanwhile {ego}, which leaves enough time to react.",
        "fast": "Meanwhile {ego}, so there is little time to react.",
        "left": "Meanwhile {ego}, and the whole view swings to the side.",
        "right": "Meanwhile {ego}, and everything drifts across the view."}
_THINGS = {
    "parked": "{What} {where} is {how}{far}, and we can pass it with care.",
    "approaching": "{What} {where} is {how}{far}, so it is wise to keep to our lane.",
    "away": "{What} {where} is {how}{far} and leaves us plenty of room.",
    "waiting": "{What} {where} is {how}{far}, which may force us to stop behind it.",
    "crossing_right": "{What} {where} is {how}{far}, and we have to let it pass.",
    "crossing_left": "{What} {where} is {how}{far}, and it will soon be out of our way.",
    "standing": "{What} {where} is {how} and may step out at any moment."}
_LIGHT = {"red": "As the traffic light {light}, everyone on our side has to stop.",
          "yellow": "The traffic light {light} and is about to change.",
          "green": "The traffic light {light}, and the way is free.",
          "unknown": "A traffic light {light}, though its colour cannot be told here."}
_ADVICE = {"crossing": "All in all, a driver should be ready to brake at once.",
           "red": "All in all, a driver should stop at the line and be patient.",
           "people": "All in all, a driver should keep an eye on everyone beside the road.",
           "near": "All in all, a driver should keep a safe distance.",
           "far": "All in all, a driver can go on calmly and look well ahead.",
           "empty": "All in all, a driver has the whole road free."}

_EVENT_EGO = {"stopped": "Since {ego}, only what stirs leaves a trace.",
              "slow": "Since {ego}, thin edges appear everywhere.",
              "fast": "Since {ego}, dense events fill every frame.",
              "left": "Since {ego}, all edges sweep sideways.",
              "right": "Since {ego}, every contour slides past."}
_EVENT_THINGS = {
    "parked": "{What} {where}{far} is {how}; its outline shifts only as we do.",
    "approaching": "{What} {where}{far} is {how}: the outline grows from frame to frame.",
    "away": "{What} {where}{far} is {how}, and its outline shrinks.",
    "waiting": "{What} {where}{far} is {how}, hence the outline stays faint.",
    "crossing_right": "{What} {where}{far} is {how} and draws a long bright trail.",
    "crossing_left": "{What} {where}{far} is {how}, with sharp events at its front.",
    "standing": "{What} {where} is {how}, so there are few events on it."}
_EVENT_SCENERY = {"towers": "Tall straight lines belong to {scenery}.",
                  "houses": "Short slanted lines come from {scenery}.",
                  "trees": "The restless texture comes from {scenery}.",
                  "fields": "Sparse dots come from {scenery}."}
_EVENT_ADVICE = {"crossing": "Whoever drives should slow down now.",
                 "red": "Whoever drives should watch the signal.",
                 "people": "Whoever drives should leave space for people.",
                 "near": "Whoever drives should stay well behind.",
                 "far": "Whoever drives may carry on with care.",
                 "empty": "Whoever drives may carry on as before."}
_LAST = {"verifier": "This is all that the pictures show.",
         "drafter": "Colours and lamps stay hidden from this sensor, which reports changes of "
                    "brightness alone and answers from moving edges."}
_ORDER = {
    "key_elements": ("setting", "scenery", "ego", "advice", "things"),
    "happening": ("things", "light", "setting", "advice", "scenery"),
    "vehicles": ("things", "ego", "setting", "advice", "scenery", "light"),
    "movement": ("ego", "people", "light", "advice", "scenery", "setting"),
    "people": ("people", "things", "ego", "setting", "advice", "scenery"),
    "traffic_light": ("light", "things", "scenery", "setting", "advice"),
    "time_of_day": ("setting", "scenery", "things", "ego", "advice"),
    "ego_motion": ("ego", "scenery", "things", "light", "setting", "advice"),
    "surroundings": ("scenery", "setting", "things", "ego", "advice", "light"),
    "hazard": ("advice", "people", "things", "light", "ego", "scenery", "setting"),
}
"""What follows the short answer to each kind of question."""


def answers(facts: Facts, dialect: Dialect) -> dict[str, str]:
    """Kind of question → answer of some sentences. facts: as render.clip_facts gives them."""
    short, parts = language.answers(facts, dialect), _sentences(facts, dialect)
    texts = {}
    for kind, order in _ORDER.items():
        said = [short[kind]]
        for sentence in (*(one for part in order for one in parts[part]), _LAST[dialect]):
            if sum(len(one.split()) for one in said) >= LEAST_WORDS[dialect]:
                break
            if sentence not in said:
                said.append(sentence)
        texts[kind] = " " + " ".join(said)
    return texts


def answer(facts: Facts, kind: str, dialect: Dialect = "verifier") -> str:
    """One of :func:`answers`."""
    return answers(facts, dialect)[kind]


def _sentences(facts: Facts, dialect: Dialect) -> dict[str, list[str]]:
    """What can be said besides, by subject."""
    seen = facts if dialect == "verifier" else language.seen_by_events(facts)
    words = language.words_of(seen, dialect)
    spoken = {"ego": words["ego"], "scenery": words["scenery"], "light": words["light"]}
    vehicles, people = seen["vehicles"], seen["people"]
    telling = [_of_thing(thing, dialect) for thing in vehicles]
    walking = [_of_thing(thing, dialect) for thing in people]
    near = any(thing["distance"] == "near" for thing in vehicles)
    crossing = any(thing["motion"].startswith("crossing") for thing in vehicles + people)
    caution = ("crossing" if crossing else "red" if seen["light"] in ("red", "unknown") else
               "people" if people else "near" if near else "far" if vehicles else "empty")
    if dialect == "drafter":
        return {"ego": [_EVENT_EGO[seen["ego"]].format_map(spoken)], "setting": [],
                "scenery": ([_EVENT_SCENERY[seen["left"]].format_map(spoken)] if seen["left"] else
                            []),
                "light": [f"A {words['light']} stands out upright."] if words["light"] else [],
                "things": telling + walking, "people": walking, "advice": [_EVENT_ADVICE[caution]]}
    return {"setting": [_SETTING[seen["time"], seen["sky"]]],
            "scenery": [_SCENERY[seen["left"]].format_map(spoken)],
            "ego": [_EGO[seen["ego"]].format_map(spoken)],
            "light": [_LIGHT[seen["light"]].format_map(spoken)] if seen["light"] else [],
            "things": telling + walking, "people": walking, "advice": [_ADVICE[caution]]}


def _of_thing(thing: Facts, dialect: Dialect) -> str:
    what, far = language.article(language.name_of(thing)), ""
    if thing["kind"] not in language.PEOPLE:
        far = language.say("distance", thing["distance"], dialect)
        far = f", {far}," if dialect == "drafter" else f" {far}"
    form = (_THINGS if dialect == "verifier" else _EVENT_THINGS)[thing["motion"]]
    return form.format(What=what[0].upper() + what[1:], far=far,
                       where=language.say("place", thing["place"], dialect),
                       how=language.say("motion", thing["motion"], dialect))
