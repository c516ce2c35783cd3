"""One rasterizer for latents of any number of channels, on the CPU and on CUDA."""

import functools
import importlib.metadata
from typing import Any, Literal

import torch
from torch import Tensor

from lrf_nerfstudio.splatting.harmonics import MAX_SH_DEGREE, evaluate_sh
from lrf_nerfstudio.splatting.settings import RasterSettings

Backend = Literal["auto", "cpu", "cuda"]
Rendering = tuple[Tensor, Tensor | None, Tensor, dict[str, Any]]


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    features: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    features_rest: Tensor | None = None,
    sh_degree: int | None = None,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    radius_clip: float = 0.0,
    backgrounds: Tensor | None = None,
    render_depth: bool = True,
    absgrad: bool = False,
    antialiased: bool = False,
    backend: Backend = "auto",
) -> Rendering:
    """Renders N Gaussians with C-channel features into B pinhole cameras (3DGS, Kerbl et al. 2023).

    The conventions are gsplat's: pixel centres at .5, `eps2d` square pixels added to every projected covariance,
    Gaussians blended nearest first, alpha at most 0.999 and skipped below 1/255, a pixel closed before its
    transmittance falls to 1e-4, culling by a radius of three standard deviations. Gradients flow to every tensor
    argument but `Ks`.

    On the CPU a Gaussian is evaluated wherever its alpha reaches 1/255 (gsplat leaves out the tiles that its
    three-sigma square does not touch), and Gaussians with NaN or inf in any number are invisible. Results are the same,
    bit for bit, at every run and with any number of threads.

    Args:
        means: Centres in the world [N, 3].
        quats: Rotations [N, 4], wxyz, need not be normalised.
        scales: Standard deviations along the axes [N, 3], linear.
        opacities: [N], in [0, 1].
        features: Field latents [N, C] or, with `sh_degree`, their spherical harmonic coefficients of degree 0.
        viewmats: World to camera, OpenCV axes (x right, y down, z forward) [B, 4, 4].
        Ks: Intrinsics in pixels of the rendered grid [B, 3, 3]; skew is ignored.
        width: Columns W of the grid.
        height: Rows H of the grid.
        features_rest: Coefficients of degree 1 and above [N, K - 1, C], apart from the others as they are learned.
        sh_degree: Degree 0-3 of the harmonics that are used, K >= (sh_degree + 1)^2; None: plain features. The result
            is not shifted or clamped, since latents are unbounded.
        near_plane: Gaussians with a smaller z in the camera are skipped.
        far_plane: And those with a larger one.
        eps2d: Added to the diagonal of projected covariances, square pixels.
        radius_clip: Gaussians whose radius in pixels is not larger are skipped.
        backgrounds: Field latents behind the Gaussians [B, C]; None: zeros.
        render_depth: Whether to render depth.
        absgrad: Whether the backward pass sets `info["means2d"].absgrad` [B, N, 2], the sum over pixels of the absolute
            gradients (AbsGS, Ye et al. 2024).
        antialiased: Whether opacities make up for `eps2d` (Mip-Splatting, Yu et al. 2024).
        backend: "cpu", "cuda" or, by the device of `means`, "auto".

    Returns:
        - features [B, H, W, C] (field latent space),
        - expected depth [B, H, W, 1], sum of w z over sum of w, or None,
        - alpha [B, H, W, 1] in [0, 1],
        - info, what gsplat's strategies read: `width`, `height`, `n_cameras`, `radii`, `means2d` (call `retain_grad()`
          on it before the backward pass), `gaussian_ids` (None), `depths`, `conics`, `opacities`, all per camera and
          Gaussian. `radii` has the shape that the installed gsplat uses: [B, N] up to 1.4, [B, N, 2] from 1.5 on.

    Raises:
        AssertionError: A tensor has the wrong shape, dtype (not float32) or device; the message shows it.
    """
    n, n_cameras = len(means), len(viewmats)
    assert means.shape == (n, 3), f"means must be [N, 3]: {tuple(means.shape)}"
    assert quats.shape == (n, 4), f"quats must be [N, 4] with N = {n}: {tuple(quats.shape)}"
    assert scales.shape == (n, 3), f"scales must be [N, 3] with N = {n}: {tuple(scales.shape)}"
    assert opacities.shape == (n,), f"opacities must be [N] with N = {n}: {tuple(opacities.shape)}"
    assert viewmats.shape == (n_cameras, 4, 4), f"viewmats must be [B, 4, 4]: {tuple(viewmats.shape)}"
    assert Ks.shape == (n_cameras, 3, 3), f"Ks must be [B, 3, 3] with B = {n_cameras}: {tuple(Ks.shape)}"
    assert width > 0 and height > 0, f"width and height must be positive: {width} x {height}"
    assert features.ndim == 2 and len(features) == n, f"features must be [N, C] with N = {n}: {tuple(features.shape)}"
    channels = features.shape[1]
    assert channels > 0, f"features must have at least one channel: {tuple(features.shape)}"
    if features_rest is None:
        features_rest = features.new_empty(n, 0, channels)
    n_bases = 1
    if sh_degree is not None:
        assert 0 <= sh_degree <= MAX_SH_DEGREE, f"sh_degree must be 0 to {MAX_SH_DEGREE}, not {sh_degree}"
        n_bases = (sh_degree + 1) ** 2
    assert features_rest.ndim == 3 and features_rest.shape[::2] == (n, channels), (
        f"features_rest must be [N, K - 1, C] with N = {n} and C = {channels}: {tuple(features_rest.shape)}"
    )
    assert features_rest.shape[1] >= n_bases - 1, (
        f"features_rest must be [N, K - 1, C] with K >= {n_bases}: {tuple(features_rest.shape)}"
    )
    if backgrounds is not None:
        assert backgrounds.shape == (n_cameras, channels), (
            f"backgrounds must be [B, C] = [{n_cameras}, {channels}]: {tuple(backgrounds.shape)}"
        )
    tensors = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "features": features}
    tensors |= {"features_rest": features_rest}
    tensors |= {"viewmats": viewmats, "Ks": Ks} | ({} if backgrounds is None else {"backgrounds": backgrounds})
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, f"{name} must be float32: {tensor.dtype}"
        assert tensor.device == means.device, f"{name} must be on the device of means, {means.device}: {tensor.device}"
    assert backend in ("auto", "cpu", "cuda"), f'backend must be "auto", "cpu" or "cuda", not {backend!r}'
    if backend == "auto":
        backend = "cuda" if means.is_cuda else "cpu"
    assert means.device.type == backend, f"backend {backend!r} cannot take tensors on {means.device}"

    function = _rasterize_cuda if backend == "cuda" else _rasterize_cpu
    settings = RasterSettings(
        int(width),
        int(height),
        sh_degree,
        near_plane,
        far_plane,
        eps2d,
        radius_clip,
        render_depth,
        absgrad,
        antialiased,
    )
    return function(means, quats, scales, opacities, features, features_rest, viewmats, Ks, backgrounds, settings)


@functools.cache
def _gsplat_has_scalar_radii() -> bool:
    """Whether the installed gsplat's strategies expect one radius per Gaussian; since 1.5 they expect one per axis."""
    major, minor = importlib.metadata.version("gsplat").split(".")[:2]
    return (int(major), int(minor)) < (1, 5)


def _rasterize_cpu(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    features: Tensor,
    features_rest: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    backgrounds: Tensor | None,
    settings: RasterSettings,
) -> Rendering:
    from lrf_nerfstudio.splatting.cpu.autograd import Blend, Project

    n_cameras, n = len(viewmats), len(means)
    positions = torch.inverse(viewmats)[:, :3, 3]
    radii, means2d, depths, conics, compensations, colors = Project.apply(
        means, quats, scales, opacities, features, features_rest, viewmats, positions, Ks, settings
    )
    opacities = opacities.expand(n_cameras, n)
    if settings.antialiased:
        opacities = opacities * compensations
    if settings.sh_degree is None:
        colors = features.expand(n_cameras, *features.shape)
    image, depth, alpha = Blend.apply(means2d, conics, opacities, colors, depths, backgrounds, radii, settings)
    info = {
        "width": settings.width,
        "height": settings.height,
        "n_cameras": n_cameras,
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": radii if _gsplat_has_scalar_radii() else radii[..., None].expand(n_cameras, n, 2),
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opacities,
    }
    return image, depth if settings.render_depth else None, alpha, info


def _rasterize_cuda(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    features: Tensor,
    features_rest: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    backgrounds: Tensor | None,
    settings: RasterSettings,
) -> Rendering:
    from gsplat import rasterization

    if settings.sh_degree is None:
        colors = features.expand(len(viewmats), *features.shape)
    else:
        positions = torch.inverse(viewmats)[:, :3, 3]
        harmonics = torch.cat([features[:, None], features_rest], dim=1)
        colors = torch.stack([evaluate_sh(settings.sh_degree, means - position, harmonics) for position in positions])
    rendered, alpha, info = rasterization(
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
        radius_clip=settings.radius_clip,
        eps2d=settings.eps2d,
        sh_degree=None,
        packed=False,
        backgrounds=backgrounds,
        render_mode="RGB+ED" if settings.render_depth else "RGB",
        absgrad=settings.absgrad,
        rasterize_mode="antialiased" if settings.antialiased else "classic",
    )
    if not settings.render_depth:
        return rendered, None, alpha, info
    return rendered[..., :-1], rendered[..., -1:], alpha, info
