from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import (
    assert_resumes,
    assert_survives_kill,
    batch_of,
    make_task,
    pretrain_config,
    train,
)

from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.pretrain import (
    PretrainConfig,
    build_autoencoder,
    initialize,
    reconstruction_psnr,
)
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import check_options
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, photographs) -> PretrainConfig:
    return pretrain_config(tmp_path / "vae", photographs)


def test_defaults_are_those_of_the_default_vae():
    """Those of its model card, which its first command relies on."""
    config = PretrainConfig(images=(), output=Path())
    built, shipped = build_autoencoder(config), VAEConfig().setup().autoencoder
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    recipe = {
        "steps": 3000,
        "batch_size": 8,
        "crop": 64,
        "max_reduction": 3.0,
        "learning_rate": 1.5e-3,
        "betas": (0.9, 0.999),
        "schedule": "cosine",
        "warmup_steps": 3000 * 2 // 100,
        "max_gradient_norm": 1.0,
        "ema_decay": 0.998,
        "gradient_weight": 0.5,
        "range_weight": 0.1,
        "feature_weight": 0.0,
        "lpips_weight": 0.0,
        "gan_weight": 0.0,
        "mixed_precision": "no",
        "gradient_accumulation": 1,
    }
    assert {name: getattr(config, name) for name in recipe} == recipe


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


def test_latents_of_colors_alone(config):
    autoencoder = build_autoencoder(replace(config, latent_channels=3))
    initialize(autoencoder, torch.rand(2, 3, 64, 64))
    assert all(weight.isfinite().all() for weight in autoencoder.state_dict().values())
    with pytest.raises(UserError, match="--latent-channels"):
        check_options(replace(config, latent_channels=2))


@pytest.mark.usefixtures("device")
def test_training_reconstructs_better_and_writes_a_source(config, capsys):
    config = replace(config, steps=60, batch_size=4, save_every=60, eval_images=config.images)
    before = make_task(config).evaluate()
    examples = train(config).task.examples
    vae = VAEConfig(str(config.output)).setup()
    assert vae.latent_channels == 4 and vae.spatial_factor == 4
    (name,) = before
    psnr = reconstruction_psnr(vae, sorted(config.images[0].rglob("*.png")))
    assert psnr > before[name] + 1.0
    assert f"step 60: {name} {psnr:.2f}" in capsys.readouterr().out  # of the moving average, which is what is written
    scaled = vae.scale(vae.encode(examples))
    assert abs(scaled.mean()) < 1e-3 and scaled.std() == pytest.approx(1.0, abs=1e-3)
    assert vae.scaling_factor != 1 and vae.shift_factor != 0


def test_terms_of_the_loss(config):
    task = make_task(config)
    batch = batch_of(task)
    with torch.no_grad():
        losses = task.losses(task.network, batch)
        decoded = task.vae.decode(task.vae.encode(batch["image"]), 32, 32, clamp=False)
        error, latents = decoded - batch["image"], task.vae.encode(batch["image"])
    assert set(losses.terms) == {"l1", "gradient", "range"} and task.reconstruction_terms == ("l1", "gradient")
    torch.testing.assert_close(losses.terms["l1"], error.abs().mean())
    rows, columns = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
    torch.testing.assert_close(losses.terms["gradient"], (rows.abs().mean() + columns.abs().mean()) / 2)
    torch.testing.assert_close(losses.terms["range"], (latents.abs() - 2).clamp(min=0).square().mean())
    expected = losses.terms["l1"] + 0.5 * losses.terms["gradient"] + 0.1 * losses.terms["range"]
    torch.testing.assert_close(losses.total(), expected)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 2}])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, photographs, options):
    assert_resumes(lambda output: pretrain_config(output, photographs, **options), tmp_path)


@pytest.mark.usefixtures("device")
def test_a_run_goes_on_although_another_machine_would_round_its_first_weights_otherwise(config, monkeypatch):
    train(replace(config, steps=2))
    monkeypatch.setattr("lrf_nerfstudio.training.pretrain.initialize", lambda autoencoder, images: None)
    resumed = replace(config, steps=2, resume=True)
    assert Trainer(resumed, make_task(resumed)).step == 2
    other = replace(resumed, width=16)
    with pytest.raises(UserError, match="belongs to another run: its width is 8, not 16"):
        Trainer(other, make_task(other))


def test_what_is_measured_may_change_when_a_run_goes_on(config):
    train(replace(config, steps=2))
    resumed = replace(config, steps=2, resume=True, eval_images=config.images, eval_count=1)
    assert Trainer(resumed, make_task(resumed)).step == 2


def test_missing_and_broken_photographs_are_named(config, tmp_path):
    with pytest.raises(UserError, match="no-such-folder"):
        make_task(replace(config, images=(tmp_path / "no-such-folder",)))
    with pytest.raises(UserError, match="--crop 30 must be a multiple of 4"):
        make_task(replace(config, crop=30))
    with pytest.raises(UserError, match="--encoder-blocks"):
        make_task(replace(config, encoder_blocks=(0, 1)))
    for path in config.images[0].rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"\.png is not a readable image"):
        make_task(config)
    assert not config.output.exists()


def test_evenly_chosen_photographs_are_measured(config, tmp_path):
    folder = tmp_path / "held out"
    folder.mkdir()
    for i in range(10):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((16, 16, 3), 20 * i, np.uint8))
    task = make_task(replace(config, eval_images=(folder,), eval_count=3))
    assert [path.name for path in task._eval_paths[folder]] == ["0.png", "3.png", "6.png"]


def test_the_command_goes_on_after_kill_9(photographs, tmp_path):
    options = ["--images", photographs, "--width", 8, "--encoder-blocks", 0, 0, 1, "--decoder-blocks", 1, 1, 0]
    options += ["--batch-size", 2, "--crop", 32, "--workers", 1]
    whole, _ = assert_survives_kill("pretrain", options, tmp_path, steps=30)
    assert VAEConfig(str(whole)).setup().spatial_factor == 4
