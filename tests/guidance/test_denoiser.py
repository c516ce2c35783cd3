"""A U-Net as a denoiser: what it predicts, precision, and that no step waits for a GPU."""

import pytest
import torch
from fake_cuda import Waits, fake_cuda
from oracle import stable_diffusion_schedule
from tiny_diffusion import make_unet

from lrf_nerfstudio.guidance import GuidanceConfig, PromptConfig, ScoreGuidance, UNetDenoiser, ViewPrompts
from lrf_nerfstudio.guidance.orbits import OrbitConfig, random_orbits

pytestmark = pytest.mark.slow

ALPHAS = stable_diffusion_schedule()


def embed(texts):
    return torch.randn(len(texts), 7, 16, generator=torch.Generator().manual_seed(0))


def test_the_unet_is_frozen_and_its_noise_is_returned():
    denoiser = UNetDenoiser(make_unet().train(), ALPHAS)
    x, t, prompts = torch.randn(2, 4, 8, 8, requires_grad=True), torch.tensor([10, 900]), embed(["a", "b"])
    noise = denoiser.predict(x, t, prompts)
    assert not noise.requires_grad
    assert not any(parameter.requires_grad for parameter in denoiser.unet.parameters())
    assert not denoiser.unet.training
    torch.testing.assert_close(noise, denoiser.unet(x, t, encoder_hidden_states=prompts).sample)


def test_v_becomes_noise():
    """V = sqrt(a) noise - sqrt(1 - a) x, for which the noise of x_t is to be found."""
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    a = ALPHAS[t].view(-1, 1, 1, 1)

    class KnowsV(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, x_t, t, encoder_hidden_states):
            return type("Output", (), {"sample": a.sqrt() * noise - (1 - a).sqrt() * x})

    denoiser = UNetDenoiser(KnowsV(), ALPHAS, "v_prediction")
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise
    torch.testing.assert_close(denoiser.predict(x_t, t, embed(["a", "b"])), noise, rtol=1e-4, atol=1e-4)


def test_half_precision_takes_and_gives_float32():
    x, t, prompts = torch.randn(1, 4, 8, 8), torch.tensor([500]), embed(["a"])
    exact = UNetDenoiser(make_unet(), ALPHAS).predict(x, t, prompts)
    half = UNetDenoiser(make_unet().to(torch.bfloat16), ALPHAS).predict(x, t, prompts)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.0, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", ["sds", "csd", "ism"])
def test_a_step_does_not_wait_for_the_gpu(kind):
    with fake_cuda() as gpu:
        unet = gpu.place(make_unet().half())
        denoiser = UNetDenoiser(unet, ALPHAS, "v_prediction")
        prompts = ViewPrompts(PromptConfig(prompt="a cube", perp_neg=True), lambda texts: gpu.place(embed(texts)))
        guide = ScoreGuidance(GuidanceConfig(kind=kind), denoiser, prompts)
        x = gpu.place(torch.randn(4, 4, 8, 8, requires_grad=True))
        with gpu.no_waiting():
            views = random_orbits(OrbitConfig(cells=8), step=3, cell=8, device="cuda")
            result = guide(x, views.azimuths, views.elevations, 0.1)
            result.loss.backward()
        assert views.camera.viewmats.device == views.camera.Ks.device == x.grad.device == denoiser.alphas_cumprod.device
        assert x.grad.shape == x.shape
        assert result.loss.dtype == torch.float32
        assert all(value.shape == () and value.is_cuda for value in result.metrics.values())
        with pytest.raises(Waits):
            result.loss.item()
