"""Exact correspondences: points of the surfaces, and where each view shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrf_nerfstudio.synthetic.cameras import Array, Cameras
from lrf_nerfstudio.synthetic.raytracer import Scene, cast_rays

MIN_VIEWS = 3
"""Points that fewer views show are left out, as structure from motion leaves them out."""
TOLERANCE = 2e-3
"""How far behind a surface, in units of the world, a point still counts as part of it."""


@dataclass(frozen=True, eq=False)
class SurfacePoints:
    """N points of the surfaces of a scene.

    Attributes:
        positions: [N, 3] in the world.
        colors: [N, 3] sRGB, mean over the views that see the point.
        seen: [V, N] which views see it.
        pixels: [V, N, 2] its projections (x, y), the first pixel's center at (0.5, 0.5); also where it is not seen.
    """

    positions: Array
    colors: NDArray[np.uint8]
    seen: NDArray[np.bool_]
    pixels: Array


def visible(scene: Scene, cameras: Cameras, view: int, points: Array) -> tuple[NDArray[np.bool_], Array]:
    """Return which points [N, 3] of surfaces a view shows, [N], and their projections [N, 2]."""
    pixels, depths = cameras.project(view, points)
    inside = (depths > 0) & (pixels > 0).all(-1) & (pixels < [cameras.width, cameras.height]).all(-1)
    offsets = points - cameras.poses[view, :3, 3]
    distances = np.linalg.norm(offsets, axis=-1)
    origins = np.tile(cameras.poses[view, :3, 3], (len(points), 1))
    reached, _ = cast_rays(scene, origins, offsets / distances[:, None])
    return inside & (reached > distances - TOLERANCE), pixels


def find_points(
    scene: Scene, cameras: Cameras, images: Sequence[NDArray[np.uint8]], finders: Sequence[int], count: int, seed: int
) -> SurfacePoints:
    """Return points where random rays of some views meet a surface that three of these views or more see.

    Metals are left out: what they show lies elsewhere.

    Args:
        scene: The scene.
        cameras: V views.
        images: What they show, [H, W, 3] each.
        finders: The views that find points.
        count: Number of points at most; fewer when fewer are seen often enough.
        seed: Of the choice.
    """
    rng = np.random.default_rng(seed)
    found = []
    for view in finders:
        pixels = rng.uniform(size=(2 * count // len(finders) + 1, 2)) * [cameras.width, cameras.height]
        origins, directions = cameras.rays(view, pixels)
        distances, objects = cast_rays(scene, origins, directions)
        points = origins + distances[:, None] * directions
        found.append(points[scene.materials.metal[objects] == 0])
    positions = np.concatenate(found)
    views = [visible(scene, cameras, view, positions) for view in range(len(cameras))]
    seen, projections = np.array([view[0] for view in views]), np.array([view[1] for view in views])
    kept = rng.permutation(np.flatnonzero(seen[list(finders)].sum(0) >= MIN_VIEWS))[:count]
    positions, seen, projections = positions[kept], seen[:, kept], projections[:, kept]

    colors = np.zeros_like(positions)
    for image, sees, pixels in zip(images, seen, projections, strict=True):
        column, line = pixels[sees].astype(int).T
        colors[sees] += image[line, column]
    colors = np.round(colors / np.maximum(seen.sum(0), 1)[:, None]).astype(np.uint8)
    return SurfacePoints(positions, colors, seen, projections)
