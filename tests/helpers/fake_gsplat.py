"""gsplat's CUDA code in PyTorch, for machines without a GPU.

gsplat's Python code stays as it is and makes its own checks; the functions of its compiled module `_C` are replaced by
those of `CudaCode`, which take the same arguments, refuse what gsplat's refuse and return the same numbers. So the
backend for CUDA runs

- inside `fake_cuda()`, where devices, shapes, dtypes, layouts and read-backs are checked and nothing is computed;
- with `fake_gsplat.device = "cpu"` on tensors of the CPU, slowly, with gsplat's numbers.

Use the fixture of the same name, which conftest.py makes known to all tests:

    def test_a_step_on_cuda(fake_gsplat):
        with fake_cuda() as gpu:
            ...  # make models and trainers with device="cuda"; anything that calls `rasterize`
            with gpu.no_waiting():
                model.train_step()
        assert fake_gsplat.calls["rasterize_to_pixels_fwd"] == 1

What comes back is that of gsplat 1.4 with `packed=False`: `info` holds radii [B, N] int32, means2d [B, N, 2], depths,
conics, opacities, tiles_per_gauss, width, height, tile_size, n_cameras, and None as gaussian_ids and camera_ids. NaN
stands for what gsplat leaves uninitialized: means2d, depths and conics of Gaussians out of view.

gsplat itself reads back one number at each call (how many pairs of Gaussian and tile there are), which nobody who calls
it can avoid; it is not counted here.
"""

import functools
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor

WARP = 32
CHANNELS = {1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513}
"""Numbers of channels for which gsplat 1.4 has kernels; its Python code pads to one of them."""


class CameraModelType(Enum):
    """As in gsplat's compiled module."""

    PINHOLE = 0


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Count the calls of a function and, as compiled code does, ignore autocast."""

    @functools.wraps(function)
    def call(code: "CudaCode", *args: Any) -> Any:
        code.calls[function.__name__] += 1
        with torch.autocast("cuda", enabled=False):
            return function(code, *args)

    return call


class CudaCode:
    """The functions of gsplat's `_C` that `gsplat.rasterization` and `gsplat.spherical_harmonics` call."""

    CameraModelType = CameraModelType
    PINHOLE = CameraModelType.PINHOLE  # pybind11 exports the members too, and gsplat looks them up here

    def __init__(self) -> None:
        self.device = "cuda"
        """Where tensors must be."""
        self.calls: Counter[str] = Counter()
        """How often each function was called."""

    @_compiled
    def compute_sh_fwd(self, degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None) -> Tensor:
        self._check(dirs, coeffs)
        return _harmonics(degree, dirs, coeffs, masks)

    @_compiled
    def compute_sh_bwd(
        self,
        n_bases: int,
        degree: int,
        dirs: Tensor,
        coeffs: Tensor,
        masks: Tensor | None,
        v_colors: Tensor,
        compute_v_dirs: bool,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(dirs, coeffs, v_colors)
        assert n_bases == coeffs.shape[-2] and v_colors.shape == dirs.shape
        v_dirs, v_coeffs = _gradients(
            lambda dirs, coeffs: (_harmonics(degree, dirs, coeffs, masks),), (dirs, coeffs), (v_colors,)
        )
        return v_coeffs, v_dirs if compute_v_dirs else None

    @_compiled
    def fully_fused_projection_fwd(
        self,
        means: Tensor,
        covars: None,
        quats: Tensor,
        scales: Tensor,
        viewmats: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        eps2d: float,
        near_plane: float,
        far_plane: float,
        radius_clip: float,
        calc_compensations: bool,
        camera_model: CameraModelType,
    ) -> tuple[Tensor, ...]:
        self._check(means, quats, scales, viewmats, Ks)
        assert covars is None and radius_clip == 0 and camera_model is CameraModelType.PINHOLE
        project = _projection(Ks, width, height, eps2d, near_plane, far_plane)
        radii, means2d, depths, conics, compensations = project(means, quats, scales, viewmats)
        seen = radii > 0
        return (
            radii,
            torch.where(seen[..., None], means2d, torch.nan),
            torch.where(seen, depths, torch.nan),
            torch.where(seen[..., None], conics, torch.nan),
            torch.where(seen, compensations, 0.0),
        )

    @_compiled
    def fully_fused_projection_bwd(
        self,
        means: Tensor,
        covars: None,
        quats: Tensor,
        scales: Tensor,
        viewmats: Tensor,
        Ks: Tensor,
        width: int,
        height: int,
        eps2d: float,
        camera_model: CameraModelType,
        radii: Tensor,
        conics: Tensor,
        compensations: Tensor | None,
        v_means2d: Tensor,
        v_depths: Tensor,
        v_conics: Tensor,
        v_compensations: Tensor | None,
        viewmats_requires_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        incoming = [v_means2d, v_depths, v_conics] + ([] if v_compensations is None else [v_compensations])
        assert (compensations is None) == (v_compensations is None)
        self._check(means, quats, scales, viewmats, Ks, conics, *incoming)
        self._check(radii, dtype=torch.int32)
        seen = radii > 0
        incoming = [torch.where(seen.view(*seen.shape, *[1] * (v.ndim - 2)), v, 0.0) for v in incoming]
        project = _projection(Ks, width, height, eps2d)
        v_means, v_quats, v_scales, v_viewmats = _gradients(
            lambda *leaves: project(*leaves)[1 : 1 + len(incoming)], (means, quats, scales, viewmats), incoming
        )
        return v_means, None, v_quats, v_scales, v_viewmats if viewmats_requires_grad else None

    @_compiled
    def isect_tiles(
        self,
        means2d: Tensor,
        radii: Tensor,
        depths: Tensor,
        camera_ids: None,
        gaussian_ids: None,
        n_cameras: int,
        tile_size: int,
        tile_width: int,
        tile_height: int,
        sort: bool,
        double_buffer: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Puts all Gaussians into one tile of the whole image, in order of depth; those out of view have number -1."""
        self._check(means2d, depths)
        self._check(radii, dtype=torch.int32)
        assert camera_ids is None and gaussian_ids is None and sort and double_buffer
        assert means2d.shape == (*radii.shape, 2) and depths.shape == radii.shape and len(radii) == n_cameras
        seen = radii > 0
        order = torch.where(seen, depths, torch.inf).argsort(dim=1, stable=True)
        first = torch.arange(n_cameras, device=radii.device)[:, None] * radii.shape[1]
        flatten_ids = torch.where(seen.gather(1, order), order + first, -1).int().flatten()
        return seen.int() * tile_width * tile_height, flatten_ids.long(), flatten_ids

    @_compiled
    def isect_offset_encode(self, isect_ids: Tensor, n_cameras: int, tile_width: int, tile_height: int) -> Tensor:
        self._check(isect_ids, dtype=torch.int64)
        return torch.zeros(n_cameras, tile_height, tile_width, dtype=torch.int32, device=isect_ids.device)

    @_compiled
    def rasterize_to_pixels_fwd(
        self,
        means2d: Tensor,
        conics: Tensor,
        colors: Tensor,
        opacities: Tensor,
        backgrounds: None,
        masks: None,
        width: int,
        height: int,
        tile_size: int,
        isect_offsets: Tensor,
        flatten_ids: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(means2d, conics, colors, opacities)
        self._check(isect_offsets, flatten_ids, dtype=torch.int32)
        assert backgrounds is None and masks is None
        assert colors.shape[-1] in CHANNELS, f"gsplat has no kernel for {colors.shape[-1]} channels"
        # A block of threads renders a tile, and the backward pass adds up over the warps that it consists of.
        assert tile_size * tile_size % WARP == 0, f"tiles of {tile_size} x {tile_size} pixels are no whole warps"
        blend = _blending(flatten_ids, width, height)
        image, alpha = blend(means2d, conics, colors, opacities)
        return image, alpha, torch.zeros(alpha.shape[:3], dtype=torch.int32, device=alpha.device)

    @_compiled
    def rasterize_to_pixels_bwd(
        self,
        means2d: Tensor,
        conics: Tensor,
        colors: Tensor,
        opacities: Tensor,
        backgrounds: None,
        masks: None,
        width: int,
        height: int,
        tile_size: int,
        isect_offsets: Tensor,
        flatten_ids: Tensor,
        render_alphas: Tensor,
        last_ids: Tensor,
        v_image: Tensor,
        v_alpha: Tensor,
        absgrad: bool,
    ) -> tuple[Tensor | None, ...]:
        self._check(means2d, conics, colors, opacities, render_alphas, v_image, v_alpha)
        self._check(isect_offsets, flatten_ids, last_ids, dtype=torch.int32)
        blend = _blending(flatten_ids, width, height)
        blended = _gradients(blend, (means2d, conics, colors, opacities), (v_image, v_alpha))
        v_absolute = None
        if absgrad:
            # Absolute values are taken before the sum over pixels, so every pixel gets means of its own.
            per_pixel = means2d[:, :, None, None, :].expand(-1, -1, height, width, -1)
            v_per_pixel, *_ = _gradients(blend, (per_pixel, conics, colors, opacities), (v_image, v_alpha))
            v_absolute = v_per_pixel.abs().sum(dim=(2, 3))
        return v_absolute, *blended

    def _check(self, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> None:
        for tensor in tensors:
            assert tensor.device.type == self.device, f"gsplat gets a tensor on {tensor.device}"
            assert tensor.dtype == dtype, f"gsplat gets {tensor.dtype} where it reads {dtype}"
            assert tensor.is_contiguous(), f"gsplat gets a tensor that is not contiguous: {tensor.stride()}"


def _gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs of a function from those of its outputs."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*leaves)
        found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient.detach().contiguous()
        for leaf, gradient in zip(leaves, found, strict=True)
    ]


def _harmonics(degree: int, dirs: Tensor, coeffs: Tensor, masks: Tensor | None) -> Tensor:
    from gsplat.cuda._torch_impl import _spherical_harmonics

    assert masks is None
    return _spherical_harmonics(degree, dirs, coeffs)


def _projection(
    Ks: Tensor, width: int, height: int, eps2d: float, near_plane: float = 0.0, far_plane: float = 1e30
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of means, quats, scales, viewmats: radii, means2d, depths, conics, compensations."""
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    def project(means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor) -> tuple[Tensor, ...]:
        covars, _ = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)
        return _fully_fused_projection(
            means, covars, viewmats, Ks, width, height, eps2d, near_plane, far_plane, calc_compensations=True
        )

    return project


def _blending(flatten_ids: Tensor, width: int, height: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of means2d ([B, N, 2], or for every pixel [B, N, H, W, 2]), conics, colors, and opacities.

    It returns the image [B, H, W, C] and alpha [B, H, W, 1].
    """

    def blend(means2d: Tensor, conics: Tensor, colors: Tensor, opacities: Tensor) -> tuple[Tensor, Tensor]:
        n_cameras, n = opacities.shape
        device = flatten_ids.device
        ids = flatten_ids.view(n_cameras, n).long()
        seen = (ids >= 0)[..., None, None]
        order = (ids - torch.arange(n_cameras, device=device)[:, None] * n).clamp_min(0)
        cameras = torch.arange(n_cameras, device=device)[:, None]

        def in_order(tensor: Tensor) -> Tensor:
            chosen = tensor[cameras, order]
            return torch.where(seen.view(*seen.shape[:2], *[1] * (chosen.ndim - 2)), chosen, 0.0)

        centers, conics, colors, opacities = map(in_order, (means2d, conics, colors, opacities))
        if centers.ndim == 3:
            centers = centers[:, :, None, None, :]
        x = torch.arange(width, device=device) + 0.5
        y = torch.arange(height, device=device)[:, None] + 0.5
        dx, dy = centers[..., 0] - x, centers[..., 1] - y
        a, b, c = (conics[..., k, None, None] for k in range(3))
        sigmas = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alphas = (opacities[..., None, None] * torch.exp(-sigmas)).clamp_max(0.999)
        alphas = torch.where(seen & (sigmas >= 0) & (alphas >= 1 / 255), alphas, 0.0)
        after = torch.cumprod(1 - alphas, dim=1)
        before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
        weights = alphas * before * (after > 1e-4)
        image = torch.einsum("bnhw,bnc->bhwc", weights, colors)
        return image, weights.sum(dim=1)[..., None]

    return blend


@pytest.fixture
def fake_gsplat(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaCode]:
    """The package gsplat with `CudaCode` in place of its compiled module."""
    import gsplat.cuda

    from lrf_nerfstudio.splatting import cuda

    code = CudaCode()
    backend: Any = types.ModuleType("gsplat.cuda._backend")
    backend._C = code
    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", backend)
    monkeypatch.setattr(gsplat.cuda, "_backend", backend, raising=False)
    cuda._gsplat_problem.cache_clear()
    yield code
    cuda._gsplat_problem.cache_clear()
