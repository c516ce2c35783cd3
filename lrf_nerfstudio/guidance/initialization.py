"""What distillation starts from: Gaussians in a ball, or at the points of a file."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from lrf_nerfstudio.field.seeding import first_gaussians
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import Count, NotNegative, Positive, Range

FEWEST_POINTS = 4
"""Gaussians are as large as the distance to their three nearest neighbors."""
_NPZ_NAMES = ("points", "xyz", "coords")


@dataclass
class InitializationConfig:
    """The first Gaussians."""

    points: Path | None = None
    """A .ply, or a .npz with an array [N, 3] named `points`, `xyz` or `coords` (as Point-E writes), whose points take
    the place of the ball's."""
    count: Annotated[int, Range(least=FEWEST_POINTS)] = 4096
    """Gaussians in the ball."""
    radius: Positive = 0.5
    """Radius of the ball. The points of a file are moved to the origin and scaled to it."""
    keep_coordinates: bool = False
    """Take the points of a file where they are."""
    opacity: Annotated[float, Range(above=0, below=1)] = 0.2
    """Opacity of each Gaussian."""
    feature_std: NotNegative = 0.1
    """Standard deviation of the Gaussians' latents, about 0."""
    seed: Count = 0
    """Seed of positions, rotations and latents."""


def initial_gaussians(config: InitializationConfig, channels: int) -> dict[str, Tensor]:
    """Return the Gaussians that distillation starts from, as the parameters that are learned, on the CPU.

    Args:
        config: where they are.
        channels: C of the field latents.

    Returns:
        What :func:`lrf_nerfstudio.field.seeding.first_gaussians` returns, with harmonics of degree 0.

    Raises:
        UserError: if the file of points cannot be used.
    """
    generator = torch.Generator().manual_seed(config.seed)
    means = _ball(config.count, config.radius, generator)
    if config.points is not None:
        means = load_points(config.points)
        if not config.keep_coordinates:
            means = _fitted(means, config.radius)
    features = config.feature_std * torch.randn(len(means), channels, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # draws the rotations
        gaussians = first_gaussians(means, features, sh_degree=0)
    gaussians["opacities"].fill_(math.log(config.opacity / (1.0 - config.opacity)))
    return gaussians


def load_points(path: Path) -> Tensor:
    """Return the points [N, 3] of a .ply or .npz file.

    Raises:
        UserError: if the file is missing, damaged or of another kind, or has not at least four points, all finite.
    """
    option = "--pipeline.model.initialization.points"
    if path.suffix.lower() not in (".ply", ".npz"):
        raise UserError(f"{path} ({option}) must be a .ply or .npz file.")
    try:
        points = _ply_points(path) if path.suffix.lower() == ".ply" else _npz_points(path)
    except OSError as error:
        raise UserError(f"{path} ({option}) cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # damaged archives and headers surface as many types, such as tokenize.TokenError
        raise UserError(f"{path} ({option}) holds no points that can be read: {error}.") from error
    if points.dtype.kind not in "fiu":
        raise UserError(f"{path} ({option}) holds points of the type {points.dtype}, which are no numbers.")
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < FEWEST_POINTS:
        raise UserError(
            f"{path} ({option}) holds points of shape {points.shape}; at least {FEWEST_POINTS} points of 3 coordinates "
            "are needed."
        )
    if not np.isfinite(points).all():
        raise UserError(f"{path} ({option}) holds points with NaN or infinity. Remove them.")
    return torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))


def _ply_points(path: Path) -> np.ndarray:
    from plyfile import PlyData, PlyParseError

    try:
        ply = PlyData.read(path)
    except PlyParseError as error:
        raise ValueError(str(error)) from error
    if "vertex" not in ply:
        raise ValueError("it has no vertices")
    return np.stack([np.asarray(ply["vertex"][axis]) for axis in "xyz"], axis=-1)


def _npz_points(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        for name in _NPZ_NAMES:
            if name in arrays:
                points = arrays[name]
                if not isinstance(points, np.ndarray):  # what is no array, NumPy gives as bytes
                    raise ValueError(f"{name} is no array")
                return points
        raise ValueError(f"its arrays are {', '.join(arrays) or 'none'}; one must be named {' or '.join(_NPZ_NAMES)}")


def _ball(count: int, radius: float, generator: torch.Generator) -> Tensor:
    """Return points [N, 3] drawn evenly from a ball about the origin."""
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    return radius * torch.rand(count, 1, generator=generator) ** (1 / 3) * directions


def _fitted(points: Tensor, radius: float) -> Tensor:
    """Return points [N, 3] moved and scaled so that their bounding box is centered and the farthest is at `radius`."""
    centered = points - (points.amin(dim=0) + points.amax(dim=0)) / 2
    return centered * (radius / centered.norm(dim=-1).max().clamp_min(1e-12))
