"""Check that runs of text to 3D with the small diffusion model look like their own prompts.

The model of `lrf toy-diffusion` knows ten objects. Each run is rendered from all sides and compared with ray-traced
pictures of all ten from the same cameras: the overlap of the silhouettes, times 1 less the distance of the mean colors.
The table has a row for each run and a column for each object; every run should look most like the object of its prompt.

Writes `confusion.json`, the table, and `orbits.png`, a row of pictures of each run.

Example: `lrf prompt-confusion --load-config outputs/a-*/latent-dreamsplat/*/config.yml --output confusion`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lrf_nerfstudio.evaluation.likeness import likeness
from lrf_nerfstudio.guidance.orbits import OrbitConfig, OrbitViews, evaluation_orbit
from lrf_nerfstudio.guidance.toy_objects import OBJECTS, render_object
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import make_folder, replacing, write_atomically
from lrf_nerfstudio.utils.options import AtLeastOne

if TYPE_CHECKING:
    from lrf_nerfstudio.plugin.dream_pipeline import DreamSplatPipeline

SOLID = 0.5
"""Accumulated opacity from which a pixel belongs to the silhouette."""
NAMES = tuple(thing.name for thing in OBJECTS)


@dataclass
class PromptConfusion:
    """Compares runs of text to 3D with the ten objects of the small diffusion model."""

    load_config: tuple[Path, ...]
    """The config.yml of each run."""
    output: Path
    """Folder for the table and the pictures, which are replaced."""
    views: AtLeastOne = 8
    """Views of each run, on a turn around the object that begins in front of it."""


class Shown(NamedTuple):
    """What B cameras see of an object."""

    pictures: Tensor
    """[B, H, W, 3], RGB in [0, 1]."""
    silhouettes: Tensor
    """[B, H, W], True where the object is."""


class Row(NamedTuple):
    """A line of the table."""

    prompt: str
    """Of the run."""
    likeness: dict[str, float]
    """Of the run to each of the ten objects."""

    def most_like(self) -> str:
        """Return the name of the object that the run is most like."""
        return max(self.likeness, key=self.likeness.__getitem__)


@torch.no_grad()
def show(pipeline: "DreamSplatPipeline", orbit: OrbitViews) -> Shown:
    """Render a run; the result is on the CPU."""
    from lrf_nerfstudio.plugin.orbit_datamanager import FixedOrbit

    outputs = [pipeline.model.render(camera) for camera, _ in FixedOrbit(orbit.camera)]
    pictures = torch.stack([output["rgb"] for output in outputs])
    silhouettes = torch.stack([output["accumulation"][..., 0] > SOLID for output in outputs])
    return Shown(pictures.cpu(), silhouettes.cpu())


def load_runs(configs: tuple[Path, ...]) -> Iterator["DreamSplatPipeline"]:
    """Load runs one by one.

    Raises:
        UserError: if one is of another method, or its prompt is none of the ten.
    """
    from nerfstudio.utils.eval_utils import eval_setup

    from lrf_nerfstudio.plugin.dream_pipeline import DreamSplatPipeline

    for path in configs:
        if not path.is_file():
            raise UserError(f"There is no run {path} (--load-config).")
        _, pipeline, _, _ = eval_setup(path, test_mode="test")
        if not isinstance(pipeline, DreamSplatPipeline):
            raise UserError(f"{path} (--load-config) is no run of latent-dreamsplat.")
        if pipeline.config.model.prompt not in NAMES:
            raise UserError(
                f"The prompt of {path} (--load-config), {pipeline.config.model.prompt!r}, is none of those that the "
                f"small model knows: {', '.join(NAMES)}."
            )
        yield pipeline


def compare(configs: tuple[Path, ...], views: int) -> Iterator[tuple[str, list[float], Tensor]]:
    """Yield of each run its prompt, its likeness to the ten objects in their order, and its pictures [B, H, W, 3]."""
    known: tuple[OrbitConfig, float] | None = None  # the cameras that `objects` were seen from
    objects: list[Shown] = []
    for pipeline in load_runs(configs):
        config, cell = replace(pipeline.config.orbits, eval_views=views), pipeline.model.vae.spatial_factor
        if known != (config, cell):
            orbit = evaluation_orbit(config, cell)
            known, objects = (config, cell), [Shown(*render_object(thing, orbit)) for thing in OBJECTS]
        shown = show(pipeline, evaluation_orbit(config, cell, pipeline.device))
        assert pipeline.config.model.prompt is not None
        yield pipeline.config.model.prompt, [likeness(*shown, *true) for true in objects], shown.pictures


def main(options: PromptConfusion) -> None:
    """Compare the runs, write the files, print the table."""
    from torchvision.utils import save_image

    if not options.load_config:
        raise UserError("There is nothing to compare: give --load-config one run or more.")
    make_folder(options.output, "--output")
    rows, pictures = list[Row](), []
    for prompt, scores, shown in compare(options.load_config, options.views):
        rows.append(Row(prompt, dict(zip(NAMES, scores, strict=True))))
        pictures.append(torch.cat(list(shown), dim=1).permute(2, 0, 1))
    content = json.dumps([row._asdict() for row in rows], indent=2) + "\n"
    write_atomically(options.output / "confusion.json", content.encode(), "--output")
    with replacing(options.output / "orbits.png", "--output") as stream:
        save_image(torch.cat(pictures, dim=1), stream, format="png")
    table = Table("run", *(name.split(" ", 1)[1] for name in NAMES))
    for row in rows:
        cells = {name: f"{value:.2f}" for name, value in row.likeness.items()}
        cells[row.most_like()] = f"[bold]{cells[row.most_like()]}[/bold]"
        table.add_row(row.prompt, *cells.values())
    Console().print(table)
    right = sum(row.most_like() == row.prompt for row in rows)
    print(f"{right} of {len(rows)} runs look most like the object of their own prompt.")
