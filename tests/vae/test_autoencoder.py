import subprocess
import sys

import pytest
import torch
from tiny_autoencoders import tiny_kl, tiny_taesd

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig, latent_size, pad_to_multiple

pytestmark = pytest.mark.slow


def test_importing_costs_neither_diffusers_nor_numba():
    code = "import sys, lrf_nerfstudio.vae; print([m for m in ('diffusers', 'cv2', 'nerfstudio') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_any_size_comes_back_with_its_size(vae, images):
    height, width = images.shape[1:3]
    latents = vae.encode(images)
    assert latents.shape == (2, vae.latent_channels, *latent_size(height, width, vae.spatial_factor))
    decoded = vae.decode(latents, height, width)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert 0.0 <= decoded.min() and decoded.max() <= 1.0


def test_encoding_is_the_posterior_mode_of_the_padded_image(vae, images):
    x = pad_to_multiple(images.permute(0, 3, 1, 2) * 2 - 1, vae.spatial_factor)
    output = vae.autoencoder.encode(x)
    expected = output.latent_dist.mean if hasattr(output, "latent_dist") else output.latents
    torch.testing.assert_close(vae.encode(images), expected, atol=1e-5, rtol=1e-5)


def test_decoding_is_the_decoder_cut_to_size(vae, images):
    latents = torch.randn_like(vae.encode(images))
    expected = vae.autoencoder.decode(latents).sample[..., :21, :30].permute(0, 2, 3, 1) / 2 + 0.5
    torch.testing.assert_close(vae.decode(latents, 21, 30, clamp=False), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(latents, 21, 30), expected.clamp(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny_kl, tiny_taesd])
def test_gradients_equal_finite_differences(build):
    # Smooth activations: across the kinks of ReLU a finite difference is no derivative.
    vae = VAE(build(act_fn="silu"))
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(1, 5, 6, 3, generator=generator).requires_grad_()
    weight = next(vae.autoencoder.decoder.parameters())

    def loss():
        decoded = vae.decode(vae.encode(image), 5, 6, clamp=False)
        return (decoded.double() * torch.linspace(-1, 1, decoded.numel()).view_as(decoded).double()).sum()

    for variable, gradient in zip((image, weight), torch.autograd.grad(loss(), (image, weight)), strict=True):
        direction = torch.sign(gradient)
        with torch.no_grad():
            step = 1e-3
            variable += step * direction
            above = loss()
            variable -= 2 * step * direction
            below = loss()
            variable += step * direction
        torch.testing.assert_close(
            (above - below).item() / (2 * step), gradient.abs().sum().item(), rtol=3e-2, atol=1e-3
        )


def test_scaled_latents_are_shifted_then_scaled(vae):
    latents = torch.randn(1, vae.latent_channels, 2, 3)
    config = vae.autoencoder.config
    torch.testing.assert_close(vae.scale(latents), (latents - (config.shift_factor or 0)) * config.scaling_factor)
    torch.testing.assert_close(vae.unscale(vae.scale(latents)), latents)


def test_wrong_shapes_are_named(vae, images):
    with pytest.raises(ValueError, match=r"\(2, 3, 21, 30\)"):
        vae.encode(images.permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="40 x 30"):
        vae.decode(vae.encode(images), 40, 30)
    with pytest.raises(ValueError, match=r"\(1, 9, 2, 2\)"):
        vae.decode(torch.zeros(1, 9, 2, 2), 8, 8)


def test_slicing_changes_nothing(autoencoder, images):
    together, apart = VAE(autoencoder), VAE(autoencoder, slicing=True)
    torch.testing.assert_close(apart.encode(images), together.encode(images))
    latents = together.encode(images)
    torch.testing.assert_close(apart.decode(latents, 21, 30), together.decode(latents, 21, 30))


def test_tiling_agrees_for_any_number_of_channels():
    whole, tiled = VAE(tiny_taesd()), VAE(tiny_taesd(), tiling=True, tile_size=128)
    images = torch.rand(1, 150, 301, 3)
    with torch.no_grad():
        latents = whole.encode(images)
        # Tiles overlap by 8 cells: about what a cell depends on, here up to 8 cells away but mostly much nearer.
        difference = tiled.encode(images) - latents
        assert difference.abs().max() < 0.01 * latents.abs().max()
        difference = tiled.decode(latents, 150, 301) - whole.decode(latents, 150, 301)
        assert difference.abs().max() < 0.005
        small = images[:, :100, :100]
        torch.testing.assert_close(tiled.encode(small), whole.encode(small))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_and_gives_float32(tmp_path, autoencoder, images, dtype):
    VAE(autoencoder).save(tmp_path)
    exact = VAEConfig(str(tmp_path)).setup()
    half = VAEConfig(str(tmp_path), dtype=dtype).setup()
    latents = half.encode(images)
    assert half.autoencoder.dtype == getattr(torch, dtype) and latents.dtype == torch.float32
    assert half.decode(latents, 21, 30).dtype == torch.float32
    torch.testing.assert_close(latents, exact.encode(images), atol=0.05, rtol=0.05)
    assert half.encode_settings != exact.encode_settings
    assert half.fingerprint == exact.fingerprint and half.decoder_fingerprint == exact.decoder_fingerprint


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_float16_overflow_is_noted_until_it_is_asked_for(autoencoder, images, half):
    with torch.no_grad():
        for weight in getattr(autoencoder, half).parameters():
            weight.mul_(1e4)
    vae = VAE(autoencoder, dtype=torch.float16)
    latents = vae.encode(images)
    if half == "decoder":
        vae.check_overflow()
        assert torch.isfinite(latents).all()
        with torch.inference_mode():
            vae.decode(latents, 21, 30)
        vae.scale(latents)
    with pytest.raises(UserError, match=r"--pipeline\.vae\.dtype"):
        vae.check_overflow()
    vae.check_overflow()  # once is enough
    exact = VAE(autoencoder, dtype=torch.float32)
    exact.encode(images)
    exact.check_overflow()


def test_a_new_decoder_keeps_the_fingerprint_of_the_latent_space(autoencoder):
    before = VAE(autoencoder)
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).add_(1.0)
    tuned = VAE(autoencoder)
    assert tuned.fingerprint == before.fingerprint
    assert tuned.decoder_fingerprint != before.decoder_fingerprint
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).add_(1.0)
    assert VAE(autoencoder).fingerprint != before.fingerprint


def test_options_that_change_latents_change_the_fingerprint():
    assert VAE(tiny_kl(norm_num_groups=2)).fingerprint != VAE(tiny_kl(norm_num_groups=1)).fingerprint
    assert VAE(tiny_kl(scaling_factor=1.0)).fingerprint == VAE(tiny_kl(scaling_factor=0.5)).fingerprint


def test_saving_replaces_the_older_one_as_a_whole(tmp_path, autoencoder, images):
    VAE(autoencoder).save(tmp_path / "vae")
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).mul_(0.5)
    VAE(autoencoder).save(tmp_path / "vae", dtype=torch.float32)
    loaded = VAEConfig(str(tmp_path / "vae")).setup()
    torch.testing.assert_close(loaded.encode(images), VAE(autoencoder).encode(images))
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_halves_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="shrinks by 4 but enlarges by 9"):
        VAE(tiny_taesd(upsampling_scaling_factor=3))
    with pytest.raises(UserError, match="RGB"):
        VAE(tiny_taesd(in_channels=1))
