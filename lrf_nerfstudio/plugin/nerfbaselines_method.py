"""The method as NerfBaselines runs it: its data set becomes a scene on disk, which nerfstudio's parts are trained on.

`nerfbaselines train --method latent-splatfacto --data DATA --backend python`; the options of `ns-train
latent-splatfacto` are given as `--set pipeline.vae.source=...`.

A checkpoint is a folder with `nerfstudio_models`, as ns-train writes it, the cameras of the training views in
`transforms.json`, and the options that were set in `overrides.json`.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from nerfbaselines import Cameras as BaselinesCameras
from nerfbaselines import Dataset, Method, MethodInfo, ModelInfo, RenderOutput
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from torch import Tensor

from lrf_nerfstudio.plugin.fitting import forget_writers, set_seed
from lrf_nerfstudio.plugin.method import latent_splatfacto
from lrf_nerfstudio.plugin.pipeline import LatentPipeline
from lrf_nerfstudio.plugin.points import write_points
from lrf_nerfstudio.plugin.trainer import LatentTrainer, LatentTrainerConfig, find_checkpoint, load_checkpoint
from lrf_nerfstudio.utils.errors import UserError, exit_on_user_error
from lrf_nerfstudio.utils.files import write_atomically

CAMERAS, OVERRIDES, MODELS = "transforms.json", "overrides.json", "nerfstudio_models"
REPORT_EVERY = 100
"""Steps between the numbers of a step, which wait for the GPU; NerfBaselines shows them as often."""


class LatentSplatfacto(Method):
    """Trains, renders, saves and loads as NerfBaselines asks for.

    Args:
        checkpoint: folder to load.
        train_dataset: photographs and cameras to train on; without them the checkpoint can only be rendered.
        config_overrides: options of `ns-train latent-splatfacto` by their names, such as `pipeline.vae.source`.

    Raises:
        SystemExit: something cannot be used; what is wrong has been printed.
    """

    @exit_on_user_error()
    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        train_dataset: Dataset | None = None,
        config_overrides: dict[str, Any] | None = None,
    ):
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        before = {} if self._checkpoint is None else json.loads((self._checkpoint / OVERRIDES).read_text())
        self._overrides = before | {name: str(value) for name, value in (config_overrides or {}).items()}
        self._config = overridden(self._overrides)
        self._folder = tempfile.TemporaryDirectory(prefix="latent-splatfacto-")
        self._trainer: LatentTrainer | None = None
        self._loaded_step: int | None = None
        if train_dataset is not None:
            self._prepare_training(train_dataset)
        elif self._checkpoint is not None:
            self._pipeline = self._loaded_pipeline(self._checkpoint)
        else:
            raise UserError("Give a data set to train on, or a checkpoint to render.")

    def _prepare_training(self, dataset: Dataset) -> None:
        scene = Path(self._folder.name) / "scene"
        write_dataset(dataset, scene)
        config = self._config
        config.output_dir, config.experiment_name, config.timestamp = Path(self._folder.name), "field", "run"
        config.vis, config.logging.local_writer.enable = "tensorboard", False
        config.steps_per_eval_image = 0
        use_scene(config, scene)
        points = scene / "points.ply"
        config.pipeline.datamanager.points = points if points.exists() else None
        if self._checkpoint is not None:
            if (self._checkpoint / CAMERAS).read_text() != (scene / CAMERAS).read_text():
                raise UserError(f"{self._checkpoint} was trained on other views: go on with those of its data set.")
            config.load_dir = self._checkpoint / MODELS
        forget_writers()
        set_seed(config.machine.seed)
        trainer = config.setup(local_rank=0, world_size=1)
        assert isinstance(trainer, LatentTrainer)
        trainer.setup()
        self._trainer, self._pipeline = trainer, trainer.pipeline
        self._cameras = scene / CAMERAS
        self._steps = trainer._start_step
        self._loaded_step = None if self._checkpoint is None else self._steps

    def _loaded_pipeline(self, checkpoint: Path) -> LatentPipeline:
        """Return the pipeline of a checkpoint without photographs."""
        state = load_checkpoint(find_checkpoint(checkpoint / MODELS))
        use_scene(self._config, checkpoint)
        on_gpu = self._config.machine.device_type == "cuda" and torch.cuda.is_available()
        pipeline = self._config.pipeline.setup(device="cuda" if on_gpu else "cpu", test_mode="inference")
        assert isinstance(pipeline, LatentPipeline)
        pipeline.load_pipeline(state["pipeline"], state["step"])
        self._cameras = checkpoint / CAMERAS
        self._steps = self._loaded_step = state["step"] + 1
        return pipeline

    @classmethod
    def get_method_info(cls) -> MethodInfo:
        """Return what NerfBaselines must know before it reads a data set."""
        return MethodInfo(
            method_id="",  # NerfBaselines fills it in
            required_features=frozenset(("color", "points3D_xyz")),
            supported_camera_models=frozenset(("pinhole",)),
            supported_outputs=("color", "depth", "accumulation"),
            can_resume_training=True,
            viewer_default_resolution=768,
        )

    def get_info(self) -> ModelInfo:
        """Return what NerfBaselines must know of this model."""
        return ModelInfo(
            **self.get_method_info(),
            num_iterations=self._config.max_num_iterations,
            loaded_step=self._loaded_step,
            loaded_checkpoint=None if self._checkpoint is None else str(self._checkpoint),
            hparams={
                "max-num-iterations": self._config.max_num_iterations,
                "pipeline.vae.source": self._config.pipeline.vae.source,
                **self._overrides,
            },
        )

    def train_iteration(self, step: int) -> dict[str, float]:
        """Take a training step.

        Returns:
            The loss and the metrics of every hundredth step and of the last; nothing for the others.
        """
        assert self._trainer is not None, "a checkpoint was loaded without a data set to train on"
        loss, losses, metrics = self._trainer.take_step(step)
        self._steps = step + 1
        if self._steps % REPORT_EVERY and self._steps < self._config.max_num_iterations:
            return {}
        values = {"loss": loss} | losses | metrics
        return {name: float(torch.as_tensor(value).detach()) for name, value in values.items()}

    @torch.no_grad()
    def render(self, camera: BaselinesCameras, *, options: Mapping[str, Any] | None = None) -> RenderOutput:
        """Render a camera.

        Returns:
            `color` [H, W, 3] in [0, 1], `depth` [H, W] in units of the data set and `accumulation` [H, W].
        """
        parsed = self._pipeline.datamanager.train_dataparser_outputs
        cameras = in_scene(camera.item(), parsed.dataparser_transform, parsed.dataparser_scale)
        self._pipeline.eval()
        outputs = self._pipeline.model.get_outputs_for_camera(cameras.to(self._pipeline.device))
        pictures = {
            "color": outputs["rgb"],
            "depth": outputs["depth"][..., 0] / parsed.dataparser_scale,
            "accumulation": outputs["accumulation"][..., 0],
        }
        names = (options or {}).get("outputs") or pictures
        return {name: pictures[name].cpu().numpy() for name in names if name in pictures}

    @exit_on_user_error()
    def save(self, path: str) -> None:
        """Write a checkpoint into a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CAMERAS, self._cameras.read_bytes())
        write_atomically(folder / OVERRIDES, (json.dumps(self._overrides, indent=1, sort_keys=True) + "\n").encode())
        if self._trainer is None:  # as it was loaded
            assert self._checkpoint is not None
            shutil.copytree(self._checkpoint / MODELS, folder / MODELS, dirs_exist_ok=True)
        else:
            self._trainer.base_dir, self._trainer.checkpoint_dir = folder, folder / MODELS
            self._trainer.save_checkpoint(self._steps - 1)

    def close(self) -> None:
        """Delete the scene on disk."""
        self._folder.cleanup()


def overridden(overrides: Mapping[str, str]) -> LatentTrainerConfig:
    """Return the method's configuration with options as on the command line of `ns-train latent-splatfacto`.

    Raises:
        SystemExit: there is no such option, or it cannot have the value; what is wrong has been printed.
    """
    arguments = [text for name, value in overrides.items() for text in (f"--{name}", value)]
    config = copy.deepcopy(latent_splatfacto.config)
    kind = tyro.conf.SuppressFixed[tyro.conf.FlagConversionOff[LatentTrainerConfig]]
    parsed: LatentTrainerConfig = tyro.cli(kind, args=arguments, default=config, prog="--set")
    return parsed


def use_scene(config: LatentTrainerConfig, scene: Path) -> None:
    """Read a scene of :func:`write_dataset`, all of whose views are trained on."""
    data = config.pipeline.datamanager
    config.data = data.data = scene
    data.dataparser = NerfstudioDataParserConfig(data=scene, downscale_factor=1, load_3D_points=False, eval_mode="all")


def write_dataset(dataset: Dataset, scene: Path) -> None:
    """Write a data set of NerfBaselines as a scene in nerfstudio's format: PNGs, masks, transforms.json and points.ply.

    Args:
        dataset: with pictures in memory, and pinhole cameras.
        scene: the folder.

    Raises:
        UserError: if the pictures are no ordinary ones, or a file cannot be written.
    """
    if dataset["metadata"].get("color_space", "srgb") != "srgb":
        raise UserError("This method is trained on pictures in sRGB; those of the data set are linear.")
    (scene / "images").mkdir(parents=True)
    cameras, masks = dataset["cameras"], dataset.get("masks")
    frames = []
    for number, picture in enumerate(dataset["images"]):
        camera = cameras[number]
        width, height = map(int, camera.image_sizes)
        name = f"{number:06d}.png"
        Image.fromarray(np.ascontiguousarray(picture[:height, :width])).save(scene / "images" / name)
        pose = np.eye(4)
        pose[:3] = in_opengl_axes(camera.poses[:3].astype(np.float64))
        fx, fy, cx, cy = map(float, camera.intrinsics)
        frame = {"file_path": f"images/{name}", "transform_matrix": pose.tolist(), "w": width, "h": height}
        frame |= {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}
        if masks is not None:
            (scene / "masks").mkdir(exist_ok=True)
            mask = np.where(masks[number][:height, :width], 255, 0).astype(np.uint8)
            Image.fromarray(mask).save(scene / "masks" / name)
            frame["mask_path"] = f"masks/{name}"
        frames.append(frame)
    write_atomically(scene / CAMERAS, json.dumps({"camera_model": "PINHOLE", "frames": frames}, indent=1).encode())
    points = dataset.get("points3D_xyz")
    if points is not None and len(points):
        write_points(scene / "points.ply", torch.from_numpy(np.asarray(points, dtype=np.float64)))


def in_opengl_axes(poses: np.ndarray) -> np.ndarray:
    """Return camera-to-world matrices [..., 3, 4] with OpenGL's camera axes of ones with OpenCV's."""
    return poses * np.array([1.0, -1.0, -1.0, 1.0], dtype=poses.dtype)


def in_scene(camera: BaselinesCameras, transform: Tensor, scale: float) -> Cameras:
    """Return a camera of the data set as one of the scene.

    Args:
        camera: a single one, pinhole.
        transform: [3, 4], which nerfstudio's parser applied to the cameras.
        scale: which it then multiplied positions with.
    """
    pose = torch.from_numpy(in_opengl_axes(camera.poses[:3].astype(np.float64)))
    moved = transform.double()[:3, :3] @ pose
    moved[:, 3] += transform.double()[:3, 3]
    moved[:, 3] *= scale
    fx, fy, cx, cy = map(float, camera.intrinsics)
    width, height = map(int, camera.image_sizes)
    return Cameras(moved.float()[None], fx=fx, fy=fy, cx=cx, cy=cy, width=width, height=height)
