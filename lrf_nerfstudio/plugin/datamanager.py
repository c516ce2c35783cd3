"""Serves the latents of the training views and, for evaluation, photographs together with their latents."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.base_datamanager import DataManager, VanillaDataManager
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from torch import Tensor
from tyro.conf import Suppress

from lrf_nerfstudio.field.cameras import GridCamera
from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.dataparser import parse, select_images, setup_dataparser, with_points
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.plugin.photographs import Part, Photographs
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne, NotNegative, Range
from lrf_nerfstudio.utils.progress import track
from lrf_nerfstudio.vae import VAE, LatentCache, downsample_mask

PARSER_RANGES = {
    "downscale_factor": Range(least=1),
    "eval_interval": Range(least=1),
    "scale_factor": Range(above=0),
    "scene_scale": Range(above=0),
    "train_split_fraction": Range(above=0, below=1),
}
"""Of the options that nerfstudio's parsers of data sets have in common."""


@dataclass
class LatentDatamanagerConfig(FullImageDatamanagerConfig):
    """Configuration of the data that a scene is trained and evaluated on."""

    _target: type = field(default_factory=lambda: LatentDatamanager)
    latent_cache_dir: Path | None = None
    """Folder of the encoded images, shared by all scenes; if none, lrf_nerfstudio/latents in the user's cache."""
    views_per_step: AtLeastOne = 1
    """Training views in a step, which one rasterization renders where their photographs have one size. More than 1 is
    for GPUs, which a single small grid does not fill."""
    shifts: AtLeastOne = 1
    """Encode every training photograph at N x N places of the latent grid, parts of a cell apart, which the steps take
    in turn. 2 makes finer fields than 1, for four times the encoding and the memory of latents."""
    train_images: tuple[str, ...] = ()
    """Names of the photographs that are trained on, instead of the data parser's choice; needs `eval_images`."""
    eval_images: tuple[str, ...] = ()
    """Names of the photographs that are held out; needs `train_images`."""
    crop: AtLeastOne = 1
    """Cut photographs in the middle to a multiple of so many pixels along each axis, as some papers do."""
    points: Path | None = None
    """A point cloud (.ply, in the coordinates of the data set's cameras) that the first Gaussians are put at, instead
    of the data set's own. `lrf triangulate` makes one from known cameras."""
    photograph_memory: NotNegative = 4.0
    """Gigabytes of training photographs that stay in memory, as bytes, for the scene's decoder; the others are read
    when they are needed."""
    photograph_side: AtLeastOne = 1024
    """The scene's decoder is fitted to whole photographs or, of larger ones, to random parts of this side in pixels."""
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

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what is out of range among the options of nerfstudio's parser; see `check_options`."""
        for name, limits in PARSER_RANGES.items():
            value = getattr(self.dataparser, name, None)
            if value is not None and value not in limits:
                yield f"dataparser.{name}", f"must be {limits}"


@dataclass
class TrainView:
    """A training view on the latent grid, on the device that trains."""

    camera: GridCamera
    target: Tensor  # [1, h, w, C] field latents; latents [1, C, h, w] until `map_targets`
    mask: Tensor | None  # [1, h, w], True where a cell counts


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
        if bool(config.train_images) != bool(config.eval_images):
            raise UserError("Give both --pipeline.datamanager.train-images and .eval-images, or neither.")
        if config.train_images and hasattr(config.dataparser, "eval_mode"):
            config.dataparser.eval_mode = "all"  # the lists choose from all photographs
        self.dataparser = setup_dataparser(config.dataparser)
        if test_mode == "inference":
            self.dataparser.downscale_factor = 1  # nerfstudio's parsers open an image to choose it
        self.includes_time = self.dataparser.includes_time

        self.train_dataparser_outputs: DataparserOutputs = parse(self.dataparser, config.dataparser.data, "train")
        eval_outputs = parse(self.dataparser, config.dataparser.data, self.test_split)
        if config.train_images:
            self.train_dataparser_outputs = select_images(self.train_dataparser_outputs, config.train_images)
            eval_outputs = select_images(eval_outputs, config.eval_images)
        if config.points is not None and test_mode == "val":  # only training begins at points
            self.train_dataparser_outputs = with_points(self.train_dataparser_outputs, config.points)
        scale, crop = config.camera_res_scale_factor, config.crop
        if crop < 1:
            raise UserError(f"--pipeline.datamanager.crop must be 1 or more, not {crop}.")
        self.train_dataset = PinholeDataset(self.train_dataparser_outputs, scale, crop)
        self.eval_dataset = PinholeDataset(eval_outputs, scale, crop)
        self.exclude_batch_keys_from_device = self.train_dataset.exclude_batch_keys_from_device
        DataManager.__init__(self)

        self._latent_cache = None
        if vae is not None:
            self._latent_cache = LatentCache(config.latent_cache_dir, vae)
            self.spatial_factor = vae.spatial_factor
        self._shifted_views: list[list[TrainView]] = [[]]  # [shifts][views], without a shift first
        self._epoch = -1
        self._epoch_order: list[list[int]] = []
        self._photographs: Photographs | None = None
        self._latent_steps = 0
        self._decoder: list[SceneDecoder] = []  # in a list, which hides it from nn.Module
        self._latents_too = False

    @property
    def latent_cache(self) -> LatentCache:
        assert self._latent_cache is not None, "a datamanager without a VAE has no latents"
        return self._latent_cache

    # ---------------------------------------------------------------- training

    @property
    def train_views(self) -> list[TrainView]:
        """The training views, the photograph's corner being a corner of the grid."""
        return self._shifted_views[0]

    def encode_train_views(self) -> None:
        """Fill `train_views` from the cache or, where it has nothing, with the VAE; targets are latents at first.

        Raises:
            UserError: if an image is missing, damaged or of another size than its camera, or if the cache cannot
                be written.
        """
        dataset = self.train_dataset
        dataset.check_sizes()
        self.eval_dataset.check_sizes()
        offsets = sorted({i * self.spatial_factor // self.config.shifts for i in range(self.config.shifts)})
        cuts = list(itertools.product(offsets, offsets))
        # Cameras are made all at once: small tensors that stay between photographs that go would fragment the memory.
        cameras = [
            [self._grid_camera(index, of_cut) for index in range(len(dataset))]
            for of_cut in (_cut_cameras(dataset.cameras, *cut) for cut in cuts)
        ]
        views = [
            [self._training_view(index, of_cut[index], *cut) for cut, of_cut in zip(cuts, cameras, strict=True)]
            for index in track(range(len(dataset)), "Encoding the training views")
        ]
        self._shifted_views = [list(of_shift) for of_shift in zip(*views, strict=True)]

    def _grid_camera(self, index: int, cameras: Cameras) -> GridCamera:
        return grid_camera(cameras[index : index + 1], self.spatial_factor, self.device, index)

    def _training_view(self, index: int, camera: GridCamera, top: int, left: int) -> TrainView:
        """Make a training view without `top` rows of pixels and `left` columns; `camera` is cut so already."""
        dataset = self.train_dataset
        latent = self.latent_cache.load_or_encode(
            dataset.files(index),
            dataset.preprocessing(index) | ({"cut": [top, left]} if top or left else {}),
            lambda: dataset.photograph(index)[0][top:, left:],
            (camera.height, camera.width),
        )
        mask = dataset.photograph(index)[1] if dataset.has_masks else None
        if mask is not None:
            mask = downsample_mask(mask[top:, left:], self.spatial_factor)[None].to(self.device)
        return TrainView(camera, latent[None].to(self.device), mask)

    def map_targets(self, mapping: Callable[[Tensor], Tensor]) -> None:
        """Replace the targets of all training views by what a function makes of them, one view at a time."""
        for view in itertools.chain.from_iterable(self._shifted_views):
            view.target = mapping(view.target).contiguous()

    def prepare_training(self, latent_steps: int, decoder: SceneDecoder | None, latents_too: bool) -> None:
        """Learn from which step on photographs are served.

        Args:
            latent_steps: the step.
            decoder: whose pictures are compared with them.
            latents_too: whether their latents are served with them where the decoder's grid contains the VAE's.
        """
        self._latent_steps, self._latents_too = latent_steps, latents_too
        if decoder is not None:
            pinned = torch.device(self.device).type == "cuda" and torch.cuda.is_available()
            self._photographs = Photographs(self.train_dataset, 1e9 * self.config.photograph_memory, pinned)
            self._decoder = [decoder]

    def next_train(self, step: int) -> tuple[GridCamera, dict[str, Any]]:
        """Return the cameras and the batch of a step: latents first and, from `latent_steps` on, photographs."""
        if self._photographs is not None and step >= self._latent_steps:
            return self._next_photograph(step, self._photographs, self._decoder[0])
        return self._next_latents(step)

    def _next_photograph(
        self, step: int, photographs: Photographs, decoder: SceneDecoder
    ) -> tuple[GridCamera, dict[str, Any]]:
        """Return a camera of the decoder's dense grid, and what it is to show.

        Which part of which photograph it is depends on the seed and the step alone.

        Returns:
            The camera, and `image_idx`, `photograph` [h, w, 3] (bytes), `inside` (the rows and columns of the decoded
            picture that are to look like it) and, if there are masks, `mask` [h, w] (True: counts). Where latents are
            served too, also `target` [1, h, w, C] (field latents), `dense`, the rows and columns of the camera's grid
            that lie over them, and, if there are masks, `target_mask` [1, h, w].
        """
        index, following = (self._photograph_index(step + ahead) for ahead in (0, 1))
        photograph = photographs.take(index, following)
        generator = random.Random(f"{self.config.train_cameras_sampling_seed}/{step}")
        height, width = photograph.image.shape[:2]
        margin = decoder.cell * decoder.margin
        part = Part.random(height, width, self.config.photograph_side, self.spatial_factor, margin, generator)
        batch: dict[str, Any] = {"image_idx": [index], "inside": part.inside}
        batch["photograph"] = part.of(photograph.image).to(self.device, non_blocking=True)
        if photograph.mask is not None:
            batch["mask"] = part.of(photograph.mask).to(self.device, non_blocking=True)
        view = self.train_views[index]
        if self._latents_too and (found := part.latent_cells(decoder)) is not None:
            rows, columns = found
            batch["dense"] = rows.dense, columns.dense
            batch["target"] = view.target[:, rows.cells, columns.cells]
            if view.mask is not None:
                batch["target_mask"] = view.mask[:, rows.cells, columns.cells]
        return part.camera(view.camera).subdivided(decoder.density), batch

    def _photograph_index(self, step: int) -> int:
        """Return the photograph of a step; every epoch is a permutation of its own."""
        epoch, position = divmod(step - self._latent_steps, len(self.train_views))
        return _shuffled(len(self.train_views), self.config.train_cameras_sampling_seed, epoch)[position]

    def _next_latents(self, step: int) -> tuple[GridCamera, dict[str, Any]]:
        """Return the cameras and the batch of a step: `views_per_step` views whose photographs have one size.

        Every epoch shows every view once, in an order that depends on the seed and the epoch alone, so a resumed run
        goes on with the views that the interrupted one would have seen. From one epoch to the next, a view is shifted
        otherwise.

        Returns:
            The cameras, and `image_idx` (numbers of the views), `target` [B, h, w, C] (field latents) and, if there
            are masks, `mask` [B, h, w] (True: counts).
        """
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._epoch_order = epoch, self._order(epoch)
        indices = self._epoch_order[position]
        shift = (epoch + indices[0]) % len(self._shifted_views)
        views = [self._shifted_views[shift][index] for index in indices]
        batch: dict[str, Any] = {"image_idx": indices, "target": _joined([view.target for view in views])}
        if masks := [view.mask for view in views if view.mask is not None]:
            batch["mask"] = _joined(masks)
        return GridCamera.batch([view.camera for view in views]), batch

    @cached_property
    def _steps_per_epoch(self) -> int:
        return len(self._order(0))

    def _order(self, epoch: int) -> list[list[int]]:
        """Return the views of each step of an epoch; as many steps in every epoch."""
        generator = torch.Generator().manual_seed(self.config.train_cameras_sampling_seed + epoch)
        steps: list[list[int]] = []
        waiting: dict[tuple[int, int], list[int]] = {}  # by size
        for index in torch.randperm(len(self.train_views), generator=generator).tolist():
            of_size = waiting.setdefault(self.train_dataset.size(index), [])
            of_size.append(index)
            if len(of_size) == self.config.views_per_step:
                steps.append(of_size.copy())
                of_size.clear()
        return steps + [rest for rest in waiting.values() if rest]

    # ---------------------------------------------------------------- evaluation

    def next_eval(self, step: int) -> tuple[GridCamera, dict[str, Any]]:
        return self.next_eval_image(step)

    def next_eval_image(self, step: int) -> tuple[GridCamera, dict[str, Any]]:
        """Return the next held-out view in turn; see `eval_view`."""
        self.eval_count += 1
        return self.eval_view((self.eval_count - 1) % len(self.eval_dataset))

    def eval_view(self, index: int) -> tuple[GridCamera, dict[str, Any]]:
        """Return a held-out camera, and `image_idx`, `image` [H, W, 3], `mask` [H, W] if any, `latent` [C, h, w]."""
        dataset = self.eval_dataset
        image, mask = dataset.photograph(index)
        latent = self.latent_cache.load_or_encode(
            dataset.files(index), dataset.preprocessing(index), lambda: image, dataset.size(index)
        )
        batch = {"image_idx": index, "image": image.to(self.device), "latent": latent.to(self.device)}
        if mask is not None:
            batch["mask"] = mask.to(self.device)
        return grid_camera(dataset.cameras[index : index + 1], self.spatial_factor, self.device), batch

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


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """Return the numbers below `count` in an order that depends on the other arguments alone."""
    return random.Random(f"{seed}, epoch {epoch}").sample(range(count), count)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Join tensors along their first axis, a single one without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class EvalViews:
    """The held-out views of a datamanager as a sized iterable, without holding them in memory."""

    def __init__(self, datamanager: LatentDatamanager):
        self.datamanager = datamanager

    def __len__(self) -> int:
        return len(self.datamanager.eval_dataset)

    def __getitem__(self, index: int) -> tuple[GridCamera, dict[str, Any]]:
        return self.datamanager.eval_view(index)

    def __iter__(self) -> Iterator[tuple[GridCamera, dict[str, Any]]]:
        return (self[index] for index in range(len(self)))
