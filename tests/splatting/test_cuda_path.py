"""The CUDA backend without a GPU: on fake CUDA tensors, and with gsplat's CUDA functions written in PyTorch."""

import sys
import types

import pytest
import torch
from fake_cuda import fake_cuda
from gaussian_scenes import arguments, random_scene

from lrf_nerfstudio.splatting import RasterSettings, cuda, evaluate_sh, rasterize
from lrf_nerfstudio.splatting.reference import rasterize_reference
from lrf_nerfstudio.utils.errors import UserError

WIDTH, HEIGHT = 23, 17


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("absgrad", [False, True])
@pytest.mark.parametrize("render_depth", [False, True])
@pytest.mark.parametrize("sh_degree", [None, 3])
def test_steps_on_cuda_mix_no_devices_and_read_nothing_back(fake_gsplat, sh_degree, render_depth, absgrad, antialiased):
    settings = RasterSettings(
        WIDTH, HEIGHT, sh_degree, render_depth=render_depth, absgrad=absgrad, antialiased=antialiased
    )
    scene = random_scene(n=40, channels=4, n_cameras=2, sh_degree=3)
    with fake_cuda() as gpu:
        leaves = {name: gpu.place(tensor.float()).requires_grad_(name != "Ks") for name, tensor in scene.items()}
        gaussians, viewmats, Ks = arguments(leaves)
        with gpu.no_waiting():
            features, depth, alpha, info = rasterize(gaussians, viewmats, Ks, settings)
            info["means2d"].retain_grad()
            (features.sum() + alpha.sum() + (0 if depth is None else depth.sum())).backward()
    assert features.shape == (2, HEIGHT, WIDTH, 4) and alpha.shape == (2, HEIGHT, WIDTH, 1)
    assert (depth is not None) == render_depth
    assert info["radii"].shape == (2, 40) and info["radii"].dtype == torch.int32
    assert info["means2d"].grad.shape == (2, 40, 2)
    assert hasattr(info["means2d"], "absgrad") == absgrad
    unused = {"features_rest"} if not sh_degree else set()
    for name in leaves.keys() - {"Ks"} - unused:
        assert leaves[name].grad.device.type == "cuda" and leaves[name].grad.shape == leaves[name].shape


def test_mixed_precision_stays_out_of_rasterization(fake_gsplat):
    scene = random_scene(n=40, sh_degree=2)
    with fake_cuda() as gpu, torch.autocast("cuda", dtype=torch.float16):
        leaves = {name: gpu.place(tensor.float()).requires_grad_(name != "Ks") for name, tensor in scene.items()}
        features, depth, alpha, _ = rasterize(*arguments(leaves), RasterSettings(WIDTH, HEIGHT, sh_degree=2))
        (features.sum() + depth.sum() + alpha.sum()).backward()
    assert features.dtype == depth.dtype == alpha.dtype == leaves["means"].grad.dtype == torch.float32


CASES = {
    "plain features": ({"channels": 4}, {}),
    "harmonics, two cameras": ({"channels": 5, "n_cameras": 2, "sh_degree": 2}, {"sh_degree": 2}),
    "degree 1 of 3, antialiased": ({"channels": 16, "sh_degree": 3}, {"sh_degree": 1, "antialiased": True}),
    "no depth": ({"channels": 3}, {"render_depth": False, "eps2d": 0.1}),
    "planes": ({"channels": 1}, {"near_plane": 2.0, "far_plane": 4.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_gsplat_is_asked_for_is_the_reference(fake_gsplat, case):
    """Outputs and all gradients."""
    fake_gsplat.device = "cpu"
    of_scene, options = CASES[case]
    scene = random_scene(n=60, width=WIDTH, height=HEIGHT, **of_scene)
    settings = RasterSettings(WIDTH, HEIGHT, **options)
    results = []
    for function, dtype in ((cuda.rasterize_cuda, torch.float32), (rasterize_reference, torch.float64)):
        leaves = {name: tensor.to(dtype, copy=True).requires_grad_(name != "Ks") for name, tensor in scene.items()}
        features, depth, alpha = function(*arguments(leaves), settings)[:3]
        outputs = [features, alpha, *([depth] if settings.render_depth else [])]
        generator = torch.Generator().manual_seed(0)
        sum((out * torch.randn(out.shape, generator=generator).to(dtype)).sum() for out in outputs).backward()
        values = dict(zip(("features", "alpha", "depth"), outputs, strict=False))
        results.append(values | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if name != "Ks"})
    actual, expected = results
    for name, value in expected.items():
        assert value.abs().max() > 0, f"the case says nothing about {name}"
        error = (actual[name] - value).abs().max() / value.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_absolute_gradients_are_those_of_the_cpu(fake_gsplat):
    fake_gsplat.device = "cpu"
    scene = {name: tensor.float() for name, tensor in random_scene(n=60, width=WIDTH, height=HEIGHT).items()}
    settings = RasterSettings(WIDTH, HEIGHT, absgrad=True)
    measured = []
    for function in (cuda.rasterize_cuda, rasterize):
        leaves = {name: tensor.clone().requires_grad_(name != "Ks") for name, tensor in scene.items()}
        features, _, _, info = function(*arguments(leaves), settings)
        (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        measured.append(info["means2d"].absgrad)
    torch.testing.assert_close(*measured, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("degree", "channels"), [(0, 4), (1, 3), (2, 1), (3, 16), (3, 4)])
def test_harmonics_in_groups_of_three_channels_equal_harmonics(fake_gsplat, degree, channels):
    fake_gsplat.device = "cpu"
    generator = torch.Generator().manual_seed(degree)
    directions = torch.randn(30, 3, generator=generator).requires_grad_()
    coeffs = torch.randn(30, 16, channels, generator=generator).requires_grad_()
    weights = torch.randn(30, channels, generator=generator)
    found = []
    for function in (cuda.evaluate_sh_cuda, evaluate_sh):
        features = function(degree, directions, coeffs)
        inputs = [coeffs] if degree == 0 else [coeffs, directions]
        found.append([features, *torch.autograd.grad((features * weights).sum(), inputs)])
    torch.testing.assert_close(*found)


def test_small_grids_get_small_tiles():
    """A grid's tiles are blocks of whole warps, at least 256 of them where that is possible."""
    assert cuda.tile_size(1, 64, 64) == 8
    assert cuda.tile_size(1, 1, 1) == 8
    assert cuda.tile_size(1, 256, 256) == 16
    assert cuda.tile_size(1, 256, 240) == 8
    assert cuda.tile_size(4, 128, 128) == 16


def without_cuda_code(monkeypatch, backend):
    import gsplat.cuda

    cuda._gsplat_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", backend)
    monkeypatch.delattr(gsplat.cuda, "_backend", raising=False)


@pytest.fixture(autouse=True)
def fresh_check():
    yield
    cuda._gsplat_problem.cache_clear()


def test_gsplat_without_a_compiler_is_a_users_error(monkeypatch):
    backend = types.ModuleType("gsplat.cuda._backend")
    backend._C = None
    without_cuda_code(monkeypatch, backend)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no CUDA code.*nvcc.*wheel.*CPU"):
            cuda.check_gsplat()
    scene = random_scene(n=5)
    with fake_cuda(), pytest.raises(UserError, match="no CUDA code"):
        on_cuda = {name: tensor.float().to("cuda") for name, tensor in scene.items()}
        rasterize(*arguments(on_cuda), RasterSettings(8, 8))


def test_gsplat_that_does_not_compile_is_a_users_error(monkeypatch):
    """The message begins with the compiler's."""

    class Failing:
        def find_spec(self, name, path=None, target=None):
            if name == "gsplat.cuda._backend":
                raise RuntimeError("Error building extension 'gsplat_cuda'\nand a thousand lines")
            return None

    without_cuda_code(monkeypatch, None)
    monkeypatch.delitem(sys.modules, "gsplat.cuda._backend")
    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    with pytest.raises(UserError, match=r"cannot compile.*\(Error building extension 'gsplat_cuda'\)\. Install"):
        cuda.check_gsplat()


def test_a_working_gsplat_passes_the_check_once(fake_gsplat, monkeypatch):
    cuda.check_gsplat()
    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", None)
    cuda.check_gsplat()
