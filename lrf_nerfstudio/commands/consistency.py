"""Measure whether pictures of a trained scene agree from view to view.

Close cameras are rendered on ways from held-out views to the nearest training view. The picture of each is warped into
the next one by the rendered depth and compared where both see the same point; the photographs at both ends of a way
are compared likewise, beside the pictures rendered there. Blurred pictures agree more easily than sharp ones, so the
numbers are to be read together with the PSNR of the pictures themselves.

Writes `consistency.json`, a row for each scene, kind of picture and distance, and `<number>-<scene>.png`: a picture,
the picture before warped into it, the picture itself, and four times their difference, of each kind in a row.

Example: `lrf consistency --load-config outputs/fox/latent-splatfacto/run/config.yml --output measures`.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lrf_nerfstudio.evaluation.consistency import Agreement, DepthView, compare, find_in
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import make_folder, write_atomically
from lrf_nerfstudio.utils.options import AtLeastOne, Positive
from lrf_nerfstudio.utils.progress import track

if TYPE_CHECKING:
    from nerfstudio.cameras.cameras import Cameras

    from lrf_nerfstudio.plugin.dataset import PinholeDataset
    from lrf_nerfstudio.plugin.pipeline import LatentPipeline

SOLID = 0.95
"""Accumulated opacity from which a pixel's depth is that of a surface."""

SHOWN_DIFFERENCE = 4
"""Factor to the differences in pictures."""

PHOTOGRAPH = "photograph"


@dataclass
class Consistency:
    """Measures whether pictures of trained scenes agree from view to view."""

    load_config: tuple[Path, ...]
    """The config.yml of each trained scene; one that was trained with `--pipeline.vae.source rgb` is measured too."""
    output: Path
    """Folder for the table and the pictures, which are replaced."""
    ways: AtLeastOne = 6
    """Held-out views from which a way leads to the nearest training view."""
    steps: AtLeastOne = 8
    """Steps of a way, which has one camera more."""
    tolerance: Positive = 0.01
    """Largest relative difference of depths at which two views see the same point."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        scene: folder of the data set.
        vae: source of the VAE.
        cameras: "next to each other" on a way, or at its "ends", where the photographs are.
        picture: its kind.
        psnr: of pictures against others that are warped into their views, mean over pairs of views, in dB.
        seen: mean share of the pixels whose points both views see.
        pairs: number of pairs of views.
    """

    scene: str
    vae: str
    cameras: str
    picture: str
    psnr: float
    seen: float
    pairs: int


@dataclass(frozen=True)
class View:
    """What is compared of a camera: its geometry, and pictures [H, W, 3] by kind."""

    geometry: DepthView
    pictures: dict[str, Tensor]


@torch.no_grad()
def rendered(pipeline: "LatentPipeline", camera: "Cameras") -> View:
    """Render a camera with every way of making a picture that the scene has."""
    from lrf_nerfstudio.plugin.cameras import grid_camera
    from lrf_nerfstudio.vae.sources import RGB

    model = pipeline.model
    outputs = model.render(grid_camera(camera, model.vae.spatial_factor, model.device))
    if model.vae.source == RGB:
        pictures = {"RGB": outputs["rgb"]}
    else:
        pictures = {"the scene's decoder": outputs["rgb"]} if "vae_rgb" in outputs else {}
        pictures |= {"the VAE": outputs.get("vae_rgb", outputs["rgb"]), "latent_rgb": outputs["latent_rgb"]}
    depth = outputs["depth"].where(outputs["accumulation"] > SOLID, torch.nan)[..., 0]
    pixels = grid_camera(camera, 1, model.device)
    return View(DepthView(pixels.viewmats[0], pixels.Ks[0], depth), pictures)


def with_photograph(view: View, dataset: "PinholeDataset", index: int) -> View:
    """Add the photograph of a view; no surface is where its mask is false."""
    image, mask = dataset.photograph(index)
    geometry, device = view.geometry, view.geometry.depth.device
    depth = geometry.depth if mask is None else geometry.depth.where(mask.to(device), torch.nan)
    return View(DepthView(geometry.viewmat, geometry.K, depth), view.pictures | {PHOTOGRAPH: image.to(device)})


def chosen_ends(pipeline: "LatentPipeline", count: int) -> list[tuple[int, int]]:
    """Choose held-out views evenly, and to each the nearest training view; their numbers."""
    training, held_out = (
        dataset.cameras.camera_to_worlds[:, :3, 3]
        for dataset in (pipeline.datamanager.train_dataset, pipeline.datamanager.eval_dataset)
    )
    nearest = torch.cdist(held_out, training).argmin(dim=1)
    count = min(count, len(held_out))
    return [(index, int(nearest[index])) for index in (i * len(held_out) // count for i in range(count))]


def way(first: "Cameras", last: "Cameras", steps: int) -> Iterator["Cameras"]:
    """Yield cameras from one to another, evenly, all with the intrinsics of the first."""
    from nerfstudio.cameras.camera_utils import get_interpolated_poses

    ends = [camera.camera_to_worlds[0].cpu().numpy() for camera in (first, last)]
    for pose in get_interpolated_poses(*ends, steps + 1):
        camera = first[0:1]
        camera.camera_to_worlds = torch.as_tensor(pose, dtype=torch.float32)[None]
        yield camera


def agreements(view: View, other: View, tolerance: float) -> tuple[dict[str, Agreement], float]:
    """Compare the pictures of a view with those of another, by kind; and the share of pixels that is compared."""
    points, seen = find_in(view.geometry, other.geometry, tolerance)
    kinds = [kind for kind in view.pictures if kind in other.pictures]
    share = float(seen.float().mean())
    return {kind: compare(view.pictures[kind], other.pictures[kind], points, seen) for kind in kinds}, share


def measure_scene(pipeline: "LatentPipeline", options: Consistency) -> tuple[list[Row], Tensor]:
    """Measure a trained scene.

    Returns:
        The rows, and a picture [3, H, W] in [0, 1] of a step in the middle of the first way.
    """
    pipeline.eval()
    train, held_out = pipeline.datamanager.train_dataset, pipeline.datamanager.eval_dataset
    psnrs: dict[tuple[str, str], list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    shown: Tensor | None = None

    def note(cameras: str, view: View, other: View) -> None:
        nonlocal shown
        found, share = agreements(view, other, options.tolerance)
        if share == 0:
            return
        shares[cameras].append(share)
        for kind, agreement in found.items():
            psnrs[cameras, kind].append(agreement.psnr)
        if cameras != "ends" and (shown is None or len(shares[cameras]) == options.steps // 2):
            shown = sheet(view, other, found)

    for index, neighbor in track(chosen_ends(pipeline, options.ways), "Walking from view to view"):
        first, last = held_out.cameras[index : index + 1], train.cameras[neighbor : neighbor + 1]
        before: View | None = None
        for camera in way(first, last, options.steps):
            view = rendered(pipeline, camera)
            if before is not None:
                note("next to each other", view, before)
            before = view
        ends = rendered(pipeline, first), rendered(pipeline, last)
        note("ends", with_photograph(ends[0], held_out, index), with_photograph(ends[1], train, neighbor))
    if shown is None:
        raise UserError("No two views of the scene see the same: raise --steps, or --tolerance where depth is rough.")
    data, source = pipeline.datamanager.config.data, pipeline.model.vae.source
    assert data is not None
    rows = []
    for (cameras, kind), values in psnrs.items():
        seen = shares[cameras]
        rows.append(
            Row(data.name, source, cameras, kind, sum(values) / len(values), sum(seen) / len(seen), len(values))
        )
    return sorted(rows, key=lambda row: row.cameras == "ends"), shown


def sheet(view: View, other: View, found: dict[str, Agreement]) -> Tensor:
    """Draw a row for each kind of picture: of the other view, that warped, of this view, and their difference."""
    height, width = view.geometry.size
    rows = []
    for kind, agreement in found.items():
        difference = (SHOWN_DIFFERENCE * agreement.difference).clamp(0, 1)
        rows.append(
            torch.cat([other.pictures[kind][:height, :width], agreement.warped, view.pictures[kind], difference], dim=1)
        )
    return torch.cat(rows).permute(2, 0, 1).cpu()


def main(options: Consistency) -> None:
    """Measure the scenes, write the files, print the table."""
    from nerfstudio.utils.eval_utils import eval_setup
    from torchvision.utils import save_image

    from lrf_nerfstudio.utils.files import replacing

    if not options.load_config:
        raise UserError("There is nothing to measure: give --load-config one scene or more.")
    make_folder(options.output, "--output")
    rows: list[Row] = []
    for number, config in enumerate(options.load_config):
        _, pipeline, _, _ = eval_setup(config, test_mode="test")
        of_scene, picture = measure_scene(pipeline, options)
        rows += of_scene
        with replacing(options.output / f"{number}-{of_scene[0].scene}.png", "--output") as stream:
            save_image(picture, stream, format="png")
    content = json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    write_atomically(options.output / "consistency.json", content.encode(), "--output")
    table = Table()
    for heading in ("scene", "VAE", "cameras", "picture", "PSNR", "seen", "pairs"):
        table.add_column(heading, justify="right" if heading in ("PSNR", "seen", "pairs") else "left")
    for row in rows:
        table.add_row(
            row.scene, row.vae, row.cameras, row.picture, f"{row.psnr:.2f}", f"{row.seen:.0%}", str(row.pairs)
        )
    Console().print(table)
