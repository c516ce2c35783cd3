"""A field of blobs in scaled latents, which distillation is to rebuild."""

import functools
import math

import torch
from torch import Tensor

from lrf_nerfstudio.field.cameras import GridCamera
from lrf_nerfstudio.field.seeding import SH_C0
from lrf_nerfstudio.guidance import InitializationConfig, initial_gaussians
from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize


@functools.cache
def true_field() -> dict[str, Tensor]:
    """Blobs of five colors: no two sides look alike."""
    generator = torch.Generator().manual_seed(4)
    field = initial_gaussians(InitializationConfig(count=12, radius=0.4, opacity=0.95), channels=4)
    field["scales"] = torch.full((12, 3), math.log(0.12))
    field["features_dc"] = 1.2 * torch.randn(5, 4, generator=generator).repeat(3, 1)[:12] / SH_C0
    return field


def render(gaussians: dict[str, Tensor], camera: GridCamera, background: Tensor) -> Tensor:
    """Scaled latents [B, 4, h, w] over a plain background [4]."""
    splats = Gaussians(
        gaussians["means"],
        gaussians["quats"],
        gaussians["scales"].exp(),
        gaussians["opacities"].sigmoid()[:, 0],
        gaussians["features_dc"],
    )
    settings = RasterSettings(width=camera.columns, height=camera.rows, sh_degree=0, render_depth=False)
    rendering = rasterize(splats, camera.viewmats, camera.Ks, settings)
    return (rendering.features + (1 - rendering.alpha) * background).permute(0, 3, 1, 2)


def psnr(latents: Tensor, truth: Tensor) -> float:
    """In dB, against the range of the truth."""
    return float(10 * torch.log10((truth.max() - truth.min()) ** 2 / (latents - truth).square().mean()))
