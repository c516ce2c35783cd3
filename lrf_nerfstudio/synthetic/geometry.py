"""Shapes and where rays meet them.

Each shape lies about the origin of its local frame, z up. `size` holds its three measures; see `Shape`. Vectors are
tuples, which the compiler keeps in registers; matrices come with an index because slicing an array costs more than a
product.
"""

import math
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]]
Vec3: TypeAlias = tuple[float, float, float]


compiled = njit(error_model="numpy")
"""Decorator of compiled functions; a division by zero gives infinity, as in numpy."""
inlined = njit(error_model="numpy", forceinline=True)
"""Decorator of compiled functions that are worth no call."""


class Shape(IntEnum):
    """The shapes, and what their `size` means; measures that are not named are not read."""

    SPHERE = 0
    """Radius. Met from inside as well."""
    BOX = 1
    """Half extents."""
    CYLINDER = 2
    """Radius, half height; closed, about z."""
    PLANE = 3
    """No measures: z = 0."""
    RING = 4
    """Major and minor radius of a torus about z."""
    VASE = 5
    """Largest radius, half height, and depth of the waist (0 to 1) of a solid of revolution about z."""
    PILLOW = 6
    """Half extents of a box with round edges."""


SURFACE = 1e-4
"""Distance at which `_march` stops: how exact the positions of rings, vases and pillows are."""


@inlined
def dot(a: Vec3, b: Vec3) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@inlined
def along(origin: Vec3, t: float, direction: Vec3) -> Vec3:
    return origin[0] + t * direction[0], origin[1] + t * direction[1], origin[2] + t * direction[2]


@inlined
def minus(a: Vec3, b: Vec3) -> Vec3:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


@inlined
def times(a: Vec3, b: Vec3) -> Vec3:
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


@inlined
def scaled(a: Vec3, s: float) -> Vec3:
    return a[0] * s, a[1] * s, a[2] * s


@inlined
def normalized(a: Vec3) -> Vec3:
    return scaled(a, 1.0 / math.sqrt(dot(a, a)))


@inlined
def mix(a: Vec3, b: Vec3, t: float) -> Vec3:
    return along(a, t, minus(b, a))


@inlined
def row(rows: Array, i: int) -> Vec3:
    return rows[i, 0], rows[i, 1], rows[i, 2]


@inlined
def rotated(matrices: Array, i: int, v: Vec3) -> Vec3:
    """Return `matrices[i] @ v`."""
    return (
        matrices[i, 0, 0] * v[0] + matrices[i, 0, 1] * v[1] + matrices[i, 0, 2] * v[2],
        matrices[i, 1, 0] * v[0] + matrices[i, 1, 1] * v[1] + matrices[i, 1, 2] * v[2],
        matrices[i, 2, 0] * v[0] + matrices[i, 2, 1] * v[1] + matrices[i, 2, 2] * v[2],
    )


@inlined
def sphere_roots(origin: Vec3, direction: Vec3, radius: float) -> tuple[float, float]:
    """Return where a ray enters and leaves a sphere about the origin; (inf, -inf) when they do not meet."""
    b = dot(origin, direction)
    discriminant = b * b - dot(origin, origin) + radius * radius
    if discriminant < 0:
        return math.inf, -math.inf
    root = math.sqrt(discriminant)
    return -b - root, -b + root


@inlined
def _hit_sphere(origin: Vec3, direction: Vec3, radius: float) -> float:
    near, far = sphere_roots(origin, direction, radius)
    return near if near > 0 else math.inf if far <= 0 else far


@inlined
def _hit_box(origin: Vec3, direction: Vec3, half: Vec3) -> float:
    near, far = -math.inf, math.inf
    for axis in range(3):
        inverse = 1.0 / direction[axis] if direction[axis] != 0 else 1e30
        a, b = (-half[axis] - origin[axis]) * inverse, (half[axis] - origin[axis]) * inverse
        near, far = max(near, min(a, b)), min(far, max(a, b))
    return near if 0 < near <= far else math.inf


@inlined
def _hit_cylinder(origin: Vec3, direction: Vec3, radius: float, half_height: float) -> float:
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
        x, y, _ = along(origin, t, direction)
        if 0 < t < best and x * x + y * y <= radius * radius:
            best = t
    return best


@compiled
def _distance(shape: int, size: Vec3, p: Vec3) -> float:
    """Return a lower bound of the distance from a ring, vase or pillow, 0 on its surface and negative inside."""
    if shape == Shape.RING:
        return math.hypot(math.hypot(p[0], p[1]) - size[0], p[2]) - size[1]
    if shape == Shape.VASE:
        radius = size[0] * (1.0 - size[2] * (0.5 + 0.5 * math.sin(3.5 * p[2] / size[1] + 1.0)))
        slope = 1.75 * size[0] * size[2] / size[1]  # steepest of the profile: the bound that makes steps safe
        return max((math.hypot(p[0], p[1]) - radius) / math.sqrt(1.0 + slope * slope), abs(p[2]) - size[1])
    edge = 0.4 * min(size[0], size[1], size[2])
    x, y, z = abs(p[0]) - size[0] + edge, abs(p[1]) - size[1] + edge, abs(p[2]) - size[2] + edge
    outside = math.sqrt(max(x, 0.0) ** 2 + max(y, 0.0) ** 2 + max(z, 0.0) ** 2)
    return outside + min(max(x, y, z), 0.0) - edge


@compiled
def _march(shape: int, size: Vec3, bound: float, origin: Vec3, direction: Vec3) -> float:
    """Return the distance to a ring, vase or pillow by sphere tracing (Hart 1996) within its bounding sphere."""
    near, far = sphere_roots(origin, direction, bound)
    t = max(near, 0.0)
    for _ in range(256):
        if t > far:
            break
        distance = _distance(shape, size, along(origin, t, direction))
        if distance < SURFACE:
            return t
        t += distance
    return math.inf


@inlined
def hit(shape: int, size: Vec3, bound: float, origin: Vec3, direction: Vec3) -> float:
    """Return the distance at which a ray meets a shape in its local frame, inf where it does not.

    Args:
        shape: Which `Shape`.
        size: Its measures.
        bound: Radius of a sphere about the origin that holds it.
        origin: Where the ray starts, outside of the shape unless that is a sphere.
        direction: Where it goes, a unit vector.
    """
    if shape == Shape.SPHERE:
        return _hit_sphere(origin, direction, size[0])
    if shape == Shape.BOX:
        return _hit_box(origin, direction, size)
    if shape == Shape.CYLINDER:
        return _hit_cylinder(origin, direction, size[0], size[1])
    if shape == Shape.PLANE:
        return -origin[2] / direction[2] if origin[2] * direction[2] < 0 else math.inf
    return _march(shape, size, bound, origin, direction)


@compiled
def bounding_radius(shape: int, size: Vec3) -> float:
    """Return the radius of a sphere about the origin that holds a shape."""
    if shape == Shape.PLANE:
        return math.inf
    if shape == Shape.SPHERE:
        return size[0]
    if shape == Shape.RING:
        return size[0] + size[1]
    if shape == Shape.CYLINDER or shape == Shape.VASE:
        return math.hypot(size[0], size[1])
    return math.sqrt(dot(size, size))


@compiled
def normal(shape: int, size: Vec3, p: Vec3) -> Vec3:
    """Return the outward unit normal of a shape at a point of its surface, in its local frame."""
    if shape == Shape.SPHERE:
        return scaled(p, 1.0 / size[0])
    if shape == Shape.BOX:
        x, y, z = abs(p[0]) - size[0], abs(p[1]) - size[1], abs(p[2]) - size[2]
        if x >= max(y, z):
            return math.copysign(1.0, p[0]), 0.0, 0.0
        if y >= z:
            return 0.0, math.copysign(1.0, p[1]), 0.0
        return 0.0, 0.0, math.copysign(1.0, p[2])
    if shape == Shape.CYLINDER:
        if abs(p[2]) > size[1] - 1e-6:
            return 0.0, 0.0, math.copysign(1.0, p[2])
        return p[0] / size[0], p[1] / size[0], 0.0
    if shape == Shape.PLANE:
        return 0.0, 0.0, 1.0
    step = 1e-4  # of central differences
    return normalized(
        (
            _distance(shape, size, (p[0] + step, p[1], p[2])) - _distance(shape, size, (p[0] - step, p[1], p[2])),
            _distance(shape, size, (p[0], p[1] + step, p[2])) - _distance(shape, size, (p[0], p[1] - step, p[2])),
            _distance(shape, size, (p[0], p[1], p[2] + step)) - _distance(shape, size, (p[0], p[1], p[2] - step)),
        )
    )


@compiled
def surface_coordinates(shape: int, size: Vec3, p: Vec3, n: Vec3) -> tuple[float, float, int]:
    """Return the place of a point on a surface: how far to the right and up, seen from outside, and on which face."""
    x, y, z = abs(n[0]), abs(n[1]), abs(n[2])
    if shape == Shape.SPHERE:
        latitude = math.asin(min(max(p[2] / size[0], -1.0), 1.0))
        return size[0] * math.atan2(p[1], p[0]), size[0] * latitude, 0
    if shape == Shape.RING:
        around = math.atan2(p[2], math.hypot(p[0], p[1]) - size[0])
        return size[0] * math.atan2(p[1], p[0]), size[1] * around, 0
    if (shape == Shape.CYLINDER or shape == Shape.VASE) and z < 0.9:
        return size[0] * math.atan2(p[1], p[0]), p[2], 0
    if x > max(y, z):
        return (p[1], p[2], 1) if n[0] > 0 else (-p[1], p[2], 2)
    if y > z:
        return (-p[0], p[2], 3) if n[1] > 0 else (p[0], p[2], 4)
    return (p[0], p[1], 5) if n[2] > 0 else (-p[0], p[1], 6)
