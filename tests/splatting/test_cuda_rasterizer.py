"""The two backends agree."""

import pytest
import torch
from gaussian_scenes import arguments, random_scene

from lrf_nerfstudio.splatting import RasterSettings, rasterize

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WIDTH, HEIGHT = 70, 45


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize(("channels", "sh_degree", "n_cameras"), [(4, None, 1), (4, 3, 2), (5, 1, 1), (16, 2, 1)])
def test_backends_agree(channels, sh_degree, n_cameras, antialiased):
    """Outputs and all gradients. Opacities stay below 1/3, where gsplat's three-sigma square holds all that counts."""
    scene = random_scene(
        n=600, channels=channels, width=WIDTH, height=HEIGHT, n_cameras=n_cameras, sh_degree=sh_degree, opacity=0.33
    )
    results = []
    for device in ("cpu", "cuda"):
        leaves = {name: tensor.float().to(device).requires_grad_(name != "Ks") for name, tensor in scene.items()}
        image, depth, alpha, info = rasterize(
            *arguments(leaves), RasterSettings(WIDTH, HEIGHT, sh_degree, absgrad=True, antialiased=antialiased)
        )
        info["means2d"].retain_grad()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(out.shape, generator=generator).to(device) for out in (image, depth, alpha)]
        sum((out * weight).sum() for out, weight in zip((image, depth, alpha), weights, strict=True)).backward()
        values = {"features": image, "depth": depth, "alpha": alpha, "absgrad": info["means2d"].absgrad}
        values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if name != "Ks"}
        values["gradient of means2d"] = info["means2d"].grad
        results.append({name: value.detach().cpu() for name, value in values.items()} | {"radii": info["radii"].cpu()})
    on_cpu, on_cuda = results
    assert on_cpu["radii"].shape == on_cuda["radii"].shape
    for name in on_cpu.keys() - {"radii"}:
        error = (on_cpu[name] - on_cuda[name]).norm() / on_cpu[name].norm()
        assert error < 2e-3, f"{name}: {error:.1e}"


def test_mcmc_relocation_agrees_with_gsplat():
    import math

    from gsplat.relocation import compute_relocation as gsplat_relocation

    from lrf_nerfstudio.splatting.strategies import compute_relocation

    binomials = torch.tensor([[float(math.comb(n, k)) for k in range(51)] for n in range(51)], device="cuda")
    opacities, scales = torch.rand(100, device="cuda") * 0.9 + 0.05, torch.rand(100, 3, device="cuda")
    copies = torch.randint(1, 8, (100,), device="cuda")
    expected = gsplat_relocation(opacities, scales, copies.clone(), binomials)
    torch.testing.assert_close(compute_relocation(opacities, scales, copies), expected, rtol=1e-3, atol=1e-5)
