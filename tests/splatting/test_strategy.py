"""The portable MCMC strategy: the paper's mathematics, and a run on the CPU."""

import math

import pytest
import torch
from gaussian_scenes import random_scene
from test_gsplat_agreement import HEIGHT, WIDTH, render, trainable

from lrf_nerfstudio.splatting import rasterize
from lrf_nerfstudio.splatting.reference import covariance_matrices
from lrf_nerfstudio.splatting.strategy import PortableMCMCStrategy, compute_relocation


def test_relocation_follows_equation_9():
    opacities = torch.tensor([0.2, 0.7, 0.95, 0.999, 0.5], dtype=torch.float64)
    scales = torch.rand(5, 3, dtype=torch.float64) + 0.1
    copies = torch.tensor([1, 2, 5, 51, 17])
    new_opacities, new_scales = compute_relocation(opacities, scales, copies)
    for j in range(5):
        n, opacity = int(copies[j]), float(opacities[j])
        new = 1 - (1 - opacity) ** (1 / n)
        total = sum(
            math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
            for i in range(1, n + 1)
            for k in range(i)
        )
        assert new_opacities[j].item() == pytest.approx(new, rel=1e-9)
        torch.testing.assert_close(new_scales[j], scales[j] * opacity / total, rtol=1e-8, atol=0)
    assert torch.equal(new_scales[0], scales[0])  # alone, nothing changes


@pytest.mark.parametrize("copies", [2, 3, 6])
def test_relocation_preserves_what_is_rendered(copies):
    """M equal Gaussians with the new opacity and scale have the old one's centre and its integral along a line.

    Equation 9 demands just that; over an image it leaves a difference, far smaller than that of plain copies.
    """
    one = {
        "means": torch.zeros(1, 3),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "scales": torch.tensor([[0.15, 0.1, 0.12]]),
        "opacities": torch.tensor([0.9]),
    }
    opacities, scales = compute_relocation(one["opacities"], one["scales"], torch.tensor([copies]))
    plain = {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in one.items()}
    divided = plain | {"opacities": opacities.repeat(copies), "scales": scales.repeat(copies, 1)}
    before, after, naive = (rendered_alpha(gaussians) for gaussians in (one, divided, plain))
    centre = before.shape[0] // 2
    torch.testing.assert_close(after[centre, centre], before[centre, centre], rtol=1e-3, atol=0)
    torch.testing.assert_close(after[centre].sum(), before[centre].sum(), rtol=0.02, atol=0)
    assert (after - before).abs().sum() < 0.4 * (naive - before).abs().sum()


def rendered_alpha(gaussians: dict[str, torch.Tensor], size: int = 201) -> torch.Tensor:
    """Alpha [size, size] seen from a distance of 10, without dilation."""
    viewmat = torch.eye(4)
    viewmat[2, 3] = 10.0
    K = torch.tensor([[1500.0, 0.0, size / 2], [0.0, 1500.0, size / 2], [0.0, 0.0, 1.0]])
    features = torch.ones(len(gaussians["means"]), 1)
    alpha = rasterize(
        **gaussians, features=features, viewmats=viewmat[None], Ks=K[None], width=size, height=size, eps2d=0.0
    )[2]
    return alpha[0, :, :, 0]


def test_noise_has_the_covariance_of_the_paper():
    """Sigma eta sigmoid(-k (o - 0.005)) with eta ~ N(0, lr * noise_lr): covariance Sigma Sigma^T times its square."""
    torch.manual_seed(0)
    n = 40_000
    scene = random_scene(n=1)
    params, optimizers = trainable(scene)
    for name in params:
        params[name] = torch.nn.Parameter(params[name].detach().repeat(n, *[1] * (params[name].ndim - 1)))
    params["opacities"].data.fill_(math.log(0.004 / 0.996))
    start = params["means"].detach().clone()
    strategy = PortableMCMCStrategy(noise_lr=5e3)
    strategy.step_post_backward(params, optimizers, strategy.initialize_state(), 1, {}, lr=1e-3)
    moved = (params["means"].detach() - start).double()
    covariance = covariance_matrices(scene["quats"], scene["scales"])[0]
    strength = 5.0 / (1 + math.exp(-100 * (0.996 - 0.995)))
    expected = covariance @ covariance * strength**2
    assert moved.mean(0).abs().max() < 0.05 * expected.diagonal().max().sqrt()
    assert (moved.T @ moved / n - expected).abs().max() < 0.03 * expected.abs().max()


def test_strategy_trains_on_the_cpu():
    torch.manual_seed(0)
    scene = random_scene(n=300, width=WIDTH, height=HEIGHT)
    params, optimizers = trainable(scene)
    with torch.no_grad():
        params["opacities"][:40] = -7.0
    target = render(params, scene)[0].detach().roll(1, dims=2)
    strategy = PortableMCMCStrategy(cap_max=330, refine_start_iter=1, refine_every=3, noise_lr=10.0)
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state()
    losses = []
    for step in range(1, 30):
        image, _, _, info = render(params, scene)
        strategy.step_pre_backward(params, optimizers, state, step, info)
        loss = ((image - target) ** 2).mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, step, info, lr=1e-3)
        losses.append(loss.item())
        for name, optimizer in optimizers.items():
            assert optimizer.param_groups[0]["params"][0] is params[name]
            assert optimizer.state[params[name]]["exp_avg"].shape == params[name].shape
    assert len(params["means"]) == 330
    assert (torch.sigmoid(params["opacities"]) > 0.005 - 1e-6).all()  # none is dead
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(value).all() for value in params.values())
