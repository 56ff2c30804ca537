"""Draw a scene at time t: RGB for the video camera, luminance for the event camera, and who is
visible where.

A painter's algorithm over perspective polygons (Pillow), drawn three times larger and averaged down
so that edges move by fractions of a
pixel: an event camera answers to exactly that motion, and jumping edges would fire false events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from xsd.embedded.scenes import COLOURS, SURROUNDINGS, VEHICLES, Actor, Scene

SUPERSAMPLE = 3
CAMERA_HEIGHT_M = 1.4
LIGHT_ID = 200
"""Identity of the traffic light in the id image; actors are numbered 1, 2, … in the order of the
scene."""
SCENERY_ID = 240
"""Identities 240 … 243: towers, houses, trees, fields (the order of scenes.SURROUNDINGS)."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Camera:
    """Pixels of the sensor shared by both cameras (a co-axial pair, as in a DAVIS)."""

    width: int = 128
    height: int = 96

    @property
    def focal_px(self) -> float:
        return 0.86 * self.width

    @property
    def horizon_px(self) -> float:
        return 0.44 * self.height


class Renderer:
    """Draws one scene with one camera; textures (windows, speckle, crowns) are drawn from the
    scene's own seed."""
    def __init__(self, scene: Scene, camera: Camera) -> None:
        self.scene, self.camera = scene, camera
        rng = np.random.default_rng(scene.texture_seed)
        self.shade = rng.uniform(0.75, 1.2, size=(2, 16))
        self.hue = rng.integers(0, 4, size=(2, 16))
        self.size = rng.uniform(0.8, 1.25, size=(2, 16))
        self.speckle = np.column_stack([
            rng.uniform(-4.8, 4.8, 70),
            rng.uniform(0, 40, 70),
            rng.uniform(0.1, 0.45, 70),
            rng.uniform(-22, 22, 70)
        ])
        self.light_level = {"day": 1.0, "dusk": 0.68, "night": 0.5}[scene.time] * scene.extra.get(
            "brightness", 1.0)

    def frame(self, t_s: float, with_ids: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """RGB uint8 [H, W, 3] and, if asked, the id image uint8 [H, W] (0 background)."""
        size = (self.camera.width * SUPERSAMPLE, self.camera.height * SUPERSAMPLE)
        picture = Image.new("RGB", size)
        ids = Image.new("L", size) if with_ids else None
        brush = _Brush(ImageDraw.Draw(picture), ImageDraw.Draw(ids) if ids else None, self, t_s)
        brush.background()
        brush.surroundings()
        brush.road()
        things = [(self.scene.position(actor, t_s)[1], number, actor)
                  for number, actor in enumerate(self.scene.actors, start=1)]
        if self.scene.light is not None:
            things.append((self.scene.light_z_m - brush.travelled, LIGHT_ID, None))
        for depth, number, actor in sorted(things, key=lambda thing: -thing[0]):
            if depth < 2.5 or depth > 60:
                continue
            brush.identity = number
            brush.traffic_light(depth) if actor is None else brush.actor(actor)
        image = np.asarray(picture.reduce(SUPERSAMPLE))
        return image, (np.asarray(
            ids.resize((self.camera.width,
                        self.camera.height), Image.Resampling.NEAREST)) if ids else None)


class _Brush:
    """Perspective drawing primitives for one instant."""
    def __init__(self, draw: ImageDraw.ImageDraw, ids: ImageDraw.ImageDraw | None,
                 renderer: Renderer, t_s: float) -> None:
        self.draw, self.ids, self.renderer, self.t_s = draw, ids, renderer, t_s
        self.scene = renderer.scene
        self.travelled, self.yaw = self.scene.camera_at(t_s)
        camera = renderer.camera
        self.focal = camera.focal_px * SUPERSAMPLE
        self.centre_x = (camera.width / 2) * SUPERSAMPLE - self.focal * np.tan(self.yaw)
        self.horizon = camera.horizon_px * SUPERSAMPLE
        self.size = (camera.width * SUPERSAMPLE, camera.height * SUPERSAMPLE)
        self.identity = 0

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Metres (right, up, ahead) to supersampled pixels."""
        return self.centre_x + self.focal * x / z, self.horizon + self.focal * (CAMERA_HEIGHT_M -
                                                                                y) / z

    def lit(self, colour: Colour, glow: bool = False) -> Colour:
        level = 1.0 if glow else self.renderer.light_level
        tint = ((0.85, 0.9, 1.1) if self.scene.time == "night" and not glow else
                ((1.08, 0.95, 0.85) if self.scene.time == "dusk" and not glow else (1, 1, 1)))
        return tuple(
            int(min(255, max(0, c * level * k))) for c, k in zip(colour, tint, strict=True))

    def polygon(self, points: list[tuple[float, float]], colour: Colour,
                glow: bool = False) -> None:
        self.draw.polygon(points, fill=self.lit(colour, glow))
        if self.ids is not None and self.identity:
            self.ids.polygon(points, fill=self.identity)

    def ellipse(self, centre: tuple[float, float], rx: float, ry: float, colour: Colour,
                glow: bool = False) -> None:
        box = (centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry)
        self.draw.ellipse(box, fill=self.lit(colour, glow))
        if self.ids is not None and self.identity:
            self.ids.ellipse(box, fill=self.identity)

    def facing(self, x: float, z: float, left: float, right: float, bottom: float, top: float,
               colour: Colour, glow: bool = False) -> None:
        """A rectangle that faces the camera, in metres around (x, z)."""
        (x0, y1), (x1, y0) = self.point(x + left, bottom, z), self.point(x + right, top, z)
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, glow)

    # --- the world ---

    def background(self) -> None:
        width, height = self.size
        day = self.scene.time
        sky: dict[tuple[str, str], Colour] = {
            ("day", "clear"): (120, 175, 240), ("day", "overcast"): (200, 204, 208),
            ("dusk", "clear"): (255, 150, 90), ("dusk", "overcast"): (170, 120, 125),
            ("night", "clear"): (14, 18, 48), ("night", "overcast"): (40, 40, 44),
        }  # fmt: skip
        base = sky[day, self.scene.sky]
        for band in range(6):
            fade = 1 + 0.05 * (band - 2)
            y0, y1 = self.horizon * band / 6, self.horizon * (band + 1) / 6
            self.draw.rectangle((0, y0, width, y1),
                                fill=tuple(int(min(255, c * fade)) for c in base))
        self.draw.rectangle((0, self.horizon, width, height), fill=self.lit((92, 120, 70)))
        if day == "night" and self.scene.sky == "clear":
            for i in range(12):
                x = (self.renderer.shade[0, i] * 977 * (i + 3) + self.centre_x) % width
                self.draw.ellipse((x, 6 + 7 * i % self.horizon, x + 3, 9 + 7 * i % self.horizon),
                                  fill=(210, 210, 220))

    def surroundings(self) -> None:
        for side, kind in ((0, self.scene.left), (1, self.scene.right)):
            sign = -1 if side == 0 else 1
            self.identity = SCENERY_ID + SURROUNDINGS.index(kind)
            spacing = {"towers": 9.0, "houses": 8.0, "trees": 6.0, "fields": 5.0}[kind]
            first = int(np.floor((self.travelled + 8) / spacing))
            for cell in range(first + 8, first - 1, -1):
                near = cell * spacing - self.travelled
                if near + spacing > 5.0:
                    self._cell(kind, side, sign, cell % 16, max(near, 4.5), near + spacing * 0.9)

    def _cell(self, kind: str, side: int, sign: int, index: int, near: float, far: float) -> None:
        shade, size = self.renderer.shade[side, index], self.renderer.size[side, index]
        x = sign * 7.6
        if kind in ("towers", "houses"):
            palette = ((150, 90, 70), (150, 150, 155), (190, 175, 140), (120, 125, 140))
            colour = tuple(int(c * shade) for c in palette[self.renderer.hue[side, index]])
            height = 13.0 * size if kind == "towers" else 3.6 * size
            wall = [
                self.point(x, 0, near),
                self.point(x, height, near),
                self.point(x, height, far),
                self.point(x, 0, far)
            ]
            self.polygon(wall, colour)
            front = [
                self.point(x, 0, far),
                self.point(x, height, far),
                self.point(x + sign * 6, height, far),
                self.point(x + sign * 6, 0, far),
            ]
            self.polygon(front, tuple(int(c * 0.8) for c in colour))
            if kind == "houses":
                middle = (near + far) / 2
                self.polygon([
                    self.point(x, height, near),
                    self.point(x + sign * 1.5, height + 2.0, middle),
                    self.point(x, height, far)
                ], (140, 50, 40),
                             )
            pane: Colour = (250, 220, 130) if self.scene.time != "day" else (60, 75, 95)
            floors, columns = (4, 3) if kind == "towers" else (1, 2)
            for floor in range(floors):
                for column in range(columns):
                    z0 = near + (far - near) * (column + 0.25) / columns
                    z1 = near + (far - near) * (column + 0.7) / columns
                    y0, y1 = height * (floor + 0.3) / floors, height * (floor + 0.75) / floors
                    lit = self.scene.time != "day" and (index * 7 + floor * 3 + column) % 3 != 0
                    corners = [
                        self.point(x, y0, z0),
                        self.point(x, y1, z0),
                        self.point(x, y1, z1),
                        self.point(x, y0, z1)
                    ]
                    self.polygon(corners, pane if lit or self.scene.time == "day" else (50, 50, 60),
                                 glow=lit)
        elif kind == "trees":
            z = max((near + far) / 2, 5.0)
            self.facing(sign * 6.8, z, -0.25, 0.25, 0, 2.6, (90, 60, 35))
            cx, cy = self.point(sign * 6.8, 4.2 * size, z)
            green = (int(35 * shade), int(115 * shade), int(40 * shade))
            self.ellipse((cx, cy), self.focal * 2.0 * size / z, self.focal * 2.3 * size / z, green)
            self.ellipse((cx - self.focal * 0.6 / z, cy - self.focal * 0.5 / z),
                         self.focal * 0.9 / z, self.focal * 0.8 / z,
                         tuple(int(c * 1.3) for c in green),
                         )
        else:
            self.facing(sign * 6.4, near, -0.12, 0.12, 0, 1.2, (200, 190, 170))
            rail = [
                self.point(sign * 6.4, 0.9, near),
                self.point(sign * 6.4, 1.1, near),
                self.point(sign * 6.4, 1.1, far),
                self.point(sign * 6.4, 0.9, far),
            ]
            self.polygon(rail, (190, 180, 160))

        self.identity = 0

    def road(self) -> None:
        grey = int(self.scene.extra.get("road", 85))
        near, far = 2.6, 120.0
        for edge, colour in ((5.6, (135, 132, 126)), (5.0, (grey, grey, grey + 4))):
            self.polygon([
                self.point(-edge, 0, near),
                self.point(-edge, 0, far),
                self.point(edge, 0, far),
                self.point(edge, 0, near)
            ], colour)
        for x, length, half, contrast in self.renderer.speckle:
            z = (length - self.travelled) % 40 + 3.0
            level = int(grey + contrast)
            if z < 26:
                self.polygon([
                    self.point(x - half, 0, z),
                    self.point(x + half, 0, z),
                    self.point(x + half, 0, z + half * 2),
                    self.point(x - half, 0, z + half * 2),
                ], (level, level, level),
                             )
        period = self.scene.lanes_dash_m
        for boundary in (-1.75, 1.75):
            start = -(self.travelled % period) + 3.2
            for k in range(9):
                z0, z1 = max(start + k * period, 2.7), start + k * period + period * 0.5
                if z1 > z0:
                    self.polygon([
                        self.point(boundary - 0.1, 0, z0),
                        self.point(boundary - 0.1, 0, z1),
                        self.point(boundary + 0.1, 0, z1),
                        self.point(boundary + 0.1, 0, z0),
                    ], (225, 225, 220),
                                 )

    def traffic_light(self, z: float) -> None:
        x = 3.0
        self.facing(x, z, 1.5, 1.75, 0, 5.6, (70, 70, 75))
        self.facing(x, z, -0.1, 1.7, 5.1, 5.35, (70, 70, 75))
        self.facing(x, z, -0.75, 0.75, 2.9, 6.6, (28, 28, 30))
        on = {"red": (255, 40, 30), "yellow": (255, 215, 40), "green": (40, 250, 110)}
        for lamp, height in (("red", 6.0), ("yellow", 4.75), ("green", 3.5)):
            lit = lamp == self.scene.light
            radius = self.focal * (0.62 if lit else 0.4) / z
            self.ellipse(self.point(x, height, z), radius, radius, on[lamp] if lit else
                         (55, 55, 55), glow=lit)

    def actor(self, actor: Actor) -> None:
        x, z = self.scene.position(actor, self.t_s)
        colour = COLOURS[actor.colour]
        if not actor.is_vehicle:
            self._person(actor, x, z, colour)
        elif actor.motion.startswith("crossing"):
            self._side(actor, x, z, colour, 1 if actor.motion == "crossing_right" else -1)
        else:
            self._end_on(
                actor, x, z, colour, front=actor.motion == "approaching"
                or (actor.motion == "parked" and actor.place == "left"))

    def _end_on(self, actor: Actor, x: float, z: float, colour: Colour, front: bool) -> None:
        width, height, length = VEHICLES[actor.kind]
        half = width / 2
        dark = tuple(int(c * 0.7) for c in colour)
        rear, glass = z + length * 0.5, (70, 90, 110)
        inner = -half if x > 0 else half  # the flank turned towards the camera
        flank_top = height * (0.62 if actor.kind == "car" else 1.0)
        self.polygon([
            self.point(x + inner, 0.3, z),
            self.point(x + inner, flank_top, z),
            self.point(x + inner, flank_top, rear),
            self.point(x + inner, 0.3, rear),
        ], dark,
                     )
        self.facing(x, z, -half, half, 0.0, 0.25, (15, 15, 15))
        if actor.kind == "car":
            self.facing(x, z, -half, half, 0.25, height * 0.62, colour)
            roof = [
                self.point(x - half * 0.95, height * 0.6, z),
                self.point(x - half * 0.65, height, z),
                self.point(x + half * 0.65, height, z),
                self.point(x + half * 0.95, height * 0.6, z),
            ]
            self.polygon(roof, colour)
            self.facing(x, z, -half * 0.62, half * 0.62, height * 0.63, height * 0.92, glass)
        else:
            self.facing(x, z, -half, half, 0.25, height, colour)
            if actor.kind == "van":
                self.facing(x, z, -half * 0.8, half * 0.8, height * 0.58, height * 0.88, glass)
            elif actor.kind == "truck":  # a load box above a lower cab
                self.facing(x, z, -half, half, height * 0.42, height,
                            tuple(min(255, int(c * 0.55 + 105)) for c in colour))
                self.facing(x, z, -half * 0.75, half * 0.75, height * 0.46, height * 0.50,
                            (40, 40, 40))
                if front:
                    self.facing(x, z, -half * 0.8, half * 0.8, height * 0.26, height * 0.42, glass)
            else:  # a bus: a broad pane and a sign
                self.facing(x, z, -half * 0.9, half * 0.9, height * 0.45, height * 0.78, glass)
                self.facing(x, z, -half * 0.6, half * 0.6, height * 0.84, height * 0.95,
                            (255, 200, 80), glow=True)
        self._lamps(actor, x, z, half, height, front)

    def _lamps(self, actor: Actor, x: float, z: float, half: float, height: float,
               front: bool) -> None:
        """Headlights on when it comes, tail lamps when it drives, bright brake lamps when it waits,
        all dark when it is parked."""
        radius = self.focal * 0.17 / z
        lamp: Colour = (255, 250, 215) if front else (175, 30, 25)
        lit = actor.motion != "parked"
        if actor.motion == "waiting":
            lamp, radius = (255, 50, 40), radius * 1.7
            self.facing(x, z, -half * 0.35, half * 0.35, height * 0.93, height * 0.99, lamp,
                        glow=True)
        for side in (-1, 1):
            self.ellipse(self.point(x + side * half * 0.75, 0.62, z), radius * 1.2, radius,
                         lamp if lit else (58, 58, 62), glow=lit)

    def _side(self, actor: Actor, x: float, z: float, colour: Colour, direction: int) -> None:
        _, height, length = VEHICLES[actor.kind]
        half, glass = length / 2, (70, 90, 110)
        body_top = height * 0.6 if actor.kind == "car" else height
        self.facing(x, z, -half, half, 0.35, body_top, colour)
        if actor.kind == "car":
            cabin = [(-0.55, 0.58), (-0.35, 1.0), (0.3, 1.0), (0.58, 0.58)]
            self.polygon([self.point(x + direction * half * a, height * b, z) for a, b in cabin],
                         colour)
            self.polygon([
                self.point(x + direction * half * a, height * b, z)
                for a, b in [(-0.42, 0.64), (-0.3, 0.93), (0.24, 0.93), (0.44, 0.64)]
            ], glass,
                         )
        elif actor.kind == "van":
            nose = sorted((direction * half * 0.45, direction * half * 0.9))
            self.facing(x, z, nose[0], nose[1], height * 0.58, height * 0.88, glass)
        elif actor.kind == "truck":
            box = sorted((-direction * half, direction * half * 0.5))
            self.facing(x, z, box[0], box[1], height * 0.3, height,
                        tuple(min(255, int(c * 0.55 + 105)) for c in colour))
            cab = sorted((direction * half * 0.55, direction * half))
            self.facing(x, z, cab[0], cab[1], height * 0.8, height * 1.01,
                        (92, 120, 70) if self.scene.time == "day" else (60, 70, 60))
            self.facing(x, z, cab[0], cab[1], height * 0.5, height * 0.72, glass)
        else:
            for k in range(5):
                self.facing(x, z, -half + length * (k + 0.15) / 5, -half + length * (k + 0.85) / 5,
                            height * 0.5, height * 0.82, glass)
        for wheel in (-0.62, 0.62):
            radius = self.focal * 0.42 / z
            self.ellipse(self.point(x + wheel * half, 0.4, z), radius, radius, (15, 15, 15))

    def _person(self, actor: Actor, x: float, z: float, colour: Colour) -> None:
        stride = 0.32 * np.sin(8.0 * self.t_s + actor.phase) if actor.motion != "standing" else 0.12
        skin = (215, 170, 140)
        heading = {"crossing_right": 1, "crossing_left": -1}.get(actor.motion, 0)
        if actor.kind == "cyclist":
            for wheel in (0.0,):
                radius = self.focal * 0.42 / z
                self.ellipse(self.point(x + wheel, 0.42, z), radius * 0.35, radius, (20, 20, 20))
            self.facing(x, z, -0.38, 0.38, 0.95, 1.03, (40, 40, 40))
            pedal = 0.14 * np.sin(7.0 * self.t_s + actor.phase)
            self.facing(x, z, -0.24, -0.06, 0.35 + pedal, 0.95, (40, 45, 70))
            self.facing(x, z, 0.06, 0.24, 0.35 - pedal, 0.95, (40, 45, 70))
            self.facing(x, z, -0.3, 0.3, 0.9, 1.6, colour)
        else:
            for side, swing in ((-0.12, stride), (0.12, -stride)):
                leg = [
                    self.point(x - 0.1 + side * 0.5, 0.85, z),
                    self.point(x + 0.1 + side * 0.5, 0.85, z),
                    self.point(x + 0.1 + swing, 0, z),
                    self.point(x - 0.1 + swing, 0, z),
                ]
                self.polygon(leg, (45, 50, 75))
            self.facing(x, z, -0.28, 0.28, 0.75, 1.5, colour)
            if heading:  # a rucksack on the back, an arm ahead
                back, arm = sorted((-heading * 0.28, -heading * 0.52)), sorted(
                    (heading * 0.28, heading * 0.5))
                self.facing(x, z, back[0], back[1], 1.0, 1.45, (40, 40, 45))
                self.facing(x, z, arm[0], arm[1], 1.15, 1.28, skin)
        top = 1.85 if actor.kind == "cyclist" else 1.75
        radius = self.focal * 0.17 / z
        self.ellipse(self.point(x + 0.08 * heading, top - 0.12, z), radius, radius * 1.15, skin)
