"""Pinhole cameras with one set of intrinsics, and the paths that they take."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Cameras:
    """V cameras; the principal point is the middle of the picture, the first pixel's center lies at (0.5, 0.5).

    Attributes:
        poses: [V, 4, 4] camera-to-world, OpenGL axes (x right, y up, looking along -z).
        focal: Focal length in pixels.
        height: Of the pictures in pixels.
        width: Likewise.
    """

    poses: Array
    focal: float
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.poses)

    def rays(self, view: int, pixels: Array) -> tuple[Array, Array]:
        """Return origins [N, 3] and unit directions [N, 3] of the rays through pixels [N, 2] (x, y)."""
        local = (pixels - [0.5 * self.width, 0.5 * self.height]) * [1, -1] / self.focal
        directions = np.column_stack([local, -np.ones(len(local))]) @ self.poses[view, :3, :3].T
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        return np.tile(self.poses[view, :3, 3], (len(local), 1)), directions

    def project(self, view: int, points: Array) -> tuple[Array, Array]:
        """Return pixels [N, 2] (x, y) and depths [N] of world points [N, 3]."""
        local = (points - self.poses[view, :3, 3]) @ self.poses[view, :3, :3]
        depths = -local[:, 2]
        return self.focal * local[:, :2] * [1, -1] / depths[:, None] + [0.5 * self.width, 0.5 * self.height], depths


def look_at(positions: Array, targets: Array, roll: Array | float = 0.0) -> Array:
    """Return poses [V, 4, 4] of cameras at positions [V, 3] that look at targets [V, 3], upright but for `roll` [V]."""
    back = positions - targets
    back /= np.linalg.norm(back, axis=-1, keepdims=True)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    up = np.cross(back, right)
    cos, sin = (np.reshape(f(roll), (-1, 1)) for f in (np.cos, np.sin))
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[:, :3, 0], poses[:, :3, 1] = cos * right + sin * up, cos * up - sin * right
    poses[:, :3, 2], poses[:, :3, 3] = back, positions
    return poses


def around(target: Array, azimuth: Array, elevation: Array, radius: Array | float) -> Array:
    """Return positions [V, 3] in directions [V] (radians) and at distances [V] from a target [3]."""
    flat = np.cos(elevation)
    directions = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
    return target + np.reshape(radius, (-1, 1)) * directions


def smooth_walk(rng: np.random.Generator, views: int, waves: int = 3) -> Array:
    """Return a smooth random curve of `views` values in [-1, 1], as a hand moves a camera."""
    turn = np.arange(views) / views
    amplitude, phase = rng.uniform(0.3, 1.0, waves), rng.uniform(0, 2 * math.pi, waves)
    frequency = np.arange(1, waves + 1)
    curve = (amplitude * np.sin(2 * math.pi * frequency * turn[:, None] + phase)).sum(-1)
    return curve / amplitude.sum()
