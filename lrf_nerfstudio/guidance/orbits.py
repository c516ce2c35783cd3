"""Cameras around an object at the origin: random ones to train with, a fixed orbit to look at the result.

World: z up; azimuth 0 is the direction of x, where the front of the object is, and 90 degrees that of y.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrf_nerfstudio.field.cameras import GridCamera, world_to_camera
from lrf_nerfstudio.utils.options import AtLeastOne, Count, NotNegative, Positive, Range

Elevation = Annotated[float, Range(least=-89, most=89)]
"""In degrees; which way is up cannot be told right above and below the object."""
FieldOfView = Annotated[float, Range(least=1, most=170)]
"""In degrees."""


@dataclass
class OrbitConfig:
    """Where the cameras are. The defaults are those of threestudio's text-to-3D."""

    views: AtLeastOne = 4
    """Views per step."""
    cells: AtLeastOne = 64
    """Rows and columns of the latents; Stable Diffusion 1.x was trained with 64."""
    fov: tuple[FieldOfView, FieldOfView] = (40.0, 70.0)
    """Range of the field of view in degrees."""
    elevation: tuple[Elevation, Elevation] = (-10.0, 45.0)
    """Range of the elevation in degrees."""
    distance: tuple[Positive, Positive] = (1.5, 2.0)
    """Range of the distance from the object's center."""
    position_jitter: NotNegative = 0.1
    """Largest random shift of a camera along each axis."""
    target_jitter: NotNegative = 0.1
    """Standard deviation of the point that a camera looks at, along each axis."""
    roll_jitter: NotNegative = 1.0
    """Standard deviation of the roll in degrees."""
    even_azimuths: bool = True
    """Spread the azimuths of a step's views evenly, turned by a random angle, instead of drawing each by itself."""
    eval_views: AtLeastOne = 30
    """Views of the fixed orbit."""
    eval_elevation: Elevation = 15.0
    """Elevation of the fixed orbit in degrees."""
    seed: Count = 0
    """Seed of the cameras; those of step n are the same in every run."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what does not fit the other options; see `check_options`."""
        for name in ("fov", "elevation", "distance"):
            low, high = getattr(self, name)
            if low > high:
                yield name, "must ascend"


@dataclass(frozen=True)
class OrbitViews:
    """B cameras around the object.

    Attributes:
        poses: [B, 3, 4], camera to world, OpenGL axes (x right, y up, z backward), on the CPU: nerfstudio's poses.
        focals: B focal lengths in cells.
        camera: the same cameras over the grid, on the device that renders.
        azimuths: B angles in degrees, -180 to 180, 0 in front of the object.
        elevations: B angles in degrees, 90 above it.
    """

    poses: Tensor
    focals: tuple[float, ...]
    camera: GridCamera
    azimuths: tuple[float, ...]
    elevations: tuple[float, ...]


def random_orbits(config: OrbitConfig, step: int, cell: float, device: str | torch.device = "cpu") -> OrbitViews:
    """Draw the cameras of a training step; they depend on the seed and the step alone, so a run can be resumed.

    Args:
        config: their ranges.
        step: number of the step.
        cell: pixels per cell, the VAE's spatial factor.
        device: where the cameras of the grid go; nothing waits for it.
    """
    rng = np.random.default_rng([config.seed, step])
    count = config.views
    azimuths = rng.uniform(0.0, 360.0, count)
    if config.even_azimuths:
        azimuths = rng.uniform(0.0, 360.0) + 360.0 * (np.arange(count) + rng.uniform(0.0, 1.0, count)) / count
    positions = rng.uniform(*config.distance, count)[:, None] * _directions(
        azimuths, rng.uniform(*config.elevation, count)
    )
    positions += rng.uniform(-config.position_jitter, config.position_jitter, (count, 3))
    targets = rng.normal(0.0, config.target_jitter, (count, 3))
    rolls = np.radians(rng.normal(0.0, config.roll_jitter, count))
    return _views(positions, targets, rolls, rng.uniform(*config.fov, count), config.cells, cell, device)


def evaluation_orbit(config: OrbitConfig, cell: float, device: str | torch.device = "cpu") -> OrbitViews:
    """Return the cameras of one turn around the object, beginning in front of it.

    Distance and field of view are the middle of their ranges.

    Args:
        config: views and elevation.
        cell: pixels per cell, the VAE's spatial factor.
        device: where the cameras of the grid go.
    """
    count = config.eval_views
    azimuths = 360.0 * np.arange(count) / count
    positions = np.mean(config.distance) * _directions(azimuths, np.full(count, config.eval_elevation))
    fovs = np.full(count, np.mean(config.fov))
    return _views(positions, np.zeros((count, 3)), np.zeros(count), fovs, config.cells, cell, device)


_Array = NDArray[np.floating[Any]]


def _directions(azimuths: _Array, elevations: _Array) -> _Array:
    """Return unit vectors [B, 3] from the origin at angles [B] in degrees."""
    azimuths, elevations = np.radians(azimuths), np.radians(elevations)
    flat = np.cos(elevations)
    return np.stack([flat * np.cos(azimuths), flat * np.sin(azimuths), np.sin(elevations)], axis=-1)


def _views(
    positions: _Array,
    targets: _Array,
    rolls: _Array,
    fovs: _Array,
    cells: int,
    cell: float,
    device: str | torch.device,
) -> OrbitViews:
    """Return cameras at positions [B, 3] that look at targets [B, 3], turned by rolls [B] in radians."""
    back = positions - targets
    back /= np.linalg.norm(back, axis=-1, keepdims=True)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    up = np.cross(back, right)
    cos, sin = np.cos(rolls)[:, None], np.sin(rolls)[:, None]
    poses = np.stack([cos * right + sin * up, cos * up - sin * right, back, positions], axis=-1)  # [B, 3, 4]
    poses = torch.from_numpy(poses).float()

    focals = 0.5 * cells / np.tan(0.5 * np.radians(fovs))
    Ks = torch.zeros(len(positions), 3, 3)
    Ks[:, 0, 0] = Ks[:, 1, 1] = torch.from_numpy(focals)
    Ks[:, :2, 2], Ks[:, 2, 2] = 0.5 * cells, 1.0
    side = round(cells * cell)
    viewmats, Ks = (tensor.to(device, non_blocking=True) for tensor in (world_to_camera(poses), Ks))
    camera = GridCamera(viewmats, Ks, side, side, cell, rows=cells, columns=cells)
    distances = np.linalg.norm(positions, axis=-1)
    return OrbitViews(
        poses,
        tuple(focals.tolist()),
        camera,
        tuple(np.degrees(np.arctan2(positions[:, 1], positions[:, 0])).tolist()),
        tuple(np.degrees(np.arcsin(positions[:, 2] / distances)).tolist()),
    )
