"""Pairs for stage III: fits a field to a scene and stores what it renders beside the photographs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torchvision.utils import save_image

from lrf_nerfstudio.field.decoder import dense_dilation
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.plugin.fitting import FieldFit, FittingConfig, attempted, trainer_config
from lrf_nerfstudio.plugin.pipeline import LatentPipeline
from lrf_nerfstudio.training.data.scene_pairs import INDEX, VIEWS_PER_FILE, Kind, PairView, ScenePairs, check_options
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import make_folder, replacing
from lrf_nerfstudio.utils.options import AtLeastOne
from lrf_nerfstudio.vae import VAE

CONTACT_SHEET = "contact_sheet.png"
CONTACT_VIEWS = 2
"""Views of either kind on a contact sheet."""


@dataclass
class PairConfig(FittingConfig):
    """How fields are fitted, and when they are rendered."""

    snapshots: tuple[AtLeastOne, ...] = ()
    """Steps after which fields are rendered besides the end: unfinished fields have errors of other kinds."""
    density: AtLeastOne = 1
    """Cells in the place of a latent pixel that fields are rendered on, along each axis: 1 to tune the VAE's decoder in
    stage III, 2 f / cell for decoders of scenes, which is 2 for the default VAE."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield what does not fit the other options; see `check_options`."""
        if any(steps >= self.steps for steps in self.snapshots):
            yield "snapshots", f"must be less than steps, which are {self.steps}"


def check_names(scenes: Sequence[Path]) -> None:
    """Checks that the folders of scenes have different names.

    Raises:
        UserError: they have not.
    """
    names = [scene.expanduser().resolve().name for scene in scenes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"Scenes are kept by the names of their folders, and two of --scenes are called {twice.pop()}.")


def build_scenes(scenes: Sequence[Path], vae: VAE, output: Path, config: PairConfig) -> list[ScenePairs | None]:
    """Builds the pairs of scenes, one after the other; a scene that fails is reported and the others go on.

    Args:
        scenes: data sets in nerfstudio's format; their folders have different names.
        vae: the autoencoder.
        output: folder of the pairs.
        config: how to fit.

    Returns:
        Of each scene its pairs, None where it failed.

    Raises:
        UserError: the folder cannot be made.
    """
    make_folder(output, "--output")
    console, results = Console(), list[ScenePairs | None]()
    for number, scene in enumerate(scenes, start=1):
        console.print(f"Scene {number} of {len(scenes)}: {scene}", markup=False, soft_wrap=True)
        results.append(attempted(partial(build_scene, scene, vae, output, config)))
    return results


def build_scene(scene: Path, vae: VAE, output: Path, config: PairConfig) -> ScenePairs:
    """Builds what is missing of a scene's pairs in `output/<scene>`, with the field's run in `field/` there.

    Raises:
        UserError: pairs of another kind are in the folder, or they cannot be written.
        SystemExit: the scene cannot be fitted; what is wrong has been printed.
    """
    scene = scene.expanduser().resolve()
    folder, wanted = output / scene.name, sorted({*config.snapshots, config.steps})
    options = {name: value for name, value in asdict(config).items() if name not in ("snapshots", "density")}
    pairs = ScenePairs.load(folder) if (folder / INDEX).exists() else None
    missing, lost = wanted, list[Path]()
    if pairs is not None:
        identity = {"scene": str(scene), "VAE fingerprint": vae.fingerprint, "density": config.density}
        check_options(pairs, options | identity)
        lost = pairs.missing_files()
        missing = [steps for steps in wanted if steps not in pairs.latents or folder / pairs.latents[steps] in lost]
    if pairs is None or missing or lost:
        latest = missing[0] if missing else None
        fit = FieldFit(trainer_config(scene, vae.source, folder.resolve(), config), latest)
        if pairs is None or lost:
            pairs = _write_photographs(fit.pipeline, folder, scene, options, config.density, pairs)
        written = pairs  # an index that is there is complete but for the snapshots that are taken now
        fit.run(missing, lambda steps: written.write_latents(steps, render_views(fit.pipeline, config.density)))
        if fit.cost:
            pairs.cost = fit.cost
            pairs.save()
    if missing or not (folder / CONTACT_SHEET).exists():
        write_contact_sheet(pairs, vae)
    return pairs


@torch.no_grad()
def render_views(pipeline: LatentPipeline, density: int) -> list[Tensor]:
    """The latents [C, h k, w k], unscaled, that the field renders at the training and then the held-out cameras.

    Args:
        pipeline: of the field.
        density: k.
    """
    model, latents = pipeline.model, []
    dilation = dense_dilation(model.config.dilation, density)
    for _, dataset in _datasets(pipeline):
        for index in range(len(dataset)):
            camera = grid_camera(dataset.cameras[index : index + 1], model.vae.spatial_factor, model.device)
            field = model.render_field(camera.subdivided(density), dilation).field[0]
            latents.append(model.normalization.to_latent(field).cpu())
    return latents


def _datasets(pipeline: LatentPipeline) -> tuple[tuple[Kind, PinholeDataset], tuple[Kind, PinholeDataset]]:
    return ("train", pipeline.datamanager.train_dataset), ("novel", pipeline.datamanager.eval_dataset)


def _write_photographs(
    pipeline: LatentPipeline,
    folder: Path,
    scene: Path,
    options: dict[str, object],
    density: int,
    older: ScenePairs | None,
) -> ScenePairs:
    """Writes photographs and masks of all views, then the index, with the latents of `older` whose files are there."""
    sources: list[tuple[Kind, PinholeDataset, int]] = [
        (kind, dataset, index) for kind, dataset in _datasets(pipeline) for index in range(len(dataset))
    ]
    views = tuple(
        PairView(dataset.image_filenames[index].name, kind, *dataset.size(index), mask=dataset.has_masks)
        for kind, dataset, index in sources
    )
    normalization, vae = pipeline.model.normalization, pipeline.model.vae
    pairs = ScenePairs(
        folder,
        str(scene),
        vae.source,
        vae.fingerprint,
        vae.spatial_factor,
        options,
        normalization.shift.tolist(),
        normalization.scale.tolist(),
        views,
        density=density,
    )
    if older is not None:
        pairs.latents.update({s: name for s, name in older.latents.items() if (folder / name).exists()})
        pairs.cost = older.cost
    for first in range(0, len(sources), VIEWS_PER_FILE):
        photographs = [dataset.photograph(index) for _, dataset, index in sources[first : first + VIEWS_PER_FILE]]
        pairs.write_photographs(first, photographs)
    pairs.save()
    return pairs


@torch.no_grad()
def write_contact_sheet(pairs: ScenePairs, vae: VAE) -> None:
    """A picture to look at: rows of photograph and decoded render, first of training views, then of held-out ones.

    Raises:
        UserError: the file cannot be written.
    """
    rows, steps = [], max(pairs.latents)
    for kind in ("train", "novel"):
        of_kind = pairs.of_kind(kind)
        for view in of_kind[:: max(1, math.ceil(len(of_kind) / CONTACT_VIEWS))]:
            height, width = pairs.views[view].height, pairs.views[view].width
            image = pairs.photograph(view)[0].float() / 255
            latent = F.avg_pool2d(pairs.latent(view, steps), pairs.density)
            decoded = vae.decode(latent[None], height, width)[0].cpu()
            rows.append(torch.cat([image, decoded], dim=1).permute(2, 0, 1))
    vae.check_overflow()
    save_rows(rows, pairs.folder / CONTACT_SHEET)


def save_rows(rows: Sequence[Tensor], file: Path) -> None:
    """Writes pictures [3, H, W] in [0, 1], sizes may differ, one below the other as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    width = max(row.shape[2] for row in rows)
    padded = [F.pad(row, (0, width - row.shape[2], 0, 4), value=1.0) for row in rows]
    with replacing(file) as stream:
        save_image(torch.cat(padded, dim=1), stream, format="png")
