"""Checkpoints: resuming goes on exactly, nothing is lost by a kill or a full disk, nothing unsafe is loaded."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import start, wait_until
from equality import assert_equal
from in_process import make_trainer
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from PIL import Image
from tiny_scenes import Lens, write_scene
from tiny_vaes import make_vae

from lrf_nerfstudio.splatting.strategies import DensificationConfig

pytestmark = pytest.mark.slow

GROWING = {"start": 0.1, "stop": 1.0, "gradient_threshold": 1e-7, "max_gaussians": 500, "opacity_resets": 1}
"""Options of densification under which Gaussians are added, removed and reset all through a run."""


def train_arguments(scene: Path, vae: Path, output: Path, steps: int, *more: object) -> list[object]:
    """A command line of ns-train whose run lands in `output/<scene>/latent-splatfacto/run`."""
    return [
        *("latent-splatfacto", "--data", scene, "--output-dir", output, "--timestamp", "run", "--vis", "tensorboard"),
        *("--max-num-iterations", steps, "--pipeline.vae.source", vae, *more),
    ]


def run_folder(scene: Path, output: Path) -> Path:
    return output / scene.name / "latent-splatfacto" / "run"


def only_checkpoint(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "nerfstudio_models").iterdir()
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------------------------------- resume


def test_a_killed_run_resumes_as_if_never_stopped(floor_scene, tiny_vae, tmp_path, forked):
    growing = [
        item
        for name, value in GROWING.items()
        for item in (f"--pipeline.model.densification.{name.replace('_', '-')}", value)
    ]
    arguments = [*growing, "--steps-per-save", 100]
    straight = tmp_path / "straight"
    forked("ns-train", *train_arguments(floor_scene, tiny_vae, straight, 400, *arguments)).check()

    killed = tmp_path / "killed"
    models = run_folder(floor_scene, killed) / "nerfstudio_models"
    process = start("ns-train", *train_arguments(floor_scene, tiny_vae, killed, 400, *arguments))
    wait_until(lambda: list(models.glob("step-*00.ckpt")) or process.poll() is not None, timeout=120)
    process.kill()  # somewhere in a step, or while the next checkpoint is written
    output, _ = process.communicate()
    assert process.returncode == -9, output
    (checkpoint,) = models.iterdir()  # complete, and the only one
    stopped_at = int(checkpoint.stem.removeprefix("step-"))

    resumed = tmp_path / "resumed"
    arguments = train_arguments(floor_scene, tiny_vae, resumed, 400, *arguments, "--load-dir", models)
    output = forked("ns-train", *arguments).check().output
    assert f"Resuming after step {stopped_at}" in output
    expected, actual = (only_checkpoint(run_folder(floor_scene, folder)) for folder in (straight, resumed))
    assert expected["step"] == 399
    assert len(expected["pipeline"]["_model.gauss_params.means"]) != 400
    assert_equal(actual, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("strategy", ["default", "mcmc"])
def test_resuming_is_exact(tiny_vae, tmp_path, strategy, masked):
    scene = write_scene(tmp_path / "scene", views=9, masked=masked)
    options = {
        "densification": DensificationConfig(strategy=strategy, **GROWING),
        "camera_optimizer": CameraOptimizerConfig(mode="SO3xR3"),
        "sh_degree_interval": 10,
    }
    torch.manual_seed(7)
    straight = make_trainer(scene, tiny_vae, tmp_path / "straight", 40, **options)
    straight.config.steps_per_save, straight.config.save_only_latest_checkpoint = 21, False
    straight.train()
    models = straight.checkpoint_dir
    assert sorted(path.name for path in models.iterdir()) == ["step-000000021.ckpt", "step-000000039.ckpt"]

    torch.manual_seed(8)
    resumed = make_trainer(scene, tiny_vae, tmp_path / "resumed", 40, load_from=(models, 21), **options)
    assert resumed._start_step == 22
    resumed.train()
    assert_equal(only_checkpoint(resumed.base_dir), torch.load(models / "step-000000039.ckpt", weights_only=True))


def test_a_longer_run_goes_on_from_the_end(floor_scene, tiny_vae, tmp_path):
    make_trainer(floor_scene, tiny_vae, tmp_path / "first", 5).train()
    models = run_folder(floor_scene, tmp_path / "first") / "nerfstudio_models"
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path / "second", 9, load_from=(models, None))
    trainer.train()
    assert only_checkpoint(trainer.base_dir)["step"] == 8


def test_a_checkpoint_of_other_photographs_maps_the_targets_as_it_was_trained(tiny_vae, tmp_path):
    scene, darker = (write_scene(tmp_path / name, views=9) for name in ("scene", "darker"))
    for path in (darker / "images").iterdir():
        with Image.open(path) as picture:
            picture.point(lambda value: value // 2).save(path)
    make_trainer(scene, tiny_vae, tmp_path / "first", 3).train()
    models = run_folder(scene, tmp_path / "first") / "nerfstudio_models"
    expected = make_trainer(scene, tiny_vae, tmp_path / "same", 5, load_from=(models, None)).pipeline
    actual = make_trainer(darker, tiny_vae, tmp_path / "other", 5, load_from=(models, None)).pipeline
    assert torch.equal(actual.model.normalization.shift, expected.model.normalization.shift)
    for view, index in zip(actual.datamanager.train_views, range(8), strict=False):
        latent = actual.model.vae.encode(actual.datamanager.train_dataset.photograph(index)[0][None])
        torch.testing.assert_close(view.target, expected.model.normalization.to_field(latent), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.fixture(scope="module")
def five_steps(floor_scene, tiny_vae, tmp_path_factory) -> Path:
    """The checkpoint folder of a run of five steps. Tests must not change it."""
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path_factory.mktemp("five_steps"), 5)
    trainer.train()
    return trainer.checkpoint_dir


def test_a_finished_run_says_so(floor_scene, tiny_vae, tmp_path, forked, five_steps):
    arguments = train_arguments(floor_scene, tiny_vae, tmp_path, 5, "--load-dir", five_steps)
    message = forked("ns-train", *arguments).message
    assert "--max-num-iterations" in message


@pytest.mark.parametrize("where", ["no folder", "no checkpoint", "no such step"])
def test_nothing_to_resume_from(floor_scene, tiny_vae, tmp_path, forked, five_steps, where):
    folder = tmp_path / "models"
    more: list[object] = ["--load-dir", folder]
    if where == "no checkpoint":
        folder.mkdir()
    elif where == "no such step":
        more = ["--load-dir", five_steps, "--load-step", 3]
    message = forked("ns-train", *train_arguments(floor_scene, tiny_vae, tmp_path / "out", 9, *more)).message
    assert str(more[1]) in message.replace("\n", "")


@pytest.mark.parametrize("option", ["--load-dir", "--load-checkpoint"])
def test_a_damaged_checkpoint_is_named(floor_scene, tiny_vae, tmp_path, forked, five_steps, option):
    path = tmp_path / "models" / "step-000000004.ckpt"
    path.parent.mkdir()
    content = (five_steps / path.name).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    more = [option, path.parent if option == "--load-dir" else path]
    message = forked("ns-train", *train_arguments(floor_scene, tiny_vae, tmp_path / "out", 9, *more)).message
    assert str(path) in message
    assert path.read_bytes() == content[: len(content) // 2]


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hide_malice(checkpoint: Path, trace: Path) -> None:
    """Add a pickled object that runs code to a good checkpoint."""
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "extra": Malicious(trace)}, checkpoint)


def test_a_malicious_checkpoint_is_refused(floor_scene, tiny_vae, tmp_path, forked, five_steps):
    run, trace = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(five_steps.parent, run)
    checkpoint = run / "nerfstudio_models" / "step-000000004.ckpt"
    hide_malice(checkpoint, trace)
    arguments = train_arguments(floor_scene, tiny_vae, tmp_path / "out", 9, "--load-dir", checkpoint.parent)
    message = forked("ns-train", *arguments).message
    assert str(checkpoint) in message
    assert "refused" in message
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # it would have worked
    assert trace.exists()


def test_ns_eval_refuses_a_malicious_checkpoint(floor_scene, tiny_vae, tmp_path, forked):
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, 2)
    trainer.train()
    trace = tmp_path / "executed"
    hide_malice(trainer.checkpoint_dir / "step-000000001.ckpt", trace)
    finished = forked(
        "ns-eval", "--load-config", trainer.base_dir / "config.yml", "--output-path", tmp_path / "metrics.json"
    )
    assert finished.code != 0
    assert not trace.exists()
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("channels", [4, 16], ids=["other weights", "other channels"])
def test_another_vae_is_refused(floor_scene, tmp_path, forked, five_steps, channels):
    vae = make_vae(tmp_path / "vae", channels, seed=1)
    arguments = train_arguments(floor_scene, vae, tmp_path / "out", 9, "--load-dir", five_steps)
    message = forked("ns-train", *arguments).message
    assert "--pipeline.vae.source" in message
    assert str(vae) in message


def test_ns_eval_refuses_another_vae(floor_scene, tmp_path, forked):
    vae = make_vae(tmp_path / "vae")
    trainer = make_trainer(floor_scene, vae, tmp_path, 2)
    trainer.train()
    make_vae(vae, seed=1)  # the folder that config.yml names has changed
    finished = forked(
        "ns-eval", "--load-config", trainer.base_dir / "config.yml", "--output-path", tmp_path / "metrics.json"
    )
    assert "config.yml" in finished.message


def test_other_harmonics_are_refused(floor_scene, tiny_vae, tmp_path, forked, five_steps):
    more = ["--load-dir", five_steps, "--pipeline.model.sh-degree", 1]
    message = forked("ns-train", *train_arguments(floor_scene, tiny_vae, tmp_path, 9, *more)).message
    assert "--pipeline.model.sh-degree" in message


def test_another_methods_checkpoint_is_refused(floor_scene, tiny_vae, tmp_path, forked, five_steps):
    path = tmp_path / "step-000000004.ckpt"
    state = torch.load(five_steps / path.name, weights_only=True)
    state["pipeline"] = {"_model.gauss_params.means": torch.zeros(4, 3)}
    torch.save(state, path)
    arguments = train_arguments(floor_scene, tiny_vae, tmp_path / "out", 9, "--load-checkpoint", path)
    assert "written by another method" in forked("ns-train", *arguments).message


# ---------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_leaves_the_last_checkpoint(floor_scene, tiny_vae, tmp_path, forked, five_steps):
    run = run_folder(floor_scene, tmp_path)
    shutil.copytree(five_steps.parent, run)
    good = run / "nerfstudio_models" / "step-000000004.ckpt"
    content = good.read_bytes()
    more = ["--load-dir", good.parent, "--steps-per-save", 8]
    arguments = train_arguments(floor_scene, tiny_vae, tmp_path, 20, *more)
    message = forked("ns-train", *arguments, max_file_size=len(content) // 2).message
    assert str(good.parent) in message.replace("\n", "")
    assert "--load-dir" in message
    assert [path.name for path in good.parent.iterdir()] == [good.name]
    assert good.read_bytes() == content
    assert not list(run.rglob("*.tmp"))
    # With room again, the run goes on from there.
    forked("ns-train", *arguments).check()
    assert only_checkpoint(run)["step"] == 19


def test_a_full_disk_while_encoding(tiny_vae, tmp_path, forked):
    scene = write_scene(tmp_path / "scene", lenses=Lens(512, 384, 480.0))
    latents = tmp_path / "latents"
    arguments = train_arguments(
        scene, tiny_vae, tmp_path / "out", 5, "--pipeline.datamanager.latent-cache-dir", latents
    )
    message = forked("ns-train", *arguments, max_file_size=30_000).message  # a latent takes 49 kB
    assert "--pipeline.datamanager.latent-cache-dir" in message
    assert not [path for path in latents.rglob("*") if path.is_file()]


# ---------------------------------------------------------------------------------------------------- writers


def test_tensorboard_gets_losses_metrics_and_pictures(floor_scene, tiny_vae, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, 13)
    trainer.config.steps_per_eval_batch = trainer.config.steps_per_eval_image = 4
    trainer.config.steps_per_eval_all_images = 6
    trainer.train()
    events = EventAccumulator(str(trainer.base_dir))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for name in (
        "Train Loss",
        "Train Metrics Dict/latent_psnr",
        "Train Metrics Dict/gaussian_count",
        "Eval Loss",
        "Eval Images Metrics/psnr",
        "Eval Images Metrics/ceiling_psnr",
        "Eval Images Metrics Dict (all images)/psnr",
    ):
        assert name in scalars, scalars
    assert "Eval Images/img" in events.Tags()["images"]
