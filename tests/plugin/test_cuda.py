"""On CUDA: every part of a training step and of a render is on the GPU, and nothing waits for it.

The GPU is a fake one (see tests/helpers/fake_cuda.py), so these tests run everywhere.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, FakeGPU, fake_cuda
from in_process import make_config, make_pipeline, make_trainer
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.engine.callbacks import TrainingCallbackAttributes
from tiny_scenes import write_scene

from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.export import exported_field
from lrf_nerfstudio.plugin.pipeline import LatentPipeline, LatentPipelineConfig
from lrf_nerfstudio.plugin.trainer import LatentTrainer, LatentTrainerConfig
from lrf_nerfstudio.splatting.strategies import DensificationConfig
from lrf_nerfstudio.utils.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu(fake_gsplat):
    with fake_cuda() as gpu:
        yield gpu


def place_pipeline(gpu: FakeGPU, pipeline: LatentPipeline) -> LatentPipeline:
    """Put a pipeline that was made on the CPU on the GPU, as if it had been made there."""
    gpu.place(pipeline)
    gpu.place(pipeline.model.vae)
    datamanager = pipeline.datamanager
    datamanager.device = DEVICE
    for view in (view for views in datamanager._shifted_views for view in views):
        camera = view.camera
        tensors = {name: gpu.place(getattr(camera, name)) for name in ("viewmats", "Ks", "indices")}
        view.camera = replace(camera, **tensors)
        view.target = gpu.place(view.target)
        view.mask = None if view.mask is None else gpu.place(view.mask)
    return pipeline


def place_trainer(gpu: FakeGPU, trainer: LatentTrainer) -> LatentTrainer:
    """Put a trainer that was made on the CPU on the GPU, with optimizers and callbacks for its new parameters."""
    pipeline = place_pipeline(gpu, trainer.pipeline)
    trainer.device = str(DEVICE)
    trainer.optimizers = trainer.setup_optimizers()
    attributes = TrainingCallbackAttributes(trainer.optimizers, trainer.grad_scaler, pipeline, trainer)
    trainer.callbacks = pipeline.get_training_callbacks(attributes)
    return trainer


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "plain gradients": {"densification": DensificationConfig(absgrad=False)},
    "mcmc": {"densification": DensificationConfig(strategy="mcmc")},
    "camera optimizer": {"camera_optimizer": CameraOptimizerConfig(mode="SO3xR3")},
    "shifts": {"datamanager__shifts": 2},
    "views per step": {"datamanager__views_per_step": 3},
    "antialiased": {"rasterize_mode": "antialiased"},
    "regularized scales": {"use_scale_regularization": True},
    "plain background": {"background_color": "black"},
    "depth": {"output_depth_during_training": True},
    "no harmonics": {"sh_degree": 0},
    "no ssim": {"ssim_lambda": 0.0},
    "dropout": {"opacity_dropout": 0.2},
}


@pytest.fixture(scope="module", params=["masked", "transparent"])
def other_scene(request, tmp_path_factory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scenes") / request.param, views=6, **{request.param: True})


def check_steps(gpu: FakeGPU, scene: Path, vae: Path, output: Path, options: dict[str, Any]) -> None:
    trainer = place_trainer(gpu, make_trainer(scene, vae, output, steps=1000, **options))
    trainer.take_step(0)  # the first step may wait: it encodes a plain background, for example
    with gpu.no_waiting():
        for step in range(1, 8):
            loss, losses, metrics = trainer.take_step(step)
    for value in (loss, *losses.values(), metrics["latent_psnr"]):
        assert value.device == DEVICE and value.ndim == 0
    for name, parameter in trainer.pipeline.model.gauss_params.items():
        assert parameter.device == parameter.grad.device == DEVICE, name


@pytest.mark.parametrize("options", [pytest.param(value, id=name) for name, value in OPTIONS.items()])
def test_a_training_step_never_waits(floor_scene, tiny_vae, tmp_path, gpu, options):
    check_steps(gpu, floor_scene, tiny_vae, tmp_path, {**options, "sh_degree_interval": 3})


def test_a_training_step_of_other_scenes_never_waits(other_scene, tiny_vae, tmp_path, gpu):
    options = {"datamanager__shifts": 2, "camera_optimizer": CameraOptimizerConfig(mode="SO3xR3")}
    check_steps(gpu, other_scene, tiny_vae, tmp_path, options)


def test_mixed_precision_leaves_geometry_and_ssim_in_full_precision(floor_scene, tiny_vae, tmp_path, gpu):
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, 1000, camera_optimizer=CameraOptimizerConfig(mode="SO3xR3"))
    trainer.mixed_precision = True
    place_trainer(gpu, trainer)
    trainer.take_step(0)
    with gpu.no_waiting():
        loss, _, _ = trainer.take_step(1)  # gsplat takes float32 alone, and the fake one checks it
    assert loss.dtype == torch.float32


@pytest.fixture
def trained(floor_scene, tiny_vae, gpu) -> LatentPipeline:
    pipeline = make_pipeline(floor_scene, tiny_vae).eval()
    pipeline.datamanager.eval_view(0)  # its latent is in the cache from now on: a fake GPU cannot encode it
    return place_pipeline(gpu, pipeline)


def test_a_render_does_not_wait_for_itself(trained, gpu):
    model = trained.model
    camera = grid_camera(trained.datamanager.eval_dataset.cameras[1:2], model.vae.spatial_factor, DEVICE)
    with gpu.no_waiting():
        rendered = model.render(camera)
    for name in ("rgb", "latent_rgb", "depth", "accumulation"):
        assert rendered[name].device == DEVICE
        assert rendered[name].shape[:2] == (67, 101)


def test_commands_and_viewer_render_on_the_gpu(trained, monkeypatch):
    camera = trained.datamanager.eval_dataset.cameras[1:2]
    for moving in (False, True):
        monkeypatch.setattr("lrf_nerfstudio.plugin.model.viewer_is_moving", lambda moving=moving: moving)
        outputs = trained.model.get_outputs_for_camera(camera)
        assert {picture.device for picture in outputs.values()} == {DEVICE}
        assert {picture.shape[:2] for picture in outputs.values()} == {(67, 101)}


def test_the_loss_of_a_held_out_view(trained, gpu):
    camera, batch = trained.datamanager.next_eval(0)
    target = trained.model.normalization.to_field(batch["latent"][None])
    with gpu.no_waiting(), torch.no_grad():
        outputs = {"field": trained.model.render_field(camera, 0.1).field}
        metrics = trained.model.get_metrics_dict(outputs, {"target": target})
        losses = trained.model.get_loss_dict(outputs, {"target": target}, metrics)
    assert losses["main_loss"].device == DEVICE


def test_the_field_of_an_export_is_on_the_gpu(trained):
    field = exported_field(trained.model, torch.eye(4)[:3], 1.0)
    assert {getattr(field, name).device for name in ("means", "scales", "opacities", "features")} == {DEVICE}
    camera = grid_camera(trained.datamanager.eval_dataset.cameras[0:1], 1, DEVICE)
    latent = field.render(camera.viewmats[0], camera.Ks[0], camera.width, camera.height)
    assert latent.shape == (4, 9, 13) and latent.device == DEVICE


def test_a_checkpoint_is_loaded_to_the_gpu(floor_scene, tiny_vae, gpu, trained):
    other = make_pipeline(floor_scene, tiny_vae)
    state = other.state_dict()
    trained.load_state_dict(state)
    for name, parameter in trained.model.gauss_params.items():
        assert parameter.device == DEVICE
        assert parameter.shape == other.model.gauss_params[name].shape


def test_a_gpu_without_gsplats_code_is_told_before_anything_is_read(floor_scene, tiny_vae, monkeypatch):
    def fail() -> None:
        raise UserError("gsplat")

    monkeypatch.setattr("lrf_nerfstudio.splatting.cuda.check_gsplat", fail)
    with pytest.raises(SystemExit):
        make_config(floor_scene, tiny_vae, Path()).pipeline.setup(device="cuda", test_mode="test")


def test_a_scene_can_be_kept_off_the_gpu(floor_scene, tiny_vae, tmp_path):
    """Nerfstudio's commands ask for CUDA wherever they see it."""
    config = make_config(floor_scene, tiny_vae, tmp_path)
    config.pipeline.device = "cpu"
    assert config.pipeline.setup(device="cuda", test_mode="test").device == torch.device("cpu")


def test_training_on_the_cpu_keeps_the_scene_there():
    config = LatentTrainerConfig(machine=MachineConfig(device_type="cpu"), pipeline=LatentPipelineConfig())
    assert config.pipeline.device == "cpu"
    assert LatentTrainerConfig(pipeline=LatentPipelineConfig()).pipeline.device == "auto"
