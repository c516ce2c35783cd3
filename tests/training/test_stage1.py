import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shifted_views import coordinate_picture, shifted_views
from tiny_runs import assert_survives_kill, batch_of, stage1_config, train, write_kl, write_tiny

from lrf_nerfstudio.commands import finetune_stage1
from lrf_nerfstudio.correspondence import SceneCorrespondences
from lrf_nerfstudio.evaluation.latents import measure_scene
from lrf_nerfstudio.training.data.pair_crops import PairCrops
from lrf_nerfstudio.training.networks import exchange
from lrf_nerfstudio.training.stage1 import Stage1, load_scenes
from lrf_nerfstudio.utils.cli import run
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> SceneCorrespondences:
    return shifted_views(tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module", params=["tiny", "kl"])
def vae(request, tmp_path_factory) -> str:
    return {"tiny": write_tiny, "kl": write_kl}[request.param](tmp_path_factory.mktemp("vae"))


@pytest.mark.usefixtures("device")
def test_tuning_makes_corresponding_latents_agree_without_shrinking_them(tmp_path, scene, vae):
    weights = {"correspondence_weight": 2.0, "deviation_weight": 5.0}
    config = stage1_config(tmp_path / "run", vae, steps=200, save_every=200, learning_rate=2e-3, **weights)
    train(config, [scene])
    vaes = {"before": VAEConfig(vae).setup(), "after": VAEConfig(str(config.output)).setup()}
    measures = measure_scene(scene, vaes, "before")
    assert measures["after"].inconsistency < 0.85 * measures["before"].inconsistency
    assert measures["after"].latent_std_ratio == pytest.approx([1.0] * vaes["after"].latent_channels, abs=0.35)
    assert measures["after"].reconstruction_psnr > measures["before"].reconstruction_psnr


def test_terms_of_the_loss(tmp_path, scene, vae):
    task = Stage1(stage1_config(tmp_path / "run", vae, synthetic_share=0.0), [scene])
    batch = batch_of(task)
    losses = task.losses(task.network, batch)
    expected = {"l1", "correspondence", "regularization", "deviation"}
    is_kl = "AutoencoderKL" in Path(vae, "config.json").read_text()
    assert set(losses.terms) == (expected | {"kl"} if is_kl else expected)
    assert losses.terms["regularization"] < 1e-5 and losses.terms["deviation"] < 1e-5  # nothing is tuned yet
    weighted = sum(task.weights[name] * value.item() for name, value in losses.terms.items())
    assert losses.total().item() == pytest.approx(weighted, rel=1e-5)
    torch.testing.assert_close(losses.images, batch["images"].flatten(0, 1))
    if not is_kl:  # nothing is drawn then: the decoded pictures are those of the interface
        images = batch["images"].flatten(0, 1)
        decoded = task.original.decode(task.original.encode(images), 32, 32, clamp=False)
        torch.testing.assert_close(losses.decoded, decoded)
        torch.testing.assert_close(losses.terms["l1"], (decoded - images).abs().mean())


def test_the_original_decoder_is_asked_about_the_tuned_latents(tmp_path, scene, vae):
    """Its loss is that of the original decoder, teaches the encoder alone, and leaves the original as it is."""
    task = Stage1(stage1_config(tmp_path / "run", vae, original_decoder_weight=2.0, synthetic_share=0.0), [scene])
    with torch.no_grad():
        for weight in task.vae.autoencoder.parameters():
            weight *= 1.05
    batch = batch_of(task)
    losses = task.losses(task.network, batch)
    images = batch["images"][:, 0]
    seen = task.original.decode(task.vae.encode(images), 32, 32, clamp=False)
    torch.testing.assert_close(losses.terms["original decoder"], (seen - images).abs().mean())
    losses.terms["original decoder"].backward()
    for name, weight in task.vae.autoencoder.named_parameters():
        assert (weight.grad is None) == name.startswith(("decoder", "post_quant_conv")), name
    assert all(weight.grad is None for weight in task.original.parameters())


def test_scenes_that_cannot_be_used_are_left_out(demo_scene, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    scenes = (tmp_path / "empty", demo_scene, demo_scene)
    loaded = load_scenes(stage1_config(tmp_path / "run", "vae", scenes=scenes))
    assert [of_scene.scene.folder for of_scene in loaded] == [demo_scene, demo_scene]
    assert f"The scene {tmp_path / 'empty'} is left out." in capsys.readouterr().err
    with pytest.raises(UserError, match="None of --scenes can be used"):
        load_scenes(stage1_config(tmp_path / "run", "vae", scenes=(tmp_path / "empty", tmp_path / "nowhere")))


def test_corresponding_points_are_compared_where_the_photographs_show_them(tmp_path, scene, vae):
    """Among all displacements of the second view's points, the true one has the least difference."""
    task = Stage1(stage1_config(tmp_path / "run", vae, synthetic_share=0.0, max_reduction=1.0), [scene])
    factor = task.vae.spatial_factor
    losses = {}
    for displacement in (-2 * factor, -factor, 0, factor, 2 * factor):
        values = []
        for index in range(10):
            batch = torch.utils.data.default_collate([task.dataset[index]])
            batch["points"][:, 1, :, 0] += displacement
            values.append(task.losses(task.network, batch).terms["correspondence"].item())
        losses[displacement] = np.mean(values)
    assert min(losses, key=losses.get) == 0
    assert losses[0] < 0.7 * min(value for displacement, value in losses.items() if displacement)


def test_the_posterior_is_sampled_where_there_is_one(tmp_path, scene, vae):
    task = Stage1(stage1_config(tmp_path / "run", vae, synthetic_share=0.0), [scene])
    batch = batch_of(task)
    is_kl = "AutoencoderKL" in Path(vae, "config.json").read_text()
    assert ("noise" in batch) == is_kl
    decoded_latents = []
    task.vae.autoencoder.decoder.register_forward_pre_hook(lambda module, inputs: decoded_latents.append(inputs[0]))
    with torch.no_grad():
        task.losses(task.network, batch)
        latents, logvar, _ = task.network(batch["images"].flatten(0, 1))
    expected = latents
    if is_kl:
        expected = latents + (0.5 * logvar).exp() * batch["noise"].flatten(0, 1)
        expected, latents = (task.vae.autoencoder.post_quant_conv(z) for z in (expected, latents))
    torch.testing.assert_close(decoded_latents[0], expected)
    torch.testing.assert_close(decoded_latents[1], latents)  # the mode, where no noise is given


def test_perceptual_losses_reach_all_weights(tmp_path, scene, weights_in_cache):
    task = Stage1(stage1_config(tmp_path / "run", write_tiny(tmp_path / "vae"), feature_weight=0.1), [scene])
    assert task.reconstruction_terms == ("l1", "features")
    losses = task.losses(task.network, batch_of(task))
    losses.terms["features"].backward()
    gradients = [parameter.grad for parameter in task.vae.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_an_autoencoder_without_weights_is_refused(tmp_path, scene):
    with pytest.raises(UserError, match=r"rgb .*no weights"):
        train(stage1_config(tmp_path / "run", "rgb"), [scene])


def test_what_is_left_out_is_said_once(tmp_path, scene, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    train(stage1_config(tmp_path / "run", write_tiny(tmp_path / "vae"), steps=2, lpips_weight=1.0), [scene])
    assert capsys.readouterr().out.count("LPIPS is left out") == 1


def test_the_crops_of_a_synthetic_pair_are_decoded_from_each_others_latents(tmp_path, monkeypatch):
    """Latents that say where in the scene they are stay as they are when the other crop's take their places."""
    monkeypatch.setattr("lrf_nerfstudio.training.data.pair_crops.random_recoloring", lambda rng: lambda pixels: pixels)
    coordinates = shifted_views(tmp_path, picture=coordinate_picture)
    factor, shares = 4, []
    dataset = PairCrops([coordinates], crop=48, margin=4, max_reduction=2.0, synthetic_share=0.5)
    for index in range(20):
        item = dataset[index]
        latents = F.avg_pool2d(item["images"].permute(0, 3, 1, 2), factor) * 255
        exchanged = exchange(latents, item["to_other"], factor)
        torch.testing.assert_close(exchanged[:, :2], latents[:, :2], atol=1.0, rtol=0)
        marks = torch.stack([torch.zeros(1, 12, 12), torch.ones(1, 12, 12)])
        marked = exchange(marks, item["to_other"], factor)
        if item["to_other"].isfinite().all():
            shares.append(float(marked[0].mean()))
        else:
            assert marked[:, 0].mean(dim=(1, 2)).tolist() == [0, 1]
    assert len(shares) > 5 and 0.3 < np.mean(shares) < 0.9


@pytest.mark.usefixtures("device")
def test_the_decoder_alone_is_tuned(tmp_path, scene, vae, weights_in_cache):
    config = stage1_config(tmp_path / "run", vae, tune="decoder", feature_weight=0.1, gan_weight=0.4, gan_start=2)
    train(config, [scene])
    task = Stage1(config, [scene])
    assert set(task.losses(task.network, batch_of(task)).terms) == {"l1", "features"}
    before, after = VAEConfig(vae).setup(), VAEConfig(str(config.output)).setup()
    assert after.fingerprint == before.fingerprint  # latents that are cached, and fields, stay of use
    assert after.decoder_fingerprint != before.decoder_fingerprint


def test_a_crop_that_does_not_fit_the_autoencoder(tmp_path, scene):
    vae = write_tiny(tmp_path / "vae")
    with pytest.raises(UserError, match="--crop 34 must be a multiple of 4"):
        Stage1(stage1_config(tmp_path / "run", vae, crop=34), [scene])


def test_an_autoencoder_without_encoder(tmp_path, scene):
    from safetensors.torch import load_file, save_file

    folder = Path(write_tiny(tmp_path / "vae"))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    decoder = {name: weight for name, weight in weights.items() if name.startswith("decoder")}
    save_file(decoder, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{folder}"):
        Stage1(stage1_config(tmp_path / "run", str(folder)), [scene])


def options_for(scene: Path, vae: str) -> list[object]:
    return [
        *("--scenes", scene, "--vae", vae, "--crop", 64, "--max-reduction", 1.2),
        *("--batch-size", 1, "--workers", 1, "--learning-rate", 1e-3),
    ]


def test_the_command_goes_on_after_kill_9_and_latent_splatfacto_takes_the_result(demo_scene, tmp_path):
    vae = write_tiny(tmp_path / "vae")
    _, killed = assert_survives_kill("stage1", options_for(demo_scene, vae), tmp_path, steps=12)
    tuned, original = VAEConfig(str(killed)).setup(), VAEConfig(vae).setup()
    assert tuned.fingerprint != original.fingerprint
    assert tuned.scaling_factor == original.scaling_factor
    config = json.loads((killed / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderTiny"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--scenes": "nowhere"}, "nowhere"),
        ({"--vae": "no-such-autoencoder"}, "no-such-autoencoder"),
        ({"--crop": 128}, "smaller than the crop of 128"),
        ({"--correspondence.source": "sfm"}, "COLMAP model"),
        ({"--correspondence.min-matches": 100000}, "min_matches"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_message(demo_scene, tmp_path, capsys, change, message):
    scene = shutil.copytree(demo_scene, tmp_path / "scene", ignore=shutil.ignore_patterns("colmap"))
    options = [*options_for(scene, write_tiny(tmp_path / "vae")), "--output", tmp_path / "run", "--device", "cpu"]
    for name, value in change.items():
        if name in options:
            options[options.index(name) + 1] = value
        else:
            options += [name, value]
    with pytest.raises(SystemExit) as exit_:
        run(finetune_stage1.main, list(map(str, options)))
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.realdata
def test_real_photographs_and_a_real_autoencoder(real_data, tmp_path):
    from lrf_nerfstudio.correspondence import CorrespondenceConfig, find_correspondences, load_scene

    scene = find_correspondences(load_scene(real_data / "scenes" / "banana"), CorrespondenceConfig())
    config = stage1_config(
        tmp_path / "run", str(real_data / "weights" / "taesd"), crop=64, steps=12, save_every=12, learning_rate=2e-4
    )
    tuner = train(config, [scene])
    before, after = tuner.task.original, VAEConfig(str(config.output)).setup()
    dataset = PairCrops([scene], crop=64, margin=8, seed=1)
    task = Stage1(stage1_config(tmp_path / "other", config.vae, crop=64), [scene])
    batches = [torch.utils.data.default_collate([dataset[index]]) for index in range(8)]
    losses = {}
    for name, vae in (("before", before), ("after", after)):
        task.vae.load_state_dict(vae.state_dict())
        with torch.no_grad():
            values = [task.losses(task.network, batch).terms["correspondence"].item() for batch in batches]
        losses[name] = np.mean(values)
    assert losses["after"] < 0.95 * losses["before"]
