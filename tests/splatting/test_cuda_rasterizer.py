"""The two backends agree on a GPU."""

import pytest
import torch
from gaussian_scenes import arguments, random_scene

from lrf_nerfstudio.splatting import RasterSettings, cuda, evaluate_sh, rasterize

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WIDTH, HEIGHT = 70, 45


def run(scene, settings, function=rasterize, device="cuda"):
    """Outputs of a rasterizer and the gradients of a random linear function of them, on the CPU."""
    leaves = {name: tensor.float().to(device).requires_grad_(name != "Ks") for name, tensor in scene.items()}
    features, depth, alpha, info = function(*arguments(leaves), settings)
    info["means2d"].retain_grad()
    outputs = {"features": features, "alpha": alpha} | ({} if depth is None else {"depth": depth})
    generator = torch.Generator().manual_seed(0)
    sum((out * torch.randn(out.shape, generator=generator).to(device)).sum() for out in outputs.values()).backward()
    values = outputs | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    values["gradient of means2d"] = info["means2d"].grad
    if settings.absgrad:
        values["absgrad"] = info["means2d"].absgrad
    return {name: value.detach().cpu() for name, value in values.items()}, info


def assert_agree(actual, expected, tolerance=2e-3):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("render_depth", [False, True])
@pytest.mark.parametrize(
    ("channels", "sh_degree", "n_cameras"), [(4, None, 1), (4, None, 3), (4, 3, 2), (3, 0, 1), (5, 1, 1), (16, 2, 1)]
)
def test_backends_agree(channels, sh_degree, n_cameras, render_depth, antialiased):
    """Outputs and all gradients. Opacities stay below 1/3, where gsplat's three-sigma square holds all that counts."""
    scene = random_scene(
        n=600, channels=channels, width=WIDTH, height=HEIGHT, n_cameras=n_cameras, sh_degree=sh_degree, opacity=0.33
    )
    settings = RasterSettings(
        WIDTH, HEIGHT, sh_degree, render_depth=render_depth, absgrad=True, antialiased=antialiased
    )
    (on_cpu, info_on_cpu), (on_cuda, info_on_cuda) = (run(scene, settings, device=d) for d in ("cpu", "cuda"))
    assert_agree(on_cuda, on_cpu)
    agree = info_on_cpu["radii"] == info_on_cuda["radii"].cpu()
    assert agree.float().mean() > 0.99  # they are rounded up


@pytest.mark.parametrize("n_cameras", [1, 3])
def test_a_batch_of_cameras_is_its_cameras(n_cameras):
    scene = random_scene(n=600, width=WIDTH, height=HEIGHT, n_cameras=n_cameras, sh_degree=2)
    settings = RasterSettings(WIDTH, HEIGHT, sh_degree=2)
    batch = rasterize(*arguments({name: tensor.float().cuda() for name, tensor in scene.items()}), settings)
    for b in range(n_cameras):
        one = scene | {name: scene[name][b : b + 1] for name in ("viewmats", "Ks")}
        alone = rasterize(*arguments({name: tensor.float().cuda() for name, tensor in one.items()}), settings)
        torch.testing.assert_close(batch.features[b], alone.features[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.depth[b], alone.depth[0], rtol=1e-4, atol=1e-5)


def test_the_size_of_tiles_changes_nothing(monkeypatch):
    scene = random_scene(n=600, width=WIDTH, height=HEIGHT, opacity=0.33)
    results = []
    for size in (8, 16):
        monkeypatch.setattr(cuda, "tile_size", lambda *_, size=size: size)
        values, info = run(scene, RasterSettings(WIDTH, HEIGHT, absgrad=True))
        assert info["tile_size"] == size
        results.append(values)
    assert_agree(*results, tolerance=1e-4)


@pytest.mark.parametrize(("degree", "channels"), [(0, 4), (1, 3), (2, 1), (3, 16), (3, 4)])
def test_harmonics_agree(degree, channels):
    generator = torch.Generator().manual_seed(degree)
    directions = torch.randn(300, 3, generator=generator).cuda().requires_grad_()
    coeffs = torch.randn(300, 16, channels, generator=generator).cuda().requires_grad_()
    weights = torch.randn(300, channels, generator=generator).cuda()
    found = []
    for function in (cuda.evaluate_sh_cuda, evaluate_sh):
        features = function(degree, directions, coeffs)
        inputs = [coeffs] if degree == 0 else [coeffs, directions]
        found.append([features, *torch.autograd.grad((features * weights).sum(), inputs)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_the_fake_gsplat_returns_what_gsplat_returns(request):
    scene = random_scene(n=100, width=WIDTH, height=HEIGHT, n_cameras=2, sh_degree=1, opacity=0.33)
    settings = RasterSettings(WIDTH, HEIGHT, sh_degree=1, absgrad=True)
    values, info = run(scene, settings)
    request.getfixturevalue("fake_gsplat").device = "cpu"
    fake_values, fake_info = run(scene, settings, function=cuda.rasterize_cuda, device="cpu")
    assert_agree(fake_values, values)
    assert fake_info.keys() == info.keys()
    for name, value in info.items():
        if isinstance(value, torch.Tensor):
            assert fake_info[name].dtype == value.dtype and fake_info[name].ndim == value.ndim, name
        else:
            assert fake_info[name] == value, name


def test_mcmc_relocation_agrees_with_gsplat():
    import math

    from gsplat.relocation import compute_relocation as gsplat_relocation

    from lrf_nerfstudio.splatting.strategies import compute_relocation

    binomials = torch.tensor([[float(math.comb(n, k)) for k in range(51)] for n in range(51)], device="cuda")
    opacities, scales = torch.rand(100, device="cuda") * 0.9 + 0.05, torch.rand(100, 3, device="cuda")
    copies = torch.randint(1, 8, (100,), device="cuda")
    expected = gsplat_relocation(opacities, scales, copies.clone(), binomials)
    torch.testing.assert_close(compute_relocation(opacities, scales, copies), expected, rtol=1e-3, atol=1e-5)
