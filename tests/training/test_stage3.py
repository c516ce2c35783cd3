from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pairs import write_pairs
from tiny_runs import assert_resumes, assert_survives_kill, batch_of, stage3_config, train, write_kl, write_tiny

from lrf_nerfstudio.training.data.latent_crops import cut
from lrf_nerfstudio.training.stage3 import Stage3
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow


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


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


@pytest.mark.usefixtures("device")
def test_the_decoder_gets_better_and_the_encoder_stays_bit_by_bit(tmp_path, vae, pairs):
    config = stage3_config(tmp_path / "run", vae, pairs, steps=60, save_every=60, learning_rate=5e-3, ema_decay=0.9)
    trainer = train(config)
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
    task = Stage3(stage3_config(tmp_path / "other", vae, pairs, seed=1))
    batch, losses = batch_of(task, 8), {}
    for name, autoencoder in (("before", original), ("after", tuned)):
        task.vae.load_state_dict(autoencoder.state_dict())
        with torch.no_grad():
            losses[name] = task.losses(task.network, batch).terms
    for kind in ("train", "novel"):
        assert losses["after"][kind] < 0.8 * losses["before"][kind]
    assert len(trainer.ema.shadow_params) == sum(name.startswith(("decoder", "post_quant_conv")) for name in before)


def test_half_precision_weights_keep_their_fingerprint(tmp_path, pairs, vae):
    VAEConfig(vae).setup().save(tmp_path / "half", dtype=torch.float16)
    half = VAEConfig(str(tmp_path / "half")).setup()
    write_pairs(tmp_path / "pairs" / "scene", half.source)
    config = stage3_config(tmp_path / "run", half.source, tmp_path / "pairs", steps=2)
    train(config)
    assert VAEConfig(str(config.output)).setup().fingerprint == half.fingerprint


def test_terms_of_the_loss(tmp_path, vae, pairs):
    task = Stage3(stage3_config(tmp_path / "run", vae, pairs, margin=0))
    batch = batch_of(task, 8)
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
    assert losses.total().item() == pytest.approx(0.5 * sum(losses.terms.values()).item(), rel=1e-6)
    assert 0 < batch["counts"].float().mean() < 1


def test_pixels_that_do_not_count_do_not_count(tmp_path, vae, pairs, weights_in_cache):
    task = Stage3(stage3_config(tmp_path / "run", vae, pairs, feature_weight=1.0))
    batch = batch_of(task, 8)
    changed = dict(batch, image=torch.where(batch["counts"][..., None], batch["image"], 1 - batch["image"]))
    one, other = (task.losses(task.network, b) for b in (batch, changed))
    for name in ("train", "novel"):
        torch.testing.assert_close(one.terms[name], other.terms[name])
    assert torch.equal(one.decoded[~batch["counts"]], one.images[~batch["counts"]])
    nothing = task.losses(task.network, dict(batch, counts=torch.zeros_like(batch["counts"])))
    assert nothing.total() == 0


def test_what_is_left_out_is_said_once(tmp_path, vae, pairs, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    train(stage3_config(tmp_path / "without", vae, pairs, steps=1, lpips_weight=1.0))
    assert capsys.readouterr().out.count("LPIPS is left out") == 1


def test_clean_samples_are_what_the_encoder_makes_of_the_photograph(tmp_path, vae, pairs):
    task = Stage3(stage3_config(tmp_path / "run", vae, pairs, clean_share=0.5))
    batch = batch_of(task, 16)
    clean = batch["clean"]
    assert 0 < clean.float().mean() < 1
    losses = task.losses(task.network, batch)
    assert set(losses.terms) == {"train", "novel"}
    side = batch["surroundings"].shape[1]
    for is_clean, latents in (
        (False, batch["latent"]),
        (True, task.vae.encode(batch["surroundings"])),
    ):
        decoded = task.vae.decode(latents, side, side, clamp=False)
        expected = cut(decoded, batch["place"], task.dataset.cells, task.vae.spatial_factor)
        compared = (clean == is_clean)[:, None, None] & batch["counts"]
        torch.testing.assert_close(losses.decoded[compared], expected[compared])
    losses.total().backward()
    encoder = [w for name, w in task.vae.autoencoder.named_parameters() if name.startswith(("encoder", "quant_conv"))]
    assert all(weight.grad is None for weight in encoder)


def test_perceptual_losses_reach_the_decoder_alone(tmp_path, vae, pairs, weights_in_cache):
    task = Stage3(stage3_config(tmp_path / "run", vae, pairs, lpips_weight=1.0, feature_weight=2.0))
    assert task.reconstruction_terms == ("train", "novel", "features", "lpips")
    losses = task.losses(task.network, batch_of(task, 2))
    assert set(losses.terms) == {"train", "novel", "lpips", "features"}
    (losses.terms["lpips"] + losses.terms["features"]).backward()
    for name, parameter in task.vae.autoencoder.named_parameters():
        if name.startswith(("decoder", "post_quant_conv")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, {"gan_weight": 0.5, "gan_start": 3}])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, vae, pairs, weights_in_cache, options):
    assert_resumes(lambda output: stage3_config(output, vae, pairs, **options), tmp_path)


def test_pictures_show_photographs_beside_what_is_decoded(tmp_path, vae, pairs):
    task = Stage3(stage3_config(tmp_path / "run", vae, pairs))
    batch = batch_of(task, 2)
    picture = task.pictures(batch, task.losses(task.network, batch))
    assert picture.shape == (3, 32 + 4, 4 * 34 + 2)
    assert torch.equal(picture[:, 2:34, 2:34], batch["image"][0].permute(2, 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 33}, "--crop 33 must be a multiple"),
        ({"crop": 96}, "smaller than a crop with its margin"),
        ({"batch_size": 3}, "--batch-size 3 is odd"),
        ({"pairs": Path("nowhere")}, "no pairs in nowhere"),
        ({"vae": "lrf-f4c4"}, "built with the VAE"),
    ],
)
def test_mistakes_are_named(tmp_path, pairs, vae, options, message):
    arguments = {"vae": vae, "pairs": pairs} | options
    with pytest.raises(UserError, match=message):
        Stage3(stage3_config(tmp_path / "run", **arguments))
    assert not (tmp_path / "run").exists()


def test_the_command_goes_on_after_kill_9(tmp_path):
    vae = write_tiny(tmp_path / "vae")
    write_pairs(tmp_path / "pairs" / "scene", vae)
    options = ["--pairs", tmp_path / "pairs", "--vae", vae, "--crop", 32, "--batch-size", 2, "--workers", 1]
    assert_survives_kill("stage3", options, tmp_path, steps=30)
