"""The CUDA backend: gsplat."""

import torch
from torch import Tensor

from lrf_nerfstudio.splatting.harmonics import evaluate_sh
from lrf_nerfstudio.splatting.rasterization import Gaussians, RasterSettings, Rendering, camera_positions


def rasterize_cuda(gaussians: Gaussians, viewmats: Tensor, Ks: Tensor, settings: RasterSettings) -> Rendering:
    """Render with gsplat; see `rasterize`, which has checked the arguments."""
    import gsplat

    means, quats, scales, opacities, features, features_rest = gaussians
    assert features_rest is not None
    if settings.sh_degree is None:
        colors = features.expand(len(viewmats), *features.shape)
    else:
        positions = camera_positions(viewmats)
        harmonics = torch.cat([features[:, None], features_rest], dim=1)
        colors = torch.stack([evaluate_sh(settings.sh_degree, means - position, harmonics) for position in positions])
    rendered, alpha, info = gsplat.rasterization(
        means=means,
        quats=quats,
        scales=scales,
        opacities=opacities,
        colors=colors,  # [B, N, C]; gsplat's own harmonics have three channels, + 0.5, and a clamp
        viewmats=viewmats,
        Ks=Ks,
        width=settings.width,
        height=settings.height,
        near_plane=settings.near_plane,
        far_plane=settings.far_plane,
        eps2d=settings.eps2d,
        sh_degree=None,
        packed=False,
        render_mode="RGB+ED" if settings.render_depth else "RGB",
        absgrad=settings.absgrad,
        rasterize_mode="antialiased" if settings.antialiased else "classic",
    )
    if not settings.render_depth:
        return Rendering(rendered, None, alpha, info)
    return Rendering(rendered[..., :-1], rendered[..., -1:], alpha, info)
