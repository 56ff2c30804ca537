"""The brush at one moment of a scene, and how vehicles, pedestrians, cyclists and traffic lights
are drawn with it. Lengths in metres."""

import numpy as np
from PIL import Image, ImageDraw

from xsd.embedded.scenes import COLOURS, VEHICLES, Actor, Scene

SUPERSAMPLE = 3
CAMERA_HEIGHT_M = 1.4
_BRIGHTNESS = {"day": 1.0, "dusk": 0.68, "night": 0.5}
_TINT = {"day": (1, 1, 1), "dusk": (1.08, 0.95, 0.85), "night": (0.85, 0.9, 1.1)}
Colour = tuple[int, int, int]
_GLASS: Colour = (70, 90, 110)
_SKIN: Colour = (215, 170, 140)


def scaled(colour: Colour, factor: float) -> Colour:
    """A colour made darker or brighter, before the light of the scene falls on it."""
    return tuple(int(c * factor) for c in colour)


class Brush:
    """Paints one instant of a scene, later things over earlier ones. identity: number written into
    the id image wherever something is drawn; 0 writes none."""

    def __init__(self, scene: Scene, width: int, height: int, t_s: float, with_ids: bool) -> None:
        self.scene, self.t_s = scene, t_s
        self.travelled, yaw = scene.camera_at(t_s)
        self.focal = 0.86 * width * SUPERSAMPLE
        self.centre_x = width / 2 * SUPERSAMPLE - self.focal * np.tan(yaw)
        self.horizon = 0.44 * height * SUPERSAMPLE
        self.size = width * SUPERSAMPLE, height * SUPERSAMPLE
        self.picture = Image.new("RGB", self.size)
        self.draw = ImageDraw.Draw(self.picture)
        self.ids = Image.new("L", self.size) if with_ids else None
        self._draw_ids = ImageDraw.Draw(self.ids) if with_ids else None
        self.identity = 0
        self._level = _BRIGHTNESS[scene.time] * scene.brightness

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Metres (right, up, ahead) to supersampled pixels."""
        height = CAMERA_HEIGHT_M - y
        return self.centre_x + self.focal * x / z, self.horizon + self.focal * height / z

    def lit(self, colour: Colour) -> Colour:
        """The colour in the light of the hour."""
        return tuple(int(min(255, max(0, c * self._level * k)))
                     for c, k in zip(colour, _TINT[self.scene.time], strict=True))

    def polygon(self, points: list[tuple[float, float]], colour: Colour,
                glow: bool = False) -> None:
        """points: in supersampled pixels. glow: its own light, whatever the hour."""
        self.draw.polygon(points, fill=colour if glow else self.lit(colour))
        if self._draw_ids and self.identity:
            self._draw_ids.polygon(points, fill=self.identity)

    def ellipse(self, centre: tuple[float, float], rx: float, ry: float, colour: Colour,
                glow: bool = False) -> None:
        box = (centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry)
        self.draw.ellipse(box, fill=colour if glow else self.lit(colour))
        if self._draw_ids and self.identity:
            self._draw_ids.ellipse(box, fill=self.identity)

    def outline(self, x: float, z: float, corners: list[tuple[float, float]],
                colour: Colour) -> None:
        """Any shape that faces the camera; corners: metres right of x, and up."""
        self.polygon([self.point(x + right, up, z) for right, up in corners], colour)

    def facing(self, x: float, z: float, left: float, right: float, bottom: float, top: float,
               colour: Colour, glow: bool = False) -> None:
        """A rectangle that faces the camera, in metres around (x, z)."""
        (x0, y1), (x1, y0) = self.point(x + left, bottom, z), self.point(x + right, top, z)
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, glow)

    def wall(self, x: float, near: float, far: float, bottom: float, top: float, colour: Colour,
             glow: bool = False) -> None:
        """A rectangle along the road at x."""
        corners = ((bottom, near), (top, near), (top, far), (bottom, far))
        self.polygon([self.point(x, y, z) for y, z in corners], colour, glow)

    def ground(self, left: float, right: float, near: float, far: float, colour: Colour) -> None:
        """A rectangle on the road."""
        corners = ((left, near), (left, far), (right, far), (right, near))
        self.polygon([self.point(x, 0, z) for x, z in corners], colour)


def draw(brush: Brush, actor: Actor) -> None:
    """One actor where it is at the brush's moment."""
    vehicle = _from_the_side if actor.motion.startswith("crossing") else _end_on
    paint = {"cyclist": _cyclist, "pedestrian": _pedestrian}.get(actor.kind, vehicle)
    paint(brush, actor, *brush.scene.position(actor, brush.t_s), COLOURS[actor.colour])


def traffic_light(brush: Brush, z: float) -> None:
    """At the right of the road, one lamp of three lit."""
    x = 3.0
    brush.facing(x, z, 1.5, 1.75, 0, 5.6, (70, 70, 75))
    brush.facing(x, z, -0.1, 1.7, 5.1, 5.35, (70, 70, 75))
    brush.facing(x, z, -0.75, 0.75, 2.9, 6.6, (28, 28, 30))
    for name, height, colour in (("red", 6.0, (255, 40, 30)), ("yellow", 4.75, (255, 215, 40)),
                                 ("green", 3.5, (40, 250, 110))):
        lit = name == brush.scene.light
        radius = brush.focal * (0.62 if lit else 0.4) / z
        brush.ellipse(brush.point(x, height, z), radius, radius, colour if lit else (55, 55, 55),
                      glow=lit)


def _load(colour: Colour) -> Colour:
    """A truck's load box: paler than its paint."""
    return tuple(min(255, int(c * 0.55 + 105)) for c in colour)


def _end_on(brush: Brush, actor: Actor, x: float, z: float, colour: Colour) -> None:
    """From the front or from behind, with the flank turned towards the camera."""
    front = actor.motion == "approaching" or (actor.motion, actor.place) == ("parked", "left")
    width, height, length = VEHICLES[actor.kind]
    half = width / 2
    flank_top = height * (0.62 if actor.kind == "car" else 1.0)
    flank = x + (-half if x > 0 else half)
    brush.wall(flank, z, z + length * 0.5, 0.3, flank_top, scaled(colour, 0.7))
    brush.facing(x, z, -half, half, 0.0, 0.25, (15, 15, 15))

    def panel(share: float, bottom: float, top: float, paint: Colour, glow: bool = False) -> None:
        """share: of the width. bottom, top: of the height."""
        brush.facing(x, z, -half * share, half * share, height * bottom, height * top, paint, glow)

    if actor.kind == "car":
        brush.facing(x, z, -half, half, 0.25, height * 0.62, colour)
        roof = ((-0.95, 0.6), (-0.65, 1.0), (0.65, 1.0), (0.95, 0.6))
        brush.outline(x, z, [(half * a, height * b) for a, b in roof], colour)
        panel(0.62, 0.63, 0.92, _GLASS)
    else:
        brush.facing(x, z, -half, half, 0.25, height, colour)
    if actor.kind == "van":
        panel(0.8, 0.58, 0.88, _GLASS)
    elif actor.kind == "truck":  # a load box above a lower cab
        panel(1, 0.42, 1, _load(colour))
        panel(0.75, 0.46, 0.50, (40, 40, 40))
        if front:
            panel(0.8, 0.26, 0.42, _GLASS)
    elif actor.kind == "bus":  # a broad pane and a sign
        panel(0.9, 0.45, 0.78, _GLASS)
        panel(0.6, 0.84, 0.95, (255, 200, 80), glow=True)
    # Headlights on when it comes, tail lamps when it drives, bright brake lamps when it waits.
    radius = brush.focal * 0.17 / z
    lamp: Colour = (255, 250, 215) if front else (175, 30, 25)
    if actor.motion == "waiting":
        lamp, radius = (255, 50, 40), radius * 1.7
        panel(0.35, 0.93, 0.99, lamp, glow=True)
    on = actor.motion != "parked"
    for side in (-1, 1):
        brush.ellipse(brush.point(x + side * half * 0.75, 0.62, z), radius * 1.2, radius,
                      lamp if on else (58, 58, 62), glow=on)


def _from_the_side(brush: Brush, actor: Actor, x: float, z: float, colour: Colour) -> None:
    """A vehicle that crosses the road."""
    _, height, length = VEHICLES[actor.kind]
    half = length / 2
    ahead = half if actor.motion == "crossing_right" else -half

    def panel(back: float, front: float, bottom: float, top: float, paint: Colour) -> None:
        """back, front: shares of half the length, forward positive. bottom, top: of the height."""
        left, right = sorted((ahead * back, ahead * front))
        brush.facing(x, z, left, right, height * bottom, height * top, paint)

    brush.facing(x, z, -half, half, 0.35, height * (0.6 if actor.kind == "car" else 1), colour)
    if actor.kind == "car":
        cabin = ((-0.55, 0.58), (-0.35, 1.0), (0.3, 1.0), (0.58, 0.58))
        panes = ((-0.42, 0.64), (-0.3, 0.93), (0.24, 0.93), (0.44, 0.64))
        for corners, paint in ((cabin, colour), (panes, _GLASS)):
            brush.outline(x, z, [(ahead * a, height * b) for a, b in corners], paint)
    elif actor.kind == "van":
        panel(0.45, 0.9, 0.58, 0.88, _GLASS)
    elif actor.kind == "truck":  # above the cab, the background shows
        panel(-1, 0.5, 0.3, 1, _load(colour))
        panel(0.55, 1, 0.8, 1.01, (92, 120, 70) if brush.scene.time == "day" else (60, 70, 60))
        panel(0.55, 1, 0.5, 0.72, _GLASS)
    else:
        for k in range(5):
            brush.facing(x, z, -half + length * (k + 0.15) / 5, -half + length * (k + 0.85) / 5,
                         height * 0.5, height * 0.82, _GLASS)
    for wheel in (-0.62, 0.62):
        radius = brush.focal * 0.42 / z
        brush.ellipse(brush.point(x + wheel * half, 0.4, z), radius, radius, (15, 15, 15))


def _cyclist(brush: Brush, actor: Actor, x: float, z: float, colour: Colour) -> None:
    radius = brush.focal * 0.42 / z
    brush.ellipse(brush.point(x, 0.42, z), radius * 0.35, radius, (20, 20, 20))
    brush.facing(x, z, -0.38, 0.38, 0.95, 1.03, (40, 40, 40))
    pedal = 0.14 * np.sin(7.0 * brush.t_s + actor.phase)
    brush.facing(x, z, -0.24, -0.06, 0.35 + pedal, 0.95, (40, 45, 70))
    brush.facing(x, z, 0.06, 0.24, 0.35 - pedal, 0.95, (40, 45, 70))
    brush.facing(x, z, -0.3, 0.3, 0.9, 1.6, colour)
    _head(brush, x, z, 1.85)


def _pedestrian(brush: Brush, actor: Actor, x: float, z: float, colour: Colour) -> None:
    stands = actor.motion == "standing"
    stride = 0.12 if stands else 0.32 * np.sin(8.0 * brush.t_s + actor.phase)
    for side, swing in ((-0.12, stride), (0.12, -stride)):
        hip = side * 0.5
        leg = [(x - 0.1 + hip, 0.85), (x + 0.1 + hip, 0.85), (x + 0.1 + swing, 0),
               (x - 0.1 + swing, 0)]
        brush.outline(0, z, leg, (45, 50, 75))
    brush.facing(x, z, -0.28, 0.28, 0.75, 1.5, colour)
    heading = {"crossing_right": 1, "crossing_left": -1}.get(actor.motion, 0)
    if heading:  # a rucksack on the back, an arm ahead
        back = sorted((-heading * 0.28, -heading * 0.52))
        arm = sorted((heading * 0.28, heading * 0.5))
        brush.facing(x, z, *back, 1.0, 1.45, (40, 40, 45))
        brush.facing(x, z, *arm, 1.15, 1.28, _SKIN)
    _head(brush, x + 0.08 * heading, z, 1.75)


def _head(brush: Brush, x: float, z: float, top: float) -> None:
    radius = brush.focal * 0.17 / z
    brush.ellipse(brush.point(x, top - 0.12, z), radius, radius * 1.15, _SKIN)
