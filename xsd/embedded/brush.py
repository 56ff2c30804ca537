"""Perspective drawing in metres, and who stands where; larger than the sensor and averaged down,
because edges that jump by whole pixels would fire false events."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from xsd.embedded.scenes import Scene

SUPERSAMPLE = 3
CAMERA_HEIGHT_M = 1.4
_BRIGHTNESS = {"day": 1.0, "dusk": 0.68, "night": 0.5}
_TINT = {"day": (1, 1, 1), "dusk": (1.08, 0.95, 0.85), "night": (0.85, 0.9, 1.1)}

Colour = tuple[int, int, int]


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
