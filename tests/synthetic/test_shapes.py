"""Rays meet each shape where its implicit function says, and patterns lie on it the right way round."""

import math

import numpy as np
import pytest

from lrf_nerfstudio.synthetic.geometry import Shape, bounding_radius, hit, normal, surface_coordinates

SIZES = {
    Shape.SPHERE: (0.5, 0.0, 0.0),
    Shape.BOX: (0.5, 0.3, 0.4),
    Shape.CYLINDER: (0.3, 0.5, 0.0),
    Shape.RING: (0.4, 0.18, 0.0),
    Shape.VASE: (0.4, 0.5, 0.5),
    Shape.PILLOW: (0.5, 0.3, 0.4),
}


def implicit(shape: Shape, p: np.ndarray) -> np.ndarray:
    """A function of points [..., 3] that is negative inside of a shape and positive outside."""
    a, b, c = SIZES[shape]
    x, y, z = np.moveaxis(p, -1, 0)
    flat = np.hypot(x, y)
    if shape == Shape.SPHERE:
        return x**2 + y**2 + z**2 - a**2
    if shape == Shape.BOX:
        return np.max(np.abs(p) - [a, b, c], axis=-1)
    if shape == Shape.CYLINDER:
        return np.maximum(flat - a, abs(z) - b)
    if shape == Shape.RING:  # the torus' quartic
        return (x**2 + y**2 + z**2 + a**2 - b**2) ** 2 - 4 * a**2 * (x**2 + y**2)
    if shape == Shape.VASE:
        profile = a * (1 - c * (1 + np.sin(3.5 * z / b + 1)) / 2)
        return np.maximum(flat - profile, abs(z) - b)
    edge = 0.4 * min(a, b, c)  # within `edge` of a smaller box
    return np.linalg.norm(np.maximum(np.abs(p) - np.array([a, b, c]) + edge, 0.0), axis=-1) - edge


def rays(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    origins = rng.normal(size=(count, 3))
    origins *= 2 / np.linalg.norm(origins, axis=-1, keepdims=True)
    directions = rng.uniform(-0.5, 0.5, (count, 3)) - origins
    return list(zip(origins, directions / np.linalg.norm(directions, axis=-1, keepdims=True), strict=True))


def surface_points(shape: Shape) -> list[np.ndarray]:
    """Points where rays of `rays` meet the shape."""
    size, points = SIZES[shape], []
    for origin, direction in rays(200):
        t = hit(shape, size, bounding_radius(shape, size), tuple(origin), tuple(direction))
        if t < math.inf:
            points.append(origin + t * direction)
    return points


@pytest.mark.parametrize("shape", SIZES)
def test_a_ray_meets_a_shape_where_its_implicit_function_changes_sign(shape: Shape) -> None:
    size = SIZES[shape]
    way = np.linspace(0, 4, 8001)
    hits = misses = 0
    for origin, direction in rays(300):
        values = implicit(shape, origin + way[:, None] * direction)
        inside = np.flatnonzero(values < 0)
        found = hit(shape, size, bounding_radius(shape, size), tuple(origin), tuple(direction))
        if len(inside) > 20:  # not at the rim, where both are ill-conditioned
            hits += 1
            assert found == pytest.approx(way[inside[0]], abs=5e-3)
        elif values.min() > 0.02:
            misses += 1
            assert found == math.inf
    assert hits > 80 and misses > 20


@pytest.mark.parametrize("shape", SIZES)
def test_normals_are_gradients(shape: Shape) -> None:
    agree = []
    for point in surface_points(shape):
        steps = 1e-4 * np.eye(3)
        gradient = implicit(shape, point + steps) - implicit(shape, point - steps)
        n = np.array(normal(shape, SIZES[shape], tuple(point)))
        assert np.linalg.norm(n) == pytest.approx(1)
        agree.append(n @ gradient > 0.99 * np.linalg.norm(gradient))
    assert np.mean(agree) > 0.97  # all but points at edges


@pytest.mark.parametrize("shape", SIZES)
def test_patterns_are_not_mirrored(shape: Shape) -> None:
    """Rightwards and upwards on the surface, and out of it, are a right-handed system: letters can be read."""

    def coordinates(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        return np.array(surface_coordinates(shape, SIZES[shape], tuple(p), tuple(n)))

    checked = 0
    for point in surface_points(shape):
        n = np.array(normal(shape, SIZES[shape], tuple(point)))
        x = np.cross(n, [0.3, 0.5, 0.8])
        x /= np.linalg.norm(x)
        y = np.cross(n, x)
        here, there_x, there_y = (coordinates(point + offset, n) for offset in (0 * x, 1e-5 * x, 1e-5 * y))
        if max(abs(there_x - here).max(), abs(there_y - here).max()) < 1e-3:  # no seam in between
            checked += 1
            assert np.linalg.det([(there_x - here)[:2], (there_y - here)[:2]]) > 0
    assert checked > 50
