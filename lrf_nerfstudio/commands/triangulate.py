"""Triangulate points of a scene from photographs with known cameras.

For scenes that come without a point cloud, and for fields that are fitted to few views.

Features that look alike in neighboring photographs and obey the known cameras are located in space and written as a
point cloud in the coordinates of the data set's cameras. A field begins better at such points than at random ones:

    lrf triangulate --data scene --output scene/points.ply
    ns-train latent-splatfacto --data scene --pipeline.datamanager.points scene/points.ply
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lrf_nerfstudio.correspondence.triangulation import TriangulationConfig
from lrf_nerfstudio.plugin.dataparser import (
    in_dataset_coordinates,
    parse,
    scene_parser,
    select_images,
    setup_dataparser,
)
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.plugin.points import triangulated_points, write_points
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.options import AtLeastOne


@dataclass
class Triangulate:
    """Triangulates points from known cameras."""

    data: Path
    """Folder of the scene: transforms.json, or a COLMAP model."""
    output: Path
    """The point cloud (.ply) to write."""
    images: tuple[str, ...] = ()
    """Names of the photographs to use; all where none is named. What is held out must not be among them."""
    downscale_factor: AtLeastOne | None = None
    """N takes the photographs from images_N; nerfstudio chooses where none is given."""
    options: TriangulationConfig = field(default_factory=TriangulationConfig)
    """How points are found."""


def main(options: Triangulate) -> None:
    """Write the points and say how many there are.

    Raises:
        UserError: the scene cannot be read, nothing is found, or the file cannot be written.
    """
    data = options.data.expanduser()
    config = scene_parser(data, options.downscale_factor, points=False)
    config.eval_mode = "all"  # both of the parsers have it
    outputs = parse(setup_dataparser(config), data, "train")
    if options.images:
        outputs = select_images(outputs, options.images)
    if len(outputs.image_filenames) < 2:
        raise UserError("Points are triangulated from two photographs or more (--images).")
    dataset = PinholeDataset(outputs)
    dataset.check_sizes()
    points = triangulated_points(dataset, options.options)
    if not len(points):
        raise UserError(
            f"No two photographs of {data} show the same points from different places, as far as was found. Raise "
            "--options.ratio or --options.max-features, or leave the field to begin at random points."
        )
    write_points(options.output, in_dataset_coordinates(points, outputs), "--output")
    Console().print(
        f"Triangulated {len(points)} points from {len(dataset)} photographs. Wrote {options.output}",
        markup=False,
        soft_wrap=True,
    )
