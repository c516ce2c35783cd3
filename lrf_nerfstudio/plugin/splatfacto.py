"""What splatfacto offers and a latent radiance field has no use for."""

from dataclasses import dataclass, field

from nerfstudio.models.splatfacto import SplatfactoModelConfig
from tyro.conf import Suppress


@dataclass
class ReducedSplatfactoModelConfig(SplatfactoModelConfig):
    """Splatfacto's options without those that do nothing here; they keep their names, since nerfstudio reads some."""

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
