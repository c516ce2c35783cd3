"""Training scenes by seed: layout, shapes, materials, colors, light and camera path are drawn at random."""

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from lrf_nerfstudio.synthetic.cameras import Array, Cameras, around, look_at, smooth_walk
from lrf_nerfstudio.synthetic.geometry import Shape, Vec3
from lrf_nerfstudio.synthetic.patterns import Pattern
from lrf_nerfstudio.synthetic.raytracer import Scene, render_linear
from lrf_nerfstudio.synthetic.scenes import Lamp, Light, Material, Object, assemble, sun

PATTERNS = [kind for kind in Pattern if kind not in (Pattern.PICTURE, Pattern.LANDSCAPE)]
RAMPS = (Pattern.CLOUDS, Pattern.MARBLE, Pattern.WOOD)
SHAPES = [Shape.SPHERE, Shape.BOX, Shape.CYLINDER, Shape.RING, Shape.VASE, Shape.PILLOW]


@dataclass(frozen=True)
class Layout:
    """What a layout decides; the light's exposure is not set yet."""

    objects: list[Object]
    background: Material
    light: Light
    poses: Array  # [V, 4, 4]


def random_scene(seed: int, views: int, size: tuple[int, int]) -> tuple[Scene, Cameras]:
    """Return the scene and the cameras of a seed, the same at every call; `size` is height and width in pixels.

    Layouts take turns: a table, a room, a wall, a ring of objects.
    """
    rng = np.random.default_rng(seed)
    layout = (_table, _room, _wall, _ring)[seed % 4](rng, views)
    cameras = Cameras(layout.poses, rng.uniform(0.9, 1.5) * max(size), *size)
    scene = assemble(layout.objects, layout.background, layout.light, seed)
    return scene._replace(exposure=rng.uniform(0.8, 1.25) * _metered_exposure(scene, cameras)), cameras


def _metered_exposure(scene: Scene, cameras: Cameras) -> float:
    """Return the exposure at which the brightest channel exceeds 0.8 in a twelfth of four small views."""
    height, width = 24, 24 * cameras.width // cameras.height
    small = replace(cameras, focal=cameras.focal * height / cameras.height, height=height, width=width)
    views = range(0, len(cameras), -(-len(cameras) // 4))
    linear = np.stack([render_linear(scene, small, view, samples=1) for view in views])
    return 0.8 / float(np.quantile(linear.max(-1), 11 / 12))


# ----------------------------------------------------------------------------------------------------------------------
# Colors and materials


def _color(rng: Generator, vivid: float = 0.4, brightness: tuple[float, float] = (0.1, 0.9)) -> Vec3:
    """Return a color in linear RGB: vivid with a probability, else muted or nearly gray; of any hue."""
    low, high = brightness
    value = rng.uniform(low, high)
    if rng.uniform() < vivid:
        hue, saturation = rng.uniform(), rng.uniform(0.75, 1.0)
    elif rng.uniform() < 0.6:  # earth and wood, or muted colors of any hue
        hue, saturation = (rng.uniform(0.03, 0.14) if rng.uniform() < 0.5 else rng.uniform()), rng.uniform(0.2, 0.65)
    else:
        hue, saturation = rng.uniform(), rng.uniform(0.0, 0.15)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return red**2.2, green**2.2, blue**2.2


def _colors(rng: Generator, vivid: float, ramp: bool) -> list[Vec3]:
    """Return four colors: a ramp from a dark to a bright one, or one of each kind of brightness in any order."""
    ends = _color(rng, vivid, (0.1, 0.5)), _color(rng, vivid, (0.5, 0.9))
    if not ramp:
        colors = [*ends, _color(rng, vivid), _color(rng, vivid)]
        return [colors[k] for k in rng.permutation(4)]
    first, last = (np.array(ends[k]) for k in rng.permutation(2))
    ramp_colors = [first + t * (last - first) for t in (0.0, 0.25, 0.6, 1.0)]
    return [(float(r), float(g), float(b)) for r, g, b in ramp_colors]


def _material(rng: Generator, extent: float, ground: bool = False) -> Material:
    """Return a material for an object of an extent, with patterns from fine to as large as the object.

    What is large (`ground`: floors, walls) is matte and less often vivid, as it is in most places.
    """
    kind, vivid = PATTERNS[rng.integers(len(PATTERNS))], (0.08 if ground else 0.4)
    ramp = kind in RAMPS or rng.uniform() < 0.4
    surface = Material(
        kind,
        _colors(rng, vivid, ramp),
        cell=extent * math.exp(rng.uniform(math.log(0.2), math.log(0.9))),
        grain=rng.uniform(0.1, 0.7) if ground or rng.uniform() < 0.7 else 0.0,
        bump=rng.uniform(0.1, 0.6) if rng.uniform() < 0.3 else 0.0,
    )
    finish = rng.uniform()
    if ground or finish < 0.5:
        return surface
    if finish < 0.75:
        return replace(surface, gloss=rng.uniform(0.1, 0.6))
    if finish < 0.92:
        return replace(surface, gloss=rng.uniform(0.3, 1.0), mirror=0.05)
    return replace(surface, gloss=rng.uniform(0.5, 1.0), mirror=rng.uniform(0.4, 0.8), metal=True)


def _picture(rng: Generator, extent: float) -> Material:
    return Material(
        Pattern.PICTURE, _colors(rng, 0.4, ramp=False), 2 * extent, gloss=0.3 if rng.uniform() < 0.3 else 0.0
    )


# ----------------------------------------------------------------------------------------------------------------------
# Objects


def _standing(rng: Generator, x: float, y: float, z: float, radius: float) -> list[Object]:
    """Return an object that stands at a place within a radius, perhaps with another one on top."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    width, height = radius * rng.uniform(0.7, 1.0), radius * rng.uniform(0.5, 1.3)
    yaw, tilt = rng.uniform(0, 360), 0.0
    if shape == Shape.SPHERE:
        size, height, tilt = (width, 0.0, 0.0), width, rng.uniform(-60, 60)
    elif shape in (Shape.BOX, Shape.PILLOW):
        size = (width * rng.uniform(0.5, 0.75), width * rng.uniform(0.5, 0.75), height)
    elif shape == Shape.RING:
        minor = width * rng.uniform(0.2, 0.35)
        size, upright = (width - minor, minor, 0.0), rng.uniform() < 0.4
        height, tilt = (width, 90.0) if upright else (minor, 0.0)
    elif shape == Shape.VASE:
        size, height = (width, max(height, width), rng.uniform(0.2, 0.6)), max(height, width)
    else:
        size = (width * 0.8, height, 0.0)
    objects = [Object(shape, size, (x, y, z + height), _material(rng, width), yaw, tilt)]
    if shape in (Shape.BOX, Shape.CYLINDER, Shape.PILLOW) and rng.uniform() < 0.5 and radius > 0.15:
        objects += _standing(rng, x, y, z + 2 * height, 0.6 * width)
    return objects


def _scattered(rng: Generator, count: int, area: float, z: float, radii: tuple[float, float]) -> list[Object]:
    """Return up to `count` objects that stand side by side within a circle about the z axis."""
    taken: list[tuple[float, float, float]] = []
    for _ in range(20 * count):
        radius = rng.uniform(*radii)
        distance, angle = (area - radius) * math.sqrt(rng.uniform()), rng.uniform(0, 2 * math.pi)
        x, y = distance * math.cos(angle), distance * math.sin(angle)
        if len(taken) < count and all(math.hypot(x - a, y - b) > radius + r for a, b, r in taken):
            taken.append((x, y, radius))
    return [thing for x, y, radius in taken for thing in _standing(rng, x, y, z, radius)]


def _hung(rng: Generator, x: float, y: float, z: float, yaw: float, extent: float) -> Object:
    """Return a picture, or a panel of some material, that hangs on a wall; it faces -y before its turn by `yaw`."""
    material = _picture(rng, extent) if rng.uniform() < 0.6 else _material(rng, extent)
    return Object(Shape.BOX, (extent * rng.uniform(0.7, 1.0), 0.03, extent), (x, y, z), material, yaw)


# ----------------------------------------------------------------------------------------------------------------------
# Light and cameras


def _outdoors(rng: Generator) -> tuple[Material, Light]:
    """Return a landscape in sunshine or under clouds."""
    hills, trees = (0.26, 0.34, 0.42), (0.05, 0.1, 0.035)
    if rng.uniform() < 0.5:
        hills, trees = _color(rng, 0.2, (0.4, 0.7)), _color(rng, 0.2, (0.1, 0.4))
    sky = (0.15, 0.35, 0.75) if rng.uniform() < 0.6 else _color(rng, 0.3, (0.4, 0.9))
    background = Material(Pattern.LANDSCAPE, [sky, (0.78, 0.82, 0.84), hills, trees])
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(25, 65))
    direction = around(np.zeros(3), np.array([azimuth]), np.array([elevation]), 1.0)[0]
    strength, warmth = rng.uniform(0.4, 2.2), rng.uniform(0.5, 1.0)
    lamp = sun(direction, (strength, strength * (0.5 + 0.5 * warmth), strength * warmth), rng.uniform(1.0, 8.0))
    return background, Light([lamp], horizon=(0.4, 0.42, 0.42), zenith=(0.35, 0.45, 0.65))


def _indoors(rng: Generator, height: float) -> tuple[Material, Light]:
    """Return a blurred background of large spots, and one to three lamps at a height."""
    kind = (Pattern.CLOUDS, Pattern.DOTS)[rng.integers(2)]
    background = Material(kind, _colors(rng, 0.3, ramp=rng.uniform() < 0.5), rng.uniform(4, 10))
    lamps = []
    for number in range(rng.integers(1, 4)):
        x, y = rng.uniform(-2, 2, 2)
        tint = np.array([1.0, rng.uniform(0.7, 1.0), rng.uniform(0.5, 1.0)]) if number == 0 else np.array(_color(rng))
        red, green, blue = rng.uniform(0.5, 1.5) * tint
        lamps.append(Lamp((x, y, height * rng.uniform(0.8, 1.0)), rng.uniform(0.1, 0.5), (red, green, blue)))
    light = rng.uniform(0.2, 0.5)
    return background, Light(lamps, horizon=(light, light, light), zenith=(light, light, 1.1 * light), bounce=0.8)


def _orbit(
    rng: Generator, views: int, target: Vec3, elevation: tuple[float, float], radius: tuple[float, float]
) -> Array:
    """Return poses [V, 4, 4] on an arc about a target, on a smooth path or a shaky one; elevations in degrees."""
    arc = math.radians(rng.choice([90, 150, 220, 360]))
    turn = np.arange(views) / views
    low, high = np.radians(elevation)
    if rng.uniform() < 0.5:  # evenly, up and down in waves
        height = 0.5 + 0.5 * np.sin(2 * math.pi * rng.integers(2, 6) * turn + rng.uniform(0, 6))
        azimuth, shake, roll = arc * turn, 0.0, 0.0
        distance = np.full(views, rng.uniform(*radius))
    else:  # by hand
        height, azimuth = 0.5 + 0.5 * smooth_walk(rng, views), arc * (turn + 0.05 * rng.standard_normal(views))
        distance = radius[0] + (radius[1] - radius[0]) * (0.5 + 0.5 * smooth_walk(rng, views))
        shake, roll = 0.15, np.radians(5) * rng.standard_normal(views)
    targets = target + shake * rng.standard_normal((views, 3))
    azimuth = rng.uniform(0, 2 * math.pi) + azimuth
    return look_at(around(np.array(target), azimuth, low + (high - low) * height, distance), targets, roll)


def _forward(rng: Generator, views: int) -> Array:
    """Return poses [V, 4, 4] in front of a wall at y = 0, on a spiral or a shaky path."""
    reach, distance = rng.uniform(0.5, 1.2), rng.uniform(2.8, 4.0)
    if rng.uniform() < 0.5:  # a spiral
        angle = 2 * math.pi * 3 * np.arange(views) / views
        spread = reach * np.sqrt((np.arange(views) + 0.5) / views)
        x, z, roll = spread * np.cos(angle), 0.7 * spread * np.sin(angle), np.zeros(views)
    else:  # by hand
        x, z = reach * smooth_walk(rng, views), 0.7 * reach * smooth_walk(rng, views)
        roll = np.radians(4) * rng.standard_normal(views)
    positions = np.stack([x, -distance + 0.2 * smooth_walk(rng, views), 1.5 + z], axis=-1)
    targets = np.array([0.0, 0.0, 1.4]) + positions * [0.4, 0.0, 0.1] + 0.05 * rng.standard_normal((views, 3))
    return look_at(positions, targets, roll)


# ----------------------------------------------------------------------------------------------------------------------
# Layouts


def _table(rng: Generator, views: int) -> Layout:
    """Objects on a table, seen from around it."""
    background, light = _outdoors(rng) if rng.uniform() < 0.4 else _indoors(rng, 4.0)
    top = _material(rng, 1.5)
    if rng.uniform() < 0.5:
        table = Object(Shape.CYLINDER, (1.8, 0.05, 0.0), (0.0, 0.0, -0.05), top)
    else:
        table = Object(Shape.BOX, (1.8, 1.5, 0.05), (0.0, 0.0, -0.05), top, yaw=rng.uniform(0, 360))
    leg = Object(Shape.CYLINDER, (0.3, 0.65, 0.0), (0.0, 0.0, -0.75), _material(rng, 0.5))
    floor = Object(Shape.PLANE, (0.0, 0.0, 0.0), (0.0, 0.0, -1.4), _material(rng, 3.0, ground=True))
    objects = [floor, table, leg, *_scattered(rng, rng.integers(5, 12), 1.4, 0.0, (0.15, 0.45))]
    return Layout(objects, background, light, _orbit(rng, views, (0.0, 0.0, 0.3), (12, 50), (2.8, 3.8)))


def _room(rng: Generator, views: int) -> Layout:
    """A closed room with things in the middle and on the walls, seen from inside."""
    half, height = 3.2, 2.8
    background, light = _indoors(rng, 2.4)
    wall, ceiling = _material(rng, 1.5, ground=True), _material(rng, 2.0, ground=True)
    objects = [
        Object(Shape.PLANE, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), _material(rng, 1.5, ground=True)),
        Object(Shape.CYLINDER, (1.7, 0.01, 0.0), (0.0, 0.0, 0.01), _material(rng, 1.0, ground=True)),
        Object(Shape.BOX, (half, half, 0.05), (0.0, 0.0, height + 0.05), ceiling),
    ]
    for side in range(4):
        yaw = math.radians(90 * side)
        x, y = -math.sin(yaw), math.cos(yaw)  # outwards; the wall faces inwards, its -y
        center = ((half + 0.05) * x, (half + 0.05) * y, height / 2)
        objects.append(Object(Shape.BOX, (half, 0.05, height / 2), center, wall, math.degrees(yaw)))
        for shift in rng.permutation([-1.4, 1.4])[: rng.integers(1, 3)] + rng.uniform(-0.5, 0.5):
            place = (half - 0.03) * x + shift * y, (half - 0.03) * y - shift * x
            objects.append(_hung(rng, *place, rng.uniform(1.2, 1.7), math.degrees(yaw), rng.uniform(0.4, 0.8)))
    objects += _scattered(rng, rng.integers(5, 10), 1.5, 0.02, (0.15, 0.42))
    return Layout(objects, background, light, _orbit(rng, views, (0.0, 0.0, 0.6), (5, 30), (2.5, 2.8)))


def _wall(rng: Generator, views: int) -> Layout:
    """A wall with a relief, pictures and a shelf, seen from the front."""
    background, light = _outdoors(rng) if rng.uniform() < 0.5 else _indoors(rng, 3.0)
    lamp = Lamp((rng.uniform(-3, 3), -4.0, rng.uniform(2, 5)), rng.uniform(0.1, 0.6), (0.9, 0.85, 0.75))
    light = replace(light, lamps=[*light.lamps[:1], lamp])
    objects = [
        Object(Shape.PLANE, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), _material(rng, 2.0, ground=True)),
        Object(Shape.BOX, (5.0, 0.1, 2.5), (0.0, 0.1, 2.5), _material(rng, 1.5, ground=True)),
    ]
    stones, cell, highest = [_material(rng, 0.4) for _ in range(3)], rng.uniform(0.28, 0.48), rng.uniform(0.12, 0.35)
    for x in np.arange(-2.2, 2.3, cell):
        for z in np.arange(0.3, 1.3, cell):
            if rng.uniform() < 0.6:
                size = (0.47 * cell, rng.uniform(0.02, highest), 0.47 * cell)
                shape = (Shape.BOX, Shape.PILLOW)[rng.integers(2)]
                objects.append(Object(shape, size, (x, 0.0, z), stones[rng.integers(3)]))
    shelf = 1.55
    objects.append(Object(Shape.BOX, (2.4, 0.25, 0.04), (0.0, -0.25, shelf - 0.04), _material(rng, 1.0)))
    for x in np.arange(-2.0, 2.1, 0.5):
        if rng.uniform() < 0.75:
            objects += _standing(rng, x, -0.26, shelf, rng.uniform(0.13, 0.24))
    for x in (-1.6, -0.5, 0.6, 1.7):
        objects.append(_hung(rng, x, -0.03, rng.uniform(2.4, 2.6), 0.0, rng.uniform(0.3, 0.45)))
    for x in rng.uniform(-2.0, 2.0, 2):
        objects += _standing(rng, x, -1.0, 0.0, 0.3)
    return Layout(objects, background, light, _forward(rng, views))


def _ring(rng: Generator, views: int) -> Layout:
    """Objects in a ring about a larger one in the open, pillars farther off, seen from around."""
    background, light = _outdoors(rng)
    objects = [Object(Shape.PLANE, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), _material(rng, 2.0, ground=True))]
    objects += _standing(rng, 0.0, 0.0, 0.0, rng.uniform(0.4, 0.7))
    count, first = rng.integers(5, 10), rng.uniform(0, 2 * math.pi)
    for angle in first + 2 * math.pi * np.arange(count) / count:
        objects += _standing(rng, 1.7 * math.cos(angle), 1.7 * math.sin(angle), 0.0, rng.uniform(0.25, 0.5))
    stone = _material(rng, 1.0)
    for angle in first + 2 * math.pi * (np.arange(5) + rng.uniform(-0.2, 0.2, 5)) / 5:
        x, y, height = 8 * math.cos(angle), 8 * math.sin(angle), rng.uniform(1.0, 3.0)
        if rng.uniform() < 0.5:
            objects.append(Object(Shape.CYLINDER, (0.6, height, 0.0), (x, y, height), stone))
        else:
            objects.append(Object(Shape.BOX, (1.2, 0.4, height), (x, y, height), stone, rng.uniform(0, 360)))
    return Layout(objects, background, light, _orbit(rng, views, (0.0, 0.0, 0.4), (8, 45), (3.8, 5.0)))
