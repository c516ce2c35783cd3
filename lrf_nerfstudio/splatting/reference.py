"""A slow, dense rasterizer in plain PyTorch: every Gaussian at every pixel, any dtype, derivatives by autograd.

It follows the equations of 3D Gaussian splatting line by line and shares no code with the backends; the tests hold both
backends against it in float64, and the benchmark times it. Memory grows with Gaussians x pixels.
"""

import torch
from torch import Tensor

from lrf_nerfstudio.splatting.harmonics import evaluate_sh
from lrf_nerfstudio.splatting.rasterization import Gaussians, RasterSettings, camera_positions


def rotation_matrices(quats: Tensor) -> Tensor:
    """Return the rotation matrices [N, 3, 3] of quaternions [N, 4] (wxyz), which need not be normalized."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def covariance_matrices(quats: Tensor, scales: Tensor) -> Tensor:
    """Return the covariances R S S^T R^T [N, 3, 3] of quaternions [N, 4] (wxyz) and standard deviations [N, 3]."""
    factors = rotation_matrices(quats) * scales[:, None, :]
    return factors @ factors.transpose(-1, -2)


def project_reference(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    viewmat: Tensor,  # [4, 4]
    K: Tensor,  # [3, 3]
    settings: RasterSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Project into one camera by EWA splatting (Zwicker et al. 2002; 3DGS, section 4).

    Returns:
        means2d [N, 2] in pixels, covariances [N, 2, 2] with `eps2d` on the diagonal, depths [N], the opacity
        compensation [N] of antialiased rendering, and radii [N] in pixels (0: culled).
    """
    width, height = settings.width, settings.height
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    x, y, z = (means @ rotation.T + translation).unbind(-1)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    slope_x = (x / z).clamp(-(cx / fx + margin_x), (width - cx) / fx + margin_x)
    slope_y = (y / z).clamp(-(cy / fy + margin_y), (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * slope_x / z, zero, fy / z, -fy * slope_y / z], dim=-1).view(-1, 2, 3)
    covariances3d = rotation @ covariance_matrices(quats, scales) @ rotation.T
    sharp = jacobian @ covariances3d @ jacobian.transpose(-1, -2)
    covariances = sharp + settings.eps2d * torch.eye(2, dtype=means.dtype, device=means.device)
    determinants = torch.linalg.det(covariances)
    compensations = (torch.linalg.det(sharp) / determinants).clamp_min(0).sqrt()
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)

    half_trace = 0.5 * (covariances[:, 0, 0] + covariances[:, 1, 1])
    largest = half_trace + (half_trace**2 - determinants).clamp_min(0.01).sqrt()
    radii = (3 * largest.sqrt()).ceil()
    u, v = means2d.unbind(-1)
    seen = (z > settings.near_plane) & (z < settings.far_plane) & (determinants > 0)
    seen = seen & (u + radii > 0) & (u - radii < width) & (v + radii > 0) & (v - radii < height)
    return means2d, covariances, z, compensations, torch.where(seen, radii, 0).detach()


def blend_reference(
    means2d: Tensor,  # [N, 2]
    conics: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    channels: Tensor,  # [N, C]
    depths: Tensor,  # [N]
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    """Blend Gaussians that are all in view, front to back (3DGS, equation 3).

    A pixel takes a Gaussian when its alpha reaches 1/255, and stops before its transmittance would fall to 1e-4.

    Returns:
        Channels [H, W, C] and accumulated alpha [H, W].
    """
    order = torch.argsort(depths, stable=True)
    means2d, conics, opacities, channels = means2d[order], conics[order], opacities[order], channels[order]
    columns = torch.arange(width, dtype=means2d.dtype, device=means2d.device) + 0.5
    rows = torch.arange(height, dtype=means2d.dtype, device=means2d.device) + 0.5
    dx = columns[None, None, :] - means2d[:, 0, None, None]  # [N, 1, W]
    dy = rows[None, :, None] - means2d[:, 1, None, None]  # [N, H, 1]
    a, b, c = (conics[:, k, None, None] for k in range(3))
    sigmas = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy  # [N, H, W]
    alphas = (opacities[:, None, None] * torch.exp(-sigmas)).clamp_max(0.999)
    alphas = alphas * ((alphas >= 1 / 255) & (sigmas >= 0))
    transmittances = torch.cumprod(1 - alphas, dim=0)
    taken = transmittances > 1e-4
    before = torch.cat([torch.ones_like(transmittances[:1]), transmittances[:-1]])
    weights = alphas * before * taken
    return torch.einsum("nhw,nc->hwc", weights, channels), weights.sum(dim=0)


def rasterize_reference(
    gaussians: Gaussians, viewmats: Tensor, Ks: Tensor, settings: RasterSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the work of `rasterize` slowly: the same arguments, and features, depth and alpha as results."""
    means, quats, scales, opacities, features, features_rest = gaussians
    harmonics = features[:, None] if features_rest is None else torch.cat([features[:, None], features_rest], dim=1)
    images, depth_maps, alphas = [], [], []
    for viewmat, K, position in zip(viewmats, Ks, camera_positions(viewmats), strict=True):
        means2d, covariances, depths, compensations, radii = project_reference(
            means, quats, scales, viewmat, K, settings
        )
        channels = (
            features if settings.sh_degree is None else evaluate_sh(settings.sh_degree, means - position, harmonics)
        )
        seen = radii > 0
        inverses = torch.linalg.inv(covariances[seen])
        conics = torch.stack([inverses[:, 0, 0], inverses[:, 0, 1], inverses[:, 1, 1]], dim=-1)
        strengths = opacities * compensations if settings.antialiased else opacities
        blended, alpha = blend_reference(
            means2d[seen],
            conics,
            strengths[seen],
            torch.cat([channels, depths[:, None]], dim=-1)[seen],
            depths[seen],
            settings.width,
            settings.height,
        )
        images.append(blended[..., :-1])
        depth_maps.append(blended[..., -1:] / alpha[..., None].clamp_min(1e-10))
        alphas.append(alpha[..., None])
    return torch.stack(images), torch.stack(depth_maps), torch.stack(alphas)
