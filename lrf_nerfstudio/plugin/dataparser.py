"""nerfstudio's default data parser, without its two failures on a fresh machine: open3d, and poses that spread NaN."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio, NerfstudioDataParserConfig
from nerfstudio.utils.io import load_from_json
from torch import Tensor

from lrf_nerfstudio.correspondence.colmap import has_model
from lrf_nerfstudio.correspondence.scene import MODEL_FOLDERS
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.poses import check_pose

MOST_PIXELS = 2**28
"""No photograph has more: a damaged size must not fill the memory before the photograph is opened."""


class NerfstudioParser(Nerfstudio):
    """`nerfstudio-data` whose poses are checked and whose point cloud is read with plyfile.

    nerfstudio reads the point cloud with open3d, which does not import where the system lacks libusb-1.0.
    """

    def _generate_dataparser_outputs(self, split: str = "train") -> DataparserOutputs:
        path = self.config.data if self.config.data.suffix == ".json" else self.config.data / "transforms.json"
        if path.exists():
            frames = load_from_json(path).get("frames", [])
            if not frames:
                raise UserError(f"{path} lists no images: its `frames` are empty.")
            # Before nerfstudio centres the poses: one bad pose would spoil them all, and nobody could tell which.
            for frame in frames:
                check_pose(np.asarray(frame["transform_matrix"], dtype=np.float64), f"{frame['file_path']} in {path}")
        return super()._generate_dataparser_outputs(split)

    def _load_3D_points(
        self, ply_file_path: Path, transform_matrix: Tensor, scale_factor: float
    ) -> dict[str, Tensor] | None:
        points = read_points(
            ply_file_path, "do without it: `nerfstudio-data --load-3D-points False` at the end of the command"
        )
        if len(points) == 0:
            return None
        points = (points @ transform_matrix[:3, :3].T + transform_matrix[:3, 3]) * scale_factor
        return {"points3D_xyz": points}


def setup_dataparser(config: DataParserConfig) -> DataParser:
    """The parser of a configuration; nerfstudio's default format gets the parser of this module."""
    if type(config) is NerfstudioDataParserConfig:
        return NerfstudioParser(config)
    return config.setup()


def scene_parser(scene: Path, downscale_factor: int | None, points: bool = True) -> DataParserConfig:
    """Return the parser of a scene's folder: nerfstudio's format where there is transforms.json, else COLMAP's.

    Args:
        scene: the folder.
        downscale_factor: N takes the photographs from images_N; None leaves the choice to nerfstudio.
        points: whether to read the scene's point cloud.

    Raises:
        UserError: if it holds neither.
    """
    if (scene / "transforms.json").exists():
        return NerfstudioDataParserConfig(
            data=scene, downscale_factor=downscale_factor, load_3D_points=points, eval_mode="interval"
        )
    model = next((Path(folder) for folder in MODEL_FOLDERS if has_model(scene / folder)), None)
    if model is None:
        raise UserError(
            f"{scene} is no scene: it has neither transforms.json nor a COLMAP model in {', '.join(MODEL_FOLDERS)}."
        )
    return ColmapDataParserConfig(
        data=scene,
        colmap_path=model,
        downscale_factor=downscale_factor,
        # Archives of reduced photographs round up, as Mip-NeRF 360's; where nothing is left over, all ways are one.
        downscale_rounding_mode="ceil",
        load_3D_points=points,
    )


def parse(parser: DataParser, data: Path, split: str) -> DataparserOutputs:
    """Read a split of a data set.

    Raises:
        UserError: the data set is missing, cannot be read, or has a pose that is no rigid motion.
    """
    if not data.exists():
        raise UserError(f"The data set {data} does not exist. --data takes the folder of a scene.")
    try:
        outputs = parser.get_dataparser_outputs(split=split)
    except ZeroDivisionError as error:  # nerfstudio divides by the largest distance of a camera from their centre
        raise UserError(
            f"All cameras of the data set {data} are in one place: it has a single image, or poses without "
            "translation. A radiance field needs views from several places."
        ) from error
    except UserError:
        raise
    except Exception as error:
        # nerfstudio's parsers check little: damaged files make them raise whatever comes first, struct.error, TypeError
        # or MemoryError, for example, and EOFError where they would have asked on a terminal.
        reason = f"missing key {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(
            f"The data set {data} cannot be read by nerfstudio's {type(parser.config).__name__}: {reason.strip()}. "
            "Scenes in another format need its name at the end of the command: colmap, blender-data, instant-ngp-data."
        ) from error
    if not outputs.image_filenames:
        raise UserError(f"The data set {data} has no images in its {split} split.")
    for path, pose in zip(outputs.image_filenames, outputs.cameras.camera_to_worlds.numpy(), strict=True):
        check_pose(pose, str(path))
    sizes = torch.cat([outputs.cameras.width, outputs.cameras.height], dim=1).tolist()  # [N, 2]
    for path, (width, height) in zip(outputs.image_filenames, sizes, strict=True):
        if not 0 < width * height <= MOST_PIXELS or width < 0:
            raise UserError(
                f"The camera of {path} in the data set {data} has {width} x {height} pixels. Correct its size."
            )
    return outputs


def read_points(file: Path, remedy: str) -> Tensor:
    """Read the positions [N, 3] float32 of a point cloud in the ply format.

    Args:
        file: to read.
        remedy: what can be done without it, for the message.

    Raises:
        UserError: it is missing, damaged, or has no positions.
    """
    from plyfile import PlyData, PlyParseError

    try:
        vertices = PlyData.read(file)["vertex"]
        return torch.from_numpy(np.stack([vertices[axis] for axis in "xyz"], axis=-1).astype(np.float32))
    except (OSError, PlyParseError, KeyError, ValueError) as error:  # ValueError where there is no x, y or z
        raise UserError(f"The point cloud {file} cannot be read: {error}. Restore it, or {remedy}.") from error


def select_images(outputs: DataparserOutputs, names: Sequence[str]) -> DataparserOutputs:
    """Keep the photographs of a data set that are named, in the order of the names.

    Raises:
        UserError: a photograph is named that the data set does not have, or two have one name.
    """
    counts = Counter(path.name for path in outputs.image_filenames)
    for name in names:
        if counts[name] != 1:
            raise UserError(
                f"{counts[name] or 'No'} photographs of the data set are called {name}, which "
                "--pipeline.datamanager.train-images or .eval-images asks for. Name photographs by their file names, "
                "and let the data parser choose all of them (its eval_mode `all`)."
            )
    numbers = {path.name: number for number, path in enumerate(outputs.image_filenames)}
    chosen = [numbers[name] for name in names]
    masks = outputs.mask_filenames
    return replace(
        outputs,
        image_filenames=[outputs.image_filenames[number] for number in chosen],
        cameras=outputs.cameras[torch.tensor(chosen)],
        mask_filenames=None if masks is None else [masks[number] for number in chosen],
    )


def with_points(outputs: DataparserOutputs, file: Path) -> DataparserOutputs:
    """Give a data set the points of a file, which are in the coordinates of its cameras, instead of its own.

    Raises:
        UserError: the file cannot be read.
    """
    points = read_points(file.expanduser(), "leave out --pipeline.datamanager.points")
    transform = outputs.dataparser_transform  # [3, 4] or [4, 4]
    points = (points @ transform[:3, :3].T + transform[:3, 3]) * outputs.dataparser_scale
    metadata = {name: value for name, value in outputs.metadata.items() if not name.startswith("points3D_")}
    return replace(outputs, metadata=metadata | {"points3D_xyz": points})


def in_dataset_coordinates(points: Tensor, outputs: DataparserOutputs) -> Tensor:
    """Return where points [N, 3] of the scene lie in the coordinates of the data set's cameras: undo `with_points`."""
    transform = outputs.dataparser_transform.to(points)
    return (points / outputs.dataparser_scale - transform[:3, 3]) @ torch.linalg.inv(transform[:3, :3]).T
