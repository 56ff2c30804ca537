"""Draw a scene at time t for both cameras, from far to near, and read off the id images what a
viewer of a clip can know: what is visible in the square both models see."""

from typing import Any

import numpy as np
from PIL import Image

from xsd.embedded import actors
from xsd.embedded.actors import SUPERSAMPLE, Brush, Colour, scaled
from xsd.embedded.scenes import SURROUNDINGS, Scene

LIGHT_ID = 200
"""Identity of the traffic light in the id image; actors are numbered 1, 2, … as in the scene."""
SCENERY_ID = 240
"""Identities 240 … 243: towers, houses, trees, fields (the order of scenes.SURROUNDINGS)."""

_SKY: dict[tuple[str, str], Colour] = {
    ("day", "clear"): (120, 175, 240), ("day", "overcast"): (200, 204, 208),
    ("dusk", "clear"): (255, 150, 90), ("dusk", "overcast"): (170, 120, 125),
    ("night", "clear"): (14, 18, 48), ("night", "overcast"): (40, 40, 44)}
_FACADES = ((150, 90, 70), (150, 150, 155), (190, 175, 140), (120, 125, 140))
_SPACING_M = {"towers": 9.0, "houses": 8.0, "trees": 6.0, "fields": 5.0}


class Renderer:
    """Draws one scene on a sensor that both cameras share; textures come from the scene's seed."""

    def __init__(self, scene: Scene, width: int = 128, height: int = 96) -> None:
        self.scene, self.width, self.height = scene, width, height
        rng = np.random.default_rng(scene.texture_seed)
        # of 16 buildings or trees on each side
        self.shade = rng.uniform(0.75, 1.2, size=(2, 16))
        self.hue = rng.integers(0, 4, size=(2, 16))
        self.size = rng.uniform(0.8, 1.25, size=(2, 16))
        # x, length along the road, half size in metres, and contrast of 70 spots on the road
        ranges = ((-4.8, 4.8), (0, 40), (0.1, 0.45), (-22, 22))
        self.speckle = np.column_stack([rng.uniform(low, high, 70) for low, high in ranges])

    def frame(self, t_s: float, with_ids: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """RGB uint8 [H, W, 3] and, if asked, the id image uint8 [H, W] (0 background)."""
        brush = Brush(self.scene, self.width, self.height, t_s, with_ids)
        self._background(brush)
        for side, kind in enumerate((self.scene.left, self.scene.right)):
            self._roadside(brush, side, kind)
        self._road(brush)
        things = [(self.scene.position(actor, t_s)[1], number, actor)
                  for number, actor in enumerate(self.scene.actors, start=1)]
        if self.scene.light is not None:
            things.append((self.scene.light_z_m - brush.travelled, LIGHT_ID, None))
        for depth, number, actor in sorted(things, key=lambda thing: -thing[0]):
            if not 2.5 <= depth <= 60:
                continue
            brush.identity = number
            if actor is None:
                actors.traffic_light(brush, depth)
            else:
                actors.draw(brush, actor)
        image = np.asarray(brush.picture.reduce(SUPERSAMPLE))
        if brush.ids is None:
            return image, None
        ids = brush.ids.resize((self.width, self.height), Image.Resampling.NEAREST)
        return image, np.asarray(ids)

    def _background(self, brush: Brush) -> None:
        (width, height), horizon = brush.size, brush.horizon
        base = _SKY[self.scene.time, self.scene.sky]
        for band in range(6):
            fade = 1 + 0.05 * (band - 2)
            brush.draw.rectangle((0, horizon * band / 6, width, horizon * (band + 1) / 6),
                                 fill=tuple(int(min(255, c * fade)) for c in base))
        brush.draw.rectangle((0, horizon, width, height), fill=brush.lit((92, 120, 70)))
        if (self.scene.time, self.scene.sky) == ("night", "clear"):  # stars
            for i in range(12):
                x = (self.shade[0, i] * 977 * (i + 3) + brush.centre_x) % width
                y = 7 * i % horizon
                brush.draw.ellipse((x, 6 + y, x + 3, 9 + y), fill=(210, 210, 220))

    def _roadside(self, brush: Brush, side: int, kind: str) -> None:
        """One kind of scenery along one side (0 left, 1 right), from far to near."""
        brush.identity = SCENERY_ID + SURROUNDINGS.index(kind)
        paint = {"trees": self._tree, "fields": self._fence}.get(kind, self._building)
        spacing, sign = _SPACING_M[kind], (-1, 1)[side]
        first = int(np.floor((brush.travelled + 8) / spacing))
        for cell in range(first + 8, first - 1, -1):
            near = cell * spacing - brush.travelled
            if near + spacing > 5.0:
                paint(brush, sign, cell % 16, max(near, 4.5), near + spacing * 0.9)
                # only the farthest carries the number: so was the shipped pair's corpus made
                brush.identity = 0

    def _building(self, brush: Brush, sign: int, index: int, near: float, far: float) -> None:
        """A tower or a house: wall along the road, wall across, roof, windows."""
        side, day = max(sign, 0), self.scene.time == "day"
        tower = (self.scene.left, self.scene.right)[side] == "towers"
        colour = scaled(_FACADES[self.hue[side, index]], self.shade[side, index])
        height = (13.0 if tower else 3.6) * self.size[side, index]
        x = sign * 7.6
        brush.wall(x, near, far, 0, height, colour)
        across = [(0, 0), (0, height), (sign * 6, height), (sign * 6, 0)]
        brush.outline(x, far, across, scaled(colour, 0.8))
        if not tower:
            ridge = brush.point(x + sign * 1.5, height + 2.0, (near + far) / 2)
            brush.polygon([brush.point(x, height, near), ridge, brush.point(x, height, far)],
                          (140, 50, 40))
        floors, columns = (4, 3) if tower else (1, 2)
        for floor in range(floors):
            for column in range(columns):
                z0, z1 = (near + (far - near) * (column + part) / columns for part in (0.25, 0.7))
                y0, y1 = (height * (floor + part) / floors for part in (0.3, 0.75))
                lit = not day and (index * 7 + floor * 3 + column) % 3 != 0
                pane = (60, 75, 95) if day else (250, 220, 130) if lit else (50, 50, 60)
                brush.wall(x, z0, z1, y0, y1, pane, glow=lit)

    def _tree(self, brush: Brush, sign: int, index: int, near: float, far: float) -> None:
        size, shade = self.size[max(sign, 0), index], self.shade[max(sign, 0), index]
        z = max((near + far) / 2, 5.0)
        brush.facing(sign * 6.8, z, -0.25, 0.25, 0, 2.6, (90, 60, 35))
        x, y = brush.point(sign * 6.8, 4.2 * size, z)
        green = scaled((35, 115, 40), shade)
        # products in this order: another one rounds otherwise and moves a pixel now and then
        focal = brush.focal
        brush.ellipse((x, y), focal * 2.0 * size / z, focal * 2.3 * size / z, green)
        brush.ellipse((x - focal * 0.6 / z, y - focal * 0.5 / z), focal * 0.9 / z, focal * 0.8 / z,
                      scaled(green, 1.3))

    def _fence(self, brush: Brush, sign: int, index: int, near: float, far: float) -> None:
        brush.facing(sign * 6.4, near, -0.12, 0.12, 0, 1.2, (200, 190, 170))
        brush.wall(sign * 6.4, near, far, 0.9, 1.1, (190, 180, 160))

    def _road(self, brush: Brush) -> None:
        grey = int(self.scene.road_grey)
        for edge, colour in ((5.6, (135, 132, 126)), (5.0, (grey, grey, grey + 4))):
            brush.ground(-edge, edge, 2.6, 120.0, colour)
        for x, length, half, contrast in self.speckle:
            z = (length - brush.travelled) % 40 + 3.0
            level = int(grey + contrast)
            if z < 26:
                # corners in this order: in another one an edge falls on another pixel now and then
                far = z + half * 2
                corners = ((x - half, z), (x + half, z), (x + half, far), (x - half, far))
                brush.polygon([brush.point(across, 0, ahead) for across, ahead in corners],
                              (level, level, level))
        period = self.scene.lanes_dash_m
        for boundary in (-1.75, 1.75):
            start = -(brush.travelled % period) + 3.2
            for k in range(9):
                near, far = max(start + k * period, 2.7), start + k * period + period * 0.5
                if far > near:
                    brush.ground(boundary - 0.1, boundary + 0.1, near, far, (225, 225, 220))


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
    return {"time": scene.time, "sky": scene.sky, "ego": scene.ego, "left": scene.left,
            "right": scene.right,
            "light": ("unknown" if grey else scene.light) if light_seen else None,
            "light_events": light_seen and fires(LIGHT_ID, "light"), "vehicles": found["vehicle"],
            "people": found["person"], "grey": grey, "moving": scene.ego != "stopped"}
