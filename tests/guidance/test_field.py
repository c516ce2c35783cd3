"""Distillation by an oracle rebuilds a field in 3D: signs, weights, timesteps and cameras fit together."""

import functools

import pytest
import torch
from blob_field import psnr, render, true_field
from oracle import Oracle
from torch import Tensor

from lrf_nerfstudio.guidance import (
    Conditions,
    GuidanceConfig,
    InitializationConfig,
    OrbitConfig,
    ScoreGuidance,
    evaluation_orbit,
    initial_gaussians,
    random_orbits,
)

pytestmark = pytest.mark.slow

STEPS = 300
ORBITS = OrbitConfig(views=4, cells=16, distance=(1.6, 2.0), eval_views=8)
BACKGROUND = torch.tensor([0.3, -0.5, 0.2, 0.1])
RATES = {"means": 4e-3, "scales": 1e-2, "quats": 5e-3, "features_dc": 5e-2, "opacities": 5e-2}


def fitted(loss_of) -> dict[str, Tensor]:
    """Fit Gaussians from a ball; `loss_of(latents, views, truth, progress)` is descended."""
    field = initial_gaussians(InitializationConfig(count=150, radius=0.5), channels=4)
    field = {name: value.requires_grad_() for name, value in field.items()}
    optimizer = torch.optim.Adam([{"params": [field[name]], "lr": rate} for name, rate in RATES.items()], eps=1e-15)
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * 0.05 ** (step / STEPS)
        views = random_orbits(ORBITS, step, cell=8)
        with torch.no_grad():
            truth = render(true_field(), views.camera, BACKGROUND)
        optimizer.zero_grad(set_to_none=True)
        loss_of(render(field, views.camera, BACKGROUND), views, truth, step / STEPS).backward()
        optimizer.step()
    return field


def held_out_psnr(field: dict[str, Tensor]) -> float:
    views = evaluation_orbit(ORBITS, cell=8)
    with torch.no_grad():
        truth, latents = render(true_field(), views.camera, BACKGROUND), render(field, views.camera, BACKGROUND)
    return psnr(latents, truth)


@functools.cache
def direct_fit() -> float:
    return held_out_psnr(fitted(lambda latents, views, truth, progress: (latents - truth).square().mean()))


class Prompts:
    def conditions(self, azimuths, elevations):
        ones, zeros = torch.ones(len(azimuths), 1, 1), torch.zeros(len(azimuths), 1, 1)
        return Conditions(ones, zeros, zeros)


@pytest.mark.parametrize("kind", ["sds", "csd", "ism"])
def test_distillation_rebuilds_a_field_as_well_as_a_direct_fit(kind):
    oracle = Oracle(torch.zeros(1, 4, 4, 16, 16), spread=100.0)
    config = GuidanceConfig(kind=kind, guidance_scale=1.0, weighting="noise-to-signal", t_max=(0.5, 0.1))
    guidance = ScoreGuidance(config, oracle, Prompts())
    generator = torch.Generator().manual_seed(0)

    def loss(latents, views, truth, progress):
        oracle.latents = truth[None]
        return guidance(latents, views.azimuths, views.elevations, progress, generator).loss

    reached = held_out_psnr(fitted(loss))
    assert direct_fit() > 25.0
    assert reached > direct_fit() - 1.0, (reached, direct_fit())
