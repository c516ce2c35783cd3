import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lrf_nerfstudio.training.pretrain import (
    TrainVAEConfig,
    VAETrainer,
    build_autoencoder,
    image_loss,
    initialize,
    learning_rate_factor,
    random_crop,
    random_warps,
    warp,
)
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """More than one costs networks of this size more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path):
    """A run of seconds, on two small photographs."""
    import cv2

    generator = np.random.default_rng(0)
    for i in range(2):
        coarse = generator.uniform(0, 255, (5, 7, 3)).astype(np.float32)
        image = cv2.resize(coarse, (70, 50), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
        (tmp_path / "photos" / "nested").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "photos" / "nested" / f"{i}.png"), image)
    return TrainVAEConfig(
        images=(tmp_path / "photos",),
        output=tmp_path / "vae",
        latent_channels=4,
        width=8,
        encoder_blocks=(0, 0, 1),
        decoder_blocks=(1, 1, 0),
        steps=12,
        batch_size=4,
        crop=32,
        save_every=6,
        device="cpu",
    )


def train(config):
    losses = []
    trainer = VAETrainer(config)
    trainer.run(lambda step, values: losses.append(values["loss"]) if "loss" in values else None)
    return trainer, losses


def test_defaults_are_those_of_the_default_vae():
    built = build_autoencoder(TrainVAEConfig(images=(), output=Path()))
    shipped = VAEConfig().setup().autoencoder
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}


def test_it_starts_from_averaging_and_bilinear_interpolation(config):
    """Away from the border, where the networks see zeros."""
    autoencoder = build_autoencoder(replace(config, encoder_blocks=(0, 1), decoder_blocks=(1, 0)))
    image = torch.rand(1, 3, 64, 64)
    initialize(autoencoder, image)
    binomial = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(binomial, binomial).expand(3, 1, 3, 3)
    averaged = F.conv2d(image, kernel, stride=2, padding=1, groups=3)
    with torch.no_grad():
        latent = autoencoder.encode(image * 2 - 1).latents
        decoded = autoencoder.decode(latent).sample / 2 + 0.5
    torch.testing.assert_close(latent[:, :3], 3 * (averaged - 0.5), atol=1e-5, rtol=1e-5)
    expected = F.interpolate(torch.tanh(averaged - 0.5) + 0.5, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(decoded[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], atol=1e-5, rtol=1e-5)


def test_the_further_latent_channels_start_uncorrelated_with_unit_variance(config):
    autoencoder = build_autoencoder(replace(config, latent_channels=6))
    images = torch.rand(8, 3, 64, 64)
    initialize(autoencoder, images)
    with torch.no_grad():
        detail = autoencoder.encode(images * 2 - 1).latents[:, 3:].movedim(1, 0).flatten(1)
    torch.testing.assert_close(torch.cov(detail), torch.eye(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(detail.mean(1), torch.zeros(3), atol=1e-2, rtol=0)


def test_training_reconstructs_better_and_writes_a_source(config):
    trainer, losses = train(replace(config, steps=40, eval_images=config.images))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    vae = VAEConfig(str(config.output)).setup()
    assert vae.latent_channels == 4 and vae.spatial_factor == 4
    assert {w.dtype for w in load_file(config.output / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    (psnr,) = trainer.evaluate().values()
    assert psnr > 15
    scaled = vae.scale(vae.encode(trainer.batch(1000)[0].permute(0, 2, 3, 1)))
    assert abs(scaled.mean()) < 0.5 and 0.7 < scaled.std() < 1.4
    assert vae.scaling_factor != 1 and vae.shift_factor != 0


def test_a_step_sees_the_same_crops_at_every_run_and_others_see_others(config):
    first, second = VAETrainer(config), VAETrainer(config)
    for ours, theirs in zip(first.batch(5), second.batch(5), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(first.batch(5)[0], first.batch(6)[0])
    assert not torch.equal(first.batch(5)[0], VAETrainer(replace(config, seed=1)).batch(5)[0])


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(config):
    options = ["--images", *map(str, config.images), "--output", str(config.output), "--device", "cpu"]
    for name in ("latent_channels", "width", "encoder_blocks", "decoder_blocks", "batch_size", "crop", "save_every"):
        value = getattr(config, name)
        options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    options += ["--steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}  # sums depend on threads
    process = subprocess.Popen([sys.executable, REPOSITORY / "scripts/train_vae.py", *options], env=environment)
    checkpoint = config.output / "checkpoint.pt"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

    reached = torch.load(checkpoint, weights_only=True)["step"]
    steps = reached + 6
    ours = VAETrainer(replace(config, steps=100000, resume=True))
    fresh = VAETrainer(replace(config, steps=100000, output=config.output.with_name("fresh")))
    assert ours.step == reached
    for trainer in (ours, fresh):
        while trainer.step < steps:
            trainer.train_step(*trainer.batch(trainer.step))
    for a, b in zip(ours.ema.parameters(), fresh.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_existing_run_is_neither_overwritten_nor_mixed_with_another(config):
    with pytest.raises(UserError, match="--resume"):
        VAETrainer(replace(config, resume=True))
    VAETrainer(config).save()
    with pytest.raises(UserError, match="--resume"):
        VAETrainer(config)
    with pytest.raises(UserError, match="other options"):
        VAETrainer(replace(config, resume=True, width=16))


def test_missing_and_broken_photographs_are_named(config, tmp_path):
    with pytest.raises(UserError, match="no-such-folder"):
        VAETrainer(replace(config, images=(tmp_path / "no-such-folder",)))
    for path in config.images[0].rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"\.png is not a readable image"):
        VAETrainer(config)
    with pytest.raises(UserError, match="--crop"):
        build_autoencoder(replace(config, crop=30))


def test_crops_are_cut_from_inside_and_keep_their_range():
    rng = np.random.default_rng(0)
    image = np.zeros((40, 300, 3), np.uint8)
    image[..., 1] = 255
    for _ in range(20):
        crop = random_crop(image, 32, 3.0, rng)
        assert crop.shape == (32, 32, 3) and 0 <= crop.min() and crop.max() <= 1
        assert (crop == crop[0, 0]).all()


def test_the_identity_warp_changes_nothing_and_a_shift_shifts():
    theta = random_warps(2, 0.0, np.random.default_rng(0))
    x = torch.rand(2, 3, 8, 8)
    warped, inside = warp(x, theta)
    torch.testing.assert_close(warped, x, atol=1e-5, rtol=1e-5)
    assert inside.all()
    theta[:, 0, 2] = 2 * 2 / 8  # by two of eight samples
    warped, inside = warp(x, theta)
    torch.testing.assert_close(warped[..., :6], x[..., 2:], atol=1e-5, rtol=1e-5)
    assert inside[..., :6].all() and not inside[..., 6:].any()


def test_images_and_their_latents_are_warped_alike():
    """Both see the same function of the plane, sampled at the centres of pixels and of cells of 8 x 8 pixels."""

    def sampled(size):
        centers = (torch.arange(size) + 0.5) / size * 2 - 1
        return torch.sin(3 * centers[:, None] + 2 * centers)[None, None]

    theta = random_warps(1, 1.0, np.random.default_rng(1))
    image, _ = warp(sampled(128), theta)
    cells, inside = warp(sampled(16), theta)
    difference = (F.avg_pool2d(image, 8) - cells).abs()
    away_from_the_border = F.max_pool2d(1 - inside, 3, stride=1, padding=1) == 0
    assert away_from_the_border.float().mean() > 0.3
    assert (difference * away_from_the_border).max() < 0.02


def test_the_loss_by_hand():
    target = torch.zeros(1, 3, 2, 2)
    prediction = target.clone()
    prediction[0, :, 0, 0] = 1.0  # one pixel of four is wrong by 1
    weight = torch.ones(1, 1, 2, 2)
    # Of the two horizontal and the two vertical differences, one each is wrong by 1.
    assert image_loss(prediction, target, weight, 0.0).item() == pytest.approx(1 / 4)
    assert image_loss(prediction, target, weight, 2.0).item() == pytest.approx(1 / 4 + 1 / 2 + 1 / 2)
    weight[0, 0, 0, 0] = 0.0
    assert image_loss(prediction, target, weight, 2.0).item() == 0.0


def test_the_learning_rate_rises_then_falls_to_one_percent():
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 20) and max(factors) == 1.0 and factors[20] == 1.0
    assert all(a >= b for a, b in pairwise(factors[20:]))
    assert factors[-1] == pytest.approx(0.01, abs=1e-3)
    assert math.isclose(learning_rate_factor(0, 1), 1.0)


def test_the_trained_average_is_what_is_written(config):
    trainer, _ = train(config)
    written = VAEConfig(str(config.output)).setup()
    images = trainer.batch(0)[0].permute(0, 2, 3, 1)
    torch.testing.assert_close(written.encode(images), VAE(trainer.ema).encode(images), atol=2e-2, rtol=2e-2)
