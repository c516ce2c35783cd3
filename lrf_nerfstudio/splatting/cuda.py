"""The CUDA backend: gsplat 1.4, with harmonics of any number of channels."""

import functools
import math

import torch
from torch import Tensor

from lrf_nerfstudio.splatting.rasterization import Gaussians, RasterSettings, Rendering, camera_positions
from lrf_nerfstudio.utils.errors import UserError

_ENOUGH_TILES = 256
"""Thread blocks that keep a GPU busy: about two for each multiprocessor of the largest ones."""


def rasterize_cuda(gaussians: Gaussians, viewmats: Tensor, Ks: Tensor, settings: RasterSettings) -> Rendering:
    """Render with gsplat; see `rasterize`, which has checked the arguments.

    Raises:
        UserError: gsplat has no CUDA code, see `check_gsplat`.
    """
    check_gsplat()
    import gsplat

    means, quats, scales, opacities, features, features_rest = gaussians
    if settings.sh_degree is not None:
        assert features_rest is not None
        used = features_rest[:, : (settings.sh_degree + 1) ** 2 - 1]
        coeffs = torch.cat([features[:, None], used], dim=1)
        directions = [means - position for position in camera_positions(viewmats)]
        features = torch.stack([evaluate_sh_cuda(settings.sh_degree, toward, coeffs) for toward in directions])
    rendered, alpha, info = gsplat.rasterization(
        means=means,
        quats=quats,
        scales=scales,
        opacities=opacities,
        colors=features,  # [N, C] or [B, N, C]; with coefficients gsplat would add 0.5 and clamp
        viewmats=viewmats,
        Ks=Ks,
        width=settings.width,
        height=settings.height,
        near_plane=settings.near_plane,
        far_plane=settings.far_plane,
        eps2d=settings.eps2d,
        packed=False,
        tile_size=tile_size(len(viewmats), settings.width, settings.height),
        render_mode="RGB+ED" if settings.render_depth else "RGB",
        absgrad=settings.absgrad,
        rasterize_mode="antialiased" if settings.antialiased else "classic",
    )
    if not settings.render_depth:
        return Rendering(rendered, None, alpha, info)
    return Rendering(rendered[..., :-1], rendered[..., -1:], alpha, info)


def evaluate_sh_cuda(degree: int, directions: Tensor, coeffs: Tensor) -> Tensor:
    """`evaluate_sh` in gsplat's kernel, which takes three channels at a time: channels are padded with zeros.

    Args:
        degree: 0 to 3.
        directions: Viewing directions [N, 3], camera to Gaussian; need not be normalized.
        coeffs: [N, K, C] with K >= (degree + 1)^2; the rest is ignored.

    Returns:
        Features [N, C].
    """
    import gsplat

    n, n_bases, channels = coeffs.shape
    groups = math.ceil(channels / 3)
    padded = torch.nn.functional.pad(coeffs, (0, 3 * groups - channels))
    by_group = padded.view(n, n_bases, groups, 3).transpose(1, 2)  # [N, G, K, 3]
    directions = directions[:, None].expand(n, groups, 3)
    return gsplat.spherical_harmonics(degree, directions, by_group).reshape(n, 3 * groups)[:, :channels]


def tile_size(n_cameras: int, width: int, height: int) -> int:
    """Return the edge in pixels of gsplat's tiles, each of which one block of threads renders: 16, or 8 on small grids.

    16 is gsplat's default, but cuts a latent grid of 64 x 64 into 16 blocks, which leaves most of a GPU idle; 8 gives
    four times as many. Smaller ones are not possible: gsplat's backward pass adds up over whole warps of 32 threads.
    """
    tiles = n_cameras * math.ceil(width / 16) * math.ceil(height / 16)
    return 16 if tiles >= _ENOUGH_TILES else 8


def check_gsplat() -> None:
    """Check that gsplat can render on CUDA; costs nothing after the first call.

    The first call may take minutes: gsplat compiles its CUDA code when that is first needed on a machine.

    Raises:
        UserError: There is no CUDA code and no compiler for it, or it does not compile; the message says what to do.
    """
    problem = _gsplat_problem()
    if problem is not None:
        raise UserError(problem)


@functools.cache
def _gsplat_problem() -> str | None:
    remedy = (
        f"Install the CUDA toolkit of the version that PyTorch was built for ({torch.version.cuda}), with nvcc on the "
        "PATH; or a prebuilt wheel of gsplat 1.4 for your Python and PyTorch (https://docs.gsplat.studio/whl); or run "
        "on the CPU (ns-train: `--machine.device-type cpu`)."
    )
    try:
        from gsplat.cuda import _backend
    except Exception as error:  # of the compiler, of loading what it made, ...
        reason = str(error).strip().splitlines()
        return (
            f"gsplat cannot compile or load its CUDA code ({reason[0] if reason else type(error).__name__}). {remedy}"
        )
    if _backend._C is None:
        return f"gsplat has no CUDA code: it compiles it at first use and found no compiler (nvcc). {remedy}"
    return None
