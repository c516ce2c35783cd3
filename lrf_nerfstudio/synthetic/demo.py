"""The demo's scene: a still life on a carpet in a meadow."""

import math

import numpy as np

from lrf_nerfstudio.synthetic.cameras import Cameras, around, look_at
from lrf_nerfstudio.synthetic.geometry import Shape
from lrf_nerfstudio.synthetic.patterns import Pattern
from lrf_nerfstudio.synthetic.raytracer import Scene
from lrf_nerfstudio.synthetic.scenes import Light, Material, Object, assemble, sun

RED, YELLOW, BLUE, WHITE = (0.5, 0.04, 0.04), (0.8, 0.55, 0.1), (0.04, 0.13, 0.36), (0.75, 0.72, 0.66)


def demo_scene(seed: int) -> Scene:
    """Return the demo's still life: some things on a carpet in a meadow, within 1.8 units of the origin."""
    grass = [(0.06, 0.12, 0.02), (0.1, 0.16, 0.03), (0.16, 0.2, 0.04), (0.2, 0.22, 0.06)]
    meadow = Material(Pattern.CLOUDS, grass, 1.5, grain=0.3)
    carpet = Material(Pattern.ROSETTE, [(0.3, 0.05, 0.06), (0.5, 0.36, 0.16), (0.06, 0.1, 0.2), RED], 0.44, grain=0.3)
    clay = [(0.4, 0.09, 0.04), (0.5, 0.16, 0.07), (0.58, 0.22, 0.1), (0.48, 0.44, 0.38)]
    bricks = Material(Pattern.BRICKS, clay, 0.22, grain=0.3)
    timber = [(0.26, 0.13, 0.05), (0.36, 0.2, 0.08), (0.46, 0.28, 0.12), (0.55, 0.35, 0.16)]
    planks = Material(Pattern.WOOD, timber, 0.24)
    stone = [(0.03, 0.16, 0.15), (0.1, 0.28, 0.24), (0.18, 0.4, 0.33), (0.55, 0.52, 0.4)]
    marble = Material(Pattern.MARBLE, stone, 0.4, gloss=0.4)
    ball = Material(Pattern.STRIPES, [RED, YELLOW, BLUE, WHITE], 0.33 * math.pi / 3, gloss=0.3)
    icing = Material(Pattern.SPRINKLES, [(0.75, 0.22, 0.36), YELLOW, (0.2, 0.25, 0.5), WHITE], 0.18, gloss=0.2)
    label = Material(Pattern.SCRIPT, [BLUE, RED, YELLOW, WHITE], 0.6, gloss=0.15)
    painting = Material(Pattern.PICTURE, [(0.1, 0.3, 0.7), (0.7, 0.55, 0.45), (0.1, 0.3, 0.1), YELLOW], 1.0)
    sky = Material(Pattern.LANDSCAPE, [(0.2, 0.42, 0.8), (0.78, 0.82, 0.84), (0.26, 0.34, 0.42), (0.05, 0.1, 0.035)])
    objects = [
        Object(Shape.PLANE, (0, 0, 0), (0, 0, -0.02), meadow),
        Object(Shape.CYLINDER, (1.75, 0.02, 0), (0, 0, -0.01), carpet),
        Object(Shape.BOX, (0.46, 0.4, 0.44), (-0.8, 0.55, 0.44), bricks, yaw=25),
        Object(Shape.SPHERE, (0.33, 0, 0), (-0.78, 0.53, 1.21), ball, yaw=40, tilt=28),
        Object(Shape.BOX, (0.36, 0.36, 0.36), (0.85, 0.72, 0.36), planks, yaw=-20),
        Object(Shape.SPHERE, (0.43, 0, 0), (0.82, -0.55, 0.43), marble),
        Object(Shape.RING, (0.4, 0.18, 0), (-0.55, -0.8, 0.18), icing),
        Object(Shape.CYLINDER, (0.25, 0.5, 0), (0.08, 0.0, 0.5), label),
        Object(Shape.BOX, (0.5, 0.03, 0.5), (0.05, 1.25, 0.48), painting, yaw=8, tilt=-12),
    ]
    light = Light([sun((0.55, -0.45, 0.7), (1.75, 1.6, 1.35))], horizon=(0.38, 0.39, 0.38), zenith=(0.34, 0.45, 0.64))
    return assemble(objects, sky, light, seed)


def demo_cameras(views: int, seed: int, size: tuple[int, int]) -> Cameras:
    """Return cameras on one turn about the demo's objects, all looking at them; `size` is height and width.

    Five waves in height (8 to 46 degrees) make neighbors differ, and every 8th view fall between its neighbors.
    """
    rng = np.random.default_rng(seed)
    turn = np.arange(views) / views
    azimuth = 2 * math.pi * (turn + rng.uniform(-0.15, 0.15, views) / views)
    elevation = np.radians(27 + 17 * np.sin(2 * math.pi * 5 * turn) + rng.uniform(-2, 2, views))
    radius = 4.3 + 0.3 * np.cos(2 * math.pi * 3 * turn)
    target = np.array([0.0, 0.0, 0.45])
    poses = look_at(around(target, azimuth, elevation, radius), np.broadcast_to(target, (views, 3)))
    return Cameras(poses, 1.3 * max(size), *size)
