"""Fits a field to a scene by one of the methods that a table compares, and measures it on the held-out views."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.utils.io import load_from_json

from lrf_nerfstudio.correspondence.triangulation import TriangulationConfig
from lrf_nerfstudio.evaluation.splits import SplitRule, split
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.dataparser import (
    in_dataset_coordinates,
    parse,
    scene_parser,
    select_images,
    setup_dataparser,
)
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.plugin.fitting import FieldFit, FittingConfig, trainer_config
from lrf_nerfstudio.plugin.method import latent_splatfacto
from lrf_nerfstudio.plugin.pipeline import LatentPipeline
from lrf_nerfstudio.plugin.points import triangulated_points, write_points
from lrf_nerfstudio.plugin.trainer import LatentTrainerConfig
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.machine import machine
from lrf_nerfstudio.vae import VAE
from lrf_nerfstudio.vae.sources import REDUCED_RGB, RGB

MIN_POINTS = 4
"""Fewer points are none: the first scales come from the three nearest neighbors."""


@dataclass(frozen=True)
class SceneData:
    """A scene as a protocol divides it.

    Attributes:
        folder: in nerfstudio's format or COLMAP's.
        images: N, for the photographs in `images_N`; 1 for `images`; None leaves the choice to nerfstudio.
        train: names of the photographs that are trained on; empty leaves the choice to nerfstudio: all but every 8th.
        held_out: names of the others.
        crop: photographs are cut in the middle to a multiple of so many pixels.
        points: where the first Gaussians are: at the data set's points, at random, or at those of a file.
    """

    folder: Path
    images: int | None = None
    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    crop: int = 1
    points: Literal["sfm", "random"] | Path = "sfm"


def divided(folder: Path, images: int, rule: SplitRule) -> SceneData:
    """Divide the photographs of a scene by a rule.

    Raises:
        UserError: if the scene cannot be read, has no folder `images_N`, too few photographs, or a division of its own.
    """
    file = folder / "transforms.json"
    lists = [f"{part}_filenames" for part in ("train", "val", "test")]
    if file.exists() and any(name in load_from_json(file) for name in lists):  # nerfstudio would obey them
        raise UserError(
            f"{file} says itself which photographs are held out. A protocol divides them by a rule: measure a copy of "
            f"the scene whose transforms.json lacks {', '.join(lists)}."
        )
    resized = folder / f"images_{images}"
    if images > 1 and not resized.is_dir():
        raise UserError(
            f"{resized} is missing: the photographs of {folder / 'images'}, {images} times smaller along each axis and "
            "under the same names."
        )
    outputs = _all_photographs(folder, images)
    names = [path.name for path in outputs.image_filenames]
    try:
        train, held_out = split(rule, names, outputs.cameras.camera_to_worlds[:, :3, 3].numpy())
    except ValueError as error:
        raise UserError(f"{folder} cannot be divided as the protocol asks for: {error}.") from error
    return SceneData(folder, images, tuple(names[i] for i in train), tuple(names[i] for i in held_out))


def triangulate_training_views(scene: SceneData, file: Path) -> Path | Literal["random"]:
    """Write points that are found in the photographs that are trained on alone, unless the file is there.

    Returns:
        The file, or `random` where hardly any were found.

    Raises:
        UserError: if a photograph cannot be read or the file not be written.
    """
    if not file.exists():
        outputs = select_images(_all_photographs(scene.folder, scene.images), scene.train)
        dataset = PinholeDataset(outputs, crop=scene.crop)
        dataset.check_sizes()
        points = triangulated_points(dataset, TriangulationConfig())
        if len(points) < MIN_POINTS:
            return "random"
        write_points(file, in_dataset_coordinates(points, outputs), "--output")
    return file.resolve()


def _all_photographs(folder: Path, images: int | None) -> DataparserOutputs:
    parser = scene_parser(folder, images, points=False)
    parser.eval_mode = "all"  # both of the parsers have it
    return parse(setup_dataparser(parser), folder, "train")


@dataclass(frozen=True)
class Method:
    """What a row of a table is about.

    Attributes:
        name: in tables.
        source: the VAE, as `--pipeline.vae.source`.
        scene_decoder: whether the last part of the run fits the scene's own decoder.
        opacity_dropout: see the model's option.
    """

    name: str
    source: str
    scene_decoder: bool = False
    opacity_dropout: float = 0.0

    @property
    def in_rgb(self) -> bool:
        """Whether fields are fitted to photographs, or to smaller ones, instead of latents."""
        return self.source == RGB or REDUCED_RGB.fullmatch(self.source) is not None


@dataclass(frozen=True)
class MeasuringConfig:
    """How fields are fitted and measured, beyond the method.

    Attributes:
        steps: of a fit.
        seed: of everything random.
        lpips: the network of LPIPS.
        download_lpips: whether its weights may be downloaded.
        latent_cache_dir: where latents are kept; None stands for the user's cache.
    """

    steps: int
    seed: int = latent_splatfacto.config.machine.seed
    lpips: Literal["alex", "vgg"] = "alex"
    download_lpips: bool = False
    latent_cache_dir: Path | None = None


def measuring_config(scene: SceneData, method: Method, output: Path, config: MeasuringConfig) -> LatentTrainerConfig:
    """Return the configuration of the fit: that of `ns-train latent-splatfacto` but for what the arguments say."""
    options = trainer_config(scene.folder, method.source, output, FittingConfig(config.steps, scene.images))
    data, model = options.pipeline.datamanager, options.pipeline.model
    options.machine.seed = data.train_cameras_sampling_seed = config.seed  # by default, both are one number
    data.dataparser = scene_parser(scene.folder, scene.images, points=scene.points == "sfm")
    data.train_images, data.eval_images, data.crop = scene.train, scene.held_out, scene.crop
    data.points = scene.points if isinstance(scene.points, Path) else None
    data.latent_cache_dir = config.latent_cache_dir
    if method.scene_decoder:
        model.scene_decoder = copy.deepcopy(latent_splatfacto.config.pipeline.model.scene_decoder)
    model.opacity_dropout, model.lpips_network = method.opacity_dropout, config.lpips
    model.download_lpips = config.download_lpips
    return options


def measure(
    scene: SceneData, method: Method, vae: VAE, output: Path, config: MeasuringConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fit a field, or take up a fit that was interrupted or is finished, and measure it as ns-eval does.

    Args:
        scene: the photographs.
        method: how pictures are made of them.
        vae: that of the method. VAEs with the same encoder share fits, except with the scene's own decoder.
        output: folder of fits.
        config: options.

    Returns:
        row: `novel`, the metrics of ns-eval, means over the held-out views; `cost`, as `FieldFit.cost` and `gaussians`,
            their number; `vae`, what identifies it; and `machine`, what it was measured on.
        pictures: `photograph` and `render`, [H, W, 3] uint8, of the held-out view in the middle.

    Raises:
        UserError: if the scene or the VAE cannot be used, or a file not be written.
        SystemExit: as UserError, where the message has been printed.
    """
    names = [vae.fingerprint[:12], *([vae.decoder_fingerprint[:12], "decoder"] if method.scene_decoder else [])]
    names += [f"dropout{method.opacity_dropout:g}"] if method.opacity_dropout else []
    folder = output / "-".join([*names, f"seed{config.seed}"])
    fit = FieldFit(measuring_config(scene, method, folder.resolve(), config))
    fit.run([], lambda steps: None)
    pipeline = fit.pipeline
    novel = pipeline.get_average_eval_image_metrics()
    novel.pop("num_rays", None)
    row = {
        "novel": novel,
        "cost": fit.cost | {"gaussians": pipeline.model.num_points},
        "vae": {
            "source": method.source,
            "fingerprint": vae.fingerprint,
            "decoder_fingerprint": vae.decoder_fingerprint,
        },
        "machine": machine(),
    }
    return row, _pictures(pipeline.eval())  # nerfstudio's evaluation ends in training mode


@torch.no_grad()
def _pictures(pipeline: LatentPipeline) -> dict[str, np.ndarray]:
    dataset = pipeline.datamanager.eval_dataset
    view = len(dataset) // 2
    camera = grid_camera(dataset.cameras[view : view + 1], pipeline.model.vae.spatial_factor, pipeline.model.device)
    pictures = {"photograph": dataset.photograph(view)[0], "render": pipeline.model.render(camera)["rgb"]}
    return {name: (255 * picture).round().to(torch.uint8).cpu().numpy() for name, picture in pictures.items()}
