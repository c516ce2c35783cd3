"""The CPU backend against gsplat's own PyTorch functions, and as the data that its strategies work on.

Blending is held against the dense reference alone: gsplat's `_rasterize_to_pixels` needs a GPU (through nerfacc).
"""

import copy

import pytest
import torch
from gaussian_scenes import arguments, random_scene
from gsplat.cuda._torch_impl import (
    _fully_fused_projection,
    _quat_scale_to_covar_preci,
    _spherical_harmonics,
)
from gsplat.strategy import DefaultStrategy

from lrf_nerfstudio.splatting import Gaussians, RasterSettings, evaluate_sh, rasterize

WIDTH, HEIGHT = 23, 17


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics_agree_with_gsplat(degree):
    generator = torch.Generator().manual_seed(degree)
    directions = torch.randn(50, 3, generator=generator, dtype=torch.float64).requires_grad_()
    coeffs = torch.randn(50, 16, 3, generator=generator, dtype=torch.float64).requires_grad_()
    actual = evaluate_sh(degree, directions, coeffs)
    expected = _spherical_harmonics(degree, directions, coeffs)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    inputs = [coeffs] if degree == 0 else [directions, coeffs]
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    )


def test_harmonics_take_any_number_of_channels():
    coeffs = torch.randn(9, 16, 11, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, c: evaluate_sh(3, d, c), (directions, coeffs))
    with pytest.raises(AssertionError, match=r"\(9, 16, 11\)"):
        evaluate_sh(3, directions[:8], coeffs)


def test_projection_agrees_with_gsplat():
    """radii, means2d, depths, conics and all their gradients, viewmats' too."""
    scene = random_scene(n=400, width=WIDTH, height=HEIGHT, n_cameras=2)
    leaves = {key: scene[key].float().requires_grad_() for key in ("means", "quats", "scales", "viewmats")}
    other = {key: scene[key].float() for key in ("opacities", "features", "Ks")}
    info = rasterize(*arguments(leaves | other), RasterSettings(WIDTH, HEIGHT, antialiased=True)).info
    twins = {key: scene[key].clone().requires_grad_() for key in ("means", "quats", "scales", "viewmats")}
    covars, _ = _quat_scale_to_covar_preci(twins["quats"], twins["scales"], compute_preci=False)
    radii, means2d, depths, conics, compensations = _fully_fused_projection(
        twins["means"], covars, twins["viewmats"], scene["Ks"], WIDTH, HEIGHT, calc_compensations=True
    )
    seen = radii > 0
    assert torch.equal(info["radii"], radii)
    expected = {"means2d": means2d, "depths": depths, "conics": conics, "opacities": compensations * scene["opacities"]}
    generator = torch.Generator().manual_seed(1)
    loss, expected_loss = 0.0, 0.0
    for key, value in expected.items():
        torch.testing.assert_close(info[key][seen].double(), value[seen], rtol=1e-4, atol=1e-4)
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        loss = loss + (info[key] * weights.float())[seen].sum()
        expected_loss = expected_loss + (value * weights)[seen].sum()
    loss.backward()
    expected_loss.backward()
    for key, twin in twins.items():
        error = (leaves[key].grad - twin.grad).abs().max() / twin.grad.abs().max()
        assert error < 1e-4, f"{key}: {error:.1e}"


def trainable(scene: dict[str, torch.Tensor]):
    """Parameters and optimizers as splatfacto names and shapes them."""
    params = torch.nn.ParameterDict(
        {
            "means": scene["means"].float(),
            "scales": scene["scales"].float().log(),
            "quats": scene["quats"].float(),
            "features_dc": scene["features"].float(),
            "opacities": torch.logit(scene["opacities"].float().clamp(0.01, 0.99))[:, None],
        }
    )
    optimizers = {name: torch.optim.Adam([params[name]], lr=1e-3, eps=1e-15) for name in params}
    return params, optimizers


def render(params, scene, **options):
    gaussians = Gaussians(
        params["means"],
        params["quats"],
        params["scales"].exp(),
        torch.sigmoid(params["opacities"]).squeeze(-1),
        params["features_dc"],
    )
    settings = RasterSettings(WIDTH, HEIGHT, **options)
    return rasterize(gaussians, scene["viewmats"].float(), scene["Ks"].float(), settings)


@pytest.mark.parametrize("absgrad", [False, True])
def test_default_strategy_runs_unchanged(absgrad):
    """Splits, duplicates, prunes and resets, with gradients of the 2D means that it takes from `info`."""
    torch.manual_seed(0)
    scene = random_scene(n=500, width=WIDTH, height=HEIGHT, n_cameras=2)
    params, optimizers = trainable(scene)
    with torch.no_grad():
        params["opacities"][:20] = -8.0
    strategy = DefaultStrategy(
        refine_start_iter=2,
        refine_every=4,
        reset_every=12,
        refine_scale2d_stop_iter=100,
        grow_grad2d=1e-3,
        grow_scale3d=0.15,
        absgrad=absgrad,
    )
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state(scene_scale=1.0)
    targets = torch.rand(2, HEIGHT, WIDTH, 4)
    counts, largest_opacities = [], []
    for step in range(1, 14):
        image, _, _, info = render(params, scene, absgrad=absgrad)
        strategy.step_pre_backward(params, optimizers, state, step, info)
        ((image - targets) ** 2).sum().backward()
        measured = info["means2d"].absgrad if absgrad else info["means2d"].grad
        assert measured.shape == (2, len(params["means"]), 2) and measured.abs().sum() > 0
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        before = copy.deepcopy(state["grad2d"])
        strategy.step_post_backward(params, optimizers, state, step, info)
        assert before is None or len(state["grad2d"]) == len(params["means"])
        counts.append(len(params["means"]))
        largest_opacities.append(torch.sigmoid(params["opacities"]).max().item())
    assert counts[3] != counts[2] and max(counts) > 500
    assert largest_opacities[11] <= 0.0101 < largest_opacities[10]  # the reset
