"""Splatfacto's options: those that a latent radiance field has no use for, and the ranges of the others."""

from dataclasses import dataclass, field
from typing import Annotated

from nerfstudio.models.splatfacto import SplatfactoModelConfig
from tyro.conf import Suppress

from lrf_nerfstudio.splatting.harmonics import MAX_SH_DEGREE
from lrf_nerfstudio.utils.options import Fraction, Positive, Range


@dataclass
class ReducedSplatfactoModelConfig(SplatfactoModelConfig):
    """Splatfacto's options without those that do nothing here; they keep their names, since nerfstudio reads some."""

    sh_degree: Annotated[int, Range(least=0, most=MAX_SH_DEGREE)] = 3
    """Degree of the spherical harmonics; with 0, colors are the same from all sides."""
    num_random: Annotated[int, Range(least=4)] = 50000
    """Gaussians to begin with where the scene has no points, or with --pipeline.model.random-init."""
    random_scale: Positive = 10.0
    """Side of the cube that these are spread in, in units of the scene."""
    ssim_lambda: Fraction = 0.2
    """Weight of 1 - SSIM in the loss; the L1 loss has the rest."""
    max_gauss_ratio: Annotated[float, Range(least=1)] = 10.0
    """Ratio of a Gaussian's longest to its shortest axis above which --pipeline.model.use-scale-regularization acts."""
    # The field's own `densification` is in their place.
    warmup_length: Suppress[int] = 0
    refine_every: Suppress[int] = 0
    cull_alpha_thresh: Suppress[float] = 0.0
    cull_scale_thresh: Suppress[float] = 0.0
    reset_alpha_every: Suppress[int] = 0
    densify_grad_thresh: Suppress[float] = 0.0
    use_absgrad: Suppress[bool] = False
    densify_size_thresh: Suppress[float] = 0.0
    n_split_samples: Suppress[int] = 0
    cull_screen_size: Suppress[float] = 0.0
    split_screen_size: Suppress[float] = 0.0
    stop_screen_size_at: Suppress[int] = 0
    stop_split_at: Suppress[int] = 0
    # The latent grid is coarse already.
    resolution_schedule: Suppress[int] = 0
    num_downscales: Suppress[int] = 0
    # They correct RGB.
    use_bilateral_grid: Suppress[bool] = False
    grid_shape: Suppress[tuple[int, int, int]] = (16, 16, 8)
    color_corrected_metrics: Suppress[bool] = False
    # For models that march along rays.
    enable_collider: Suppress[bool] = False
    collider_params: Suppress[dict[str, float] | None] = None
    loss_coefficients: Suppress[dict[str, float]] = field(default_factory=dict)
    eval_num_rays_per_chunk: Suppress[int] = 4096
    prompt: Suppress[str | None] = None
