"""Text to 3D as a method of nerfstudio: what it learns, keeps, shows and refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blob_field import psnr, render, true_field
from commands import Finished
from equality import assert_equal
from fake_cuda import DEVICE, FakeGPU, fake_cuda
from in_process import make_dream_config, make_dream_trainer
from nerfstudio.engine.callbacks import TrainingCallbackAttributes
from nerfstudio.utils.eval_utils import eval_setup
from oracle import Oracle, SamePrompt
from PIL import Image
from plyfile import PlyData
from tiny_diffusion import make_diffusion
from tiny_vaes import make_vae
from torch import Tensor

from lrf_nerfstudio.field.cameras import world_to_camera
from lrf_nerfstudio.field.latent_field import LatentField
from lrf_nerfstudio.guidance import DiffusionConfig, Guidance, GuidanceConfig, OrbitConfig, PromptConfig, ScoreGuidance
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.dream_trainer import DreamSplatTrainer
from lrf_nerfstudio.plugin.export import exported_field
from lrf_nerfstudio.plugin.orbit_datamanager import OrbitDatamanagerConfig
from lrf_nerfstudio.splatting.strategies import DensificationConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    """A tiny diffusion model with random weights, in the latent space of the tiny VAE in its folder."""
    folder = make_diffusion(tmp_path_factory.mktemp("diffusion"))
    make_vae(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def trained(diffusion, tmp_path_factory) -> Path:
    """The folder of a run of ten steps. Tests must not change it."""
    trainer = make_dream_trainer(diffusion, tmp_path_factory.mktemp("trained"), steps=10)
    trainer.config.steps_per_eval_image = 5
    trainer.train()
    return trainer.base_dir


# ---------------------------------------------------------------------------------------------------- what it learns


def make_blob_trainer(diffusion: Path, output: Path, guide: Callable[[Oracle], Any]) -> DreamSplatTrainer:
    """A trainer whose diffusion model is an oracle of the blobs; `guide` makes a guidance of it."""
    trainer = make_dream_trainer(
        *(diffusion, output, 300),
        orbits=OrbitConfig(views=4, cells=16, distance=(1.6, 2.0), eval_views=8),
        densification=DensificationConfig(strategy="mcmc", max_gaussians=200, mcmc_noise=0.0),
        background_color="white",
        dilation=0.3,
    )
    for name, rate in {"means": 4e-3, "scales": 1e-2, "quats": 5e-3, "features_dc": 5e-2, "opacities": 5e-2}.items():
        trainer.optimizers.schedulers[name].base_lrs = [rate]
    pipeline = trainer.pipeline
    oracle = Oracle(torch.zeros(1, 4, 4, 16, 16), spread=100.0)
    background = pipeline.model.background()
    serve = pipeline.datamanager.next_train

    def next_train(step: int) -> Any:
        camera, batch = serve(step)
        oracle.latents = render(true_field(), camera, background)[None]
        return camera, batch

    pipeline.datamanager.next_train = next_train
    pipeline.guidance = guide(oracle)
    return trainer


def held_out_psnr(trainer: DreamSplatTrainer) -> float:
    """Train, and compare latents of the fixed orbit with those of the blobs."""
    for step in range(trainer.config.max_num_iterations):
        trainer.take_step(step)
    pipeline = trainer.pipeline
    pipeline.eval()
    camera = pipeline.datamanager.orbit.camera
    with torch.no_grad():
        latents = pipeline.model.render_field(camera, pipeline.model.config.dilation).field.permute(0, 3, 1, 2)
        return psnr(latents, render(true_field(), camera, pipeline.model.background()))


class Direct:
    """Pulls latents to the truth, as a fit to pictures does."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def __call__(self, latents: Tensor, azimuths: Any, elevations: Any, progress: float) -> Guidance:
        loss = 0.5 * (latents - self.oracle.latents[0]).square().sum() / len(latents)
        return Guidance(loss, {"gradient_norm": loss.detach()}, (0, 0))


def test_distillation_rebuilds_a_field_as_well_as_a_direct_fit(diffusion, tmp_path):
    def distilled(oracle: Oracle) -> ScoreGuidance:
        # The oracle is certain and this weight undoes the noise: but for clipping, the gradient is that of a fit.
        config = GuidanceConfig(guidance_scale=1.0, weighting="noise-to-signal", t_max=(0.5, 0.1), gradient_clip=0.0)
        return ScoreGuidance(config, oracle, SamePrompt())

    def mean_psnr(name: str, guidance: Callable[[Oracle], Any]) -> float:
        """Over two fits: single ones differ by half a decibel."""
        values = []
        for seed in (0, 2):
            torch.manual_seed(seed)
            values.append(held_out_psnr(make_blob_trainer(diffusion, tmp_path / f"{name}-{seed}", guidance)))
        return sum(values) / len(values)

    direct, reached = mean_psnr("direct", Direct), mean_psnr("distilled", distilled)
    assert direct > 22.0
    assert reached > direct - 1.0, (reached, direct)


def test_the_field_lives_in_scaled_latents(diffusion, tmp_path):
    pipeline = make_dream_trainer(diffusion, tmp_path, steps=10).pipeline
    vae = pipeline.model.vae
    latents = torch.randn(2, 4, 3, 5)
    field = pipeline.model.normalization.to_field(latents)
    assert torch.allclose(field.permute(0, 3, 1, 2), vae.scale(latents), atol=1e-6)


def test_every_view_has_a_background_of_its_own_color(diffusion, tmp_path):
    background = make_dream_trainer(diffusion, tmp_path, steps=10).pipeline.model.background
    assert background.corners.std(dim=0).min() > 0
    background.train()
    drawn = background(views=3)
    assert drawn.shape == (3, 1, 1, 4)
    assert not torch.equal(drawn[0], drawn[1])
    low, high = background.corners.amin(dim=0), background.corners.amax(dim=0)
    assert ((drawn >= low - 1e-6) & (drawn <= high + 1e-6)).all()
    background.eval()
    assert torch.allclose(background(), background.corners[-1], atol=1e-5)  # white


# ---------------------------------------------------------------------------------------------------- what it keeps


def test_rendering_needs_no_prompt_model(trained, monkeypatch):
    monkeypatch.setattr(DiffusionConfig, "setup", None)
    _, pipeline, _, step = eval_setup(trained / "config.yml")
    assert step == 9
    assert pipeline.guidance is None
    assert pipeline.model.num_points == 210  # one refinement of mcmc
    outputs = pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[0:1])
    assert outputs["rgb"].shape == (128, 128, 3)
    assert {"rgb", "latent_rgb", "depth", "accumulation"} == set(outputs)


def test_resuming_is_exact(diffusion, tmp_path):
    options = {"densification": DensificationConfig(strategy="mcmc", start=0.0, stop=1.0, refinements=3)}
    torch.manual_seed(7)
    straight = make_dream_trainer(diffusion, tmp_path / "straight", 16, **options)
    straight.config.steps_per_save, straight.config.save_only_latest_checkpoint = 7, False
    straight.train()
    torch.manual_seed(8)
    resumed = make_dream_trainer(diffusion, tmp_path / "resumed", 16, load_from=(straight.checkpoint_dir, 7), **options)
    resumed.train()
    expected, actual = (
        torch.load(trainer.checkpoint_dir / "step-000000015.ckpt", weights_only=True) for trainer in (straight, resumed)
    )
    assert len(expected["pipeline"]["_model.gauss_params.means"]) > 200
    assert_equal(actual, expected)


def test_the_exported_field_renders_what_the_model_does(trained):
    _, pipeline, _, _ = eval_setup(trained / "config.yml", test_mode="inference")
    parsed = pipeline.datamanager.train_dataparser_outputs
    field = exported_field(pipeline.model, parsed.dataparser_transform, parsed.dataparser_scale)
    camera = pipeline.datamanager.eval_dataset.cameras[1:2]
    viewmat, K = world_to_camera(camera.camera_to_worlds)[0], camera.get_intrinsics_matrices()[0]
    latent = LatentField.render(field, viewmat, K, width=128, height=128)
    rendered = pipeline.model.render(grid_camera(camera, 8, pipeline.device))["latent"]
    assert torch.allclose(latent, rendered, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- what it shows


def test_tensorboard_gets_pictures_of_the_orbit_and_their_video(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained), size_guidance={"images": 0}).Reload()
    pictures = events.Images("Eval Images/orbit")
    assert (pictures[0].width, pictures[0].height) == (4 * 128, 128)
    # Trainings of other tests in this process write to all event files that are open.
    assert (trained / "orbit.gif").read_bytes() in [picture.encoded_image_string for picture in pictures]
    with Image.open(trained / "orbit.gif") as video:
        assert (video.n_frames, video.size) == (4, (128, 128))
    for name in ("Smallest t", "Largest t", "Gradient norm", "Train Loss Dict/guidance"):
        assert all(np.isfinite(event.value) for event in events.Scalars(name))
    assert 980 in [event.value for event in events.Scalars("Largest t")]


def test_a_run_is_named_after_its_prompt(diffusion, tmp_path):
    config = make_dream_config(diffusion, tmp_path, prompt='A "red" cube, shiny!')
    assert config.get_base_dir() == tmp_path / "a-red-cube-shiny" / "latent-dreamsplat" / "run"
    config = make_dream_config(diffusion, tmp_path)
    config.experiment_name = "mine"
    assert config.get_base_dir() == tmp_path / "mine" / "latent-dreamsplat" / "run"


# ---------------------------------------------------------------------------------------------------- commands


def test_commands(trained, forked, tmp_path):
    """ns-render, ns-eval and ns-export on the result of ns-train."""
    config = ("--load-config", trained / "config.yml")
    images = ("--output-format", "images", "--image-format", "png")
    forked("ns-render", "spiral", *config, "--output-path", tmp_path / "spiral", "--seconds", 0.1, *images).check()
    path = tmp_path / "interpolated"
    forked("ns-render", "interpolate", *config, "--output-path", path, "--interpolation-steps", 1, *images).check()
    with Image.open(sorted(path.iterdir())[0]) as picture:
        assert picture.size == (128, 128)
    path = tmp_path / "orbit"
    forked("ns-render", "dataset", *config, "--output-path", path, "--image-format", "png").check()
    with Image.open(path / "test" / "rgb" / "view_0003.png") as picture:
        assert picture.size == (128, 128)
    finished = forked("ns-render", "dataset", *config, "--output-path", path, "--downscale-factor", 2)
    assert "leave out --downscale-factor" in finished.message
    results, seen = tmp_path / "eval.json", tmp_path / "seen"
    forked("ns-eval", *config, "--output-path", results, "--render-output-path", seen).check()
    assert {"raster_seconds", "decode_seconds"} <= set(json.loads(results.read_text())["results"])
    assert len(list(seen.iterdir())) == 4
    pose = [*np.eye(4).ravel().tolist()]
    pose[11] = 2.0  # two units back along z, looking down
    camera_path = {
        "camera_type": "perspective",
        "render_height": 40,
        "render_width": 48,
        "camera_path": [{"camera_to_world": pose, "fov": 50.0, "aspect": 1.2}],
        "fps": 1,
        "seconds": 1,
    }
    (tmp_path / "path.json").write_text(json.dumps(camera_path))
    path = tmp_path / "path"
    forked(
        *("ns-render", "camera-path", *config, "--camera-path-filename", tmp_path / "path.json"),
        *("--output-path", path, *images),
    ).check()
    with Image.open(path / "00000.png") as picture:
        assert picture.size == (48, 40)


def test_ns_train_takes_a_prompt(diffusion, forked, tmp_path):
    """The command itself; what it says of a prompt that the model cannot read whole."""
    finished = ns_train(forked, diffusion, tmp_path, "a red cube " + "and a blue ball " * 10)
    finished.check()
    assert "does not read" in finished.output and "blue ball" in finished.output
    assert "Largest t" in finished.output and "Gradient norm" in finished.output


def ns_train(forked, diffusion: Path, output: Path, prompt: str, *more: object) -> Finished:
    return forked(
        *("ns-train", "latent-dreamsplat", "--prompt", prompt, "--output-dir", output, "--vis", "tensorboard"),
        *("--experiment-name", "dream", "--timestamp", "run", "--max-num-iterations", 2),
        *("--pipeline.diffusion.source", diffusion, "--pipeline.vae.source", diffusion / "vae"),
        *("--pipeline.orbits.cells", 8, "--pipeline.orbits.eval-views", 2, *more),
    )


# ---------------------------------------------------------------------------------------------------- what it refuses


def test_ns_train_refuses_bad_options_in_one_message(diffusion, forked, tmp_path):
    finished = ns_train(forked, diffusion, tmp_path, "a red cube", "--pipeline.orbits.views", 0)
    assert "--pipeline.orbits.views" in finished.message


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


def pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def truncated(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(without("unet"), "no unet/config.json"), (pickled, "are pickled"), (truncated, "cannot be loaded")],
)
def test_bad_models_are_refused(diffusion, tmp_path, capsys, spoil, message):
    folder = shutil.copytree(diffusion, tmp_path / "model")
    spoil(folder)
    assert message in refusal(make_dream_config(folder, tmp_path), capsys)


def empty_ply(folder: Path) -> Path:
    path = folder / "points.ply"
    path.write_text(
        "ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    )
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "There is no prompt"),
        ({"vae__source": "lrf-f4c4"}, "cells are 8 pixels wide, not 4"),
        ({"diffusion__source": "nobody/nothing"}, "neither on this machine"),
        ({"datamanager": OrbitDatamanagerConfig(data=Path("photographs"))}, "leave out --data"),
        ({"initialization__points": empty_ply}, "at least 4 points"),
    ],
)
def test_bad_options_are_refused(diffusion, tmp_path, capsys, options, message):
    options = {name: value(tmp_path) if callable(value) else value for name, value in options.items()}
    assert message in refusal(make_dream_config(diffusion, tmp_path, **options), capsys)


def refusal(config: Any, capsys) -> str:
    """What a user reads when the pipeline is not set up."""
    with pytest.raises(SystemExit) as error:
        config.pipeline.setup(device="cpu", test_mode="val")
    assert error.value.code == 1
    output = capsys.readouterr().err
    assert output.count("Error: ") == 1
    return " ".join(output.split())


# ---------------------------------------------------------------------------------------------------- on a GPU


def place_trainer(gpu: FakeGPU, trainer: DreamSplatTrainer) -> DreamSplatTrainer:
    """Put a trainer that was made on the CPU on the GPU, as if it had been made there."""
    pipeline = trainer.pipeline
    gpu.place(pipeline)
    gpu.place(pipeline.model.vae)
    pipeline.datamanager.device = DEVICE
    guidance = pipeline.guidance
    denoiser, prompts = guidance._denoiser, guidance._prompts
    gpu.place(denoiser.unet)
    denoiser.alphas_cumprod = guidance._alphas = gpu.place(denoiser.alphas_cumprod)
    prompts._views = {view: gpu.place(embedding) for view, embedding in prompts._views.items()}
    prompts._negative, prompts._empty = gpu.place(prompts._negative), gpu.place(prompts._empty)
    trainer.device = str(DEVICE)
    trainer.optimizers = trainer.setup_optimizers()
    attributes = TrainingCallbackAttributes(trainer.optimizers, trainer.grad_scaler, pipeline, trainer)
    trainer.callbacks = pipeline.get_training_callbacks(attributes)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "guidance": GuidanceConfig(kind="ism", ism_steps=1),
            "prompts": PromptConfig(perp_neg=True),
            "densification": DensificationConfig(),
            "use_scale_regularization": True,
        },
    ],
    ids=["defaults", "others"],
)
def test_a_training_step_never_waits(diffusion, tmp_path, fake_gsplat, options):
    with fake_cuda() as gpu:
        trainer = place_trainer(gpu, make_dream_trainer(diffusion, tmp_path, steps=1000, **options))
        trainer.take_step(0)
        with gpu.no_waiting():
            for step in range(1, 3):
                loss, losses, metrics = trainer.take_step(step)
        for value in (loss, *losses.values(), metrics["gradient_norm"]):
            assert value.device == DEVICE and value.ndim == 0


def test_ns_export_writes_gaussians(trained, forked, tmp_path):
    pytest.importorskip("open3d", exc_type=ImportError)
    forked("ns-export", "gaussian-splat", "--load-config", trained / "config.yml", "--output-dir", tmp_path).check()
    assert len(PlyData.read(tmp_path / "splat.ply")["vertex"]) > 100
