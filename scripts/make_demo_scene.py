"""Make the demo scene: a ray-traced still life on a terrace, as a nerfstudio-data folder with exact cameras.

Writes `images/*.png`, `sparse_pc.ply` (what structure from motion would find: textured surface points that several
views see, with their colours and a little noise) and `transforms.json`. Every 8th view, starting with the first, is
held out: `transforms.json` names the split, so every method of nerfstudio takes the same one without an option.

World: z up, the terrace is z = 0, the objects lie within 1.5 units of the origin, meadow and scenery end at a dome of
30 units. Pictures are linear radiance, box-filtered over `samples`^2 rays a pixel, then tone-mapped to sRGB. Nothing is
random in the renderer: sun and sky are sampled by fixed patterns, so pictures have no noise and views agree.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tyro
from numba import njit, prange
from numpy.typing import NDArray
from PIL import Image
from plyfile import PlyData, PlyElement
from rich.progress import track

from lrf_nerfstudio.utils.errors import UserError, exit_on_user_error

Array: TypeAlias = NDArray[np.floating[Any]]
Vec3: TypeAlias = tuple[float, float, float]


@dataclass
class DemoScene:
    """Make a small procedural scene in nerfstudio's format."""

    output: Path = Path("demo/scene")
    """Folder to write. Nothing happens when the same scene is there already."""
    views: int = 48
    """Number of cameras, on one closed turn around the objects at changing heights."""
    size: tuple[int, int] = (256, 256)
    """Height and width of the pictures in pixels."""
    samples: int = 3
    """Rays a pixel along each axis."""
    points: int = 6000
    """Number of seed points at most; fewer when fewer are seen by three views."""
    point_noise: float = 0.3
    """Standard deviation of the seed points' positions in pixels of the view that found them."""
    seed: int = 0
    """Seed of textures, cameras and seed points."""


# ----------------------------------------------------------------------------------------------------------------------
# Geometry: analytic primitives in a local frame each

SPHERE, BOX, TORUS, CYLINDER, PLANE, DOME = range(6)
STONE, BRICK, CRATE, MARBLE, BEACH_BALL, DONUT, CAN, POSTER, SCENERY = range(9)
DOME_RADIUS = 30.0
TERRACE_RADIUS = 3.2
EPSILON = 1e-3  # how far secondary rays start above their surface


class Geometry(NamedTuple):
    """N primitives; the last is the dome, which throws no shadow."""

    shapes: NDArray[np.int64]  # [N]
    materials: NDArray[np.int64]  # [N]
    sizes: Array  # [N, 3] sphere: radius; box: half extents; torus: radii; cylinder: radius, half height
    centers: Array  # [N, 3]
    to_local: Array  # [N, 3, 3] world to local rotation
    to_world: Array  # [N, 3, 3] its inverse
    bounds: Array  # [N] radius of a sphere about the centre that holds the primitive
    seed: int


class Lighting(NamedTuple):
    """Fixed sample directions, dealt out to the rays of a pixel in turn."""

    sun: Array  # [S, 3] unit vectors to points of the sun's disc
    sky: Array  # [A, 3] cosine-distributed directions about +z


def demo_geometry(seed: int) -> Geometry:
    """The still life."""
    objects = [  # shape, material, sizes, centre, rotation about z, then tilt about x (degrees)
        (PLANE, STONE, (0, 0, 0), (0, 0, 0), 0, 0),
        (BOX, BRICK, (0.46, 0.4, 0.44), (-0.8, 0.55, 0.44), 25, 0),
        (SPHERE, BEACH_BALL, (0.33, 0, 0), (-0.78, 0.53, 1.21), 40, 28),
        (BOX, CRATE, (0.36, 0.36, 0.36), (0.85, 0.72, 0.36), -20, 0),
        (SPHERE, MARBLE, (0.43, 0, 0), (0.82, -0.55, 0.43), 15, 0),
        (TORUS, DONUT, (0.4, 0.18, 0), (-0.55, -0.8, 0.18), 0, 0),
        (CYLINDER, CAN, (0.25, 0.5, 0), (0.08, 0.0, 0.5), 0, 0),
        (BOX, POSTER, (0.55, 0.03, 0.42), (0.05, 1.25, 0.41), 8, -12),
        (DOME, SCENERY, (DOME_RADIUS, 0, 0), (0, 0, 0), 0, 0),
    ]
    rotations = []
    for *_, yaw, tilt in objects:
        (cy, sy), (ct, st) = ((math.cos(math.radians(a)), math.sin(math.radians(a))) for a in (yaw, tilt))
        rotations.append(
            np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
        )
    to_world = np.ascontiguousarray(rotations, dtype=np.float64)
    shapes = np.array([row[0] for row in objects])
    sizes, centers = (np.array([row[k] for row in objects], dtype=np.float64) for k in (2, 3))
    bounds = np.where(shapes == TORUS, sizes.sum(-1), np.linalg.norm(sizes, axis=-1))
    return Geometry(
        shapes=shapes,
        materials=np.array([row[1] for row in objects]),
        sizes=sizes,
        centers=centers,
        to_local=np.ascontiguousarray(to_world.transpose(0, 2, 1)),
        to_world=to_world,
        bounds=np.where(shapes == PLANE, np.inf, bounds),
        seed=seed,
    )


@njit(cache=True)
def _dot(a: Vec3, b: Vec3) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(cache=True)
def _along(origin: Vec3, t: float, direction: Vec3) -> Vec3:
    return origin[0] + t * direction[0], origin[1] + t * direction[1], origin[2] + t * direction[2]


@njit(cache=True)
def _mix(a: Vec3, b: Vec3, t: float) -> Vec3:
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])


@njit(cache=True)
def _scaled(a: Vec3, s: float) -> Vec3:
    return a[0] * s, a[1] * s, a[2] * s


@njit(cache=True)
def _rotated(matrices: Array, i: int, v: Vec3) -> Vec3:
    """`matrices[i] @ v`. The index comes along because a slice of an array costs more than the product."""
    return (
        matrices[i, 0, 0] * v[0] + matrices[i, 0, 1] * v[1] + matrices[i, 0, 2] * v[2],
        matrices[i, 1, 0] * v[0] + matrices[i, 1, 1] * v[1] + matrices[i, 1, 2] * v[2],
        matrices[i, 2, 0] * v[0] + matrices[i, 2, 1] * v[1] + matrices[i, 2, 2] * v[2],
    )


@njit(cache=True)
def _row(rows: Array, i: int) -> Vec3:
    return rows[i, 0], rows[i, 1], rows[i, 2]


@njit(cache=True)
def _minus(a: Vec3, b: Vec3) -> Vec3:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


@njit(cache=True)
def _sphere_roots(origin: Vec3, direction: Vec3, radius: float) -> tuple[float, float]:
    """Entry and exit of a ray and a sphere about the origin; (inf, -inf) when they do not meet."""
    b = _dot(origin, direction)
    discriminant = b * b - _dot(origin, origin) + radius * radius
    if discriminant < 0:
        return math.inf, -math.inf
    root = math.sqrt(discriminant)
    return -b - root, -b + root


@njit(cache=True)
def _hit_sphere(origin: Vec3, direction: Vec3, radius: float) -> float:
    near, far = _sphere_roots(origin, direction, radius)
    return near if near > 0 else math.inf if far <= 0 else far


@njit(cache=True)
def _hit_box(origin: Vec3, direction: Vec3, half: Vec3) -> float:
    near, far = -math.inf, math.inf
    for axis in range(3):
        inverse = 1.0 / direction[axis] if direction[axis] != 0 else 1e30
        a, b = (-half[axis] - origin[axis]) * inverse, (half[axis] - origin[axis]) * inverse
        near, far = max(near, min(a, b)), min(far, max(a, b))
    return near if 0 < near <= far else math.inf


@njit(cache=True)
def _hit_torus(origin: Vec3, direction: Vec3, major: float, minor: float) -> float:
    """Sphere tracing (Hart 1996) between the roots of the bounding sphere; the axis is z."""
    near, far = _sphere_roots(origin, direction, major + minor)
    t = max(near, 0.0)
    for _ in range(96):
        if t > far:
            break
        x, y, z = _along(origin, t, direction)
        distance = math.hypot(math.hypot(x, y) - major, z) - minor
        if distance < 0.1 * EPSILON:
            return t
        t += distance
    return math.inf


@njit(cache=True)
def _hit_cylinder(origin: Vec3, direction: Vec3, radius: float, half_height: float) -> float:
    """Capped, about z."""
    best = math.inf
    a = direction[0] ** 2 + direction[1] ** 2
    b = origin[0] * direction[0] + origin[1] * direction[1]
    discriminant = b * b - a * (origin[0] ** 2 + origin[1] ** 2 - radius * radius)
    if a > 0 and discriminant >= 0:
        t = (-b - math.sqrt(discriminant)) / a
        if t > 0 and abs(origin[2] + t * direction[2]) <= half_height:
            best = t
    if direction[2] != 0:
        t = (-math.copysign(half_height, direction[2]) - origin[2]) / direction[2]
        x, y, _ = _along(origin, t, direction)
        if 0 < t < best and x * x + y * y <= radius * radius:
            best = t
    return best


@njit(cache=True)
def _nearest(geometry: Geometry, origin: Vec3, direction: Vec3, count: int) -> tuple[float, int]:
    """Distance and index of the first of the first `count` primitives that a ray meets; (inf, -1) for none."""
    best, index = math.inf, -1
    for i in range(count):
        offset = _minus(origin, _row(geometry.centers, i))
        near, far = _sphere_roots(offset, direction, geometry.bounds[i])
        if far <= 0 or near >= best:
            continue
        o, d = _rotated(geometry.to_local, i, offset), _rotated(geometry.to_local, i, direction)
        size, shape = _row(geometry.sizes, i), geometry.shapes[i]
        if shape == SPHERE:
            t = _hit_sphere(o, d, size[0])
        elif shape == BOX:
            t = _hit_box(o, d, size)
        elif shape == TORUS:
            t = _hit_torus(o, d, size[0], size[1])
        elif shape == CYLINDER:
            t = _hit_cylinder(o, d, size[0], size[1])
        elif shape == PLANE:
            t = -o[2] / d[2] if o[2] * d[2] < 0 else math.inf
        else:
            t = _sphere_roots(o, d, size[0])[1]
        if t < best:
            best, index = t, i
    return best, index


@njit(cache=True)
def _local_normal(shape: int, size: Vec3, p: Vec3) -> Vec3:
    """Outward unit normal of a primitive at a point of its surface, in its local frame."""
    if shape == BOX:
        excess = (abs(p[0]) - size[0], abs(p[1]) - size[1], abs(p[2]) - size[2])
        if excess[0] >= max(excess[1], excess[2]):
            return math.copysign(1.0, p[0]), 0.0, 0.0
        if excess[1] >= excess[2]:
            return 0.0, math.copysign(1.0, p[1]), 0.0
        return 0.0, 0.0, math.copysign(1.0, p[2])
    if shape == TORUS:
        ring = 1.0 - size[0] / max(math.hypot(p[0], p[1]), 1e-9)
        return p[0] * ring / size[1], p[1] * ring / size[1], p[2] / size[1]
    if shape == CYLINDER:
        if abs(p[2]) > size[1] - 1e-6:
            return 0.0, 0.0, math.copysign(1.0, p[2])
        return p[0] / size[0], p[1] / size[0], 0.0
    if shape == PLANE:
        return 0.0, 0.0, 1.0
    return p[0] / size[0], p[1] / size[0], p[2] / size[0]


@njit(cache=True, parallel=True)
def cast_rays(geometry: Geometry, origins: Array, directions: Array) -> Array:
    """Distances [R] from `origins` [R, 3] along unit `directions` [R, 3] to the first surface, the dome at the last."""
    distances = np.empty(len(origins))
    for r in prange(len(origins)):
        distances[r] = _nearest(geometry, _row(origins, r), _row(directions, r), len(geometry.shapes))[0]
    return distances


# ----------------------------------------------------------------------------------------------------------------------
# Textures: linear RGB albedo from a point in the local frame


@njit(cache=True)
def _hash(x: int, y: int, z: int) -> float:
    """A number in [0, 1) for a lattice point."""
    h = (x * 73856093) ^ (y * 19349663) ^ (z * 83492791)
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 668265263) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) & 0xFFFFFF) / 16777216.0


@njit(cache=True)
def _smoothstep(low: float, high: float, x: float) -> float:
    t = min(max((x - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@njit(cache=True)
def _noise(x: float, y: float, z: float, seed: int) -> float:
    """Value noise in [0, 1], one lattice cell a unit."""
    i, j, k = math.floor(x), math.floor(y), math.floor(z)
    u, v, w = _smoothstep(0.0, 1.0, x - i), _smoothstep(0.0, 1.0, y - j), _smoothstep(0.0, 1.0, z - k)
    total = 0.0
    for corner in range(8):
        a, b, c = corner & 1, (corner >> 1) & 1, corner >> 2
        weight = (u if a else 1.0 - u) * (v if b else 1.0 - v) * (w if c else 1.0 - w)
        total += weight * _hash(int(i) + a + 101 * seed, int(j) + b, int(k) + c)
    return total


@njit(cache=True)
def _fractal(x: float, y: float, z: float, seed: int) -> float:
    """Four octaves of value noise in [0, 1]."""
    total, amplitude = 0.0, 0.5
    for _ in range(4):
        total += amplitude * _noise(x, y, z, seed)
        x, y, z, amplitude = 2.03 * x + 7.1, 2.01 * y + 3.3, 2.02 * z + 5.7, 0.5 * amplitude
    return total / 0.9375


@njit(cache=True)
def _palette(t: float) -> Vec3:
    """Six clear colours, one for each sixth of t in [0, 1)."""
    k = int(t * 6.0)
    if k == 0:
        return 0.75, 0.06, 0.05
    if k == 1:
        return 0.9, 0.45, 0.03
    if k == 2:
        return 0.85, 0.75, 0.1
    if k == 3:
        return 0.06, 0.4, 0.12
    if k == 4:
        return 0.04, 0.2, 0.6
    return 0.85, 0.83, 0.78


@njit(cache=True)
def _script(u: float, v: float, seed: int) -> float:
    """Lines of invented letters, 1 unit wide and 1.8 high each: 1 where there is ink."""
    column, row = math.floor(u), math.floor(v / 1.8)
    x, y = int((u - column) * 4.0), int((v / 1.8 - row) * 7.0)
    if x > 2 or y > 4 or _hash(int(column), int(row), seed) < 0.2:
        return 0.0
    return 1.0 if _hash(4 * int(column) + x, 8 * int(row) + y, seed + 1) < 0.58 else 0.0


@njit(cache=True)
def _terrace(p: Vec3, seed: int) -> Vec3:
    """Stone tiles around a woven round carpet, a kerb, then meadow."""
    radius, angle = math.hypot(p[0], p[1]), math.atan2(p[1], p[0])
    if radius < 1.75:
        ring = math.floor(radius / 0.35)
        weave = 0.75 + 0.4 * _fractal(6.0 * p[0], 6.0 * p[1], 0.0, seed)
        colour: Vec3 = (0.32, 0.05, 0.06)
        if ring % 2 == 1:
            teeth = abs((angle / (2.0 * math.pi) * (5.0 + 5.0 * ring)) % 1.0 - 0.5) * 2.0
            inside = teeth > (radius / 0.35 - ring)
            colour = (0.62, 0.45, 0.2) if inside else (0.05, 0.1, 0.22)
        elif ring > 0:
            dot = abs((angle / (2.0 * math.pi) * (4.0 + 5.0 * ring)) % 1.0 - 0.5)
            if dot < 0.2 and abs(radius / 0.35 - ring - 0.5) < 0.24:
                colour = (0.7, 0.62, 0.45)
        return _scaled(colour, weave)
    if radius < TERRACE_RADIUS:
        if radius > TERRACE_RADIUS - 0.16:
            return _scaled((0.42, 0.4, 0.37), 0.6 + 0.7 * _fractal(6.0 * p[0], 6.0 * p[1], 0.0, seed))
        u, v = p[0] / 0.7, p[1] / 0.7
        v += 0.5 * (math.floor(u) % 2.0)
        i, j = math.floor(u), math.floor(v)
        edge = min(min(u - i, 1.0 - u + i), min(v - j, 1.0 - v + j))
        tone = 0.55 + 0.5 * _hash(i, j, seed + 3)
        warmth = _hash(j, i, seed + 4)
        stone = _scaled(_mix((0.36, 0.33, 0.3), (0.46, 0.33, 0.22), warmth), tone)
        grain = 0.65 + 0.7 * _fractal(5.0 * p[0], 5.0 * p[1], 3.0 * tone, seed)
        return _mix((0.1, 0.09, 0.08), _scaled(stone, grain), _smoothstep(0.02, 0.04, edge))
    patches = _fractal(0.7 * p[0], 0.7 * p[1], 1.0, seed)
    blades = _fractal(5.0 * p[0], 5.0 * p[1], 2.0, seed)
    near = 1.0 / (1.0 + (radius / 12.0) ** 2)  # fine detail fades before it aliases
    grass = _mix((0.05, 0.12, 0.02), (0.24, 0.25, 0.06), _smoothstep(0.3, 0.7, patches))
    return _scaled(grass, 1.0 + near * 1.4 * (blades - 0.5))


@njit(cache=True)
def _brick(p: Vec3, n: Vec3, seed: int) -> Vec3:
    u, v = (p[1], p[2]) if abs(n[0]) > 0.5 else (p[0], p[2]) if abs(n[1]) > 0.5 else (p[0], p[1])
    row = math.floor((v + 0.44) / 0.22)
    u = u / 0.42 + 0.5 * (row % 2)
    column = math.floor(u)
    side, rise = u - column, (v + 0.44) / 0.22 - row
    mortar = min(min(side, 1.0 - side) * 0.42, min(rise, 1.0 - rise) * 0.22)
    face = int(2.0 * n[0] + 5.0 * n[1] + 11.0 * n[2])
    tone = _hash(int(column) + 17 * face, int(row), seed + 5)
    clay = _mix((0.4, 0.09, 0.04), (0.58, 0.22, 0.1), tone)
    rough = 0.7 + 0.6 * _fractal(7.0 * p[0], 7.0 * p[1], 7.0 * p[2], seed)
    return _mix((0.5, 0.47, 0.42), _scaled(clay, rough), _smoothstep(0.011, 0.02, mortar))


@njit(cache=True)
def _crate(p: Vec3, n: Vec3, seed: int) -> Vec3:
    """Planks in a frame; the grain runs along each plank."""
    half = 0.36
    u, v = (p[1], p[2]) if abs(n[0]) > 0.5 else (p[0], p[2]) if abs(n[1]) > 0.5 else (p[0], p[1])
    border = half - max(abs(u), abs(v))
    framed = border < 0.075
    if framed and abs(u) > abs(v):
        u, v = v, u
    plank = math.floor((v + half) / 0.18)
    grain = _fractal(2.0 * u + 9.0 * plank, 15.0 * v, 3.0 * _hash(int(plank), 3, seed), seed)
    wood = _mix((0.2, 0.09, 0.03), (0.62, 0.38, 0.17), _smoothstep(0.25, 0.75, grain))
    if framed:
        return _scaled(wood, 0.95 if border < 0.068 else 0.35)
    seam = abs((v + half) / 0.18 - plank - 0.5)
    return _scaled(wood, (0.55 + 0.4 * _hash(int(plank), 8, seed)) * (0.3 if seam > 0.47 else 1.0))


@njit(cache=True)
def _marble(p: Vec3, seed: int) -> Vec3:
    swirl = _fractal(3.0 * p[0], 3.0 * p[1], 3.0 * p[2] + 8.0, seed)
    vein = abs(math.sin(5.0 * (p[0] + 0.6 * p[2]) + 11.0 * swirl))
    cloud = _fractal(2.0 * p[0] + 4.0, 2.0 * p[1], 2.0 * p[2], seed + 2)
    base = _mix((0.03, 0.16, 0.15), (0.18, 0.4, 0.33), _smoothstep(0.3, 0.7, cloud))
    return _mix((0.75, 0.68, 0.5), base, _smoothstep(0.05, 0.35, vein))


@njit(cache=True)
def _donut(p: Vec3, size: Vec3, seed: int) -> Vec3:
    """Dough under pink icing with a wavy rim and sprinkles."""
    angle = math.atan2(p[1], p[0])
    around = math.atan2(p[2], math.hypot(p[0], p[1]) - size[0])
    rim = 0.08 * math.sin(7.0 * angle) + 0.05 * math.sin(12.0 * angle + 2.0)
    if p[2] / size[1] < 0.12 + rim:
        return _scaled((0.6, 0.33, 0.12), 0.7 + 0.5 * _fractal(9.0 * p[0], 9.0 * p[1], 9.0 * p[2], seed))
    u, v = angle * 3.6, around * 2.2
    i, j = math.floor(u), math.floor(v)
    turn = math.pi * _hash(i, j, seed + 6)
    x = u - i - 0.35 - 0.3 * _hash(i, j, seed + 7)
    y = v - j - 0.35 - 0.3 * _hash(i, j, seed + 8)
    along = abs(math.cos(turn) * x + math.sin(turn) * y)
    across = abs(math.cos(turn) * y - math.sin(turn) * x)
    if along < 0.3 and across < 0.11:
        return _palette(_hash(i, j, seed + 9))
    return 0.82, 0.22, 0.36


@njit(cache=True)
def _can(p: Vec3, n: Vec3, half_height: float, seed: int) -> Vec3:
    """A tin with a label in an invented script."""
    if abs(n[2]) > 0.5:
        ring = math.sin(70.0 * math.hypot(p[0], p[1]))
        return _scaled((0.55, 0.55, 0.56), 1.0 if ring > -0.6 else 0.6)
    angle, height = math.atan2(p[1], p[0]) / (2.0 * math.pi), p[2] / half_height
    if abs(height) > 0.93:
        return 0.55, 0.55, 0.56
    if abs(height) > 0.5:
        wave = height - math.copysign(0.66, height) - 0.07 * math.sin(12.0 * math.pi * angle)
        return (0.85, 0.62, 0.12) if abs(wave) < 0.06 else (0.02, 0.16, 0.34)
    ink = _script(9.0 * angle + 9.0, (0.5 - height) * 3.6, seed + 10)
    return (0.03, 0.05, 0.12) if ink > 0.5 else (0.88, 0.84, 0.74)


@njit(cache=True)
def _poster(p: Vec3, n: Vec3, size: Vec3, seed: int) -> Vec3:
    """A framed page on each side: a headline, a picture, two columns of text."""
    if abs(n[1]) < 0.5 or abs(p[0]) > size[0] - 0.035 or abs(p[2]) > size[2] - 0.035:
        return _scaled((0.16, 0.07, 0.03), 0.6 + _fractal(4.0 * p[0], 20.0 * p[1], 20.0 * p[2], seed))
    paper: Vec3 = (0.84, 0.8, 0.68)
    u = -p[0] * n[1] + size[0] - 0.09  # from the left edge of the text, as read from outside
    v = size[2] - 0.08 - p[2]
    if v < 0.0 or u < 0.0 or u > 2.0 * size[0] - 0.18 or v > 0.68:
        return paper
    side = int(n[1])
    if v < 0.18:
        return (0.45, 0.04, 0.03) if _script(u / 0.115, v / 0.1, seed + 12 + side) > 0.5 else paper
    if v > 0.22 and u < 0.44:
        x, y = u / 0.44, (v - 0.22) / 0.46
        hill = 0.6 + 0.16 * math.sin(5.0 * x + side) + 0.1 * math.sin(11.0 * x)
        if y > hill:
            return _mix((0.08, 0.25, 0.12), (0.3, 0.4, 0.1), _noise(9.0 * x, 9.0 * y, 2.0, seed))
        if math.hypot(x - 0.7, 0.8 * (y - 0.25)) < 0.13:
            return 0.9, 0.55, 0.08
        return _mix((0.15, 0.38, 0.65), (0.75, 0.6, 0.5), y)
    if v > 0.22 and u > 0.5:
        return (0.06, 0.06, 0.07) if _script((u - 0.5) / 0.084, (v - 0.22) / 0.086, seed + 15 + side) > 0.5 else paper
    return paper


@njit(cache=True)
def _scenery(direction: Vec3, sun: Vec3, seed: int) -> Vec3:
    """Radiance of the dome: sky with clouds and a glow about the sun, two ranges of hills, a belt of trees."""
    angle = math.atan2(direction[1], direction[0])
    x, y, elevation = math.cos(angle), math.sin(angle), math.asin(min(max(direction[2], -1.0), 1.0))
    if elevation < 0.05 + 0.06 * _fractal(14.0 * x, 14.0 * y, 3.0, seed):
        return _scaled((0.05, 0.1, 0.035), 0.6 + 0.9 * _fractal(30.0 * x, 30.0 * y, 40.0 * elevation, seed))
    if elevation < 0.07 + 0.14 * _fractal(3.0 * x + 5.0, 3.0 * y, 1.0, seed):
        return _scaled((0.14, 0.22, 0.2), 0.8 + 0.4 * _fractal(14.0 * x, 14.0 * y, 20.0 * elevation, seed))
    if elevation < 0.12 + 0.26 * _fractal(2.2 * x, 2.2 * y + 7.0, 2.0, seed):
        return _scaled((0.3, 0.39, 0.5), 0.85 + 0.3 * _fractal(8.0 * x, 8.0 * y, 14.0 * elevation, seed))
    sky = _mix((0.78, 0.82, 0.84), (0.2, 0.42, 0.8), _smoothstep(0.05, 0.9, elevation))
    flat = 1.0 / (direction[2] + 0.35)
    cloud = _fractal(2.4 * flat * direction[0], 2.4 * flat * direction[1], 6.0, seed)
    sky = _mix(sky, (0.95, 0.94, 0.92), 0.9 * _smoothstep(0.48, 0.72, cloud))
    return _mix(sky, (1.0, 0.93, 0.78), 0.6 * max(_dot(direction, sun), 0.0) ** 24)


@njit(cache=True)
def _albedo(geometry: Geometry, index: int, p: Vec3, n: Vec3) -> tuple[Vec3, float]:
    """Albedo and strength of the highlight (0 matt) of a primitive at a local point with local normal."""
    material, size, seed = geometry.materials[index], _row(geometry.sizes, index), geometry.seed
    if material == STONE:
        return _terrace(p, seed), 0.0
    if material == BRICK:
        return _brick(p, n, seed), 0.0
    if material == CRATE:
        return _crate(p, n, seed), 0.03
    if material == MARBLE:
        return _marble(p, seed), 0.35
    if material == BEACH_BALL:
        stripe = (math.atan2(p[1], p[0]) / (2.0 * math.pi) + 1.0) % 1.0
        return _palette(5.0 / 6.0) if abs(n[2]) > 0.96 else _palette(stripe), 0.25
    if material == DONUT:
        return _donut(p, size, seed), 0.15
    if material == CAN:
        return _can(p, n, size[1], seed), 0.15
    return _poster(p, n, size, seed), 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Light

SUN_DIRECTION = np.array([0.55, -0.45, 0.70]) / np.linalg.norm([0.55, -0.45, 0.70])
SUN_HALF_ANGLE = math.radians(3.5)  # wider than the real one: shadows with a soft edge of some pixels
SHADOW_RAYS, SKY_RAYS = 2, 3  # for each ray of a pixel


def _disc(count: int) -> Array:
    """`count` points spread evenly over the unit disc (Vogel's spiral), [count, 2]."""
    k = np.arange(count)
    radius, angle = np.sqrt((k + 0.5) / count), k * math.pi * (3 - math.sqrt(5))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def demo_lighting(rays: int) -> Lighting:
    """Light directions for pixels of `rays` rays. Each ray takes every `rays`-th, so all cover the whole pattern."""
    right = np.cross(SUN_DIRECTION, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    offsets = math.tan(SUN_HALF_ANGLE) * _disc(rays * SHADOW_RAYS) @ np.stack([right, np.cross(right, SUN_DIRECTION)])
    sun = SUN_DIRECTION + offsets
    sky = _disc(rays * SKY_RAYS)  # projected up onto the hemisphere: cosine-distributed (Malley's method)
    return Lighting(
        sun=sun / np.linalg.norm(sun, axis=-1, keepdims=True),
        sky=np.column_stack([sky, np.sqrt(1 - (sky**2).sum(-1))]),
    )


@njit(cache=True)
def _tangents(n: Vec3) -> tuple[Vec3, Vec3]:
    """Two unit vectors that complete `n` to a basis (Duff et al. 2017)."""
    sign = math.copysign(1.0, n[2])
    a = -1.0 / (sign + n[2])
    b = n[0] * n[1] * a
    return (1.0 + sign * n[0] * n[0] * a, sign * b, -sign * n[0]), (b, sign + n[1] * n[1] * a, -n[1])


@njit(cache=True)
def _radiance(geometry: Geometry, lighting: Lighting, origin: Vec3, direction: Vec3, turn: int, turns: int) -> Vec3:
    """Linear radiance along one ray, the `turn`-th of the `turns` rays of its pixel."""
    count = len(geometry.shapes)
    distance, index = _nearest(geometry, origin, direction, count)
    hit = _along(origin, distance, direction)
    if index == count - 1:
        return _scaled(_scenery(_scaled(hit, 1.0 / DOME_RADIUS), _row(lighting.sun, 0), geometry.seed), 0.9)

    p = _rotated(geometry.to_local, index, _minus(hit, _row(geometry.centers, index)))
    local_n = _local_normal(geometry.shapes[index], _row(geometry.sizes, index), p)
    n = _rotated(geometry.to_world, index, local_n)
    albedo, gloss = _albedo(geometry, index, p, local_n)
    start = _along(hit, EPSILON, n)

    direct, highlight, shadow_rays = 0.0, 0.0, len(lighting.sun) // turns
    reflected = _along(direction, -2.0 * _dot(direction, n), n)
    for k in range(turn, len(lighting.sun), turns):
        light = _row(lighting.sun, k)
        facing = _dot(n, light)
        if facing > 0 and _nearest(geometry, start, light, count - 1)[1] < 0:
            direct += facing / shadow_rays
            highlight += max(_dot(reflected, light), 0.0) ** 40 / shadow_rays

    tangent, bitangent = _tangents(n)
    ambient: Vec3 = (0.0, 0.0, 0.0)
    for k in range(turn, len(lighting.sky), turns):
        s = _row(lighting.sky, k)
        ray = _along(_along(_scaled(n, s[2]), s[0], tangent), s[1], bitangent)
        reach, other = _nearest(geometry, start, ray, count - 1)
        light = _mix((0.5, 0.52, 0.5), (0.45, 0.6, 0.85), max(ray[2], 0.0))
        if other >= 0:  # what another surface sends back, more the farther it lies
            light = _scaled((0.3, 0.26, 0.22), 0.35 + 0.65 * min(reach / 1.5, 1.0))
        ambient = _along(ambient, turns / len(lighting.sky), light)

    sun = (1.75 * direct, 1.6 * direct, 1.35 * direct)
    colour = (
        albedo[0] * (sun[0] + 0.75 * ambient[0]) + 1.6 * gloss * highlight,
        albedo[1] * (sun[1] + 0.75 * ambient[1]) + 1.5 * gloss * highlight,
        albedo[2] * (sun[2] + 0.75 * ambient[2]) + 1.4 * gloss * highlight,
    )
    return _mix(colour, (0.62, 0.68, 0.72), 1.0 - math.exp(-((distance / 45.0) ** 2)))  # haze


@njit(cache=True, parallel=True)
def _render(
    geometry: Geometry, lighting: Lighting, cameras: Array, focal: float, height: int, width: int, samples: int
) -> Array:
    """Linear radiance [H, W, 3] as `cameras[0]` sees it."""
    image = np.empty((height, width, 3))
    turns = samples * samples
    origin = (cameras[0, 0, 3], cameras[0, 1, 3], cameras[0, 2, 3])
    for row in prange(height):
        for column in range(width):
            red, green, blue = 0.0, 0.0, 0.0
            for turn in range(turns):
                x = (column + (turn % samples + 0.5) / samples - 0.5 * width) / focal
                y = (row + (turn // samples + 0.5) / samples - 0.5 * height) / focal
                scale = 1.0 / math.sqrt(x * x + y * y + 1.0)
                direction = _rotated(cameras, 0, (x * scale, -y * scale, -scale))
                colour = _radiance(geometry, lighting, origin, direction, turn, turns)
                red, green, blue = red + colour[0], green + colour[1], blue + colour[2]
            image[row, column, 0] = red / turns
            image[row, column, 1] = green / turns
            image[row, column, 2] = blue / turns
    return image


def render(geometry: Geometry, camera_to_world: Array, focal: float, size: tuple[int, int], samples: int) -> Array:
    """Ray-trace one picture.

    Args:
        geometry: The scene.
        camera_to_world: [3, 4] or [4, 4], OpenGL axes (x right, y up, looking along -z).
        focal: Focal length in pixels; the principal point is the middle of the picture, pixel centres are at .5.
        size: Height and width in pixels.
        samples: Rays a pixel along each axis.

    Returns:
        [H, W, 3] uint8, sRGB.
    """
    lighting = demo_lighting(samples * samples)
    linear = _render(geometry, lighting, np.ascontiguousarray(camera_to_world[None]), focal, *size, samples)
    toned = np.where(linear < 0.6, linear, 0.6 + 0.4 * (1 - np.exp(-(linear - 0.6) / 0.4)))  # a shoulder, not a clip
    encoded = np.where(toned <= 0.0031308, 12.92 * toned, 1.055 * np.maximum(toned, 1e-9) ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Cameras and seed points


def demo_cameras(views: int, seed: int) -> Array:
    """Camera-to-world matrices [V, 4, 4] (OpenGL axes) on one turn about the objects, all looking at them.

    Five waves in height (8 to 46 degrees) make neighbours differ, and every 8th view fall between its neighbours.
    """
    rng = np.random.default_rng(seed)
    turn = np.arange(views) / views
    azimuth = 2 * math.pi * (turn + rng.uniform(-0.15, 0.15, views) / views)
    elevation = np.radians(27 + 17 * np.sin(2 * math.pi * 5 * turn) + rng.uniform(-2, 2, views))
    radius = 4.3 + 0.3 * np.cos(2 * math.pi * 3 * turn)
    target = np.array([0.0, 0.0, 0.45])
    offset = np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=-1
    )
    right = np.stack([-np.sin(azimuth), np.cos(azimuth), np.zeros(views)], axis=-1)
    cameras = np.tile(np.eye(4), (views, 1, 1))
    cameras[:, :3, 0] = right
    cameras[:, :3, 1] = np.cross(offset, right)
    cameras[:, :3, 2] = offset
    cameras[:, :3, 3] = target + radius[:, None] * offset
    return cameras


def project(points: Array, camera_to_world: Array, focal: float, size: tuple[int, int]) -> tuple[Array, Array]:
    """Pixel coordinates [N, 2] (x, y; pixel centres at .5) and depths [N] of world points [N, 3]."""
    local = (points - camera_to_world[:3, 3]) @ camera_to_world[:3, :3]
    depths = -local[:, 2]
    height, width = size
    pixels = focal * local[:, :2] * [1, -1] / depths[:, None] + [0.5 * width, 0.5 * height]
    return pixels, depths


def visible(
    geometry: Geometry,
    points: Array,
    camera_to_world: Array,
    focal: float,
    size: tuple[int, int],
    tolerance: float = 2e-3,
) -> Array:
    """Which of the points [N, 3] a camera sees: [N] bool. They may lie up to `tolerance` behind their surface."""
    pixels, depths = project(points, camera_to_world, focal, size)
    inside = (depths > 0) & (pixels > 0).all(-1) & (pixels < [size[1], size[0]]).all(-1)
    offsets = points - camera_to_world[:3, 3]
    distances = np.linalg.norm(offsets, axis=-1)
    origins = np.broadcast_to(camera_to_world[:3, 3], points.shape)
    reached = cast_rays(geometry, np.ascontiguousarray(origins), offsets / distances[:, None])
    return inside & (reached > distances - tolerance)


def find_seed_points(
    geometry: Geometry, images: Array, cameras: Array, focal: float, count: int, noise: float, seed: int
) -> tuple[Array, NDArray[np.uint8]]:
    """What structure from motion would find: surface points at image structure that three views or more see.

    Args:
        geometry: The scene.
        images: [V, H, W, 3] uint8.
        cameras: [V, 4, 4] camera-to-world, OpenGL axes.
        focal: Focal length in pixels.
        count: Number of points at most.
        noise: Standard deviation of a position along each axis, in pixels of the view that found it.
        seed: Seed of choice and noise.

    Returns:
        Positions [N, 3] and colours [N, 3] uint8, the means over the views that see the point.
    """
    rng = np.random.default_rng(seed)
    views, height, width, _ = images.shape
    found, spread = [], []
    for view in range(views):
        dy, dx = np.gradient(images[view].mean(-1))
        weights = (np.hypot(dx, dy) + 1.0).ravel()
        per_view = 1 + 3 * count // (2 * views)
        chosen = rng.choice(height * width, min(per_view, height * width), replace=False, p=weights / weights.sum())
        pixels = np.stack([chosen % width, chosen // width], axis=-1) + 0.5
        local = np.column_stack([(pixels - [0.5 * width, 0.5 * height]) * [1, -1] / focal, -np.ones(len(chosen))])
        directions = local @ cameras[view, :3, :3].T
        lengths = np.linalg.norm(directions, axis=-1)
        origins = np.tile(cameras[view, :3, 3], (len(chosen), 1))
        distances = cast_rays(geometry, origins, directions / lengths[:, None])
        found.append(origins + (distances / lengths)[:, None] * directions)
        spread.append(noise * distances / lengths / focal)
    points = np.concatenate(found)
    seen = np.zeros(len(points), dtype=int)
    colours = np.zeros_like(points)
    for image, camera in zip(images, cameras, strict=True):
        sees = visible(geometry, points, camera, focal, (height, width))
        pixels = project(points[sees], camera, focal, (height, width))[0].astype(int)
        seen[sees] += 1
        colours[sees] += image[pixels[:, 1], pixels[:, 0]]
    kept = rng.permutation(np.flatnonzero(seen >= 3))[:count]
    points = points + np.concatenate(spread)[:, None] * rng.standard_normal(points.shape)
    return points[kept], np.round(colours[kept] / seen[kept, None]).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def write_points(path: Path, points: Array, colours: NDArray[np.uint8]) -> None:
    """Write positions [N, 3] and colours [N, 3] as a binary ply."""
    fields = [(name, "f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(len(points), dtype=fields)
    for i, name in enumerate("xyz"):
        vertices[name] = points[:, i]
    for i, name in enumerate(("red", "green", "blue")):
        vertices[name] = colours[:, i]
    PlyData([PlyElement.describe(vertices, "vertex")]).write(str(path))


def make_demo_scene(config: DemoScene) -> Path:
    """Make the scene and return the path of its transforms.json.

    Raises:
        UserError: The folder holds another scene, or an option is out of range.
    """
    height, width = config.size
    for name, value, least in (
        ("views", config.views, 8),
        ("samples", config.samples, 1),
        ("size", min(height, width), 8),
    ):
        if value < least:
            raise UserError(f"--{name} must be {least} or more, not {value}.")
    settings = {key: value for key, value in asdict(config).items() if key != "output"} | {"size": [height, width]}
    transforms = config.output / "transforms.json"
    if transforms.exists():
        if json.loads(transforms.read_text()).get("demo_scene") == settings:
            print(f"{config.output} holds this scene already.")
            return transforms
        raise UserError(f"{transforms} describes another scene. Choose another --output, or delete that folder first.")

    geometry = demo_geometry(config.seed)
    cameras = demo_cameras(config.views, config.seed)
    focal = 1.3 * max(height, width)
    names = [f"images/view_{view:03d}.png" for view in range(config.views)]
    (config.output / "images").mkdir(parents=True, exist_ok=True)
    images = np.empty((config.views, height, width, 3), dtype=np.uint8)
    for view in track(range(config.views), description="Ray tracing"):
        images[view] = render(geometry, cameras[view], focal, config.size, config.samples)
        Image.fromarray(images[view]).save(config.output / names[view])

    train = np.arange(config.views) % 8 != 0
    points, colours = find_seed_points(
        geometry, images[train], cameras[train], focal, config.points, config.point_noise, config.seed
    )
    write_points(config.output / "sparse_pc.ply", points, colours)

    held_out = [name for name, is_train in zip(names, train, strict=True) if not is_train]
    meta = {
        "camera_model": "OPENCV",
        "fl_x": focal,
        "fl_y": focal,
        "cx": 0.5 * width,
        "cy": 0.5 * height,
        "w": width,
        "h": height,
        "ply_file_path": "sparse_pc.ply",
        "train_filenames": [name for name in names if name not in held_out],
        "val_filenames": held_out,
        "test_filenames": held_out,
        "frames": [
            {"file_path": name, "transform_matrix": camera.tolist()}
            for name, camera in zip(names, cameras, strict=True)
        ],
        "demo_scene": settings,
    }
    # Last, and all at once: a scene that has this file is complete.
    unfinished = transforms.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(meta, indent=2))
    os.replace(unfinished, transforms)
    print(f"{config.views} views of {height} x {width} and {len(points)} seed points in {config.output}")
    return transforms


if __name__ == "__main__":
    with exit_on_user_error():
        make_demo_scene(tyro.cli(DemoScene))
