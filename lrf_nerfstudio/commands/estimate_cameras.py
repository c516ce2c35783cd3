"""Find the cameras of overlapping photographs with pycolmap and write a scene in nerfstudio's format.

For machines that lack the COLMAP program, which `ns-process-data images` needs: pycolmap is a Python package. All
photographs are taken for those of one camera with one zoom. Writes OUTPUT/transforms.json, OUTPUT/sparse_pc.ply (3D
points), OUTPUT/images and OUTPUT/colmap/sparse/0, all at once at the end.

Example: `lrf cameras --images holiday/statue --output statue --reduction 2`, then
`ns-train latent-splatfacto --data statue`.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import pycolmap
from nerfstudio.process_data.colmap_utils import colmap_to_json
from rich.console import Console
from rich.progress import Progress

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import unwritable
from lrf_nerfstudio.utils.images import find_images, read_image
from lrf_nerfstudio.utils.options import AtLeastOne, Range
from lrf_nerfstudio.utils.progress import progress_bar


@dataclass
class EstimateCameras:
    """Finds the cameras of overlapping photographs and writes a scene in nerfstudio's format."""

    images: Path
    """Folder of photographs, searched with its subfolders."""
    output: Path
    """Folder of the scene, which must not exist yet."""
    reduction: AtLeastOne = 1
    """The scene's photographs are so many times smaller along each side; they are kept without further loss, as PNG."""
    features: AtLeastOne = 4096
    """Points (SIFT) looked for in a photograph, at most."""
    overlap: AtLeastOne | None = None
    """Compare a photograph with so many that follow it by name, for frames of a video; if none, all with all."""
    threads: Annotated[int, Range(least=-1)] = -1
    """Processors to use; -1 takes all. With one, two runs give the same scene."""


def estimate(options: EstimateCameras) -> tuple[int, int, int]:
    """Writes the scene.

    Returns:
        Number of photographs, of those whose camera was found, and of 3D points.

    Raises:
        UserError: no photographs or unreadable ones, no overlap between them, or the output is there or unwritable.
    """
    output = options.output.resolve()
    if output.exists():
        raise UserError(f"{options.output} (--output) is there already: remove it, or choose another folder.")
    photographs = find_images([options.images])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A sibling that is renamed when all is there: what stops halfway leaves no half of a scene.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
            scene = Path(temporary) / "scene"
            (scene / "images").mkdir(parents=True)
            with progress_bar(transient=True) as progress:
                _copy_reduced(photographs, options, scene / "images", progress)
                model = _reconstruct(scene / "images", Path(temporary), options, progress)
            registered = {model.image(number).name for number in model.reg_image_ids()}
            for path in (scene / "images").iterdir():
                if path.name not in registered:
                    path.unlink()
            sparse = scene / "colmap" / "sparse" / "0"
            sparse.mkdir(parents=True)
            model.write(sparse)
            found = colmap_to_json(sparse, scene)
            os.rename(scene, output)
    except OSError as error:
        raise unwritable(options.output, error, "--output") from error
    return len(photographs), found, model.num_points3D()


def _copy_reduced(photographs: list[Path], options: EstimateCameras, folder: Path, progress: Progress) -> None:
    for number, path in enumerate(progress.track(photographs, description="Reading photographs"), start=1):
        image = read_image(path)
        if options.reduction > 1:
            height, width = (length // options.reduction for length in image.shape[:2])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
        _, encoded = cv2.imencode(".png", image[..., ::-1])
        (folder / f"frame_{number:05d}.png").write_bytes(encoded.tobytes())  # named as by ns-process-data


def _reconstruct(
    images: Path, workspace: Path, options: EstimateCameras, progress: Progress
) -> pycolmap.Reconstruction:
    """The largest model that incremental structure from motion finds."""
    pycolmap.set_random_seed(0)
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    database = workspace / "database.db"

    task = progress.add_task("Finding points", total=None)
    extraction = pycolmap.FeatureExtractionOptions(num_threads=options.threads, use_gpu=False)
    extraction.sift.max_num_features = options.features
    pycolmap.extract_features(database, images, camera_mode=pycolmap.CameraMode.SINGLE, extraction_options=extraction)
    progress.update(task, total=1, completed=1)

    task = progress.add_task("Matching them", total=None)
    matching = pycolmap.FeatureMatchingOptions(num_threads=options.threads, use_gpu=False)
    if options.overlap is None:
        pycolmap.match_exhaustive(database, matching_options=matching)
    else:
        pairing = pycolmap.SequentialPairingOptions(overlap=options.overlap)
        pycolmap.match_sequential(database, matching_options=matching, pairing_options=pairing)
    progress.update(task, total=1, completed=1)

    task = progress.add_task("Finding cameras", total=len(list(images.iterdir())))
    models = pycolmap.incremental_mapping(
        database,
        images,
        workspace / "models",
        options=pycolmap.IncrementalPipelineOptions(num_threads=options.threads),
        next_image_callback=lambda: progress.advance(task),
    )
    if not models:
        raise UserError(
            f"No two photographs in {options.images} (--images) overlap well enough to find their cameras. They must "
            "show the same things from different places; more of them, or more --features, may help."
        )
    return max(models.values(), key=lambda model: model.num_reg_images())


def main(options: EstimateCameras) -> None:
    """Find the cameras, write the scene and say how many were found."""
    photographs, found, points = estimate(options)
    Console().print(
        f"Found {found} of {photographs} cameras, and {points} points. Wrote {options.output}",
        markup=False,
        soft_wrap=True,
    )
