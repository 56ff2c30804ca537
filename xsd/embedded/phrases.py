"""The words of both dialects: one table that answers are written from and read back by."""

from __future__ import annotations

from typing import Any, Literal

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
