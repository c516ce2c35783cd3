"""One rasterizer for latents of any number of channels, on the CPU and on CUDA."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lrf_nerfstudio.splatting.harmonics import MAX_SH_DEGREE


class Gaussians(NamedTuple):
    """N Gaussians with C-channel features, float32 and on one device."""

    means: Tensor
    """Centers in the world [N, 3]."""
    quats: Tensor
    """Rotations [N, 4], wxyz, need not be normalized."""
    scales: Tensor
    """Standard deviations along the axes [N, 3], linear, in world units."""
    opacities: Tensor
    """[N], in [0, 1]."""
    features: Tensor
    """Field latents [N, C] or, where harmonics are used, their coefficients of degree 0."""
    features_rest: Tensor | None = None
    """Coefficients of degree 1 and above [N, K - 1, C], K >= (sh_degree + 1)^2; None: there are none."""


@dataclass(frozen=True)
class RasterSettings:
    """How `rasterize` renders: everything that is not a tensor."""

    width: int
    """Columns W of the rendered grid."""
    height: int
    """Rows H of the rendered grid."""
    sh_degree: int | None = None
    """Degree of the harmonics to use, 0 to 3; None: features are plain."""
    near_plane: float = 0.01
    """Gaussians with a smaller z in the camera are skipped."""
    far_plane: float = 1e10
    """Gaussians with a larger z in the camera are skipped."""
    eps2d: float = 0.3
    """Added to the diagonal of projected covariances, in square pixels of the grid."""
    render_depth: bool = True
    """Whether to render depth."""
    absgrad: bool = False
    """Whether the backward pass sets `info["means2d"].absgrad` [B, N, 2], the sum over pixels of absolute gradients
    (AbsGS, Ye et al. 2024)."""
    antialiased: bool = False
    """Whether opacities make up for `eps2d` (Mip-Splatting, Yu et al. 2024)."""


class Rendering(NamedTuple):
    """What `rasterize` returns."""

    features: Tensor
    """Field latents [B, H, W, C], not composited over a background."""
    depth: Tensor | None
    """Expected depth [B, H, W, 1], sum of w z over sum of w, 0 where nothing is; None unless `render_depth`."""
    alpha: Tensor
    """[B, H, W, 1], in [0, 1]."""
    info: dict[str, Any]
    """What densification reads, see `rasterize`."""


Backend = Literal["auto", "cpu", "cuda"]


def rasterize(
    gaussians: Gaussians,
    viewmats: Tensor,  # [B, 4, 4]
    Ks: Tensor,  # [B, 3, 3]
    settings: RasterSettings,
    backend: Backend = "auto",
) -> Rendering:
    """Render Gaussians into B pinhole cameras (3DGS, Kerbl et al. 2023).

    The conventions are gsplat's: pixel centers at .5, `eps2d` square pixels added to every projected covariance,
    Gaussians blended nearest first, alpha at most 0.999 and skipped below 1/255, a pixel closed before its
    transmittance falls to 1e-4, culling by a radius of three standard deviations. Features are neither shifted nor
    clamped, since latents are unbounded. Gradients flow to every tensor but `Ks`.

    On the CPU a Gaussian is evaluated wherever its alpha reaches 1/255 (gsplat leaves out the tiles that its
    three-sigma square does not touch), and Gaussians with NaN or inf in any number are invisible. Results are the same,
    bit for bit, at every run and with any number of threads.

    Args:
        gaussians: What to render.
        viewmats: World to camera, OpenCV axes (x right, y down, z forward) [B, 4, 4]. Rotations must be orthonormal.
        Ks: Intrinsics in pixels of the rendered grid [B, 3, 3]; skew is ignored.
        settings: How to render it.
        backend: "cpu", "cuda" or, by the device of the means, "auto".

    Returns:
        The rendering. Its `info` holds `width`, `height`, `n_cameras` and, for each camera and Gaussian, `radii` [B, N]
        (int32, pixels, 0: not visible), `means2d` [B, N, 2] (call `retain_grad()` on it before the backward pass),
        `depths` [B, N], `conics` [B, N, 3] and `opacities` [B, N].

    Raises:
        AssertionError: A tensor has the wrong shape, dtype (not float32) or device; the message shows it.

    Example:
        >>> gaussians = Gaussians(
        ...     means=torch.tensor([[0.0, 0.0, 2.0]]),
        ...     quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        ...     scales=torch.full((1, 3), 0.5),
        ...     opacities=torch.tensor([0.8]),
        ...     features=torch.tensor([[1.0, -2.0, 0.5, 3.0]]),
        ... )
        >>> K = torch.tensor([[[8.0, 0.0, 4.5], [0.0, 8.0, 4.5], [0.0, 0.0, 1.0]]])
        >>> rendering = rasterize(gaussians, torch.eye(4)[None], K, RasterSettings(width=9, height=9))
        >>> rendering.features.shape
        torch.Size([1, 9, 9, 4])
        >>> rendering.features[0, 4, 4]
        tensor([ 0.8000, -1.6000,  0.4000,  2.4000])
    """
    gaussians = _checked(gaussians, viewmats, Ks, settings)
    device = gaussians.means.device.type
    assert backend in ("auto", "cpu", "cuda"), f'backend must be "auto", "cpu" or "cuda", not {backend!r}'
    assert backend in ("auto", device), f"backend {backend!r} cannot take tensors on {gaussians.means.device}"
    # Either backend brings heavy modules, so it is imported when it is used.
    if device == "cuda":
        from lrf_nerfstudio.splatting.cuda import rasterize_cuda

        return rasterize_cuda(gaussians, viewmats, Ks, settings)
    from lrf_nerfstudio.splatting.cpu.autograd import rasterize_cpu

    return rasterize_cpu(gaussians, viewmats, Ks, settings)


def prepare_backend(device: str | torch.device) -> None:
    """Import the device's backend and compile what a render needs, in the thread that calls this.

    A viewer stops its render thread with an exception wherever it is when the camera moves. Inside of an import that
    leaves modules behind which nothing can import again.

    Raises:
        UserError: gsplat has no CUDA code, see `check_gsplat`.
    """
    if torch.device(device).type == "cuda":
        from lrf_nerfstudio.splatting.cuda import check_gsplat

        return check_gsplat()
    gaussians = Gaussians(
        means=torch.tensor([[0.0, 0.0, 1.0]]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        scales=torch.ones(1, 3),
        opacities=torch.ones(1),
        features=torch.ones(1, 4),
    )
    rasterize(gaussians, torch.eye(4)[None], torch.eye(3)[None], RasterSettings(width=1, height=1))


def camera_positions(viewmats: Tensor) -> Tensor:
    """Return the positions -R^T t [B, 3] of cameras in the world, given [R | t] in `viewmats` [B, 4, 4].

    Written without a matrix product, which mixed precision would round to half.
    """
    return -(viewmats[:, :3, :3] * viewmats[:, :3, 3:]).sum(dim=1)


def _checked(gaussians: Gaussians, viewmats: Tensor, Ks: Tensor, settings: RasterSettings) -> Gaussians:
    """Check shapes, dtypes and devices, and fill in `features_rest`."""
    means, quats, scales, opacities, features, features_rest = gaussians
    n, n_cameras, degree = len(means), len(viewmats), settings.sh_degree
    assert means.shape == (n, 3), f"means must be [N, 3]: {tuple(means.shape)}"
    assert quats.shape == (n, 4), f"quats must be [N, 4] with N = {n}: {tuple(quats.shape)}"
    assert scales.shape == (n, 3), f"scales must be [N, 3] with N = {n}: {tuple(scales.shape)}"
    assert opacities.shape == (n,), f"opacities must be [N] with N = {n}: {tuple(opacities.shape)}"
    assert features.ndim == 2 and len(features) == n, f"features must be [N, C] with N = {n}: {tuple(features.shape)}"
    channels = features.shape[1]
    assert channels > 0, f"features must have at least one channel: {tuple(features.shape)}"
    if features_rest is None:
        features_rest = features.new_empty(n, 0, channels)
    assert features_rest.ndim == 3 and features_rest.shape[::2] == (n, channels), (
        f"features_rest must be [N, K - 1, C] with N = {n} and C = {channels}: {tuple(features_rest.shape)}"
    )
    assert degree is None or 0 <= degree <= MAX_SH_DEGREE, f"sh_degree must be 0 to {MAX_SH_DEGREE}, not {degree}"
    n_bases = 1 if degree is None else (degree + 1) ** 2
    assert features_rest.shape[1] >= n_bases - 1, (
        f"features_rest must be [N, K - 1, C] with K >= {n_bases}: {tuple(features_rest.shape)}"
    )
    assert viewmats.shape == (n_cameras, 4, 4), f"viewmats must be [B, 4, 4]: {tuple(viewmats.shape)}"
    assert Ks.shape == (n_cameras, 3, 3), f"Ks must be [B, 3, 3] with B = {n_cameras}: {tuple(Ks.shape)}"
    assert settings.width > 0 and settings.height > 0, (
        f"width and height must be positive: {settings.width} x {settings.height}"
    )
    gaussians = gaussians._replace(features_rest=features_rest)
    for name, tensor in {**gaussians._asdict(), "viewmats": viewmats, "Ks": Ks}.items():
        assert tensor.dtype == torch.float32, f"{name} must be float32: {tensor.dtype}"
        assert tensor.device == means.device, f"{name} must be on the device of means, {means.device}: {tensor.device}"
    return gaussians
