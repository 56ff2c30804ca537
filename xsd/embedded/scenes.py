"""What is on the simulated road, and where at time t: metres right (X), up (Y) and ahead (Z)."""

from dataclasses import dataclass

import numpy as np

DURATION_S = 2.5
"""One sequence: four clips of one second that overlap by half."""

VEHICLES = {"car": (1.9, 1.5, 4.2), "van": (2.0, 2.3, 5.0), "truck": (2.4, 3.0, 7.0),
            "bus": (2.5, 3.3, 8.5)}
"""Width, height, length in metres."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 30), "blue": (35, 70, 210), "white": (236, 236, 236), "black": (22, 22, 26),
    "yellow": (238, 205, 30), "green": (30, 150, 60)}
EGO = {"stopped": (0.0, 0.0), "slow": (3.0, 0.0), "fast": (7.5, 0.0), "left": (2.5, -4.5),
       "right": (2.5, 4.5)}
"""Ego motion: forward speed in m/s, yaw rate in degrees/s (positive turns right)."""
SURROUNDINGS = ("towers", "houses", "trees", "fields")
TIMES, SKIES, LIGHTS = ("day", "dusk", "night"), ("clear", "overcast"), ("red", "yellow", "green")


@dataclass(frozen=True)
class Actor:
    """A vehicle, pedestrian or cyclist. x_m, z_m at mid-sequence; vx, vz in m/s over the ground."""

    kind: str
    colour: str
    motion: str
    place: str
    x_m: float
    z_m: float
    vx: float
    vz: float
    phase: float = 0.0

    @property
    def is_vehicle(self) -> bool:
        return self.kind in VEHICLES


@dataclass(frozen=True)
class Scene:
    """Everything a renderer needs; facts are read off what is really visible (render.py)."""

    time: str
    sky: str
    ego: str
    left: str
    right: str
    light: str | None
    light_z_m: float
    actors: tuple[Actor, ...]
    texture_seed: int
    lanes_dash_m: float = 4.0
    brightness: float = 1.0
    road_grey: float = 85.0

    def camera_at(self, t_s: float) -> tuple[float, float]:
        """Metres travelled since mid-sequence and yaw in radians at time t (0 … DURATION_S)."""
        speed, yaw_rate = EGO[self.ego]
        middle = t_s - DURATION_S / 2
        return speed * middle, float(np.radians(yaw_rate) * middle)

    def position(self, actor: Actor, t_s: float) -> tuple[float, float]:
        """(X, Z) of an actor relative to the camera in metres at time t, before yaw."""
        travelled, _ = self.camera_at(t_s)
        middle = t_s - DURATION_S / 2
        return actor.x_m + actor.vx * middle, actor.z_m + actor.vz * middle - travelled


def sample_scene(rng: np.random.Generator) -> Scene:
    """At most one vehicle in each place (left, ahead, right): their order is never ambiguous."""
    time = str(rng.choice(TIMES, p=(0.5, 0.2, 0.3)))
    sky = str(rng.choice(SKIES))
    ego = str(rng.choice(list(EGO), p=(0.3, 0.2, 0.2, 0.15, 0.15)))
    light = str(rng.choice(LIGHTS)) if rng.random() < 0.45 else None
    n_vehicles = int(rng.choice([0, 1, 2, 3], p=(0.07, 0.3, 0.45, 0.18)))
    chosen = sorted(rng.choice(3, size=n_vehicles, replace=False)) if n_vehicles else []
    actors = [_vehicle(rng, ("left", "ahead", "right")[i], ego, light) for i in chosen]
    for kind, share in (("pedestrian", 0.45), ("cyclist", 0.3)):
        if rng.random() < share:
            actors.append(_person(rng, kind))
    return Scene(time=time, sky=sky, ego=ego, left=str(rng.choice(SURROUNDINGS)),
                 right=str(rng.choice(SURROUNDINGS)), light=light,
                 light_z_m=float(rng.uniform(15.0, 21.0)), actors=tuple(actors),
                 texture_seed=int(rng.integers(2**31)), lanes_dash_m=float(rng.uniform(3.5, 5.0)),
                 brightness=float(rng.uniform(0.9, 1.08)), road_grey=float(rng.uniform(70, 105)))


def _vehicle(rng: np.random.Generator, place: str, ego: str, light: str | None) -> Actor:
    kind = str(rng.choice(list(VEHICLES), p=(0.4, 0.2, 0.2, 0.2)))
    colour = str(rng.choice(list(COLOURS)))
    speed, _ = EGO[ego]
    if place == "left":
        motions = {"parked": 0.4, "approaching": 0.6}
    elif place == "right":
        motions = {"parked": 0.55, "away": 0.45}
    elif light == "red":
        motions = {"waiting": 0.5, "crossing_right": 0.25, "crossing_left": 0.25}
    else:
        motions = {"away": 0.5, "waiting": 0.1, "crossing_right": 0.2, "crossing_left": 0.2}
    motion = str(rng.choice(list(motions), p=list(motions.values())))
    x = {"left": -3.4, "ahead": 0.0, "right": 3.4}[place] + float(rng.uniform(-0.3, 0.3))
    z = float(rng.uniform(9.5, 18.5))
    vx = vz = 0.0
    if motion == "approaching":
        vz, z = -float(rng.uniform(2.5, 4.0)), float(rng.uniform(11.5, 17.0))
    elif motion == "away":
        vz, z = speed + float(rng.uniform(2.5, 4.0)), float(rng.uniform(11.0, 16.0))
    elif motion.startswith("crossing"):
        vx = float(rng.uniform(2.6, 3.8)) * (1 if motion == "crossing_right" else -1)
        vz = speed  # keeps its distance: crossing traffic is met again at the next junction
        x, z = float(rng.uniform(-0.8, 0.8)), float(rng.uniform(11.0, 18.0))
    if speed > 5 and motion in ("parked", "waiting", "approaching"):
        # passed at speed: starts far enough away to be seen throughout
        z = float(rng.uniform(19.0, 22.0) if motion == "approaching" else rng.uniform(17.5, 21.0))
    return Actor(kind, colour, motion, place, x, z, vx, vz)


def _person(rng: np.random.Generator, kind: str) -> Actor:
    colour = str(rng.choice(list(COLOURS)))
    phase = float(rng.uniform(0, 6.28))
    vx = vz = 0.0
    if kind == "cyclist":
        place, motion, x, vz = ("left", "approaching", -1.9, -1.5) if rng.random() < 0.5 else (
            "right", "away", 1.9, 4.5)
        x, z = x + float(rng.uniform(-0.2, 0.2)), float(rng.uniform(8.0, 11.5))
        return Actor(kind, colour, motion, place, x, z, vx, vz, phase)
    motion = str(rng.choice(["crossing_right", "crossing_left", "standing"], p=(0.35, 0.35, 0.3)))
    if motion == "standing":
        place, x = ("left", -2.6) if rng.random() < 0.5 else ("right", 2.6)
        return Actor(kind, colour, motion, place, x, float(rng.uniform(8.0, 11.0)), vx, vz, phase)
    vx = float(rng.uniform(0.9, 1.5)) * (1 if motion == "crossing_right" else -1)
    x, z = float(rng.uniform(-0.5, 0.5)), float(rng.uniform(7.5, 10.0))
    return Actor(kind, colour, motion, "ahead", x, z, vx, vz, phase)
