"""The words of both dialects: one table, written from by ``xsd.embedded.language`` and read back by
its scorer."""

from __future__ import annotations

from typing import Any, Literal

Dialect = Literal["verifier", "drafter"]
Facts = dict[str, Any]

# fact -> value -> (verifier's words, drafter's words)
PHRASES: dict[str, dict[str, tuple[str, str]]] = {
    "place": {
        "left": ("on the left side", "to the left"),
        "ahead": ("straight ahead", "in front"),
        "right": ("on the right side", "to the right"),
    },
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
    "sky": {"clear": ("a clear "
                      "sky", "a clear sky"), "overcast": ("an overcast sky", "an overcast sky")},
    "kind": {k: (k, k) for k in ("car", "van", "truck", "bus", "pedestrian", "cyclist")},
    "colour": {k: (k, k) for k in ("red", "blue", "white", "black", "yellow", "green")},
    "light": {"red": ("shows "
                      "red", ""), "yellow": ("shows "
                                             "yellow", ""), "green": ("shows green", ""), "unknown": ("is lit", "signal post")},
    "nothing": {"none": ("no", "nothing")},
}
WORD_KINDS = {"kind": "object", "ego": "ego motion"}


def say(fact: str, value: str, dialect: Dialect) -> str:
    """Words of one value of one fact."""
    return PHRASES[fact][value][0 if dialect == "verifier" else 1]


def article(noun: str) -> str:
    """With its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def name_of(thing: Facts, dialect: Dialect) -> str:
    """'red van' / 'pedestrian in a yellow coat' / 'van' where nobody can know the colour."""
    if not thing["colour"] or dialect == "drafter":
        return thing["kind"]
    if thing["kind"] in ("pedestrian", "cyclist"):
        return f"{thing['kind']} in a {thing['colour']} coat"
    return f"{thing['colour']} {thing['kind']}"


def join(parts: list[str]) -> str:
    """'a, b and c'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def count(n: int) -> str:
    """Nought to three in words."""
    return ("no", "one", "two", "three")[min(n, 3)]
