import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pairs import write_pairs
from tiny_runs import QUICK, assert_same_state, state, write_kl, write_tiny

from lrf_nerfstudio.training.loop import FineTuner
from lrf_nerfstudio.training.stage3 import Stage3, Stage3Config
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune_stage3.py"


@pytest.fixture(scope="module", params=["tiny", "kl"])
def vae(request, tmp_path_factory) -> str:
    return {"tiny": write_tiny, "kl": write_kl}[request.param](tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pairs(vae, tmp_path_factory) -> Path:
    """Two scenes, one of them with masks; the sides of the photographs are odd."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "plain", vae, "nttt", size=(75, 99))
    write_pairs(folder / "masked", vae, "ntt", size=(81, 75), masked=True)
    return folder


def config_of(output: Path, vae: str, pairs: Path, **options) -> Stage3Config:
    return Stage3Config(output=output, vae=vae, pairs=pairs, **(QUICK | {"margin": 1} | options))


def tune(config: Stage3Config) -> FineTuner:
    tuner = FineTuner(config, Stage3(config))
    tuner.run()
    return tuner


def batch_of(task: Stage3, size: int = 8) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([task.dataset[index] for index in range(size)])


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def test_the_decoder_gets_better_and_the_encoder_stays_bit_by_bit(tmp_path, vae, pairs):
    config = config_of(tmp_path / "run", vae, pairs, steps=60, save_every=60, learning_rate=5e-3, ema_decay=0.9)
    tuner = tune(config)
    before, after = weights_of(vae), weights_of(config.output)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if name.startswith(("decoder", "post_quant_conv")):
            assert not torch.equal(after[name], weight), name
        else:
            assert after[name].dtype == weight.dtype and torch.equal(after[name], weight), name

    original, tuned = VAEConfig(vae).setup(), VAEConfig(str(config.output)).setup()
    assert tuned.fingerprint == original.fingerprint
    assert tuned.decoder_fingerprint != original.decoder_fingerprint
    task = Stage3(config_of(tmp_path / "other", vae, pairs, seed=1))
    batch, losses = batch_of(task), {}
    for name, autoencoder in (("before", original), ("after", tuned)):
        task.vae.load_state_dict(autoencoder.state_dict())
        with torch.no_grad():
            losses[name] = task.losses(task.network, batch).terms
    for kind in ("train", "novel"):
        assert losses["after"][kind] < 0.8 * losses["before"][kind]
    assert len(tuner.ema.shadow_params) == sum(name.startswith(("decoder", "post_quant_conv")) for name in before)


def test_half_precision_weights_keep_their_fingerprint(tmp_path, pairs, vae):
    VAEConfig(vae).setup().save(tmp_path / "half", dtype=torch.float16)
    half = VAEConfig(str(tmp_path / "half")).setup()
    write_pairs(tmp_path / "pairs" / "scene", half.source)
    config = config_of(tmp_path / "run", half.source, tmp_path / "pairs", steps=2)
    tune(config)
    assert VAEConfig(str(config.output)).setup().fingerprint == half.fingerprint


def test_terms_of_the_loss(tmp_path, vae, pairs):
    task = Stage3(config_of(tmp_path / "run", vae, pairs, margin=0))
    batch = batch_of(task)
    assert batch["novel"].tolist() == [False, True] * 4
    losses = task.losses(task.network, batch)
    assert set(losses.terms) == {"train", "novel"}
    cells = 32 // task.vae.spatial_factor
    assert batch["latent"].shape[-1] == cells
    decoded = task.vae.decode(batch["latent"], 32, 32, clamp=False)
    for name, kind in (("train", 0), ("novel", 1)):
        chosen = batch["counts"][kind::2]
        expected = (decoded - batch["image"])[kind::2].abs()[chosen].mean()
        torch.testing.assert_close(losses.terms[name], expected)
    assert losses.total.item() == pytest.approx(0.5 * sum(losses.terms.values()).item(), rel=1e-6)
    assert 0 < batch["counts"].float().mean() < 1


def test_pixels_that_do_not_count_do_not_count(tmp_path, vae, pairs):
    task = Stage3(config_of(tmp_path / "run", vae, pairs, feature_weight=1.0))
    batch = batch_of(task)
    changed = dict(batch, image=torch.where(batch["counts"][..., None], batch["image"], 1 - batch["image"]))
    one, other = (task.losses(task.network, b) for b in (batch, changed))
    for name in ("train", "novel"):
        torch.testing.assert_close(one.terms[name], other.terms[name])
    assert torch.equal(one.decoded[~batch["counts"]], one.images[~batch["counts"]])
    nothing = task.losses(task.network, dict(batch, counts=torch.zeros_like(batch["counts"])))
    assert nothing.total == 0


def test_perceptual_losses(tmp_path, vae, pairs, monkeypatch, capsys):
    from torchvision.models import vgg16

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tune(config_of(tmp_path / "without", vae, pairs, steps=1, lpips_weight=1.0))
    assert capsys.readouterr().out.count("LPIPS is left out") == 1
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(vgg16(weights=None).state_dict(), folder / "vgg16-397923af.pth")
    task = Stage3(config_of(tmp_path / "run", vae, pairs, lpips_weight=1.0, feature_weight=2.0))
    assert task.reconstruction_terms == ("train", "novel", "features", "lpips")
    losses = task.losses(task.network, batch_of(task, 2))
    assert set(losses.terms) == {"train", "novel", "lpips", "features"}
    (losses.terms["lpips"] + losses.terms["features"]).backward()
    for name, parameter in task.vae.autoencoder.named_parameters():
        if name.startswith(("decoder", "post_quant_conv")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("options", [{}, {"gan_weight": 0.5, "gan_start": 3}])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, vae, pairs, options):
    whole = config_of(tmp_path / "whole", vae, pairs, **options)
    tune(whole)
    config = config_of(tmp_path / "resumed", vae, pairs, **options)
    interrupted = FineTuner(config, Stage3(config))
    train_on, steps = interrupted.train_on, []

    def die(batch):
        steps.append(0)
        if len(steps) > 5:
            raise KeyboardInterrupt
        return train_on(batch)

    interrupted.train_on = die
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    config.resume = True
    tune(config)
    assert_same_state(state(config.output), state(whole.output))


def test_pictures_show_photographs_beside_what_is_decoded(tmp_path, vae, pairs):
    task = Stage3(config_of(tmp_path / "run", vae, pairs))
    batch = batch_of(task, 2)
    picture = task.pictures(batch, task.losses(task.network, batch))
    assert picture.shape == (3, 32 + 4, 4 * 34 + 2)
    assert torch.equal(picture[:, 2:34, 2:34], batch["image"][0].permute(2, 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 33}, "--crop 33 is no multiple"),
        ({"crop": 96}, "smaller than a crop with its margin"),
        ({"batch_size": 3}, "--batch-size 3 is odd"),
        ({"margin": -1}, "--margin -1"),
        ({"pairs": Path("nowhere")}, "no pairs in nowhere"),
        ({"vae": "lrf-f4c4"}, "built with the VAE"),
    ],
)
def test_mistakes_are_named(tmp_path, pairs, vae, options, message):
    arguments = {"vae": vae, "pairs": pairs} | options
    with pytest.raises(UserError, match=message):
        Stage3(config_of(tmp_path / "run", **arguments))
    assert not (tmp_path / "run").exists()


def test_the_command_goes_on_after_kill_9(tmp_path):
    vae = write_tiny(tmp_path / "vae")
    write_pairs(tmp_path / "pairs" / "scene", vae)

    def command(output: Path, *more: str) -> list[str]:
        options = ["--pairs", tmp_path / "pairs", "--vae", vae, "--output", output, "--crop", 32, "--steps", 30]
        options += ["--save-every", 1, "--batch-size", 2, "--workers", 1, "--device", "cpu"]
        return [sys.executable, str(SCRIPT), *map(str, options), *more]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ((killed / "checkpoint.pt").exists() and state(killed)["step"] >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 3 <= state(killed)["step"] < 30
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True)
    assert_same_state(state(killed), state(whole))
    again = subprocess.run(command(whole), capture_output=True, text=True)
    assert again.returncode == 1 and "holds a run already" in again.stderr and "Traceback" not in again.stderr
