"""Stable Diffusion's latent space and checkpoints in the layout that the method's authors publish, from local files.

The weights are random and as many as in the real files.
"""

import pytest
import torch
import yaml
from commands import run
from latent_diffusion import ldm_layout, stable_diffusion_autoencoder
from tiny_scenes import write_scene

pytestmark = pytest.mark.slow

STEPS = ("--max-num-iterations", 3, "--vis", "tensorboard", "--timestamp", "run")


def train_and_evaluate(method, scene, output, *options, env=None):
    """Train for three steps, evaluate; the run's folder."""
    run("ns-train", method, "--data", scene, "--output-dir", output, *STEPS, *options, env=env).check()
    folder = output / scene.name / method / "run"
    metrics = output / "metrics.json"
    run("ns-eval", "--load-config", folder / "config.yml", "--output-path", metrics, env=env).check()
    assert "ceiling_psnr" in metrics.read_text()
    return folder


def test_latent_splatfacto_sd_takes_its_autoencoder_from_the_hub(tmp_path):
    repository = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    stable_diffusion_autoencoder().save_pretrained(repository / "snapshots" / "0123abc")
    scene = write_scene(tmp_path / "scene")
    precision = () if torch.cuda.is_available() else ("--pipeline.vae.dtype", "bfloat16")  # float16 crawls on CPUs
    env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    folder = train_and_evaluate("latent-splatfacto-sd", scene, tmp_path / "out", *precision, env=env)
    config = yaml.load((folder / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.pipeline.vae.source == "stabilityai/sd-vae-ft-mse"
    assert config.pipeline.vae.tiling and config.pipeline.vae.slicing


def test_a_checkpoint_of_the_authors_layout(tmp_path):
    """A Lightning checkpoint of an autoencoder in latent diffusion's layout, with the rest of a training beside it."""
    weights = ldm_layout(stable_diffusion_autoencoder())
    beside = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4)}
    torch.save({"state_dict": weights | beside, "epoch": 1, "global_step": 2}, tmp_path / "lrf.ckpt")
    scene = write_scene(tmp_path / "scene")
    source = ("--pipeline.vae.source", tmp_path / "lrf.ckpt")
    train_and_evaluate("latent-splatfacto", scene, tmp_path / "out", *source)
