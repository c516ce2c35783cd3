"""Gaussian splatting of C-channel features on the CPU and on CUDA: `rasterize` and `evaluate_sh`."""

from lrf_nerfstudio.splatting.harmonics import MAX_SH_DEGREE, evaluate_sh, sh_basis
from lrf_nerfstudio.splatting.rasterization import rasterize

__all__ = ["MAX_SH_DEGREE", "evaluate_sh", "rasterize", "sh_basis"]
