"""Descriptions of scenes: objects of some material under some lamps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrf_nerfstudio.synthetic.cameras import Array
from lrf_nerfstudio.synthetic.geometry import Shape, Vec3, bounding_radius
from lrf_nerfstudio.synthetic.patterns import Pattern
from lrf_nerfstudio.synthetic.raytracer import Geometry, Lighting, Materials, Scene, mean_color

DOME_RADIUS = 30.0
SUN_DISTANCE = 1000.0


@dataclass(frozen=True)
class Material:
    """How a surface looks; colors are linear RGB."""

    pattern: Pattern
    colors: Sequence[Vec3]
    """Four; see patterns.py."""
    cell: float = 1.0
    """Size of the pattern in units of the world."""
    grain: float = 0.0
    """Strength of fine irregularities of the brightness, 0 to 1."""
    bump: float = 0.0
    """Strength of fine irregularities of the shape, 0 to 1; they change the shading only."""
    gloss: float = 0.0
    """Strength and sharpness of the lamps' highlights, 0 (matte) to 1."""
    mirror: float = 0.0
    """Share of the light that is reflected at right angles, 0 (no reflections at any angle) to 1."""
    metal: bool = False
    """Whether reflections have the color of the surface."""


@dataclass(frozen=True)
class Object:
    """A shape at a place."""

    shape: Shape
    size: Vec3
    """See `Shape`."""
    center: Vec3
    material: Material
    yaw: float = 0.0
    """Turn about z in degrees, after the tilt."""
    tilt: float = 0.0
    """Turn about x in degrees."""


@dataclass(frozen=True)
class Lamp:
    """A round lamp; far away and large, it is a sun."""

    position: Vec3
    radius: float
    color: Vec3
    """Irradiance at the origin."""


def sun(direction: Vec3, color: Vec3, softness: float = 3.5) -> Lamp:
    """Return a lamp far away in a direction; `softness` is half of its angle in degrees."""
    position = SUN_DISTANCE * np.array(direction) / np.linalg.norm(direction)
    return Lamp((position[0], position[1], position[2]), SUN_DISTANCE * math.tan(math.radians(softness)), color)


@dataclass(frozen=True)
class Light:
    """All light of a scene."""

    lamps: Sequence[Lamp]
    horizon: Vec3
    """Light of the sky from the horizon."""
    zenith: Vec3
    """Light of the sky from above."""
    bounce: float = 0.6
    """Light that surfaces send to others, as a multiple of their mean color."""
    exposure: float = 1.0


def assemble(objects: Sequence[Object], background: Material, light: Light, seed: int) -> Scene:
    """Return a scene as the ray tracer reads it.

    Args:
        objects: What is there.
        background: Of the dome of 30 units around it, which shines by itself.
        light: The lamps and the sky.
        seed: Of the patterns.
    """
    dome = Object(Shape.SPHERE, (DOME_RADIUS, 0.0, 0.0), (0.0, 0.0, 0.0), background)
    objects = [*objects, dome]
    materials = [thing.material for thing in objects]
    seeds = [1000 * seed + 100 * number for number in range(len(objects))]

    def column(name: str) -> Array:
        return np.array([getattr(material, name) for material in materials], dtype=np.float64)

    to_world = np.array([_rotation(thing.yaw, thing.tilt) for thing in objects])
    return Scene(
        Geometry(
            shapes=np.array([int(thing.shape) for thing in objects]),
            sizes=np.array([thing.size for thing in objects], dtype=np.float64),
            centers=np.array([thing.center for thing in objects], dtype=np.float64),
            to_local=np.ascontiguousarray(to_world.transpose(0, 2, 1)),
            to_world=to_world,
            bounds=np.array([bounding_radius(int(thing.shape), thing.size) for thing in objects]),
        ),
        Materials(
            patterns=np.array([int(material.pattern) for material in materials]),
            colors=column("colors"),
            means=np.array(
                [mean_color(int(m.pattern), np.array([m.colors]), s) for m, s in zip(materials, seeds, strict=True)]
            ),
            cells=column("cell"),
            seeds=np.array(seeds),
            grain=column("grain"),
            bump=column("bump"),
            gloss=column("gloss"),
            mirror=column("mirror"),
            metal=column("metal"),
        ),
        Lighting(
            lamps=np.array([lamp.position for lamp in light.lamps], dtype=np.float64).reshape(-1, 3),
            radii=np.array([lamp.radius for lamp in light.lamps], dtype=np.float64),
            colors=np.array([lamp.color for lamp in light.lamps], dtype=np.float64).reshape(-1, 3),
            sky=np.array([light.horizon, light.zenith], dtype=np.float64),
            bounce=light.bounce,
        ),
        light.exposure,
    )


def _rotation(yaw: float, tilt: float) -> Array:
    (cy, sy), (ct, st) = ((math.cos(math.radians(angle)), math.sin(math.radians(angle))) for angle in (yaw, tilt))
    return np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
