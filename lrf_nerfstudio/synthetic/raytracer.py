"""A small ray tracer: solid shapes with patterned materials, lamps with soft shadows, sky light and reflections.

Nothing is random: lamps and sky are sampled by fixed patterns, so pictures have no noise, and a matte surface has the
same color in every view that resolves it alike. Radiance is linear, averaged over `samples`^2 rays in each pixel, and
tone-mapped to sRGB at the end. World: z up.

Machine code is kept on disk, and made anew when this file has changed. After a change of geometry.py or patterns.py
alone, touch this file.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lrf_nerfstudio.synthetic.cameras import Cameras
from lrf_nerfstudio.synthetic.geometry import (
    Array,
    Vec3,
    along,
    compiled,
    dot,
    hit,
    inlined,
    minus,
    mix,
    normal,
    normalized,
    rotated,
    row,
    scaled,
    surface_coordinates,
    times,
)
from lrf_nerfstudio.synthetic.patterns import fractal, pattern, smoothstep

_entry_point = njit(error_model="numpy", nogil=True, cache=True)
"""Decorator of what Python calls; its threads run at once, and its machine code is kept on disk."""

EPSILON = 1e-3  # how far secondary rays start above their surface
BOUNCES = 3  # surfaces that a ray meets at most: two mirrors and what they show
SKY_RAYS = 2  # of each ray that meets a surface; to each lamp goes one
GRAIN = 0.15  # size of the largest irregularities that `grain` and `bump` give a surface, in units of the world


class Geometry(NamedTuple):
    """Shape and place of N objects; the last surrounds the others and throws no shadow."""

    shapes: NDArray[np.int64]  # [N] geometry.Shape
    sizes: Array  # [N, 3] see geometry.Shape
    centers: Array  # [N, 3]
    to_local: Array  # [N, 3, 3] rotations from the world
    to_world: Array  # [N, 3, 3] and back
    bounds: Array  # [N] radii of spheres about the centers


class Materials(NamedTuple):
    """How N objects look; see `scenes.Material`. The last shines by itself with its color."""

    patterns: NDArray[np.int64]  # [N] patterns.Pattern
    colors: Array  # [N, 4, 3] linear RGB
    means: Array  # [N, 3] mean color
    cells: Array  # [N] size of a cell of the pattern
    seeds: NDArray[np.int64]  # [N] of the pattern
    grain: Array  # [N] strength of fine irregularities of the brightness
    bump: Array  # [N] and of the normal
    gloss: Array  # [N] strength of highlights
    mirror: Array  # [N] reflectance at right angles; 0 for no reflections at any angle
    metal: Array  # [N] 1 where reflections have the color of the surface, 0 where they are white


class Lighting(NamedTuple):
    """L lamps and the sky."""

    lamps: Array  # [L, 3] positions; a sun is far away
    radii: Array  # [L]
    colors: Array  # [L, 3] irradiance at the origin
    sky: Array  # [2, 3] sky light from the horizon and from the zenith
    bounce: float  # light that surfaces send to others, as a multiple of their mean color


class Scene(NamedTuple):
    """A scene as the compiled functions read it; `scenes.assemble` makes it."""

    geometry: Geometry
    materials: Materials
    lighting: Lighting
    exposure: float


class _Surface(NamedTuple):
    """What a ray met."""

    thing: int  # index of the object
    point: Vec3
    normal: Vec3
    albedo: Vec3


@inlined
def _hit(geometry: Geometry, i: int, origin: Vec3, direction: Vec3, limit: float) -> float:
    """Return the distance at which a ray meets object `i`, inf where it does not or surely not before `limit`."""
    offset = minus(origin, row(geometry.centers, i))
    bound = geometry.bounds[i]
    outside, closing = dot(offset, offset) - bound * bound, -dot(offset, direction)
    if outside > 0 and (closing < 0 or closing * closing < outside or closing - bound > limit):
        return math.inf
    offset, direction = rotated(geometry.to_local, i, offset), rotated(geometry.to_local, i, direction)
    return hit(geometry.shapes[i], row(geometry.sizes, i), bound, offset, direction)


@compiled
def _nearest(geometry: Geometry, origin: Vec3, direction: Vec3, count: int) -> tuple[float, int]:
    """Return distance and index of the first of `count` objects that a ray meets; (inf, -1) if none."""
    best, index = math.inf, -1
    for i in range(count):
        t = _hit(geometry, i, origin, direction, best)
        if t < best:
            best, index = t, i
    return best, index


@compiled
def _hidden(geometry: Geometry, origin: Vec3, direction: Vec3, distance: float) -> bool:
    """Return whether an object that throws shadows lies on a ray before `distance`."""
    for i in range(len(geometry.shapes) - 1):  # noqa: SIM110 (generators do not compile)
        if _hit(geometry, i, origin, direction, distance) < distance:
            return True
    return False


@_entry_point
def cast_rays(scene: Scene, origins: Array, directions: Array) -> tuple[Array, NDArray[np.int64]]:
    """Return the distances [R] at which rays meet their first surface, and the indices [R] of the objects that have it.

    Rays start at `origins` [R, 3] and go along unit `directions` [R, 3]. None misses: the last object is all around.
    """
    distances, objects = np.empty(len(origins)), np.empty(len(origins), np.int64)
    for r in range(len(origins)):
        distances[r], objects[r] = _nearest(
            scene.geometry, row(origins, r), row(directions, r), len(scene.geometry.shapes)
        )
    return distances, objects


@compiled
def _bumped(scene: Scene, i: int, p: Vec3, n: Vec3, footprint: float) -> Vec3:
    """Tilt a local normal along the slope of a noise."""
    step = max(0.05, 0.5 * footprint)
    here = fractal(p, footprint, scene.materials.seeds[i])
    slope = (
        (fractal((p[0] + step, p[1], p[2]), footprint, scene.materials.seeds[i]) - here) / step,
        (fractal((p[0], p[1] + step, p[2]), footprint, scene.materials.seeds[i]) - here) / step,
        (fractal((p[0], p[1], p[2] + step), footprint, scene.materials.seeds[i]) - here) / step,
    )
    tangential = along(slope, -dot(slope, n), n)
    return normalized(along(n, -scene.materials.bump[i], tangential))


@compiled
def _pattern_color(kind: int, colors: Array, i: int, p: Vec3, u: float, v: float, footprint: float, seed: int) -> Vec3:
    """Return the color of a pattern at a point in units of its cell; `colors[i]` are its four colors."""
    tone, shade = pattern(kind, p, u, v, footprint, seed)
    k = min(int(tone), 2)
    t = tone - k
    return (
        shade * (colors[i, k, 0] + t * (colors[i, k + 1, 0] - colors[i, k, 0])),
        shade * (colors[i, k, 1] + t * (colors[i, k + 1, 1] - colors[i, k, 1])),
        shade * (colors[i, k, 2] + t * (colors[i, k + 1, 2] - colors[i, k, 2])),
    )


@_entry_point
def mean_color(kind: int, colors: Array, seed: int) -> Vec3:
    """Return the mean of a pattern in `colors` [1, 4, 3] over 6 x 6 of its cells."""
    total: Vec3 = (0.0, 0.0, 0.0)
    for k in range(24 * 24):
        u, v = k // 24 / 4 - 2.9, k % 24 / 4 - 2.9
        total = along(total, 1.0 / 24**2, _pattern_color(kind, colors, 0, (u, v, 0.3), u, v, 0.0, seed))
    return total


@inlined
def _surface(scene: Scene, i: int, point: Vec3, pixel: float) -> _Surface:
    """Return normal and albedo of object `i` at a point; `pixel` is the width of a pixel there."""
    p = rotated(scene.geometry.to_local, i, minus(point, row(scene.geometry.centers, i)))
    size = row(scene.geometry.sizes, i)
    n = normal(scene.geometry.shapes[i], size, p)
    u, v, face = surface_coordinates(scene.geometry.shapes[i], size, p, n)
    scale = 1.0 / scene.materials.cells[i]
    footprint = pixel * scale
    albedo = _pattern_color(
        scene.materials.patterns[i],
        scene.materials.colors,
        i,
        scaled(p, scale),
        u * scale,
        v * scale,
        footprint,
        scene.materials.seeds[i] + 31 * face,
    )
    albedo = mix(albedo, row(scene.materials.means, i), smoothstep(0.2, 0.7, footprint))
    if scene.materials.grain[i] > 0.0:
        fine = fractal(scaled(p, 1.0 / GRAIN), pixel / GRAIN, scene.materials.seeds[i] + 7)
        albedo = scaled(albedo, 1.0 + scene.materials.grain[i] * (2.0 * fine - 1.0))
    if scene.materials.bump[i] > 0.0:
        n = _bumped(scene, i, scaled(p, 1.0 / GRAIN), n, pixel / GRAIN)
    return _Surface(i, point, rotated(scene.geometry.to_world, i, n), albedo)


@inlined
def _tangents(n: Vec3) -> tuple[Vec3, Vec3]:
    """Return two unit vectors that complete `n` to a basis (Duff et al. 2017)."""
    sign = math.copysign(1.0, n[2])
    a = -1.0 / (sign + n[2])
    b = n[0] * n[1] * a
    return (1.0 + sign * n[0] * n[0] * a, sign * b, -sign * n[0]), (b, sign + n[1] * n[1] * a, -n[1])


@inlined
def _lamp_light(scene: Scene, surface: _Surface, reflected: Vec3, disc: Array, turn: int) -> Vec3:
    """Return what the lamps add: diffuse light and highlights, where no object is in between."""
    total: Vec3 = (0.0, 0.0, 0.0)
    gloss = scene.materials.gloss[surface.thing]
    sharpness = 10.0 + 90.0 * gloss
    for lamp in range(len(scene.lighting.lamps)):
        center = row(scene.lighting.lamps, lamp)
        x, y = _tangents(normalized(minus(center, surface.point)))
        radius = scene.lighting.radii[lamp]
        end = along(along(center, radius * disc[turn, 0], x), radius * disc[turn, 1], y)
        way = minus(end, surface.point)
        distance = math.sqrt(dot(way, way))
        light = scaled(way, 1.0 / distance)
        facing = dot(surface.normal, light)
        if facing <= 0.0 or _hidden(scene.geometry, surface.point, light, distance):
            continue
        received = scaled(surface.albedo, facing)
        if gloss > 0.0:
            received = along(received, gloss * max(dot(reflected, light), 0.0) ** sharpness, (1.0, 1.0, 1.0))
        falloff = dot(center, center) / (distance * distance)
        total = along(total, falloff, times(row(scene.lighting.colors, lamp), received))
    return total


@inlined
def _sky_light(scene: Scene, surface: _Surface, disc: Array, turn: int, turns: int) -> Vec3:
    """Return the irradiance from the sky, and from objects that hide it."""
    total: Vec3 = (0.0, 0.0, 0.0)
    x, y = _tangents(surface.normal)
    for k in range(turn, turns * SKY_RAYS, turns):
        # Points of the disc, projected up onto the hemisphere, are distributed as the cosine (Malley's method).
        up = math.sqrt(1.0 - disc[k, 0] ** 2 - disc[k, 1] ** 2)
        direction = along(along(scaled(surface.normal, up), disc[k, 0], x), disc[k, 1], y)
        reach, other = _nearest(scene.geometry, surface.point, direction, len(scene.geometry.shapes) - 1)
        light = mix(row(scene.lighting.sky, 0), row(scene.lighting.sky, 1), max(direction[2], 0.0))
        if other >= 0:  # near surfaces are in each other's shadow
            light = scaled(
                row(scene.materials.means, other), scene.lighting.bounce * (0.3 + 0.7 * min(reach / 1.5, 1.0))
            )
        total = along(total, 1.0 / SKY_RAYS, light)
    return total


@inlined
def _radiance(
    scene: Scene, origin: Vec3, direction: Vec3, spread: float, discs: tuple[Array, Array], turn: int, turns: int
) -> Vec3:
    """Return the linear radiance along a ray, the `turn`-th of the `turns` of its pixel, which widens by `spread`."""
    total: Vec3 = (0.0, 0.0, 0.0)
    weight: Vec3 = (1.0, 1.0, 1.0)
    way = 0.0
    for _ in range(BOUNCES):
        distance, i = _nearest(scene.geometry, origin, direction, len(scene.geometry.shapes))
        way += distance
        surface = _surface(scene, i, along(origin, distance, direction), spread * way)
        if i == len(scene.geometry.shapes) - 1:
            return along(total, 1.0, times(weight, surface.albedo))

        n = surface.normal
        facing = -dot(direction, n)
        reflected = normalized(along(direction, 2.0 * facing, n))
        surface = _Surface(i, along(surface.point, EPSILON, n), n, surface.albedo)
        light = times(surface.albedo, _sky_light(scene, surface, discs[1], turn, turns))
        light = along(light, 1.0, _lamp_light(scene, surface, reflected, discs[0], turn))
        mirror, metal = scene.materials.mirror[i], scene.materials.metal[i]
        if mirror > 0.0:  # Schlick's approximation
            mirror += (1.0 - mirror) * (1.0 - min(max(facing, 0.0), 1.0)) ** 5
        total = along(total, 1.0 - mirror, times(weight, light))
        if mirror == 0.0:
            break
        weight = scaled(times(weight, mix((1.0, 1.0, 1.0), surface.albedo, metal)), mirror)
        origin, direction = surface.point, reflected
    return total


@_entry_point
def _trace(
    scene: Scene, pose: Array, focal: float, height: int, width: int, samples: int, discs: tuple[Array, Array]
) -> Array:
    """Return the linear radiance [H, W, 3] that a camera with pose [1, 4, 4] sees."""
    image = np.zeros((height, width, 3))
    turns = samples * samples
    origin = pose[0, 0, 3], pose[0, 1, 3], pose[0, 2, 3]
    for line in range(height):
        for column in range(width):
            total: Vec3 = (0.0, 0.0, 0.0)
            for turn in range(turns):
                x = (column + (turn % samples + 0.5) / samples - 0.5 * width) / focal
                y = (line + (turn // samples + 0.5) / samples - 0.5 * height) / focal
                direction = normalized(rotated(pose, 0, (x, -y, -1.0)))
                radiance = _radiance(scene, origin, direction, 1.0 / focal, discs, turn, turns)
                total = along(total, 1.0 / turns, radiance)
            image[line, column, 0], image[line, column, 1], image[line, column, 2] = total
    return image


def _disc(count: int) -> Array:
    """Return `count` points spread evenly over the unit disc (Vogel's spiral), [count, 2]."""
    k = np.arange(count)
    radius, angle = np.sqrt((k + 0.5) / count), k * math.pi * (3 - math.sqrt(5))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def render_linear(scene: Scene, cameras: Cameras, view: int, samples: int) -> Array:
    """Ray-trace a view without exposure: linear radiance [H, W, 3]."""
    # Each ray of a pixel takes every `turns`-th point of a disc, so that together they cover it.
    turns = samples * samples
    discs = _disc(turns), _disc(turns * SKY_RAYS)
    pose = np.ascontiguousarray(cameras.poses[view : view + 1])
    return _trace(scene, pose, cameras.focal, cameras.height, cameras.width, samples, discs)


def render(scene: Scene, cameras: Cameras, view: int, samples: int) -> NDArray[np.uint8]:
    """Ray-trace a view.

    Args:
        scene: What there is to see.
        cameras: From where.
        view: Which of them.
        samples: Rays in a pixel along each axis.

    Returns:
        [H, W, 3], sRGB.
    """
    linear = scene.exposure * render_linear(scene, cameras, view, samples)
    toned = np.where(linear < 0.6, linear, 0.6 + 0.4 * (1 - np.exp((0.6 - linear) / 0.4)))  # a shoulder, not a clip
    encoded = np.where(toned <= 0.0031308, 12.92 * toned, 1.055 * np.maximum(toned, 1e-9) ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)
