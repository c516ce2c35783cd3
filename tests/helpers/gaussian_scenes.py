"""Small random scenes for the rasterizer's tests."""

import math

import torch
from torch import Tensor

from lrf_nerfstudio.splatting import Gaussians


def look_at(position: tuple[float, float, float]) -> Tensor:
    """World-to-camera matrix [4, 4] (float64) of a camera that looks at the origin, y down."""
    eye = torch.tensor(position, dtype=torch.float64)
    forward = -eye / eye.norm()
    right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), forward)
    right = right / right.norm()
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3] = rotation
    viewmat[:3, 3] = -rotation @ eye
    return viewmat


def random_scene(
    n: int = 120,
    channels: int = 4,
    width: int = 23,
    height: int = 17,
    n_cameras: int = 1,
    sh_degree: int | None = None,
    seed: int = 0,
    opacity: float = 1.0,
) -> dict[str, Tensor]:
    """Tensors for `arguments` (float64): Gaussians around the origin, some out of view, and off-center cameras."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    angles = [0.4 + 0.9 * b for b in range(n_cameras)]
    focal = 0.9 * width
    K = torch.tensor([[focal, 0, 0.45 * width], [0, 1.1 * focal, 0.56 * height], [0, 0, 1]], dtype=torch.float64)
    scene = {
        "means": normal(n, 3) * torch.tensor([1.3, 1.0, 1.3], dtype=torch.float64),
        "quats": normal(n, 4),
        "scales": torch.exp(0.6 * normal(n, 3) - 2.0),
        "opacities": opacity * (0.05 + 0.95 * uniform(n)),
        "features": normal(n, channels),
        "viewmats": torch.stack([look_at((3 * math.sin(a), -0.7, -3 * math.cos(a))) for a in angles]),
        "Ks": K.repeat(n_cameras, 1, 1),
    }
    if sh_degree:
        scene["features_rest"] = normal(n, (sh_degree + 1) ** 2 - 1, channels)
    return scene


def arguments(scene: dict[str, Tensor]) -> tuple[Gaussians, Tensor, Tensor]:
    """The Gaussians, viewmats and Ks of a scene, with which `rasterize` begins."""
    gaussians = Gaussians(**{name: scene[name] for name in Gaussians._fields if name in scene})
    return gaussians, scene["viewmats"], scene["Ks"]
