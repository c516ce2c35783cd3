"""Properties of the CPU rasterizer in scenes that hypothesis makes up: what the dense reference says, and no harm."""

import math
from dataclasses import dataclass

import torch
from gaussian_scenes import look_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize
from lrf_nerfstudio.splatting.reference import project_reference, rasterize_reference

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
MOST_ELONGATED = 1e5
"""Ratio of a projected Gaussian's variances beyond which float32 does not give its gradients."""
NAMES = ("means", "quats", "scales", "opacities", "features", "features_rest")


@dataclass
class AnyScene:
    """Float32 tensors by the names of `Gaussians`, cameras, and settings."""

    tensors: dict[str, Tensor]
    viewmats: Tensor
    Ks: Tensor
    settings: RasterSettings

    def gaussians(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in self.tensors.items()}

    def only(self, kept: Tensor) -> "AnyScene":
        tensors = {name: tensor[kept] for name, tensor in self.tensors.items()}
        return AnyScene(tensors, self.viewmats, self.Ks, self.settings)


@st.composite
def scenes(draw: st.DrawFn) -> AnyScene:
    """Draw a scene: none to many Gaussians, needles, discs, points, giants, some behind the camera; any grid."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, channels = draw(st.one_of(st.integers(0, 3), st.integers(4, 80))), draw(st.integers(1, 19))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    cameras, degree = draw(st.integers(1, 2)), draw(st.sampled_from([None, 0, 1, 3]))
    spread = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0]))  # with 4, many are behind the camera, which is 3 away
    size = draw(st.sampled_from([1e-6, 1e-3, 0.05, 0.3, 3.0, 50.0]))
    ratio = draw(st.sampled_from([0.0, 0.5, 2.0]))  # of the axes, as the deviation of its logarithm

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bases = 0 if degree is None else (degree + 1) ** 2 - 1
    tensors = {
        "means": spread * normal(n, 3),
        "quats": normal(n, 4),
        "scales": size * torch.exp(ratio * normal(n, 3)),
        "opacities": torch.rand(n, generator=generator) ** draw(st.sampled_from([0.1, 1.0, 3.0])),
        "features": normal(n, channels),
        "features_rest": normal(n, bases, channels),
    }
    if draw(st.booleans()):  # flat in one direction, or in all
        tensors["scales"][:, : draw(st.sampled_from([1, 3]))] = 0.0
    if n > 1 and draw(st.booleans()):  # the same place twice: the order is that of the numbers
        tensors["means"][1] = tensors["means"][0]
    focal = draw(st.sampled_from([0.3, 1.0, 4.0])) * max(width, height)
    K = torch.tensor([[focal, 0, 0.45 * width], [0, 1.1 * focal, 0.56 * height], [0, 0, 1]])
    angles = [0.4 + 0.9 * index for index in range(cameras)]
    viewmats = torch.stack([look_at((3 * math.sin(a), -0.7, -3 * math.cos(a))).float() for a in angles])
    options = RasterSettings(
        width,
        height,
        sh_degree=degree,
        eps2d=draw(st.sampled_from([0.05, 0.1, 0.3])),
        antialiased=draw(st.booleans()),
    )
    return AnyScene(tensors, viewmats, K.repeat(cameras, 1, 1), options)


def decided(scene: AnyScene) -> tuple[AnyScene, Tensor]:
    """Leave out what rounding decides: needles, Gaussians at the border of culling, alphas at a threshold.

    Returns:
        The scene without such Gaussians, and a mask [B, H, W] of the other pixels.
    """
    kept = torch.ones(len(scene.tensors["means"]), dtype=torch.bool)
    projected = []
    for viewmat, K in zip(scene.viewmats.double(), scene.Ks.double(), strict=True):
        means, quats, scales = (scene.tensors[name].double() for name in ("means", "quats", "scales"))
        means2d, covariances, depths, compensations, radii = project_reference(
            means, quats, scales, viewmat, K, scene.settings
        )
        projected.append((means2d, covariances, depths, compensations, radii))
        # The radius is rounded up; a pixel more or less of it decides at the border of the grid.
        smallest, largest = torch.linalg.eigvalsh(covariances).clamp_min(0).unbind(dim=-1)
        kept &= largest <= MOST_ELONGATED * smallest
        exact, edge = 3 * largest.sqrt(), 1e-3
        size = torch.tensor([scene.settings.width, scene.settings.height], dtype=torch.float64)
        for radius in (exact.floor() - 1, exact.ceil() + 1):
            inside = (means2d + radius[:, None] > -edge) & (means2d - radius[:, None] < size + edge)
            kept &= (inside.all(dim=-1) == (radii > 0)) | ((depths - 0.01) < -edge)
        kept &= (depths - 0.01).abs() > edge
        order = depths.argsort(stable=True)
        gaps = depths[order].diff()
        kept[order[1:]] &= (gaps == 0) | (gaps > 1e-4 * depths[order[1:]].abs())
    clear = []
    for means2d, covariances, depths, compensations, radii in projected:
        seen = (radii > 0) & kept
        order = depths[seen].argsort(stable=True)
        conics = torch.linalg.inv(covariances[seen][order])
        strengths = scene.tensors["opacities"].double() * (compensations if scene.settings.antialiased else 1)
        rows, columns = torch.meshgrid(
            torch.arange(scene.settings.height) + 0.5, torch.arange(scene.settings.width) + 0.5, indexing="ij"
        )
        offsets = torch.stack([columns, rows], dim=-1)[None] - means2d[seen][order][:, None, None]  # [N, H, W, 2]
        sigmas = 0.5 * torch.einsum("nhwi,nij,nhwj->nhw", offsets, conics, offsets)
        alphas = (strengths[seen][order][:, None, None] * torch.exp(-sigmas)).clamp_max(0.999)
        at_alpha = (alphas * 255 - 1).abs() < 1e-2
        transmittances = torch.cumprod(1 - alphas * (alphas >= 1 / 255), dim=0)
        at_end = (transmittances * 1e4 - 1).abs() < 1e-2
        clear.append(~(at_alpha | at_end | ((alphas - 0.999).abs() < 1e-4)).any(dim=0))
    return scene.only(kept), torch.stack(clear)


def rendered(function, scene: AnyScene, mask: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return features, depth and alpha where a mask says so, and the gradients of a random linear function of them."""
    leaves = scene.gaussians(dtype)
    outputs = function(Gaussians(**leaves), scene.viewmats.to(dtype), scene.Ks.to(dtype), scene.settings)[:3]
    outputs = [output * mask[..., None] for output in outputs]
    generator = torch.Generator().manual_seed(3)
    loss = sum((output * torch.randn(output.shape, generator=generator).to(dtype)).sum() for output in outputs)
    loss.backward()
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return [output.detach() for output in outputs], gradients


def check_agreement(scene: AnyScene) -> None:
    """Fail where the rasterizer differs from the reference by more than rounding can explain."""
    scene, mask = decided(scene)
    outputs, gradients = rendered(rasterize, scene, mask, torch.float32)
    expected_outputs, expected_gradients = rendered(rasterize_reference, scene, mask, torch.float64)
    for name, actual, expected in zip(("features", "depth", "alpha"), outputs, expected_outputs, strict=True):
        assert actual.isfinite().all(), name
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        error = float((actual - expected).abs().max()) if expected.numel() else 0.0
        assert error < 1e-3 * scale, f"{name}: off by {error:.1e} of {scale:.1e}"
    for name, expected in expected_gradients.items():
        actual = gradients[name]
        assert actual.shape == expected.shape and actual.isfinite().all(), name
        if expected.numel():
            size, error = float(expected.norm()), float((actual - expected).norm())
            assert error < 1e-2 * size + 1e-4, f"gradient of {name}: off by {error:.1e} of {size:.1e}"


@SETTINGS
@given(scenes())
def test_any_scene_is_rendered_as_the_reference_does(scene):
    check_agreement(scene)


WILD = (0.0, -0.0, 1e-38, 1e-30, -1e-6, 1e6, -1e20, 3e38, math.inf, -math.inf, math.nan)


@st.composite
def spoiled_scenes(draw: st.DrawFn) -> AnyScene:
    """Draw a scene some of whose numbers are none, or far out of any range."""
    scene = draw(scenes())
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        flat = scene.tensors[name].view(-1)
        for _ in range(draw(st.integers(1, 4)) if len(flat) else 0):
            flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from(WILD))
    return scene


def check_harmlessness(scene: AnyScene) -> None:
    """Fail where numbers that are none spread to pixels or gradients, or to Gaussians that are sound."""
    everywhere = torch.ones(len(scene.viewmats), scene.settings.height, scene.settings.width, dtype=torch.bool)
    outputs, gradients = rendered(rasterize, scene, everywhere, torch.float32)
    finite = torch.ones(len(scene.tensors["means"]), dtype=torch.bool)
    for tensor in scene.tensors.values():
        finite &= tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).isfinite().all(dim=1)
    for name, gradient in gradients.items():
        assert not gradient[~finite].any(), f"what is not finite has a gradient of {name}"
    without, gradients_without = rendered(rasterize, scene.only(finite), everywhere, torch.float32)
    for name, actual, expected in zip(("features", "depth", "alpha"), outputs, without, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient[finite], gradients_without[name], rtol=0, atol=0, equal_nan=True, msg=name)


@SETTINGS
@given(spoiled_scenes())
def test_numbers_that_are_none_make_a_gaussian_invisible_and_change_nothing_else(scene):
    check_harmlessness(scene)
