"""Gaussian splatting of C-channel features on the CPU and on CUDA."""

from lrf_nerfstudio.splatting.harmonics import evaluate_sh
from lrf_nerfstudio.splatting.rasterization import (
    Gaussians,
    RasterSettings,
    Rendering,
    prepare_backend,
    rasterize,
)

__all__ = ["Gaussians", "RasterSettings", "Rendering", "evaluate_sh", "prepare_backend", "rasterize"]
