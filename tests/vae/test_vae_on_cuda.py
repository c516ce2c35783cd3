"""On CUDA: encoding, decoding and the maps between the spaces stay on the GPU and wait for nothing.

The GPU is a fake one (see tests/helpers/fake_cuda.py), so these tests run everywhere.
"""

import pytest
import torch
from fake_cuda import DEVICE, Waits, fake_cuda
from tiny_autoencoders import tiny_kl, tiny_taesd

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, FieldNormalization, LatentCache, LinearRGB, downsample_mask, sample_latents
from lrf_nerfstudio.vae.identity import IdentityAutoencoder
from lrf_nerfstudio.vae.sources import load_autoencoder

pytestmark = pytest.mark.slow

AUTOENCODERS = {
    "kl": tiny_kl,
    "tiny": tiny_taesd,
    "rgb": IdentityAutoencoder,
    "default": lambda: load_autoencoder("lrf-f4c4"),
}
OPTIONS = {
    "plain": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "tiling and slicing": {"dtype": torch.float16, "tiling": True, "tile_size": 16, "slicing": True},
}


@pytest.fixture
def gpu():
    with fake_cuda() as gpu:
        yield gpu


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_pictures_and_latents_there_and_back(gpu, make, options):
    vae = gpu.place(VAE(make(), **options))
    assert vae.device == DEVICE
    images = gpu.place(torch.rand(2, 21, 30, 3))
    with gpu.no_waiting():
        latents = vae.encode(images)
        decoded = vae.decode(vae.unscale(vae.scale(latents)), 21, 30)
    f = vae.spatial_factor
    assert latents.shape == (2, vae.latent_channels, -(-21 // f), -(-30 // f))
    assert decoded.shape == images.shape
    assert latents.device == decoded.device == DEVICE
    assert latents.dtype == decoded.dtype == torch.float32
    if vae.dtype == torch.float16:
        with pytest.raises(Waits):
            vae.check_overflow()
    else:
        vae.check_overflow()


@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd])
def test_gradients_of_both_halves(gpu, make):
    vae = gpu.place(VAE(make()))
    images = gpu.place(torch.rand(2, 21, 30, 3))
    with gpu.no_waiting():
        latents = vae.encode(images)
        (vae.decode(latents, 21, 30, clamp=False) - images).abs().mean().backward()
    for parameter in vae.parameters():
        assert parameter.grad is None or parameter.grad.device == DEVICE
    assert sum(parameter.grad is not None for parameter in vae.parameters()) > 10


def test_pictures_on_the_cpu_are_taken_to_the_gpu(gpu):
    vae = gpu.place(VAE(tiny_kl()))
    assert vae.encode(torch.rand(1, 21, 30, 3)).device == DEVICE
    assert vae.decode(torch.rand(1, 3, 11, 15), 21, 30).device == DEVICE


def test_the_maps_between_the_spaces(gpu):
    normalization, linear_rgb = gpu.place(FieldNormalization(4)), gpu.place(LinearRGB(4))
    latents = gpu.place(torch.rand(2, 4, 9, 13))
    with gpu.no_waiting():
        field = normalization.to_field(latents)
        again = normalization.to_latent(field)
        rgb = linear_rgb(again)
        matrix, bias = linear_rgb.for_field(normalization)
    assert (field.shape, again.shape, rgb.shape) == ((2, 9, 13, 4), (2, 4, 9, 13), (2, 9, 13, 3))
    assert {tensor.device for tensor in (field, again, rgb, matrix, bias)} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_reading_latents_at_points(gpu, interpolation, dtype):
    latents = gpu.place(torch.rand(2, 4, 9, 13, dtype=dtype).requires_grad_())
    points = gpu.place(36 * torch.rand(2, 20, 2))
    with gpu.no_waiting():
        sampled = sample_latents(latents, points, 4, interpolation)
        sampled.sum().backward()
    assert sampled.shape == (2, 20, 4) and sampled.device == latents.grad.device == DEVICE
    assert sampled.dtype == torch.float32 and latents.grad.dtype == dtype


def test_masks(gpu):
    mask = gpu.place(torch.rand(21, 30) > 0.5)
    with gpu.no_waiting():
        cells = downsample_mask(mask, 4)
    assert cells.shape == (6, 8) and cells.dtype == torch.bool and cells.device == DEVICE


def test_statistics_read_latents_wherever_they_are(tmp_path):
    """What waits: made once before a fit. On a real GPU these would end in the same numbers."""
    with fake_cuda() as gpu:
        latents = gpu.place(torch.rand(4, 9, 13))
        for make in (
            lambda: FieldNormalization.from_latents([latents]),
            lambda: LinearRGB.fit([(latents, torch.rand(36, 52, 3))], 4),
            lambda: LatentCache(tmp_path, gpu.place(VAE(tiny_kl()))).load_or_encode(
                [], {}, lambda: gpu.place(torch.rand(21, 30, 3))
            ),
        ):
            with pytest.raises(Waits, match="to the CPU"):
                make()


@pytest.mark.cuda
@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd, lambda: load_autoencoder("lrf-f4c4")])
def test_a_gpu_agrees_with_the_cpu(make):
    torch.manual_seed(0)
    images = torch.rand(1, 37, 50, 3)
    exact = VAE(make())
    expected = exact.encode(images)
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float16, 5e-2)):
        vae = VAE(make(), dtype=dtype).to("cuda")
        latents = vae.encode(images)
        decoded = vae.decode(latents, 37, 50)
        vae.check_overflow()
        assert latents.is_cuda and decoded.is_cuda
        scale = expected.abs().max().item()
        torch.testing.assert_close(latents.cpu(), expected, atol=tolerance * scale, rtol=0)
        torch.testing.assert_close(decoded.cpu(), exact.decode(expected, 37, 50), atol=max(tolerance, 1e-2), rtol=0)


@pytest.mark.cuda
def test_overflow_on_a_gpu():
    autoencoder = tiny_kl()
    with torch.no_grad():
        for weight in autoencoder.encoder.parameters():
            weight.mul_(1e4)
    vae = VAE(autoencoder, dtype=torch.float16).to("cuda")
    vae.encode(torch.rand(1, 21, 30, 3))
    with pytest.raises(UserError, match="overflows in float16"):
        vae.check_overflow()
