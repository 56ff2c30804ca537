"""What a viewer of a clip can know, read off the rendered id images: of what is visible in the
square both models see. ``events`` on an actor says whether an event camera can know it, too."""

from __future__ import annotations

from typing import Any

import numpy as np

from xsd.embedded.render import LIGHT_ID
from xsd.embedded.scenes import Scene

MIN_PIXELS = {"vehicle": 26, "person": 12, "light": 34}
"""Visible pixels at 128x96 (scaled with the sensor's area) in the middle of the clip."""
MIN_EVENTS = {"vehicle": 40, "person": 24, "light": 25}
NEAR_M = 12.5


def centre_square(image: np.ndarray) -> np.ndarray:
    """The largest centred square [..., H, W] → [..., S, S]: what a centre crop leaves."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top:top + side, left:left + side]


def clip_facts(scene: Scene, ids: np.ndarray, times_s: np.ndarray, event_counts: dict[int, int], *,
               grey: bool) -> dict[str, Any]:
    """Facts of one clip, JSON-ready. ids: uint8 [T, H, W] identity images at times_s [T].
    event_counts: events inside each identity's mask. grey: nobody can know a colour."""
    seen = centre_square(ids)
    middle = seen[len(seen) // 2 - 3:len(seen) // 2 + 4]
    scale = (seen.shape[-1] / 96)**2

    def visible(number: int, sort: str) -> bool:
        pixels = float((middle == number).sum(axis=(1, 2)).mean()) / scale
        return pixels >= MIN_PIXELS[sort]

    def fires(number: int, sort: str) -> bool:
        return event_counts.get(number, 0) >= MIN_EVENTS[sort]

    found: dict[str, list[dict[str, Any]]] = {"vehicle": [], "person": []}
    for number, actor in enumerate(scene.actors, start=1):
        sort = "vehicle" if actor.is_vehicle else "person"
        if visible(number, sort):
            depth = float(np.mean([scene.position(actor, float(t))[1] for t in times_s]))
            found[sort].append({
                "kind": actor.kind, "colour": None if grey else actor.colour,
                "place": actor.place, "motion": actor.motion,
                "distance": "near" if depth < NEAR_M else "far", "events": fires(number, sort)})
    for things in found.values():
        things.sort(key=lambda thing: ("left", "ahead", "right").index(thing["place"]))
    light_seen = scene.light is not None and visible(LIGHT_ID, "light")
    return {
        "time": scene.time, "sky": scene.sky, "ego": scene.ego, "left": scene.left,
        "right": scene.right, "light": ("unknown" if grey else scene.light) if light_seen else None,
        "light_events": light_seen and fires(LIGHT_ID, "light"),
        "vehicles": found["vehicle"], "people": found["person"], "grey": grey,
        "moving": scene.ego != "stopped"}


def seen_by_events(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without what an event camera cannot know: colours, time, sky, what stands still."""
    moving = facts["moving"]
    return {
        **facts, "time": None, "sky": None, "left": facts["left"] if moving else None,
        "right": facts["right"] if moving else None,
        "light": "unknown" if facts["light"] and facts["light_events"] else None,
        "vehicles": [{**v, "colour": None} for v in facts["vehicles"] if v["events"]],
        "people": [{**v, "colour": None} for v in facts["people"] if v["events"]]}
