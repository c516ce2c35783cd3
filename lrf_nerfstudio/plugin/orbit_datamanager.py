"""Cameras around an object that nobody has photographed."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.datamanagers.base_datamanager import DataManager
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.datamanagers.random_cameras_datamanager import RandomCamerasDataManager
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from tyro.conf import Suppress

from lrf_nerfstudio.field.cameras import GridCamera
from lrf_nerfstudio.guidance.orbits import OrbitConfig, OrbitViews, evaluation_orbit, random_orbits
from lrf_nerfstudio.utils.errors import UserError


@dataclass
class OrbitDatamanagerConfig(FullImageDatamanagerConfig):
    """Configuration of cameras without photographs; where they are is in the pipeline's `orbits`.

    `FullImageDatamanagerConfig` is a base in name only: `ns-render dataset` refuses most others, and makes another
    datamanager from the configuration alone.
    """

    _target: type = field(default_factory=lambda: OrbitDatamanager)
    orbits: Suppress[OrbitConfig] = field(default_factory=OrbitConfig)
    """Where the cameras are, which the pipeline fills in."""
    cell: Suppress[float] = 1.0
    """Pixels per cell of the grid, the VAE's spatial factor, which the pipeline fills in."""
    # There are no photographs.
    data: Suppress[Path | None] = None
    dataparser: Suppress[NerfstudioDataParserConfig] = field(default_factory=NerfstudioDataParserConfig)
    camera_res_scale_factor: Suppress[float] = 1.0
    eval_num_images_to_sample_from: Suppress[int] = -1
    eval_num_times_to_repeat_images: Suppress[int] = -1
    eval_image_indices: Suppress[tuple[int, ...] | None] = (0,)
    cache_images: Suppress[Literal["cpu", "gpu"]] = "cpu"
    cache_images_type: Suppress[Literal["uint8", "float32"]] = "float32"
    max_thread_workers: Suppress[int | None] = None
    train_cameras_sampling_strategy: Suppress[Literal["random", "fps"]] = "random"
    train_cameras_sampling_seed: Suppress[int] = 42
    fps_reset_every: Suppress[int] = 100
    masks_on_gpu: Suppress[bool] = False
    images_on_gpu: Suppress[bool] = False


class OrbitDataset(InputDataset):
    """The cameras of an orbit, with gray pictures, which nerfstudio's viewer shows in their places."""

    def __init__(self, cameras: Cameras) -> None:
        super().__init__(
            DataparserOutputs(
                image_filenames=[Path(f"view_{index:04d}.png") for index in range(len(cameras))],
                cameras=cameras,
                scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])),
            )
        )

    def get_image_float32(self, image_idx: int) -> torch.Tensor:
        """Return a gray picture [H, W, 3] of the camera's size."""
        camera = self.cameras[image_idx]
        return torch.full((int(camera.height), int(camera.width), 3), 0.5)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """Return `image` and `image_idx`."""
        image = self.get_image_float32(image_idx)
        return {"image_idx": image_idx, "image": (255 * image).byte() if image_type == "uint8" else image}


class OrbitDatamanager(RandomCamerasDataManager):
    """Random cameras around the object to train with, a fixed orbit to look at.

    `RandomCamerasDataManager` is a base in name only: `ns-render spiral` refuses most others.

    Args:
        config: where the cameras are, and the size of a cell.
        device: where the cameras of the grid go.
        test_mode: as in nerfstudio.
    """

    config: OrbitDatamanagerConfig

    def __init__(
        self,
        config: OrbitDatamanagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        if config.data is not None:
            raise UserError(f"Text to 3D takes no photographs: leave out --data {config.data}.")
        if config.dataparser.downscale_factor is not None:  # an option of ns-render
            raise UserError("There are no photographs whose size could be scaled: leave out --downscale-factor.")
        self.config = config
        self.device = device
        self.world_size = world_size
        self.local_rank = local_rank
        self.test_mode = test_mode
        self.test_split = "val" if test_mode == "val" else "test"
        self.orbit = evaluation_orbit(config.orbits, config.cell, device)
        self.train_dataset = self.eval_dataset = OrbitDataset(nerfstudio_cameras(self.orbit))
        self.train_dataparser_outputs: DataparserOutputs = self.eval_dataset._dataparser_outputs
        DataManager.__init__(self)

    def setup_train(self) -> None:
        """There is nothing to read."""

    def setup_eval(self) -> None:
        """There is nothing to read."""

    def get_datapath(self) -> Path:
        """Return the folder in which the viewer keeps camera paths: the working directory, since there is no data."""
        return Path.cwd()

    def next_train(self, step: int) -> tuple[GridCamera, dict[str, Any]]:
        """Return the cameras of a step, which depend on the seed and the step alone.

        Returns:
            B cameras, and their `azimuths` and `elevations`, B angles in degrees each.
        """
        views = random_orbits(self.config.orbits, step, self.config.cell, self.device)
        return views.camera, {"azimuths": views.azimuths, "elevations": views.elevations}

    def next_eval(self, step: int) -> tuple[GridCamera, dict[str, Any]]:
        return self.next_eval_image(step)

    def next_eval_image(self, step: int) -> tuple[GridCamera, dict[str, Any]]:
        """Return the next camera of the fixed orbit in turn, and its number as `image_idx`."""
        self.eval_count += 1
        return self.fixed_indices_eval_dataloader[(self.eval_count - 1) % len(self.eval_dataset)]

    @property
    def fixed_indices_eval_dataloader(self) -> "FixedOrbit":
        """All cameras of the fixed orbit."""
        return FixedOrbit(self.orbit.camera)

    @cached_property
    def eval_dataloader(self) -> FixedIndicesEvalDataloader:
        """What `ns-render spiral` takes its first camera from."""
        return FixedIndicesEvalDataloader(input_dataset=self.eval_dataset, device=self.device, num_workers=0)

    def get_train_rays_per_batch(self) -> int:
        """Pixels of a step's pictures: nerfstudio divides by the step's time to show a speed."""
        return self.config.orbits.views * self.orbit.camera.height * self.orbit.camera.width


class FixedOrbit:
    """The cameras of an orbit one by one, each with its number as `image_idx`."""

    def __init__(self, camera: GridCamera) -> None:
        self._camera = camera

    def __len__(self) -> int:
        return len(self._camera.viewmats)

    def __getitem__(self, index: int) -> tuple[GridCamera, dict[str, Any]]:
        one = slice(index, index + 1)
        return replace(self._camera, viewmats=self._camera.viewmats[one], Ks=self._camera.Ks[one]), {"image_idx": index}

    def __iter__(self) -> Iterator[tuple[GridCamera, dict[str, Any]]]:
        return (self[index] for index in range(len(self)))


def nerfstudio_cameras(views: OrbitViews) -> Cameras:
    """Return cameras as nerfstudio has them, on the CPU."""
    camera = views.camera
    focals = torch.tensor(views.focals)[:, None] * camera.cell
    return Cameras(
        camera_to_worlds=views.poses,
        fx=focals,
        fy=focals,
        cx=camera.width / 2,
        cy=camera.height / 2,
        width=camera.width,
        height=camera.height,
        camera_type=CameraType.PERSPECTIVE,
    )
