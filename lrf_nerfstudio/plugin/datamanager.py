"""Serves the latents of the training views and, for evaluation, photographs together with their latents."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.base_datamanager import DataManager, VanillaDataManager
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from rich.progress import track
from tyro.conf import Suppress

from lrf_nerfstudio.plugin.dataparser import parse, setup_dataparser
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, LatentCache, downsample_mask


@dataclass
class LatentDatamanagerConfig(FullImageDatamanagerConfig):
    """Configuration of the data that a scene is trained and evaluated on."""

    _target: type = field(default_factory=lambda: LatentDatamanager)
    latent_cache_dir: Path | None = None
    """Folder of the encoded images, shared by all scenes; if none, lrf_nerfstudio/latents in the user's cache."""
    shifts: int = 1
    """Encode every training photograph at N x N places of the latent grid, parts of a cell apart, which the steps take
    in turn. 2 makes finer fields than 1, for four times the encoding and the memory of latents."""
    # Options of the parent without a meaning here: images are never held in memory, an epoch shows every view once.
    eval_num_images_to_sample_from: Suppress[int] = -1
    eval_num_times_to_repeat_images: Suppress[int] = -1
    eval_image_indices: Suppress[tuple[int, ...] | None] = (0,)
    cache_images: Suppress[Literal["cpu", "gpu"]] = "cpu"
    cache_images_type: Suppress[Literal["uint8", "float32"]] = "float32"
    max_thread_workers: Suppress[int | None] = None
    train_cameras_sampling_strategy: Suppress[Literal["random", "fps"]] = "random"
    fps_reset_every: Suppress[int] = 100
    masks_on_gpu: Suppress[bool] = False
    images_on_gpu: Suppress[bool] = False


class LatentDatamanager(FullImageDatamanager[PinholeDataset], VanillaDataManager[PinholeDataset]):
    """Cameras with latents for training, cameras with photographs and latents for evaluation.

    Images are read one at a time, when they are encoded or compared with; only the latents of the training views stay
    in memory (1/64 of the pixels for a VAE with factor 8). A datamanager without a VAE, as nerfstudio's commands make
    for rendering a data set, has cameras and photographs only.

    `VanillaDataManager` is a base in name only: `ns-render spiral` refuses other datamanagers.
    """

    config: LatentDatamanagerConfig
    train_dataset: PinholeDataset
    eval_dataset: PinholeDataset

    def __init__(
        self,
        config: LatentDatamanagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        vae: VAE | None = None,
        **kwargs: Any,
    ):
        self.config = config
        self.device = device
        self.world_size = world_size
        self.local_rank = local_rank
        self.test_mode = test_mode
        self.test_split: Literal["test", "val"] = "test" if test_mode in ("test", "inference") else "val"
        if config.data is None:
            config.data = config.dataparser.data
        config.dataparser.data = Path(config.data)
        self.dataparser = setup_dataparser(config.dataparser)
        if test_mode == "inference":
            self.dataparser.downscale_factor = 1  # nerfstudio's parsers open an image to choose it
        self.includes_time = self.dataparser.includes_time

        self.train_dataparser_outputs: DataparserOutputs = parse(self.dataparser, config.dataparser.data, "train")
        eval_outputs = parse(self.dataparser, config.dataparser.data, self.test_split)
        self.train_dataset = PinholeDataset(self.train_dataparser_outputs, config.camera_res_scale_factor)
        self.eval_dataset = PinholeDataset(eval_outputs, config.camera_res_scale_factor)
        self.exclude_batch_keys_from_device = self.train_dataset.exclude_batch_keys_from_device
        DataManager.__init__(self)

        self._latent_cache = None
        if vae is not None:
            self._latent_cache = LatentCache(config.latent_cache_dir, vae)
            self.spatial_factor = vae.spatial_factor
        # [shifts][views], without a shift first
        self._shifted_views: list[list[tuple[Cameras, dict[str, Any]]]] = [[]]
        self._epoch = -1
        self._epoch_order: list[int] = []

    @property
    def latent_cache(self) -> LatentCache:
        assert self._latent_cache is not None, "a datamanager without a VAE has no latents"
        return self._latent_cache

    @property
    def train_views(self) -> list[tuple[Cameras, dict[str, Any]]]:
        """Camera and batch of each training view, the photograph's corner being a corner of the grid."""
        return self._shifted_views[0]

    def encode_train_views(self) -> None:
        """Fill `train_views` from the cache or, where it has nothing, with the VAE.

        Raises:
            UserError: an image is missing, damaged or of another size than its camera; the cache cannot be written; an
                option is out of range.
        """
        if self.config.shifts < 1:
            raise UserError(f"--pipeline.datamanager.shifts must be 1 or more, not {self.config.shifts}.")
        dataset = self.train_dataset
        dataset.check_sizes()
        self.eval_dataset.check_sizes()
        offsets = sorted({i * self.spatial_factor // self.config.shifts for i in range(self.config.shifts)})
        cuts = list(itertools.product(offsets, offsets))
        # Cameras are cut all at once: small tensors that stay between photographs that go would fragment the memory.
        cameras = [_cut_cameras(dataset.cameras, *cut) for cut in cuts]
        views = [
            [self._training_view(index, of_cut, *cut) for cut, of_cut in zip(cuts, cameras, strict=True)]
            for index in track(range(len(dataset)), description="Encoding the training views", transient=True)
        ]
        self._shifted_views = [list(of_shift) for of_shift in zip(*views, strict=True)]

    def _training_view(self, index: int, cameras: Cameras, top: int, left: int) -> tuple[Cameras, dict[str, Any]]:
        """Camera and batch of a view without `top` rows and `left` columns; `cameras` are all views', cut so."""
        dataset = self.train_dataset
        camera = cameras[index : index + 1].to(self.device)
        camera.metadata = {**(camera.metadata or {}), "cam_idx": index}
        latent = self.latent_cache.load_or_encode(
            dataset.files(index),
            dataset.preprocessing(index) | ({"cut": [top, left]} if top or left else {}),
            lambda: dataset.photograph(index)[0][top:, left:],
            (int(camera.height), int(camera.width)),
        )
        batch: dict[str, Any] = {"image_idx": index, "latent": latent.to(self.device)}
        mask = dataset.photograph(index)[1] if dataset.has_masks else None
        if mask is not None:
            batch["latent_mask"] = downsample_mask(mask[top:, left:], self.spatial_factor).to(self.device)
        return camera, batch

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """The camera and the batch {image_idx, latent [C, h, w], latent_mask [h, w] if there are masks} of a step.

        Every epoch is a permutation that depends on the seed and the epoch alone, so a resumed run goes on with the
        views that the interrupted one would have seen. From one epoch to the next, a view is shifted otherwise.
        """
        epoch, position = divmod(step, len(self.train_views))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.config.train_cameras_sampling_seed + epoch)
            self._epoch, self._epoch_order = epoch, torch.randperm(len(self.train_views), generator=generator).tolist()
        view = self._epoch_order[position]
        camera, batch = self._shifted_views[(epoch + view) % len(self._shifted_views)][view]
        return camera, dict(batch)

    def next_eval(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        return self.next_eval_image(step)

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """The next held-out view in turn; see `eval_view`."""
        self.eval_count += 1
        return self.eval_view((self.eval_count - 1) % len(self.eval_dataset))

    def eval_view(self, index: int) -> tuple[Cameras, dict[str, Any]]:
        """A held-out camera and its batch {image_idx, image [H, W, 3], mask [H, W] if any, latent [C, h, w]}."""
        dataset = self.eval_dataset
        image, mask = dataset.photograph(index)
        latent = self.latent_cache.load_or_encode(
            dataset.files(index), dataset.preprocessing(index), lambda: image, dataset.size(index)
        )
        batch = {"image_idx": index, "image": image.to(self.device), "latent": latent.to(self.device)}
        if mask is not None:
            batch["mask"] = mask.to(self.device)
        return dataset.cameras[index : index + 1].to(self.device), batch

    @property
    def fixed_indices_eval_dataloader(self) -> "EvalViews":
        """All held-out views, each read when it is reached."""
        return EvalViews(self)

    @cached_property
    def eval_dataloader(self) -> FixedIndicesEvalDataloader:
        """What `ns-render spiral` takes its first camera from."""
        return FixedIndicesEvalDataloader(input_dataset=self.eval_dataset, device=self.device, num_workers=0)

    def get_train_rays_per_batch(self) -> int:
        """Pixels of the first training view: nerfstudio divides by the step's time to show a speed."""
        return int(self.train_dataset.cameras.width[0] * self.train_dataset.cameras.height[0])


def _cut_cameras(cameras: Cameras, top: int, left: int) -> Cameras:
    """Cameras of photographs without `top` rows of pixels above and `left` columns: the latent grid begins there."""
    cut = copy.copy(cameras)
    cut.cx, cut.cy = cameras.cx - left, cameras.cy - top
    cut.width, cut.height = cameras.width - left, cameras.height - top
    return cut


class EvalViews:
    """The held-out views of a datamanager as a sized iterable, without holding them in memory."""

    def __init__(self, datamanager: LatentDatamanager):
        self.datamanager = datamanager

    def __len__(self) -> int:
        return len(self.datamanager.eval_dataset)

    def __getitem__(self, index: int) -> tuple[Cameras, dict[str, Any]]:
        return self.datamanager.eval_view(index)

    def __iter__(self) -> Iterator[tuple[Cameras, dict[str, Any]]]:
        return (self[index] for index in range(len(self)))
